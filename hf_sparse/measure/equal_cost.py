"""What the laws of a whole model cost, and the one law for all its heads that costs as much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from hf_sparse.config import SparseAttentionConfig
from hf_sparse.laws import Budget, LawName, bisect
from hf_sparse.patching import LayerSupport, SupportReport

_HALVINGS = 40


def kept_keys(config: SparseAttentionConfig, layers: Sequence[LayerSupport], lengths: Sequence[int]) -> float:
    """Keys that prefills of `lengths` tokens attend to, summed over the queries and heads of `layers`.

    The `dense_layers` of the configuration are spelled out: see `with_dense_layers`.
    """
    per_head: dict[tuple[Budget | None, int | None], float] = {}
    total = 0.0
    for layer in layers:
        budget = None if layer.layer in (config.dense_layers or ()) else config.budget(layer.layer)
        kind = (budget, layer.sliding_window)
        if kind not in per_head:
            visible = torch.arange(1, max(lengths) + 1).clamp(max=layer.sliding_window or max(lengths))
            kept = visible if budget is None else budget(visible)
            running = kept.double().view(-1, len(visible)).mean(0).cumsum(0)
            per_head[kind] = math.fsum(running[length - 1].item() for length in lengths)
        total += layer.heads * per_head[kind]
    return total


def density(config: SparseAttentionConfig, layers: Sequence[LayerSupport], lengths: Sequence[int]) -> float:
    """Kept over visible keys: arguments as for `kept_keys`."""
    dense = replace(config, dense_layers=tuple(layer.layer for layer in layers))
    return kept_keys(config, layers, lengths) / kept_keys(dense, layers, lengths)


def with_dense_layers(config: SparseAttentionConfig, support: SupportReport) -> SparseAttentionConfig:
    """`config` with the layers that it leaves dense in this model spelled out in `dense_layers`."""
    if config.dense_layers is not None:
        return config
    return replace(config, dense_layers=tuple(support.default_dense_reasons()))


def matched(
    config: SparseAttentionConfig, support: SupportReport, lengths: Sequence[int], law: LawName
) -> SparseAttentionConfig:
    """One `law` for all heads, under which prefills of `lengths` attend to as many keys as under `config`.

    A power law has the default exponent. The default layers are dense if that leaves some of the cost to the others;
    otherwise only the sliding-window layers of a hybrid model are. The clamps of `config` stay; where they alone cost
    more, the smallest law is used.
    """
    wanted = kept_keys(with_dense_layers(config, support), support.layers, lengths)

    def cost(made: SparseAttentionConfig) -> float:
        return kept_keys(made, support.layers, lengths)

    low, high = 1.0 if law == "fixed" else 1e-4, 1.0 if law == "fraction" else float(max(lengths))
    for dense in (tuple(support.default_dense_reasons()), support.sliding_layers):
        plain = replace(config, per_head=None, calibration=None, dense_layers=dense)
        if cost(_with_law(plain, law, low)) <= wanted:
            break
    parameter, _ = bisect(
        lambda value: cost(_with_law(plain, law, value)) <= wanted, low, high, _HALVINGS, logarithmic=True
    )
    return _with_law(plain, law, parameter)


def _with_law(config: SparseAttentionConfig, law: LawName, value: float) -> SparseAttentionConfig:
    """`config` with its law replaced; `value` is the law's one parameter."""
    default = SparseAttentionConfig()
    short = float(f"{value:.4g}")
    return replace(
        config,
        law=law,
        alpha=short if law in ("power", "log") else default.alpha,
        exponent=default.exponent,
        keys=math.floor(value) if law == "fixed" else None,
        fraction=short if law == "fraction" else None,
    )
