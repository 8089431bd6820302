"""The kernel of the engine `flex`: FlexAttention over tiles, compiled once for all lengths."""

from __future__ import annotations

import os
import shlex
import shutil
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

TILE = 128
"""Rows and keys of a tile."""

# Kernels that may be compiled in one process. PyTorch alone would stop at 8: a few models in turn.
_KERNELS = 64


def tile_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: tuple[Tensor, Tensor, Tensor, Tensor],
    table: Tensor,
    sinks: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Attend under a mask, tile by tile: `(groups, heads, rows, value_dim)`; zeros for a row that is allowed nothing.

    The sizes of `table` and `sinks` must not change from call to call: such sizes break the code that PyTorch generates
    for a mask on a CPU. Each dtype, head size, number of heads and kind of score has a kernel, as has one group alone.

    Args:
        query: `(groups, heads, rows, head_dim)`, at least two rows.
        key: `(groups, 1, width, head_dim)`, at least two whole tiles of keys.
        value: `(groups, 1, width, value_dim)`.
        tiles: How many tiles are allowed in part, int32 `(groups, heads, row_tiles)`, at least two, and which, int32
            `(groups, heads, row_tiles, key_tiles)`; the same of tiles that are allowed in whole.
        table: The mask `(groups, heads, rows, width)`, flat, with room after it.
        sinks: If set, the scores of the last key `(groups, heads, rows)`, flat, with room after them.
        scaling: Factor of the scores.
        softcap: If set, scores become `softcap * tanh(scores / softcap)`, but for the sinks.

    Raises:
        RuntimeError: If there is nothing to compile with.
    """
    for tensor in (query, key, value, *tiles):
        torch._dynamo.maybe_mark_dynamic(tensor, [0, 2])
    for tensor in tiles[1::2]:
        torch._dynamo.maybe_mark_dynamic(tensor, 3)
    for tensor in (table,) if sinks is None else (table, sinks):
        torch._dynamo.mark_static(tensor)
    # Numbers that change from call to call are in tensors: as numbers, each would have a kernel of its own.
    sizes = torch.tensor([*query.shape[1:3], key.shape[2]], device=key.device)
    factors = torch.tensor([scaling, softcap or 1.0], dtype=torch.float32, device=key.device)
    kernel = _compiled(key.device.type)
    with torch._dynamo.config.patch(recompile_limit=_KERNELS):
        out: Tensor = kernel(query, key, value, tiles, table, sinks, sizes, factors, softcap is not None)
    return out


@cache
def _compiled(device: str) -> Any:
    """The kernel, to be compiled at its first calls, if there is something to compile it with."""
    compiler = shlex.split(os.environ.get("CXX") or ("cl" if os.name == "nt" else "g++"))[0]
    if device == "cpu" and shutil.which(compiler) is None:
        raise RuntimeError(
            f"engine 'flex' compiles C++ on a CPU, and the compiler {compiler!r} was not found: install it (Debian "
            "and Ubuntu: apt install g++; conda: conda install gxx), or name yours in CXX, or use engine='gather'"
        )
    if device == "cuda" and find_spec("triton") is None:
        raise RuntimeError("engine 'flex' compiles with Triton on CUDA: pip install triton, or use engine='gather'")
    return torch.compile(_kernel, fullgraph=True)


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: tuple[Tensor, Tensor, Tensor, Tensor],
    table: Tensor,
    sinks: Tensor | None,
    sizes: Tensor,
    factors: Tensor,
    capped: bool,
) -> Tensor:
    """What is compiled: as `tile_attention`, with `sizes` heads, rows and width, and `factors` scaling and softcap."""

    def mask_mod(group: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return table[((group * sizes[0] + head) * sizes[1] + row) * sizes[2] + column]

    def score_mod(score: Tensor, group: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        score = score * factors[0]
        if capped:
            score = factors[1] * torch.tanh(score / factors[1])
        if sinks is not None:
            sink = sinks[(group * sizes[0] + head) * sizes[1] + row]
            score = torch.where(column == sizes[2] - 1, sink, score)
        return score

    blocks = BlockMask.from_kv_blocks(
        *tiles,
        BLOCK_SIZE=TILE,
        mask_mod=mask_mod,
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=torch.is_grad_enabled(),
    )
    out = flex_attention(query, key, value, score_mod=score_mod, block_mask=blocks, scale=1.0, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out
