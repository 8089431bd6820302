"""Tables of a perplexity summary."""

from __future__ import annotations

from hf_sparse.results import DENSE, Column, Summary, Table, known, make_table

_INTERVAL = "{low:.4f} to {high:.4f}"


def all_tables(summary: Summary) -> list[Table]:
    """Every table that has lines."""
    made = [cells(summary) for cells in (perplexity_cells, method_cells, verdict_cells, overview_cells)]
    return [table for table in made if table[1]]


def perplexity_cells(summary: Summary) -> Table:
    """Perplexity and ratio to dense of every method and length.

    Where sliding-window layers make a difference to the density, that of the other layers has a column too.
    """
    columns: list[Column] = [
        ("method", "{method}"),
        ("length", "{length}"),
        ("perplexity", "{perplexity:.3f}"),
        ("ratio to dense", "{ratio:.4f}"),
        ("95 % interval", lambda row: "-" if row["method"] == DENSE else _INTERVAL.format(**row)),
        ("density", "{density:.3f}"),
        ("mean keys", known("mean_keys", ".0f")),
    ]
    if any(row.get("sparse_density") not in (None, row["density"]) for row in summary["results"]):
        columns.append(("density, full layers", known("sparse_density", ".3f")))
    return make_table(columns, summary["results"])


def method_cells(summary: Summary) -> Table:
    """Ratio to dense of every method, over all lengths and at its worst."""
    columns: list[Column] = [
        ("method", "{method}"),
        ("mean ratio", "{mean[ratio]:.4f}"),
        ("95 % interval", "{mean[low]:.4f} to {mean[high]:.4f}"),
        ("worst length", "{worst_length}"),
        ("worst ratio", "{worst[ratio]:.4f}"),
        ("95 % interval", "{worst[low]:.4f} to {worst[high]:.4f}"),
    ]
    return make_table(columns, (row for row in summary["methods"] if row["method"] != DENSE))


def verdict_cells(summary: Summary) -> Table:
    """Adaptive against fixed at equal cost, and which is better where the interval leaves no doubt."""
    columns: list[Column] = [
        ("adaptive / fixed", "{adaptive} / {fixed}"),
        ("over", "{over}"),
        ("ratio", "{ratio:.4f}"),
        ("95 % interval", _INTERVAL),
        ("better", "{better}"),
    ]
    lines = []
    for pair in summary["adaptive_vs_fixed"]:
        over = [(row["length"], row) for row in pair["by_length"]]
        for name, row in [*over, ("all lengths", pair["mean"]), ("worst length", pair["worst"])]:
            better = pair["adaptive"] if row["high"] < 1 else pair["fixed"] if row["low"] > 1 else "not resolved"
            lines.append(pair | row | {"over": name, "better": better})
    return make_table(columns, lines)


def overview_cells(summary: Summary) -> Table:
    """A line per method, a column per length: the dense model's perplexity, then ratios to it."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in summary["results"]):
        shown = {"ratio": "{ratio:.4f} (" + _INTERVAL + ")", "density": "{density:.3f}"}
        for name, form in ({"perplexity": "{perplexity:.2f}"} if method == DENSE else shown).items():
            own = [form.format(**row) for row in summary["results"] if row["method"] == method]
            lines.append([f"{method}: {name}", *own])
    return ["method", *(f"{length:,} tokens" for length in summary["lengths"])], lines
