"""The portable engine: copies the kept keys and values of a group side by side, and attends to those alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_sparse.call import AttentionCall, Selection, accurate, as_vectors, take_keys
from hf_sparse.engines.base import Engine
from hf_sparse.engines.common import attention_weights
from hf_sparse.kernels.int8 import Int8States

# Bytes of gathered keys and values, and of scores, that are alive at a time: they should stay in a CPU's cache.
_CHUNK_BYTES = 2 * 2**20

# (query, head) pairs of a group up to which values are summed where they lie, on a CPU.
_FEW_PAIRS = 8


class Gather(Engine):
    """Attention to gathered keys, on any device and with gradients.

    Memory grows with queries x kept keys, never with q_len x kv_len; groups are taken a few at a time.
    """

    name = "gather"

    def attend(self, call: AttentionCall, selection: Selection) -> Tensor:
        """Attention to copies of the kept keys and values: see `Engine.attend`."""
        heads = call.query.shape[1]
        kv_heads = call.key.shape[1]
        dtype = accurate(call.query.dtype)  # Products of float16 numbers may be too large for float16.
        query = selection.pairs_of(call.query, kv_heads).to(dtype)
        batch, _, groups, pairs, dim = query.shape
        width = selection.positions.shape[-1]
        sinks = None
        if call.sinks is not None:
            queries = call.query.shape[2]
            sinks = selection.pairs_of(call.sinks.view(1, heads, 1, 1).expand(batch, -1, queries, -1), kv_heads)

        per_group = batch * kv_heads * width * (4 * pairs + (dim + call.value.shape[-1]) * query.element_size())
        step = max(1, _CHUNK_BYTES // per_group)
        parts = []
        for start in range(0, groups, step):
            part = slice(start, start + step)
            positions = selection.positions[:, :, part]
            scores = query[:, :, part] @ take_keys(call.key, positions).to(dtype).transpose(-1, -2)
            part_sinks = None if sinks is None else sinks[:, :, part]
            allowed = selection.allowed[:, :, part]
            weights = attention_weights(scores, allowed, part_sinks, call)
            parts.append(_weighted_values(weights.to(call.value.dtype), call.value, positions))
        return selection.queries_of(torch.cat(parts, dim=2), heads)


def _weighted_values(weights: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    """Sums of the values at `positions` `(batch, kv_heads, groups, width)`: `(..., groups, pairs, value_dim)`."""
    *outer, pairs, width = weights.shape
    plain = not isinstance(value, Int8States)
    if plain and pairs <= _FEW_PAIRS and not torch.is_grad_enabled() and value.device.type == "cpu":
        # As few sums as one query has need no copy of the values: each is read where it lies, once for each pair.
        vectors, index = as_vectors(value, positions)
        if vectors.is_contiguous():
            index = index.unsqueeze(-2).expand(weights.shape).reshape(-1, width)
            weights = weights.reshape(-1, width)
            return F.embedding_bag(index, vectors, mode="sum", per_sample_weights=weights).view(*outer, pairs, -1)
    return weights @ take_keys(value, positions)
