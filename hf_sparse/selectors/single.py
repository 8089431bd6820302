"""The grouped selector for a single row, as in decoding: what a token costs must not grow with all the keys before it.

The row looks at summaries of blocks of keys, scores the keys of the most promising blocks, and keeps the best of
those. Among very many blocks it first looks at super-blocks in the same way. The summaries are kept from token to
token by the cache. What is left to do for every key is to have been summarised once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_sparse.config import SparseAttentionConfig
from hf_sparse.selection import AttentionInputs, Selection, accurate, take_rows
from hf_sparse.selectors import coarse
from hf_sparse.selectors.topk import largest_alike, ranked
from hf_sparse.summaries import BLOCK

Numbers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

OVERSAMPLING = 4
"""Keys that survive the look at blocks, for each key that is wanted: as in `hf_sparse.selectors.coarse`."""

COARSE_FROM: int | None = 2048
"""Visible keys from which on a single row looks at blocks of keys first; `None`: it scores every key exactly."""

SUPERS_FROM = 1 << 18
"""Visible keys from which on it looks at super-blocks before blocks."""

# Blocks that survive the look at super-blocks, for each block that is wanted.
_BLOCKS_OVERSAMPLING = 4

# Standard deviations above its mean at which a super-block's best key is expected: as for blocks, of 256 keys.
_SUPER_SPREAD = 2.4

# The score of a column that is not there. Infinity would make NaN of a row that sees nothing.
_LOWEST = -1e30


@dataclass(frozen=True)
class _Row:
    """Where the one row of each sequence looks for keys: columns and blocks, int64 `(batch,)` on the CPU.

    The first keys up to `head_stop` and those from `tail_start` on are scored in any case; between them lie the
    blocks `[low_block, high_block)`, of which `take` `(batch, kv_heads or 1)` survive.
    """

    origin: Numbers
    first: Numbers
    stop: Numbers
    head_stop: Numbers
    tail_start: Numbers
    low_block: Numbers
    high_block: Numbers
    take: Numbers


@dataclass(frozen=True)
class _Search:
    """What is known before any score is: the same for all layers with the same law.

    Attributes:
        budgets: The budgets that this was made for.
        row: Where to look.
        columns: Columns that are scored in any case, int64 `(batch, kv_heads, width)`: older ones beside the blocks,
            then sinks and local keys.
        valid: bool, of the same shape: which of them are there; `None` if all are.
        own: bool `(batch, kv_heads, share, sinks and local keys)`: which of the latter each head keeps.
        room: Older keys that are wanted, int64 `(batch, kv_heads)`, or one number if that is the same for all heads.
        limit: Older keys that each head may keep, int64 `(batch, kv_heads or 1, share or 1, 1)`.
    """

    budgets: Tensor
    row: _Row
    columns: Tensor
    valid: Tensor | None
    own: Tensor
    room: Tensor | int
    limit: Tensor


@torch.no_grad()
def select_single(inputs: AttentionInputs, budgets: Tensor, config: SparseAttentionConfig) -> Selection:
    """Give the row its recent keys, its sinks, and the best of the other keys in the blocks that survive.

    The heads of a GQA group rank keys together, as the rows of a group do in `select_grouped`.

    Args:
        inputs: One query row.
        budgets: int64 `(batch, heads or 1, 1)`, on any device.
        config: For `sink_keys` and `recent_keys`.
    """
    batch, heads, _, dim = inputs.query.shape
    kv_heads = inputs.key.shape[1]
    share = heads // kv_heads
    device = inputs.query.device
    search = _search(inputs, budgets, config)
    columns, valid, number = search.columns, search.valid, search.own.shape[-1]
    members = inputs.query.reshape(batch, kv_heads, share, dim).to(accurate(inputs.query.dtype)) * inputs.scaling
    scores = _scores(members, inputs.key, columns)
    if valid is not None:
        scores = scores.masked_fill(~valid[:, :, None], _LOWEST)

    if search.row.take.any():
        total = scores[..., scores.shape[-1] - number :].logsumexp(-1, keepdim=True)
        blocks, survives = _surviving_blocks(members, inputs, total, search.row)
        start = torch.from_numpy(search.row.origin).to(device)[:, None, None] + blocks * BLOCK
        older = (start[..., None] + torch.arange(BLOCK, device=device)).flatten(2)
        if survives is not None:
            older = older.clamp_(max=inputs.key.shape[2] - 1)
        older_scores = _scores(members, inputs.key, older)
        if survives is not None or valid is not None:
            count = torch.ones_like(older, dtype=torch.bool)
            if survives is not None:
                count = survives.repeat_interleave(BLOCK, dim=-1)
                older_scores = older_scores.masked_fill(~count[:, :, None], _LOWEST)
            valid = torch.cat([count, torch.ones_like(columns, dtype=torch.bool) if valid is None else valid], dim=-1)
        columns = torch.cat([older, columns], dim=-1)
        scores = torch.cat([older_scores, scores], dim=-1)

    # The group ranks the older keys by the weight that its heads give them, of all that they were scored for.
    middle = columns.shape[-1] - number
    votes = scores.softmax(-1)[..., :middle].sum(2)
    if valid is not None:
        votes = votes.masked_fill(~valid[..., :middle], -torch.inf)
    if isinstance(search.room, int):
        best = largest_alike(votes, search.room)
        chosen = torch.ones((), dtype=torch.bool, device=device).expand(*best.shape[:2], share, best.shape[-1])
    else:
        best, taken = ranked(votes, search.room)
        chosen = (taken[:, :, None] & (taken.cumsum(-1)[:, :, None] <= search.limit)).expand(-1, -1, share, -1)
    certain = torch.arange(middle, middle + number, device=device)
    best = torch.cat([best, certain.expand(batch, kv_heads, -1)], dim=-1)
    return Selection(
        columns.gather(-1, best)[:, :, None],
        torch.cat([chosen, search.own], dim=-1)[:, :, None],
        rows_per_group=1,
        per_head=False,
        scores=scores.gather(-1, best[:, :, None].expand(-1, -1, share, -1))[:, :, None],
    )


def _search(inputs: AttentionInputs, budgets: Tensor, config: SparseAttentionConfig) -> _Search:
    """The search for this call: made by the first of the layers that share it."""
    shared = inputs.facts.shared
    constants = (COARSE_FROM, OVERSAMPLING)
    key = (config, inputs.query.shape[1], inputs.key.shape[1:3], inputs.query.device, constants)
    known = shared.get(key)
    if inputs.origin is None and isinstance(known, _Search) and known.budgets is budgets:
        return known
    shared[key] = search = _make_search(inputs, budgets, config)
    return search


def _make_search(inputs: AttentionInputs, budgets: Tensor, config: SparseAttentionConfig) -> _Search:
    batch, heads = inputs.query.shape[:2]
    kv_heads, kv_len = inputs.key.shape[1:3]
    share = heads // kv_heads
    device = inputs.query.device
    first, stop = (x[:, 0].numpy() for x in (inputs.facts.first, inputs.facts.stop))

    # Sinks and local keys are certain, as far as the budget goes; `rest` is left for older keys.
    budget = budgets[..., 0].cpu().numpy()
    sinks = np.minimum(budget - np.minimum(budget, config.recent_keys), config.sink_keys)
    low = np.maximum(stop - max(1, config.recent_keys), first)
    own_sinks = np.minimum(sinks, (low - first)[:, None])
    own_local = np.minimum(budget - sinks, (stop - low)[:, None])
    rest = budget - own_sinks - own_local
    by_group = rest.reshape(batch, -1, share if rest.shape[1] > 1 else 1)
    room = by_group.max(-1)
    row = _look_where(inputs, first, stop, low, room, config.sink_keys)
    place, seen, is_own = _columns_in_any_case(row, low, own_sinks, own_local, config.sink_keys)
    own = torch.from_numpy(is_own.reshape(batch, *by_group.shape[1:], -1)).to(device)
    return _Search(
        budgets,
        row,
        torch.from_numpy(place.clip(0, kv_len - 1)).to(device)[:, None].expand(-1, kv_heads, -1),
        None if seen.all() else torch.from_numpy(seen).to(device)[:, None].expand(-1, kv_heads, -1),
        own.expand(-1, kv_heads, share, -1),
        int(room.flat[0])
        if (by_group == room.flat[0]).all()
        else torch.from_numpy(room).to(device).expand(batch, kv_heads),
        torch.from_numpy(by_group).to(device)[..., None],
    )


def _columns_in_any_case(
    row: _Row, low: Numbers, own_sinks: Numbers, own_local: Numbers, sink_keys: int
) -> tuple[Numbers, Booleans, Booleans]:
    """Columns that are scored whichever blocks survive: older keys beside the blocks, then sinks, then local keys.

    Returns:
        The columns, `(batch, width)`; which of them are there for this sequence, of the same shape; and which of the
        sinks and local keys, the last columns, each head keeps: `(batch, heads or 1, sinks and local keys)`.
    """
    sinks_stop = np.minimum(row.first + sink_keys, low)
    # From the left in each sequence, or from the right: sequences may differ in how many there are.
    before = sinks_stop[:, None] + np.arange(_width(row.head_stop - sinks_stop))
    after = low[:, None] + np.arange(-_width(low - row.tail_start), 0)
    sinks = row.first[:, None] + np.arange(_width(sinks_stop - row.first))
    local = row.stop[:, None] + np.arange(-_width(row.stop - low), 0)
    seen = [
        before < row.head_stop[:, None],
        after >= row.tail_start[:, None],
        sinks < sinks_stop[:, None],
        local >= low[:, None],
    ]
    own = [
        sinks[:, None] < (row.first[:, None] + own_sinks)[..., None],
        local[:, None] >= (row.stop[:, None] - own_local)[..., None],
    ]
    return (
        np.concatenate([before, after, sinks, local], axis=1),
        np.concatenate(seen, axis=1),
        np.concatenate(own, axis=-1),
    )


def _look_where(
    inputs: AttentionInputs, first: Numbers, stop: Numbers, low: Numbers, room: Numbers, sink_keys: int
) -> _Row:
    """Which blocks lie wholly between the sinks and the local keys, and how many of them are to survive."""
    if inputs.origin is None:
        origin = np.where(stop > first, first, inputs.key.shape[2] - 1)
    else:
        origin = inputs.origin.cpu().numpy()
    begin = np.minimum(first + sink_keys, low)
    low_block = -(-(begin - origin) // BLOCK)
    high_block = np.maximum((low - origin) // BLOCK, low_block)
    take = -(-OVERSAMPLING * room // BLOCK)
    # Where all would survive, there is no need to look at them first.
    looks = (take.max(1) < high_block - low_block) & (COARSE_FROM is not None) & (stop - first >= (COARSE_FROM or 0))
    return _Row(
        origin,
        first,
        stop,
        head_stop=np.where(looks, origin + low_block * BLOCK, low),
        tail_start=np.where(looks, origin + high_block * BLOCK, low),
        low_block=np.where(looks, low_block, 0),
        high_block=np.where(looks, high_block, 0),
        take=take * looks[:, None],
    )


def _surviving_blocks(
    members: Tensor, inputs: AttentionInputs, certain: Tensor, row: _Row
) -> tuple[Tensor, Tensor | None]:
    """The most promising blocks, int64 `(batch, kv_heads, width)`, rising, and which of them count if not all do."""
    low, high = row.low_block, row.high_block
    summaries, origins, stop = inputs.own_summaries, row.origin.tolist(), inputs.facts.last_visible
    mean, variance = summaries.blocks(inputs.key, origins, stop, int(high.max()))
    low_super, high_super = -(-low // BLOCK), high // BLOCK
    take_supers = -(-_BLOCKS_OVERSAMPLING * row.take // BLOCK)
    if (row.stop - row.first).max() < SUPERS_FROM or (take_supers.max(1) >= high_super - low_super).any():
        base = int(low.min())
        scores = coarse.expected_scores(members, mean[:, :, base:], variance[:, :, base:])
        valid = _within(np.arange(base, int(high.max())), low, high, members.device)
        place, survives = _best(scores, certain, valid, row.take)
        return place + base, survives

    base = int(low_super.min())
    means, variances = summaries.supers(inputs.key, origins, stop, int(high_super.max()))
    scores = coarse.expected_scores(
        members, means[:, :, base:], variances[:, :, base:], size=BLOCK * BLOCK, spread=_SUPER_SPREAD
    )
    valid = _within(np.arange(base, int(high_super.max())), low_super, high_super, members.device)
    supers, survives = _best(scores, certain, valid, take_supers)

    # The blocks of those, and the ones beside the super-blocks that lie wholly inside.
    device, kv_heads = members.device, members.shape[1]
    inner = ((supers + base)[..., None] * BLOCK + torch.arange(BLOCK, device=device)).flatten(2)
    left = low[:, None] + np.arange(_width(low_super * BLOCK - low))
    right = high[:, None] + np.arange(-_width(high - high_super * BLOCK), 0)
    edges = np.concatenate([left, right], axis=1)
    seen = np.concatenate([left < (low_super * BLOCK)[:, None], right >= (high_super * BLOCK)[:, None]], axis=1)
    edge_blocks = torch.from_numpy(edges.clip(0, int(high.max()) - 1)).to(device)[:, None].expand(-1, kv_heads, -1)
    blocks = torch.cat([edge_blocks[..., : left.shape[1]], inner, edge_blocks[..., left.shape[1] :]], dim=-1)
    known = None
    if survives is not None or not seen.all():
        edge_known = torch.from_numpy(seen).to(device)[:, None].expand(-1, kv_heads, -1)
        inner_known = torch.ones_like(inner, dtype=torch.bool)
        if survives is not None:
            inner_known = survives.repeat_interleave(BLOCK, dim=-1)
        known = torch.cat([edge_known[..., : left.shape[1]], inner_known, edge_known[..., left.shape[1] :]], dim=-1)
    scores = coarse.expected_scores(members, take_rows(mean, blocks), take_rows(variance, blocks))
    place, survives = _best(scores, certain, known, row.take)
    return blocks.gather(-1, place), survives


def _best(scores: Tensor, certain: Tensor, valid: Tensor | None, take: Numbers) -> tuple[Tensor, Tensor | None]:
    """Places of the `take` best, rising, `(batch, kv_heads, width)`, and which of them count if not all do.

    Args:
        scores: `(batch, kv_heads, share, length)`.
        certain: `(batch, kv_heads, share, 1)`: log of the summed exponentials of the scores of keys that are certain.
        valid: bool `(batch, kv_heads or 1, length)`, or `None` if all are.
        take: `(batch, kv_heads or 1)`, at most the valid ones.
    """
    if valid is not None:
        scores = scores.masked_fill(~valid[:, :, None], -torch.inf)
    width = int(take.max())
    # By the weight that the heads of a group give them, relative to all that a head attends to.
    place = torch.cat([scores, certain], dim=-1).softmax(-1)[..., :-1].sum(2).topk(width, dim=-1).indices
    if (take == width).all():
        return place.sort(dim=-1).values, None
    number = torch.from_numpy(take).to(place.device)
    survives = (torch.arange(width, device=place.device) < number[..., None]).expand_as(place)
    place, order = place.sort(dim=-1)
    return place, survives.gather(-1, order)


def _scores(members: Tensor, key: Tensor, columns: Tensor) -> Tensor:
    """`(batch, kv_heads, share, width)` for the keys at `columns` `(batch, kv_heads, width)`."""
    return members @ take_rows(key, columns).to(members.dtype).transpose(-1, -2)


def _within(index: Numbers, low: Numbers, high: Numbers, device: torch.device) -> Tensor | None:
    """bool `(batch, 1, length)`: which of `index` lie in `[low, high)`; `None` if all do."""
    inside = (index >= low[:, None]) & (index < high[:, None])
    return None if inside.all() else torch.from_numpy(inside).to(device)[:, None]


def _width(lengths: Numbers) -> int:
    return max(0, int(lengths.max()))
