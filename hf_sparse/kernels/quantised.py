"""Keys in few bits, which all past keys are ranked by; extended as tokens arrive.

Ranking tolerates low precision: SALE estimates attention weights from products of 4-bit numbers (arXiv 2505.24179).
The keys that are kept are scored again in full precision. What all keys of a head have in common, which in some models
is most of a key, changes no attention weight, so it is subtracted before they are rounded (as in SageAttention, arXiv
2410.02367).

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


CENTRED = 256
"""Keys at the start of a text whose mean is subtracted from all keys."""


class QuantisedKeys:
    """The keys of one layer in few bits with one float32 scale a key; a `Layout` says how many.

    Every key is quantised once, but for those of a text that was shorter than `CENTRED` then.
    """

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._parts: tuple[Tensor, Tensor] | None = None
        self._length = 0
        self._center: Tensor | None = None
        # The centre stands once this many keys were there.
        self._needed = 0

    @property
    def center(self) -> Tensor:
        """What was subtracted from the keys: float32 `(batch, kv_heads, head_dim)`."""
        assert self._center is not None, "no key was quantised yet"
        return self._center

    @torch.no_grad()
    def up_to(
        self, key: Tensor, stop: int, layout: Layout, *, text_start: Callable[[], Tensor] | None = None, left: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Codes and scales of at least the keys before `stop`.

        Args:
            key: `(batch, kv_heads, kv_len, head_dim)`: the keys that were quantised so far, and more.
            stop: Position after the last key that is needed.
            layout: Of the kernels that read them.
            text_start: Gives the position where each sequence's text begins, int64 `(batch,)` on the CPU. `None` to
                subtract nothing, for scores that are more than products.
            left: Keys at the end that the caller writes itself.
        """
        if self._parts is not None and not self._fits(self._parts[1], key, layout):
            self._parts, self._length, self._center = None, 0, None
        self._layout = layout
        parts = self._parts = self._with_room(key, stop, layout)
        if self._center is None or self._length < min(stop, self._needed):
            self._set_center(key, stop, text_start)
        if stop - left > self._length:
            layout.quantise(key, self._length, stop - left, parts, self.center)
        self._length = max(self._length, stop)
        return parts

    def crop(self, length: int) -> None:
        """Forget the keys from position `length` on."""
        self._length = min(self._length, length)
        if self._length < self._needed:
            self._center = None

    def rearrange(self, change: Callable[[Tensor], Tensor]) -> None:
        """Select, reorder or repeat sequences: `change` does so along dimension 0 of any tensor."""
        if self._parts is not None:
            self._parts = (change(self._parts[0]).contiguous(), change(self._parts[1]).contiguous())
        if self._center is not None:
            self._center = change(self._center)

    def _set_center(self, key: Tensor, stop: int, text_start: Callable[[], Tensor] | None) -> None:
        """The mean of the first keys of each text, of those that are there; all keys are to be quantised anew."""
        self._length = 0
        if text_start is None:
            self._center, self._needed = key.new_zeros(*key.shape[:2], key.shape[3], dtype=torch.float32), 0
            return
        starts = text_start().tolist()
        self._needed = max(starts) + CENTRED
        if len(set(starts)) == 1:
            center = _mean(key, starts[0], stop)
        else:
            center = torch.cat([_mean(key[i : i + 1], start, stop) for i, start in enumerate(starts)])
        self._center = center.nan_to_num(0, 0, 0)

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


def _mean(key: Tensor, start: int, stop: int) -> Tensor:
    """Of the first keys from `start` on: float32 `(batch, kv_heads, head_dim)`; zeros if there are none."""
    first = key[:, :, start : min(start + CENTRED, stop)]
    return first.mean(2, dtype=torch.float32) if first.shape[2] else first.new_zeros(first.shape[:2] + first.shape[3:])
