"""Choosing alpha: laws k(n) = alpha n^C of equal cost, judged by the output error that they cause.

The principle: the errors of heads add up in the layer's output as squares, and each key costs the same, so that the
best laws minimise the sum of squared errors plus a price times the sum of keys, head by head, at the one price that
spends the budget (a Lagrangian). What it needs are curves of error against k, measured on some text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hf_sparse.lab.bounds import FloatArray
from hf_sparse.lab.curves import LEAST

_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_ALPHAS = np.geomspace(0.01, 4096, 60)
_STEPS = 60


@dataclass(frozen=True)
class Curves:
    """Curves of every head of the layers that see the most keys.

    Attributes:
        counts: For each n, the k measured, and n itself at last.
        error: For each n, `(heads, counts)`: the error at k; 0 at n.
        needed: For each n, `(heads,)`: keys that retain a given mass.
    """

    counts: dict[int, FloatArray]
    error: dict[int, FloatArray]
    needed: dict[int, FloatArray]

    @property
    def lengths(self) -> list[int]:
        """The n, rising."""
        return list(self.counts)

    @property
    def heads(self) -> int:
        """Number of heads."""
        return len(self.error[self.lengths[0]])

    def errors(self, keys: FloatArray) -> FloatArray:
        """Error of every head at every n under `keys` `(lengths, heads)`: the same shape."""
        return np.stack(
            [
                _interpolated(np.log(k), np.log(self.counts[n]), self.error[n])
                for n, k in zip(self.counts, keys, strict=True)
            ]
        )


def _interpolated(x: FloatArray, points: FloatArray, values: FloatArray) -> FloatArray:
    """Linear interpolation at `x` `(heads,)` of each head's `values` `(heads, count)` at `points` `(count,)`."""
    right = np.clip(np.searchsorted(points, x), 1, len(points) - 1)
    share = np.clip((x - points[right - 1]) / (points[right] - points[right - 1]), 0, 1)
    heads = np.arange(len(x))
    between: FloatArray = values[heads, right - 1] * (1 - share) + values[heads, right] * share
    return between


Law = tuple[FloatArray, FloatArray]
"""alpha and C of every head, `(heads,)` each."""


def keys_of(law: Law, lengths: Sequence[int]) -> FloatArray:
    """k of every head at every n, at least `LEAST` and at most n: `(lengths, heads)`."""
    n = np.asarray(lengths, np.float64)[:, None]
    keys: FloatArray = np.clip(law[0] * n ** law[1], LEAST, n)
    return keys


def spend(make: Callable[[float], Law], lengths: Sequence[int], cost: float) -> Law:
    """The law `make(x)`, whose keys grow with x > 0, that costs at most `cost` keys a row, mean over heads and n."""
    low, high = 1e-8, 1e8
    for _ in range(_STEPS):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if keys_of(make(middle), lengths).mean() < cost else (low, middle)
    return make(low)


def uniform(curves: Curves, exponent: float, cost: float) -> Law:
    """One law for all heads, with this exponent."""
    ones = np.ones(curves.heads)
    return spend(lambda alpha: (alpha * ones, exponent * ones), curves.lengths, cost)


def best_uniform(curves: Curves, cost: float) -> Law:
    """The one law for all heads with the least error at this cost."""
    laws = [uniform(curves, exponent, cost) for exponent in np.linspace(0, 1, 21)]
    return min(laws, key=lambda law: float(curves.errors(keys_of(law, curves.lengths)).sum()))


def by_mass(curves: Curves, cost: float) -> Law:
    """Laws per head fitted to the keys that retain a given mass, times the one factor that spends the budget."""
    exponents, intercepts = np.polyfit(np.log(curves.lengths), np.log(np.stack(list(curves.needed.values()))), 1)
    exponents = np.clip(exponents, 0, 1)
    return spend(lambda factor: (factor * np.exp(intercepts), exponents), curves.lengths, cost)


def by_error(curves: Curves, cost: float) -> Law:
    """Laws per head that minimise the sum of errors at this cost, among a grid of laws: see the module."""
    grid = [(alpha, exponent) for exponent in _EXPONENTS for alpha in _ALPHAS]
    keys = np.stack([keys_of((np.full(curves.heads, a), np.full(curves.heads, c)), curves.lengths) for a, c in grid])
    errors = np.stack([curves.errors(k).mean(0) for k in keys])
    costs = keys.mean(1)
    alphas, exponents = (np.array(column) for column in zip(*grid, strict=True))

    def choose(keys_a_price: float) -> Law:
        best = (errors + costs / keys_a_price).argmin(0)
        return alphas[best], exponents[best]

    return spend(choose, curves.lengths, cost)
