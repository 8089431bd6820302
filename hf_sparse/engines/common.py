"""Attention by plain PyTorch: from scores to weights, with everything that models put in between, and to outputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_sparse.call import AttentionCall, accurate


def attention_weights(scores: Tensor, allowed: Tensor, sinks: Tensor | None, call: AttentionCall) -> Tensor:
    """Softmax over the allowed keys, in float32 or better.

    Args:
        scores: `(..., keys)`, raw products of queries and keys.
        allowed: bool, broadcastable to `scores`.
        sinks: Extra logits `(..., 1)` broadcastable to `scores`, which take mass and give none; or `None`.
        call: For `scaling`, `softcap` and `dropout`.

    Returns:
        Weights `(..., keys)`; all zero for a query that is allowed nothing.
    """
    scores = scores.to(accurate(scores.dtype)) * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    # Masked by arithmetic, which is vectorised where masked_fill is not, and with a finite number: with -inf a query
    # without keys would become NaN, and so would its gradient.
    keep = allowed.to(scores.dtype)
    scores = scores + (keep - 1) * (torch.finfo(scores.dtype).max / 2)
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sinks = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    weights = weights * keep
    return F.dropout(weights, call.dropout) if call.dropout else weights


def masked_weights(call: AttentionCall, mask: Tensor) -> Tensor:
    """Attention weights under a bool mask over the first keys: float32, of the shape of the mask.

    Args:
        call: The block of queries.
        mask: bool `(batch, heads or 1, q_len, keys)`; keys beyond those are not attended to.
    """
    batch, heads, queries, dim = call.query.shape
    kv_heads, kv_len = call.key.shape[1], mask.shape[-1]
    dtype = accurate(call.query.dtype)
    query = call.query.reshape(batch, kv_heads, -1, dim).to(dtype)
    scores = (query @ call.key[:, :, :kv_len].to(dtype).transpose(-1, -2)).view(batch, heads, queries, kv_len)
    sinks = None if call.sinks is None else call.sinks.view(1, heads, 1, 1)
    return attention_weights(scores, mask, sinks, call)


def weighted_values(call: AttentionCall, weights: Tensor) -> Tensor:
    """Sum of the first values, weighted: `(batch, heads, q_len, value_dim)` in the dtype of the values."""
    batch, heads, queries, kv_len = weights.shape
    kv_heads = call.value.shape[1]
    out = weights.reshape(batch, kv_heads, -1, kv_len) @ call.value[:, :, :kv_len].to(weights.dtype)
    return out.view(batch, heads, queries, -1).to(call.value.dtype)
