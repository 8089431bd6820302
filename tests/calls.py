"""Random attention calls and selections, and what plain loops make of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import islice

import torch
from torch import Tensor

from hf_sparse import SparseAttentionConfig, engines
from hf_sparse.call import AttentionCall, Selection
from hf_sparse.kernels.quantised import CENTRED
from hf_sparse.selectors import Selector, find_selector
from hf_sparse.selectors.importance import PERIOD, WINDOW


def causal_intervals(
    q_len: int,
    kv_len: int,
    window: int | None = None,
    left: tuple[int, ...] = (0, 0),
    right: tuple[int, ...] = (0, 0),
    spare: int = 0,
) -> Tensor:
    """Intervals of the last `q_len` queries of sequences with pads on the left and right, one entry per sequence.

    `spare` key slots after the last query are unwritten, as in a static cache.
    """
    out = torch.zeros(len(left), 1, q_len, 2, dtype=torch.int32)
    written = kv_len - spare
    for batch, (before, after) in enumerate(zip(left, right, strict=True)):
        for i in range(q_len):
            own = written - q_len + i
            if before <= own < written - after:
                first = before if window is None else max(before, own - window + 1)
                out[batch, 0, i] = torch.tensor([first, own + 1])
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
) -> AttentionCall:
    """A call with random queries, keys and values: scores have a standard deviation of about 2.

    With `whole_numbers`, all scores are small multiples of 1/2, without rounding, and ties are everywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, _, q_len, _ = intervals.shape

    def states(*shape: int) -> Tensor:
        if whole_numbers:
            return torch.randint(-1, 2, shape, generator=generator).to(dtype)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return AttentionCall(
        states(batch, heads, q_len, dim),
        states(batch, kv_heads, kv_len, dim),
        states(batch, kv_heads, kv_len, value_dim or dim),
        intervals,
        0.5 if whole_numbers else 2 * dim**-0.5,
        softcap,
        torch.randn(heads, generator=generator, dtype=torch.float64).to(dtype) if sinks else None,
        dropout,
    )


def select(selector: str | Selector, call: AttentionCall, budgets: Tensor, config: SparseAttentionConfig) -> Selection:
    """What a selector, built in or not, keeps with the sinks and recent keys of a configuration."""
    return find_selector(selector).select(call, budgets, config.always)


def run_engine(name: str, call: AttentionCall, selection: Selection) -> Tensor:
    """What the engine of that name gives."""
    return engines.attend(engines.find_engine(name), call, selection)


def unavailable(name: str) -> str | None:
    """Why there is no such engine on this machine."""
    engine = engines.find_engine(name)
    return None if engine is None else engine.unavailable_reason()


def turned(states: Tensor) -> Tensor:
    """The same numbers, but those of a key are not next to each other, and behind them lies no number."""
    storage = states.new_full((states.shape[-1] + 1, states.numel() // states.shape[-1]), torch.nan)
    storage[:-1] = states.flatten(0, -2).T
    return storage[:-1].T.view_as(states)


def scores(call: AttentionCall) -> Tensor:
    """Scaled products of queries and keys, `(batch, heads, q_len, kv_len)`, before softcap."""
    key = call.key.repeat_interleave(call.group_size, dim=1)
    return (call.query @ key.transpose(-1, -2)) * call.scaling


def visible_mask(call: AttentionCall) -> Tensor:
    """bool `(batch, heads, q_len, kv_len)` by loops."""
    batch, heads, q_len, _ = call.query.shape
    out = torch.zeros(batch, heads, q_len, call.key.shape[2], dtype=torch.bool)
    for b in range(batch):
        for i in range(q_len):
            first, stop = call.intervals[b, 0, i].tolist()
            out[b, :, i, first:stop] = True
    return out


def attend(call: AttentionCall, mask: Tensor) -> Tensor:
    """Attention under a bool mask `(batch, heads, q_len, kv_len)`, query by query, in float64."""
    all_scores = scores(_double(call))
    values = call.value.double().repeat_interleave(call.group_size, dim=1)
    if call.softcap is not None:
        all_scores = call.softcap * (all_scores / call.softcap).tanh()
    out = torch.zeros(*call.query.shape[:3], call.value.shape[-1], dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in call.query.shape[:3])).tolist():
        kept = mask[b, h, i]
        weights = all_scores[b, h, i, kept].exp()
        total = weights.sum()
        if call.sinks is not None:
            total = total + call.sinks[h].double().exp()
        if kept.any():
            out[b, h, i] = (weights / total) @ values[b, h, kept]
    return out


def select_topk(call: AttentionCall, budgets: Tensor, sink_keys: int, recent_keys: int) -> Tensor:
    """The specification of the exact selector, by sorting: bool `(batch, heads, q_len, kv_len)`."""
    all_scores = scores(call)
    budgets = budgets.expand(call.query.shape[:3])
    out = torch.zeros(all_scores.shape, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in call.query.shape[:3])).tolist():
        first, stop = call.intervals[b, 0, i].tolist()
        best = sorted(range(first, stop), key=lambda j: (-all_scores[b, h, i, j].item(), -j))
        order = [*range(stop - 1, max(first, stop - recent_keys) - 1, -1), *range(first, min(stop, first + sink_keys))]
        order += best
        out[b, h, i, list(dict.fromkeys(order))[: budgets[b, h, i]]] = True
    return out


