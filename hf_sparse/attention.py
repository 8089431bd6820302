"""Attention of a layer of a patched model: visibility -> budget -> selector -> engine -> counters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hf_sparse import engines, selectors
from hf_sparse.cache import SparseLayer, cache_of_pass, layer_that_holds
from hf_sparse.call import AlwaysKept, AttentionCall, align, leading_dense
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.engines import dense
from hf_sparse.engines.common import masked_weights, weighted_values
from hf_sparse.kernels.int8 import Int8States
from hf_sparse.kernels.quantised import QuantisedKeys
from hf_sparse.laws import BudgetPlan, BudgetTable
from hf_sparse.monitor import LayerCounters
from hf_sparse.selectors import Selector, find_selector
from hf_sparse.visibility import VisibleRanges, as_bool, interval_to_mask, is_packed, seen_through

NAME = "hf_sparse"
"""The name under which the attention and the mask function are registered with transformers."""

STATE = "_hf_sparse"
"""The attribute of a patched attention module that holds its `LayerState`."""

HONOURED = frozenset({"dropout", "scaling", "softcap", "s_aux", "sliding_window", "is_causal", "position_ids"})
"""Arguments by which models change their attention and which this function honours (some through the mask)."""

HARMLESS = frozenset(
    {
        "output_attentions",
        "use_cache",
        "attention_mask",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
    }
)
"""Arguments that change nothing here: what they ask for is in the mask, or in what is returned."""

REFUSED = frozenset({"position_bias", "indices", "block_indices", "sinks", "alibi", "head_mask", "attention_bias"})
"""Arguments that change the result in ways this function does not know: refused, never ignored."""

# Elements of scores that a block of queries may form: queries x heads x keys scored.
_BLOCK_ELEMENTS = 1 << 23
_LEAST_QUERIES, _MOST_QUERIES = 64, 2048

# The same on a GPU, which is idle between blocks: one for so many bytes of its memory, a few numbers each.
_BYTES_PER_ELEMENT = 128
_MOST_QUERIES_ON_GPUS = 16_384

_COPIED = "left out keys that padding hides inside a text, and keep a copy of all others"
_ROUNDED_ANEW = "rounded all cached keys to few bits anew: what the model attends to is not what its cache holds"
_DEQUANTIZED = "made plain tensors of keys and values in 8 bits, which the kernels for GPUs do not read"
_UNFUSED = "attended to keys without the fused kernel for GPUs, which copies keys and values"
_UNCOMPILED = "looked for keys without compiled kernels, which is slower than dense attention"


# Of each thread, for several may run one model.
_dense_passes: ContextVar[str | None] = ContextVar("hf_sparse_dense_passes", default=None)


@contextmanager
def dense_passes(reason: str) -> Iterator[None]:
    """A context in which all layers attend to all keys, and count their queries under `reason`."""
    before = _dense_passes.set(reason)
    try:
        yield
    finally:
        _dense_passes.reset(before)


class Observer(Protocol):
    """Sees every call of a layer before the layer does anything with it."""

    def __call__(self, layer: int, call: AttentionCall, /) -> None:
        """Look at a call of the layer of that index."""


# By number, as long as they live.
_states: WeakValueDictionary[int, LayerState] = WeakValueDictionary()
_numbers = count(2)  # A compiler takes 0 and 1 for numbers that never change.


def state_of(handle: int) -> LayerState:
    """What the layer knows whose `LayerState.handle` this is."""
    return _states[handle]


@dataclass(eq=False)
class LayerState:
    """What a patched attention module knows.

    Attributes:
        layer: Index of the layer.
        config: The patch's configuration.
        dense_reason: Why the whole layer runs dense, or `None`.
        counters: What the layer did so far.
        observer: Called with every call before anything else, or `None`.
        fitted_to: Most visible keys that the laws were fitted on; the first query that sees more warns. `None` for no
            limit.
        budgets: Budgets by visible keys, which layers with the same law share.
        handle: Its number, by which `state_of` finds it.
    """

    layer: int
    config: SparseAttentionConfig
    dense_reason: str | None = None
    counters: LayerCounters = field(default_factory=LayerCounters)
    observer: Observer | None = None
    fitted_to: int | None = None
    budgets: BudgetTable = None  # type: ignore[assignment]
    handle: int = field(init=False)

    def __post_init__(self) -> None:
        if self.budgets is None:
            self.budgets = BudgetTable(self.config.budget(self.layer))
        self._register()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._register()  # A copy is another layer.

    def _register(self) -> None:
        self.handle = next(_numbers)
        _states[self.handle] = self

    @cached_property
    def selector(self) -> Selector:
        """The rule that chooses keys."""
        return find_selector(self.config.selector)

    @cached_property
    def engine(self) -> engines.Engine | None:
        """What attends to them; `None` for the fastest that can."""
        return engines.find_engine(self.config.engine)

    @cached_property
    def always(self) -> AlwaysKept:
        """The keys that every query keeps within its budget."""
        return self.config.always

    def plan(self, ranges: VisibleRanges) -> BudgetPlan | None:
        """The budgets of a call; `None` for a layer, or in a pass, that runs dense."""
        return None if self.dense_reason or _dense_passes.get() else self.budgets.plan(ranges)

    def held(self, key: Tensor) -> SparseLayer | None:
        """The layer of the forward pass's cache that holds `key`, if it is one of ours."""
        cache = cache_of_pass()
        return None if cache is None else layer_that_holds(cache, self.layer, key)

    def quantised(self, key: Tensor) -> QuantisedKeys:
        """`key` in few bits as the cache keeps it, or nothing yet."""
        if held := self.held(key):
            return held.quantised
        cache = cache_of_pass()
        if cache is not None and any(isinstance(own, SparseLayer) for own in cache.layers[self.layer :][:1]):
            self.counters.slow[_ROUNDED_ANEW] += 1
        return QuantisedKeys()

    def warn_beyond_fit(self, visible: int) -> None:
        """Say, once, that a query sees more keys than the laws were fitted on."""
        if self.fitted_to is None or visible <= self.fitted_to:
            return
        warnings.warn(
            f"a query sees {visible:,} keys, {visible / self.fitted_to:.3g} times the {self.fitted_to:,} that the laws "
            "were fitted on at most: beyond that, their quality was not measured",
            UserWarning,
            stacklevel=2,
        )
        self.fitted_to = None


