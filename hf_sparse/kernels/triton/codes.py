"""Keys in 4 bits as the Triton kernels read them, and vectors rounded to whole numbers.

A byte holds two components of a key, `half` apart, where `half` is half of head_dim, rounded up: the lower ones of all
bytes are one factor of a matrix product, and the higher ones another, with the two halves of a query.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.kernels.layout import Layout, adjacent
from hf_sparse.kernels.triton.common import on_its_device

KEY_MOST = tl.constexpr(7)
"""Largest component of a key."""

QUERY_MOST = tl.constexpr(63)
"""Largest component of a rounded query."""

# What is added to a component of a key, so that no number is below 0.
_OFFSET = tl.constexpr(8)

# A float32 of this size has no fraction: adding it rounds, to the nearest, of two as near to the even one.
_ROUNDING = tl.constexpr(1.5 * 2**23)

_VECTORS = 32


def half_of(dim: int) -> int:
    """Bytes of a key of `dim` components."""
    return -(-dim // 2)


def padded_half(dim: int) -> int:
    """The same, as many as a tile of the tensor cores takes."""
    return int(max(32, triton.next_power_of_2(half_of(dim))))


def allocate(key: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """uint8 `(batch, kv_heads, room, half)` and float32 `(batch, kv_heads, room)`, not written yet.

    There is room for a multiple of 16 keys: kernels are compiled for strides that are multiples of 16 and for others.
    """
    shape = (*key.shape[:2], -(-room // 16) * 16)
    return (
        key.new_empty(*shape, half_of(key.shape[3]), dtype=torch.uint8),
        key.new_empty(*shape, dtype=torch.float32),
    )


@on_its_device
def write(key: Tensor, start: int, stop: int, out: tuple[Tensor, Tensor], center: Tensor) -> None:
    """Write the keys at positions `start` to `stop` - 1, of any strides, less `center` (see `Layout`)."""
    codes, scales = out
    batch, kv_heads, _, dim = key.shape
    key = adjacent(key)
    _write[triton.cdiv(stop - start, _VECTORS), batch * kv_heads](
        key,
        center.contiguous(),
        codes,
        scales,
        key.stride()[:3],
        codes.stride()[:3],
        scales.stride()[:2],
        kv_heads,
        start,
        stop,
        DIM=dim,
        HALF=half_of(dim),
        PADDED_HALF=triton.next_power_of_2(half_of(dim)),
        BLOCK=block_of(dim),
        VECTORS=_VECTORS,
    )


LAYOUT = Layout(allocate, write)
"""Keys one after the other, two components a byte."""


def block_of(dim: int) -> int:
    """Components that a Hadamard transform takes together: the largest power of two that divides half of them."""
    return half_of(dim) & -half_of(dim)


@triton.jit
def mixed(low, high, VECTORS: tl.constexpr, PADDED_HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Hadamard transforms of vectors, from their halves `(VECTORS, PADDED_HALF)`: see `selectors.importance.mixed`."""
    low, high = low + high, low - high
    return _transformed(low, VECTORS, PADDED_HALF, BLOCK), _transformed(high, VECTORS, PADDED_HALF, BLOCK)


@triton.jit
def _transformed(x, VECTORS: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    if BLOCK > 1:
        x = _transformed(x, VECTORS, LENGTH, BLOCK // 2)
        x = tl.permute(tl.reshape(x, (VECTORS, LENGTH // BLOCK, 2, BLOCK // 2)), (0, 1, 3, 2))
        a, b = tl.split(x)
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (VECTORS, LENGTH))
    return x


@triton.jit
def rounded(low, high, MOST: tl.constexpr):
    """Whole numbers up to `MOST` for the two halves of float32 vectors, in float32, and the scale of each vector.

    A component that is no number becomes 0.
    """
    most = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
    inverse = tl.where(most > 0, tl.div_rn(MOST * 1.0, tl.where(most > 0, most, 1.0)), 0.0)[:, None]
    return _whole(low * inverse, MOST), _whole(high * inverse, MOST), tl.div_rn(most, MOST * 1.0)


@triton.jit
def _whole(x, MOST: tl.constexpr):
    whole = (x + _ROUNDING) - _ROUNDING
    return tl.where(tl.abs(whole) <= MOST, whole, 0.0)


@triton.jit
def load_codes(codes, position, inside, stride, HALF: tl.constexpr, PADDED_HALF: tl.constexpr):
    """Both halves of keys, int8 `(keys, PADDED_HALF)`, 8 above what they stand for: see `correction`."""
    d = tl.arange(0, PADDED_HALF)
    mask = inside[:, None] & (d < HALF)[None, :]
    both = tl.load(codes + position.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0)
    return (both & 15).to(tl.int8), (both >> 4).to(tl.int8)


@triton.jit
def correction(low, high):
    """What to add to the products of rounded queries, int8 `(queries, PADDED_HALF)`, and keys as `load_codes` gives."""
    return -_OFFSET * (tl.sum(low.to(tl.int32), 1) + tl.sum(high.to(tl.int32), 1))


@triton.jit
def write_keys(
    key,
    center,
    codes,
    scales,
    position,
    inside,
    key_stride,
    code_stride,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Write codes and scales of those keys of a head at `position`, int64 `(VECTORS,)`, that are `inside`."""
    d = tl.arange(0, PADDED_HALF)
    at = key + position[:, None] * key_stride + d[None, :]
    mask = inside[:, None] & (d < HALF)[None, :]
    low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=inside[:, None] & (HALF + d < DIM)[None, :], other=0.0).to(tl.float32)
    low -= tl.load(center + d, mask=d < HALF, other=0.0)[None, :]
    high -= tl.load(center + HALF + d, mask=HALF + d < DIM, other=0.0)[None, :]
    low, high = mixed(low, high, VECTORS, PADDED_HALF, BLOCK)
    low, high, scale = rounded(low, high, KEY_MOST)
    both = (low.to(tl.int32) + _OFFSET) | ((high.to(tl.int32) + _OFFSET) << 4)
    tl.store(codes + position[:, None] * code_stride + d[None, :], both.to(tl.uint8), mask=mask)
    tl.store(scales + position, scale, mask=inside)


@triton.jit(do_not_specialize=["start", "stop"])
def _write(
    key,
    center,
    codes,
    scales,
    key_strides,
    code_strides,
    scale_strides,
    kv_heads,
    start,
    stop,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Grid: (tiles of keys, batch x kv_heads)."""
    batch, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    position = (start + tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)).to(tl.int64)
    key += batch * key_strides[0] + kv_head * key_strides[1]
    center += tl.program_id(1) * DIM
    codes += batch * code_strides[0] + kv_head * code_strides[1]
    scales += batch * scale_strides[0] + kv_head * scale_strides[1]
    write_keys(
        key,
        center,
        codes,
        scales,
        position,
        position < stop,
        key_strides[2],
        code_strides[2],
        DIM,
        HALF,
        PADDED_HALF,
        BLOCK,
        VECTORS,
    )
