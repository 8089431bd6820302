"""Tables for terminals and for markdown."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

Table = tuple[list[str], list[list[str]]]
"""A header and the cells of each line."""

Column = tuple[str, str | Callable[[Mapping[str, Any]], str]]
"""A title, and the cell made of a record: a format string such as `"{length:,}"`, or a function."""


def make_table(columns: Sequence[Column], records: Iterable[Mapping[str, Any]]) -> Table:
    """A table with a line for each record."""
    lines = [
        [cell.format(**record) if isinstance(cell, str) else cell(record) for _, cell in columns] for record in records
    ]
    return [title for title, _ in columns], lines


def known(name: str, form: str) -> Callable[[Mapping[str, Any]], str]:
    """A cell with `record[name]`, or `-` if there is none."""
    return lambda record: "-" if record.get(name) is None else format(record[name], form)


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
