"""Visible intervals: the keys that each row may attend to, as `[first, stop)` instead of an n x n mask.

Causal, sliding-window, chunked and padded masks all let a row see one contiguous range of keys, so two integers a
row say everything. Masks that are not intervals (padding with holes, image blocks, a user's own 4-D mask) are
recognised and handed on as the bool mask they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

MaskFunction = Callable[[Any, Any, Any, Any], Any]

# Up to this many (row, key) pairs the mask is evaluated whole, which is quicker than bisecting it row by row.
_SMALL_MASK = 1 << 16

# Functions of transformers.masking_utils that let a row see an interval which ends at its own position. Their
# intersections do so too. Any other function is evaluated whole and checked, so that a renamed one costs memory
# and not correctness.
_INTERVAL_FUNCTIONS = {
    "causal_mask_function",
    "sliding_window_overlay.<locals>.inner_mask",
    "chunked_overlay.<locals>.inner_mask",
}
_INTERSECTION = "and_masks.<locals>.and_mask"


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
        q_length: Number of query rows.
        kv_length: Number of key columns, unwritten slots of a static cache included.
        q_offset: Position of the first row.
        kv_offset: Position of the first column.
        mask_function: `(batch, head, q position, kv position) -> bool`, elementwise.
        attention_mask: bool `(batch, positions)`, False for padding.
        use_vmap: Whether `mask_function` is a user's own, which may not be elementwise.
        device: Where the result goes.

    Returns:
        int32 `(batch, 1, q_length, 2)`: row i sees the columns `first <= j < stop`; `(0, 0)` for a row whose own
        token is padding. Where that cannot be said with intervals, the bool mask `(batch, 1, q_length, kv_length)`.
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
    real = None if attention_mask is None else _columns(attention_mask, kv_length, kv_offset)
    if real is not None and bool(real.all()):
        real = None  # A padding mask without padding is what `generate` hands on for every token of an unpadded text.
    known = not use_vmap and _is_interval_function(mask_function)
    if not known or (q_length > 1 and q_length * kv_length <= _SMALL_MASK):
        mask = whole_mask()
        intervals = intervals_of(mask)
        if intervals is None:
            return mask
    else:
        intervals = torch.zeros(batch_size, q_length, 2, dtype=torch.int64, device=device)
        if mask_function is not causal_mask_function:
            intervals[..., 0] = _first_visible(mask_function, batch_size, own, kv_length, kv_offset)
        intervals[..., 1] = (own + 1).clamp_(max=kv_length)
        if real is not None:
            shrunk = _without_padding(intervals, real)
            if shrunk is None:
                return whole_mask()
            intervals = shrunk
    if real is not None:
        alive = real[:, own.clamp(0, kv_length - 1)]
        intervals = intervals * alive.unsqueeze(-1)
    return intervals.to(torch.int32)[:, None]


def intervals_of(mask: Tensor) -> Tensor | None:
    """The intervals of a 4-D mask, int64 `(batch, q_len, 2)`, or `None` if it is not made of intervals.

    Args:
        mask: `(batch, 1 or heads, q_len, kv_len)`, bool or additive: see `as_bool`.
    """
    visible = as_bool(mask)
    if visible is None:
        return None
    mask = visible
    if mask.shape[1] > 1 and not bool((mask == mask[:, :1]).all()):
        return None
    mask = mask[:, 0]
    count = mask.sum(-1)
    first = mask.to(torch.uint8).argmax(-1)
    # A row of `count` visible columns is an interval exactly if they all lie within `count` of the first one.
    columns = torch.arange(mask.shape[-1], device=mask.device)
    last = (mask * (columns + 1)).amax(-1)
    if not bool(((last - first == count) | (count == 0)).all()):
        return None
    return torch.stack([first, first + count], dim=-1)


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


def is_intervals(mask: Tensor) -> bool:
    """Whether `mask` came from `interval_mask` as intervals (bool and float masks are never int32)."""
    return mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[-1] == 2


def interval_to_mask(intervals: Tensor, kv_len: int) -> Tensor:
    """bool `(..., kv_len)` from intervals `(..., 2)`: True where `first <= column < stop`."""
    columns = torch.arange(kv_len, device=intervals.device)
    return (columns >= intervals[..., :1]) & (columns < intervals[..., 1:])


def _is_interval_function(function: MaskFunction) -> bool:
    if getattr(function, "__module__", None) != "transformers.masking_utils":
        return False
    name = getattr(function, "__qualname__", "")
    if name == _INTERSECTION:
        parts = [cell.cell_contents for cell in function.__closure__ or ()]
        return len(parts) == 1 and all(_is_interval_function(part) for part in parts[0])
    return name in _INTERVAL_FUNCTIONS


def _first_visible(function: MaskFunction, batch: int, own: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """First visible column of each row, int64 `(batch, q_len)`, bisected between column 0 and the row's own."""
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


def _columns(attention_mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """The part of a 2-D padding mask that lies over the key columns: bool `(batch, kv_length)`."""
    columns = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    missing = kv_length - columns.shape[1]
    return torch.nn.functional.pad(columns, (0, missing)) if missing else columns


def _without_padding(intervals: Tensor, real: Tensor) -> Tensor | None:
    """Intervals cut down to the `real` columns, or `None` if padding tears a hole into one of them."""
    length = real.shape[-1]
    index = torch.arange(length, device=real.device)
    following = torch.where(real, index, length).flip(-1).cummin(-1).values.flip(-1)
    following = torch.nn.functional.pad(following, (0, 1), value=length)
    preceding = torch.nn.functional.pad(torch.where(real, index + 1, 0).cummax(-1).values, (1, 0))
    before = torch.nn.functional.pad(real.long().cumsum(-1), (1, 0))
    first, stop = intervals.unbind(-1)
    count = before.gather(1, stop) - before.gather(1, first)
    first, stop = following.gather(1, first), preceding.gather(1, stop)
    if not bool(((stop - first == count) | (count == 0)).all()):
        return None
    return torch.stack([first, stop], dim=-1)
