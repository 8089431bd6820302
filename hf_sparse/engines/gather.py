"""The portable engine: copies the kept keys and values of a group side by side, and attends to those alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_sparse.call import AttentionCall, Selection, as_vectors, take_rows
from hf_sparse.engines.softmax import attention_weights

# Bytes of gathered keys and values, and of scores, that are alive at a time: they should stay in a processor's cache.
_CHUNK_BYTES = 2 * 2**20

# Members of a group up to which values are summed where they lie, on a CPU.
_FEW_MEMBERS = 8


def attend(inputs: AttentionCall, selection: Selection) -> Tensor:
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

    learns = torch.is_grad_enabled() and (inputs.query.requires_grad or inputs.key.requires_grad)
    known = None if learns else selection.scores
    per_group = batch * kv_heads * width * (4 * members + (dim + inputs.value.shape[-1]) * query.element_size())
    step = max(1, _CHUNK_BYTES // per_group)
    parts = []
    for start in range(0, groups, step):
        part = slice(start, start + step)
        columns = selection.columns[:, :, part]
        if known is None:
            scores = query[:, :, part] @ take_rows(inputs.key, columns).transpose(-1, -2)
        else:
            scores = known[:, :, part]
        part_sinks = None if sinks is None else sinks[:, :, part]
        allowed = selection.allowed[:, :, part]
        weights = attention_weights(scores, allowed, part_sinks, inputs, scaled=known is not None)
        parts.append(_weighted_values(weights.to(inputs.value.dtype), inputs.value, columns))
    return selection.rows_of(torch.cat(parts, dim=2), heads)


def _weighted_values(weights: Tensor, value: Tensor, columns: Tensor) -> Tensor:
    """Sums of the values at `columns` `(batch, kv_heads, groups, width)`: `(..., groups, members, value_dim)`."""
    *outer, members, width = weights.shape
    if members <= _FEW_MEMBERS and not torch.is_grad_enabled() and value.device.type == "cpu":
        # As few sums as one row has need no copy of the values: each is read where it lies, once for each member.
        vectors, index = as_vectors(value, columns)
        if vectors.is_contiguous():
            index = index.unsqueeze(-2).expand(weights.shape).reshape(-1, width)
            weights = weights.reshape(-1, width)
            return F.embedding_bag(index, vectors, mode="sum", per_sample_weights=weights).view(*outer, members, -1)
    return weights @ take_rows(value, columns)
