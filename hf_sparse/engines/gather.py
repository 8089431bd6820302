"""The portable engine: copies the kept keys and values of a group side by side, and attends to those alone."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.engines.softmax import attention_weights
from hf_sparse.selection import AttentionInputs, Selection

# Bytes of gathered keys and values, and of scores, that are alive at a time.
_CHUNK_BYTES = 32 * 2**20


def attend(inputs: AttentionInputs, selection: Selection) -> Tensor:
    """Attend to gathered keys: `(batch, heads, rows, value_dim)`.

    Memory grows with rows x kept keys, never with rows x kv_len; groups are taken a few at a time.
    """
    heads = inputs.query.shape[1]
    kv_heads = inputs.key.shape[1]
    query = selection.members_of(inputs.query, kv_heads)
    batch, _, groups, members, dim = query.shape
    width = selection.columns.shape[-1]
    sinks = None
    if inputs.sinks is not None:
        rows = inputs.query.shape[2]
        sinks = selection.members_of(inputs.sinks.view(1, heads, 1, 1).expand(batch, -1, rows, -1), kv_heads)

    per_group = batch * kv_heads * width * (4 * members + (dim + inputs.value.shape[-1]) * query.element_size())
    step = max(1, _CHUNK_BYTES // per_group)
    parts = []
    for start in range(0, groups, step):
        part = slice(start, start + step)
        columns = selection.columns[:, :, part]
        scores = query[:, :, part] @ _take(inputs.key, columns).transpose(-1, -2)
        part_sinks = None if sinks is None else sinks[:, :, part]
        weights = attention_weights(scores, selection.allowed[:, :, part], part_sinks, inputs)
        parts.append(weights.to(inputs.value.dtype) @ _take(inputs.value, columns))
    return selection.rows_of(torch.cat(parts, dim=2), heads)


def _take(states: Tensor, columns: Tensor) -> Tensor:
    """`(batch, kv_heads, kv_len, dim)` at `(batch, kv_heads, groups, width)` -> `(..., groups, width, dim)`."""
    batch, kv_heads, kv_len, dim = states.shape
    base = torch.arange(batch * kv_heads, device=columns.device).view(batch, kv_heads, 1, 1) * kv_len
    flat = states.reshape(batch * kv_heads * kv_len, dim)
    return flat.index_select(0, (columns + base).flatten()).view(*columns.shape, dim)
