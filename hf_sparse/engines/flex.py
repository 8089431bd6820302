"""The engine on PyTorch's FlexAttention: one fused, compiled kernel, which skips tiles of keys that no row keeps.

A group is one attention problem: its members are the rows, and its candidate keys, copied side by side, are the keys.
Of the tiles of rows x keys, FlexAttention skips those where nothing is allowed, computes those where everything is
without looking at the mask, and looks up each pair in the others.

It wins where neighbouring rows keep the same keys, as in the prefill of a window: nearly all tiles are skipped or full.
Where each member picks from the pool of its group (`grouped`), nearly all tiles are computed and masked, so that only
the fusion is gained; where a group is one row (`topk`), and in decoding, `gather` is faster. The first calls of a
process compile for 5 to 20 seconds each: one kernel for prefill and one for decoding, for any length. On a CPU there
are no gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_sparse.engines.flex_kernel import TILE, tile_attention
from hf_sparse.selection import AttentionInputs, Selection, take_rows

# Pairs of a member and a candidate that the table of a mask has room for, one byte each.
_TABLE_BYTES = 1 << 24

# Bytes of masks, and of gathered keys and values, that are alive at a time; at most `_TABLE_BYTES`.
_CHUNK_BYTES = 1 << 24

# Eight bytes, each of them True.
_ALL = 0x0101010101010101


def refusal(inputs: AttentionInputs) -> str | None:
    """Why FlexAttention cannot take a call; `None` if it can."""
    if inputs.value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"FlexAttention takes float32, bfloat16 and float16, not {inputs.value.dtype}"
    if inputs.dropout:
        return "FlexAttention drops no weights"
    if inputs.value.device.type == "cpu":
        if inputs.learns:
            return "FlexAttention has no gradients on a CPU"
        if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            return "FlexAttention needs a CPU with AVX2"
    return None


def attend(inputs: AttentionInputs, selection: Selection) -> Tensor:
    """Attend through FlexAttention: `(batch, heads, rows, value_dim)`.

    Memory grows with rows x kept keys, never with rows x kv_len; groups are taken a few at a time. Only where there is
    no `refusal`.

    Raises:
        RuntimeError: If nothing is there to compile a kernel with.
    """
    heads, rows = inputs.query.shape[1:3]
    kv_heads = inputs.key.shape[1]
    query = selection.members_of(inputs.query, kv_heads)
    batch, _, groups, members, dim = query.shape
    kept = selection.columns.shape[-1]
    width = kept
    sinks = None
    if inputs.sinks is not None:
        sinks = selection.members_of(inputs.sinks.view(1, heads, 1, 1).expand(batch, -1, rows, -1), kv_heads)
        width += 1
    # Whole tiles of keys, and at least two: a kernel for one would serve no other number. What is added is allowed to
    # nobody, but for the last key, which stands for the sink.
    width = max(2, -(-width // TILE)) * TILE
    columns = F.pad(selection.columns, (0, width - kept))

    # Heads stay apart where each fills tiles of rows: rows next to each other keep the same keys, those of two heads
    # that meet in a tile do not.
    size = selection.rows_per_group if selection.rows_per_group >= TILE else members
    per_key = max(2, members) + (dim + inputs.value.shape[-1]) * query.element_size()
    step = max(1, _CHUNK_BYTES // (batch * kv_heads * width * per_key))
    parts = []
    with torch.set_grad_enabled(inputs.learns):
        for start in range(0, groups, step):
            part = slice(start, start + step)
            out = _attend_groups(
                query[:, :, part].reshape(-1, members // size, size, dim),
                take_rows(inputs.key, columns[:, :, part]).flatten(0, 2).unsqueeze(1),
                take_rows(inputs.value, columns[:, :, part]).flatten(0, 2).unsqueeze(1),
                selection.allowed[:, :, part].reshape(-1, members // size, size, kept),
                None if sinks is None else sinks[:, :, part].reshape(-1, members // size, size),
                inputs,
            )
            parts.append(out.reshape(batch, kv_heads, -1, members, out.shape[-1]))
    return selection.rows_of(torch.cat(parts, dim=2), heads)


def _attend_groups(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, sinks: Tensor | None, inputs: AttentionInputs
) -> Tensor:
    """Attend in each group on its own: `(groups, heads, rows, value_dim)`.

    Args:
        query: `(groups, heads, rows, head_dim)`.
        key: `(groups, 1, width, head_dim)`: whole tiles.
        value: `(groups, 1, width, value_dim)`.
        allowed: bool `(groups, heads, rows, width or less)`.
        sinks: `(groups, heads, rows)`, or `None`.
        inputs: For `scaling` and `softcap`.
    """
    rows, kept = allowed.shape[2:]
    # At least two rows, for the same reason.
    query = F.pad(query, (0, 0, 0, int(rows == 1))).contiguous()
    shape = (*query.shape[:3], key.shape[2])
    pairs = math.prod(shape)
    table = torch.empty(max(_TABLE_BYTES, 1 << (pairs - 1).bit_length()), dtype=torch.bool, device=key.device)
    mask = table[:pairs].view(shape)
    mask[:, :, :rows, :kept] = allowed
    mask[:, :, :rows, kept:] = False
    mask[:, :, rows:] = False
    if sinks is not None:
        mask[..., -1] = True
        value[..., -1, :] = 0
        sinks = F.pad(sinks.float(), (0, shape[2] - rows)).flatten()
        sinks = F.pad(sinks, (0, len(table) // TILE - len(sinks)))
    out = tile_attention(query, key, value, _tiles(mask), table, sinks, inputs.scaling, inputs.softcap)
    return out[:, :, :rows]


def _tiles(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tiles of a mask `(..., rows, width)` that are allowed in part, and in whole, as `BlockMask` takes them.

    Returns:
        Of both kinds, how many each row of tiles has, int32 `(..., row_tiles)`, and which, first of all, int32
        `(..., row_tiles, key_tiles)`.
    """
    # Eight pairs at a time: as integers, bytes are largest where all are True, and 0 where none is.
    *outer, rows, width = mask.shape
    least, most = mask.view(torch.int64).view(*outer, rows, width // TILE, TILE // 8).aminmax(dim=-1)
    more = (0, 0, 0, max(2, -(-rows // TILE)) * TILE - rows)
    by_tile = (*outer, -1, TILE, width // TILE)
    least = F.pad(least, more, value=2.0**62).view(by_tile).amin(-2)
    most = F.pad(most, more).view(by_tile).amax(-2)
    full = least == _ALL
    part = ~full & (most > 0)
    return (*_listed(part), *_listed(full))


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.to(torch.int32)
