"""Masks while `torch.compile` looks into a model: tensors of known shapes, from which an operator makes intervals.

What a mask looks like decides what `interval_mask` does with it, and a graph cannot branch on numbers. So the graph
holds what each query sees as numbers, and the operator `hf_sparse::visible` does the rest when the graph runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_sparse.visibility.intervals import Visible, without_padding

INTERSECTION = "and_masks.<locals>.and_mask"
"""The name of what `transformers.masking_utils.and_masks` returns.

Unless `use_vmap` says that a user's function is among its parts, these let a query see an interval: causal, sliding,
chunked, and of a sequence of its own among packed ones.
"""


def is_intersection(function: Callable[..., Any]) -> bool:
    """Whether a mask function is an intersection of others."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_qualname == INTERSECTION


def seen_under(function: Callable[..., Any], batch: int, own: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """First key that each query sees, the one after the last, and the number of them: int64 `(batch, q_len, 3)`.

    A sum over a mask that is never stored: a compiler makes one loop of it.
    """
    device = own.device
    batches = torch.arange(batch, device=device)[:, None, None]
    keys = torch.arange(kv_length, device=device, dtype=torch.int32)[None, None]
    seen = function(batches, torch.zeros_like(batches), own[None, :, None] + kv_offset, keys + kv_offset)
    seen = seen.expand(batch, own.shape[0], kv_length)
    number = seen.sum(-1, dtype=torch.int32)
    first = torch.where(seen, keys, kv_length).amin(-1).minimum(number * kv_length)
    stop = torch.where(seen, keys + 1, 0).amax(-1)
    return torch.stack([first, stop, number], dim=-1).long()


def seen_causally(batch: int, own: Tensor, kv_length: int) -> Tensor:
    """The same for a causal mask."""
    stop = (own + 1).clamp(max=kv_length).expand(batch, -1)
    return torch.stack([torch.zeros_like(stop), stop, stop], dim=-1)


@torch.library.custom_op(
    "hf_sparse::visible",
    mutates_args=(),
    schema="(Tensor seen, Tensor own, Tensor? real) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def visible(seen: Tensor, own: Tensor, real: Tensor | None) -> Tensor:
    """What each query sees, as `Visible.packed` has it, with room for the positions of all keys if there is padding.

    Args:
        seen: From `seen_under` or `seen_causally`.
        own: int64 `(q_len,)`: the place of each query among the keys.
        real: bool `(batch, kv_len)`, False for padding; `None` if there is none.

    Raises:
        RuntimeError: If a query sees what is no interval.
    """
    intervals, number = seen[..., :2], seen[..., 2]
    if not bool((intervals[..., 1] - intervals[..., 0] == number).all()):
        raise RuntimeError(
            "a mask lets a query see keys that are no interval, which is not known while torch.compile looks into a "
            "model: pass it as a 4-D attention_mask"
        )
    if real is None:
        return intervals[:, None].to(torch.int32).contiguous()
    found = Visible(intervals[:, None]) if bool(real.all()) else without_padding(intervals, real)
    alive = real[:, own.clamp(0, real.shape[1] - 1)]
    return Visible(found.intervals * alive[:, None, :, None], found.shown).packed(room=real.shape[1])


@visible.register_fake
def _(seen: Tensor, own: Tensor, real: Tensor | None) -> Tensor:
    batch, queries, _ = seen.shape
    length = queries if real is None else queries + real.shape[1]
    return seen.new_empty((batch, 1, length, 2), dtype=torch.int32)


@torch.library.custom_op(
    "hf_sparse::own_mask", mutates_args=(), schema="(Tensor mask) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,)
)
def own_mask(mask: Tensor) -> Tensor:
    """A copy of a mask, in memory that a compiled graph uses for nothing else as long as the mask is needed.

    What it shows is remembered for the tensor that it is: a CUDA graph would give the same one for every token.
    """
    return mask.clone()


@own_mask.register_fake
def _(mask: Tensor) -> Tensor:
    return torch.empty_like(mask)
