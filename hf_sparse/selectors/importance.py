"""How important each key of the past is to the (query, head) pairs of a group.

Attention weights of all pairs are summed, as SnapKV (arXiv 2404.14469) sums those of a window of queries. Products are
those of 4-bit keys (as SALE estimates weights, arXiv 2505.24179) with queries of 7 bits, each with a scale of its own.
Before they are rounded, keys lose what they have in common (`hf_sparse.kernels.quantised`), and both go through a
Hadamard transform, which leaves products as they are and spreads components that are much larger than others (as in
QuaRot, arXiv 2404.00456).
What a pair's weights are relative to, the sum over all keys that it sees, is estimated: of the past, from `WINDOW`
neighbouring keys in every `PERIOD`. No weight counts for more than 1.

PyTorch does this here; the compiled kernels for CPUs and Triton's for GPUs do the same with the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_sparse.call import AttentionCall
from hf_sparse.kernels.layout import Layout
from hf_sparse.selectors.layout import GroupLayout

WINDOW, PERIOD = 64, 1024
"""Neighbouring keys that are looked at for the estimate, in so many."""

_KEY_MOST, _QUERY_MOST = 7, 63

# Scores that are alive at a time: they should stay in a CPU's cache between the passes over them.
_CHUNK_ELEMENTS = 1 << 20

_LOG2_E = 1.4426950408889634


def importance(pairs: Tensor, call: AttentionCall, layout: GroupLayout) -> Tensor:
    """The importance of each key to the pairs of each group together, a chunk of the pairs at a time.

    Args:
        pairs: Scaled queries `(batch, kv_heads, groups, pairs, head_dim)`.
        call: For the keys and the soft cap.
        layout: Of the groups.

    Returns:
        float32 `(batch, kv_heads, groups, keys)` for the keys up to the last one that any query sees. For keys that are
        not of the past of a group they mean nothing.
    """
    batch, kv_heads, groups, size, _ = pairs.shape
    length = call.ranges.last_visible
    codes, scales = call.quantised_up_to(length, LAYOUT)
    pairs = rounded(mixed(pairs.float()), _QUERY_MOST) / _gain(pairs.shape[-1])
    out = pairs.new_zeros(batch, kv_heads, groups, length)
    position = torch.arange(length, device=pairs.device)
    for group, (start, stop) in enumerate(layout.past):
        if start >= stop:
            continue
        edge_stop, local_start = layout.edge_stop[:, :, group], layout.local_start[:, :, group]
        is_past = (position >= edge_stop) & (position < local_start)
        looked_at = (position - edge_stop) % PERIOD < WINDOW
        looked_at |= local_start - edge_stop <= PERIOD
        looked_at &= is_past
        # Keys that each key counts for in the estimate.
        weight = is_past.sum(-1, keepdim=True) / looked_at.sum(-1, keepdim=True).clamp(min=1)
        weight = torch.where(is_past, weight * looked_at, 1.0)[:, :, None]
        keys = codes[:, :, :length].float() * scales[:, :, :length, None] * _LOG2_E
        step = max(1, _CHUNK_ELEMENTS // (batch * kv_heads * length))
        for at in range(0, size, step):
            part = slice(at, at + step)
            first, end = (x[:, :, group, part, None] for x in (layout.first, layout.stop))
            seen = (position >= first) & (position < end)
            scores = pairs[:, :, group, part] @ keys.transpose(-1, -2)
            if call.softcap is not None:
                cap = call.softcap * _LOG2_E
                scores = cap * torch.tanh(scores / cap)
            used = scores.masked_fill(~seen | (weight == 0), -torch.inf)
            # A power of two: a sum of rough exponentials relative to another is the same but for the factor.
            most = used.amax(-1, keepdim=True).ceil()
            total = (_rough_exp2(used - most) * weight).sum(-1, keepdim=True).log2() + most
            weights = _rough_exp2((scores - total).clamp(max=0)).masked_fill_(end <= first, 0)
            # Turned, so that the weights of equal keys are added up alike, to the last bit.
            out[:, :, group] += weights.transpose(-1, -2).contiguous().sum(-1)
    return out


def _rough_exp2(x: Tensor) -> Tensor:
    """2^x with an error of up to 6 %, by its bits as a float32 (Schraudolph, 1999), as the kernels have it."""
    return ((x + 127) * 2.0**23).nan_to_num(0, neginf=0).clamp(min=0).to(torch.int32).view(torch.float32)


def mixed(states: Tensor) -> Tensor:
    """Hadamard transforms of vectors `(..., dim)`: of the same shape, with one component more if `dim` is odd.

    The halves of a vector are added and subtracted, and blocks of each transformed whose size is the largest power of
    two that divides a half. Products of such vectors are `_gain(dim)` times as large.
    """
    dim = states.shape[-1]
    half = -(-dim // 2)
    low, high = states[..., :half], F.pad(states[..., half:], (0, 2 * half - dim))
    out = torch.stack([low + high, low - high], dim=-2)
    step = 1
    while half % (2 * step) == 0:
        low, high = out.reshape(*out.shape[:-1], half // (2 * step), 2, step).unbind(-2)
        out = torch.stack([low + high, low - high], dim=-2).flatten(-3)
        step *= 2
    return out.flatten(-2)


def _gain(dim: int) -> int:
    half = -(-dim // 2)
    return 2 * (half & -half)


def rounded(states: Tensor, most: int) -> Tensor:
    """Vectors `(..., dim)` as they are after rounding to whole numbers up to `most`, with a scale of their own."""
    codes, scales = _codes(states, most)
    return codes * scales[..., None]


def _codes(states: Tensor, most: int) -> tuple[Tensor, Tensor]:
    largest = states.abs().amax(-1)
    inverse = torch.where(largest > 0, torch.full_like(largest, most) / largest, 0)  # a number / a tensor rounds twice
    return (states * inverse[..., None]).round(), largest / most


def _allocate(key: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """int8 `(batch, kv_heads, room, head_dim)`, one more if that is odd; scales float32 `(batch, kv_heads, room)`."""
    shape = (*key.shape[:2], room)
    scales = key.new_empty(*shape, dtype=torch.float32)
    return key.new_empty(*shape, -(-key.shape[3] // 2) * 2, dtype=torch.int8), scales


def _write(key: Tensor, start: int, stop: int, out: tuple[Tensor, Tensor], center: Tensor) -> None:
    codes, scales = out
    centred = key[:, :, start:stop].to(scales.dtype) - center[:, :, None]
    new, scales[:, :, start:stop] = _codes(mixed(centred), _KEY_MOST)
    codes[:, :, start:stop] = new.nan_to_num(0).to(torch.int8)


LAYOUT = Layout(_allocate, _write)
"""Keys one after the other, a byte for each component of their transforms."""
