"""One page of plots per experiment, with a sentence under each plot that says what was found."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_sparse.lab.experiment import Panel
from hf_sparse.measure.plots import figure, length_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#8C510A", "#000000", "#666666", "#A6A600")
"""The palette of Okabe and Ito, which colour-blind readers can tell apart, and more; markers for print in grey."""
MARKERS = "ovsD^PX<*>"

_COLUMNS = 3
_WIDTH, _HEIGHT = 5.2, 4.6  # inches of one plot with its sentence
_SENTENCE_CHARACTERS = 78
_DPI = 100
_PALETTE = 128


def draw_page(title: str, panels: Sequence[Panel], path: Path) -> None:
    """Draw the panels of one experiment.

    Args:
        title: Of the page.
        panels: From left to right and top to bottom.
        path: PNG file to write.

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
        axes.set_title(panel.title, fontsize=10)
        part.supxlabel(textwrap.fill(panel.sentence, _SENTENCE_CHARACTERS), fontsize=8, x=0.02, ha="left")
    page.suptitle(title, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.savefig(path, dpi=_DPI)
    # Anti-aliased lines and translucent bands make a page four times as large as a palette does.
    Image.open(path).convert("RGB").quantize(_PALETTE).save(path, optimize=True)


def keys_axis(axes: Axes, lengths: Sequence[int], label: str = "keys n") -> None:
    """Make x a log axis of n in powers of two, with a tick at every second length."""
    length_axis(axes, lengths[::2], label)
    axes.set_xticks(lengths[::2], [f"$2^{{{round(math.log2(n))}}}$" for n in lengths[::2]])
