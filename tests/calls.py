"""Random attention calls and selections, and what plain loops make of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_sparse.selection import AttentionInputs, Selection


def causal_intervals(
    rows: int,
    kv_len: int,
    window: int | None = None,
    left: tuple[int, ...] = (0, 0),
    right: tuple[int, ...] = (0, 0),
    spare: int = 0,
) -> Tensor:
    """Intervals of the last `rows` rows of sequences with pads on the left and right, one entry per sequence.

    `spare` key slots after the last row are unwritten, as in a static cache.
    """
    out = torch.zeros(len(left), 1, rows, 2, dtype=torch.int32)
    written = kv_len - spare
    for batch, (before, after) in enumerate(zip(left, right, strict=True)):
        for row in range(rows):
            own = written - rows + row
            if before <= own < written - after:
                first = before if window is None else max(before, own - window + 1)
                out[batch, 0, row] = torch.tensor([first, own + 1])
    return out


def inputs(
    intervals: Tensor,
    kv_len: int,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 8,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    whole_numbers: bool = False,
    softcap: float | None = None,
    sinks: bool = False,
    dropout: float = 0.0,
) -> AttentionInputs:
    """A call with random queries, keys and values: scores have a standard deviation of about 2.

    With `whole_numbers`, all scores are small multiples of 1/2, without rounding, and ties are everywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, _, rows, _ = intervals.shape

    def states(*shape: int) -> Tensor:
        if whole_numbers:
            return torch.randint(-1, 2, shape, generator=generator).to(dtype)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return AttentionInputs(
        states(batch, heads, rows, dim),
        states(batch, kv_heads, kv_len, dim),
        states(batch, kv_heads, kv_len, value_dim or dim),
        intervals,
        0.5 if whole_numbers else 2 * dim**-0.5,
        softcap,
        torch.randn(heads, generator=generator, dtype=torch.float64).to(dtype) if sinks else None,
        dropout,
    )


def scores(call: AttentionInputs) -> Tensor:
    """Scaled products of queries and keys, `(batch, heads, rows, kv_len)`, before softcap."""
    key = call.key.repeat_interleave(call.group_size, dim=1)
    return (call.query @ key.transpose(-1, -2)) * call.scaling


def visible_mask(call: AttentionInputs) -> Tensor:
    """bool `(batch, heads, rows, kv_len)` by loops."""
    batch, heads, rows, _ = call.query.shape
    out = torch.zeros(batch, heads, rows, call.key.shape[2], dtype=torch.bool)
    for b in range(batch):
        for row in range(rows):
            first, stop = call.intervals[b, 0, row].tolist()
            out[b, :, row, first:stop] = True
    return out


def attend(call: AttentionInputs, mask: Tensor) -> Tensor:
    """Attention under a bool mask `(batch, heads, rows, kv_len)`, row by row, in float64."""
    all_scores = scores(_double(call))
    values = call.value.double().repeat_interleave(call.group_size, dim=1)
    if call.softcap is not None:
        all_scores = call.softcap * (all_scores / call.softcap).tanh()
    out = torch.zeros(*call.query.shape[:3], call.value.shape[-1], dtype=torch.float64)
    for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in call.query.shape[:3])).tolist():
        kept = mask[b, h, row]
        weights = all_scores[b, h, row, kept].exp()
        total = weights.sum()
        if call.sinks is not None:
            total = total + call.sinks[h].double().exp()
        if kept.any():
            out[b, h, row] = (weights / total) @ values[b, h, kept]
    return out


def select_topk(call: AttentionInputs, budgets: Tensor, sink_keys: int, recent_keys: int) -> Tensor:
    """The specification of the exact selector, by sorting: bool `(batch, heads, rows, kv_len)`."""
    all_scores = scores(call)
    budgets = budgets.expand(call.query.shape[:3])
    out = torch.zeros(all_scores.shape, dtype=torch.bool)
    for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in call.query.shape[:3])).tolist():
        first, stop = call.intervals[b, 0, row].tolist()
        best = sorted(range(first, stop), key=lambda j: (-all_scores[b, h, row, j].item(), -j))
        order = [*range(stop - 1, max(first, stop - recent_keys) - 1, -1), *range(first, min(stop, first + sink_keys))]
        order += best
        out[b, h, row, list(dict.fromkeys(order))[: budgets[b, h, row]]] = True
    return out


