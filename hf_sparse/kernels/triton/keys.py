"""Keys in 8 bits as the Triton kernels read them: int8 vectors one after the other, and their scales."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.kernels.layout import Layout
from hf_sparse.kernels.triton.quantise import quantise


def allocate(key: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """int8 `(batch, kv_heads, room, head_dim)` and float32 `(batch, kv_heads, room)`, not written yet."""
    shape = (*key.shape[:2], room)
    return (
        key.new_empty(*shape, key.shape[3], dtype=torch.int8),
        key.new_empty(*shape, dtype=torch.float32),
    )


def write(key: Tensor, start: int, stop: int, out: tuple[Tensor, Tensor]) -> None:
    """Write the keys at positions `start` to `stop` - 1."""
    for part, new in zip(out, quantise(key[:, :, start:stop]), strict=True):
        part[:, :, start:stop] = new


LAYOUT = Layout(allocate, write)
"""Keys one after the other."""
