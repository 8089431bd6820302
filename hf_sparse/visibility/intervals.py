"""Visible intervals: the keys that each query may attend to, as `[first, stop)` instead of an n x n mask.

Causal, sliding-window, chunked and padded masks all let a query see one contiguous range of keys, so two integers a
query say everything. Padding inside a text, such as a pad token's id that the text itself holds, hides the same keys
from every query: those keys are left out, and the intervals count the keys that remain. What is no interval even then
(image blocks, most of a user's own 4-D masks) is recognised and handed on as the bool mask it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import causal_mask_function, sdpa_mask

MaskFunction = Callable[[Any, Any, Any, Any], Any]

# Up to this many (query, key) pairs the mask is evaluated whole, which is quicker than bisecting it query by query.
_SMALL_MASK = 1 << 16

# Pairs of a whole mask that are looked at in one go.
_MASK_PAIRS = 1 << 24

# Functions of transformers.masking_utils that let a query see an interval which ends at its own position. Their
# intersections do so too. Any other function is evaluated whole and checked, so that a renamed one costs memory
# and not correctness.
_INTERVAL_FUNCTIONS = {
    "causal_mask_function",
    "sliding_window_overlay.<locals>.inner_mask",
    "chunked_overlay.<locals>.inner_mask",
}
_INTERSECTION = "and_masks.<locals>.and_mask"


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

    def packed(self) -> Tensor:
        """One int32 tensor `(batch, 1, q_len or more, 2)` that says all of it, as a mask function must return.

        Positions of shown keys follow the intervals, each twice.
        """
        if self.shown is None:
            return self.intervals.to(torch.int32)
        positions = self.shown.to(torch.int32)[:, None, :, None].expand(-1, -1, -1, 2)
        return torch.cat([self.intervals.to(torch.int32), positions], dim=2)

    def expanded(self, batch: int) -> Visible:
        """The same for `batch` sequences, where a mask has one for all."""
        shown = None if self.shown is None else self.shown.expand(batch, -1)
        return Visible(self.intervals.to(torch.int32).expand(batch, 1, -1, -1), shown)

    @classmethod
    def unpacked(cls, mask: Tensor, q_len: int) -> Visible:
        """The inverse of `packed`."""
        if mask.shape[2] == q_len:
            return cls(mask)
        return cls(mask[:, :, :q_len], mask[:, 0, q_len:, 0].long())


def interval_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """The mask function registered with transformers' `AttentionMaskInterface`.

    Args:
        batch_size: Number of sequences.
        q_length: Number of queries.
        kv_length: Number of keys, unwritten slots of a static cache included.
        q_offset: Position of the first query.
        kv_offset: Position of the first key.
        mask_function: `(batch, head, q position, kv position) -> bool`, elementwise.
        attention_mask: bool `(batch, positions)`, False for padding.
        use_vmap: Whether `mask_function` is a user's own, which may not be elementwise.
        device: Where the result goes.

    Returns:
        What each query sees, as `Visible.packed` has it; the bool mask `(batch, 1, q_length, kv_length)` where
        intervals cannot say it.
    """

    def whole_mask() -> Tensor:
        mask = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]  # static caches pass a tensor
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        assert mask is not None
        return mask

    start = q_offset - kv_offset
    if isinstance(start, Tensor):
        own = torch.arange(q_length, device=device) + start
    else:
        own = torch.arange(start, start + q_length, device=device)
    real = None if attention_mask is None else _real_keys(attention_mask, kv_length, kv_offset)
    if real is not None and bool(real.all()):
        real = None  # A padding mask without padding is what `generate` hands on for every token of an unpadded text.
    known = not use_vmap and _is_interval_function(mask_function)
    if not known or (q_length > 1 and q_length * kv_length <= _SMALL_MASK):
        mask = whole_mask()
        visible = visible_in(mask)
        if visible is None:
            return mask
    else:
        intervals = torch.zeros(batch_size, q_length, 2, dtype=torch.int64, device=device)
        if mask_function is not causal_mask_function:
            intervals[..., 0] = _first_visible(mask_function, batch_size, own, kv_length, kv_offset)
        intervals[..., 1] = (own + 1).clamp_(max=kv_length)
        visible = Visible(intervals[:, None]) if real is None else _without_padding(intervals, real)
    if real is not None:
        alive = real[:, own.clamp(0, kv_length - 1)]
        visible = Visible(visible.intervals * alive[:, None, :, None], visible.shown)
    return visible.packed()


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


def _is_interval_function(function: MaskFunction) -> bool:
    if getattr(function, "__module__", None) != "transformers.masking_utils":
        return False
    name = getattr(function, "__qualname__", "")
    if name == _INTERSECTION:
        parts = [cell.cell_contents for cell in function.__closure__ or ()]
        return len(parts) == 1 and all(_is_interval_function(part) for part in parts[0])
    return name in _INTERVAL_FUNCTIONS


def _first_visible(function: MaskFunction, batch: int, own: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """First visible key of each query, int64 `(batch, q_len)`, bisected between key 0 and the query's own."""
    batches = torch.arange(batch, device=own.device)[:, None]
    heads = torch.zeros_like(batches)
    high = own.clamp(min=0).expand(batch, -1)
    low = torch.zeros_like(high)
    position = own[None] + kv_offset
    steps = kv_length.bit_length()
    for _ in range(steps):
        middle = (low + high) // 2
        seen = function(batches, heads, position, middle + kv_offset)
        high = torch.where(seen, middle, high)
        low = torch.where(seen, low, middle + 1).minimum(high)
    return high


def _real_keys(attention_mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """The part of a 2-D padding mask that lies over the keys: bool `(batch, kv_length)`."""
    real = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    missing = kv_length - real.shape[1]
    return F.pad(real, (0, missing)) if missing else real


def _without_padding(intervals: Tensor, real: Tensor) -> Visible:
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
