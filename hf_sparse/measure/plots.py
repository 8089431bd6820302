"""Plots of the summaries: perplexity, and attention error, against context length. Dense is always drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sparse.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Summary = dict[str, Any]

DENSE = "dense"

# The palette of Okabe and Ito, which colour-blind readers can tell apart, and markers for print in grey.
_STYLES = {
    DENSE: ("#000000", "s"),
    "topk": ("#0072B2", "o"),
    "fixed": ("#D55E00", "v"),
    "fraction": ("#009E73", "^"),
    "log": ("#E69F00", "D"),
    "grouped": ("#CC79A7", "P"),
    "window": ("#56B4E9", "X"),
    "fixed-grouped": ("#8C510A", "<"),
    "calibrated": ("#0072B2", "o"),
    "power": ("#CC79A7", "P"),
    "uniform": ("#009E73", "^"),
    "decode": ("#E69F00", "D"),
    "decode-topk": ("#882255", "h"),
}

# metric -> title, label of the axis
_ERRORS = {
    "lost_mass": ("Lost attention mass", "1 - retained mass"),
    "output_error": ("Error of a head's output", "error / norm of the dense output"),
    "max_entry": ("Largest error of an attention weight", "largest difference in a row"),
}


def plot_perplexity(summary: Summary, path: Path) -> None:
    """Draw perplexity relative to dense with its intervals, perplexity itself, and density, against context length.

    Args:
        summary: From `perplexity_summary.summarise`.
        path: PNG file to write.

    Raises:
        UserError: without matplotlib.
    """
    drawing = figure(13, 4.6)
    ratio, absolute, density = drawing.subplots(1, 3)
    methods = list(dict.fromkeys(row["method"] for row in summary["results"]))
    for i, method in enumerate(methods):
        rows = [row for row in summary["results"] if row["method"] == method]
        lengths = [row["length"] for row in rows]
        style = _style(method) | {"label": _label(method, summary)}
        # In per cent above dense, on an axis that shows one per cent and fifty at once.
        values = [100 * (row["ratio"] - 1) for row in rows]
        bounds = [{name: 100 * (row[name] - 1) for name in ("low", "high")} for row in rows if method != DENSE]
        # Side by side, so that intervals do not cover one another.
        aside = 0.0 if method == DENSE else 0.05 * (i - len(methods) / 2)
        places = [length * 2**aside for length in lengths]
        ratio.errorbar(places, values, yerr=_bars(values, bounds) if bounds else None, capsize=3, **style)
        absolute.plot(lengths, [row["perplexity"] for row in rows], **style)
        density.plot(lengths, [100 * row["density"] for row in rows], **style)
    ratio.set_yscale("symlog", linthresh=1.0)
    ratio.set_yticks([-1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50], ["-1", "", "0", "", "1", "2", "5", "10", "20", "50"])
    ratio.set(title="Perplexity above dense", ylabel="perplexity / dense perplexity - 1 (%)")
    absolute.set(title="Perplexity", ylabel=f"perplexity of the last {summary['targets']:,} tokens")
    density.set(title="Attended keys", ylabel="kept / visible keys, all layers (%)", ylim=(0, None))
    for axes in (ratio, absolute, density):
        length_axis(axes, summary["lengths"], "context length (tokens)")
    _finish(drawing, summary, "perplexity across context lengths", _handles(ratio), path)


def plot_attention_error(summary: Summary, path: Path) -> None:
    """Draw three errors of every method against the visible keys n, on log axes, with their fitted slopes; and k(n).

    Filled markers and solid lines are the mean row, hollow markers and dashed lines the worst 1 % of rows. Bold lines
    are the least-squares fits whose slopes stand in the legends.

    Args:
        summary: From `attention_summary.summarise`.
        path: PNG file to write.

    Raises:
        UserError: without matplotlib.
    """
    drawing = figure(12, 11)
    panels = drawing.subplots(2, 2).flatten()
    for axes, (metric, (title, label)) in zip(panels, _ERRORS.items(), strict=False):
        for method in summary["methods"]:
            _draw_error(axes, summary, method, metric)
        axes.set(title=title, ylabel=label, yscale="log")
        axes.legend(fontsize=8, title="slope of the mean row, of the worst 1 % [95 % interval]", title_fontsize=8)
    _draw_keys(panels[-1], summary)
    for axes in panels:
        length_axis(axes, summary["lengths"], "visible keys n")
    _finish(
        drawing,
        summary,
        "attention error at equal cost",
        _handles(panels[-1]),
        path,
        "filled, solid: mean row; hollow, dashed: worst 1 % of rows; "
        "bold: fit over the lengths where at most half of the keys are kept",
    )


def _draw_error(axes: Axes, summary: Summary, method: str, metric: str) -> None:
    rows = [row for row in summary["results"] if row["method"] == method and row[metric]["mean"]["value"] > 0]
    slopes = {row["statistic"]: row for row in summary["slopes"] if (row["method"], row["metric"]) == (method, metric)}
    style = _style(method)
    n = [row["visible"] for row in rows]
    looks: dict[str, dict[str, Any]] = {
        "mean": {"linestyle": "-", "label": ", ".join(_slope_text(slopes[name]) for name in ("mean", "worst"))},
        "worst": {"linestyle": "--", "markerfacecolor": "white"},
    }
    for statistic, look in looks.items():
        points = [row[metric][statistic] for row in rows]
        values = [point["value"] for point in points]
        axes.errorbar(n, values, yerr=_bars(values, points), capsize=2, **style | look | {"linewidth": 0.5})
        fit = slopes[statistic]
        if fit["slope"] is not None:
            fitted = [row["visible"] for row in rows if row["length"] in fit["lengths"]]
            line = [math.exp(fit["intercept"]) * x ** fit["slope"] for x in fitted]
            axes.plot(fitted, line, color=style["color"], linewidth=2, alpha=0.8, linestyle=look["linestyle"])


def _draw_keys(axes: Axes, summary: Summary) -> None:
    for i, method in enumerate(summary["methods"]):
        rows = [row for row in summary["results"] if row["method"] == method]
        # Selectors that follow the same law lie on one another: the first on top.
        style = _style(method) | {"label": _label(method, summary), "zorder": 3 - 0.1 * i}
        axes.plot([row["visible"] for row in rows], [row["kept"] for row in rows], **style)
    rows = [row for row in summary["results"] if row["method"] == DENSE]
    n = [row["visible"] for row in rows]
    axes.plot(n, [row["kept"] for row in rows], **_style(DENSE) | {"label": "dense: all n"})
    needed = [row["keys_95"]["mean"]["value"] for row in rows]
    axes.plot(n, needed, color="#666666", linestyle=":", marker="*", label="keys needed for 95 % of the mass, mean row")
    axes.set(title="Keys kept, and keys needed", ylabel="keys per row", yscale="log")


def _bars(values: Sequence[float], intervals: Sequence[Summary]) -> list[list[float]]:
    """Lengths of the error bars below and above; an interval may miss its value by rounding."""
    return [
        [max(0.0, value - interval["low"]) for value, interval in zip(values, intervals, strict=True)],
        [max(0.0, interval["high"] - value) for value, interval in zip(values, intervals, strict=True)],
    ]


def _slope_text(fit: Summary) -> str:
    return "none" if fit["slope"] is None else f"{fit['slope']:+.2f} [{fit['low']:+.2f}, {fit['high']:+.2f}]"


def _label(method: str, summary: Summary) -> str:
    """What a method does, from its configuration: how the text is read, selector and law."""
    config = summary["configs"].get(method)
    if config is None:
        return method
    selector = f"decoding, {config['selector']}" if method.startswith("decode") else config["selector"]
    if config["per_head"] is not None:
        return f"{selector}, calibrated per head"
    law = {
        "power": f"{config['alpha']:.4g} n$^{{{config['exponent']:.3g}}}$ keys",
        "fixed": f"{config['keys']} keys",
        "fraction": f"{100 * (config['fraction'] or 0):.3g} % of n",
        "log": f"{config['alpha']:.3g} ln n keys",
    }[config["law"]]
    return f"{selector}, {law}"


def _style(method: str) -> dict[str, Any]:
    color, marker = _STYLES[method]
    return {"color": color, "marker": marker, "linewidth": 1.6, "markersize": 5}


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


def _handles(axes: Axes) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return handles, labels


def _finish(
    drawing: Figure, summary: Summary, title: str, legend: tuple[list[Any], list[str]], path: Path, note: str = ""
) -> None:
    about = summary["about"]
    documents = len(summary["documents"])
    what = f"{about['model']['name']} ({about['dtype']}): {title}, {documents} document{'s'[: documents > 1]}"
    drawing.suptitle("\n".join(filter(None, [what, note])), fontsize=11)
    drawing.legend(*legend, loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=150)
