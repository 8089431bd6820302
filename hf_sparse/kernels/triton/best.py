"""The most important past keys of each group: their list, and the runs of it that each pair keeps.

Counts of keys by the first 11 bits of their importance, which come with it, say which keys may be among the best; these
are listed in one walk over all keys, which several programs share where there are few groups, as in decoding. The one
of them that comes to its end last joins their lists. It counts the few keys that are listed further, by the next 10 and
the last 10 bits, which gives the least importance that is kept. Of equal keys, the most recent are kept.
Where some pairs of a group keep more than others, a second kernel puts the keys into order that not all of them keep.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.kernels.triton.common import on_its_device, parts_for
from hf_sparse.kernels.triton.importance import BINS, SHIFT, Groups
from hf_sparse.kernels.triton.spans import ranges_of, seen_by, spend

RUNS = 3
"""Runs of a list that a pair keeps: from its first key, up to its last, and of the past."""

# Keys that a program looks at together; the same where keys are put into order, and how many programs share those.
_TILE, _ORDER_TILE, _ORDER_PROGRAMS = 4096, 64, 32

# Most programs that share the walk over the keys of a group.
_MOST_SLICES = 64

_MANY = tl.constexpr(1 << 30)


@on_its_device
def best(
    values: Tensor, counts: Tensor, arrived: Tensor, groups: Groups, budgets: Tensor, past: int, *, differ: bool
) -> tuple[Tensor, Tensor]:
    """Lists of keys, and what the pairs keep of them.

    Args:
        values: From `hf_sparse.kernels.triton.importance`.
        counts: From the same.
        arrived: From the same: zeros, and zeros again when this is done.
        groups: The groups.
        budgets: int32 `(batch, heads, q_len)`.
        past: At least as many keys of the past as any pair keeps.
        differ: Whether pairs of a group may keep different numbers of them.

    Returns:
        Positions, int64 `(batch, kv_heads, groups, groups.near + past)`, of the first and local keys of each group and,
        from `groups.near` on, its most important keys of the past, the most important first so far as it matters;
        positions that may be read, but that no pair keeps, follow on both. Runs, int64 `(batch, kv_heads, groups,
        pairs, RUNS, 2)`.
    """
    batch, kv_heads, number, pairs = groups.shape
    device, rows = values.device, (batch, kv_heads, number)
    positions = torch.empty(*rows, groups.near + past, dtype=torch.int64, device=device)
    runs = torch.empty(*rows, pairs, RUNS, 2, dtype=torch.int64, device=device)
    listed = torch.empty_like(values)
    unordered = torch.empty(*rows, past, dtype=torch.int32, device=device) if differ else None
    bounds = torch.empty(*rows, 2, dtype=torch.int32, device=device) if differ else None
    width = values.shape[3]
    slices, tiles_each = parts_for(
        device, number * batch * kv_heads, triton.cdiv(width, _TILE), most=_MOST_SLICES, programs_each=2
    )
    slice_bits = (slices - 1).bit_length()
    ends = torch.empty(*rows, 1 << slice_bits, dtype=torch.int32, device=device)
    _best[slices, number, batch * kv_heads](
        values,
        counts,
        arrived,
        positions,
        runs,
        listed,
        listed if slices == 1 else torch.empty_like(values),
        ends,
        unordered,
        bounds,
        groups.intervals,
        budgets,
        groups.intervals.stride()[:3],
        budgets.stride(),
        kv_heads,
        pairs,
        groups.size,
        groups.sink_keys,
        groups.recent_keys,
        groups.base,
        width,
        groups.near,
        past,
        tiles_each * _TILE,
        SLICE_BITS=slice_bits,
        SIZE=groups.padded_size,
        TILE=_TILE,
        BINS=BINS,
        SHIFT=SHIFT,
        num_warps=16,
    )
    if unordered is not None:
        programs = min(_ORDER_PROGRAMS, triton.cdiv(past, _ORDER_TILE))
        _order[programs, number, batch * kv_heads](
            values,
            positions,
            unordered,
            bounds,
            groups.base,
            width,
            groups.near,
            past,
            TILE=_ORDER_TILE,
            num_warps=8,
        )
    return positions, runs


@triton.jit
def _bin_of(counts, wanted, BINS: tl.constexpr):
    """The bin of the `wanted`-th key from the top, and how many keys are in higher ones."""
    own = tl.sum((tl.cumsum(counts, 0, reverse=True) >= wanted).to(tl.int32), 0) - 1
    return own, tl.sum(tl.where(tl.arange(0, BINS) > own, counts, 0), 0)


@triton.jit
def _load_listed(values, listed, at, number, TILE: tl.constexpr):
    """Some of the listed keys: their places among all, the bits of their importance, and whether they exist."""
    i = at + tl.arange(0, TILE)
    inside = i < number
    place = tl.load(listed + i, mask=inside, other=0)
    return place, tl.load(values + place, mask=inside, other=-1), inside


@triton.jit
def _count(values, listed, number, prefix, TILE: tl.constexpr, SHIFT: tl.constexpr):
    """Of the listed keys whose bits before the last `SHIFT` + 10 are `prefix`, how many have which 10 bits next."""
    counts = tl.zeros([1024], tl.int32)
    for at in range(0, number, TILE):
        _, bits, inside = _load_listed(values, listed, at, number, TILE)
        own = inside & ((bits >> (SHIFT + 10)) == prefix)
        counts += tl.histogram((bits >> SHIFT) & 1023, 1024, mask=own)
    return counts


@triton.jit
def _least(values, listed, number, prefix, wanted, TILE: tl.constexpr):
    """The bits of the `wanted`-th key of those with the first bits `prefix`, and how many such keys come too late."""
    counts = _count(values, listed, number, prefix, TILE, 10)
    own, above = _bin_of(counts, wanted, 1024)
    wanted -= above
    prefix = prefix * 1024 + own
    counts = _count(values, listed, number, prefix, TILE, 0)
    own, above = _bin_of(counts, wanted, 1024)
    equal = tl.sum(tl.where(tl.arange(0, 1024) == own, counts, 0), 0)
    return prefix * 1024 + own, equal - (wanted - above)


@triton.jit
def _among_best(bits, inside, least, late, seen):
    """Whether keys are among the best, and how many that are just good enough were seen so far."""
    equal = inside & (bits == least)
    before = seen + tl.cumsum(equal.to(tl.int32), 0)
    return inside & ((bits > least) | (equal & (before > late))), seen + tl.sum(equal.to(tl.int32), 0)


@triton.jit
def _append(to, x, taken, number):
    """Write what is taken behind the first `number` entries, and how many there are then."""
    place = number + tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(to + place, x, mask=taken)
    return number + tl.sum(taken.to(tl.int32), 0)


@triton.jit
def _joined(listed, joined, ends, slice_width, TILE: tl.constexpr, SLICE_BITS: tl.constexpr):
    """Join the lists of all slices in their order, and say how many keys there are.

    `ends` holds how many keys a slice has listed, and then how many it and those before it have.
    """
    each = tl.arange(0, 1 << SLICE_BITS)
    found = tl.load(ends + each, mask=each < tl.num_programs(0), other=0)
    number = tl.sum(found, 0)
    tl.debug_barrier()
    tl.store(ends + each, tl.cumsum(found, 0))
    tl.debug_barrier()
    for at in range(0, number, TILE):
        i = at + tl.arange(0, TILE)
        inside = i < number
        # By bisection: the first slice that does not end before.
        own = tl.zeros([TILE], tl.int32)
        for bit in tl.static_range(SLICE_BITS):
            step = 1 << (SLICE_BITS - 1 - bit)
            own += tl.where(tl.load(ends + own + step - 1) <= i, step, 0)
        start = tl.load(ends + own - 1, mask=own > 0, other=0)
        place = tl.load(listed + own * slice_width + i - start, mask=inside, other=0)
        tl.store(joined + i, place, mask=inside)
    tl.debug_barrier()
    return number


@triton.jit
def _best(
    values,
    counts,
    arrived,
    positions,
    runs,
    listed,
    joined,
    ends,
    unordered,
    bounds,
    intervals,
    budgets,
    interval_strides,
    budget_strides,
    kv_heads,
    pairs,
    size,
    sink_keys,
    recent_keys,
    base,
    width,
    near_width,
    past_width,
    slice_width,
    SLICE_BITS: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Grid: (slices of the keys, groups, batch x kv_heads)."""
    own_slice, group = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (tl.program_id(2) // kv_heads).to(tl.int64), (tl.program_id(2) % kv_heads).to(tl.int64)
    row = (tl.program_id(2) * tl.num_programs(1) + group).to(tl.int64)
    values += row * width
    listed += row * width
    joined += row * width
    ends += row << SLICE_BITS
    positions += row * (near_width + past_width)
    oldest, past_start, past_stop, last_stop = ranges_of(
        intervals, interval_strides, batch, group, size, sink_keys, recent_keys, SIZE
    )
    past = past_stop - past_start

    query = tl.arange(0, SIZE)
    real = query < size
    writes = query < tl.where(own_slice == 0, size, 0)
    first, stop = seen_by(intervals, interval_strides, batch, group * size + query, real)
    alive = stop > first
    share = pairs // size
    most, least = 0, _MANY
    for own_head in range(share):
        at = batch * budget_strides[0] + (kv_head * share + own_head) * budget_strides[1]
        budget = tl.load(budgets + at + (group * size + query) * budget_strides[2], mask=real, other=0)
        first_stop, last_start, ranked = spend(first, stop, budget, past_start, past_stop, sink_keys, recent_keys)
        pair = row * pairs + own_head * size + query
        begin = first - oldest
        end = last_start - oldest - tl.where(last_start >= past_stop, past, 0)
        run = runs + pair * 6
        tl.store(run, tl.where(alive, begin, 0), mask=writes)
        tl.store(run + 1, tl.where(alive, begin + first_stop - first, 0), mask=writes)
        tl.store(run + 2, tl.where(alive, end, 0), mask=writes)
        tl.store(run + 3, tl.where(alive, end + stop - last_start, 0), mask=writes)
        tl.store(run + 4, tl.where(alive, near_width, 0), mask=writes)
        tl.store(run + 5, tl.where(alive, near_width + ranked, 0), mask=writes)
        most = tl.maximum(most, tl.max(ranked, 0))
        least = tl.minimum(least, tl.min(tl.where(ranked > 0, ranked, _MANY), 0))

    if own_slice == 0:
        for at in range(0, near_width, TILE):
            place = at + tl.arange(0, TILE)
            position = oldest + place
            position += tl.where(position >= past_start, past, 0)
            tl.store(positions + place, tl.where(position < last_stop, position, 0), mask=place < near_width)
        for at in range(most // TILE * TILE, past_width, TILE):
            place = at + tl.arange(0, TILE)
            mask = (place >= most) & (place < past_width)
            tl.store(positions + near_width + place, tl.zeros([TILE], tl.int64), mask=mask)
        if unordered is not None:
            tl.store(bounds + row * 2, tl.minimum(least, most))
            tl.store(bounds + row * 2 + 1, most)
    positions += near_width
    if unordered is not None:
        unordered += row * past_width

    own_counts = tl.load(counts + row * BINS + tl.arange(0, BINS))
    lowest, above = _bin_of(own_counts, most, BINS)
    number = 0
    if most > 0:
        start = own_slice * slice_width
        for at in range(start, tl.minimum(start + slice_width, past_stop - base), TILE):
            place = at + tl.arange(0, TILE)
            # Whole tiles are read, whatever part of them is of the past.
            bits = tl.load(values + place, mask=place < width, other=-1)
            inside = (place >= past_start - base) & (place < past_stop - base)
            number = _append(listed + start, place, inside & ((bits >> SHIFT) >= lowest), number)
    # What other threads of the program wrote is read from here on, or by another program.
    tl.debug_barrier()
    is_last = most > 0
    if SLICE_BITS > 0:
        tl.store(ends + own_slice, number)
        tl.debug_barrier()
        ends_last = tl.atomic_add(arrived + row, 1, sem="acq_rel") == tl.num_programs(0) - 1
        if ends_last:
            tl.store(arrived + row, 0)
        is_last &= ends_last
    if is_last:
        if SLICE_BITS > 0:
            number = _joined(listed, joined, ends, slice_width, TILE, SLICE_BITS)
        last, late = _least(values, joined, number, lowest, most - above, TILE)
        taken, seen = 0, 0
        if unordered is None:
            for at in range(0, number, TILE):
                place, bits, inside = _load_listed(values, joined, at, number, TILE)
                good, seen = _among_best(bits, inside, last, late, seen)
                taken = _append(positions, (base + place).to(tl.int64), good, taken)
        else:
            highest, above = _bin_of(own_counts, least, BINS)
            sure, sure_late = _least(values, joined, number, highest, least - above, TILE)
            sure_seen, others = 0, 0
            for at in range(0, number, TILE):
                place, bits, inside = _load_listed(values, joined, at, number, TILE)
                good, seen = _among_best(bits, inside, last, late, seen)
                best_of_all, sure_seen = _among_best(bits, inside, sure, sure_late, sure_seen)
                taken = _append(positions, (base + place).to(tl.int64), best_of_all, taken)
                others = _append(unordered, place, good & (best_of_all == 0), others)


@triton.jit
def _load_ranks(values, unordered, at, number, TILE: tl.constexpr):
    """Numbers in the order in which keys are kept: by their importance, and where it is equal by their place."""
    i = at + tl.arange(0, TILE)
    place = tl.load(unordered + i, mask=i < number, other=0)
    bits = tl.load(values + place, mask=i < number, other=-1)
    return place, (bits.to(tl.int64) << 32) | place.to(tl.int64)


@triton.jit
def _order(values, positions, unordered, bounds, base, width, near_width, past_width, TILE: tl.constexpr):
    """Keys that not all pairs keep, each in the place that is the number of better ones.

    Grid: (programs that share them, groups, batch x kv_heads).
    """
    row = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    least, most = tl.load(bounds + row * 2), tl.load(bounds + row * 2 + 1)
    values += row * width
    unordered += row * past_width
    positions += row * (near_width + past_width) + near_width + least
    number = most - least
    for at in range(tl.program_id(0) * TILE, number, tl.num_programs(0) * TILE):
        place, own = _load_ranks(values, unordered, at, number, TILE)
        better = tl.zeros([TILE], tl.int32)
        for start in range(0, number, TILE):
            _, others = _load_ranks(values, unordered, start, number, TILE)
            better += tl.sum((others[None, :] > own[:, None]).to(tl.int32), 1)
        tl.store(positions + better, (base + place).to(tl.int64), mask=at + tl.arange(0, TILE) < number)
