"""One page of plots per experiment: at most four lines a panel, its legend beside the data and its verdict below."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from hf_sparse.measure.plots import figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LINES = 4

# The palette of Okabe and Ito, which colour-blind readers can tell apart; markers for print in grey.
_STYLES = (("#0072B2", "o"), ("#D55E00", "v"), ("#009E73", "s"), ("#CC79A7", "D"))
_REFERENCES = (("#000000", "--"), ("#666666", ":"))
_COLUMNS, _WIDTH, _HEIGHT = 3, 5.2, 4.6  # inches
_CHARACTERS = 78
_PALETTE = 128


@dataclass(frozen=True)
class Panel:
    """Lines against a common x, or a grid of numbers.

    Attributes:
        title: What is drawn.
        caption: The claim beside it and its verdict, printed below.
        x: Places on the x axis, or their names.
        xlabel: Label of the x axis.
        ylabel: Label of the y axis, or of the numbers of a grid.
        lines: By label: y `(x,)`, or `(3, x)` for a band: low, middle, high.
        references: Lines to compare with, `(x,)`.
        grid: `(rows, x)`; drawn instead of lines.
        rows: Names of the rows of a grid.
        log: Which axes are logarithmic; x then to base 2.
        points: Draw points without lines.
    """

    title: str
    caption: str
    x: Sequence[float] | Sequence[str]
    xlabel: str
    ylabel: str
    lines: Mapping[str, ArrayLike] = field(default_factory=dict)
    references: Mapping[str, ArrayLike] = field(default_factory=dict)
    grid: ArrayLike | None = None
    rows: Sequence[str] = ()
    log: str = "xy"
    points: bool = False

    def __post_init__(self) -> None:
        if len(self.lines) + len(self.references) > MOST_LINES:
            raise ValueError(f"a panel takes {MOST_LINES} lines; {self.title!r} has {[*self.lines, *self.references]}")

    def draw(self, axes: Axes) -> None:
        """Draw on `axes`, labels included."""
        named = isinstance(self.x[0], str)
        x = np.arange(len(self.x)) if named else np.array(self.x, np.float64)
        axes.set_title(self.title, fontsize=10)
        axes.set(xlabel=self.xlabel, ylabel=self.ylabel)
        if self.grid is not None:
            self._draw_grid(axes, np.asarray(self.grid))
            return
        for (label, y), (color, marker) in zip(self.lines.items(), _STYLES, strict=False):
            low, middle, high = np.asarray(y) if np.ndim(y) == 2 else (y, y, y)
            style = {"linestyle": ""} if self.points else {}
            axes.plot(x, middle, color=color, marker=marker, markersize=3.5, label=label, **style)
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        for (label, y), (color, dashes) in zip(self.references.items(), _REFERENCES, strict=False):
            axes.plot(x, np.asarray(y), color=color, linestyle=dashes, label=label)
        if named:
            axes.set_xticks(x, [str(name) for name in self.x], rotation=20)
        elif "x" in self.log:
            axes.set_xscale("log", base=2)
        if "y" in self.log:
            axes.set_yscale("log")
        axes.grid(visible=True, alpha=0.25)

    def _draw_grid(self, axes: Axes, grid: np.ndarray) -> None:  # type: ignore[type-arg]
        axes.set_ylabel("")
        axes.set_title(f"{self.title}: {self.ylabel}", fontsize=10)
        axes.imshow(grid, cmap="coolwarm", aspect="auto", vmin=np.quantile(grid, 0.02), vmax=np.quantile(grid, 0.98))
        axes.set_xticks(range(len(self.x)), [f"{x:,}" if isinstance(x, int) else f"{x}" for x in self.x], rotation=30)
        axes.set_yticks(range(len(self.rows)), list(self.rows))
        axes.tick_params(labelsize=6.5)
        for (row, column), value in np.ndenumerate(grid):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6)


def draw_page(title: str, panels: Sequence[Panel], path: Path) -> None:
    """Draw the panels of one experiment, from left to right and top to bottom, into the PNG file `path`.

    Raises:
        UserError: without matplotlib.
    """
    from PIL import Image  # comes with matplotlib

    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    page = figure(_WIDTH * columns, _HEIGHT * rows)
    parts = page.subfigures(rows, columns, squeeze=False).flatten()
    for part, panel in zip(parts, panels, strict=False):
        axes = part.subplots()
        panel.draw(axes)
        part.supxlabel(textwrap.fill(panel.caption, _CHARACTERS), fontsize=8, x=0.02, ha="left")
        if panel.lines:
            part.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=7)
    page.suptitle(title, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.savefig(path, dpi=100)
    # A palette makes anti-aliased lines and translucent bands a quarter of their size.
    Image.open(path).convert("RGB").quantize(_PALETTE).save(path, optimize=True)
