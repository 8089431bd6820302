"""Quantities in words, and the figures of a summary as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_sparse.results import Table


def words(value: Any) -> str:
    """A quantity for readers: three significant digits, whole numbers in full, the entries of a mapping by name."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {words(entry)}" for name, entry in value.items())
    if isinstance(value, int) or (isinstance(value, float) and abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def figure_tables(name: str, figures: Mapping[str, Any]) -> list[Table]:
    """The figures of an experiment: a table of each that has several records, and one of all the others."""
    tables: list[Table] = []
    single = []
    for what, value in figures.items():
        records = value
        if isinstance(value, Mapping) and all(isinstance(entry, Mapping) for entry in value.values()):
            records = [{what: key} | entry for key, entry in value.items()]
        if isinstance(records, Sequence) and isinstance(records[0], Mapping):
            tables.append((list(records[0]), [[_cell(cell) for cell in record.values()] for record in records]))
        else:
            single.append([what, _cell(value)])
    return [([name, "value"], single), *tables]


def _cell(value: Any) -> str:
    if isinstance(value, Mapping) and value.keys() == {"value", "low", "high"}:
        return "{} [{}, {}]".format(*(words(value[end]) for end in ("value", "low", "high")))
    if isinstance(value, list | tuple):
        return ", ".join(_cell(entry) for entry in value)
    return "-" if value is None else words(value)
