"""Aggregated attention scores of the past keys of each group, from scores in 8 bits that are not stored.

The attention weights of all (query, head) pairs of a group are summed, as SnapKV (arXiv 2404.14469) pools scores over
queries.

A pair's weight for a key is exp(score - total), where its total is the log of the summed exponentials of all that it
attends to. One kernel walks over the keys for each tile of pairs and finds the totals; another walks over the pairs
for each tile of keys and sums the weights. Each score is computed twice, and nothing of size q_len x kv_len is stored.

The tiles are counted for Hopper, not measured yet: 128 pairs x 64 keys for totals, 256 keys x 64 pairs for sums,
with 8 warps. Compiled for compute capability 9.0, two programs fit on a multiprocessor (at most 122 registers a thread
without `first`, 58 KB at head_dim 128), so that one can compute exponentials while the other multiplies. At head_dim
128 the exponentials, two for each score, take about twice as long as the int8 products.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.kernels.layout import adjacent
from hf_sparse.kernels.triton.aggregate_few import MOST_PAIRS, aggregated_scores_of_few
from hf_sparse.kernels.triton.common import LOG2_E, LOWEST, fold, log_of, on_its_device, parts_for, total_of
from hf_sparse.kernels.triton.quantise import quantise

# Most parts into which the keys are cut, where few pairs leave the GPU idle.
_MOST_PARTS = 16


@on_its_device
def aggregated_scores(
    pairs: Tensor,
    keys: Tensor,
    key_scales: Tensor,
    kept_lse: Tensor,
    past_start: Tensor,
    past_stop: Tensor,
    first: Tensor | None = None,
) -> Tensor:
    """Attention weights of the pairs of each group for its past keys, summed over the pairs.

    A pair's weights are normalised over the past keys that it sees and those in `kept_lse`. The scores are products of
    int8 vectors; the queries are rounded here.

    Args:
        pairs: Scaled queries `(batch, kv_heads, groups, pairs, head_dim)`, floating point.
        keys: int8 `(batch, kv_heads, kv_len, head_dim)`, from `quantise`; a part of longer storage is not copied.
        key_scales: float32 `(batch, kv_heads, kv_len)`.
        kept_lse: `(batch, kv_heads, groups, pairs)`: log-sum-exp of a pair's scores of the always-kept keys (sinks
            and recent window); inf for a pair that is not counted, -inf where there are no such keys.
        past_start: int `(batch, groups)`: a group's first past key.
        past_stop: int `(batch, groups)`: the end of its past keys; it has none if this is not above `past_start`.
        first: int `(batch, kv_heads or 1, groups, pairs)`: a pair sees no key before this one; `None` where each
            sees all past keys of its group.

    Returns:
        float32 `(batch, kv_heads, groups, kv_len)`; 0 for keys outside the past of the group. That is the memory it
        takes: pass groups in chunks.
    """
    batch, kv_heads, groups, size, dim = pairs.shape
    keys, key_scales, kept_lse = adjacent(keys), adjacent(key_scales), kept_lse.contiguous()
    past_start, past_stop = past_start.contiguous(), past_stop.contiguous()
    if groups == 1 and size <= MOST_PAIRS and first is None:
        return aggregated_scores_of_few(pairs, keys, key_scales, kept_lse, past_start, past_stop)
    if first is not None:
        first = adjacent(first).expand(-1, kv_heads, -1, -1)
    rounded, scales = quantise(pairs.flatten(2, 3))
    length = keys.shape[2]
    padded = max(32, triton.next_power_of_2(dim))
    shape = {"DIM": dim, "PADDED_DIM": padded}
    strides = (keys.stride()[:3], key_scales.stride()[:2], None if first is None else first.stride()[:3])

    tile, step = 128, 64
    tiles = triton.cdiv(size, tile)
    programs = tiles * groups * batch * kv_heads
    parts, _ = parts_for(keys.device, programs, triton.cdiv(length, step), most=_MOST_PARTS, programs_each=4)
    logs = torch.empty(batch, kv_heads, groups, size, parts, dtype=torch.float32, device=keys.device)
    call = (rounded, scales, keys, key_scales, past_start, past_stop, first, *strides, kv_heads, size, parts)
    _totals[tiles * parts, batch * kv_heads, groups](
        logs, *call, **shape, PAIRS=tile, KEYS=step, num_warps=8, num_stages=3
    )
    tile, step = 256 if padded <= 128 else 128, 64
    out = torch.empty(batch, kv_heads, groups, length, dtype=torch.float32, device=keys.device)
    _aggregate[triton.cdiv(length, tile), batch * kv_heads, groups](
        out,
        logs,
        kept_lse,
        length,
        *call,
        **shape,
        KEYS=tile,
        PAIRS=step,
        PARTS=triton.next_power_of_2(parts),
        num_warps=8,
        num_stages=3,
    )
    return out


@triton.jit
def _totals(
    logs,
    pairs,
    pair_scales,
    keys,
    key_scales,
    past_start,
    past_stop,
    first,
    key_strides,
    scale_strides,
    first_strides,
    kv_heads,
    size,
    parts,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Log-sum-exp, to the base 2, of the scores of past keys, for a part of these keys.

    Grid: (tiles of pairs x parts, batch x kv_heads, groups).
    """
    batch, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    # The last groups see most keys: they start first.
    group = tl.num_programs(2) - 1 - tl.program_id(2)
    part = tl.program_id(0) % parts
    pair = tl.program_id(0) // parts * PAIRS + tl.arange(0, PAIRS)
    real = pair < size
    d = tl.arange(0, PADDED_DIM)
    place = (tl.program_id(1) * tl.num_programs(2) + group).to(tl.int64) * size + pair
    q = tl.load(pairs + place[:, None] * DIM + d[None, :], mask=real[:, None] & (d < DIM)[None, :], other=0)
    q_scale = tl.load(pair_scales + place, mask=real, other=0.0) * LOG2_E
    keys += batch * key_strides[0] + kv_head * key_strides[1]
    key_scales += batch * scale_strides[0] + kv_head * scale_strides[1]
    if first is not None:
        first += batch * first_strides[0] + kv_head * first_strides[1] + group * first_strides[2]
        own_first = tl.load(first + pair, mask=real, other=0)

    start = tl.load(past_start + batch * tl.num_programs(2) + group).to(tl.int32)
    stop = tl.load(past_stop + batch * tl.num_programs(2) + group).to(tl.int32)
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
        scores += tl.where(inside, 0.0, -float("inf"))[None, :]
        if first is not None:
            scores = tl.where(key[None, :] >= own_first[:, None], scores, -float("inf"))
        _, _, highest, mass = fold(scores, highest, mass)
    tl.store(logs + place * parts + part, log_of(highest, mass), mask=real)


