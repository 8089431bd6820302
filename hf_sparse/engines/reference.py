"""The specification: dense attention with every key outside the selection masked."""

from __future__ import annotations

from torch import Tensor

from hf_sparse.call import AttentionCall, Selection, accurate
from hf_sparse.engines.softmax import attention_weights


def attend(inputs: AttentionCall, selection: Selection) -> Tensor:
    """Attend densely, masked: `(batch, heads, rows, value_dim)`. Forms all rows x kv_len scores."""
    mask = selection.mask(inputs.query.shape[1], inputs.last_visible)
    return weighted_values(inputs, masked_weights(inputs, mask))


def masked_weights(inputs: AttentionCall, mask: Tensor) -> Tensor:
    """Attention weights under a bool mask over the first keys: float32, of the shape of the mask.

    Args:
        inputs: The block of rows.
        mask: bool `(batch, heads or 1, rows, columns)`; keys beyond `columns` are not attended to.
    """
    batch, heads, rows, dim = inputs.query.shape
    kv_heads, kv_len = inputs.key.shape[1], mask.shape[-1]
    dtype = accurate(inputs.query.dtype)
    query = inputs.query.reshape(batch, kv_heads, -1, dim).to(dtype)
    scores = (query @ inputs.key[:, :, :kv_len].to(dtype).transpose(-1, -2)).view(batch, heads, rows, kv_len)
    sinks = None if inputs.sinks is None else inputs.sinks.view(1, heads, 1, 1)
    return attention_weights(scores, mask, sinks, inputs)


def weighted_values(inputs: AttentionCall, weights: Tensor) -> Tensor:
    """Sum of the first values, weighted: `(batch, heads, rows, value_dim)` in the dtype of the values."""
    batch, heads, rows, kv_len = weights.shape
    kv_heads = inputs.value.shape[1]
    out = weights.reshape(batch, kv_heads, -1, kv_len) @ inputs.value[:, :, :kv_len].to(weights.dtype)
    return out.view(batch, heads, rows, -1).to(inputs.value.dtype)
