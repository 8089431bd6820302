"""Attention of the members of a group to the columns of the group, which are gathered on the way into the tiles.

A program holds a tile of members (rows of all heads of a GQA group) and walks over the columns of their group: it
loads a tile of keys and values from where they lie, and folds it into a running softmax. Where there are too few tiles
of members to fill the GPU, as in decoding, several programs share the columns, and a second kernel joins their parts.
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
from hf_sparse.kernels.triton.common import LOG2_E, LOWEST, fold, on_its_device, parts_for

# Parts into which the columns of a group are cut at most: the second kernel holds all parts of a member at once.
_MOST_PARTS = 64


@on_its_device
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    allowed: Tensor,
    rows_per_group: int,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend to the columns that are allowed: `(batch, heads, rows, value_dim)` in the dtype of the values.

    Scores, softmax and sums are float32; the weights are rounded to the dtype of the values before they meet them.
    A member that is allowed nothing gets zeros. A kernel is compiled once for widths that are multiples of 16, which
    it reads `allowed` of 8 entries at a time, and once for all others.

    Args:
        query: `(batch, heads, rows, dim)`, in float32, float16 or bfloat16, like the keys and values.
        key: `(batch, kv_heads, kv_len, dim)`.
        value: `(batch, kv_heads, kv_len, value_dim)`.
        columns: `(batch, kv_heads, groups, width)`: the candidate keys of each group, as in `Selection`.
        allowed: bool `(batch, kv_heads, groups, members, width)`: which of them a member attends to.
        rows_per_group: Query rows in one group.
        scaling: Factor of the scores.
        softcap: Soft cap of the scores, or `None`.
        sinks: `(heads,)` logits without a value, or `None`.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, value_dim = value.shape[1], value.shape[3]
    groups, members, width = allowed.shape[2:]
    query, key, value, columns, allowed = (adjacent(x) for x in (query, key, value, columns, allowed.view(torch.uint8)))
    padded_dim, padded_value_dim = (max(16, triton.next_power_of_2(x)) for x in (dim, value_dim))
    tile_members, tile_columns, warps = _tiles(members, max(padded_dim, padded_value_dim), key.dtype)

    tiles = triton.cdiv(members, tile_members)
    steps = triton.cdiv(width, tile_columns)
    parts, steps_each = parts_for(
        query.device, tiles * groups * batch * kv_heads, steps, most=_MOST_PARTS, programs_each=2
    )

    out = value.new_empty(batch, heads, rows, value_dim)
    part_shape = (batch, kv_heads, groups, members, parts)
    sums = out if parts == 1 else value.new_empty(*part_shape, value_dim, dtype=torch.float32)
    highest, mass = (None, None) if parts == 1 else sums.new_empty(2, *part_shape)
    _attend_tile[tiles * parts, groups, batch * kv_heads](
        query,
        key,
        value,
        columns,
        allowed,
        sinks,
        sums,
        highest,
        mass,
        query.stride()[:3],
        key.stride()[:3],
        value.stride()[:3],
        columns.stride()[:3],
        allowed.stride()[:4],
        kv_heads,
        heads // kv_heads,
        rows,
        rows_per_group,
        members,
        width,
        parts,
        steps_each * tile_columns,
        scaling,
        softcap,
        DIM=dim,
        VALUE_DIM=value_dim,
        PADDED_DIM=padded_dim,
        PADDED_VALUE_DIM=padded_value_dim,
        MEMBERS=tile_members,
        COLUMNS=tile_columns,
        num_warps=warps,
        num_stages=3,
    )
    if parts > 1:
        _join_parts[members, groups, batch * kv_heads](
            sums,
            highest,
            mass,
            out,
            heads // kv_heads,
            rows,
            rows_per_group,
            parts,
            VALUE_DIM=value_dim,
            PADDED_VALUE_DIM=padded_value_dim,
            PARTS=triton.next_power_of_2(parts),
        )
    return out


def _tiles(members: int, dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Members and columns of a tile, and warps: counted for Hopper, not measured yet.

    For head_dim 128 in 16 bits, 128 members take 64 columns a step: two steps of keys and values are 64 KB of shared
    memory, the sums are 64 registers of a thread, and each gathered key meets as many members as fit without spills.
    Of 128 and 64 members, the number that leaves less of the last tile empty: 64 rows of 3 heads are 3 tiles of 64.
    Exact float32 products run outside the tensor cores, from more registers. All of it was compiled for compute
    capability 9.0: nothing but head_dim 256 in float32 takes more than 110 KB of shared memory.
    """
    columns = 64 if dim <= 128 else 32
    few = max(16, min(32, triton.next_power_of_2(members)))
    if dtype == torch.float32:
        return few, columns // 2, 4
    if members <= 32:
        return few, columns, 4
    if dim > 128:
        return 64, columns, 8
    return (128, columns, 8) if -(-members // 128) * 128 <= -(-members // 64) * 64 else (64, columns, 4)


@triton.jit
def _place(group, member, share, rows, rows_per_group):
    """Head within the GQA group, and row, of a member. Groups of one head are ordered by head, then row."""
    blocks = rows // rows_per_group
    heads_before = group // blocks
    return heads_before + member // rows_per_group, group % blocks * rows_per_group + member % rows_per_group


@triton.jit
def _attend_tile(
    query,
    key,
    value,
    columns,
    allowed,
    sinks,
    out,
    highest_out,
    mass_out,
    query_strides,
    key_strides,
    value_strides,
    columns_strides,
    allowed_strides,
    kv_heads,
    share,
    rows,
    rows_per_group,
    members,
    width,
    parts,
    part_width,
    scaling,
    softcap,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    MEMBERS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: (tiles of members x parts of the columns, groups, batch x kv_heads)."""
    group = tl.program_id(1)
    batch, kv_head = (tl.program_id(2) // kv_heads).to(tl.int64), (tl.program_id(2) % kv_heads).to(tl.int64)
    part = tl.program_id(0) % parts
    member = tl.program_id(0) // parts * MEMBERS + tl.arange(0, MEMBERS)
    real = member < members
    own_head, row = _place(group, member, share, rows, rows_per_group)
    head = kv_head * share + own_head
    d = tl.arange(0, PADDED_DIM)
    dv = tl.arange(0, PADDED_VALUE_DIM)
    # Masks that are the same for all lengths cost nothing where they are always true.
    d_real = d[None, :] < DIM
    dv_real = dv[None, :] < VALUE_DIM

    query_row = batch * query_strides[0] + head * query_strides[1] + row.to(tl.int64) * query_strides[2]
    q = tl.load(query + query_row[:, None] + d[None, :], mask=real[:, None] & d_real, other=0.0)
    key += batch * key_strides[0] + kv_head * key_strides[1]
    value += batch * value_strides[0] + kv_head * value_strides[1]
    columns += batch * columns_strides[0] + kv_head * columns_strides[1] + group * columns_strides[2]
    allowed += batch * allowed_strides[0] + kv_head * allowed_strides[1] + group.to(tl.int64) * allowed_strides[2]
    allowed_row = allowed + member.to(tl.int64)[:, None] * allowed_strides[3]
    highest = tl.full([MEMBERS], LOWEST, tl.float32)
    mass = tl.zeros([MEMBERS], tl.float32)
    if sinks is not None and part == 0:
        highest = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2_E
        mass += 1.0
    sums = tl.zeros([MEMBERS, PADDED_VALUE_DIM], tl.float32)
    for start in range(part * part_width, tl.minimum(width, (part + 1) * part_width), COLUMNS):
        place = start + tl.arange(0, COLUMNS)
        inside = place < width
        # Beyond the width, column 0 stands in: it exists, and gets no weight.
        column = tl.load(columns + place, mask=inside, other=0)
        keep = tl.load(allowed_row + place[None, :], mask=real[:, None] & inside[None, :], other=0)
        k = tl.load(key + column[:, None] * key_strides[2] + d[None, :], mask=d_real, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if softcap is not None:
            # tanh(x) = 1 - 2 / (1 + exp(2x))
            scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores / softcap * (2.0 * LOG2_E))))
        scores = tl.where(keep != 0, scores * LOG2_E, -float("inf"))
        weights, fade, highest, mass = fold(scores, highest, mass)
        v = tl.load(value + column[:, None] * value_strides[2] + dv[None, :], mask=dv_real, other=0.0)
        sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None], input_precision="ieee")

    if highest_out is None:
        sums = sums / tl.where(mass > 0, mass, 1.0)[:, None]
        place = (tl.program_id(2) * share + own_head).to(tl.int64) * rows + row
    else:
        place = ((tl.program_id(2) * tl.num_programs(1) + group).to(tl.int64) * members + member) * parts + part
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
    share,
    rows,
    rows_per_group,
    parts,
    VALUE_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid: (members, groups, batch x kv_heads)."""
    member, group = tl.program_id(0), tl.program_id(1)
    part = tl.arange(0, PARTS)
    real = part < parts
    dv = tl.arange(0, PADDED_VALUE_DIM)
    place = (tl.program_id(2) * tl.num_programs(1) + group).to(tl.int64) * tl.num_programs(0) + member
    place = place * parts + part
    best = tl.load(highest + place, mask=real, other=LOWEST)
    fade = tl.exp2(best - tl.max(best, 0))
    total = tl.sum(tl.load(mass + place, mask=real, other=0.0) * fade, 0)
    own = tl.load(
        sums + place[:, None] * VALUE_DIM + dv[None, :], mask=real[:, None] & (dv < VALUE_DIM)[None, :], other=0.0
    )
    joined = tl.sum(own * fade[:, None], 0) / tl.where(total > 0, total, 1.0)
    own_head, row = _place(group, member, share, rows, rows_per_group)
    place = (tl.program_id(2) * share + own_head).to(tl.int64) * rows + row
    tl.store(out + place * VALUE_DIM + dv, joined.to(out.dtype.element_ty), mask=dv < VALUE_DIM)
