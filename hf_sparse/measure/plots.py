"""Plots of the summaries against context length: at most three methods a panel, and dense attention in every one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sparse.errors import UserError
from hf_sparse.results import DENSE, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which colour-blind readers can tell apart, and markers for print in grey. Names that are
# never drawn together share a colour.
_STYLES = {
    DENSE: ("#000000", "s"),
    "topk": ("#0072B2", "o"),
    "calibrated": ("#0072B2", "o"),
    "cudnn": ("#0072B2", "o"),
    "fixed": ("#D55E00", "v"),
    "dynamic-cache": ("#D55E00", "v"),
    "masked-sdpa": ("#D55E00", "v"),
    "fraction": ("#009E73", "^"),
    "uniform": ("#009E73", "^"),
    "log": ("#E69F00", "D"),
    "decode": ("#E69F00", "D"),
    "static-cache": ("#E69F00", "D"),
    "grouped": ("#CC79A7", "P"),
    "power": ("#CC79A7", "P"),
    "hf_sparse": ("#CC79A7", "P"),
    "window": ("#56B4E9", "X"),
    "flash": ("#56B4E9", "X"),
    "fixed-grouped": ("#8C510A", "<"),
    "decode-topk": ("#882255", "h"),
    "sdpa": ("#000000", "s"),
    "eager": ("#666666", "*"),
}
# For methods of users.
_SPARE = (("#882255", ">"), ("#44AA99", "p"), ("#999933", "H"), ("#AA4499", "d"), ("#332288", "8"))

_METHODS_PER_PANEL = 3

Point = tuple[float, float, float, float]
"""x, value, and the ends of its interval."""


def style(method: str, methods: Sequence[str] = ()) -> dict[str, Any]:
    """Colour and marker of a method, as arguments for matplotlib.

    Args:
        method: Its name.
        methods: All that are drawn, which decides the colours of those that this package does not know.
    """
    unknown = [name for name in methods if name not in _STYLES] or [method]
    color, marker = _STYLES.get(method) or _SPARE[unknown.index(method) % len(_SPARE)]
    return {"color": color, "marker": marker, "markersize": 5}


def figure(width: float, height: float) -> Figure:
    """An empty figure, inches wide and high.

    Raises:
        UserError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'hf_sparse[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def length_axis(axes: Axes, lengths: Sequence[int], label: str) -> None:
    """Make x a log axis with a tick at each length."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(lengths), [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


@dataclass(frozen=True)
class _Panel:
    """One quantity.

    Attributes:
        title: What is drawn.
        label: Of the y axis.
        points: The points of a method.
        scale: Finishes the axes.
        band: Points below which the panel is shaded.
        by_depth: Whether x is a depth in the text in per cent, and not a length.
    """

    title: str
    label: str
    points: Callable[[str], Sequence[Point]]
    scale: Callable[[Axes], object] = field(default=lambda axes: axes.set_ylim(bottom=0))
    band: Sequence[Point] = ()
    by_depth: bool = False


def plot_perplexity(summary: Summary, path: Path) -> None:
    """Draw perplexity relative to dense with its intervals, perplexity itself, and density, against context length.

    Args:
        summary: From `perplexity_summary.summarise`.
        path: PNG file to write.

    Raises:
        UserError: without matplotlib.
    """

    def above_dense(method: str) -> list[Point]:
        values = ((row["length"], [row[name] for name in ("ratio", "low", "high")]) for row in _of(summary, method))
        return [(n, *(100 * (ratio - 1) for ratio in ratios)) for n, ratios in values]

    def scale(axes: Axes) -> None:
        # In per cent above dense, on an axis that shows one per cent and fifty at once.
        axes.set_yscale("symlog", linthresh=1.0)
        limits = axes.get_ylim()
        axes.set_yticks([-1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50], ["-1", "", "0", "", "1", "2", "5", "10", "20", "50"])
        axes.set_ylim(limits)

    panels = [
        _Panel("Perplexity above dense", "sparse / dense - 1 (%)", above_dense, scale),
        _Panel(
            "Perplexity",
            f"perplexity of the last {summary['targets']:,} tokens",
            lambda method: [_point(row["length"], row["perplexity"]) for row in _of(summary, method)],
            lambda axes: None,
        ),
        _Panel(
            "Attended keys",
            "kept / visible keys, all layers (%)",
            lambda method: [_point(row["length"], 100 * row["density"]) for row in _of(summary, method)],
        ),
    ]
    _draw(summary, "perplexity across context lengths", panels, path)


def plot_attention_error(summary: Summary, path: Path) -> None:
    """Draw kept keys, lost mass and output error of the mean query position against the visible keys n, on log axes.

    Args:
        summary: From `attention_summary.summarise`.
        path: PNG file to write.

    Raises:
        UserError: without matplotlib.
    """
    dense = _of(summary, DENSE)

    def error(metric: str) -> Callable[[str], list[Point]]:
        def points(method: str) -> list[Point]:
            if method == DENSE:
                return [_point(row["length"], 0.0) for row in dense]
            return [_interval(row["length"], row[metric]["mean"]) for row in _of(summary, method)]

        return points

    def scale(metric: str) -> Callable[[Axes], None]:
        values = [row[metric]["mean"]["value"] for row in summary["results"] if metric in row]
        smallest = min((value for value in values if value > 0), default=1.0)

        def with_zero(axes: Axes) -> None:
            """A log axis with room for dense attention, whose error is 0, at its foot."""
            threshold = 10.0 ** math.floor(math.log10(smallest))
            axes.set_yscale("symlog", linthresh=threshold, linscale=0.5)
            axes.set_ylim(bottom=-threshold / 5)

        return with_zero

    panels = [
        _Panel(
            "Keys kept (grey: needed for 95 % of the mass)",
            "keys per query position and head",
            lambda method: [_point(row["length"], row["kept"]) for row in _of(summary, method)],
            lambda axes: axes.set_yscale("log"),
            [_interval(row["length"], row["keys_95"]["mean"]) for row in dense],
        ),
        _Panel("Lost attention mass", "1 - retained mass", error("lost_mass"), scale("lost_mass")),
        _Panel("Error of a head's output", "error / norm of the output", error("output_error"), scale("output_error")),
    ]
    slopes = {
        row["method"]: row["slope"]
        for row in summary["slopes"]
        if (row["metric"], row["statistic"]) == ("lost_mass", "mean") and row["slope"] is not None
    }
    notes = {method: f"; lost mass grows as n$^{{{slope:+.2f}}}$" for method, slope in slopes.items()}
    _draw(summary, "attention error at equal cost, mean query position", panels, path, notes)


def plot_retrieval(summary: Summary, path: Path) -> None:
    """Draw the share of codes found again by length and by depth, and the nats that an answer token costs.

    Args:
        summary: From `retrieval_summary.summarise`.
        path: PNG file to write.

    Raises:
        UserError: without matplotlib.
    """
    longest = summary["lengths"][-1]

    def by_length(name: str, factor: float) -> Callable[[str], list[Point]]:
        return lambda method: [_interval(row["length"], row[name], factor) for row in _of(summary, method)]

    def by_depth(method: str) -> list[Point]:
        rows = [row for row in summary["depths"] if (row["method"], row["length"]) == (method, longest)]
        return [_point(100 * row["depth"], 100 * row["accuracy"]) for row in rows]

    def share(axes: Axes) -> None:
        axes.set_ylim(-3, 103)

    panels = [
        _Panel("Codes found again", "exact answers (%)", by_length("accuracy", 100), share),
        _Panel(f"Codes found again at {longest:,} tokens", "exact answers (%)", by_depth, share, by_depth=True),
        _Panel("Cost of the answer", "nats per answer token", by_length("nats", 1)),
    ]
    _draw(summary, "retrieval of codes from a text", panels, path)


def _draw(
    summary: Summary, what: str, panels: Sequence[_Panel], path: Path, notes: dict[str, str] | None = None
) -> None:
    """A line of panels for every three methods, with one legend below."""
    methods = [method for method in dict.fromkeys(row["method"] for row in summary["results"]) if method != DENSE]
    number = max(1, math.ceil(len(methods) / _METHODS_PER_PANEL))
    size = math.ceil(len(methods) / number)
    groups = [methods[i * size : (i + 1) * size] for i in range(number)]
    drawing = figure(4.4 * len(panels), 3.4 * len(groups) + 1.4)
    grid = drawing.subplots(len(groups), len(panels), squeeze=False, sharey="col")
    handles: dict[str, Any] = {}
    lengths = summary["lengths"]
    span = math.log2(lengths[-1] / lengths[0]) or 1.0
    for i, group in enumerate(groups):
        for axes, panel in zip(grid[i], panels, strict=True):
            for j, method in enumerate([DENSE, *group]):
                # Side by side, so that lines and intervals do not cover one another.
                aside = 0.01 * (j - len(group) / 2) if method != DENSE else 0.0
                points = panel.points(method)
                handles[method] = axes.errorbar(
                    [x + 100 * aside if panel.by_depth else x * 2 ** (span * aside) for x, *_ in points],
                    [value for _, value, *_ in points],
                    yerr=_bars(points),
                    capsize=2,
                    label=_label(method, summary) + (notes or {}).get(method, ""),
                    linestyle="--" if method == DENSE else "-",
                    **style(method, methods),
                )
            if panel.band:
                n, needed, *_ = zip(*panel.band, strict=True)
                axes.fill_between(n, needed, color="#DDDDDD", zorder=0)
    for axes, panel in [each for row in grid for each in zip(row, panels, strict=True)]:
        length_axis(axes, lengths, "context length (tokens)")
        if panel.by_depth:
            axes.set_xscale("linear")
            axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100"])
            axes.set_xlabel("depth of the code in the text (%)")
        panel.scale(axes)
        axes.set(title=panel.title, ylabel=panel.label)

    about, documents = summary["about"], len(summary["documents"])
    model = f"{about['model']['name']} ({about['dtype']})"
    drawing.suptitle(f"{model}: {what}, {documents} document{'s'[: documents > 1]}", fontsize=11)
    drawing.legend(handles=list(handles.values()), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=150)


def _of(summary: Summary, method: str) -> list[Summary]:
    return [row for row in summary["results"] if row["method"] == method]


def _point(x: float, value: float) -> Point:
    return x, value, value, value


def _interval(x: float, estimate: Summary, factor: float = 1.0) -> Point:
    return x, factor * estimate["value"], factor * estimate["low"], factor * estimate["high"]


def _bars(points: Iterable[Sequence[float]]) -> list[list[float]] | None:
    """Lengths of the error bars below and above; an interval may miss its value by rounding."""
    bars = [[max(0.0, value - low), max(0.0, high - value)] for _, value, low, high in points]
    return [list(side) for side in zip(*bars, strict=True)] if any(map(any, bars)) else None


def _label(method: str, summary: Summary) -> str:
    """What a method does, from its configuration: how the text is read, selector and law."""
    config = summary["configs"].get(method)
    if config is None:
        return method
    # A user's own selector or law is described by a dictionary.
    selector, law = (part["name"] if isinstance(part, dict) else part for part in (config["selector"], config["law"]))
    if method.startswith("decode"):
        selector = f"decoding, {selector}"
    if config["per_head"] is not None:
        return f"{selector}, calibrated per head"
    match law:
        case "power":
            law = f"{config['alpha']:.4g} n$^{{{config['exponent']:.3g}}}$ keys"
        case "fixed":
            law = f"{config['keys']} keys"
        case "fraction":
            law = f"{100 * (config['fraction'] or 0):.3g} % of n"
        case "log":
            law = f"{config['alpha']:.3g} ln n keys"
    return f"{selector}, {law}"
