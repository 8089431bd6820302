"""Keys in few bits, which all past keys are ranked by; extended as tokens arrive.

Ranking tolerates low precision: SALE estimates attention weights from products of 4-bit numbers (arXiv 2505.24179).
The keys that are kept are scored again in full precision. What all keys of a head have in common, which in some models
is most of a key, changes no attention weight, so it is subtracted before they are rounded (as in SageAttention, arXiv
2410.02367).

`QuantisedKeys` belongs to the keys of one layer and grows with them: a cache layer keeps one from token to token
(`hf_sparse.cache`), and a call without such a cache makes its own, shared by its blocks of queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_sparse.kernels.layout import Layout

# Storage grows by an eighth more than is needed, and this many keys.
_LEAST_SPARE = 256


Texts = Sequence[tuple[int, int]]
"""The position of the first key of each sequence's text, and the one after the last."""

CENTRED = 256
"""Keys at the start of a text whose mean is subtracted from all keys."""


class QuantisedKeys:
    """The keys of one layer in few bits with one float32 scale a key; a `Layout` says how many.

    Every key is quantised once, but for those of a text that has grown since and was shorter than `CENTRED` before.
    """

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._parts: tuple[Tensor, Tensor] | None = None
        self._length = 0
        self._center: Tensor | None = None
        # Of each sequence, the keys that the centre is the mean of.
        self._centred: list[tuple[int, int]] = []

    @property
    def center(self) -> Tensor:
        """What was subtracted from the keys: float32 `(batch, kv_heads, head_dim)`."""
        assert self._center is not None, "no key was quantised yet"
        return self._center

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, with the room for further keys."""
        return 0 if self._parts is None else sum(part.nbytes for part in self._parts)

    def up_to(
        self, key: Tensor, stop: int, layout: Layout, *, texts: Callable[[], Texts] | None = None, left: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Codes and scales of at least the keys before `stop`.

        Args:
            key: `(batch, kv_heads, kv_len, head_dim)`: the keys that were quantised so far, and more.
            stop: Position after the last key that is needed.
            layout: Of the kernels that read them.
            texts: Gives the first position and the one after the last of each sequence's text. `None` to subtract
                nothing, for scores that are more than products.
            left: Keys at the end that the caller writes itself.
        """
        if self._parts is not None and not self._fits(self._parts[1], key, layout):
            self._parts, self._length, self._center = None, 0, None
        self._layout = layout
        with torch.no_grad():
            parts = self._parts = self._with_room(key, stop, layout)
            if self._center is None or any(end - start < CENTRED for start, end in self._centred):
                self._set_center(key, texts)
            if stop - left > self._length:
                layout.quantise(key, self._length, stop - left, parts, self.center)
        self._length = max(self._length, stop)
        return parts

    def crop(self, length: int) -> None:
        """Forget the keys from position `length` on."""
        self._length = min(self._length, length)
        if any(length < end for _, end in self._centred):
            self._center = None

    def rearrange(self, change: Callable[[Tensor], Tensor]) -> None:
        """Select, reorder or repeat sequences: `change` does so along dimension 0 of any tensor."""
        if self._parts is not None:
            self._parts = (change(self._parts[0]).contiguous(), change(self._parts[1]).contiguous())
        if self._center is not None:
            self._center = change(self._center)
        if self._centred:
            order = change(torch.arange(len(self._centred), device="cpu")).tolist()
            self._centred = [self._centred[i] for i in order]

    def _set_center(self, key: Tensor, texts: Callable[[], Texts] | None) -> None:
        """The mean of the first keys of each text. If it is another one, all keys are to be quantised anew."""
        found = [] if texts is None else texts()
        ends = [min(start + CENTRED, stop, key.shape[2]) for start, stop in found]
        centred = [(start, end) if start < end else (0, 0) for (start, _), end in zip(found, ends, strict=True)]
        if self._center is not None and centred == self._centred:
            return
        # First nothing, so that a call that is cut short leaves no keys with the centre of others.
        self._center, self._length, self._centred = None, 0, centred
        if not centred:
            self._center = key.new_zeros(*key.shape[:2], key.shape[3], dtype=torch.float32)
        elif len(set(centred)) == 1:
            self._center = _mean(key, *centred[0])
        else:
            self._center = torch.cat([_mean(key.narrow(0, i, 1), *span) for i, span in enumerate(centred)])

    def _fits(self, scales: Tensor, key: Tensor, layout: Layout) -> bool:
        same = layout is self._layout or layout == self._layout  # comparing takes time
        return same and scales.shape[:2] == key.shape[:2] and scales.device == key.device

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
    """Of the keys from `start` to `stop` - 1: float32 `(batch, kv_heads, head_dim)`; 0 for what is no number."""
    if start >= stop:
        return key.new_zeros(*key.shape[:2], key.shape[3], dtype=torch.float32)
    return key.narrow(2, start, stop - start).mean(2, dtype=torch.float32).nan_to_num(0, 0, 0)
