"""Attention of the (query, head) pairs of a group to its candidate keys, gathered on the way into the tiles.

A program holds a tile of pairs (queries of all heads of a GQA group) and walks over the candidate keys of their group:
it loads a tile of keys and values in place, and folds it into a running softmax. Where there are too few tiles of pairs
to fill the GPU, as in decoding, several programs share the keys, and a second kernel joins their parts.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803
# The arguments of a kernel have no Python types. Capitals: what a kernel is compiled for.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.kernels.layout import adjacent
from hf_sparse.kernels.triton.common import LOG2_E, LOWEST, capped, fold, on_its_device, parts_for, shared_memory

# Most parts of the keys of a group: the second kernel holds all parts of a pair at once.
_MOST_PARTS = 64

# Shared memory of GPUs whose programs take 128 pairs: all of NVIDIA. On those of AMD, they would spill registers.
_ROOM_FOR_MANY = 99 << 10


@on_its_device
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    keep: Tensor,
    queries_per_group: int,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend to the keys that are kept: `(batch, heads, q_len, value_dim)` in the dtype of the values.

    Scores, softmax and sums are float32; the weights are rounded to the dtype of the values before they meet them.
    A pair that keeps nothing gets zeros. In memory the heads of a query lie side by side, as models want them. A kernel
    is compiled once for widths that are multiples of 16, for which it reads 8 entries of a mask at a time, and once for
    all others.

    Args:
        query: `(batch, heads, q_len, dim)`, in float32, float16 or bfloat16, like the keys and values.
        key: `(batch, kv_heads, kv_len, dim)`.
        value: `(batch, kv_heads, kv_len, value_dim)`.
        positions: `(batch, kv_heads, groups, width)`: positions of the candidate keys of each group, as in `Selection`.
        keep: Which of them a pair attends to: a mask, bool `(batch, kv_heads, groups, pairs, width)`, or runs of them,
            int64 `(batch, kv_heads, groups, pairs, runs, 2)`, as in `SharedSelection`.
        queries_per_group: Queries in one group.
        scaling: Factor of the scores.
        softcap: Soft cap of the scores, or `None`.
        sinks: `(heads,)` logits without a value, or `None`.
    """
    batch, heads, q_len, dim = query.shape
    kv_heads, value_dim = value.shape[1], value.shape[3]
    groups, width = positions.shape[2:]
    pairs = keep.shape[3]
    query, key, value, positions = (adjacent(x) for x in (query, key, value, positions))
    is_mask = keep.dtype == torch.bool
    keep = adjacent(keep.view(torch.uint8)) if is_mask else keep.contiguous()
    padded_dim, padded_value_dim = (max(16, triton.next_power_of_2(x)) for x in (dim, value_dim))
    room = shared_memory(query.device)
    tile_pairs, tile_keys, warps = _tiles(pairs, max(padded_dim, padded_value_dim), key.dtype, room)
    step_bytes = tile_keys * (padded_dim + padded_value_dim) * key.element_size()

    tiles = triton.cdiv(pairs, tile_pairs)
    steps = triton.cdiv(width, tile_keys)
    parts, steps_each = parts_for(
        query.device, tiles * groups * batch * kv_heads, steps, most=_MOST_PARTS, programs_each=2
    )

    out = value.new_empty(batch, q_len, heads, value_dim)
    part_shape = (batch, kv_heads, groups, pairs, parts)
    sums = out if parts == 1 else value.new_empty(*part_shape, value_dim, dtype=torch.float32)
    highest, mass = (None, None) if parts == 1 else sums.new_empty(2, *part_shape)
    # Groups of one head are more than the 65,535 programs that a grid has along any axis but the first.
    _attend_tile[groups * tiles * parts, batch * kv_heads](
        query,
        key,
        value,
        positions,
        keep,
        sinks,
        sums,
        highest,
        mass,
        query.stride()[:3],
        key.stride()[:3],
        value.stride()[:3],
        positions.stride()[:3],
        keep.stride()[:4],
        kv_heads,
        heads // kv_heads,
        q_len,
        queries_per_group,
        pairs,
        width,
        parts,
        steps_each * tile_keys,
        scaling,
        softcap,
        DIM=dim,
        VALUE_DIM=value_dim,
        PADDED_DIM=padded_dim,
        PADDED_VALUE_DIM=padded_value_dim,
        PAIRS=tile_pairs,
        KEYS=tile_keys,
        RUNS=0 if is_mask else keep.shape[4],
        num_warps=warps,
        num_stages=_stages(step_bytes, room),
    )
    if parts > 1:
        _join_parts[pairs, groups, batch * kv_heads](
            sums,
            highest,
            mass,
            out,
            kv_heads,
            heads // kv_heads,
            q_len,
            queries_per_group,
            parts,
            VALUE_DIM=value_dim,
            PADDED_VALUE_DIM=padded_value_dim,
            PARTS=triton.next_power_of_2(parts),
        )
    return out.transpose(1, 2)


