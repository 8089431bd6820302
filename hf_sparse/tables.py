"""Tables for terminals and for markdown."""

from __future__ import annotations

from collections.abc import Collection, Sequence

Table = tuple[list[str], list[list[str]]]
"""A header and the cells of each line."""


def text_table(header: Sequence[str], lines: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """An aligned table for terminals: the columns `left` are aligned to the left, the others to the right."""
    whole = [header, *lines]
    widths = [max(len(line[i]) for line in whole) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in whole
    )


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """The same as a markdown table."""
    rule = ["---" if i in left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])
