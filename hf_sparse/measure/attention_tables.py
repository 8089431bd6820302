"""Tables of an attention-error summary: of each error the mean over the queries, then of the worst 1 % of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_sparse.measure.attention_summary import NEEDED, SHAPES, STATISTICS
from hf_sparse.measure.methods import CALIBRATED
from hf_sparse.results import DENSE, Column, Summary, Table, make_table

# What the tables show of the errors: a query's L1 error is twice its lost mass.
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
    """Errors of every method and length."""
    columns: list[Column] = [
        ("method", "{method}"),
        ("length", "{length}"),
        ("keys", "{kept:.0f}"),
        ("density", "{density:.3f}"),
        *((_TITLES[metric], _both(metric)) for metric in _SHOWN),
        ("frobenius", "{frobenius[value]:.3g}"),
    ]
    return make_table(columns, (row for row in summary["results"] if row["method"] != DENSE))


def shape_cells(summary: Summary) -> Table:
    """Keys that dense attention needs, and its entropy."""
    columns = [("length", "{length}"), ("visible keys", "{visible:.0f}")]
    columns += [(_TITLES[metric], _both(metric)) for metric in SHAPES]
    return make_table(columns, (row for row in summary["results"] if row["method"] == DENSE))


def slope_cells(summary: Summary) -> Table:
    """Slopes of ln error against ln n with their intervals."""
    fits = {(row["method"], row["metric"], row["statistic"]): row for row in summary["slopes"]}
    lines = [
        {"method": method, "metric": _TITLES[metric], **{name: fits[method, metric, name] for name in STATISTICS}}
        for method in (*summary["methods"], DENSE)
        for metric in (NEEDED if method == DENSE else _COMPARED)
    ]
    columns: list[Column] = [
        ("method", "{method}"),
        ("metric", "{metric}"),
        ("slope, mean row", lambda line: _estimate(line["mean"], "slope", "+.3f")),
        ("slope, worst 1 % of rows", lambda line: _estimate(line["worst"], "slope", "+.3f")),
        ("lengths fitted", lambda line: ",".join(map(str, line["mean"]["lengths"])) or "-"),
    ]
    return make_table(columns, lines)


def comparison_cells(summary: Summary) -> Table:
    """Error divided by that of the reference method, over all lengths and at each one's worst."""
    columns: list[Column] = [
        (f"method / {summary['reference']}", "{method}"),
        ("metric", lambda row: _TITLES[row["metric"]]),
        ("rows", lambda row: "mean" if row["statistic"] == "mean" else "worst 1 %"),
        ("mean over lengths", lambda row: _estimate(row["mean"], "ratio", ".3f")),
        ("worst length", lambda row: _estimate(row["worst_length"], "ratio", ".3f")),
    ]
    return make_table(columns, (row for row in summary["comparisons"] if row["metric"] in _COMPARED))


def layer_cells(summary: Summary, method: str) -> Table:
    """Errors of one method in every layer at the longest length."""
    columns: list[Column] = [
        ("layer", lambda row: f"{row['layer']}{' (window)' if row['windowed'] else ''}"),
        ("visible keys", "{visible:.0f}"),
        ("keys", "{kept:.0f}"),
        *((_TITLES[metric], f"{{{metric}_mean:.3g}} / {{{metric}_worst:.3g}}") for metric in _SHOWN),
    ]
    return make_table(columns, (row for row in summary["layers"] if row["method"] == method))


def _both(metric: str) -> str:
    """A cell with both statistics of a metric."""
    return " / ".join(f"{{{metric}[{statistic}][value]:.3g}}" for statistic in STATISTICS)


def _estimate(row: Mapping[str, Any], name: str, form: str) -> str:
    return "-" if row[name] is None else f"{row[name]:{form}} [{row['low']:{form}}, {row['high']:{form}}]"
