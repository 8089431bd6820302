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

from hf_sparse.config import SparseAttentionConfig
from hf_sparse.selection import AttentionInputs, members_of

OVERSAMPLING = 2
"""Keys in a group's pool for each that any of its members has room for at most."""


@dataclass(frozen=True)
class Spans:
    """Columns and numbers of keys, int64, on the CPU.

    Of each group `(batch, groups)`, from `first` on of each member `(batch, kv_heads, groups, members)`.

    Attributes:
        size: Rows in a group.
        oldest: First column that a row of the group sees.
        begin: First of the older keys.
        low: First of the local keys.
        sinks: Sinks of any member that are not local: the columns from `oldest` on, this many.
        local: Local keys.
        pool: Older keys in the pool, `(batch, kv_heads, groups)`.
        first: The first key that a member sees.
        start: The key after its own sinks.
        recent: The first of its own recent keys.
        stop: The key after the last one that it sees.
        budget: Keys that it keeps.
        rest: Keys that it keeps besides its own sinks and recent keys.
    """

    size: int
    oldest: Tensor
    begin: Tensor
    low: Tensor
    sinks: Tensor
    local: Tensor
    pool: Tensor
    first: Tensor
    start: Tensor
    recent: Tensor
    stop: Tensor
    budget: Tensor
    rest: Tensor

    @classmethod
    def of(cls, inputs: AttentionInputs, budgets: Tensor, config: SparseAttentionConfig, size: int) -> Spans:
        """The spans of a whole number of groups, for budgets int64 `(batch, heads or 1, rows)` on any device."""
        batch, heads, rows, _ = inputs.query.shape
        kv_heads, far = inputs.key.shape[1], inputs.facts.last_visible
        # On the CPU: so many small steps would keep a GPU waiting, and lengths are wanted here anyway.
        first, stop = inputs.facts.first, inputs.facts.stop
        begins, ends = (x.reshape(batch, -1, size) for x in (first, stop))
        alive = ends > begins
        oldest = torch.where(alive, begins, far).amin(-1)
        low = torch.maximum(torch.where(alive, ends, far).amin(-1) - max(1, config.recent_keys), oldest)
        begin = torch.minimum(oldest + config.sink_keys, low)
        sinks = torch.minimum(torch.where(alive, begins, 0).amax(-1) + config.sink_keys, low) - oldest
        local = torch.where(alive, ends, 0).amax(-1) - low

        first, stop, budget = (
            members_of(x.expand(batch, heads, rows), kv_heads, size)
            for x in (first[:, None], stop[:, None], budgets.cpu())
        )
        recent = budget.clamp(max=config.recent_keys)
        start = first + (budget - recent).clamp(max=config.sink_keys)
        rest = budget - recent - (start - first)
        # Members that do not see a group's oldest keys (sliding windows) may find keys in the pool that they cannot
        # take: there is room for those as well.
        wanted = torch.where(rest > 0, rest + (start - begin[:, None, :, None]).clamp(min=0), 0).amax(-1)
        pool = torch.minimum(OVERSAMPLING * wanted, (low - begin)[:, None])
        return cls(
            size,
            oldest,
            begin,
            low,
            sinks.clamp(min=0),
            local.clamp(min=0),
            pool,
            first,
            start,
            stop - recent,
            stop,
            budget,
            rest,
        )

    @property
    def votes_wanted(self) -> bool:
        """Whether any group's pool has fewer keys than there are to choose from."""
        return bool((self.pool < (self.low - self.begin)[:, None]).any())

    @property
    def alike(self) -> bool:
        """Whether every member sees all older keys of its group, or none because it is a pad row."""
        return bool(((self.first <= self.begin[:, None, :, None]) | (self.stop <= self.first)).all())
