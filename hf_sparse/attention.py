"""The attention function that a patched model calls: visibility -> budget -> selector -> engine -> counters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from hf_sparse import engines, selectors
from hf_sparse.call import AttentionCall
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.engines import dense
from hf_sparse.engines.reference import masked_weights, weighted_values
from hf_sparse.kernels.quantised import quantised_of
from hf_sparse.laws import Budget
from hf_sparse.monitor import LayerCounters
from hf_sparse.rows import Plan
from hf_sparse.selectors.grouped import ROWS, uncompiled
from hf_sparse.selectors.spans import OVERSAMPLING
from hf_sparse.visibility import as_bool, interval_mask, interval_to_mask, intervals_of, is_intervals

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

# Elements of scores that a block of rows may form: rows x heads x columns scored.
_BLOCK_ELEMENTS = 1 << 23
_MOST_ROWS = 1024

Observer = Callable[[int, AttentionCall], None]


@dataclass
class LayerState:
    """What a patched attention module knows.

    Attributes:
        layer: Index of the layer.
        config: The patch's configuration.
        dense: Why the whole layer runs dense, or `None`.
        counters: What the layer did so far.
        observer: Called with every call's inputs before anything else, or `None`.
        fitted_to: Most visible keys that the laws were fitted on; the first row that sees more warns. `None` for no
            limit.
    """

    layer: int
    config: SparseAttentionConfig
    dense: str | None = None
    counters: LayerCounters = field(default_factory=LayerCounters)
    observer: Observer | None = None
    fitted_to: int | None = None
    _table: Tensor | None = None

    @cached_property
    def law(self) -> Budget:
        """The budget of this layer: one object for all layers with the same one."""
        return _same(self.config.budget(self.layer))

    def table(self, longest: int) -> Tensor:
        """Kept keys for any number of visible keys up to `longest`: int64 `(heads or 1, longest + 1 or more)`."""
        if self._table is None or self._table.shape[-1] <= longest:
            table = self.law.table(1 << longest.bit_length())
            self._table = table.view(-1, table.shape[-1])
        return self._table

    def warn_beyond_fit(self, visible: int) -> None:
        """Say, once, that a row sees more keys than the laws were fitted on."""
        if self.fitted_to is None or visible <= self.fitted_to:
            return
        warnings.warn(
            f"a row sees {visible:,} keys, {visible / self.fitted_to:.3g} times the {self.fitted_to:,} that the laws "
            "were fitted on at most: beyond that, their quality was not measured",
            UserWarning,
            stacklevel=2,
        )
        self.fitted_to = None


@lru_cache
def _same(law: Budget) -> Budget:
    return law


@torch.compiler.disable  # type: ignore[untyped-decorator]
def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the signature that transformers' models call.

    Args:
        module: The attention module; patched, so that it has a `LayerState`.
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, kv_heads, kv_len, head_dim)`.
        value: `(batch, kv_heads, kv_len, value_dim)`.
        attention_mask: From `interval_mask`, or a user's own 4-D mask.
        scaling: Factor of the scores; 1 / sqrt(head_dim) if `None`.
        dropout: Probability of dropping a weight.
        softcap: Soft cap of the scores.
        s_aux: `(heads,)` attention-sink logits.
        **kwargs: What else models pass. `output_attentions=True` returns the weights, at n x n cost.

    Returns:
        `(batch, q_len, heads, value_dim)`, and the weights `(batch, heads, q_len, kv_len)` or `None`.

    Raises:
        RuntimeError: If the module was not patched, or no mask reached it.
        ValueError: For an argument in `REFUSED`.
    """
    state: LayerState | None = getattr(module, STATE, None)
    if state is None:
        raise RuntimeError(
            f"{type(module).__name__} uses the attention implementation {NAME!r} without having been patched: "
            "load the model as usual and call hf_sparse.patch(model)"
        )
    for name in REFUSED & kwargs.keys():
        if kwargs[name] is not None:
            raise ValueError(f"{type(module).__name__} passes {name!r} to its attention, which hf_sparse cannot honour")
    if attention_mask is None:
        raise RuntimeError(
            f"no mask reached {type(module).__name__} (layer {state.layer}): without it, causality and padding would "
            "be lost. The model does not build its masks through transformers' mask interface, or the mask function "
            f"{NAME!r} is no longer registered"
        )
    intervals = _intervals(attention_mask, query, key)
    if intervals is None and not (attention_mask.dtype == torch.bool or attention_mask.is_floating_point()):
        raise ValueError(
            f"attention_mask of 4 dimensions must be bool (True where visible) or floating point (added to scores); "
            f"got {str(attention_mask.dtype).removeprefix('torch.')}"
        )
    inputs = AttentionCall(
        query,
        key,
        value,
        query.new_empty(0, dtype=torch.int32) if intervals is None else intervals,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap,
        s_aux,
        dropout if module.training else 0.0,
    )
    want_weights = bool(kwargs.get("output_attentions"))
    if intervals is None:
        out, weights = _attend_masked(state, inputs, attention_mask[..., : key.shape[2]], want_weights=want_weights)
    else:
        if state.observer is not None:
            state.observer(state.layer, inputs)
        out, weights = attend(state, inputs, want_weights=want_weights)
    return out.transpose(1, 2).contiguous(), weights


