"""The grouped selector: the rows of a group, over all heads of a GQA group, draw on the same keys.

A group of rows that attends to one set of gathered keys is a dense matrix product, which is what hardware is good
at. Of the older keys, a coarse look at blocks of them leaves a few times as many as are wanted, and exact scores
decide between those. Rows of a group vote on keys together: in one pass over a whole text, the keys of a row
depend a little on the rows after it in its group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.config import SparseAttentionConfig
from hf_sparse.selection import AttentionInputs, Selection, accurate, take_rows
from hf_sparse.selectors import compiled
from hf_sparse.selectors.coarse import surviving_columns
from hf_sparse.selectors.single import select_single
from hf_sparse.selectors.topk import ranked
from hf_sparse.selectors.votes import votes

ROWS = 64
"""Query rows in a group. A block of rows given to the selector is cut into groups of this many from its start."""


@torch.no_grad()
def select_grouped(inputs: AttentionInputs, budgets: Tensor, config: SparseAttentionConfig) -> Selection:
    """Give each group its recent keys, and the keys before those that its rows want most together.

    A row keeps its `recent_keys`, its `sink_keys`, the other keys since `recent_keys` before its group's first row,
    and with the rest of its budget the older keys that its group ranks highest: by the attention weight that the
    group's members give a key, summed.

    Args:
        inputs: Query rows: a whole number of groups of `ROWS` rows, or fewer rows than that as one group.
        budgets: int64 `(batch, heads or 1, rows)`.
        config: For `sink_keys` and `recent_keys`.
    """
    rows = inputs.query.shape[2]
    if compiled.refusal(inputs) is None:
        return compiled.select_compiled(inputs, budgets, config, min(ROWS, rows))
    if rows == 1:
        return select_single(inputs, budgets, config)
    return select_groups(inputs, budgets, config)


def select_groups(inputs: AttentionInputs, budgets: Tensor, config: SparseAttentionConfig) -> Selection:
    """`select_grouped` for any number of rows."""
    batch, heads, rows, _ = inputs.query.shape
    kv_heads, kv_len = inputs.key.shape[1], inputs.last_visible
    dtype = accurate(inputs.query.dtype)
    size = min(ROWS, rows)
    first, stop = inputs.intervals.long()[:, 0].view(batch, rows // size, size, 2).unbind(-1)
    alive = stop > first
    far = inputs.key.shape[2]

    # Three spans of columns, each the same for all rows of a group: sinks, older keys, and from `low` on local ones.
    oldest = torch.where(alive, first, far).amin(-1)
    low = torch.maximum(torch.where(alive, stop, far).amin(-1) - max(1, config.recent_keys), oldest)
    local = _span(low, torch.where(alive, stop, 0).amax(-1))
    sinks = _span(oldest, torch.minimum(torch.where(alive, first, 0).amax(-1) + config.sink_keys, low))
    certain = torch.cat([sinks, local], dim=-1)[:, None]
    is_sink = torch.arange(certain.shape[-1], device=low.device) < sinks.shape[-1]

    # From here on, one entry for each member of a group: `layout` knows which row and head it is.
    columns = certain.clamp(max=kv_len - 1).expand(-1, kv_heads, -1, -1)
    layout = Selection(columns, columns[..., None, :], rows_per_group=size, per_head=False)
    budget = layout.members_of(budgets.expand(batch, heads, rows)[..., None], kv_heads)
    first, stop, alive = (
        layout.members_of(x.reshape(batch, 1, rows, 1).expand(-1, heads, -1, -1), kv_heads)
        for x in (first, stop, alive)
    )
    start = first + (budget - budget.clamp(max=config.recent_keys)).clamp(max=config.sink_keys)
    place = certain.unsqueeze(3)
    own_part = is_sink == (place < low[:, None, :, None, None])
    visible = own_part & (place >= first) & (place < stop)
    allowed = visible & ((place < start) | (~is_sink & (place >= stop - (budget - (start - first)))))
    rest = budget - allowed.sum(-1, keepdim=True)

    # Members that do not see a group's oldest keys (sliding windows) skip these in its ranking: leave room for that.
    begin = oldest + config.sink_keys
    skipped = (start - begin[:, None, :, None, None]).clamp(min=0)
    room = torch.where(rest > 0, rest + skipped, 0).amax((3, 4))
    members = layout.members_of(inputs.query, kv_heads).to(dtype) * inputs.scaling
    # The span of sinks may reach beyond `begin`; for the ranking, keys from there on are older keys like others.
    counted = visible & (~is_sink | (place < begin[:, None, :, None, None]))
    certain_scores = _scores(members, inputs.key, columns, counted)
    total = certain_scores.logsumexp(-1).masked_fill(~alive.squeeze(-1), torch.inf)
    older, valid = surviving_columns(members, inputs, total, begin, low, room)
    # All members see all older keys, but for those behind the sliding window of a part of the rows.
    alike = bool((first <= begin[:, None, :, None, None]).all())
    seen = None if alike else older.unsqueeze(3) >= first
    nobody = torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill_(~valid, -torch.inf)
    shares = votes(members, take_rows(inputs.key, older).to(dtype), total, nobody, seen)
    shares = shares.masked_fill(~valid, -torch.inf)

    place, taken = ranked(shares, torch.minimum(room, valid.sum(-1)))
    older = older.gather(-1, place)
    if alike and not bool((start > begin[:, None, :, None, None]).any()):
        rank = torch.arange(older.shape[-1], device=older.device)
        older_allowed = taken.unsqueeze(3) & (rank < rest)
    else:
        eligible = taken.unsqueeze(3) & (older.unsqueeze(3) >= start)
        older_allowed = eligible & (eligible.cumsum(-1) <= rest)
    return Selection(
        torch.cat([columns, older], dim=-1),
        torch.cat([allowed, older_allowed], dim=-1),
        rows_per_group=size,
        per_head=False,
    )


def _span(start: Tensor, stop: Tensor) -> Tensor:
    """Columns from `start` on, as many as the longest `[start, stop)` has: `(batch, groups, width)`."""
    width = max(0, int((stop - start).max()))
    return start[..., None] + torch.arange(width, device=start.device)


def _scores(members: Tensor, keys: Tensor, columns: Tensor, visible: Tensor) -> Tensor:
    """Scores of the members of each group for the keys at `columns`, -inf where not visible."""
    gathered = take_rows(keys, columns).to(members.dtype)
    scores = members @ gathered.transpose(-1, -2)
    return scores + torch.zeros(visible.shape, device=keys.device).masked_fill_(~visible, -torch.inf)
