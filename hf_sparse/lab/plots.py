"""One page of plots per experiment: at most four lines a panel, legends outside the axes, verdicts at the bottom."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from hf_sparse.measure.plots import figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LINES = 4

# The palette of Okabe and Ito, which colour-blind readers can tell apart; markers for print in grey.
_STYLES = (("#0072B2", "o"), ("#D55E00", "v"), ("#009E73", "s"), ("#CC79A7", "D"))
_REFERENCES = (("#000000", "--"), ("#666666", ":"))
_COLUMNS, _WIDTH, _HEIGHT, _CAPTION = 3, 5.2, 4.4, 0.25  # inches: of a panel, and high of a line of text
_CHARACTERS = 75  # of text in the width of a panel


@dataclass(frozen=True)
class Panel:
    """Lines against a common x, or a grid of numbers.

    Attributes:
        title: What is drawn.
        xlabel: Label of the x axis.
        ylabel: Label of the y axis; of a grid, what its numbers are.
        x: Places on the x axis, or their names.
        lines: By label: y `(x,)`, or `(3, x)` for a band: low, middle, high.
        references: Lines to compare with, `(x,)`.
        log: The logarithmic axes.
        points: Draw points without lines.
        grid: Numbers `(rows, x)`, drawn instead of lines.
        rows: Names of the rows of the grid.
    """

    title: str
    xlabel: str
    ylabel: str
    x: Sequence[Any]
    lines: Mapping[str, ArrayLike] = field(default_factory=dict)
    references: Mapping[str, ArrayLike] = field(default_factory=dict)
    log: str = "xy"
    points: bool = False
    grid: ArrayLike | None = None
    rows: Sequence[str] = ()

    def __post_init__(self) -> None:
        if len(self.lines) + len(self.references) > MOST_LINES:
            raise ValueError(f"a panel takes {MOST_LINES} lines; {self.title!r} has {[*self.lines, *self.references]}")

    def draw(self, axes: Axes) -> None:
        """Draw on `axes`, labels included."""
        axes.set(title=self.title, xlabel=self.xlabel, ylabel=self.ylabel)
        if self.grid is not None:
            grid = np.asarray(self.grid)
            axes.imshow(
                grid,
                cmap="coolwarm",
                alpha=0.7,
                aspect="auto",
                vmin=np.quantile(grid, 0.02),
                vmax=np.quantile(grid, 0.98),
            )
            axes.set_xticks(range(len(self.x)), [f"{x:,}" if isinstance(x, int) else x for x in self.x], rotation=30)
            axes.set_yticks(range(len(self.rows)), self.rows)
            axes.tick_params(labelsize=6.5)
            for (row, column), value in np.ndenumerate(grid):
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6)
            return
        for (label, y), (color, marker) in zip(self.lines.items(), _STYLES, strict=False):
            low, middle, high = np.asarray(y) if np.ndim(y) == 2 else (y, y, y)
            line = "" if self.points else "-"
            axes.plot(self.x, middle, color=color, marker=marker, markersize=3.5, linestyle=line, label=label)
            axes.fill_between(self.x, low, high, color=color, alpha=0.15, linewidth=0)
        for (label, y), (color, dashes) in zip(self.references.items(), _REFERENCES, strict=False):
            axes.plot(self.x, np.asarray(y), color=color, linestyle=dashes, label=label)
        if "x" in self.log:
            axes.set_xscale("log", base=2)
        if "y" in self.log:
            axes.set_yscale("log")
        axes.grid(visible=True, alpha=0.25)


def draw_page(title: str, panels: Sequence[Panel], captions: Sequence[str], path: Path) -> None:
    """Draw the panels of one experiment, from left to right and top to bottom, and captions below, as a PNG file.

    Raises:
        UserError: without matplotlib.
    """
    from PIL import Image  # comes with matplotlib

    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    text = "\n".join(textwrap.fill(caption, _CHARACTERS * columns) for caption in captions)
    page = figure(_WIDTH * columns, _HEIGHT * rows + _CAPTION * text.count("\n"))
    for part, panel in zip(page.subfigures(rows, columns, squeeze=False).flatten(), panels, strict=False):
        axes = part.subplots()
        panel.draw(axes)
        if panel.lines:
            part.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7)
    page.suptitle(title, fontsize=12)
    page.supxlabel(text, fontsize=8, x=0.02, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    page.savefig(path, dpi=100)
    # A palette makes anti-aliased lines and bands a quarter of their size; maximum coverage keeps the colours of thin
    # lines beside those of grids.
    Image.open(path).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