def _intervals(mask: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
    """Intervals of the rows, int32 `(batch, 1, q_len, 2)`, or `None` if the mask is not made of intervals."""
    if is_intervals(mask):
        return mask
    intervals = intervals_of(mask[..., : key.shape[2]])
    return None if intervals is None else intervals.to(torch.int32)[:, None].expand(query.shape[0], 1, -1, -1)


def _attend_masked(
    state: LayerState, inputs: AttentionCall, mask: Tensor, *, want_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Dense attention under a mask that intervals cannot express, counted as such."""
    visible = as_bool(mask)
    heads, rows = inputs.query.shape[1:3]
    seen = mask.new_full((inputs.query.shape[0], rows), inputs.key.shape[2], dtype=torch.int64)
    if visible is not None:
        seen = visible[:, 0].sum(-1).expand_as(seen)
    alive = int((seen > 0).sum())
    state.counters.count(alive, int(seen.sum()), heads, {"mask is not an interval": alive})
    weights = masked_weights(inputs, visible) if want_weights and visible is not None else None
    return dense.attend_masked(inputs, mask), weights


def attend(state: LayerState, inputs: AttentionCall, *, want_weights: bool = False) -> tuple[Tensor, Tensor | None]:
    """One attention call of one layer, a block of rows at a time, counted.

    Args:
        state: The layer's configuration and counters.
        inputs: The whole call.
        want_weights: Whether to form and return the attention weights, at n x n cost.

    Returns:
        `(batch, heads, q_len, value_dim)`, and the weights `(batch, heads, q_len, kv_len)` or `None`.
    """
    heads, rows = inputs.query.shape[1:3]
    facts = inputs.facts
    if facts.last_visible > inputs.key.shape[2]:
        raise ValueError(
            f"the mask lets rows see {facts.last_visible} keys, but layer {state.layer} has {inputs.key.shape[2]}: a "
            "cache whose layers differ in length is not supported"
        )
    state.warn_beyond_fit(facts.most_visible)
    plan = None if state.dense is not None else facts.plan(state.law, state.table)
    if plan is None or plan.dense:
        reasons = {state.dense: facts.rows} if state.dense is not None else plan.dense_rows if plan is not None else {}
        state.counters.count(facts.rows, facts.total, heads, reasons)
        if not want_weights:
            return dense.attend(inputs), None
        mask = interval_to_mask(inputs.intervals, inputs.key.shape[2])
        weights = masked_weights(inputs, mask)
        return weighted_values(inputs, weights), weights

    budgets, shift, parts, weight_parts, kept = plan.budgets, None, [], [], []
    padded = inputs
    if state.config.selector == "grouped":
        if reason := uncompiled(inputs, state.config):
            state.counters.uncompiled[reason] += 1
        padded = replace(inputs, quantised=quantised_of(inputs.key))
        if rows > 1 and not want_weights and (start := _dense_rows(inputs, plan)):
            parts.append(dense.attend(inputs.rows(0, start).visible_part()))
            kept.append(facts.visible[:, None, :start].expand(-1, heads, -1))
            padded, budgets, rows = padded.rows(start, rows), budgets[..., start:], rows - start
        if rows > 1:
            padded, budgets, shift = _align(padded, budgets)
        else:
            # The last row, also where all rows before it were dense.
            budgets = plan.host[..., -1:]
    sparse_parts: list[Tensor] = []
    step = _block_rows(padded, state.config.selector, plan.most)
    for start in range(0, padded.query.shape[2], step):
        block = padded if rows == 1 else padded.rows(start, min(padded.query.shape[2], start + step))
        with _as_given(inputs):
            selection = selectors.select(
                state.config.selector, block, budgets[:, :, start : start + step], state.config
            )
            kept.append(selection.kept(heads))
            if want_weights:
                weights = masked_weights(block, selection.mask(heads, inputs.key.shape[2]))
                weight_parts.append(weights)
                sparse_parts.append(weighted_values(block, weights))
            else:
                sparse_parts.append(engines.attend(_engine(state.config, block), block, selection))
    state.counters.count(facts.rows, facts.total, heads, plan.dense_rows, kept)
    outs = [_joined(x) for x in (sparse_parts, weight_parts)]
    if shift is not None:
        outs = [None if x is None else _unalign(x, shift, rows) for x in outs]
    assert outs[0] is not None
    return torch.cat([*parts, outs[0]], dim=2) if parts else outs[0], outs[1]


def _as_given(inputs: AttentionCall) -> AbstractContextManager[Any]:
    """Selectors and engines take numbers as they are and say themselves how exactly they calculate: no autocast."""
    kind = inputs.query.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _joined(parts: list[Tensor]) -> Tensor | None:
    if len(parts) < 2:
        return parts[0] if parts else None
    return torch.cat(parts, dim=2)


def _dense_rows(inputs: AttentionCall, plan: Plan) -> int:
    """Rows at the start of a call that keep all that they see, in whole groups: dense attention is faster for them."""
    facts = inputs.facts
    if (facts.first != facts.first[:1]).any() or (facts.stop != facts.stop[:1]).any():
        return 0  # The groups of sequences that are padded differently do not end at the same row.
    whole = (plan.host >= (facts.stop - facts.first)[:, None]).all(1).all(0) & (facts.stop[0] > facts.first[0])
    count = int(whole.long().cumprod(0).sum())
    position = int(facts.stop[0, 0] - 1 - facts.first[0].min())
    return max(0, (position + count) // ROWS * ROWS - position)


def _engine(config: SparseAttentionConfig, inputs: AttentionCall) -> str:
    if config.engine != "auto":
        return config.engine
    # The exact selector has formed all scores already, and its rows share no keys: masking costs less than copying
    # keys for each row.
    if config.selector == "topk":
        return "reference"
    if inputs.key.is_cuda:
        return "gather" if engines.refusal("triton", inputs) else "triton"
    return "gather" if engines.refusal("cpu", inputs) else "cpu"


def _block_rows(inputs: AttentionCall, selector: str, most: int) -> int:
    """Rows of a block if no row keeps more than `most` keys."""
    batch, heads = inputs.query.shape[:2]
    kv_len = inputs.key.shape[2]
    # The exact selector scores every key for every row, the grouped one those that a group's pool has room for. (Its
    # votes, where they come from PyTorch, bound what they form by themselves.)
    columns = kv_len if selector == "topk" else max(1024, min(kv_len, OVERSAMPLING * most))
    return min(_MOST_ROWS, max(1, _BLOCK_ELEMENTS // (batch * heads * columns) // ROWS) * ROWS)


def _align(inputs: AttentionCall, budgets: Tensor) -> tuple[AttentionCall, Tensor, Tensor | None]:
    """Shift each sequence so that its groups start at its own first token, wherever padding or a cache put it.

    A group is then the same rows whether a text is alone, padded, in a batch or split over calls.

    Returns:
        Inputs and budgets with empty rows around, a whole number of groups of them if more than one, and the
        shift of each sequence: int64 `(batch,)`; `None` if all is in its place already.
    """
    rows = inputs.query.shape[2]
    first, stop = inputs.intervals[:, 0].long().unbind(-1)
    alive = stop > first
    index = torch.arange(rows, device=first.device)
    # The position of a row in its text is its last visible key, counted from the text's first visible key.
    start = inputs.text_start
    head = torch.where(alive, index, rows).amin(-1).clamp(max=rows - 1)
    position = stop.gather(1, head[:, None])[:, 0] - 1 - start
    shift = (position - head) % ROWS
    length = rows + int(shift.max())
    if length > ROWS:
        length = -(-length // ROWS) * ROWS
    if length == rows and not bool(shift.any()):
        return replace(inputs, origin=start), budgets, None
    source = torch.arange(length, device=first.device) - shift[:, None]
    inside = (source >= 0) & (source < rows)
    source = source.clamp(0, rows - 1)
    query = inputs.query.gather(
        2, source[:, None, :, None].expand(-1, inputs.query.shape[1], -1, inputs.query.shape[3])
    )
    intervals = inputs.intervals.gather(2, source[:, None, :, None].expand(-1, -1, -1, 2)) * inside[:, None, :, None]
    budgets = budgets.gather(2, source[:, None].expand(-1, budgets.shape[1], -1)) * inside[:, None]
    aligned = replace(inputs, query=query, intervals=intervals.to(torch.int32), origin=start)
    return aligned, budgets, shift


def _unalign(rows_out: Tensor, shift: Tensor, rows: int) -> Tensor:
    source = torch.arange(rows, device=shift.device) + shift[:, None]
    return rows_out.gather(2, source[:, None, :, None].expand(-1, rows_out.shape[1], -1, rows_out.shape[3]))


def register() -> None:
    """Make the attention and the mask function known to transformers."""
    AttentionInterface.register(NAME, sparse_attention_forward)
    AttentionMaskInterface.register(NAME, interval_mask)
