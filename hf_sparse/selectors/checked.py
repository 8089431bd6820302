"""What a user's own selector gives is checked: kernels read memory where a selection says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_sparse.call import AttentionCall, Selection
from hf_sparse.errors import UserError


def check_selection(name: str, selection: Any, call: AttentionCall, budgets: Tensor) -> None:
    """Refuse a selection in which any query has other than its budget of visible keys.

    Args:
        name: Of the selector.
        selection: What it gave.
        call: The block of queries that it was given.
        budgets: int64 `(batch, heads or 1, q_len)`, on the CPU: as it was given.

    Raises:
        UserError: If anything about it is wrong.
    """
    if not isinstance(selection, Selection):
        raise UserError(f"selector {name!r}: select must return a hf_sparse.Selection; got {type(selection).__name__}")
    _check_shapes(name, selection, call)
    heads, kv_len = call.query.shape[1], call.key.shape[2]
    positions, allowed = selection.positions.unsqueeze(3), selection.allowed
    low, high = positions.min().item(), positions.max().item()
    if low < 0 or high >= kv_len:
        raise UserError(f"selector {name!r}: key positions must be in 0 ... {kv_len - 1}; got {low} ... {high}")
    ranges = call.intervals.expand(-1, heads, -1, -1)
    first, stop = selection.pairs_of(ranges, call.key.shape[1]).unsqueeze(-2).unbind(-1)
    hidden = allowed & ((positions < first) | (positions >= stop))
    if bool(hidden.any()):
        key = positions.expand_as(hidden)[hidden][0].item()
        raise UserError(f"selector {name!r}: a query keeps the key at position {key}, which it does not see")
    number = allowed.sum(-1)
    ordered = selection.positions.sort(-1).values
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        different = selection.mask(heads, kv_len).sum(-1)
        if not torch.equal(different, selection.queries_of(number, heads)):
            raise UserError(f"selector {name!r}: a query keeps a key that is named twice")
    kept, wanted = selection.queries_of(number, heads).cpu(), budgets.expand(-1, heads, -1)
    if bool((wrong := kept != wanted).any()):
        raise UserError(
            f"selector {name!r}: every query must keep its budget of keys; one keeps {kept[wrong][0].item()} with a "
            f"budget of {wanted[wrong][0].item()}"
        )


def _check_shapes(name: str, selection: Selection, call: AttentionCall) -> None:
    batch, heads, queries, _ = call.query.shape
    kv_heads, share, size = call.key.shape[1], call.group_size, selection.queries_per_group
    if not isinstance(size, int) or size < 1 or queries % size:
        raise UserError(f"selector {name!r}: queries_per_group must divide the block's {queries} queries; got {size!r}")
    groups, pairs = (
        (heads // kv_heads * queries // size, size) if selection.per_head else (queries // size, size * share)
    )
    width = selection.positions.shape[-1] if isinstance(selection.positions, Tensor) else 0
    wanted: dict[str, tuple[tuple[int, ...], str]] = {
        "positions": ((batch, kv_heads, groups, max(1, width)), "int64"),
        "allowed": ((batch, kv_heads, groups, pairs, max(1, width)), "bool"),
    }
    for field, (shape, dtype) in wanted.items():
        found = getattr(selection, field)
        if isinstance(found, Tensor):
            said = f"{str(found.dtype).removeprefix('torch.')} {tuple(found.shape)} on {found.device}"
        else:
            said = type(found).__name__
        if said != f"{dtype} {shape} on {call.query.device}":
            raise UserError(
                f"selector {name!r}: Selection.{field} must be {dtype} {shape} on {call.query.device}; got {said}"
            )
