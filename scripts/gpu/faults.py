"""Checks that fail on purpose, to see what a failure costs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import torch

from gpu.cases import Case, compared
from gpu.machine import Machine


def none(machine: Machine) -> Iterator[Case]:
    """A right result."""
    want = torch.arange(3.0, device=machine.device)
    yield Case("right", lambda: compared(want, want, 1e-5))


def wrong(machine: Machine) -> Iterator[Case]:
    """A result with an error, and one without."""
    want = torch.arange(1.0, 7.0, device=machine.device).view(2, 3)
    got = want.clone()
    got[1, 2] = torch.nan
    yield Case("wrong", lambda: compared(got, want, 1e-5), {"shape": [2, 3]})
    yield Case("right", lambda: compared(want, want, 1e-5))


def abort(machine: Machine) -> Iterator[Case]:
    """A process that dies as by a segmentation fault, between two that work."""
    yield Case("before", lambda: {})
    yield Case("abort", lambda: os.abort(), {"dtype": "float32"})
    yield Case("after", lambda: {})


def hang(machine: Machine) -> Iterator[Case]:
    """A case without an end, and one after it."""

    def sleep() -> dict[str, object]:
        time.sleep(10**6)
        return {}

    yield Case("hang", sleep)
    yield Case("after", lambda: {})
