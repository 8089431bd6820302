"""The files that commands write into folders of results, and how to tell whose they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROWS, SUMMARY, TABLES = "rows.jsonl", "summary.json", "tables.md"

# What tells the rows or summary of one command from those of another, in this order, where they do not say it.
_MARKS = {
    "adaptive_vs_fixed": "perplexity",
    "slopes": "attention-error",
    "break_even": "bench",
    "exponents": "memory",
    "experiments": "theory",
    "experiment": "theory",
    "runs": "goals",
}


def command_of(found: Mapping[str, Any]) -> str | None:
    """The command that a row or summary comes from; `None` if it is of none."""
    if "command" in found:
        return str(found["command"])
    return next((command for mark, command in _MARKS.items() if mark in found), None)