def select_window(call: AttentionInputs, budgets: Tensor, sink_keys: int, recent_keys: int) -> Tensor:
    """The specification of the window selector: bool `(batch, heads, rows, kv_len)`."""
    budgets = budgets.expand(call.query.shape[:3])
    out = torch.zeros(*call.query.shape[:3], call.key.shape[2], dtype=torch.bool)
    for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in call.query.shape[:3])).tolist():
        first, stop = call.intervals[b, 0, row].tolist()
        order = [*range(stop - 1, max(first, stop - recent_keys) - 1, -1), *range(first, min(stop, first + sink_keys))]
        order += range(stop - 1, first - 1, -1)
        out[b, h, row, list(dict.fromkeys(order))[: budgets[b, h, row]]] = True
    return out


def select_grouped(
    call: AttentionInputs, budgets: Tensor, sink_keys: int, recent_keys: int, rows_per_group: int
) -> Tensor:
    """The specification of the grouped selector if its coarse look drops nothing: bool `(batch, heads, rows, kv_len)`.

    Softcap and attention sinks do not matter to it.
    """
    budgets = budgets.expand(call.query.shape[:3])
    visible = visible_mask(call)
    # A member's weight for each key; rows that see nothing have no say.
    weights = scores(call).masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()
    out = torch.zeros(visible.shape, dtype=torch.bool)
    for b in range(len(out)):
        for start in range(0, call.query.shape[2], rows_per_group):
            rows = range(start, min(start + rows_per_group, call.query.shape[2]))
            spans = {row: call.intervals[b, 0, row].tolist() for row in rows}
            alive = [row for row in rows if spans[row][1] > spans[row][0]]
            if not alive:
                continue
            oldest = min(spans[row][0] for row in alive)
            low = max(oldest, min(spans[row][1] for row in alive) - max(1, recent_keys))
            for head in range(call.query.shape[1]):
                first_head = head // call.group_size * call.group_size
                votes = weights[b, first_head : first_head + call.group_size, rows.start : rows.stop].sum((0, 1))
                ranking = sorted(range(oldest, low), key=lambda j, votes=votes: (-votes[j].item(), -j))
                for row in alive:
                    first, stop = spans[row]
                    order = [*range(stop - 1, max(first, stop - recent_keys) - 1, -1)]
                    order += range(first, min(stop, first + sink_keys))
                    order += range(stop - 1, low - 1, -1)
                    order += ranking
                    kept = [j for j in dict.fromkeys(order) if first <= j < stop]
                    out[b, head, row, kept[: budgets[b, head, row]]] = True
    return out


def random_selection(call: AttentionInputs, rows_per_group: int, per_head: bool, seed: int = 0) -> Selection:
    """A selection of visible keys without rhyme or reason: shuffled candidates, each allowed to some members."""
    generator = torch.Generator().manual_seed(seed)
    batch, rows = call.query.shape[0], call.query.shape[2]
    kv_heads, kv_len = call.key.shape[1:3]
    groups = rows // rows_per_group * (call.group_size if per_head else 1)
    order = torch.rand(batch, kv_heads, groups, kv_len, generator=generator).argsort(-1)
    # The same candidates once more, as padding that is never allowed.
    columns = torch.cat([order, order[..., :3]], dim=-1)
    shell = Selection(columns, columns[..., None, :] < 0, rows_per_group, per_head)
    visible = shell.members_of(visible_mask(call), kv_heads)
    visible = visible.gather(-1, columns[..., None, :].expand(*visible.shape[:-1], -1))
    wanted = torch.rand(visible.shape, generator=generator) < 0.5
    wanted[..., kv_len:] = False
    return Selection(columns, visible & wanted, rows_per_group, per_head)


def _double(call: AttentionInputs) -> AttentionInputs:
    fields: dict[str, Any] = vars(call) | {"query": call.query.double(), "key": call.key.double()}
    return AttentionInputs(**fields)
