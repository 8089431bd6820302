"""What the visible intervals of a call's rows say, worked out once for all layers that are called with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from hf_sparse.laws import Budget

# The attribute of a tensor of intervals that holds its facts.
_ATTRIBUTE = "_hf_sparse_facts"


# Up to this many rows are read as Python numbers: one operation on a tensor takes as long as a hundred of those, which
# counts for a decoded token.
_FEW = 64


class Plan:
    """How many keys the rows of a call keep under one law.

    Args:
        facts: About the rows.
        law: The law.
        table: Its budgets, int64 `(heads or 1, at least facts.last_visible + 1)`.

    Attributes:
        dense: Whether every row keeps all the keys that it sees.
        dense_rows: Reason -> rows that keep all keys for it. Pad rows do not count.
    """

    def __init__(self, facts: RowFacts, law: Budget, table: Tensor) -> None:
        self._facts = facts
        self._table = table
        covered = 0
        if facts.most_visible < law.dense_below:
            short, self.dense = facts.rows, True
        else:
            least, seen = self.host.amin(1), facts.seen
            if facts.few:
                pairs = zip(least.flatten().tolist(), seen.flatten().tolist(), strict=True)
                whole = [number for kept, number in pairs if 0 < number <= kept]
            else:
                whole = seen[(least >= seen) & (seen > 0)].tolist()
            short = sum(number < law.dense_below for number in whole)
            covered = len(whole) - short
            self.dense = len(whole) == facts.rows
        reasons = {
            f"fewer than {law.dense_below} visible keys": short,
            "the budget covers all visible keys": covered,
        }
        self.dense_rows = {reason: number for reason, number in reasons.items() if number}

    @cached_property
    def host(self) -> Tensor:
        """Kept keys, int64 `(batch, heads or 1, rows)`, on the CPU."""
        return self._table[:, self._facts.seen].transpose(0, 1)

    @cached_property
    def budgets(self) -> Tensor:
        """The same on the device of the call."""
        return self.host.to(self._facts.device)

    @cached_property
    def most(self) -> int:
        """The largest budget."""
        return int(self.host.max())


class RowFacts:
    """Facts about the rows of one call, on the CPU unless said otherwise: `facts_of` makes and keeps them.

    On a GPU, reading a tensor waits for all work before it: here that happens once for all layers.

    Attributes:
        device: Of the call.
        rows: Rows that see a key.
        total: Visible keys, summed over the rows.
        few: Whether they are so few that Python's numbers are quicker than tensors.
        most_visible: Keys that the row with the most of them sees.
        last_visible: Columns from this one on are seen by no row; at least 1.
    """

    def __init__(self, intervals: Tensor) -> None:
        batch, _, rows, _ = intervals.shape
        self.device = intervals.device
        self._shape = batch, rows
        self.few = batch * rows <= _FEW
        if self.few:
            self._spans = [span for sequence in intervals.tolist() for span in sequence[0]]
            seen = [stop - first for first, stop in self._spans]
            self.rows = sum(number > 0 for number in seen)
            self.total = sum(seen)
            self.most_visible = max(seen, default=0)
            self.last_visible = max(1, *(stop for _, stop in self._spans))
        else:
            self._bounds = _bounds(intervals[:, 0].cpu())
            self.rows = int((self.seen > 0).sum())
            self.total = int(self.seen.sum())
            self.most_visible = int(self.seen.max())
            self.last_visible = max(1, int(self.stop.max()))
        self._plans: dict[int, tuple[Budget, Plan]] = {}
        self._causal: dict[int, bool] = {}

    @cached_property
    def _bounds(self) -> tuple[Tensor, Tensor]:
        return _bounds(torch.tensor(self._spans, device="cpu").view(*self._shape, 2))

    @property
    def first(self) -> Tensor:
        """The first key that a row sees: int64 `(batch, rows)`."""
        return self._bounds[0]

    @property
    def stop(self) -> Tensor:
        """The key after the last one that a row sees: int64 `(batch, rows)`."""
        return self._bounds[1]

    @cached_property
    def seen(self) -> Tensor:
        """Keys that a row sees: int64 `(batch, rows)`."""
        return self.stop - self.first

    @cached_property
    def visible(self) -> Tensor:
        """The same on the device of the call."""
        return self.seen.to(self.device)

    def causal(self, kv_len: int) -> bool:
        """Whether every row sees exactly the keys up to its own, the last row being that of the last key."""
        if kv_len not in self._causal:
            rows = self._shape[1]
            if self.few:
                own = [[0, kv_len - rows + 1 + row] for row in range(rows)]
                self._causal[kv_len] = self._spans == own * self._shape[0]
            else:
                stop = torch.arange(kv_len - rows, kv_len, device="cpu") + 1
                self._causal[kv_len] = bool(((self.first == 0) & (self.stop == stop)).all())
        return self._causal[kv_len]

    def plan(self, law: Budget, table: Callable[[int], Tensor]) -> Plan:
        """The plan under `law`, whose `table(longest)` is `(heads or 1, at least longest + 1)`.

        It is kept for the very object `law`: comparing laws would take as long as a small layer's attention.
        """
        known = self._plans.get(id(law))
        if known is None:
            known = self._plans[id(law)] = (law, Plan(self, law, table(self.last_visible)))
        return known[1]


def _bounds(intervals: Tensor) -> tuple[Tensor, Tensor]:
    first, stop = (x.contiguous() for x in intervals.long().unbind(-1))
    return first, stop


def facts_of(intervals: Tensor) -> RowFacts:
    """The facts about `intervals`, int32 `(batch, 1, rows, 2)`, which are not to be changed in place afterwards."""
    facts = getattr(intervals, _ATTRIBUTE, None)
    if not isinstance(facts, RowFacts):
        facts = RowFacts(intervals)
        setattr(intervals, _ATTRIBUTE, facts)
    return facts
