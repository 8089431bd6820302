"""The mask function that transformers calls for patched models: `interval_mask`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import causal_mask_function, sdpa_mask

from hf_sparse.visibility.intervals import Visible, visible_in, without_padding
from hf_sparse.visibility.traced import INTERSECTION, is_intersection, own_mask, seen_causally, seen_under
from hf_sparse.visibility.traced import visible as visible_when_run

MaskFunction = Callable[[Any, Any, Any, Any], Any]

# Up to this many (query, key) pairs the mask is evaluated whole, which is quicker than bisecting it query by query.
_SMALL_MASK = 1 << 16

# Functions of transformers.masking_utils that let a query see an interval which ends at its own position. Their
# intersections do so too. Any other function is evaluated whole and checked, so that a renamed one costs memory
# and not correctness.
_INTERVAL_FUNCTIONS = {
    "causal_mask_function",
    "sliding_window_overlay.<locals>.inner_mask",
    "chunked_overlay.<locals>.inner_mask",
}


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
    if torch.compiler.is_compiling():
        if mask_function is causal_mask_function:
            seen = seen_causally(batch_size, own, kv_length)
        elif not use_vmap and is_intersection(mask_function):
            seen = seen_under(mask_function, batch_size, own, kv_length, kv_offset)
        else:
            return cast(Tensor, own_mask(whole_mask()))
        return cast(Tensor, visible_when_run(seen, own, real))
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
        visible = Visible(intervals[:, None]) if real is None else without_padding(intervals, real)
    if real is not None:
        alive = real[:, own.clamp(0, kv_length - 1)]
        visible = Visible(visible.intervals * alive[:, None, :, None], visible.shown)
    return visible.packed()


def _is_interval_function(function: MaskFunction) -> bool:
    if getattr(function, "__module__", None) != "transformers.masking_utils":
        return False
    name = getattr(function, "__qualname__", "")
    if name == INTERSECTION:
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