@triton.jit
def _aggregate(
    out,
    logs,
    kept_lse,
    length,
    pairs,
    pair_scales,
    keys,
    key_scales,
    past_start,
    past_stop,
    first,
    key_strides,
    scale_strides,
    first_strides,
    kv_heads,
    size,
    parts,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    PAIRS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Weights summed over the pairs. Grid: (tiles of keys, batch x kv_heads, groups)."""
    batch, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    group = tl.num_programs(2) - 1 - tl.program_id(2)
    start = tl.load(past_start + batch * tl.num_programs(2) + group).to(tl.int32)
    stop = tl.load(past_stop + batch * tl.num_programs(2) + group).to(tl.int32)
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    inside = (key >= start) & (key < stop)
    d = tl.arange(0, PADDED_DIM)
    d_real = (d < DIM)[None, :]
    part = tl.arange(0, PARTS)
    own_group = (tl.program_id(1) * tl.num_programs(2) + group).to(tl.int64)
    sums = tl.zeros([KEYS], tl.float32)
    if (tl.program_id(0) * KEYS < stop) & (tl.program_id(0) * KEYS + KEYS > start):
        keys += batch * key_strides[0] + kv_head * key_strides[1]
        k = tl.load(
            keys + key[:, None].to(tl.int64) * key_strides[2] + d[None, :], mask=inside[:, None] & d_real, other=0
        )
        key_scales += batch * scale_strides[0] + kv_head * scale_strides[1]
        k_scale = tl.load(key_scales + key, mask=inside, other=0.0)
        for at in range(0, size, PAIRS):
            pair = at + tl.arange(0, PAIRS)
            real = pair < size
            place = own_group * size + pair
            q = tl.load(pairs + place[:, None] * DIM + d[None, :], mask=real[:, None] & d_real, other=0)
            q_scale = tl.load(pair_scales + place, mask=real, other=0.0) * LOG2_E
            mask = real[:, None] & (part < parts)[None, :]
            own_logs = tl.load(logs + place[:, None] * parts + part[None, :], mask=mask, other=LOWEST)
            total = total_of(own_logs, tl.load(kept_lse + place, mask=real, other=float("inf")).to(tl.float32))
            # Keys come first, so that a thread adds up most of the weights of a key by itself.
            scores = tl.dot(k, tl.trans(q), out_dtype=tl.int32).to(tl.float32) * k_scale[:, None] * q_scale[None, :]
            scores -= total[None, :]
            if first is not None:
                own = first + batch * first_strides[0] + kv_head * first_strides[1] + group * first_strides[2]
                own_first = tl.load(own + pair, mask=real, other=0)
                scores = tl.where(key[:, None] >= own_first[None, :], scores, -float("inf"))
            sums += tl.sum(tl.exp2(scores), 1)
    tl.store(out + own_group * length + key, tl.where(inside, sums, 0.0), mask=key < length)
