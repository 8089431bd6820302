"""The configuration at a price of a key, and the price at which all laws together meet a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from hf_sparse.calibration.laws import LawFit
from hf_sparse.calibration.target import Target
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.laws import bisect
from hf_sparse.measure.equal_cost import density
from hf_sparse.patching import LayerSupport

PRICES = (1e-12, 1e-1)
"""Nats a token that a key may cost: from giving nearly all keys to giving the fewest."""

DENSE_SHARE = 0.7
"""A layer that would keep more of its keys than this at the longest fitted length stays dense: that is faster."""

# Densities between which runs over texts are tried, and how many.
_DENSITIES = (0.02, DENSE_SHARE)
_TRIALS = 5


class Solver:
    """Configurations by price.

    Args:
        fit: The laws to choose from.
        config: Everything but the laws.
        layers: The layers with laws to fit.
        dense: The other layers, which stay dense.
    """

    def __init__(
        self, fit: LawFit, config: SparseAttentionConfig, layers: Sequence[LayerSupport], dense: Sequence[int]
    ) -> None:
        self.fit, self.config, self.layers, self.dense = fit, config, layers, dense

    def config_at(self, price: float) -> SparseAttentionConfig:
        """The configuration with the laws that the heads choose at `price`; see `DENSE_SHARE` for dense layers."""
        chosen = self.fit.choose(price)
        laws = self.fit.by_layer(np.stack([self.fit.laws.alpha[chosen], self.fit.laws.exponent[chosen]], axis=1))
        whole = replace(self.config, per_head=laws, dense_layers=())
        full = [self.fit.longest]
        crowded = [layer.layer for layer in self.layers if density(whole, [layer], full) > DENSE_SHARE]
        laws = {layer: own for layer, own in laws.items() if layer not in crowded}
        return replace(self.config, per_head=laws or None, dense_layers=tuple(sorted([*self.dense, *crowded])))

    def density(self, price: float, length: int) -> float:
        """Kept over visible keys in the layers with laws to fit, for an input of `length` tokens."""
        return density(self.config_at(price), self.layers, [length])

    def price(self, target: Target, length: int, trial: Callable[[SparseAttentionConfig], float]) -> float:
        """The price of a key at which the laws meet `target` at `length` tokens, or come nearest to it.

        `trial` measures what the target's metric is under a configuration, if it takes a run of the model.
        """
        match target.metric:
            case "density":
                return self._price_of_density(target.value, length)
            case "output_error":
                return _last(lambda price: self.fit.held_out_error(price) <= target.value, *PRICES)
            case "perplexity_ratio" | "retrieval_loss":
                # Bisected over the density, which says more evenly than a price how sparse a trial is.
                least, most = _DENSITIES
                sparsest = max(least, self.density(PRICES[1], length))

                def price_of(inverse: float) -> float:
                    return self._price_of_density(1 / inverse, length)

                def holds(inverse: float) -> bool:
                    return trial(self.config_at(price_of(inverse))) <= target.value

                return price_of(_last(holds, 1 / most, max(1 / most, 1 / sparsest), _TRIALS))

    def _price_of_density(self, wanted: float, length: int) -> float:
        """The lowest price at which no more than the share `wanted` of keys is kept."""
        last = _last(lambda price: self.density(price, length) > wanted, *PRICES)
        # Bisection ends a hair on the denser side of a step.
        return last * (1 + 1e-9)


def _last(holds: Callable[[float], bool], low: float, high: float, steps: int = 40) -> float:
    """The highest value up to which `holds`."""
    return bisect(holds, low, high, steps, logarithmic=True)[0]
