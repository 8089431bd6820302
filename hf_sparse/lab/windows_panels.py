"""Plots of the experiment `windows`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_sparse.lab.experiment import Panel
from hf_sparse.lab.fits import Interval
from hf_sparse.lab.inputs import Input
from hf_sparse.lab.pages import COLORS, MARKERS, keys_axis
from hf_sparse.lab.rows import NORMS
from hf_sparse.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DRAWN = ("max entry", "max entry, unnormalised", "lost mass", "output", "relative output")
_WINDOW = "n^0.5"


def panels(rows: Sequence[Row], fits: Sequence[dict[str, Any]], label: str) -> list[Panel]:
    """Each norm against n for the input `label`, and the slopes of the window n^0.5 for all inputs and norms."""
    own = sorted((row for row in rows if Input.of(row).label == label), key=lambda row: int(row["n"]))
    chosen = [fit for fit in fits if fit["input"] == label]
    drawn = [_error_panel(own, [fit for fit in chosen if fit["norm"] == norm], label, norm) for norm in _DRAWN]
    return [*drawn, _overview([fit for fit in fits if fit["window"] == _WINDOW])]


def _error_panel(rows: Sequence[Row], fits: Sequence[dict[str, Any]], label: str, norm: str) -> Panel:
    def draw(axes: Axes) -> None:
        lengths = [row["n"] for row in rows]
        for fit, color, marker in zip(fits, COLORS, MARKERS, strict=False):
            errors = np.array([row["mean"][fit["window"]][norm] for row in rows])
            text = f"{fit['window']}: {Interval(**fit['late_slope'])}"
            axes.plot(lengths, errors.mean(1), color=color, marker=marker, markersize=4, label=text)
            axes.fill_between(lengths, errors.min(1), errors.max(1), color=color, alpha=0.15, linewidth=0)
        keys_axis(axes, lengths)
        axes.set(yscale="log", ylabel=f"{norm}, mean row")
        axes.legend(fontsize=6.5, title="window: slope at large n [95 %]", title_fontsize=6.5)

    words = {fit["window"]: fit["trend"] for fit in fits}
    found = "; ".join(f"{window} {word}" for window, word in words.items())
    return Panel(
        f"{norm[0].upper()}{norm[1:]} ({label})",
        f"Claim: n^C falls, log n or fewer stays. Found at large n: {found} (falls = faster than 1/ln n).",
        draw,
    )


def _overview(fits: Sequence[dict[str, Any]]) -> Panel:
    labels = list(dict.fromkeys(fit["input"] for fit in fits))
    slopes = {(fit["input"], fit["norm"]): fit["late_slope"]["value"] for fit in fits}

    def draw(axes: Axes) -> None:
        grid = np.array([[slopes[label, norm] for label in labels] for norm in NORMS])
        axes.imshow(grid, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        axes.set_xticks(range(len(labels)), [label.replace(", ", ",\n") for label in labels], fontsize=6.5, rotation=30)
        axes.set_yticks(range(len(NORMS)), NORMS, fontsize=7)
        for (y, x), value in np.ndenumerate(grid):
            axes.text(x, y, f"{value:+.2f}", ha="center", va="center", fontsize=7)

    falling = sum(fit["trend"] == "falls" for fit in fits)
    return Panel(
        f"Slope at large n of every error, window {_WINDOW}",
        f"The error of {_WINDOW} keys falls like a power of n in {falling} of {len(fits)} pairs of norm and input: "
        "whether attention is n^C-sparse depends on the norm and on the input.",
        draw,
    )
