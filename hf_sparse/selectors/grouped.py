"""The grouped selector: the rows of a group, over all heads of a GQA group, draw on the same keys.

A group of rows that attends to one set of gathered keys is a dense matrix product, which is what hardware is good
at. Sharing costs little: see the README for what was measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.config import SparseAttentionConfig
from hf_sparse.selection import AttentionInputs, Selection, accurate
from hf_sparse.selectors.topk import largest

ROWS = 64
"""Query rows in a group. A block of rows given to the selector is cut into groups of this many from its start."""


@torch.no_grad()
def select_grouped(inputs: AttentionInputs, budgets: Tensor, config: SparseAttentionConfig) -> Selection:
    """Give each group its recent keys, and the best-scoring keys before those.

    A row attends to every visible key from `recent_keys` before its group's first row on, and spends the rest of its
    budget on the group's shared ranking of the older keys, sink keys first.

    Args:
        inputs: Query rows: a whole number of groups of `ROWS` rows, or fewer rows than that as one group.
        budgets: int64 `(batch, heads or 1, rows)`.
        config: For `sink_keys` and `recent_keys`.
    """
    batch, heads, rows, _ = inputs.query.shape
    kv_heads, kv_len = inputs.key.shape[1], inputs.last_visible
    size = min(ROWS, rows)
    groups = rows // size
    intervals = inputs.intervals.long()[:, 0].view(batch, groups, size, 2)
    first, stop = intervals.unbind(-1)
    alive = stop > first

    # Local part: all keys from `low` on, for every row of the group; `low` and `oldest` are (batch, groups).
    oldest = torch.where(alive, first, kv_len).amin(-1)
    low = torch.where(alive, stop, kv_len).amin(-1) - max(1, config.recent_keys)
    low = torch.maximum(low, oldest)
    high = torch.where(alive, stop, 0).amax(-1)
    width = max(1, int((high - low).max()))
    local = (low[..., None] + torch.arange(width, device=low.device)).clamp(max=kv_len - 1)

    layout = Selection(local[:, None], local[:, None, ..., None], rows_per_group=size, per_head=False)
    k = layout.members_of(budgets.expand(batch, heads, rows)[..., None], kv_heads)[..., 0]
    first, stop = (
        layout.members_of(x.reshape(batch, 1, rows, 1).expand(-1, heads, -1, -1), kv_heads) for x in (first, stop)
    )
    start = torch.maximum(torch.maximum(stop - k[..., None], first), low[:, None, :, None, None])
    span = low[..., None] + torch.arange(width, device=low.device)
    local_allowed = (span[:, None, :, None] >= start) & (span[:, None, :, None] < stop)
    rest = k - local_allowed.sum(-1)

    older = _older_scores(inputs, layout, low, oldest, first, stop, config)
    # Some members may not see the oldest keys of their group (sliding windows): leave them room to skip these.
    spread = (first[..., 0] - oldest[:, None, :, None]).clamp(min=0)
    wanted = torch.where(rest > 0, rest + spread, 0).amax(-1).expand(batch, kv_heads, groups)
    wanted = torch.minimum(wanted, (older > -torch.inf).sum(-1))
    columns, taken = ranked(older, wanted)
    seen = taken.unsqueeze(3) & (columns.unsqueeze(3) >= first)
    older_allowed = seen & (seen.cumsum(-1) <= rest[..., None])

    return Selection(
        torch.cat([columns, local[:, None].expand(-1, kv_heads, -1, -1)], dim=-1),
        torch.cat([older_allowed, local_allowed], dim=-1),
        rows_per_group=size,
        per_head=False,
    )


def ranked(scores: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The `wanted` largest entries of each row as `largest` picks them, best first, padding last."""
    columns, taken = largest(scores, wanted)
    values = scores.gather(-1, columns).masked_fill(~taken, -torch.inf)
    # Sort by column first, so that equal scores keep the order "more recent first" through the stable sort by value.
    columns, order = columns.sort(dim=-1, descending=True)
    values = values.gather(-1, order)
    taken = taken.gather(-1, order)
    order = values.sort(dim=-1, descending=True, stable=True).indices
    return columns.gather(-1, order), taken.gather(-1, order)


def _older_scores(
    inputs: AttentionInputs,
    layout: Selection,
    low: Tensor,
    oldest: Tensor,
    first: Tensor,
    stop: Tensor,
    config: SparseAttentionConfig,
) -> Tensor:
    """Worth of the keys before `low` for each group: `(batch, kv_heads, groups, kv_len)`, -inf elsewhere."""
    kv_heads, kv_len = inputs.key.shape[1], inputs.last_visible
    dtype = accurate(inputs.query.dtype)
    members = layout.members_of(inputs.query, kv_heads).to(dtype)
    scores = (members @ inputs.key[:, :, None, :kv_len].to(dtype).transpose(-1, -2)) * inputs.scaling
    span = torch.arange(kv_len, device=low.device)
    visible = (span >= first) & (span < stop)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num().sum(3)
    old = (span >= oldest[..., None]) & (span < low[..., None])
    sink = span < oldest[..., None] + config.sink_keys
    weights = weights.masked_fill(sink[:, None], torch.inf)
    return weights.masked_fill(~old[:, None], -torch.inf)
