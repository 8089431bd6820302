"""Plots of the summaries against context length: at most three methods a panel, and dense attention in every one.

Every `plot_` function takes a summary and the PNG file to write, and raises a UserError without matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sparse.errors import UserError
from hf_sparse.measure.methods import IN_8_BITS
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
    "8-bit": ("#009E73", "^"),
    "dense-8-bit": ("#666666", "*"),
    "sdpa": ("#000000", "s"),
    "eager": ("#666666", "*"),
}
# For methods of users.
_SPARE = (("#882255", ">"), ("#44AA99", "p"), ("#999933", "H"), ("#AA4499", "d"), ("#332288", "8"))

_METHODS_PER_PANEL = 3

Estimate = tuple[float, float, float]
"""A value and the ends of its interval."""


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
    """An empty figure, inches wide and high; a `UserError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'hf_sparse[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(drawing: Figure, path: Path) -> None:
    """Write a drawing to a PNG file, whose folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=150)


def log_axis(axes: Axes, ticks: Sequence[int], label: str) -> None:
    """Make x a log axis with these ticks."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ticks), [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


@dataclass(frozen=True)
class _Panel:
    """One quantity: its title, the label of the y axis, and how it is drawn.

    Attributes:
        value: What is drawn of a row of the summary.
        scale: Finishes the y axis, once everything is drawn.
        band: Metric of dense attention under which the panel is shaded.
    """

    title: str
    label: str
    value: Callable[[Summary], Estimate]
    scale: Callable[[Axes], object]
    band: str | None = None


def plot_perplexity(summary: Summary, path: Path) -> None:
    """Perplexity relative to dense with its intervals, perplexity itself, and density, against context length."""
    targets = f"perplexity of the last {summary['targets']:,} tokens"
    panels = [
        _Panel("Perplexity above dense", "sparse / dense - 1 (%)", _per_cent_above, _one_and_fifty_per_cent),
        _Panel("Perplexity", targets, lambda row: _exact(row["perplexity"]), lambda axes: None),
        _Panel("Attended keys", "kept / visible keys (%)", lambda row: _exact(100 * row["density"]), _from_zero),
    ]
    _draw(summary, "perplexity across context lengths", panels, path)


def plot_attention_error(summary: Summary, path: Path) -> None:
    """Kept keys, lost mass and output error of the mean query against context length, on log axes."""

    def error(title: str, label: str, metric: str) -> _Panel:
        def value(row: Summary) -> Estimate:
            mean = {"value": 0.0, "low": 0.0, "high": 0.0} if row["method"] == DENSE else row[metric]["mean"]
            return mean["value"], mean["low"], mean["high"]

        smallest = min((value(row)[0] for row in summary["results"] if value(row)[0] > 0), default=1.0)
        threshold = 10.0 ** math.floor(math.log10(smallest))

        def scale(axes: Axes) -> None:
            # A log axis, at whose foot there is room for dense attention, whose error is 0.
            axes.set_yscale("symlog", linthresh=threshold, linscale=0.5)
            axes.set_ylim(bottom=-threshold / 5)

        return _Panel(title, label, value, scale)

    title = "Keys kept (grey: needed for 95 % of the mass)"
    panels = [
        _Panel(title, "keys per query and head", lambda row: _exact(row["kept"]), _log_scale, band="keys_95"),
        error("Lost attention mass", "1 - retained mass", "lost_mass"),
        error("Error of a head's output", "error / norm of the output", "output_error"),
    ]
    notes = {
        row["method"]: f"; lost mass grows as n$^{{{row['slope']:+.2f}}}$"
        for row in summary["slopes"]
        if (row["metric"], row["statistic"]) == ("lost_mass", "mean") and row["slope"] is not None
    }
    _draw(summary, "attention error at equal cost, mean query", panels, path, notes)


def _draw(
    summary: Summary, what: str, panels: Sequence[_Panel], path: Path, notes: Mapping[str, str] | None = None
) -> None:
    """A line of panels for every three methods, with one legend below."""
    methods = [method for method in dict.fromkeys(row["method"] for row in summary["results"]) if method != DENSE]
    number = max(1, math.ceil(len(methods) / _METHODS_PER_PANEL))
    size = math.ceil(len(methods) / number)
    drawing = figure(4.4 * len(panels), 3.4 * number + 1.4)
    grid = drawing.subplots(number, len(panels), squeeze=False, sharey="col")
    places = [(axes, panel, i) for i, line in enumerate(grid) for axes, panel in zip(line, panels, strict=True)]
    handles: dict[str, Any] = {}
    for axes, panel, i in places:
        for j, method in enumerate([DENSE, *methods[i * size : (i + 1) * size]]):
            label = _label(method, summary) + (notes or {}).get(method, "")
            # Side by side, so that lines and intervals do not cover one another.
            aside = 0.01 * (0, -1, 1, 2)[j]
            handles[method] = _draw_method(
                axes, panel, summary, method, aside, {"label": label, **style(method, methods)}
            )
        if panel.band:
            dense = [row for row in summary["results"] if row["method"] == DENSE]
            needed = [row[panel.band]["mean"]["value"] for row in dense]
            axes.fill_between([row["length"] for row in dense], needed, color="#DDDDDD", zorder=0)
    # Panels of a column share their y axis: it is finished once all methods are drawn.
    for axes, panel, _ in places:
        log_axis(axes, summary["lengths"], "context length (tokens)")
        panel.scale(axes)
        axes.set(title=panel.title, ylabel=panel.label)
    about, documents = summary["about"], len(summary["documents"])
    model = f"{about['model']['name']} ({about['dtype']})"
    drawing.suptitle(f"{model}: {what}, {documents} document{'s'[: documents > 1]}", fontsize=11)
    drawing.legend(handles=list(handles.values()), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save(drawing, path)


def _draw_method(
    axes: Axes, panel: _Panel, summary: Summary, method: str, aside: float, look: Mapping[str, Any]
) -> Any:
    """The line of a method in a panel, moved to the right by the share `aside` of the x axis."""
    rows = [row for row in summary["results"] if row["method"] == method]
    octaves = math.log2(summary["lengths"][-1] / summary["lengths"][0]) or 1.0
    x = [row["length"] * 2 ** (octaves * aside) for row in rows]
    y = list(map(panel.value, rows))
    order, line = (3, "--") if method == DENSE else (2, "-")
    return axes.errorbar(x, [value for value, *_ in y], yerr=_bars(y), capsize=2, linestyle=line, zorder=order, **look)


def _exact(value: float) -> Estimate:
    return value, value, value


def _per_cent_above(row: Summary) -> Estimate:
    value, low, high = (100 * (row[name] - 1) for name in ("ratio", "low", "high"))
    return value, low, high


def _bars(estimates: Sequence[Estimate]) -> list[list[float]] | None:
    """Lengths of the error bars below and above; an interval may miss its value by rounding."""
    bars = [[max(0.0, value - low), max(0.0, high - value)] for value, low, high in estimates]
    return [list(side) for side in zip(*bars, strict=True)] if any(map(any, bars)) else None


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")


def _from_zero(axes: Axes) -> None:
    axes.set_ylim(bottom=0)


def _one_and_fifty_per_cent(axes: Axes) -> None:
    """An axis that shows one per cent and fifty at once."""
    axes.set_yscale("symlog", linthresh=1.0)
    limits = axes.get_ylim()
    axes.set_yticks([-1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50], ["-1", "", "0", "", "1", "2", "5", "10", "20", "50"])
    axes.set_ylim(limits)


def _label(method: str, summary: Summary) -> str:
    """What a method does, from its configuration: how the text is read, selector and law."""
    config = summary["configs"].get(method)
    if config is None:
        return method
    # A user's own selector or law is described by a dictionary.
    selector, law = (part["name"] if isinstance(part, dict) else part for part in (config["selector"], config["law"]))
    if method.startswith("decode"):
        selector = f"decoding, {selector}"
    if method in IN_8_BITS:
        selector = f"{selector}, cache in 8 bits"
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
