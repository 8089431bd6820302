"""Aggregated scores of one group of few pairs, as in decoding: the keys are read once, which takes most of the time.

The keys are cut into parts, so that the GPU is full. One kernel stores the scores of the pairs, which are much
smaller than the keys, with the total of each part; another turns them into weights and sums these. Tiles, counted for
Hopper and not measured yet: 128 keys, 16 KB of int8 at head_dim 128, three of them on their way while one is in use.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.kernels.triton.common import LOG2_E, LOWEST, fold, log_of, parts_for, total_of
from hf_sparse.kernels.triton.quantise import rounded

MOST_PAIRS = 16
"""Pairs in a tile of the tensor cores; for more of them, scores are no longer small beside the keys."""

_MOST_PARTS = 128


def aggregated_scores_of_few(
    pairs: Tensor, keys: Tensor, key_scales: Tensor, kept_lse: Tensor, past_start: Tensor, past_stop: Tensor
) -> Tensor:
    """The same as `aggregate.aggregated_scores`, for one group of at most `MOST_PAIRS` pairs that see the same keys."""
    batch, kv_heads, _, size, dim = pairs.shape
    padded = max(32, triton.next_power_of_2(dim))
    length = keys.shape[2]
    tile = 128
    parts, _ = parts_for(keys.device, batch * kv_heads, triton.cdiv(length, tile), most=_MOST_PARTS, programs_each=3)
    scores = torch.empty(batch, kv_heads, size, length, dtype=torch.float32, device=keys.device)
    logs = scores.new_empty(batch, kv_heads, size, parts)
    _scores[parts, batch * kv_heads](
        pairs.contiguous(),
        keys,
        key_scales,
        past_start,
        past_stop,
        scores,
        logs,
        keys.stride()[:3],
        key_scales.stride()[:2],
        kv_heads,
        size,
        length,
        DIM=dim,
        PADDED_DIM=padded,
        PAIRS=MOST_PAIRS,
        KEYS=tile,
        num_warps=4,
        # As many tiles of keys as the shared memory of any GPU holds.
        num_stages=4 if padded <= 128 else 2,
    )
    out = scores.new_empty(batch, kv_heads, 1, length)
    tile = 256
    _sums[triton.cdiv(length, tile), batch * kv_heads](
        scores,
        logs,
        kept_lse,
        past_start,
        past_stop,
        out,
        kv_heads,
        size,
        length,
        parts,
        PAIRS=triton.next_power_of_2(size),
        KEYS=tile,
        PARTS=triton.next_power_of_2(parts),
    )
    return out


@triton.jit
def _scores(
    pairs,
    keys,
    key_scales,
    past_start,
    past_stop,
    scores_out,
    logs,
    key_strides,
    scale_strides,
    kv_heads,
    size,
    length,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Scores and their log-sum-exp, to the base 2. Grid: (parts, batch x kv_heads)."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    batch, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    real = pair < size
    d = tl.arange(0, PADDED_DIM)
    place = tl.program_id(1).to(tl.int64) * size + pair
    q = tl.load(pairs + place[:, None] * DIM + d[None, :], mask=real[:, None] & (d < DIM)[None, :], other=0.0)
    q, q_scale = rounded(q.to(tl.float32))
    q_scale *= LOG2_E
    keys += batch * key_strides[0] + kv_head * key_strides[1]
    key_scales += batch * scale_strides[0] + kv_head * scale_strides[1]

    start = tl.load(past_start + batch).to(tl.int32)
    stop = tl.load(past_stop + batch).to(tl.int32)
    width = tl.cdiv(tl.cdiv(stop - start, parts), KEYS) * KEYS
    start += part * width
    stop = tl.minimum(stop, start + width)
    highest = tl.full([PAIRS], LOWEST, tl.float32)
    mass = tl.zeros([PAIRS], tl.float32)
    for at in range(start, stop, KEYS):
        key = at + tl.arange(0, KEYS)
        inside = key < stop
        mask = inside[:, None] & (d < DIM)[None, :]
        k = tl.load(keys + key[:, None].to(tl.int64) * key_strides[2] + d[None, :], mask=mask, other=0)
        k_scale = tl.load(key_scales + key, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32) * k_scale[None, :] * q_scale[:, None]
        tl.store(scores_out + place[:, None] * length + key[None, :], scores, mask=real[:, None] & inside[None, :])
        scores += tl.where(inside, 0.0, -float("inf"))[None, :]
        _, _, highest, mass = fold(scores, highest, mass)
    tl.store(logs + place * parts + part, log_of(highest, mass), mask=real)


@triton.jit
def _sums(
    scores,
    logs,
    kept_lse,
    past_start,
    past_stop,
    out,
    kv_heads,
    size,
    length,
    parts,
    PAIRS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Weights summed over the pairs. Grid: (tiles of keys, batch x kv_heads)."""
    batch = tl.program_id(1) // kv_heads
    pair, part = tl.arange(0, PAIRS), tl.arange(0, PARTS)
    real = pair < size
    place = tl.program_id(1).to(tl.int64) * size + pair
    mask = real[:, None] & (part < parts)[None, :]
    own_logs = tl.load(logs + place[:, None] * parts + part[None, :], mask=mask, other=LOWEST)
    total = total_of(own_logs, tl.load(kept_lse + place, mask=real, other=float("inf")).to(tl.float32))
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    inside = (key >= tl.load(past_start + batch)) & (key < tl.load(past_stop + batch))
    mask = real[:, None] & inside[None, :]
    own = tl.load(scores + place[:, None] * length + key[None, :], mask=mask, other=-float("inf"))
    sums = tl.sum(tl.exp2(own - total[:, None]), 0)
    tl.store(out + tl.program_id(1).to(tl.int64) * length + key, sums, mask=key < length)