def attend_under(
    mask: Tensor,
    state: LayerState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    quantised: QuantisedKeys | None = None,
    held: SparseLayer | None = None,
    want_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One attention call of one layer under the mask that the model passes, counted.

    Args:
        mask: From `interval_mask`, or a user's own 4-D mask.
        state: What the layer knows.
        query: `(batch, heads, q_len, head_dim)`, with what follows as `AttentionCall` has it.
        key: `(batch, kv_heads, kv_len, head_dim)`.
        value: `(batch, kv_heads, kv_len, value_dim)`.
        scaling: Factor of the scores.
        softcap: Soft cap of the scores.
        sinks: `(heads,)` logits of attention sinks.
        dropout: Probability of dropping a weight.
        quantised: The keys in few bits.
        held: The cache layer that holds the keys. It is looked for where `quantised` is `None`.
        want_weights: Whether to form and return the attention weights, at n x n cost.

    Returns:
        `(batch, q_len, heads, value_dim)`, and the weights `(batch, heads, q_len, kv_len)` or `None`.

    Raises:
        ValueError: For a mask of whole numbers.
    """
    if not (is_packed(mask) or mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"attention_mask of 4 dimensions must be bool (True where visible) or floating point (added to scores); "
            f"got {str(mask.dtype).removeprefix('torch.')}"
        )
    seen = seen_through(mask, query.shape[0], query.shape[2], key.shape[2])
    call = AttentionCall(
        query,
        key,
        value,
        query.new_empty(0, dtype=torch.int32) if seen is None else seen.visible.intervals,
        scaling,
        softcap,
        sinks,
        dropout,
        quantised=quantised,
        known_ranges=None if seen is None else seen.ranges,
    )
    if seen is None:
        out, weights = _attend_masked(state, call, mask[..., : key.shape[2]], want_weights=want_weights)
    elif (shown := seen.visible.shown) is None:
        out, weights = attend(state, call, want_weights=want_weights)
    else:
        state.counters.slow[_COPIED] += 1
        out, weights = attend(state, _without_hidden(state, call, shown, held), want_weights=want_weights)
        if weights is not None:
            place = shown[:, None, None].expand_as(weights)
            weights = weights.new_zeros(*weights.shape[:3], key.shape[2]).scatter_add(3, place, weights)
    return out.transpose(1, 2).contiguous(), weights


def _without_hidden(state: LayerState, call: AttentionCall, shown: Tensor, held: SparseLayer | None) -> AttentionCall:
    """The same call with copies of the keys and values at `shown` alone, which the cache keeps where it can."""
    if call.quantised is None and not torch.is_grad_enabled():
        held = state.held(call.key)
    if held is None:
        return call.with_keys(shown)
    key, value, quantised = held.without_hidden(shown, (call.key, call.value))
    return replace(call, key=key, value=value, quantised=quantised)


def _attend_masked(
    state: LayerState, call: AttentionCall, mask: Tensor, *, want_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Dense attention under a mask that intervals cannot express, counted as such."""
    visible = as_bool(mask)
    heads, queries = call.query.shape[1:3]
    seen = mask.new_full((call.query.shape[0], queries), call.key.shape[2], dtype=torch.int64)
    if visible is not None:
        seen = visible[:, 0].view(torch.uint8).sum(-1, dtype=torch.int32).long().expand_as(seen)
    alive = int((seen > 0).sum())
    state.counters.count(alive, int(seen.sum()), heads, {"mask is not an interval": alive})
    weights = masked_weights(call, visible) if want_weights and visible is not None else None
    return dense.attend_masked(call, mask), weights


def attend(state: LayerState, call: AttentionCall, *, want_weights: bool = False) -> tuple[Tensor, Tensor | None]:
    """One attention call of one layer, counted.

    Args:
        state: The layer's configuration and counters.
        call: The whole call.
        want_weights: Whether to form and return the attention weights, at n x n cost.

    Returns:
        `(batch, heads, q_len, value_dim)`, and the weights `(batch, heads, q_len, kv_len)` or `None`.
    """
    if state.observer is not None:
        state.observer(state.layer, call)
    ranges, heads = call.ranges, call.query.shape[1]
    if ranges.last_visible > call.key.shape[2]:
        raise ValueError(
            f"the mask lets queries see {ranges.last_visible} keys, but layer {state.layer} has {call.key.shape[2]}: a "
            "cache whose layers differ in length is not supported"
        )
    state.warn_beyond_fit(ranges.most_visible)
    plan = state.plan(ranges)
    if plan is not None and not plan.dense:
        return _attend_sparsely(state, call, plan, want_weights=want_weights)
    reasons = {str(state.dense_reason or _dense_passes.get()): ranges.queries} if plan is None else plan.dense_queries
    state.counters.count(ranges.queries, ranges.total, heads, reasons)
    if not want_weights:
        return dense.attend(call), None
    weights = masked_weights(call, interval_to_mask(call.intervals, call.key.shape[2]))
    return weighted_values(call, weights), weights


def _attend_sparsely(
    state: LayerState, call: AttentionCall, plan: BudgetPlan, *, want_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention a block of queries at a time: `selector` chooses keys, and `engine` attends to them."""
    selector, ranges = state.selector, call.ranges
    heads, queries = call.query.shape[1:3]
    outs, weights, kept, budgets = [], [], [], plan.budgets
    quantised = call.quantised
    if quantised is None and selector.ranks_quantised:
        quantised = state.quantised(call.key)
    sparse = replace(call, known_ranges=ranges, quantised=quantised)
    if isinstance(call.key, Int8States) and not _read_in_8_bits(call):
        sparse = sparse.dequantized()
        if call.key.is_cuda:
            state.counters.slow[_DEQUANTIZED] += 1
    if queries == 1 and not want_weights:
        with _without_autocast(call):
            out, keys = _decode(state, sparse, budgets)
        state.counters.count(ranges.queries, ranges.total, heads, plan.dense_queries, [keys])
        return out, None
    _count_what_is_slow(state, call)
    size = selector.group_queries
    if size > 1 and not want_weights and (start := leading_dense(call, plan, size)):
        outs.append(dense.attend(call.queries(0, start).visible_part()))
        kept.append(ranges.seen[:, None, :start].expand(-1, heads, -1))
        sparse, budgets = sparse.queries(start, queries), budgets[..., start:]
    aligned = align(sparse, budgets, size)
    length, step = aligned.call.query.shape[2], _block_queries(aligned.call, state, plan.most)
    parts: list[Tensor] = []
    for start in range(0, length, step):
        block = aligned.call if length <= step else aligned.call.queries(start, min(length, start + step))
        with _without_autocast(call):
            selection = selectors.select(selector, block, aligned.budgets[..., start : start + step], state.always)
            kept.append(selection.kept(heads))
            if want_weights:
                weights.append(masked_weights(block, selection.mask(heads, call.key.shape[2])))
                parts.append(weighted_values(block, weights[-1]))
            else:
                parts.append(engines.attend(state.engine, block, selection))
    state.counters.count(ranges.queries, ranges.total, heads, plan.dense_queries, kept)
    outs.append(aligned.restored(_joined(parts)))
    return _joined(outs), aligned.restored(_joined(weights)) if weights else None


def _decode(state: LayerState, call: AttentionCall, budgets: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of single queries, and how many keys each keeps, `(batch, heads or 1, 1)`.

    As for a block of queries, without what only many need: for a decoded token, it would take as long as its attention.
    """
    always = state.always
    if state.engine is None and (out := state.selector.decode(call, budgets, always)) is not None:
        return out, budgets
    _count_what_is_slow(state, call)
    selection = selectors.select(state.selector, call, budgets, always)
    return engines.attend(state.engine, call, selection), selection.kept(call.query.shape[1])


def _count_what_is_slow(state: LayerState, call: AttentionCall) -> None:
    if reason := state.selector.uncompiled_reason(call):
        state.counters.slow[f"{_UNCOMPILED} ({reason})"] += 1
    if state.engine is None and (reason := engines.slow_reason(call)):
        state.counters.slow[f"{_UNFUSED} ({reason})"] += 1


def _read_in_8_bits(call: AttentionCall) -> bool:
    """Whether keys and values in 8 bits are read where they lie. Many queries in bfloat16 go to a CPU's matrix unit."""
    return not call.key.is_cuda and (call.key.dtype != torch.bfloat16 or call.query.shape[2] == 1)


def _without_autocast(call: AttentionCall) -> AbstractContextManager[Any]:
    """Selectors and engines run in the given dtype."""
    kind = call.query.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _joined(parts: list[Tensor]) -> Tensor:
    """Blocks of queries `(batch, heads, q_len, ...)`, in memory with queries before heads, as models want them."""
    return parts[0] if len(parts) == 1 else torch.cat([x.transpose(1, 2) for x in parts], dim=1).transpose(1, 2)


def _block_queries(call: AttentionCall, state: LayerState, most: int) -> int:
    """Queries of a block, whole groups, if no query keeps more than `most` keys."""
    selector = state.selector
    batch, heads = call.query.shape[:2]
    whole = selector.group_queries * -(-_LEAST_QUERIES // selector.group_queries)
    elements, queries = _BLOCK_ELEMENTS, _MOST_QUERIES
    if call.key.is_cuda:
        memory = torch.cuda.get_device_properties(call.key.device).total_memory
        elements, queries = memory // _BYTES_PER_ELEMENT, _MOST_QUERIES_ON_GPUS
    scored = selector.scored_keys(call, most)
    if state.engine is not None and not call.key.is_cuda:
        scored = max(scored, most)  # What an engine forms that was chosen by name is not known.
    fit = elements // (batch * heads * max(1, scored))
    return min(max(1, queries // whole), max(1, fit // whole)) * whole
