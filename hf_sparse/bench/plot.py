"""Plot of a benchmark's summary: time against length, with fitted exponents, the ideal line and break-even."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sparse.bench.layer import SPARSE
from hf_sparse.bench.summary import BASELINES, Summary
from hf_sparse.bench.tables import TITLES
from hf_sparse.measure.plots import figure, length_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette.
_STYLES = {
    "sdpa": ("#000000", "s"),
    "dynamic-cache": ("#D55E00", "v"),
    "static-cache": ("#E69F00", "D"),
    "masked-sdpa": ("#D55E00", "v"),
    "flex": ("#009E73", "^"),
    "flash": ("#56B4E9", "X"),
    "cudnn": ("#0072B2", "o"),
    SPARSE: ("#CC79A7", "P"),
}


def plot_bench(summary: Summary, path: Path) -> None:
    """Draw a panel for every kind and quantity that was measured.

    Args:
        summary: From `summary.summarise`.
        path: PNG file to write.

    Raises:
        UserError: without matplotlib.
    """
    places = [place for place in TITLES if any((row["kind"], row["quantity"]) == place for row in summary["results"])]
    wide = min(2, len(places))
    high = -(-len(places) // wide)
    drawing = figure(6 * wide, 4.4 * high)
    panels = drawing.subplots(high, wide, squeeze=False).flatten()
    for axes, (kind, quantity) in zip(panels, places, strict=False):
        _draw(axes, summary, kind, quantity)
    for axes in panels[len(places) :]:
        axes.set_axis_off()
    about = summary["about"]
    threads = "" if about["device"] == "cuda" else f", {about['threads']} threads"
    drawing.suptitle(f"{about['model']['name']}, {about['dtype']}, {about['device_name']}{threads}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=150)


def _draw(axes: Axes, summary: Summary, kind: str, quantity: str) -> None:
    rows = [row for row in summary["results"] if (row["kind"], row["quantity"]) == (kind, quantity)]
    for method in dict.fromkeys(row["method"] for row in rows):
        _draw_method(axes, [row for row in rows if row["method"] == method], summary)
    dense = {row["length"]: row["median"] for row in rows if row["method"] == BASELINES[kind]}
    kept = {row["length"]: row["density"] for row in rows if row["method"] == SPARSE}
    if quantity == "seconds":
        ideal = [dense[n] * kept[n] for n in dense]
        axes.plot(list(dense), ideal, color="#666666", linestyle=":", label=f"ideal: {BASELINES[kind]} x density")
    found = summary["break_even"][kind]
    if found["quantity"] == quantity and found["length"] is not None:
        sign = "<= " if found["length"] == found["measured"][0] else ""
        axes.axvline(found["length"], color="#666666", linewidth=0.8)
        axes.annotate(
            f"break-even {sign}{found['length']:,}",
            (found["length"], 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, -10),
            textcoords="offset points",
            fontsize=8,
        )
    length_axis(axes, sorted({row["length"] for row in rows}), "n, tokens")
    axes.tick_params(axis="x", labelrotation=30)
    axes.set(yscale="log", ylabel="seconds", title=TITLES[kind, quantity])
    axes.legend(frameon=False, fontsize=8)


def _draw_method(axes: Axes, rows: list[Summary], summary: Summary) -> None:
    kind, method, quantity = (rows[0][name] for name in ("kind", "method", "quantity"))
    rows = sorted(rows, key=lambda row: row["length"])
    [fit] = [
        each
        for each in summary["exponents"]
        if (each["kind"], each["method"], each["quantity"]) == (kind, method, quantity)
    ]
    color, marker = _STYLES[method]
    label = method if fit["exponent"] is None else f"{method}: n$^{{{fit['exponent']:.2f}}}$"
    lengths: list[int] = [row["length"] for row in rows]
    medians: list[float] = [row["median"] for row in rows]
    bars: Any = [
        [row["median"] - row["low"] for row in rows],
        [row["high"] - row["median"] for row in rows],
    ]
    style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5}
    axes.errorbar(lengths, medians, yerr=bars, capsize=2, linewidth=0.6, label=label, **style)
    if fit["exponent"] is not None:
        line = [fit["seconds_at_1"] * n ** fit["exponent"] for n in fit["lengths"]]
        axes.plot(fit["lengths"], line, color=color, linewidth=1.8, alpha=0.8)
