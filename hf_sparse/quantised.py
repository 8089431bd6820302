"""Keys in 8 bits, kept up to date as tokens arrive: what the compiled kernels score all older keys with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_sparse.kernels import cpu


class QuantisedKeys:
    """The keys of one layer in 8 bits with a scale of their own each, `head_dim + 4` bytes a key.

    What was quantised stays, and more is added as keys arrive.
    """

    def __init__(self) -> None:
        self._parts: tuple[Tensor, Tensor] | None = None
        self._length = 0

    def up_to(self, key: Tensor, stop: int) -> tuple[Tensor, Tensor]:
        """Codes and scales, as `hf_sparse.kernels.cpu.quantise` writes them, of at least the keys before `stop`.

        Args:
            key: `(batch, kv_heads, kv_len, head_dim)`: the keys that were quantised so far, and more.
            stop: Column after the last one that is wanted.
        """
        if self._parts is None or self._parts[0].shape[:2] != key.shape[:2]:
            self._parts, self._length = None, 0
        parts = self._parts = self._with_room(key, stop)
        if stop > self._length:
            cpu.quantise(key, self._length, stop, parts)
            self._length = stop
        return parts

    def crop(self, length: int) -> None:
        """Forget the keys from column `length` on."""
        self._length = min(self._length, length)

    def rearrange(self, change: Callable[[Tensor], Tensor]) -> None:
        """Select, reorder or repeat sequences: `change` does so along dimension 0 of any tensor."""
        if self._parts is not None:
            self._parts = (change(self._parts[0]).contiguous(), change(self._parts[1]).contiguous())

    def _with_room(self, key: Tensor, stop: int) -> tuple[Tensor, Tensor]:
        tiles = -(-stop // cpu.TILE)
        old = self._parts
        if old is not None and old[0].shape[2] >= tiles:
            return old
        room = tiles + tiles // 8 + cpu.TILE
        batch, heads, _, dim = key.shape
        grown = (
            torch.zeros(batch, heads, room, dim // 4, cpu.TILE, 4, dtype=torch.uint8),
            torch.zeros(batch, heads, room * cpu.TILE),
        )
        if old is not None:
            for new, part in zip(grown, old, strict=True):
                new[:, :, : part.shape[2]] = part
        return grown
