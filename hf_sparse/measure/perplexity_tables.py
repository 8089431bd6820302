"""The summary of perplexities as tables: a header and cells for `text_table` and `markdown_table`."""

from __future__ import annotations

from typing import Any

from hf_sparse.results import DENSE, Summary
from hf_sparse.tables import Table


def all_tables(summary: Summary) -> list[Table]:
    """Every table that has lines."""
    made = [cells(summary) for cells in (perplexity_cells, method_cells, verdict_cells, overview_cells)]
    return [table for table in made if table[1]]


def perplexity_cells(summary: Summary) -> Table:
    """Perplexity and ratio to dense of every method and length.

    Where sliding-window layers make a difference to the density, that of the other layers has a column too.
    """
    header = ["method", "length", "perplexity", "ratio to dense", "95 % interval", "density", "mean keys"]
    hybrid = any(row.get("sparse_density") not in (None, row["density"]) for row in summary["results"])
    header += ["density, full layers"] if hybrid else []
    cells = [
        [
            row["method"],
            str(row["length"]),
            f"{row['perplexity']:.3f}",
            f"{row['ratio']:.4f}",
            "-" if row["method"] == DENSE else _interval(row),
            f"{row['density']:.3f}",
            _known(row["mean_keys"], ".0f"),
        ]
        + ([_known(row["sparse_density"], ".3f")] if hybrid else [])
        for row in summary["results"]
    ]
    return header, cells


def overview_cells(summary: Summary) -> Table:
    """A line per method, a column per length: the dense model's perplexity, then ratios to it."""
    header = ["method", *(f"{length:,} tokens" for length in summary["lengths"])]
    cells = []
    for method in dict.fromkeys(row["method"] for row in summary["results"]):
        rows = [row for row in summary["results"] if row["method"] == method]
        if method == DENSE:
            cells.append(["dense: perplexity", *(f"{row['perplexity']:.2f}" for row in rows)])
        else:
            cells.append([f"{method}: ratio", *(f"{row['ratio']:.4f} ({_interval(row)})" for row in rows)])
            cells.append([f"{method}: density", *(f"{row['density']:.3f}" for row in rows)])
    return header, cells


def method_cells(summary: Summary) -> Table:
    """Ratio to dense of every method, over all lengths and at its worst."""
    header = ["method", "mean ratio", "95 % interval", "worst length", "worst ratio", "95 % interval"]
    cells = [
        [
            row["method"],
            f"{row['mean']['ratio']:.4f}",
            _interval(row["mean"]),
            str(row["worst_length"]),
            f"{row['worst']['ratio']:.4f}",
            _interval(row["worst"]),
        ]
        for row in summary["methods"]
        if row["method"] != DENSE
    ]
    return header, cells


def verdict_cells(summary: Summary) -> Table:
    """Adaptive against fixed at equal cost, and which is better where the interval leaves no doubt."""
    header = ["adaptive / fixed", "over", "ratio", "95 % interval", "better"]
    cells = []
    for pair in summary["adaptive_vs_fixed"]:
        over = [(str(row["length"]), row) for row in pair["by_length"]]
        for name, row in [*over, ("all lengths", pair["mean"]), ("worst length", pair["worst"])]:
            better = pair["adaptive"] if row["high"] < 1 else pair["fixed"] if row["low"] > 1 else "not resolved"
            cells.append([f"{pair['adaptive']} / {pair['fixed']}", name, f"{row['ratio']:.4f}", _interval(row), better])
    return header, cells


def _interval(row: dict[str, Any]) -> str:
    return f"{row['low']:.4f} to {row['high']:.4f}"


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
