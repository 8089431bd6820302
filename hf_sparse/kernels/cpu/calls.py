"""The compiled kernels, called with tensors. The structures mirror those of `calls.hpp`, field by field."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from hf_sparse.kernels.cpu import build
from hf_sparse.kernels.int8 import Int8States
from hf_sparse.kernels.layout import Layout, adjacent

TILE = 16
"""Lists of key positions have a multiple of this length: as many numbers as the largest registers hold."""

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INT8 = 3


class _States(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("format", c_int64),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("position_stride", c_int64),
        ("dim", c_int64),
        ("scales", c_void_p),
        *((name, c_int64) for name in ("parts", "scale_batch", "scale_head", "scale_position")),
    )

    def __init__(self, states: Tensor) -> None:
        if isinstance(states, Int8States):
            codes, scales = states.codes, states.scales
            own = (scales.data_ptr(), scales.shape[3], *scales.stride()[:3])
            super().__init__(codes.data_ptr(), _INT8, *codes.stride()[:3], codes.shape[3], *own)
        else:
            super().__init__(states.data_ptr(), _FORMATS[states.dtype], *states.stride()[:3], states.shape[3])


class _Quantised(ctypes.Structure):
    _fields_ = (
        ("bytes", c_void_p),
        ("scales", c_void_p),
        ("batch_bytes", c_int64),
        ("head_bytes", c_int64),
        ("batch_scales", c_int64),
        ("head_scales", c_int64),
    )

    def __init__(self, quantised: tuple[Tensor, Tensor]) -> None:
        codes, scales = quantised
        super().__init__(codes.data_ptr(), scales.data_ptr(), *codes.stride()[:2], *scales.stride()[:2])


class _Selecting(ctypes.Structure):
    _fields_ = (
        ("codes", _Quantised),
        ("dim", c_int64),
        ("query", c_void_p),
        ("first", c_void_p),
        ("stop", c_void_p),
        ("budget", c_void_p),
        *((name, c_int64) for name in ("budget_batch", "budget_head", "budget_query")),
        *((name, c_int64) for name in ("batches", "heads", "kv_heads", "q_len", "size")),
        *((name, c_int64) for name in ("sink_keys", "recent_keys")),
        ("softcap", c_double),
        ("width", c_int64),
        *((name, c_void_p) for name in ("positions", "runs")),
        ("threads", c_int64),
    )


class _Attending(ctypes.Structure):
    _fields_ = (
        ("key", _States),
        ("value", _States),
        ("query", c_void_p),
        *((name, c_int64) for name in ("batches", "heads", "kv_heads", "q_len", "size", "width", "per_head")),
        *((name, c_void_p) for name in ("positions", "allowed", "runs", "sinks")),
        ("softcap", c_double),
        ("out", c_void_p),
        ("threads", c_int64),
    )


class _Decoding(ctypes.Structure):
    _fields_ = (
        ("query", _States),
        ("scaling", c_double),
        ("key", _States),
        ("value", _States),
        ("codes", _Quantised),
        ("center", c_void_p),
        ("newest", c_int64),
        *((name, c_void_p) for name in ("first", "stop", "budget")),
        *((name, c_int64) for name in ("budget_batch", "budget_head")),
        *((name, c_int64) for name in ("batches", "heads", "kv_heads", "sink_keys", "recent_keys")),
        ("sinks", c_void_p),
        ("softcap", c_double),
        ("out", c_void_p),
        ("threads", c_int64),
    )


def unsupported_reason(*states: Tensor) -> str | None:
    """Why the kernels cannot run, on this machine or with keys and values like `states`; `None` if they can."""
    for x in states:
        if x.device.type != "cpu":
            return f"the compiled kernels run on the CPU, not on {x.device.type}"
        if x.dtype not in _FORMATS:
            return f"the compiled kernels take float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
    return build.unsupported_reason()


def lanes() -> int:
    """Numbers that a register of this CPU holds: 4, 8 or 16."""
    return int(_library().hfs_lanes())


def allocate(key: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Tiles of zeros for at least `room` keys: see `quantise`."""
    batch, heads, _, dim = key.shape
    tiles = -(-room // TILE)
    return (
        key.new_zeros(batch, heads, tiles, dim // 8, TILE, 4, dtype=torch.uint8),
        key.new_zeros(batch, heads, tiles * TILE, dtype=torch.float32),
    )


def quantise(key: Tensor, start: int, stop: int, out: tuple[Tensor, Tensor], center: Tensor) -> None:
    """Write the keys at positions `start` to `stop` - 1 in 4 bits.

    Args:
        key: `(batch, kv_heads, kv_len, head_dim)`; `head_dim` a multiple of 8.
        start: First position.
        stop: Position after the last.
        out: Codes, uint8 `(batch, kv_heads, tiles, head_dim / 8, TILE, 4)`, whose low and high halves are 8 + component
            / scale, rounded, of four neighbouring components of a key's Hadamard transform each; and scales, float32
            `(batch, kv_heads, tiles * TILE)`: the largest component divided by 7.
        center: What is subtracted from every key before: float32 `(batch, kv_heads, head_dim)`.
    """
    key, center = adjacent(key), center.contiguous()
    _run(
        "hfs_quantise",
        ctypes.byref(_States(key)),
        ctypes.byref(_Quantised(out)),
        c_void_p(center.data_ptr()),
        *map(c_int64, (*key.shape[:2], start, stop, torch.get_num_threads())),
    )


LAYOUT = Layout(allocate, quantise)
"""Tiles of `TILE` keys in 4 bits, in which 8 components of each key lie together."""


def select(
    query: Tensor,
    codes: tuple[Tensor, Tensor],
    visible: tuple[Tensor, Tensor],
    budgets: Tensor,
    *,
    size: int,
    width: int,
    sink_keys: int,
    recent_keys: int,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The keys that the (query, head) pairs of each group keep: see `group.hpp`.

    Args:
        query: Scaled, float32 `(batch, heads, q_len, head_dim)`, contiguous.
        codes: As `quantise` writes them.
        visible: First visible position of each query, and the one after its last: int64 `(batch, q_len)`, contiguous.
        budgets: int64 `(batch, heads, q_len)`; may be expanded.
        size: Queries in a group.
        width: Room for the positions of a group, a multiple of `TILE`.
        sink_keys: Of each query, as in the configuration.
        recent_keys: Of each query, as in the configuration.
        softcap: Soft cap of the scores, or `None`.

    Returns:
        Positions, int64 `(batch, kv_heads, groups, width)`, and the runs of them that each pair keeps, int64 `(batch,
        kv_heads, groups, pairs, 3, 2)`.
    """
    batch, heads, q_len, dim = query.shape
    kv_heads = codes[0].shape[1]
    groups = (batch, kv_heads, q_len // size)
    positions = query.new_empty(*groups, width, dtype=torch.int64)
    runs = query.new_empty(*groups, heads // kv_heads * size, 3, 2, dtype=torch.int64)
    call = _Selecting(
        _Quantised(codes),
        dim,
        *(x.data_ptr() for x in (query, *visible, budgets)),
        *budgets.stride(),
        *(batch, heads, kv_heads, q_len, size, sink_keys, recent_keys),
        *(softcap or 0.0, width),
        *(x.data_ptr() for x in (positions, runs)),
        torch.get_num_threads(),
    )
    _run("hfs_select", ctypes.byref(call))
    return positions, runs


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    *,
    allowed: Tensor | None,
    runs: Tensor | None,
    size: int,
    per_head: bool,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Attention to the keys that each (query, head) pair is allowed.

    Args:
        query: Scaled, float32 `(batch, heads, q_len, head_dim)`, contiguous.
        key: `(batch, kv_heads, kv_len, head_dim)`.
        value: `(batch, kv_heads, kv_len, value_dim)`.
        positions: int64 `(batch, kv_heads, groups, width)`, contiguous; `width` a multiple of `TILE`.
        allowed: bool `(batch, kv_heads, groups, pairs, width)`, contiguous; or `None`.
        runs: Else int64 `(batch, kv_heads, groups, pairs, 3, 2)`, contiguous: runs of places that a pair attends to.
        size: Queries in a group.
        per_head: Whether each query head has groups of its own, ordered by (head in the GQA group, query).
        sinks: Logits `(heads,)` that take part without a value, float32; or `None`.
        softcap: Soft cap of the scores, or `None`.

    Returns:
        float32 `(batch, heads, q_len, value_dim)`.
    """
    key, value = adjacent(key), adjacent(value)
    batch, heads, q_len, _ = query.shape
    out = query.new_empty(batch, heads, q_len, value.shape[3])
    call = _Attending(
        _States(key),
        _States(value),
        query.data_ptr(),
        *(batch, heads, key.shape[1], q_len, size, positions.shape[-1], per_head),
        *(None if x is None else x.data_ptr() for x in (positions, allowed, runs, sinks)),
        softcap or 0.0,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    _run("hfs_attend", ctypes.byref(call))
    return out


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codes: tuple[Tensor, Tensor],
    center: Tensor,
    newest: int,
    visible: tuple[Tensor, Tensor],
    budgets: Tensor,
    *,
    scaling: float,
    sink_keys: int,
    recent_keys: int,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """`quantise` the newest key, `select` for a query of each sequence, and `attend`.

    Args:
        query: `(batch, heads, 1, head_dim)`, not scaled.
        key: As for `attend`.
        value: As for `attend`.
        codes: As `quantise` writes them: all but those of the newest key.
        center: As for `quantise`.
        newest: Its position.
        visible: As for `select`.
        budgets: int64 `(batch or 1, heads or 1, 1)`.
        scaling: Factor of the scores.
        sink_keys: As for `select`.
        recent_keys: As for `select`.
        sinks: As for `attend`.
        softcap: As for `attend`.

    Returns:
        float32 `(batch, heads, 1, value_dim)`.
    """
    query, key, value, center = adjacent(query), adjacent(key), adjacent(value), center.contiguous()
    batch, heads = query.shape[:2]
    out = center.new_empty(batch, heads, 1, value.shape[3])
    call = _Decoding(
        _States(query),
        scaling,
        _States(key),
        _States(value),
        _Quantised(codes),
        center.data_ptr(),
        newest,
        *(x.data_ptr() for x in (*visible, budgets)),
        *(stride if size > 1 else 0 for size, stride in zip(budgets.shape[:2], budgets.stride(), strict=False)),
        *(batch, heads, key.shape[1], sink_keys, recent_keys),
        None if sinks is None else sinks.data_ptr(),
        softcap or 0.0,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    _run("hfs_decode", ctypes.byref(call))
    return out


def _run(kernel: str, *arguments: Any) -> None:
    if getattr(_library(), kernel)(*arguments):
        raise MemoryError(f"the compiled kernel {kernel} cannot get the memory that it needs")


def _library() -> ctypes.CDLL:
    found = build.library()
    assert found is not None, "no compiled kernels: ask `unsupported_reason` first"
    return found
