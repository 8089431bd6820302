"""The engine on PyTorch's FlexAttention: one fused, compiled kernel that skips tiles of keys that no row keeps.

A group is one attention problem: its members are the rows, its candidate keys, copied side by side, are the keys. Of
each tile of rows x keys, FlexAttention skips what no member is allowed, computes what all are allowed without a look
at the mask, and looks up each pair in the rest.

It is made for selections in which neighbours agree: in a window, most tiles are skipped or full. Where each member
picks its own keys out of the pool of its group, every tile is computed and masked, which is no less work than
`gather` has; a group of one row (`topk`) leaves a kernel for tiles nothing to share. The first call of a process
compiles for 5 to 20 seconds, once for all lengths and batch sizes.
"""

from __future__ import annotations

import os
import shutil
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hf_sparse.selection import AttentionInputs, Selection, take_rows

# Rows and keys of a tile.
_TILE = 128

# Pairs of members and candidate keys that are attended to at a time, one byte each; a multiple of `_TILE`.
_PAIRS = 1 << 24

# Kernels compiled in one process at most: one for each dtype, head size and kind of score. PyTorch stops at 8.
_KERNELS = 64

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Eight bytes, each of them True.
_ALL = 0x0101010101010101


def attend(inputs: AttentionInputs, selection: Selection) -> Tensor:
    """Attend through FlexAttention: `(batch, heads, rows, value_dim)`.

    Memory grows with rows x kept keys, never with rows x kv_len; groups are taken many at a time.

    Raises:
        TypeError: For a dtype other than float32, bfloat16 and float16.
        ValueError: If attention weights are to be dropped, which FlexAttention cannot.
        RuntimeError: If gradients are wanted on a CPU, or there is no compiler.
    """
    _check(inputs)
    heads = inputs.query.shape[1]
    kv_heads = inputs.key.shape[1]
    query = selection.members_of(inputs.query, kv_heads)
    batch, _, groups, members, _ = query.shape
    sinks = None
    if inputs.sinks is not None:
        rows = inputs.query.shape[2]
        sinks = selection.members_of(inputs.sinks.view(1, heads, 1, 1).expand(batch, -1, rows, -1), kv_heads)

    # Whole tiles of candidates, with room for a sink. What is added is allowed to nobody.
    width = selection.columns.shape[-1]
    added = -(width + (sinks is not None)) % _TILE + (sinks is not None)
    columns = F.pad(selection.columns, (0, added))
    pairs = members * (width + added)
    step = max(1, _PAIRS // (batch * kv_heads * pairs))
    # Heads of a group stay apart where one head fills tiles of rows: their windows are alike, those of far rows not.
    split = selection.rows_per_group if selection.rows_per_group >= _TILE else members
    parts = []
    for start in range(0, groups, step):
        part = slice(start, start + step)
        out = _attend_groups(
            query[:, :, part].reshape(-1, members // split, split, query.shape[-1]),
            take_rows(inputs.key, columns[:, :, part]).flatten(0, 2)[:, None],
            take_rows(inputs.value, columns[:, :, part]).flatten(0, 2)[:, None],
            selection.allowed[:, :, part].reshape(-1, members // split, split, width),
            None if sinks is None else sinks[:, :, part].flatten(),
            inputs,
        )
        parts.append(out.view(batch, kv_heads, -1, members, out.shape[-1]))
    return selection.rows_of(torch.cat(parts, dim=2), heads)


def _attend_groups(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, sinks: Tensor | None, inputs: AttentionInputs
) -> Tensor:
    """Attend in each group on its own: `(groups, heads, rows, value_dim)`.

    Args:
        query: `(groups, heads, rows, head_dim)`.
        key: `(groups, 1, width, head_dim)`, a whole number of tiles; the last one is left out where there are sinks.
        value: `(groups, 1, width, value_dim)`.
        allowed: bool `(groups, heads, rows, width or less)`.
        sinks: `(groups * heads * rows)`, or `None`.
        inputs: For `scaling` and `softcap`.
    """
    groups, heads, rows, _ = query.shape
    # A second row where there is one: a kernel compiled for one row would serve no other number.
    query = F.pad(query, (0, 0, 0, 1 if rows == 1 else 0))
    padded, width = query.shape[2], key.shape[2]
    pairs = groups * heads * padded * width
    # A table of fixed size: sizes that change from call to call break the code generated for a mask on a CPU.
    table = torch.empty(max(_PAIRS, 1 << (pairs - 1).bit_length()), dtype=torch.bool, device=key.device)
    mask = table[:pairs].view(groups, heads, padded, width)
    kept = allowed.shape[-1]
    mask[..., :rows, :kept] = allowed
    mask[..., :rows, kept:] = False
    mask[..., rows:, :] = False
    extra = None
    if sinks is not None:
        mask[..., -1] = True
        value[..., -1, :] = 0
        extra = F.pad(sinks.float(), (0, table.shape[0] // _TILE - sinks.shape[0]))
        torch._dynamo.mark_static(extra)
    torch._dynamo.mark_static(table)
    tiles = _tiles(mask)
    for states in (query, key, value, *tiles):
        torch._dynamo.maybe_mark_dynamic(states, (0, 2, 3) if states.dim() == 4 and states.dtype == torch.int32 else (0, 2))
    numbers = torch.tensor([inputs.scaling, inputs.softcap or 1.0], device=key.device)
    sizes = torch.tensor([heads, padded, width], device=key.device)
    capped = inputs.softcap is not None
    with torch._dynamo.config.patch(recompile_limit=_KERNELS):
        out = _compiled()(query.contiguous(), key, value, table, extra, tiles, numbers, sizes, capped)
    return out[:, :, :rows]


def _tiles(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tiles of a mask `(..., rows, width)` that are cut by it and those that are full, as `BlockMask` takes them.

    Returns:
        For both: how many there are, int32 `(..., row_tiles)`, and which, int32 `(..., row_tiles, key_tiles)`.
    """
    # Eight pairs at a time: bool read as int64 is largest where all are True and 0 where none is.
    words = mask.view(torch.int64).unflatten(-1, (-1, _TILE // 8))
    least, most = words.aminmax(dim=-1)
    more = -mask.shape[-2] % _TILE
    least = F.pad(least, (0, 0, 0, more), value=_ALL).unflatten(-2, (-1, _TILE)).amin(-2)
    most = F.pad(most, (0, 0, 0, more)).unflatten(-2, (-1, _TILE)).amax(-2)
    full = least == _ALL
    cut = ~full & (most > 0)
    return (*_ordered(cut), *_ordered(full))


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.to(torch.int32)


@cache
def _compiled() -> Any:
    return torch.compile(_kernel, fullgraph=True)


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    sinks: Tensor | None,
    tiles: tuple[Tensor, Tensor, Tensor, Tensor],
    numbers: Tensor,
    sizes: Tensor,
    capped: bool,
) -> Tensor:
    """FlexAttention over tiles; all that changes from call to call is in tensors."""

    def mask_mod(group: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return table[((group * sizes[0] + head) * sizes[1] + row) * sizes[2] + column]

    def score_mod(score: Tensor, group: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        score = score * numbers[0]
        if capped:
            score = numbers[1] * torch.tanh(score / numbers[1])
        if sinks is not None:
            sink = sinks[(group * sizes[0] + head) * sizes[1] + row]
            score = torch.where(column == sizes[2] - 1, sink, score)
        return score

    blocks = BlockMask.from_kv_blocks(
        *tiles,
        BLOCK_SIZE=_TILE,
        mask_mod=mask_mod,
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=torch.is_grad_enabled(),
    )
    out = flex_attention(query, key, value, score_mod=score_mod, block_mask=blocks, scale=1.0, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out


def _check(inputs: AttentionInputs) -> None:
    pass
