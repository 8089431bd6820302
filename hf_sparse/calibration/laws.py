"""Power laws fitted to error curves: each head gets the law that spends a common budget where it saves most error.

All heads minimise `error + price * keys` with the same price of a key: the Lagrangian of "least total error at a given
total number of keys", known as water-filling (Boyd and Vandenberghe, Convex Optimization, example 5.2). The law of a
head is the pair (alpha, exponent) with the smallest such sum over all measured blocks of queries. It is found on a grid
and for the sum itself: fitting a line through the best k of each block would give weight to blocks on which more keys
do not help. Everything here takes and gives numpy arrays, float64 unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from hf_sparse.calibration.curves import SMALLEST, ErrorCurve

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]
BoolArray = NDArray[np.bool_]

Head = tuple[int, int]
"""Layer and query head."""

FAMILIES = ("constant", "log", "power", "linear")
"""Shapes of law that are compared: k = a, a ln n, a n^C and a n."""

_EXPONENTS = 21
_STEPS_PER_OCTAVE = 4


@dataclass(frozen=True)
class Candidates:
    """A grid of laws: k(n) = alpha * n ** exponent, or alpha * ln n where `logarithmic`; all `(laws,)`."""

    alpha: FloatArray
    exponent: FloatArray
    logarithmic: BoolArray

    @classmethod
    def spanning(cls, longest: int, min_keys: int) -> Candidates:
        """Laws with `min_keys` up to all keys at `longest` visible keys: four to an octave, with every exponent."""
        octaves = math.log2(longest / min_keys)
        steps = round(_STEPS_PER_OCTAVE * octaves)
        at_longest = min_keys * 2 ** (octaves * np.arange(steps + 1) / max(1, steps))
        exponents = np.arange(_EXPONENTS) / (_EXPONENTS - 1)
        powers = (at_longest[:, None] / float(longest) ** exponents).ravel()
        return cls(
            np.concatenate([powers, at_longest / math.log(longest)]),
            np.concatenate([np.tile(exponents, len(at_longest)), np.zeros(len(at_longest))]),
            np.repeat([False, True], [len(powers), len(at_longest)]),
        )

    def keys(self, visible: ArrayLike) -> FloatArray:
        """k(n) before clamping and rounding, for n in `visible` `(n,)`: `(n, laws)`."""
        n = np.asarray(visible, np.float64)[:, None]
        return self.alpha * np.where(self.logarithmic, np.log(n), n**self.exponent)

    def family(self, name: str) -> BoolArray:
        """Which laws belong to one of `FAMILIES`: bool `(laws,)`. Constant and linear laws are power laws too."""
        if name == "log":
            return self.logarithmic
        exponents = {"constant": [0.0], "linear": [1.0]}.get(name, self.exponent)
        return np.logical_and(~self.logarithmic, np.isin(self.exponent, exponents))


def interpolated(budgets: ArrayLike, errors: ArrayLike, kept: ArrayLike) -> FloatArray:
    """Errors of heads at any number of kept keys: linear in log k between measured budgets, constant beyond them.

    Args:
        budgets: Kept keys at which errors were measured, rising: `(budgets,)`.
        errors: `(heads, budgets)`.
        kept: `(laws,)`, or `(heads, laws)`.

    Returns:
        `(heads, laws)`.
    """
    points, errors = np.log(budgets), np.asarray(errors, np.float64)
    wanted = np.broadcast_to(np.log(kept), (len(errors), np.shape(kept)[-1]))
    return np.stack([np.interp(x, points, y) for x, y in zip(wanted, errors, strict=True)])


def cheapest(error: ArrayLike, cost: ArrayLike, price: float) -> IntArray:
    """The law of each head with the least `error + price * cost`: indices, `(heads,)`.

    Errors are `(heads, laws)`; costs, `(laws,)`, are kept keys, infinite for a law that may not be chosen.
    """
    best: IntArray = np.argmin(np.asarray(error) + price * np.asarray(cost), axis=-1)
    return best


class LawFit:
    """The risk of every candidate law for every head, on every document.

    Args:
        curves: Error curves by document, each of all layers and heads.
        sensitivity: Nats a token that a relative error of 1 in a layer costs the model.
        min_keys: Fewest keys that a query keeps.
        dense_below: Queries that see fewer keys keep them all.

    Attributes:
        documents: Names of the documents.
        heads: The heads, in the order of `risk`.
        laws: The candidates.
        shortest: Fewest visible keys of a curve.
        longest: Most visible keys of a curve.
        error: `(documents, heads, laws)`: error (see `ErrorCurve`), mean over a document's blocks.
        risk: The same times what the layer's errors cost the model, in nats a token.
        cost: `(laws,)`: kept keys, mean over the blocks.
    """

    def __init__(
        self,
        curves: Mapping[str, Sequence[ErrorCurve]],
        sensitivity: Mapping[int, float],
        min_keys: int,
        dense_below: int = 0,
    ) -> None:
        every = [curve for document in curves.values() for curve in document]
        heads = {curve.layer: len(curve.errors) for curve in every}
        visible = sorted({curve.visible for curve in every})
        self.shortest, self.longest = visible[0], visible[-1]
        self.documents = tuple(curves)
        self.heads: tuple[Head, ...] = tuple((layer, head) for layer in sorted(heads) for head in range(heads[layer]))
        floor = min(max(min_keys, SMALLEST), self.longest)
        self.laws = Candidates.spanning(self.longest, floor)
        n = np.array(visible, np.float64)[:, None]
        kept = np.where(n < dense_below, n, np.clip(self.laws.keys(visible), floor, n))
        self.cost: FloatArray = kept.mean(0)
        kept_at = dict(zip(visible, kept, strict=True))
        self.error = np.stack([_mean_errors(document, kept_at) for document in curves.values()])
        self.risk: FloatArray = self.error * np.array([sensitivity[layer] for layer, _ in self.heads])[:, None]

    def choose(self, price: float, weights: NDArray[Any] | None = None, family: str = "power") -> IntArray:
        """The law of one of `FAMILIES` that is best for each head: indices of `laws`, `(heads,)`.

        A key must save `price` nats a token. Documents have `weights`, `(documents,)`; equal ones if `None`.
        """
        allowed = np.where(self.laws.family(family), self.cost, np.inf)
        return cheapest(np.average(self.risk, axis=0, weights=weights), allowed, price)

    def intervals(self, price: float, seed: int, repeats: int = 200) -> FloatArray:
        """95 % intervals by bootstrap over the documents: `(heads, 4)`, alpha low and high, exponent low and high."""
        count = len(self.documents)
        drawn = torch.randint(count, (repeats, count), generator=torch.Generator().manual_seed(seed)).numpy()
        chosen = np.stack([self.choose(price, np.bincount(documents, minlength=count)) for documents in drawn])
        bounds = [
            np.quantile(values[chosen], [0.025, 0.975], axis=0, method="nearest")
            for values in (self.laws.alpha, self.laws.exponent)
        ]
        return np.concatenate(bounds).T

    def risk_of(self, chosen: IntArray) -> float:
        """Nats a token that the chosen laws cost the model, to first order; mean over documents and blocks."""
        return float(self.risk[:, np.arange(len(self.heads)), chosen].sum(1).mean())

    def held_out(self, price: float) -> dict[str, float]:
        """For each family, `risk + price * keys` of a head on documents that its law was not fitted to (mean)."""
        chosen = {name: self._without_each(price, name) for name in FAMILIES}
        return {
            name: float((self._on_each(self.risk, laws) + price * self.cost[laws]).mean())
            for name, laws in chosen.items()
        }

    def held_out_error(self, price: float) -> float:
        """Squared error of a layer's output relative to that output, on documents left out of the fit.

        Mean over layers, blocks and documents, each document with the laws that were fitted to the others.
        """
        layers = len({layer for layer, _ in self.heads})
        return float(self._on_each(self.error, self._without_each(price)).sum(1).mean()) / layers

    def by_layer(self, values: FloatArray) -> dict[int, tuple[Any, ...]]:
        """The values of each head, `(heads, columns)`, as tuples of numbers with four digits: one a head, by layer."""
        out: dict[int, tuple[Any, ...]] = {}
        for (layer, _), own in zip(self.heads, values, strict=True):
            out[layer] = (*out.get(layer, ()), tuple(float(f"{value:.4g}") for value in own))
        return out

    def _without_each(self, price: float, family: str = "power") -> IntArray:
        """The laws that the heads choose without each of the documents: `(documents, heads)`."""
        return np.stack([self.choose(price, weights, family) for weights in 1 - np.eye(len(self.documents))])

    def _on_each(self, values: FloatArray, chosen: IntArray) -> FloatArray:
        """`values` `(documents, heads, laws)` at the laws `chosen` for each document: `(documents, heads)`."""
        return np.take_along_axis(values, chosen[..., None], axis=-1)[..., 0]


def _mean_errors(curves: Sequence[ErrorCurve], kept_at: Mapping[int, FloatArray]) -> FloatArray:
    """Error of every head under every law, mean over the blocks of a document: `(heads, laws)`, layer after layer.

    All keys make no error, whether they were measured or not.
    """
    by_layer: dict[int, list[FloatArray]] = {}
    for curve in curves:
        errors = np.pad(np.array(curve.errors), ((0, 0), (0, 1)))
        at = interpolated([*curve.budgets, curve.visible], errors, kept_at[curve.visible])
        by_layer.setdefault(curve.layer, []).append(at)
    return np.concatenate([np.mean(by_layer[layer], axis=0) for layer in sorted(by_layer)])
