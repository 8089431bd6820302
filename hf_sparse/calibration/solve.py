"""The price of a key at which the laws of all heads together meet a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from hf_sparse.budget import total_cost
from hf_sparse.calibration.laws import LawFit
from hf_sparse.config import HeadLaw, SparseAttentionConfig

PRICES = (1e-12, 1e-1)
"""Nats a token that a key may cost: from giving nearly all keys to giving the fewest."""

DENSE_SHARE = 0.7
"""A layer that would keep more of its keys than this at the longest fitted length stays dense: that is faster."""

_STEPS = 40


def law_config(
    fit: LawFit, price: float, config: SparseAttentionConfig, sliding: Sequence[int]
) -> SparseAttentionConfig:
    """`config` with the laws that the heads choose at `price`; layers in `sliding` stay dense."""
    per_head: dict[int, tuple[HeadLaw, ...]] = {}
    for (layer, _), index in zip(fit.heads, fit.choose(price).tolist(), strict=True):
        law = fit.laws[index]
        per_head[layer] = (*per_head.get(layer, ()), (float(f"{law.alpha:.4g}"), law.exponent))
    made = replace(config, law="power", per_head=per_head, dense_layers=tuple(sliding))
    crowded = [layer for layer in per_head if mean_density(made, [layer], fit.longest) > DENSE_SHARE]
    per_head = {layer: laws for layer, laws in per_head.items() if layer not in crowded}
    return replace(config, law="power", per_head=per_head or None, dense_layers=tuple(sorted([*sliding, *crowded])))


def mean_density(config: SparseAttentionConfig, layers: Sequence[int], length: int) -> float:
    """Kept over visible keys of `layers`, for all causal rows of an input of `length` tokens."""
    visible = length * (length + 1) / 2
    dense = set(config.dense_layers or ())
    kept = [visible if layer in dense else total_cost(config.budget(layer), [length]) for layer in layers]
    return math.fsum(kept) / (visible * len(layers))


def highest_price(met: Callable[[float], bool], prices: tuple[float, float] = PRICES, steps: int = _STEPS) -> float:
    """The highest price at which `met` holds, by bisection on its logarithm.

    Args:
        met: True at low prices, false from some price on.
        prices: The lowest and highest price to consider.
        steps: Halvings.
    """
    low, high = (math.log(price) for price in prices)
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if met(math.exp(middle)) else (low, middle)
    return math.exp(low)
