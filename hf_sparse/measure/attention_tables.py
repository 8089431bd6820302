"""The summary of attention errors as tables: a header and cells for `text_table` and `markdown_table`."""

from __future__ import annotations

from typing import Any

from hf_sparse.measure.attention_summary import NEEDED, SHAPES, STATISTICS
from hf_sparse.measure.methods import CALIBRATED
from hf_sparse.results import DENSE, Summary
from hf_sparse.tables import Table

# What the tables show of the errors: the row L1 is twice the lost mass.
_SHOWN = ("retained_mass", "max_entry", "l2", "output_error")
_COMPARED = ("lost_mass", "max_entry", "l2", "output_error")
_TITLES = {
    "retained_mass": "retained mass",
    "lost_mass": "lost mass",
    "max_entry": "max entry",
    "l2": "row L2",
    "output_error": "output error",
    "keys_90": "keys for 90 %",
    "keys_95": "keys for 95 %",
    "keys_99": "keys for 99 %",
    "entropy": "entropy (nats)",
}


def all_tables(summary: Summary) -> list[Table]:
    """Every table; layers are shown of the default method, if it was measured."""
    makers = (error_cells, shape_cells, slope_cells, comparison_cells)
    methods = summary["methods"]
    shown = next(name for name in (CALIBRATED, "grouped", *methods) if name in methods)
    return [*(cells(summary) for cells in makers), layer_cells(summary, shown)]


def error_cells(summary: Summary) -> Table:
    """Errors of every method and length: the mean row, and the worst 1 % of rows after a slash."""
    header = ["method", "length", "keys", "density", *(_TITLES[metric] for metric in _SHOWN), "frobenius"]
    cells = [
        [row["method"], str(row["length"]), f"{row['kept']:.0f}", f"{row['density']:.3f}"]
        + [_mean_and_worst(row, metric) for metric in _SHOWN]
        + [f"{row['frobenius']['value']:.3g}"]
        for row in summary["results"]
        if row["method"] != DENSE
    ]
    return header, cells


def shape_cells(summary: Summary) -> Table:
    """Keys that dense attention needs, and its entropy: the mean row, and the worst 1 % of rows after a slash."""
    cells = [
        [str(row["length"]), f"{row['visible']:.0f}", *(_mean_and_worst(row, metric) for metric in SHAPES)]
        for row in summary["results"]
        if row["method"] == DENSE
    ]
    return ["length", "visible keys", *(_TITLES[metric] for metric in SHAPES)], cells


def slope_cells(summary: Summary) -> Table:
    """Slopes of ln error against ln n with their intervals, of the mean row and of the worst 1 %."""
    fits = {(row["method"], row["metric"], row["statistic"]): row for row in summary["slopes"]}
    names = ("mean row", "worst 1 % of rows")
    header = ["method", "metric", *(f"slope, {name}" for name in names), "lengths fitted"]
    cells = [
        [method, _TITLES[metric]]
        + [_estimate(fits[method, metric, statistic], "slope", "+.3f") for statistic in STATISTICS]
        + [",".join(map(str, fits[method, metric, "mean"]["lengths"])) or "-"]
        for method in (*summary["methods"], DENSE)
        for metric in (NEEDED if method == DENSE else _COMPARED)
    ]
    return header, cells


def comparison_cells(summary: Summary) -> Table:
    """Error divided by that of the reference method, over all lengths and at each one's worst."""
    header = [f"method / {summary['reference']}", "metric", "rows", "mean over lengths", "worst length"]
    cells = [
        [row["method"], _TITLES[row["metric"]], "mean" if row["statistic"] == "mean" else "worst 1 %"]
        + [_estimate(row[over], "ratio", ".3f") for over in ("mean", "worst_length")]
        for row in summary["comparisons"]
        if row["metric"] in _COMPARED
    ]
    return header, cells


def layer_cells(summary: Summary, method: str) -> Table:
    """Errors of one method in every layer at the longest length."""
    header = ["layer", "visible keys", "keys", *(_TITLES[metric] for metric in _SHOWN)]
    cells = [
        [f"{row['layer']}{' (window)' if row['windowed'] else ''}", f"{row['visible']:.0f}", f"{row['kept']:.0f}"]
        + [f"{row[f'{metric}_mean']:.3g} / {row[f'{metric}_worst']:.3g}" for metric in _SHOWN]
        for row in summary["layers"]
        if row["method"] == method
    ]
    return header, cells


def _mean_and_worst(row: dict[str, Any], metric: str) -> str:
    return " / ".join(f"{row[metric][statistic]['value']:.3g}" for statistic in STATISTICS)


def _estimate(row: dict[str, Any], name: str, form: str) -> str:
    if row[name] is None:
        return "-"
    return f"{row[name]:{form}} [{row['low']:{form}}, {row['high']:{form}}]"
