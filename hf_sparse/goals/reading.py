"""What a run says of a goal, and who reads it there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Summary = Mapping[str, Any]
"""What a command wrote into `summary.json`."""

Interval = Mapping[str, float]
"""`median`, with its interval `low` to `high`."""


@dataclass(frozen=True)
class Reading:
    """What a run says.

    Attributes:
        measured: By name of the measure, in the order in which they are shown.
        density: Kept over visible keys of what was timed.
    """

    measured: Mapping[str, Interval]
    density: float


class Reader(Protocol):
    """Where in a run's summary a goal is read."""

    def read(self, run: Summary) -> Reading | None:
        """What `run` says; `None` if it did not measure it."""

    def __str__(self) -> str:
        """What a run must have measured."""
