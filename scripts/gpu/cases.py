"""Cases of a check, and how a result is compared with what it should be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest norm of an error, relative to the norm of what is right, by the dtype of the inputs."""


class SkippedError(Exception):
    """The case cannot be run here, for a reason that is no fault."""


@dataclass(frozen=True)
class Case:
    """One thing to find out.

    Attributes:
        name: Its name within the check.
        run: Finds it out: gives what goes into the record, with `status` if that is not `ok`.
        facts: What its record says beforehand, so also if it crashes: shapes, dtype.
    """

    name: str
    run: Callable[[], dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)


def compared(got: Tensor, want: Tensor, limit: float) -> dict[str, Any]:
    """Status and error of a result: its relative norm, and where and by how much it is worst."""
    if got.shape != want.shape:
        return {"status": "wrong", "error": {"shape": list(got.shape), "wanted": list(want.shape)}}
    got, want = got.double(), want.double()
    difference = (got - want).abs()
    finite = got.isfinite()
    difference = difference.masked_fill(~finite, torch.inf)
    relative = float(difference.norm() / want.norm().clamp(min=1e-30))
    worst = torch.unravel_index(difference.argmax(), difference.shape) if difference.numel() else ()
    place = tuple(int(x) for x in worst)
    error = {
        "relative": relative,
        "limit": limit,
        "worst": list(place),
        "got": float(got[place]) if place else None,
        "want": float(want[place]) if place else None,
        "not_finite": int((~finite).sum()),
    }
    return {"status": "ok" if relative <= limit else "wrong", "error": error}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two results have the same bits; NaN is like itself."""
    return one.shape == other.shape and torch.equal(*(x.contiguous().view(torch.uint8) for x in (one, other)))


def twice(run: Callable[[], Tensor], want: Tensor, limit: float) -> dict[str, Any]:
    """`run` compared with what is right, and bit by bit with a second run; memory that the first one takes is NaN."""
    with poisoned_memory():
        one = run()
    other = run()
    found = compared(one, want, limit)
    found["repeats"] = same_bits(one, other)
    if not found["repeats"]:
        found |= {"status": "wrong", "difference_of_two_runs": compared(other, one, 0)["error"]}
    return found


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that PyTorch allocates is NaN, or the largest whole number, until something is written to it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def poisoned_beyond(states: Tensor, dim: int, more: int, poison: float) -> Tensor:
    """A copy of `states` as the start of storage that is longer by `more` along `dim`, with `poison` in the rest."""
    shape = list(states.shape)
    shape[dim] += more
    storage = states.new_full(shape, poison)
    part = storage.narrow(dim, 0, states.shape[dim])
    part.copy_(states)
    return part
