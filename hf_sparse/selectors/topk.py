"""The exact selector: each row and head keeps the keys with its own highest scores."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_sparse.call import AttentionCall, Selection, accurate
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.visibility import interval_to_mask


@torch.no_grad()
def select_topk(inputs: AttentionCall, budgets: Tensor, config: SparseAttentionConfig) -> Selection:
    """Keep the `budgets` best keys of each row: recent keys, then sink keys, then the highest scores.

    All scores are formed, rows x kv_len at a time: this selector measures quality, it does not save work. Of equal
    scores the more recent key wins, on every device.

    Args:
        inputs: `rows` query rows.
        budgets: int64 `(batch, heads or 1, rows)`.
        config: For `sink_keys` and `recent_keys`.
    """
    batch, heads, rows, dim = inputs.query.shape
    kv_heads, kv_len = inputs.key.shape[1], inputs.last_visible
    share = heads // kv_heads
    dtype = accurate(inputs.query.dtype)
    query = inputs.query.reshape(batch, kv_heads, share * rows, dim).to(dtype)
    scores = (query @ inputs.key[:, :, :kv_len].to(dtype).transpose(-1, -2)).mul_(inputs.scaling)
    scores = scores.view(batch, heads, rows, kv_len)
    scores = scores.add_(_bias(inputs.intervals, budgets, kv_len, config))
    columns, allowed = largest(
        scores.view(batch, kv_heads, share * rows, kv_len),
        budgets.expand(batch, heads, rows).reshape(batch, kv_heads, share * rows),
        int(budgets.max()),
    )
    return Selection(columns, allowed.unsqueeze(3), rows_per_group=1, per_head=True)


def _bias(intervals: Tensor, budgets: Tensor, kv_len: int, config: SparseAttentionConfig) -> Tensor:
    """What to add to scores: inf for keys that are always kept, -inf for invisible ones, 0 for the others.

    Shape `(batch, heads or 1, rows, kv_len)`.
    """
    first, stop = intervals.unbind(-1)
    recent = budgets.clamp(max=config.recent_keys)
    sinks = (budgets - recent).clamp(max=config.sink_keys)
    window = torch.stack([stop - recent, stop.expand_as(recent)], dim=-1)
    start = torch.stack([first.expand_as(sinks), first + sinks], dim=-1)
    forced = interval_to_mask(window, kv_len) | interval_to_mask(start, kv_len)
    bias = torch.zeros(forced.shape, device=forced.device).masked_fill_(forced, torch.inf)
    return bias.masked_fill_(~interval_to_mask(intervals, kv_len), -torch.inf)


def largest(scores: Tensor, budgets: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The `budgets` largest entries of each row; of equal ones, those further right.

    Args:
        scores: `(..., length)`; -inf entries are never taken.
        budgets: int64 `(...)`, each at most the number of entries above -inf.
        most: The largest budget.

    Returns:
        Columns, int64 `(..., width)`, in no particular order, and which of them are taken, bool `(..., width)`,
        where `width` is one more than `most`, or `length` if that is less.
    """
    length = scores.shape[-1]
    width = min(most + 1, length)
    if scores.device.type == "cpu":
        # numpy selects and sorts with vector instructions: three times faster than torch.topk.
        array = scores.numpy()
        columns = torch.from_numpy(np.argpartition(array, length - width, axis=-1)[..., length - width :].copy())
        values = scores.gather(-1, columns)
        ordered = torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)
    else:
        values, columns = scores.topk(width, dim=-1)
        ordered = values
    last = ordered.gather(-1, (budgets - 1).clamp(min=0).unsqueeze(-1))
    after = ordered.gather(-1, budgets.clamp(max=width - 1).unsqueeze(-1))
    taken = (values >= last) & (budgets > 0).unsqueeze(-1)
    tied = ((last == after) & (budgets.unsqueeze(-1) < length) & (budgets > 0).unsqueeze(-1)).squeeze(-1)
    if bool(tied.any()):
        # Which of the equal scores came out is up to the backend: decide these rows again, by a stable sort.
        order = scores[tied].flip(-1).sort(dim=-1, descending=True, stable=True).indices[:, :width]
        columns[tied] = length - 1 - order
        taken[tied] = torch.arange(width, device=scores.device) < budgets[tied].unsqueeze(-1)
    return columns, taken
