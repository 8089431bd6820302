"""Aggregated attention scores: how much the (query, head) pairs of each group attend to its past keys together.

A pair's weight for a key is relative to all that it sees; weights of all pairs are summed, as SnapKV (arXiv 2404.14469)
sums those of a window of queries. Queries and keys are rounded to 8 bits first (as in SageAttention, arXiv 2410.02367),
whoever computes: PyTorch here, or the compiled kernels for CPUs. All rank by the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_sparse.call import AttentionCall, accurate
from hf_sparse.kernels.layout import Layout
from hf_sparse.selectors.layout import GroupLayout

# Scores that are alive at a time: they should stay in a CPU's cache between the passes over them.
_CHUNK_ELEMENTS = 1 << 20

Aggregate = Callable[[Tensor, AttentionCall, Tensor, GroupLayout], Tensor]
"""`by_pytorch`, or another way to the same."""


def by_pytorch(pairs: Tensor, call: AttentionCall, kept_lse: Tensor, layout: GroupLayout) -> Tensor:
    """Aggregated scores by PyTorch, a chunk of the pairs at a time.

    Args:
        pairs: Scaled queries `(batch, kv_heads, groups, pairs, head_dim)`.
        call: For the keys and the soft cap.
        kept_lse: `(batch, kv_heads, groups, pairs)`: log-sum-exp of a pair's scores of the sinks and local keys that it
            sees; inf for a pair that has no say.
        layout: Of the groups.

    Returns:
        `(batch, kv_heads, groups, keys)` for the keys up to the last one that any query sees; 0 for what is no past key
        of the group.
    """
    batch, kv_heads, groups, size, _ = pairs.shape
    length = call.ranges.last_visible
    codes, scales = call.own_quantised.up_to(call.key, length, LAYOUT)
    pairs = rounded(pairs)
    out = pairs.new_zeros(batch, kv_heads, groups, length)
    first = torch.maximum(layout.first, layout.begin)
    for group, (start, stop) in enumerate(layout.past):
        if start >= stop:
            continue
        keys = codes[:, :, start:stop].to(pairs.dtype) * scales[:, :, start:stop, None]
        position = torch.arange(start, stop, device=pairs.device)
        step = max(1, _CHUNK_ELEMENTS // (batch * kv_heads * (stop - start)))
        for at in range(0, size, step):
            part = slice(at, at + step)
            scores = capped(pairs[:, :, group, part] @ keys.transpose(-1, -2), call.softcap)
            seen = (position >= first[:, :, group, part, None]) & (position < layout.low[:, :, group, :, None])
            scores = scores.masked_fill_(~seen, -torch.inf)
            total = torch.logaddexp(scores.logsumexp(-1), kept_lse[:, :, group, part])
            weights = scores.sub_(total[..., None]).exp_()
            # Turned, so that the weights of equal keys are added up alike, to the last bit.
            out[:, :, group, start:stop] += weights.transpose(-1, -2).contiguous().sum(-1)
    return out


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores as they go into the softmax."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def rounded(states: Tensor) -> Tensor:
    """Vectors `(..., dim)` as they are after rounding to 8 bits with a scale of their own."""
    codes, scales = _codes(states)
    return codes * scales[..., None]


def _codes(states: Tensor) -> tuple[Tensor, Tensor]:
    largest = states.abs().amax(-1)
    inverse = torch.where(largest > 0, 127 / largest, 0)
    return (states * inverse[..., None]).round(), largest / 127


def _allocate(key: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """int8 `(batch, kv_heads, room, head_dim)`, and scales `(batch, kv_heads, room)`."""
    shape = (*key.shape[:2], room)
    scales = key.new_empty(*shape, dtype=accurate(key.dtype))
    return key.new_empty(*shape, key.shape[3], dtype=torch.int8), scales


def _write(key: Tensor, start: int, stop: int, out: tuple[Tensor, Tensor]) -> None:
    codes, scales = out
    new, scales[:, :, start:stop] = _codes(key[:, :, start:stop].to(scales.dtype))
    codes[:, :, start:stop] = new.nan_to_num(0).to(torch.int8)


LAYOUT = Layout(_allocate, _write)
"""Keys one after the other, as PyTorch reads them."""
