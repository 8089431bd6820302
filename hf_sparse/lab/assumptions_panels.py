"""Plots of the experiment `assumptions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_sparse.lab.experiment import Panel
from hf_sparse.lab.pages import COLORS, MARKERS, keys_axis
from hf_sparse.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Mapping[str, Sequence[Row]]


def panels(rows: Rows, fits: Sequence[dict[str, Any]], worse: Mapping[str, Sequence[str]], window: str) -> list[Panel]:
    """Keys needed, every error, and the logits against their bound; the assumptions unbroken first, in black.

    Args:
        rows: By input.
        fits: Of each input.
        worse: Inputs with a worse slope than the first, by norm.
        window: Name of the window.
    """
    errors = {
        "max entry": "Largest error of an entry",
        "lost mass": "Lost mass",
        "output": "Error of the output",
        "relative output": "Relative error of the output",
    }
    return [
        _panel(rows, "keys_90", "Keys for 90 % of the mass, as a share of n", _keys_sentence(fits), share=True),
        *(
            _panel(rows, name, f"{title}, {window} keys", _slope_sentence(fits[0], name, worse[name]))
            for name, title in errors.items()
        ),
        _panel(rows, "logit_over_bound", "Largest logit over its bound", _bound_sentence(fits)),
    ]


def _panel(rows: Rows, name: str, title: str, sentence: str, *, share: bool = False) -> Panel:
    def draw(axes: Axes) -> None:
        colors = ("#000000", *(color for color in COLORS if color != "#000000"), "#332288")
        for (label, own), color, marker in zip(rows.items(), colors, MARKERS + "hv", strict=False):
            values = [np.mean(row[name]) / (row["n"] if share else 1) for row in own]
            axes.plot([row["n"] for row in own], values, color=color, marker=marker, markersize=3.5, label=label)
        keys_axis(axes, [row["n"] for row in next(iter(rows.values()))])
        axes.set(yscale="log", ylabel=name.replace("_", " ") + (" / n" if share else ""))
        if share:
            axes.legend(fontsize=5.5)
        if name == "logit_over_bound":
            axes.axhline(1, color="#000000", linewidth=0.8, linestyle="--")

    return Panel(title, sentence, draw)


def _keys_sentence(fits: Sequence[dict[str, Any]]) -> str:
    baseline, *others = fits
    fewer = [fit["input"] for fit in others if fit["keys_90"]["high"] < baseline["keys_90"]["low"]]
    return (
        f"Claim: what is broken needs more keys. Found: C = {baseline['keys_90']['value']:.2f} unbroken; surely "
        f"smaller, so sparser in mass, for {'; '.join(fewer) or 'none'}."
    )


def _slope_sentence(baseline: dict[str, Any], name: str, worse: Sequence[str]) -> str:
    slope = baseline[name]["value"]
    return f"Slope over all lengths {slope:+.2f} unbroken; surely worse for {'; '.join(worse) or 'none'}."


def _bound_sentence(fits: Sequence[dict[str, Any]]) -> str:
    beyond = [f"{fit['input']} ({fit['logit_over_bound']:.2f})" for fit in fits if fit["logit_over_bound"] > 1]
    return (
        "The bound R sqrt(2 ln(2n / 0.05)) on the logits of a row is for independent bounded entries. Above it on "
        f"average at the longest n: {'; '.join(beyond) or 'none'}."
    )
