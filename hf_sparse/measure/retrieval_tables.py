"""Tables of a retrieval summary: a verdict in words, scores by task, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hf_sparse.results import DENSE, Column, Summary, Table, known, make_table

_TITLES = {"picked": "answer likelier than three wrong ones, %", "found": "share of the answer written, %"}


def all_tables(summary: Summary) -> list[Table]:
    """The verdict, both scores, and densities and times."""
    verdict = ["verdict"], [[sentence] for sentence in sentences(summary)]
    return [verdict, *(score_cells(summary, score) for score in _TITLES), cost_cells(summary)]


def sentences(summary: Summary) -> Iterator[str]:
    """What each method loses or gains in each mode, in words."""
    found = {(row["mode"], row["method"], row["score"]): row for row in summary["verdicts"]}
    for mode, method, score in found:
        if method == DENSE or score != "picked":
            continue
        picked, written = found[mode, method, "picked"], found[mode, method, "found"]
        yield (
            f"{method}, {mode}: by likelihood {_difference(picked)}, in writing {_difference(written)}, at density "
            f"{picked['density']:.2f}"
        )


def _difference(row: dict[str, Any]) -> str:
    counted = f"{row['counted']} of {row['cells']} tasks and lengths counted"
    if row["above_dense"] is None:
        return f"nothing to compare ({counted})"
    value, low, high = (100 * row["above_dense"][name] for name in ("value", "low", "high"))
    side = "below" if value < 0 else "above"
    where = "level with dense" if abs(value) < 0.05 else f"{abs(value):.1f} points {side} dense"
    return f"{where} ({low:.1f} to {high:.1f}; {counted})"


def score_cells(summary: Summary, score: str) -> Table:
    """A score of dense attention for each task, mode and length, and the differences of all methods to it."""
    found = {(row["task"], row["mode"], row["length"], row["method"]): row for row in summary["results"]}
    methods = [method for method in dict.fromkeys(row["method"] for row in summary["results"]) if method != DENSE]
    lines = []
    for task, mode, length in dict.fromkeys(place[:3] for place in found):
        dense = found[task, mode, length, DENSE]
        mark = "" if score in dense["counted"] else " (near chance)"
        line = [f"{task}, {mode}", f"{length}", f"{100 * dense[score]['value']:.0f}{mark}"]
        for method in methods:
            above = found[task, mode, length, method][f"{score}_above_dense"]
            value, low, high = (100 * above[name] for name in ("value", "low", "high"))
            line.append(f"{value:+.0f} ({low:.0f} to {high:.0f})")
        lines.append(line)
    return [_TITLES[score], "length", "dense", *(f"{method} - dense" for method in methods)], lines


def cost_cells(summary: Summary) -> Table:
    """Densities and times of every method, mode and length, means over tasks."""
    lines = []
    for mode, method, length in dict.fromkeys(
        (row["mode"], row["method"], row["length"]) for row in summary["results"]
    ):
        own = [r for r in summary["results"] if (r["mode"], r["method"], r["length"]) == (mode, method, length)]
        means = {
            name: None if own[0][name] is None else sum(row[name] for row in own) / len(own)
            for name in ("density", "answer_density", "mean_keys", "seconds", "mode_seconds", "margin", "exact")
        }
        lines.append({"method": f"{method}, {mode}", "length": length, **means})
    columns: list[Column] = [
        ("method", "{method}"),
        ("length", "{length}"),
        ("density", known("density", ".3f")),
        ("density, answers", "{answer_density:.3f}"),
        ("mean keys", known("mean_keys", ".0f")),
        ("margin, nats", "{margin:.2f}"),
        ("exact answers", "{exact:.3f}"),
        ("text, s", "{seconds:.1f}"),
        ("questions, s", "{mode_seconds:.1f}"),
    ]
    return make_table(columns, lines)
