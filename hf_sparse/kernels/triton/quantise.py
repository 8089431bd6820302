"""Vectors in 8 bits, to rank keys by: half the bytes of bfloat16, and products at twice its rate."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.kernels.layout import adjacent
from hf_sparse.kernels.triton.common import on_its_device

_VECTORS = 32


@on_its_device
def quantise(states: Tensor) -> tuple[Tensor, Tensor]:
    """Round each vector to whole multiples of its largest component / 127.

    Args:
        states: `(batch, heads, length, dim)`, floating point, of any strides: all keys, or those that a cache just got.

    Returns:
        int8 `(batch, heads, length, dim)` and scales, float32 `(batch, heads, length)`. Their product differs from
        `states` by at most half a scale in each component.
    """
    batch, heads, length, dim = states.shape
    states = adjacent(states)
    whole = torch.empty(states.shape, dtype=torch.int8, device=states.device)
    scales = torch.empty(states.shape[:3], dtype=torch.float32, device=states.device)
    padded = triton.next_power_of_2(dim)
    _quantise[triton.cdiv(length, _VECTORS), batch * heads](
        states, whole, scales, states.stride()[:3], heads, length, DIM=dim, PADDED_DIM=padded, VECTORS=_VECTORS
    )
    return whole, scales


@triton.jit
def rounded(x):
    """int8 vectors and their scales, for a tile of float32 vectors."""
    scale = tl.max(tl.abs(x), 1) / 127
    return tl.floor(x / tl.where(scale > 0, scale, 1.0)[:, None] + 0.5).to(tl.int8), scale


@triton.jit
def _quantise(
    states, whole, scales, strides, heads, length, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, VECTORS: tl.constexpr
):
    """Grid: (tiles of vectors, batch x heads)."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    index = (tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)).to(tl.int64)
    d = tl.arange(0, PADDED_DIM)
    real = (index < length)[:, None] & (d < DIM)[None, :]
    place = batch * strides[0] + head * strides[1] + index * strides[2]
    x, scale = rounded(tl.load(states + place[:, None] + d[None, :], mask=real, other=0.0).to(tl.float32))
    place = tl.program_id(1).to(tl.int64) * length + index
    tl.store(whole + place[:, None] * DIM + d[None, :], x, mask=real)
    tl.store(scales + place, scale, mask=index < length)
