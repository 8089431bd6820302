"""The plot of an experiment: at most four lines against a common x."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from hf_sparse.measure.plots import figure, log_axis, style


@dataclass(frozen=True)
class Plot:
    """Lines against a common x.

    Attributes:
        lines: By label: y `(x,)`, or `(3, x)` for a band: low, middle, high.
        references: Lines to compare with, at most two, `(x,)`.
        log: The logarithmic axes; an x axis is one of lengths.
    """

    xlabel: str
    ylabel: str
    x: Sequence[int | float]
    lines: Mapping[str, ArrayLike]
    references: Mapping[str, ArrayLike] = field(default_factory=dict)
    log: str = "xy"

    def draw(self, title: str, path: Path) -> None:
        """Write a PNG file."""
        page = figure(7.4, 4.8)
        axes = page.subplots()
        for label, y in self.lines.items():
            low, middle, high = np.asarray(y) if np.ndim(y) == 2 else (y, y, y)
            look = style(label, list(self.lines))
            axes.plot(self.x, middle, label=label, **look)
            axes.fill_between(self.x, low, high, color=look["color"], alpha=0.15, linewidth=0)
        for (label, y), dashes in zip(self.references.items(), ("--", ":"), strict=False):
            axes.plot(self.x, np.asarray(y), color="#000000", linestyle=dashes, label=label)
        if "x" in self.log:
            log_axis(axes, [int(x) for x in self.x], self.xlabel)
        if "y" in self.log:
            axes.set_yscale("log")
        axes.set(xlabel=self.xlabel, ylabel=self.ylabel)
        axes.grid(visible=True, alpha=0.25)
        axes.set_title(title, fontsize=10)
        page.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
        page.savefig(path, dpi=100)
