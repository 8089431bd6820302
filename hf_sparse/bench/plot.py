"""Plot of a benchmark's summary: time against length, with fitted exponents and break-even."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sparse.bench.tables import TITLES, break_even_text, time_text
from hf_sparse.bench.tasks import SPARSE
from hf_sparse.measure.plots import figure, log_axis, save, style
from hf_sparse.results import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# More lines in a panel are hard to tell apart.
_MOST_LINES = 4


def plot_bench(summary: Summary, path: Path) -> None:
    """Draw a panel for every task and quantity that was measured: medians with their intervals.

    A panel shows at most four lines: the sparse method, the baseline, and the fastest other dense methods.
    """
    places = [place for place in TITLES if any((row["kind"], row["quantity"]) == place for row in summary["results"])]
    wide = min(2, len(places))
    high = -(-len(places) // wide)
    drawing = figure(6 * wide, 4.8 * high)
    panels = drawing.subplots(high, wide, squeeze=False).flatten()
    for axes, (task, quantity) in zip(panels, places, strict=False):
        _draw(axes, summary, task, quantity)
    for axes in panels[len(places) :]:
        axes.set_axis_off()
    about = summary["about"]
    names = [about["model"]["name"], about["dtype"], about["device_name"]]
    if about["device"] == "cpu":
        # Older records do not say which instructions were used.
        names += [f"{about['threads']} threads", *filter(None, [about.get("cpu_capability", {}).get("torch")])]
    drawing.suptitle(", ".join(names), fontsize=11)
    save(drawing, path)


def draw_method(
    axes: Axes, methods: Sequence[str], method: str, results: list[Summary], value: str, exponent: float | None
) -> None:
    """Draw the line of one of `methods`, with the intervals of `value` and the fitted exponent of length, if any."""
    bars: Any = None
    if all("low" in each for each in results):
        bars = [[abs(each[value] - each[end]) for each in results] for end in ("low", "high")]
    lengths: Any = [each["length"] for each in results]
    axes.errorbar(
        lengths,
        [each[value] for each in results],
        yerr=bars,
        capsize=2,
        **style(method, methods),
        label=method if exponent is None else f"{method}: n$^{{{exponent:.2f}}}$",
    )


def finish_panel(axes: Axes, lengths: set[int]) -> None:
    """Label the lengths, and put the legend below the panel."""
    log_axis(axes, sorted(lengths), "n, tokens")
    axes.tick_params(axis="x", labelrotation=30)
    axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.25))


def _draw(axes: Axes, summary: Summary, task: str, quantity: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    series: dict[str, list[Summary]] = {}
    for row in sorted(summary["results"], key=lambda row: row["length"]):
        if (row["kind"], row["quantity"]) == (task, quantity):
            series.setdefault(row["method"], []).append(row)
    exponents = {
        fit["method"]: fit["exponent"]
        for fit in summary["exponents"]
        if (fit["kind"], fit["quantity"]) == (task, quantity)
    }
    against = summary["break_even"][task]["against"]
    baseline = series[against]
    # A method that was skipped at the longest length is behind those that were not.
    others = sorted(
        series.keys() - {SPARSE, against},
        key=lambda name: (-series[name][-1]["length"], series[name][-1]["median"]),
    )
    drawn = [SPARSE, against, *others][:_MOST_LINES]
    for method in drawn:
        draw_method(axes, drawn, method, series[method], "median", exponents[method])
    if quantity == "seconds" and len(series) < _MOST_LINES:
        density = {row["length"]: row["density"] for row in series[SPARSE]}
        n = [row["length"] for row in baseline]
        ideal = [row["median"] * density[row["length"]] for row in baseline]
        axes.plot(n, ideal, color="#666666", linestyle=":", label=f"{against} x density")
    title, found = TITLES[task, quantity], summary["break_even"][task]
    if found["quantity"] == quantity:
        title += f"\nbreak-even: {break_even_text(found)}"
        if found["length"] is not None:
            axes.axvline(found["length"], color="#666666", linewidth=0.8)
    axes.set(yscale="log", title=title)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: time_text(seconds)))
    axes.yaxis.set_minor_locator(NullLocator())
    finish_panel(axes, {row["length"] for rows in series.values() for row in rows})
