"""How many keys the queries of one call keep under a law."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from hf_sparse.laws.budget import Budget
from hf_sparse.visibility import VisibleRanges

_AHEAD = 1024
"""Numbers of visible keys that a table has at least beyond those that were asked for: the next tokens need them."""


class BudgetTable:
    """Budgets of a law by visible keys, in a table that grows with the longest text; layers with one law share it."""

    def __init__(self, law: Budget) -> None:
        self.law = law
        self._table: Tensor | None = None

    def up_to(self, longest: int) -> Tensor:
        """Kept keys for any number of visible keys up to `longest`: int32 `(heads or 1, longest + 1 or more)`."""
        table = self._table
        known = 0 if table is None else table.shape[1]
        if table is None or known <= longest:
            more = self.law(torch.arange(known, longest + 1 + max(_AHEAD, longest // 8), device="cpu")).int()
            more = more.view(-1, more.shape[-1])
            self._table = table = more if table is None else torch.cat([table, more], dim=1)
        return table

    def plan(self, ranges: VisibleRanges) -> BudgetPlan:
        """The budgets of a call, worked out once for all layers that share this table."""
        plan = ranges.plans.get(self)
        if plan is None:
            plan = ranges.plans[self] = BudgetPlan(ranges, self.law, self.up_to(ranges.last_visible))
        return plan


class BudgetPlan:
    """The budgets of the queries of a call.

    Args:
        ranges: What the queries see.
        law: The law.
        table: Its budgets, int32 `(heads or 1, at least ranges.last_visible + 1)`.

    Attributes:
        dense: Whether every query keeps all the keys that it sees.
        dense_queries: Reason -> queries that keep all keys for it. Pad tokens do not count.
    """

    def __init__(self, ranges: VisibleRanges, law: Budget, table: Tensor) -> None:
        self._seen, self._table = ranges.seen, table
        covered = 0
        if ranges.most_visible < law.dense_below:
            short, self.dense = ranges.queries, True
        else:
            least, seen = self.budgets.amin(1), self._seen
            if ranges.few:
                pairs = zip(least.flatten().tolist(), seen.flatten().tolist(), strict=True)
                whole = [count for kept, count in pairs if 0 < count <= kept]
            else:
                whole = seen[(least >= seen) & (seen > 0)].tolist()
            short = sum(count < law.dense_below for count in whole)
            covered = len(whole) - short
            self.dense = len(whole) == ranges.queries
        reasons = {
            f"fewer than {law.dense_below} visible keys": short,
            "the budget covers all visible keys": covered,
        }
        self.dense_queries = {reason: count for reason, count in reasons.items() if count}

    @cached_property
    def budgets(self) -> Tensor:
        """Kept keys, int64 `(batch, heads or 1, q_len)`, on the CPU."""
        return self._table[:, self._seen].transpose(0, 1).long()

    @cached_property
    def most(self) -> int:
        """The largest budget."""
        return int(self.budgets.max())

    def leading_dense(self) -> int:
        """Queries at the start of the call that keep all that they see, in every sequence and head."""
        whole = (self.budgets >= self._seen[:, None]).all(1).all(0) & (self._seen[0] > 0)
        return int(whole.long().cumprod(0).sum())
