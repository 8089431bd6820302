"""Plots of a retrieval summary: depth x length for every method side by side, and scores against density."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_sparse.measure.plots import figure, log_axis, save, style
from hf_sparse.results import DENSE, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LADDER = "fraction-"
_LABELS = {"picked": "true answer is the likeliest (%)", "found": "share of the answer written (%)"}
# Colours of lengths, of which the longest have a line in a panel.
_COLORS = ("#56B4E9", "#009E73", "#D55E00", "#000000")


def plot_retrieval(summary: Summary, path: Path) -> None:
    """Heat maps of how often the true answer is the likeliest, by depth and length, over scores against density."""
    methods = list(dict.fromkeys(row["method"] for row in summary["results"]))
    modes = summary["modes"] if summary["depths"] else []
    tall = 1.2 + 0.25 * len(summary["lengths"])
    drawing = figure(max(10.0, 1.9 * len(methods) + 1.5), 4.2 + tall * len(modes))
    parts = drawing.subfigures(1 + bool(modes), 1, squeeze=False, height_ratios=[tall * len(modes), 4.2][not modes :])
    about, documents = summary["about"], len(summary["documents"])
    name = f"{about['model']['name']} ({about['dtype']})"
    drawing.suptitle(f"{name}: retrieval from {documents} document{'s'[: documents > 1]}", fontsize=11)
    if modes:
        _heat_maps(parts[0, 0], summary, methods)
    _against_density(parts[-1, 0], summary, methods)
    save(drawing, path)


def _heat_maps(part: Any, summary: Summary, methods: list[str]) -> None:
    """A line of maps for each mode: the mean over the tasks whose questions have a depth."""
    grid = part.subplots(len(summary["modes"]), len(methods), squeeze=False, sharex=True, sharey=True)
    depths = sorted({row["depth"] for row in summary["depths"]})
    tasks = list(dict.fromkeys(row["task"] for row in summary["depths"]))
    image = None
    for line, mode in zip(grid, summary["modes"], strict=True):
        for axes, method in zip(line, methods, strict=True):
            own = [row for row in summary["depths"] if (row["mode"], row["method"]) == (mode, method)]
            values = [
                [
                    np.mean([100 * r["picked"] for r in own if (r["depth"], r["length"]) == (depth, n)])
                    for depth in depths
                ]
                for n in summary["lengths"]
            ]
            image = axes.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
            for (i, j), value in np.ndenumerate(values):
                light = "white" if abs(value - 50) > 35 else "black"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color=light)
            axes.set_title(f"{method}, {mode}", fontsize=9)
            axes.set_xticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths], fontsize=8)
            axes.set_yticks(range(len(summary["lengths"])), [f"{n:,}" for n in summary["lengths"]], fontsize=8)
    part.supxlabel(f"depth in the text (%), mean of {', '.join(tasks)}", fontsize=9)
    part.supylabel("length (tokens)", fontsize=9)
    part.colorbar(image, ax=grid, label="likeliest (%)", aspect=12)


def _against_density(part: Figure, summary: Summary, methods: list[str]) -> None:
    """A panel for each mode and score: a line of fixed shares for each length, and the other methods beside it."""
    places = [(mode, score) for mode in summary["modes"] for score in _LABELS]
    panels = part.subplots(1, len(places), squeeze=False)[0]
    lengths = summary["lengths"][-len(_COLORS) :]
    lines: dict[str, Any] = {}
    marks: dict[str, Any] = {}
    for axes, (mode, score) in zip(panels, places, strict=True):
        rows = {row["method"]: row for row in summary["verdicts"] if (row["mode"], row["score"]) == (mode, score)}
        for length, color in zip(lengths, _COLORS[-len(lengths) :], strict=True):
            points = {
                method: (100 * own["density"], 100 * own["score"])
                for method, row in rows.items()
                for own in row["lengths"]
                if own["length"] == length and own["score"] is not None
            }
            ladder = [xy for method, xy in points.items() if method == DENSE or method.startswith(_LADDER)]
            label = f"{length:,} tokens"
            if ladder:
                [lines[label]] = axes.plot(*zip(*sorted(ladder), strict=True), "-s", color=color, ms=4, label=label)
            for method, (x, y) in points.items():
                if method != DENSE and not method.startswith(_LADDER):
                    look = style(method, methods) | {"linestyle": "none", "markeredgecolor": color, "markersize": 8}
                    [marks[method]] = axes.plot(x, y, label=method, **look)
        _finish(axes, f"{mode}, tasks that count", _LABELS[score])
    if handles := [*lines.values(), *marks.values()]:
        part.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=9)


def _finish(axes: Axes, title: str, label: str) -> None:
    log_axis(axes, [2, 5, 10, 20, 50, 100], "kept / visible keys (%)")
    axes.set(xlim=(1.5, 115), ylim=(-3, 103), ylabel=label)
    axes.set_title(title, fontsize=10)
