"""Keys in few bits, which all past keys are ranked by; extended as tokens arrive.

Ranking tolerates low precision: SALE estimates attention weights from products of 4-bit numbers (arXiv 2505.24179).
The keys that are kept are scored again in full precision.

`QuantisedKeys` belongs to the keys of one layer and grows with them: a cache layer keeps one from token to token
(`hf_sparse.cache`), and a call without such a cache makes its own, shared by its blocks of queries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_sparse.kernels.layout import Layout

# Storage grows by an eighth more than is needed, and this many keys.
_LEAST_SPARE = 256


class QuantisedKeys:
    """The keys of one layer in few bits with one float32 scale a key; a `Layout` says how many.

    Every key is quantised once.
    """

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._parts: tuple[Tensor, Tensor] | None = None
        self._length = 0

    @torch.no_grad()
    def up_to(self, key: Tensor, stop: int, layout: Layout, *, left: int = 0) -> tuple[Tensor, Tensor]:
        """Codes and scales of at least the keys before `stop`.

        Args:
            key: `(batch, kv_heads, kv_len, head_dim)`: the keys that were quantised so far, and more.
            stop: Position after the last key that is needed.
            layout: Of the kernels that read them.
            left: Keys at the end that the caller writes itself.
        """
        if self._parts is not None and not self._fits(self._parts[1], key, layout):
            self._parts, self._length = None, 0
        self._layout = layout
        parts = self._parts = self._with_room(key, stop, layout)
        if stop - left > self._length:
            layout.quantise(key, self._length, stop - left, parts)
        self._length = max(self._length, stop)
        return parts

    def crop(self, length: int) -> None:
        """Forget the keys from position `length` on."""
        self._length = min(self._length, length)

    def rearrange(self, change: Callable[[Tensor], Tensor]) -> None:
        """Select, reorder or repeat sequences: `change` does so along dimension 0 of any tensor."""
        if self._parts is not None:
            self._parts = (change(self._parts[0]).contiguous(), change(self._parts[1]).contiguous())

    def _fits(self, scales: Tensor, key: Tensor, layout: Layout) -> bool:
        return layout == self._layout and scales.shape[:2] == key.shape[:2] and scales.device == key.device

    def _with_room(self, key: Tensor, stop: int, layout: Layout) -> tuple[Tensor, Tensor]:
        old = self._parts
        # Tensors made in inference mode cannot be written to outside of it.
        if (
            old is not None
            and old[1].shape[2] >= stop
            and (not old[1].is_inference() or torch.is_inference_mode_enabled())
        ):
            return old
        stop = max(stop, self._length)
        grown = layout.allocate(key, stop + stop // 8 + _LEAST_SPARE)
        if old is not None:
            for new, part in zip(grown, old, strict=True):
                held = min(new.shape[2], part.shape[2])
                new[:, :, :held] = part[:, :, :held]
        return grown
