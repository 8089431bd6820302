"""From scores to attention weights, with everything that models put in between."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_sparse.call import AttentionCall, accurate


def attention_weights(
    scores: Tensor, allowed: Tensor, sinks: Tensor | None, inputs: AttentionCall, *, scaled: bool = False
) -> Tensor:
    """Softmax over the allowed keys, in float32 or better.

    Args:
        scores: `(..., keys)`, raw products of queries and keys.
        allowed: bool, broadcastable to `scores`.
        sinks: Extra logits `(..., 1)` broadcastable to `scores`, which take mass and give none; or `None`.
        inputs: For `scaling`, `softcap` and `dropout`.
        scaled: Whether the scores were multiplied by `scaling` already.

    Returns:
        Weights `(..., keys)`; all zero for a row that is allowed nothing.
    """
    scores = scores.to(accurate(scores.dtype))
    if not scaled:
        scores = scores * inputs.scaling
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    # Masked by arithmetic, which is vectorised where masked_fill is not, and with a finite number: with -inf a row
    # without keys would become NaN, and so would its gradient.
    keep = allowed.to(scores.dtype)
    scores = scores + (keep - 1) * (torch.finfo(scores.dtype).max / 2)
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sinks = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    weights = weights * keep
    return F.dropout(weights, inputs.dropout) if inputs.dropout else weights
