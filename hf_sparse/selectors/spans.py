"""Where the members of each group look for keys, and how many they keep: what is known before any score is.

A group is `size` rows over the heads of a GQA group. Three spans of columns are the same for all its members: sinks
up to `begin`, older keys from `begin` to `low`, and local keys from `low` on. A member keeps its own sinks and its own
recent keys in any case. The rest of its budget is for the best of what it is offered: local keys that are neither, and
the older keys in the group's pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.call import AttentionCall, members_of
from hf_sparse.config import SparseAttentionConfig

OVERSAMPLING = 2
"""Keys in a group's pool for each that any of its members has room for at most."""


@dataclass(frozen=True)
class Spans:
    """Columns and numbers of keys of the groups of a call.

    Tensors are int64, on the device of the call: of groups `(batch, 1, groups, 1)`, of their members
    `(batch, kv_heads, groups, members)`.

    Attributes:
        size: Rows in a group.
        sinks: Most columns from `oldest` on that are sinks of members of a group, and not local.
        local: Most local keys of a group.
        older: For each group the first of the older keys, and the column after the last one, of any sequence.
        most_in_pool: Most keys in the pool of a group.
        most_rest: Most of what is left of a budget.
        votes_wanted: Whether any group's pool has fewer keys than there are to choose from.
        alike: Whether each member sees all older keys of its group, but for pad rows.
        oldest: Of groups: the first column that a row sees.
        begin: The first of the older keys.
        low: The first of the local keys.
        pool: Older keys in the pool, `(batch, kv_heads, groups)`.
        first: Of members: the first key that it sees.
        stop: The key after the last one that it sees.
        start: The key after its own sinks.
        recent: The first of its own recent keys.
        budget: Keys that it keeps.
        rest: Keys that it keeps besides its own sinks and recent keys.
    """

    size: int
    sinks: int
    local: int
    older: list[tuple[int, int]]
    most_in_pool: int
    most_rest: int
    votes_wanted: bool
    alike: bool
    oldest: Tensor
    begin: Tensor
    low: Tensor
    pool: Tensor
    first: Tensor
    stop: Tensor
    start: Tensor
    recent: Tensor
    budget: Tensor
    rest: Tensor

    @classmethod
    def of(cls, inputs: AttentionCall, budgets: Tensor, config: SparseAttentionConfig, size: int) -> Spans:
        """The spans of a whole number of groups, for budgets int64 `(batch, heads or 1, rows)` on any device."""
        batch, heads, rows, _ = inputs.query.shape
        kv_heads, device = inputs.key.shape[1], inputs.query.device
        facts = inputs.facts
        # On the CPU, and moved at the end: so many small steps, and reading their results, would keep a GPU waiting.
        begins, ends = (x.reshape(batch, 1, -1, size) for x in (facts.first, facts.stop))
        alive = ends > begins
        oldest = torch.where(alive, begins, facts.last_visible).amin(-1, keepdim=True)
        latest = torch.where(alive, ends, facts.last_visible).amin(-1, keepdim=True)
        low = torch.maximum(latest - max(1, config.recent_keys), oldest)
        begin = torch.minimum(oldest + config.sink_keys, low)
        sinks_stop = torch.minimum(torch.where(alive, begins, 0).amax(-1, keepdim=True) + config.sink_keys, low)
        local_stop = torch.where(alive, ends, 0).amax(-1, keepdim=True)

        first, stop, budget = (
            members_of(x.expand(batch, heads, rows), kv_heads, size)
            for x in (facts.first[:, None], facts.stop[:, None], budgets.cpu())
        )
        recent = budget.clamp(max=config.recent_keys)
        start = first + (budget - recent).clamp(max=config.sink_keys)
        rest = budget - recent - (start - first)
        # Members that do not see a group's oldest keys (sliding windows) may find keys in the pool that they cannot
        # take: there is room for those as well.
        wanted = torch.where(rest > 0, rest + (start - begin).clamp(min=0), 0).amax(-1)
        pool = torch.minimum(OVERSAMPLING * wanted, (low - begin)[..., 0])
        sinks, local = sinks_stop - oldest, local_stop - low
        groups = torch.stack([oldest, begin, low]).to(device)
        members = torch.stack([first, stop, start, stop - recent, budget, rest]).to(device)
        return cls(
            size=size,
            sinks=max(0, int(sinks.max())),
            local=max(0, int(local.max())),
            older=list(zip(begin.amin((0, 1, 3)).tolist(), low.amax((0, 1, 3)).tolist(), strict=True)),
            most_in_pool=int(pool.max()),
            most_rest=int(rest.max()),
            votes_wanted=bool((pool < (low - begin)[..., 0]).any()),
            alike=bool(((first <= begin) | (stop <= first)).all()),
            pool=pool.to(device),
            **dict(zip(("oldest", "begin", "low"), groups, strict=True)),
            **dict(zip(("first", "stop", "start", "recent", "budget", "rest"), members, strict=True)),
        )
