"""From error curves to laws: each head gets the power law that spends a common budget where it saves most error.

All heads minimise `error + price * keys` with the same price of a key (water-filling): the law of a head is the pair
(alpha, exponent) with the smallest such sum over all measured blocks of rows. The law is fitted to this sum itself,
not to points that were chosen first, so that a block on which more keys would not help says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.calibration.curves import SMALLEST, ErrorCurve

Head = tuple[int, int]
"""Layer and query head."""

FAMILIES = ("constant", "log", "power", "linear")
"""Shapes of law that are compared: k = a, a ln n, a n^C and a n."""

_EXPONENTS = 21
_STEPS_PER_OCTAVE = 4


@dataclass(frozen=True)
class Law:
    """A candidate: `family` is "power" with its `exponent` (0 is constant, 1 linear), or "log"."""

    family: str
    alpha: float
    exponent: float

    def keys(self, visible: Tensor) -> Tensor:
        """Kept keys, float64, before clamping."""
        n = visible.double()
        return self.alpha * (n.log() if self.family == "log" else n**self.exponent)


def candidate_laws(longest: int, min_keys: int) -> list[Law]:
    """Laws that keep `min_keys` up to all keys at `longest` visible keys, four to an octave, with every exponent."""
    octaves = math.log2(longest / min_keys)
    steps = round(_STEPS_PER_OCTAVE * octaves)
    at_longest = [min_keys * 2 ** (octaves * step / max(1, steps)) for step in range(steps + 1)]
    exponents = [i / (_EXPONENTS - 1) for i in range(_EXPONENTS)]
    powers = [Law("power", k / longest**c, c) for k in at_longest for c in exponents]
    return powers + [Law("log", k / math.log(longest), 0.0) for k in at_longest]


class LawFit:
    """The risk of every candidate law for every head, on every document.

    Args:
        curves: Error curves by document, each of all layers and heads.
        sensitivity: Nats a token that a relative error of 1 in a layer costs the model.
        min_keys: Fewest keys that a row keeps.
        dense_below: Rows that see fewer keys keep them all.

    Attributes:
        documents: Names of the documents.
        heads: The heads, in the order of the rows of `risk`.
        laws: The candidates.
        risk: float64 `(documents, heads, laws)`: mean over a document's blocks of the error, times what the layer's
            errors cost the model, in nats a token.
        cost: float64 `(laws,)`: mean kept keys over the blocks.
    """

    def __init__(
        self,
        curves: Mapping[str, Sequence[ErrorCurve]],
        sensitivity: Mapping[int, float],
        min_keys: int,
        dense_below: int = 0,
    ) -> None:
        every = [curve for document in curves.values() for curve in document]
        visible = torch.tensor(sorted({curve.visible for curve in every}))
        self.shortest, self.longest = int(visible[0]), int(visible[-1])
        self.documents = tuple(curves)
        layers = {curve.layer: len(curve.errors) for curve in every}
        self.heads: tuple[Head, ...] = tuple((layer, head) for layer in sorted(layers) for head in range(layers[layer]))
        floor = min(max(min_keys, SMALLEST), self.longest)
        self.laws = candidate_laws(self.longest, floor)
        kept = torch.stack([law.keys(visible) for law in self.laws], dim=1).clamp(min=floor)
        kept[visible < dense_below] = math.inf
        kept = torch.minimum(kept, visible[:, None].double())
        self.cost = kept.mean(0)
        place = {int(n): i for i, n in enumerate(visible)}
        self._factor = torch.tensor([sensitivity[layer] for layer, _ in self.heads], dtype=torch.float64)
        self._error = torch.stack([self._document_error(document, kept, place, layers) for document in curves.values()])
        self.risk = self._error * self._factor[:, None]

    def _document_error(
        self, curves: Sequence[ErrorCurve], kept: Tensor, place: Mapping[int, int], layers: Mapping[int, int]
    ) -> Tensor:
        sums = {layer: torch.zeros(heads, len(self.laws), dtype=torch.float64) for layer, heads in layers.items()}
        counts = dict.fromkeys(layers, 0)
        for curve in curves:
            sums[curve.layer] += _interpolate(curve, kept[place[curve.visible]])
            counts[curve.layer] += 1
        return torch.cat([sums[layer] / counts[layer] for layer in sorted(layers)])

    def choose(self, price: float, weights: Tensor | None = None, allowed: Tensor | None = None) -> Tensor:
        """The best law of each head at a `price` of a key: int64 `(heads,)`.

        Args:
            price: Nats a token that a key must save to be worth it.
            weights: Weight of each document, `(documents,)`; equal if `None`.
            allowed: bool `(laws,)`: candidates to choose from; the power laws if `None`.
        """
        if weights is None:
            weights = torch.ones(len(self.documents), dtype=torch.float64)
        allowed = self.family("power") if allowed is None else allowed
        total = torch.einsum("d,dhl->hl", weights / weights.sum(), self.risk) + price * self.cost
        return total.masked_fill(~allowed, math.inf).argmin(-1)

    def family(self, name: str) -> Tensor:
        """Which candidates belong to a family: bool `(laws,)`."""
        match name:
            case "constant":
                members = [law.family == "power" and law.exponent == 0 for law in self.laws]
            case "linear":
                members = [law.family == "power" and law.exponent == 1 for law in self.laws]
            case _:
                members = [law.family == name for law in self.laws]
        return torch.tensor(members)

    def intervals(self, price: float, seed: int, repeats: int = 200) -> list[tuple[float, float, float, float]]:
        """95 % intervals `(alpha low, high, exponent low, high)` of each head, by bootstrap over the documents."""
        generator = torch.Generator().manual_seed(seed)
        count = len(self.documents)
        drawn = torch.randint(count, (repeats, count), generator=generator)
        chosen = torch.stack([self.choose(price, row.bincount(minlength=count).double()) for row in drawn])
        alpha = torch.tensor([law.alpha for law in self.laws], dtype=torch.float64)[chosen]
        exponent = torch.tensor([law.exponent for law in self.laws], dtype=torch.float64)[chosen]
        ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
        bounds = [values.quantile(ends, dim=0, interpolation="nearest") for values in (alpha, exponent)]
        return [(a, b, c, d) for a, b, c, d in torch.cat(bounds).T.tolist()]

    def risk_of(self, chosen: Tensor) -> float:
        """Nats a token that the chosen laws cost the model, to first order, mean over documents and blocks."""
        rows = torch.arange(len(self.heads))
        return float(self.risk[:, rows, chosen].sum(1).mean())

    def held_out(self, price: float) -> dict[str, float]:
        """For each family, error + price * keys of a head, on documents that its law was not fitted to (mean)."""
        rows = torch.arange(len(self.heads))
        out = {}
        for name in FAMILIES:
            values = [
                (self.risk[left_out, rows, best] + price * self.cost[best]).mean().item()
                for left_out, best in self._left_out(price, self.family(name))
            ]
            out[name] = math.fsum(values) / len(values)
        return out

    def held_out_error(self, price: float) -> float:
        """Squared error of a layer's output relative to that output, on documents left out of the fit.

        Mean over layers, blocks and documents, each document with the laws that were fitted to the others.
        """
        rows = torch.arange(len(self.heads))
        layers = len({layer for layer, _ in self.heads})
        errors = [self._error[left_out, rows, best].sum().item() for left_out, best in self._left_out(price)]
        return math.fsum(errors) / (len(errors) * layers)

    def _left_out(self, price: float, allowed: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """Each document, and the laws that the heads choose without it."""
        for left_out in range(len(self.documents)):
            weights = torch.ones(len(self.documents), dtype=torch.float64)
            weights[left_out] = 0
            yield left_out, self.choose(price, weights, allowed)


def _interpolate(curve: ErrorCurve, kept: Tensor) -> Tensor:
    """Errors at `kept` keys: `(heads, len(kept))`, linear in log k between the measured budgets, 0 at all keys."""
    budgets = torch.tensor([*curve.budgets, curve.visible], dtype=torch.float64).log()
    errors = torch.tensor([[*row, 0.0] for row in curve.errors], dtype=torch.float64)
    x = kept.log()
    right = torch.searchsorted(budgets, x.contiguous()).clamp(1, len(budgets) - 1)
    left = right - 1
    share = ((x - budgets[left]) / (budgets[right] - budgets[left])).clamp(0, 1)
    return errors[:, left] * (1 - share) + errors[:, right] * share
