"""Visible intervals: the keys that each query may attend to, as `[first, stop)` instead of an n x n mask.

Causal, sliding-window, chunked and padded masks all let a query see one contiguous range of keys, so two integers a
query say everything. Padding inside a text, such as a pad token's id that the text itself holds, hides the same keys
from every query: those keys are left out, and the intervals count the keys that remain. What is no interval even then
(image blocks, most of a user's own 4-D masks) is recognised and handed on as the bool mask it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Pairs of a whole mask that are looked at in one go.
_MASK_PAIRS = 1 << 24


@dataclass(frozen=True)
class Visible:
    """What queries see.

    Attributes:
        intervals: int32 `(batch, 1, q_len, 2)`: query i sees the keys `first <= j < stop`; `(0, 0)` for a pad token.
        shown: int64 `(batch, number)`, if keys inside of texts are hidden: the positions of the keys that intervals
            count, rising. Shorter lists begin with other positions, which no query sees, so that a new token is the
            last entry of every list. `None` if intervals count all keys.
    """

    intervals: Tensor
    shown: Tensor | None = None

    def packed(self, room: int | None = None) -> Tensor:
        """One int32 tensor `(batch, 1, q_len or more, 2)` that says all of it, as a mask function must return.

        Positions of shown keys follow the intervals, each twice.

        Args:
            room: Places for positions, if their number must not depend on how many are shown: -1 fills those before.
        """
        intervals = self.intervals.to(torch.int32)
        if self.shown is None and room is None:
            return intervals
        number = 0 if self.shown is None else self.shown.shape[1]
        positions = intervals.new_full((len(intervals), number if room is None else room), -1)
        if self.shown is not None:
            positions[:, positions.shape[1] - number :] = self.shown
        return torch.cat([intervals, positions[:, None, :, None].expand(-1, -1, -1, 2)], dim=2)

    def expanded(self, batch: int) -> Visible:
        """The same for `batch` sequences, where a mask has one for all."""
        shown = None if self.shown is None else self.shown.expand(batch, -1)
        return Visible(self.intervals.to(torch.int32).expand(batch, 1, -1, -1), shown)

    @classmethod
    def unpacked(cls, mask: Tensor, q_len: int) -> Visible:
        """The inverse of `packed`."""
        if mask.shape[2] == q_len:
            return cls(mask)
        positions = mask[:, 0, q_len:, 0]
        shown = positions[:, positions[0] >= 0].long()
        return cls(mask[:, :, :q_len], shown if shown.shape[1] else None)


def visible_in(mask: Tensor) -> Visible | None:
    """What a 4-D mask lets queries see, or `None` if it is not made of intervals.

    Keys that no query of a sequence sees are left out where intervals hold without them. A mask is looked at in blocks
    of queries: little is alive beside it.

    Args:
        mask: `(batch, 1 or heads, q_len, kv_len)`, bool or additive: see `as_bool`.
    """
    batch, _, q_len, kv_len = mask.shape
    step = max(1, _MASK_PAIRS // max(1, batch * mask.shape[1] * kv_len))
    shown = torch.zeros(batch, kv_len, dtype=torch.bool, device=mask.device)
    parts = []
    for start in range(0, q_len, step):
        block = as_bool(mask[:, :, start : start + step])
        if block is None or (block.shape[1] > 1 and not bool((block == block[:, :1]).all())):
            return None
        seen = block[:, 0]
        shown |= seen.any(1)
        seen = seen.to(torch.uint8)
        count = seen.sum(-1, dtype=torch.int32).long()
        first, stop = seen.argmax(-1), kv_len - seen.flip(-1).argmax(-1)
        parts.append(torch.stack([first, torch.where(count > 0, stop, first), count], dim=-1))
    first, stop, count = torch.cat(parts, dim=1).unbind(-1)
    if bool((stop - first == count).all()):
        return Visible(torch.stack([first, stop], dim=-1)[:, None])
    visible = _left_out(torch.stack([first, stop], dim=-1), shown)
    first, stop = visible.intervals[:, 0].unbind(-1)
    return visible if bool((stop - first == count).all()) else None


def as_bool(mask: Tensor) -> Tensor | None:
    """A mask as bool, True where visible; `None` if it is a bias and not a mask.

    Args:
        mask: bool, or additive: 0 where visible, and the most negative number (or -inf) where not. With any other
            value in it, it is a bias.
    """
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return None
    visible = mask == 0
    return visible if bool((visible | (mask <= torch.finfo(mask.dtype).min / 2)).all()) else None


def is_packed(mask: Tensor) -> bool:
    """Whether `mask` came from `interval_mask` as intervals (bool and float masks are never int32)."""
    return mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[-1] == 2


def interval_to_mask(intervals: Tensor, kv_len: int) -> Tensor:
    """bool `(..., kv_len)` from intervals `(..., 2)`: True where `first <= key < stop`."""
    keys = torch.arange(kv_len, device=intervals.device)
    return (keys >= intervals[..., :1]) & (keys < intervals[..., 1:])


def without_padding(intervals: Tensor, real: Tensor) -> Visible:
    """Intervals `(batch, q_len, 2)` without the keys that are not `real`, bool `(batch, kv_length)`."""
    length = real.shape[-1]
    index = torch.arange(length, device=real.device)
    following = torch.where(real, index, length).flip(-1).cummin(-1).values.flip(-1)
    following = F.pad(following, (0, 1), value=length)
    preceding = F.pad(torch.where(real, index + 1, 0).cummax(-1).values, (1, 0))
    before = F.pad(real.long().cumsum(-1), (1, 0))
    first, stop = intervals.unbind(-1)
    count = before.gather(1, stop) - before.gather(1, first)
    first, stop = following.gather(1, first), preceding.gather(1, stop)
    if bool(((stop - first == count) | (count == 0)).all()):
        return Visible(torch.stack([first, stop], dim=-1)[:, None])
    return _left_out(intervals, real)


def _left_out(intervals: Tensor, shown: Tensor) -> Visible:
    """Intervals `(batch, q_len, 2)` counted in the keys that are `shown` alone, bool `(batch, kv_length)`."""
    before = F.pad(shown.long().cumsum(-1), (1, 0))
    count = before[:, -1:]
    number = max(1, int(count.max()))
    # In their order, those that are shown last.
    positions = shown.to(torch.int8).argsort(dim=-1, stable=True)[:, -number:]
    first, stop = (before.gather(1, bound) for bound in intervals.unbind(-1))
    seen = (stop > first)[..., None]
    return Visible((torch.stack([first, stop], dim=-1) + (number - count)[..., None]).mul(seen)[:, None], positions)
