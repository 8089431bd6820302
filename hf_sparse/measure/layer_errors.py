"""Attention errors of one layer, measured a block of queries and a key head at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hf_sparse.call import AttentionCall
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.diagnostics import DenseBlock, concentration, query_errors
from hf_sparse.results import DENSE
from hf_sparse.selectors import find_selector
from hf_sparse.selectors.grouped import GROUP_QUERIES
from hf_sparse.visibility import interval_to_mask

Columns = dict[str, list[float]]

WORST = 0.01
"""Share of the queries that counts as the worst."""

_Values = dict[tuple[str, str], Tensor]  # (method, metric) -> (batch, heads, queries)


def layer_errors(
    layer: int, inputs: AttentionCall, start: int, stop: int, methods: Mapping[str, SparseAttentionConfig]
) -> dict[str, Columns]:
    """Measure queries `start` to `stop` of a layer with every method.

    Args:
        layer: Index of the layer, for laws calibrated per layer.
        inputs: The attention call of one sequence, all of its queries.
        start: First query; a multiple of `block_queries(methods)`.
        stop: Query after the last.
        methods: Configurations by name. Of each its selector, `sink_keys`, `recent_keys` and budget law are used, or
            all keys if it names the layer in `dense_layers`.

    Returns:
        For each method, and for `"dense"`, one list over the query heads by name:

        - `visible`, `kept`: mean keys that a query sees and keeps; `density`: their ratio;
        - of each metric of `query_errors` (for `"dense"`, of `concentration`) the `<metric>_mean` over the queries, and
          `<metric>_worst`, the mean of the worst 1 % of them, one at least. Worst is the lowest retained mass and
          the highest of anything else;
        - `frobenius`: the Frobenius norm of the error in the measured part of the attention matrix.

        Padding counts nowhere.
    """
    size = block_queries(methods)
    blocks = [_block_values(layer, inputs.queries(i, min(i + size, stop)), methods) for i in range(start, stop, size)]
    visible = inputs.visible[:, start:stop].flatten().cpu()
    seen = visible > 0
    mean_visible = visible[seen].double().mean().item()
    out: dict[str, Columns] = {}
    for method, metric in blocks[0]:
        values = torch.cat([block[method, metric] for block in blocks], dim=2)
        per_head = values.transpose(0, 1).flatten(1)[:, seen].double()
        columns = out.setdefault(method, {"visible": [mean_visible] * len(per_head)})
        if metric == "kept":
            columns["kept"] = per_head.mean(-1).tolist()
            columns["density"] = [kept / mean_visible for kept in columns["kept"]]
        else:
            columns |= _statistics(metric, per_head)
    # Six significant digits are more than float32 attention is good for.
    return {
        method: {name: [float(f"{value:.6g}") for value in column] for name, column in columns.items()}
        for method, columns in out.items()
    }


def block_queries(methods: Mapping[str, SparseAttentionConfig]) -> int:
    """Queries that are measured at once: blocks of this many cut no selector's group in two."""
    return math.lcm(GROUP_QUERIES, *(find_selector(config.selector).group_queries for config in methods.values()))


def _statistics(metric: str, values: Tensor) -> Columns:
    """Mean over the queries, and over the worst of them, of float64 `(heads, queries)`."""
    count = math.ceil(WORST * values.shape[-1])
    worst = values.topk(count, dim=-1, largest=metric != "retained_mass").values
    out: Columns = {f"{metric}_mean": values.mean(-1).tolist(), f"{metric}_worst": worst.mean(-1).tolist()}
    if metric == "l2":
        out["frobenius"] = values.square().sum(-1).sqrt().tolist()
    return out


def _block_values(layer: int, inputs: AttentionCall, methods: Mapping[str, SparseAttentionConfig]) -> _Values:
    """Every metric of every method for a block of queries, one key head and its query heads at a time."""
    heads, share = inputs.query.shape[1], inputs.group_size
    budgets = {name: _budgets(config, layer, inputs) for name, config in methods.items()}
    parts: list[_Values] = []
    for kv_head in range(inputs.key.shape[1]):
        mine = slice(kv_head * share, (kv_head + 1) * share)
        part = _cut(inputs, kv_head, mine)
        dense = DenseBlock.of(part)
        values = {(DENSE, metric): value for metric, value in concentration(dense).items()}
        values[DENSE, "kept"] = inputs.visible.unsqueeze(1).expand(-1, share, -1)
        for name, config in methods.items():
            kept = budgets[name].expand(-1, heads, -1)[:, mine]
            if layer in (config.dense_layers or ()):
                keep = interval_to_mask(part.intervals, part.key.shape[2]).expand(-1, share, -1, -1)
            else:
                selection = find_selector(config.selector).select(part, kept, config.always)
                keep = selection.mask(share, part.key.shape[2])
            values |= {(name, metric): value for metric, value in query_errors(dense, keep).items()}
            values[name, "kept"] = kept
        parts.append(values)
    return {key: torch.cat([part[key].cpu() for part in parts], dim=1) for key in parts[0]}


def _cut(inputs: AttentionCall, kv_head: int, heads: slice) -> AttentionCall:
    """`inputs` for one key head, in float32, without the keys before and after those that its queries see."""
    first, stop = inputs.intervals.unbind(-1)
    alive = stop > first
    low, high = (int(first[alive].min()), int(stop.max())) if bool(alive.any()) else (0, 1)
    kv = slice(kv_head, kv_head + 1)
    return replace(
        inputs,
        query=inputs.query[:, heads].float(),
        key=inputs.key[:, kv, low:high].float(),
        value=inputs.value[:, kv, low:high].float(),
        intervals=(inputs.intervals - low) * alive.unsqueeze(-1),
        sinks=None if inputs.sinks is None else inputs.sinks[heads],
        dropout=0.0,
    )


def _budgets(config: SparseAttentionConfig, layer: int, inputs: AttentionCall) -> Tensor:
    """Keys that each query keeps: int64 `(batch, heads or 1, queries)`."""
    if layer in (config.dense_layers or ()):
        return inputs.visible.unsqueeze(1)
    kept = config.budget(layer)(inputs.visible)
    return kept.unsqueeze(1) if kept.dim() == 2 else kept.transpose(0, 1)