def select_window(call: AttentionCall, budgets: Tensor, sink_keys: int, recent_keys: int) -> Tensor:
    """The specification of the window selector: bool `(batch, heads, q_len, kv_len)`."""
    budgets = budgets.expand(call.query.shape[:3])
    out = torch.zeros(*call.query.shape[:3], call.key.shape[2], dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in call.query.shape[:3])).tolist():
        first, stop = call.intervals[b, 0, i].tolist()
        order = [*range(stop - 1, max(first, stop - recent_keys) - 1, -1), *range(first, min(stop, first + sink_keys))]
        order += range(stop - 1, first - 1, -1)
        out[b, h, i, list(dict.fromkeys(order))[: budgets[b, h, i]]] = True
    return out


def _highest(values: Tensor, positions: Tensor, number: int) -> Tensor:
    """The `number` positions with the highest values; of equal ones the most recent."""
    best = sorted(positions.tolist(), key=lambda j: (-values[j].item(), -j))
    return torch.tensor(best[:number], dtype=torch.int64)


def select_grouped(
    call: AttentionCall,
    budgets: Tensor,
    sink_keys: int,
    recent_keys: int,
    size: int,
    exp2: Callable[[Tensor], Tensor] = torch.exp2,
) -> Tensor:
    """The specification of the grouped selector: bool `(batch, heads, q_len, kv_len)`.

    Args:
        call: Queries that form groups of `size`.
        budgets: int64 `(batch, heads or 1, q_len)`.
        sink_keys: As in the configuration.
        recent_keys: The same.
        size: Queries in a group.
        exp2: What weights are formed with: `torch.exp2`, or `rough_exp2`.
    """
    out = torch.zeros(*call.query.shape[:3], call.key.shape[2], dtype=torch.bool)
    budgets = budgets.expand(call.query.shape[:3])
    for b in range(len(out)):
        for start in range(0, call.query.shape[2], size):
            queries = [i for i in range(start, start + size) if call.visible[b, i] > 0]
            for kv_head in range(call.key.shape[1] if queries else 0):
                heads = range(kv_head * call.group_size, (kv_head + 1) * call.group_size)
                pairs = [(head, i) for head in heads for i in queries]
                _share(call, budgets, sink_keys, recent_keys, b, pairs, exp2, out)
    return out


