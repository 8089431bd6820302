"""Plots of the experiment `workloads`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_sparse.lab.experiment import Panel
from hf_sparse.lab.inputs import Input
from hf_sparse.lab.pages import COLORS, MARKERS, keys_axis
from hf_sparse.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Comparisons = Sequence[dict[str, Any]]

_NORM = "lost mass"
_WORKLOAD = "even"
_LAW = "n^0.5"
_MOST_SHARED = 3
_RATIOS = (0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20)


def panels(rows: Sequence[Row], comparisons: Comparisons) -> list[Panel]:
    """Errors against length, and the ratios adaptive over fixed on average and at the worst length."""
    labels = list(dict.fromkeys(Input.of(row).label for row in rows))
    shown = [_lengths([row for row in rows if Input.of(row).label == label], label) for label in labels[:_MOST_SHARED]]
    return [*shown, *(_ratios(comparisons, name) for name in ("mean", "worst length")), _exponents(comparisons)]


def _lengths(rows: Sequence[Row], label: str) -> Panel:
    lengths = [row["length"] for row in rows]
    errors = {law: np.array([np.mean(e) for e in _column(rows, law)]) for law in rows[0][_NORM][_WORKLOAD]}

    def draw(axes: Axes) -> None:
        for (law, values), color, marker in zip(errors.items(), COLORS, MARKERS, strict=False):
            axes.plot(lengths, values, color=color, marker=marker, markersize=4, label=law)
        keys_axis(axes, lengths, "length of the sequence")
        axes.set(ylabel=f"{_NORM}, mean row")
        axes.legend(fontsize=7)

    adaptive, fixed = errors[_LAW], errors["fixed"]
    better = [f"{length:,}" for length, a, b in zip(lengths, adaptive, fixed, strict=True) if a < b]
    return Panel(
        f"Equal cost over all lengths ({label})",
        f"{_LAW} loses less than fixed at {', '.join(better) or 'no length'}. At {lengths[-1]:,} it loses "
        f"{adaptive[-1]:.3f} and fixed {fixed[-1]:.3f}; at {lengths[0]:,} {adaptive[0]:.3f} and {fixed[0]:.3f}.",
        draw,
    )


def _column(rows: Sequence[Row], law: str) -> list[list[float]]:
    return [row[_NORM][_WORKLOAD][law] for row in rows]


def _ratios(comparisons: Comparisons, statistic: str) -> Panel:
    own = [c for c in comparisons if c["law"] == _LAW and c["statistic"] == statistic]
    places = list(dict.fromkeys((c["input"], c["workload"]) for c in own))
    norms = list(dict.fromkeys(c["norm"] for c in own))

    def draw(axes: Axes) -> None:
        for i, (norm, color, marker) in enumerate(zip(norms, COLORS, MARKERS, strict=False)):
            of_norm = [c for c in own if c["norm"] == norm]
            y = np.arange(len(places)) + 0.15 * (i - (len(norms) - 1) / 2)
            values = np.array([c["ratio"]["value"] for c in of_norm])
            bars = [[abs(c["ratio"][end] - c["ratio"]["value"]) for c in of_norm] for end in ("low", "high")]
            style: dict[str, Any] = {
                "color": color,
                "marker": marker,
                "markersize": 3,
                "linestyle": "",
                "elinewidth": 0.8,
            }
            axes.errorbar(values, y, xerr=bars, **style, label=norm)
        axes.axvline(1, color="#000000", linewidth=0.8)
        axes.set_yticks(
            range(len(places)), [f"{label.split(', ')[-1]}, {name}" for label, name in places], fontsize=6.5
        )
        axes.invert_yaxis()
        axes.set(xscale="log", xlabel=f"error of {_LAW} / error of fixed")
        low, high = axes.get_xlim()
        axes.set_xticks([tick for tick in _RATIOS if low < tick < high], minor=False)
        axes.set_xticklabels([f"{tick:g}" for tick in _RATIOS if low < tick < high])
        axes.minorticks_off()
        axes.legend(fontsize=6.5)

    counts = [[c["better"] for c in own].count(who) for who in (_LAW, "fixed")]
    return Panel(
        "On average over the lengths" if statistic == "mean" else "At the worst length",
        f"Claim: below 1 everywhere. Found: {_LAW} better in {counts[0]} of {len(own)} cases, fixed in {counts[1]}, "
        "the others not resolved (95 %, each for itself).",
        draw,
    )


def _exponents(comparisons: Comparisons) -> Panel:
    laws = [law for law in dict.fromkeys(c["law"] for c in comparisons) if law != "log"]
    exponents = {"fixed": 0.0, "fraction": 1.0} | {law: float(law[2:]) for law in laws if law.startswith("n^")}
    order = sorted(exponents, key=lambda law: exponents[law])
    chosen = [c for c in comparisons if c["norm"] == _NORM and c["workload"] == _WORKLOAD]
    labels = list(dict.fromkeys(c["input"] for c in chosen))

    def curve(label: str, statistic: str) -> list[float]:
        by_law = {c["law"]: c["ratio"]["value"] for c in chosen if (c["input"], c["statistic"]) == (label, statistic)}
        return [1.0 if law == "fixed" else by_law[law] for law in order]

    def draw(axes: Axes) -> None:
        x = [exponents[law] for law in order]
        for label, color in zip(labels, COLORS, strict=False):
            axes.plot(x, curve(label, "mean"), color=color, marker="o", label=label)
            axes.plot(x, curve(label, "worst length"), color=color, marker="o", markerfacecolor="white", linestyle="--")
        axes.axhline(1, color="#000000", linewidth=0.8)
        axes.set(xlabel="C (0: fixed, 1: fraction)", ylabel=f"{_NORM} / that of fixed", yscale="log")
        axes.legend(fontsize=6.5, title="solid: mean; dashed: worst length", title_fontsize=6.5)

    best = [
        "/".join(f"{exponents[order[int(np.argmin(curve(label, s)))]]:g}" for s in ("mean", "worst length"))
        for label in labels
    ]
    return Panel(
        f"Which exponent, at equal cost ({_WORKLOAD} workload)",
        "Best C for the mean / for the worst length: "
        + "; ".join(f"{label}: {b}" for label, b in zip(labels, best, strict=True))
        + ". What is right for the one is wrong for the other wherever the two differ.",
        draw,
    )
