"""What an error in one layer costs the whole model, in nats.

Layers differ in how much of the residual stream they write and in how later layers use it, and no norm of the stream
measures either: in Gemma-3 one component carries nearly all of the norm and little information. So each layer is made
sparse alone, at one small budget, and the KL divergence of the model's predictions is divided by the layer's error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.calibration.curves import ErrorCurve
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.measure.evaluation import applied
from hf_sparse.patching import SupportReport

PROBE_KEYS = 128
"""Kept keys with which layers are probed."""

# Positions whose logits are turned into float32 probabilities at once.
_LOGITS_AT_ONCE = 64


@torch.no_grad()
def divergences(
    model: PreTrainedModel,
    input_ids: Tensor,
    count: int,
    layers: Sequence[int],
    support: SupportReport,
    config: SparseAttentionConfig,
) -> Iterator[tuple[int, float]]:
    """Layer and KL divergence (nats a token) from the dense model's predictions, with one of `layers` sparse at a time.

    Predictions are those of the last `count` positions of a text, int64 `(length,)`. Selector, `sink_keys` and
    `recent_keys` are those of the configuration.
    """
    if not layers:
        return
    dense = _logits(model, input_ids, count)
    for layer in layers:
        probe = replace(
            config,
            law="fixed",
            keys=PROBE_KEYS,
            fraction=None,
            min_keys=1,
            max_keys=None,
            dense_below=0,
            dense_layers=tuple(other.layer for other in support.layers if other.layer != layer),
        )
        with applied(model, probe):
            sparse = _logits(model, input_ids, count)
        total = 0.0
        for start in range(0, count, _LOGITS_AT_ONCE):
            p, q = (x[start : start + _LOGITS_AT_ONCE].float().log_softmax(-1) for x in (dense, sparse))
            total += (p.exp() * (p - q)).sum().item()
        # Rounding can bring a tiny divergence below zero.
        yield layer, max(0.0, total / count)


def _logits(model: PreTrainedModel, input_ids: Tensor, count: int) -> Tensor:
    output = model(input_ids=input_ids[None].to(model.device), use_cache=False, logits_to_keep=count)
    logits: Tensor = output.logits[0, -count:]
    return logits


def layer_sensitivity(
    curves: Sequence[ErrorCurve], divergence: Mapping[int, float], visible: tuple[int, int]
) -> dict[int, float]:
    """Nats a token that a relative error of 1 in a layer's output costs the model, to first order.

    It follows from the error curves of the texts that were probed, the mean of their `divergences`, and the fewest and
    most `visible` keys of the positions that were compared.
    """
    out = {}
    for layer, nats in divergence.items():
        near = [c for c in curves if c.layer == layer and visible[0] <= c.visible <= visible[1]]
        error = sum(row[c.budgets.index(PROBE_KEYS)] for c in near for row in c.errors) / len(near)
        out[layer] = nats / error if error > 0 else 0.0
    return out
