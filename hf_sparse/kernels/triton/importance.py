"""The importance of the past keys of each group, as `hf_sparse.selectors.importance` has it, with the same numbers.

One kernel rounds the queries and, in decoding, the new key, and finds what the weights of each (query, head) pair are
relative to, from the keys that are looked at for the estimate: where there are few pairs, as in decoding, several
programs share those keys. Another holds a tile of keys, walks over the pairs of the groups, and sums their weights.
Each of its scores is computed once, and nothing of size q_len x kv_len is stored.

Importance is never negative: as integers, its bits have the same order. While a tile is at hand, its keys are counted
by the first bits of their importance, for `hf_sparse.kernels.triton.best`.

The tiles are counted for Hopper, not measured yet.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.kernels.layout import adjacent
from hf_sparse.kernels.triton.codes import (
    QUERY_MOST,
    block_of,
    correction,
    half_of,
    load_codes,
    mixed,
    padded_half,
    rounded,
    write_keys,
)
from hf_sparse.kernels.triton.common import LOG2_E, LOWEST, capped, on_its_device, parts_for
from hf_sparse.kernels.triton.spans import ranges_of, seen_by

BINS, SHIFT = 2048, 20
"""Keys are counted by the first 11 bits of their importance after the sign."""

# Most parts of the keys that are looked at: the second kernel holds all parts of a tile of pairs at once.
_MOST_PARTS = 64

_UNIT, _BIAS = tl.constexpr(2.0**23), tl.constexpr(127.0)


@dataclass(frozen=True)
class Groups:
    """Groups of queries, and the keys that they see.

    Attributes:
        query: `(batch, heads, q_len, head_dim)`, floating point.
        scaling: Factor of the scores.
        softcap: Soft cap of the scores, or `None`.
        intervals: int32 `(batch, 1, q_len, 2)`: the first key that a query sees, and the key after its last one.
        codes: uint8 `(batch, kv_heads, room, half)`, keys in 4 bits.
        scales: float32 `(batch, kv_heads, room)`.
        size: Queries of a group; divides `q_len`.
        sink_keys: First keys that every pair keeps.
        recent_keys: Most recent keys that every pair keeps.
        base: No query sees a key before this position.
        stop: No query sees a key from this position on.
        near: At least as many first and local keys as any group has.
        fresh: `(batch, kv_heads, kv_len, head_dim)`, in decoding: keys, of which `codes` and `scales` get the last one
            that each sequence sees. `None` if they hold it already.
        center: float32 `(batch, kv_heads, head_dim)`: what is subtracted from the last one.
    """

    query: Tensor
    scaling: float
    softcap: float | None
    intervals: Tensor
    codes: Tensor
    scales: Tensor
    size: int
    sink_keys: int
    recent_keys: int
    base: int
    stop: int
    near: int
    fresh: Tensor | None = None
    center: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Sequences, key heads, groups, and pairs of a group."""
        batch, heads, queries, _ = self.query.shape
        kv_heads = self.codes.shape[1]
        return batch, kv_heads, queries // self.size, heads // kv_heads * self.size

    @property
    def padded_size(self) -> int:
        """`size`, or the next power of two."""
        return int(triton.next_power_of_2(self.size))