def _tiles(pairs: int, dim: int, dtype: torch.dtype, room: int) -> tuple[int, int, int]:
    """Pairs and keys of a tile, and warps: counted for Hopper, not measured yet.

    For head_dim 128 in 16 bits, 128 pairs take 64 keys a step: two steps of keys and values are 64 KB of shared
    memory, the sums are 64 registers of a thread, and each gathered key meets as many pairs as fit without spills.
    Of 128 and 64 pairs, the number that leaves less of the last tile empty: 64 queries of 3 heads are 3 tiles of 64.
    Exact float32 products run outside the tensor cores, from more registers. `room`: bytes of shared memory that a
    program has.
    """
    keys = 64 if dim <= 128 else 32
    few = max(16, min(32, triton.next_power_of_2(pairs)))
    if dtype == torch.float32:
        return few, keys // 2, 4
    if pairs <= 32:
        return few, keys, 4
    if dim > 128:
        return 64, keys, 8
    if room < _ROOM_FOR_MANY:
        return 64, keys, 4
    return (128, keys, 8) if -(-pairs // 128) * 128 <= -(-pairs // 64) * 64 else (64, keys, 4)


def _stages(step_bytes: int, room: int) -> int:
    """Stages of the loop over the keys: 5 keep two steps of `step_bytes` on their way while one is used, 3 keep one.

    Positions are read before the keys that they say, so that other numbers compile to no more than these. `room`: bytes
    of shared memory that a program has.
    """
    return 5 if 4 * step_bytes + (16 << 10) <= room else 3


@triton.jit
def _place(group, pair, share, q_len, queries_per_group):
    """Head within the GQA group, and index of the query, of a pair. Groups of one head go by head, then query."""
    blocks = q_len // queries_per_group
    heads_before = group // blocks
    return heads_before + pair // queries_per_group, group % blocks * queries_per_group + pair % queries_per_group


@triton.jit
def _attend_tile(
    query,
    key,
    value,
    positions,
    keep,
    sinks,
    out,
    highest_out,
    mass_out,
    query_strides,
    key_strides,
    value_strides,
    position_strides,
    keep_strides,
    kv_heads,
    share,
    q_len,
    queries_per_group,
    pairs,
    width,
    parts,
    part_width,
    scaling,
    softcap,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    KEYS: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Grid: (groups x tiles of pairs x parts of the keys, batch x kv_heads). `RUNS`: 0 where `keep` is a mask."""
    programs = tl.cdiv(pairs, PAIRS) * parts
    group, own = tl.program_id(0) // programs, tl.program_id(0) % programs
    batch, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    part = own % parts
    pair = own // parts * PAIRS + tl.arange(0, PAIRS)
    real = pair < pairs
    own_head, query_index = _place(group, pair, share, q_len, queries_per_group)
    head = kv_head * share + own_head
    d = tl.arange(0, PADDED_DIM)
    dv = tl.arange(0, PADDED_VALUE_DIM)
    # These masks are compiled: always true, they cost nothing.
    d_real = d[None, :] < DIM
    dv_real = dv[None, :] < VALUE_DIM

    query_start = batch * query_strides[0] + head * query_strides[1] + query_index.to(tl.int64) * query_strides[2]
    q = tl.load(query + query_start[:, None] + d[None, :], mask=real[:, None] & d_real, other=0.0)
    key += batch * key_strides[0] + kv_head * key_strides[1]
    value += batch * value_strides[0] + kv_head * value_strides[1]
    positions += batch * position_strides[0] + kv_head * position_strides[1] + group.to(tl.int64) * position_strides[2]
    keep += batch * keep_strides[0] + kv_head * keep_strides[1] + group.to(tl.int64) * keep_strides[2]
    keep += pair.to(tl.int64) * keep_strides[3]
    if RUNS > 0:
        # What no pair of the tile keeps at the end of the list is not read.
        last = tl.zeros([PAIRS], tl.int64)
        for run in tl.static_range(RUNS):
            last = tl.maximum(last, tl.load(keep + 2 * run + 1, mask=real, other=0))
        width = tl.minimum(width, tl.max(last, 0).to(tl.int32))
    highest = tl.full([PAIRS], LOWEST, tl.float32)
    mass = tl.zeros([PAIRS], tl.float32)
    if sinks is not None and part == 0:
        highest = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2_E
        mass += 1.0
    sums = tl.zeros([PAIRS, PADDED_VALUE_DIM], tl.float32)
    for start in range(part * part_width, tl.minimum(width, (part + 1) * part_width), KEYS):
        place = start + tl.arange(0, KEYS)
        inside = place < width
        # Beyond the width, position 0 is read, and gets no weight.
        position = tl.load(positions + place, mask=inside, other=0)
        if RUNS > 0:
            kept = tl.zeros([PAIRS, KEYS], tl.int1)
            for run in tl.static_range(RUNS):
                begin = tl.load(keep + 2 * run, mask=real, other=0).to(tl.int32)
                number = tl.load(keep + 2 * run + 1, mask=real, other=0).to(tl.int32) - begin
                # Without its sign, what lies before the run is a large number: one comparison says both.
                kept |= (place[None, :] - begin[:, None]).to(tl.uint32) < number.to(tl.uint32)[:, None]
        else:
            kept = tl.load(keep[:, None] + place[None, :], mask=real[:, None] & inside[None, :], other=0) != 0
        k = tl.load(key + position[:, None] * key_strides[2] + d[None, :], mask=d_real, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if softcap is not None:
            scores = capped(scores, softcap)
        scores = tl.where(kept, scores * LOG2_E, -float("inf"))
        weights, fade, highest, mass = fold(scores, highest, mass)
        v = tl.load(value + position[:, None] * value_strides[2] + dv[None, :], mask=dv_real, other=0.0)
        sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None], input_precision="ieee")

    if highest_out is None:
        sums = sums / tl.where(mass > 0, mass, 1.0)[:, None]
        place = (batch * q_len + query_index) * (kv_heads * share) + head
    else:
        row = (tl.program_id(1) * (tl.num_programs(0) // programs) + group).to(tl.int64)
        place = (row * pairs + pair) * parts + part
        tl.store(highest_out + place, highest, mask=real)
        tl.store(mass_out + place, mass, mask=real)
    tl.store(
        out + place[:, None] * VALUE_DIM + dv[None, :], sums.to(out.dtype.element_ty), mask=real[:, None] & dv_real
    )


@triton.jit
def _join_parts(
    sums,
    highest,
    mass,
    out,
    kv_heads,
    share,
    q_len,
    queries_per_group,
    parts,
    VALUE_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid: (pairs, groups, batch x kv_heads)."""
    pair, group = tl.program_id(0), tl.program_id(1)
    part = tl.arange(0, PARTS)
    real = part < parts
    dv = tl.arange(0, PADDED_VALUE_DIM)
    place = (tl.program_id(2) * tl.num_programs(1) + group).to(tl.int64) * tl.num_programs(0) + pair
    place = place * parts + part
    best = tl.load(highest + place, mask=real, other=LOWEST)
    fade = tl.exp2(best - tl.max(best, 0))
    total = tl.sum(tl.load(mass + place, mask=real, other=0.0) * fade, 0)
    own = tl.load(
        sums + place[:, None] * VALUE_DIM + dv[None, :], mask=real[:, None] & (dv < VALUE_DIM)[None, :], other=0.0
    )
    joined = tl.sum(own * fade[:, None], 0) / tl.where(total > 0, total, 1.0)
    own_head, query_index = _place(group, pair, share, q_len, queries_per_group)
    batch, kv_head = (tl.program_id(2) // kv_heads).to(tl.int64), tl.program_id(2) % kv_heads
    place = (batch * q_len + query_index) * (kv_heads * share) + kv_head * share + own_head
    tl.store(out + place * VALUE_DIM + dv, joined.to(out.dtype.element_ty), mask=dv < VALUE_DIM)