def _share(
    call: AttentionCall,
    budgets: Tensor,
    sink_keys: int,
    recent_keys: int,
    b: int,
    pairs: list[tuple[int, int]],
    exp2: Callable[[Tensor], Tensor],
    out: Tensor,
) -> None:
    """What the pairs of one group keep."""
    seen = {i: call.intervals[b, 0, i].tolist() for _, i in pairs}
    last = max(stop for _, stop in seen.values())
    past_start = min(max(first for first, _ in seen.values()) + sink_keys, last)
    past_stop = max(min(stop for _, stop in seen.values()) - max(1, recent_keys), past_start)
    past = range(past_start, past_stop)
    importance = torch.zeros(call.key.shape[2], dtype=torch.float64)
    if past:
        key = call.key[b, pairs[0][0] // call.group_size]
        if call.softcap is None:  # a weight does not depend on what all keys have in common
            start, stop = int(call.text_start[b]), int(call.text_stop[b])
            key = key - key[start : min(start + CENTRED, stop)].mean(0)
        key = rounded(mixed(key), 7)
        for head, i in pairs:
            scores = key @ rounded(mixed(call.query[b, head, i] * call.scaling), 63)
            if call.softcap is not None:
                scores = call.softcap * (scores / call.softcap).tanh()
            importance[past.start : past.stop] += _weights(scores / math.log(2), seen[i], past, exp2)
    best = _highest(importance, torch.arange(past_start, past_stop), len(past)).tolist()
    for head, i in pairs:
        first, stop = seen[i]
        recent = range(stop - 1, stop - 1 - recent_keys, -1)
        order = [*recent, *range(first, first + sink_keys), *range(stop - 1, past_stop - 1, -1), *best]
        order += range(first, past_start)
        order = (j for j in dict.fromkeys(order) if first <= j < stop)
        out[b, head, i, list(islice(order, int(budgets[b, head, i])))] = True


def _weights(scores: Tensor, seen: list[int], past: range, exp2: Callable[[Tensor], Tensor]) -> Tensor:
    """The attention weights of one pair for the keys of the past, by scores to the base 2.

    Of a long past, the keys of every window stand for all of it in the sum that weights are relative to. As that is an
    estimate, no weight counts for more than 1.
    """
    of_past = scores[past.start : past.stop]
    looked_at = of_past
    if len(past) > PERIOD:
        looked_at = torch.cat([of_past[start : start + WINDOW] for start in range(0, len(past), PERIOD)])
    near = torch.cat([scores[seen[0] : past.start], scores[past.stop : seen[1]]])
    most = torch.cat([near, looked_at]).max().ceil()
    total = exp2(near - most).sum() + exp2(looked_at - most).sum() * len(past) / len(looked_at)
    return exp2((of_past - most - total.log2()).clamp(max=0))


def rough_exp2(x: Tensor) -> Tensor:
    """2^x, on a straight line between any two powers of two (Schraudolph, 1999)."""
    return x.floor().exp2() * (1 + x - x.floor())


def mixed(states: Tensor) -> Tensor:
    """Vectors times an orthogonal matrix of two equal rows of Hadamard matrices, one of them with its signs changed."""
    return states.double() @ _mixing(states.shape[-1]).T


@cache
def _mixing(dim: int) -> Tensor:
    half = dim // 2
    size = half & -half
    index = torch.arange(half)
    shared = (index[:, None] & index) % size
    signs = torch.tensor([(-1.0) ** bin(i).count("1") for i in range(size)], dtype=torch.float64)[shared]
    blocks = signs * (index[:, None] // size == index // size)
    return torch.cat([torch.cat([blocks, blocks], 1), torch.cat([blocks, -blocks], 1)]) / (2 * size) ** 0.5


def rounded(states: Tensor, most: int) -> Tensor:
    """Vectors as they are after rounding to whole numbers up to `most`, with a scale of their own, in float64."""
    scale = (states.double().abs().amax(-1, keepdim=True) / most).clamp(min=1e-30)
    return (states / scale).round() * scale


def random_selection(call: AttentionCall, queries_per_group: int, per_head: bool, seed: int = 0) -> Selection:
    """A selection of visible keys without rhyme or reason: shuffled candidates, each allowed to some pairs."""
    generator = torch.Generator().manual_seed(seed)
    batch, q_len = call.query.shape[0], call.query.shape[2]
    kv_heads, kv_len = call.key.shape[1:3]
    groups = q_len // queries_per_group * (call.group_size if per_head else 1)
    order = torch.rand(batch, kv_heads, groups, kv_len, generator=generator).argsort(-1)
    # The same candidates once more, as padding that is never allowed.
    positions = torch.cat([order, order[..., :3]], dim=-1)
    shell = Selection(positions, positions[..., None, :] < 0, queries_per_group, per_head)
    visible = shell.pairs_of(visible_mask(call), kv_heads)
    visible = visible.gather(-1, positions[..., None, :].expand(*visible.shape[:-1], -1))
    wanted = torch.rand(visible.shape, generator=generator) < 0.5
    wanted[..., kv_len:] = False
    return Selection(positions, visible & wanted, queries_per_group, per_head)


def _double(call: AttentionCall) -> AttentionCall:
    return replace(call, query=call.query.double(), key=call.key.double())