@on_its_device
def importance(query: Tensor, groups: Groups, window: int, period: int) -> tuple[Tensor, Tensor, Tensor]:
    """The importance of the keys of the past.

    Sizes and grids follow from `groups.base`, `groups.stop` and `groups.near` alone: what queries see is read from
    `groups.intervals` by the kernels.

    Args:
        query: `groups.query`.
        groups: The groups.
        window: Neighbouring keys that are looked at for the estimate, a power of two.
        period: In so many keys.

    Returns:
        The bits of float32 numbers, int32 `(batch, kv_heads, groups, keys)`, for the keys from `groups.base` on: not
        written for keys that are not of the past of a group. And of the keys that are, how many have those first bits:
        int32 `(batch, kv_heads, groups, BINS)`. And zeros, int32 `(batch, kv_heads, groups)`.
    """
    batch, kv_heads, number, pairs = groups.shape
    dim = query.shape[3]
    query, device = adjacent(query), query.device
    half, rows = half_of(dim), (batch, kv_heads, number)
    tile_pairs = max(16, min(64 if half <= 64 else 32, triton.next_power_of_2(pairs)))
    tiles = triton.cdiv(pairs, tile_pairs)
    steps = triton.cdiv(groups.near, window) + triton.cdiv(groups.stop - groups.base, period)
    programs = tiles * number * batch * kv_heads
    parts, _ = parts_for(device, programs, steps, most=_MOST_PARTS, programs_each=2)
    codes = torch.empty(*rows, pairs, 2, half, dtype=torch.int8, device=device)
    query_scales = torch.empty(*rows, pairs, dtype=torch.float32, device=device)
    totals = torch.empty(2, *rows, pairs, parts, dtype=torch.float32, device=device)
    counts = torch.empty(*rows, BINS, dtype=torch.int32, device=device)
    arrived = torch.empty(*rows, dtype=torch.int32, device=device)
    layout = (
        groups.intervals,
        groups.codes,
        groups.scales,
        codes,
        query_scales,
        totals,
        counts,
        groups.intervals.stride()[:3],
        groups.codes.stride()[:3],
        groups.scales.stride()[:2],
        kv_heads,
        number,
        groups.size,
        pairs,
        parts,
        groups.sink_keys,
        groups.recent_keys,
        None if groups.softcap is None else groups.softcap * LOG2_E.value,
    )
    sizes = {
        "HALF": half,
        "PADDED_HALF": padded_half(dim),
        "SIZE": groups.padded_size,
        "PAIRS": tile_pairs,
        "BINS": BINS,
    }
    _totals[tiles * parts, number, batch * kv_heads](
        query,
        query.stride()[:3],
        groups.scaling,
        groups.fresh,
        None if groups.fresh is None else groups.fresh.stride()[:3],
        None if groups.center is None else groups.center.contiguous(),
        arrived,
        *layout,
        DIM=dim,
        BLOCK=block_of(dim),
        WINDOW=window,
        PERIOD=period,
        **sizes,
        num_warps=4 if tile_pairs == 16 else 8,
    )
    width = -(-(groups.stop - groups.base) // 16) * 16
    values = torch.empty(*rows, width, dtype=torch.int32, device=device)
    tile = 128 if tile_pairs == 16 or padded_half(dim) > 64 else 256
    programs = triton.cdiv(width, tile) * batch * kv_heads
    chunks, each = parts_for(device, programs, number, most=number, programs_each=8)
    _sum_weights[chunks, triton.cdiv(width, tile), batch * kv_heads](
        values,
        width,
        groups.base,
        groups.stop,
        each,
        *layout,
        KEYS=tile,
        PARTS=triton.next_power_of_2(parts),
        SHIFT=SHIFT,
        **sizes,
        num_warps=4 if tile_pairs == 16 else 8,
    )
    return values, counts, arrived


@triton.jit
def _rough_exp2(x):
    """2^x with an error of up to 6 %, by its bits as a float32 (Schraudolph, 1999); 0 for what is no number."""
    return tl.maximum((x + _BIAS) * _UNIT, 0.0).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _totals(
    query,
    query_strides,
    scaling,
    fresh,
    fresh_strides,
    center,
    arrived,
    intervals,
    codes,
    scales,
    query_codes,
    query_scales,
    totals,
    counts,
    interval_strides,
    code_strides,
    scale_strides,
    kv_heads,
    groups,
    size,
    pairs,
    parts,
    sink_keys,
    recent_keys,
    softcap,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    SIZE: tl.constexpr,
    PAIRS: tl.constexpr,
    WINDOW: tl.constexpr,
    PERIOD: tl.constexpr,
    BINS: tl.constexpr,
):
    """Rounded queries, and sums of weights over a part of the keys that are looked at.

    A sum is relative to a power of two, so that rough exponentials change nothing but by that factor with it.

    Grid: (tiles of pairs x parts, groups, batch x kv_heads).
    """
    batch, kv_head = (tl.program_id(2) // kv_heads).to(tl.int64), (tl.program_id(2) % kv_heads).to(tl.int64)
    group = tl.program_id(1)
    row = (tl.program_id(2) * groups + group).to(tl.int64)
    part = tl.program_id(0) % parts
    pair = tl.program_id(0) // parts * PAIRS + tl.arange(0, PAIRS)
    real = pair < pairs
    index = group * size + pair % size
    head = kv_head * (pairs // size) + pair // size

    d = tl.arange(0, PADDED_HALF)
    at = query + batch * query_strides[0] + head * query_strides[1] + index.to(tl.int64) * query_strides[2]
    at = at[:, None] + d[None, :]
    low = tl.load(at, mask=real[:, None] & (d < HALF)[None, :], other=0.0).to(tl.float32) * scaling
    high = tl.load(at + HALF, mask=real[:, None] & (HALF + d < DIM)[None, :], other=0.0).to(tl.float32) * scaling
    low, high = mixed(low, high, PAIRS, PADDED_HALF, BLOCK)
    low, high, scale = rounded(low, high, QUERY_MOST)
    # Products of transforms are that much larger.
    low, high, scale = low.to(tl.int8), high.to(tl.int8), scale * (LOG2_E / (2 * BLOCK))
    place = row * pairs + pair
    step = tl.num_programs(2).to(tl.int64) * groups * pairs * parts
    if part == 0:
        mask = real[:, None] & (d < HALF)[None, :]
        tl.store(query_codes + place[:, None] * (2 * HALF) + d[None, :], low, mask=mask)
        tl.store(query_codes + place[:, None] * (2 * HALF) + HALF + d[None, :], high, mask=mask)
        tl.store(query_scales + place, scale, mask=real)
        if tl.program_id(0) == 0:
            tl.store(counts + row * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
            tl.store(arrived + row, 0)

    first, stop = seen_by(intervals, interval_strides, batch, index, real)
    oldest, past_start, past_stop, last_stop = ranges_of(
        intervals, interval_strides, batch, group, size, sink_keys, recent_keys, SIZE
    )
    past = past_stop - past_start
    near = past_start - oldest + last_stop - past_stop
    near_tiles = tl.cdiv(near, WINDOW)
    period = tl.where(past > PERIOD, PERIOD, WINDOW)
    looked_at = tl.where(past > PERIOD, past // PERIOD * WINDOW + tl.minimum(past % PERIOD, WINDOW), past)
    past_weight = tl.div_rn(past.to(tl.float32), tl.maximum(looked_at, 1).to(tl.float32))

    codes += batch * code_strides[0] + kv_head * code_strides[1]
    scales += batch * scale_strides[0] + kv_head * scale_strides[1]
    if fresh is not None:  # noqa: SIM102 - known when the kernel is compiled, the other is not
        # By the programs that look at it: local keys come last of those that are near.
        if (near_tiles - 1) % parts == part:
            fresh += batch * fresh_strides[0] + kv_head * fresh_strides[1]
            center += (batch * kv_heads + kv_head) * DIM
            newest = (last_stop - 1 + tl.arange(0, 1)).to(tl.int64)
            write_keys(
                fresh,
                center,
                codes,
                scales,
                newest,
                newest >= 0,
                fresh_strides[2],
                code_strides[2],
                DIM,
                HALF,
                PADDED_HALF,
                BLOCK,
                1,
            )
            # What other threads of the program wrote is read from here on.
            tl.debug_barrier()
    offset = correction(low, high)
    highest = tl.full([PAIRS], LOWEST, tl.float32)
    mass = tl.zeros([PAIRS], tl.float32)
    for tile in range(part, near_tiles + tl.cdiv(past, period), parts):
        is_near = tile < near_tiles
        i = tl.arange(0, WINDOW)
        near_place = tile * WINDOW + i
        near_position = oldest + near_place
        near_position += tl.where(near_position >= past_start, past, 0)
        past_position = past_start + (tile - near_tiles) * period + i
        position = tl.where(is_near, near_position, past_position)
        inside = tl.where(is_near, near_place < near, past_position < past_stop)
        key_low, key_high = load_codes(codes, position, inside, code_strides[2], HALF, PADDED_HALF)
        products = tl.dot(low, tl.trans(key_low), out_dtype=tl.int32)
        products = tl.dot(high, tl.trans(key_high), products, out_dtype=tl.int32) + offset[:, None]
        key_scale = tl.load(scales + position, mask=inside, other=0.0)
        scores = products.to(tl.float32) * key_scale[None, :] * scale[:, None]
        if softcap is not None:
            scores = capped(scores, softcap)
        seen = inside[None, :] & (position[None, :] >= first[:, None]) & (position[None, :] < stop[:, None])
        scores = tl.where(seen, scores, LOWEST)
        before = highest
        highest = tl.maximum(before, tl.ceil(tl.max(scores, 1)))
        weights = tl.where(seen, _rough_exp2(scores - highest[:, None]), 0.0)
        mass = mass * tl.exp2(before - highest) + tl.sum(weights, 1) * tl.where(is_near, 1.0, past_weight)
    place = place * parts + part
    tl.store(totals + place, highest, mask=real)
    tl.store(totals + step + place, mass, mask=real)


@triton.jit(do_not_specialize=["base", "stop", "groups_each"])
def _sum_weights(
    values,
    width,
    base,
    stop,
    groups_each,
    intervals,
    codes,
    scales,
    query_codes,
    query_scales,
    totals,
    counts,
    interval_strides,
    code_strides,
    scale_strides,
    kv_heads,
    groups,
    size,
    pairs,
    parts,
    sink_keys,
    recent_keys,
    softcap,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    SIZE: tl.constexpr,
    PAIRS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    BINS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Grid: (chunks of groups, tiles of keys, batch x kv_heads)."""
    batch, kv_head = (tl.program_id(2) // kv_heads).to(tl.int64), (tl.program_id(2) % kv_heads).to(tl.int64)
    start = base + tl.program_id(1) * KEYS
    position = start + tl.arange(0, KEYS)
    written = position < stop
    if SIZE == 1:
        # Of the one group of a decoded token, no key beyond its past is read.
        _, past_start, past_stop, _ = ranges_of(
            intervals, interval_strides, batch, 0, size, sink_keys, recent_keys, SIZE
        )
        written = (position >= past_start) & (position < past_stop)
    codes += batch * code_strides[0] + kv_head * code_strides[1]
    low, high = load_codes(codes, position, written, code_strides[2], HALF, PADDED_HALF)
    scales += batch * scale_strides[0] + kv_head * scale_strides[1]
    key_scale = tl.load(scales + position, mask=written, other=0.0)
    d, part = tl.arange(0, PADDED_HALF), tl.arange(0, PARTS)
    step = tl.num_programs(2).to(tl.int64) * groups * pairs * parts
    from_group = tl.program_id(0) * groups_each
    for group in range(from_group, tl.minimum(groups, from_group + groups_each)):
        _, past_start, past_stop, _ = ranges_of(
            intervals, interval_strides, batch, group, size, sink_keys, recent_keys, SIZE
        )
        if (start < past_stop) & (start + KEYS > past_start):
            row = (tl.program_id(2) * groups + group).to(tl.int64)
            sums = tl.zeros([KEYS], tl.float32)
            for at in range(0, pairs, PAIRS):
                pair = at + tl.arange(0, PAIRS)
                real = pair < pairs
                place = row * pairs + pair
                mask = real[:, None] & (d < HALF)[None, :]
                query_low = tl.load(query_codes + place[:, None] * (2 * HALF) + d[None, :], mask=mask, other=0)
                query_high = tl.load(query_codes + place[:, None] * (2 * HALF) + HALF + d[None, :], mask=mask, other=0)
                scale = tl.load(query_scales + place, mask=real, other=0.0)
                mask = real[:, None] & (part < parts)[None, :]
                own = place[:, None] * parts + part[None, :]
                powers = tl.load(totals + own, mask=mask, other=LOWEST)
                masses = tl.load(totals + step + own, mask=mask, other=0.0)
                highest = tl.max(powers, 1)
                mass = tl.sum(masses * tl.exp2(powers - highest[:, None]), 1)
                # A pair that sees nothing has no mass, and no weight.
                alive = mass > 0
                least = tl.where(alive, (_BIAS - highest - tl.log2(tl.where(alive, mass, 1.0))) * _UNIT, 0.0)
                scale = tl.where(alive, scale, 0.0)
                # Keys come first, so that a thread adds up most of the weights of a key by itself.
                products = tl.dot(low, tl.trans(query_low), out_dtype=tl.int32)
                products = tl.dot(high, tl.trans(query_high), products, out_dtype=tl.int32)
                offset = correction(query_low, query_high)
                scores = (products + offset[None, :]).to(tl.float32) * key_scale[:, None]
                if softcap is not None:
                    scores = capped(scores * scale[None, :], softcap) * _UNIT + least[None, :]
                else:
                    scores = scores * (scale * _UNIT)[None, :] + least[None, :]
                # Rough exponentials, of at most 1: see `_rough_exp2`. What is no number gives 0.
                bits = tl.minimum(tl.maximum(scores, 0.0), _BIAS * _UNIT).to(tl.int32)
                sums += tl.sum(bits.to(tl.float32, bitcast=True), 1)
            bits = sums.to(tl.int32, bitcast=True)
            inside = (position >= past_start) & (position < past_stop)
            tl.store(values + row * width + position - base, bits, mask=inside)
            tl.atomic_add(counts + row * BINS + (bits >> SHIFT), 1, mask=inside, sem="relaxed")
