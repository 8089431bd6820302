"""What an error in one layer costs the whole model, in nats.

Layers differ in how much of the residual stream they write and in what later layers make of it, and no norm of the
stream tells: one component of Gemma-3's carries nearly all of it and little of the meaning. So each layer is made
sparse alone, at one small budget, and the divergence of the model's predictions is set against the error in the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.calibration.curves import ErrorCurve
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.measure.perplexity import applied

PROBE_KEYS = 128
"""Kept keys with which layers are probed."""

# Rows of logits that are turned into float32 probabilities at once.
_LOGIT_ROWS = 64


@torch.no_grad()
def divergences(
    model: PreTrainedModel,
    input_ids: Tensor,
    rows: int,
    layers: Sequence[int],
    every: Sequence[int],
    config: SparseAttentionConfig,
) -> Iterator[tuple[int, float]]:
    """KL divergence (nats a token) from the dense model's predictions, with one layer sparse at a time.

    Args:
        model: Unpatched.
        input_ids: int64 `(length,)`.
        rows: Last positions whose predictions are compared.
        layers: Layers to probe.
        every: All attention layers of the model.
        config: For the selector, `sink_keys` and `recent_keys`.

    Yields:
        Layer and divergence, as they are measured.
    """
    if not layers:
        return
    dense = _logits(model, input_ids, rows)
    for layer in layers:
        probe = replace(
            config,
            law="fixed",
            keys=PROBE_KEYS,
            fraction=None,
            min_keys=1,
            max_keys=None,
            dense_below=0,
            dense_layers=tuple(other for other in every if other != layer),
        )
        with applied(model, probe):
            sparse = _logits(model, input_ids, rows)
        total = 0.0
        for start in range(0, rows, _LOGIT_ROWS):
            p, q = (x[start : start + _LOGIT_ROWS].float().log_softmax(-1) for x in (dense, sparse))
            total += (p.exp() * (p - q)).sum().item()
        # Rounding can bring what is nearly nothing below zero.
        yield layer, max(0.0, total / rows)


def _logits(model: PreTrainedModel, input_ids: Tensor, rows: int) -> Tensor:
    output = model(input_ids=input_ids[None].to(model.device), use_cache=False, logits_to_keep=rows)
    logits: Tensor = output.logits[0, -rows:]
    return logits


def layer_sensitivity(
    curves: Sequence[ErrorCurve], divergence: Mapping[int, float], visible: tuple[int, int]
) -> dict[int, float]:
    """Nats a token that a relative error of 1 in a layer's output costs the model, to first order.

    Args:
        curves: Error curves of the texts that were probed.
        divergence: From `divergences`, the mean over these texts.
        visible: Fewest and most visible keys of the rows that were probed.
    """
    out = {}
    for layer, nats in divergence.items():
        near = [c for c in curves if c.layer == layer and visible[0] <= c.visible <= visible[1]]
        error = sum(row[c.budgets.index(PROBE_KEYS)] for c in near for row in c.errors) / len(near)
        out[layer] = nats / error if error > 0 else 0.0
    return out
