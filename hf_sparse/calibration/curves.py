"""Error curves: the error that each head makes at each budget, with the selector that will run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.calibration.projection import output_weights
from hf_sparse.call import AttentionCall
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.diagnostics import observed
from hf_sparse.engines import ENGINES
from hf_sparse.engines.common import masked_weights, weighted_values
from hf_sparse.selectors import find_selector
from hf_sparse.selectors.grouped import GROUP_QUERIES
from hf_sparse.visibility import interval_to_mask

SMALLEST = 96
"""Smallest budget measured, in keys: a little more than sinks and recent keys take."""


@dataclass(frozen=True)
class ErrorCurve:
    """Errors of one layer's heads on one block of queries.

    Attributes:
        layer: Index of the layer.
        visible: Keys that the last query of the block sees.
        budgets: Kept keys, rising.
        errors: For each head, at each of the budgets, the mean over the queries of ||W_h (o_k - o)||^2, relative to
            the same mean of ||sum_h W_h o||^2: o and o_k are the head's output under dense and sparse attention, and
            W_h is its slice of the output projection.
    """

    layer: int
    visible: int
    budgets: tuple[int, ...]
    errors: tuple[tuple[float, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that `json.dumps` takes, with errors to four digits."""
        errors = [[float(f"{e:.4g}") for e in head] for head in self.errors]
        return {"layer": self.layer, "visible": self.visible, "budgets": list(self.budgets), "errors": errors}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ErrorCurve:
        """The inverse of `to_dict`; other keys are ignored."""
        errors = tuple(tuple(head) for head in data["errors"])
        return cls(data["layer"], data["visible"], tuple(data["budgets"]), errors)


def budget_grid(visible: int) -> tuple[int, ...]:
    """Budgets below `visible` keys, two to an octave."""
    powers = (round(2 ** (half / 2)) for half in range(2 * visible.bit_length() + 1))
    return tuple(k for k in powers if SMALLEST <= k < visible)


def visible_grid(shortest: int, longest: int) -> tuple[int, ...]:
    """Visible keys at which curves are measured, two to an octave from `longest` down to `shortest`.

    Multiples of `GROUP_QUERIES`, so that the last queries which see so many keys are one group of the grouped selector.
    """
    blocks = (round(longest / 2 ** (half / 2) / GROUP_QUERIES) for half in range(2 * longest.bit_length()))
    grid = {min(n, longest // GROUP_QUERIES) * GROUP_QUERIES for n in blocks}
    return tuple(sorted(n for n in grid if n >= shortest))


@torch.no_grad()
def error_curves(
    model: PreTrainedModel,
    input_ids: Tensor,
    visible: Sequence[int],
    modules: Mapping[int, nn.Module],
    config: SparseAttentionConfig,
) -> list[ErrorCurve]:
    """The curves of one text, int64 `(length,)`, measured in one pass of the dense model.

    The attention modules, by layer, are measured on a block of `GROUP_QUERIES` queries at each place of `visible_grid`,
    with the selector, `sink_keys` and `recent_keys` of the configuration.
    """
    found: list[ErrorCurve] = []

    def observer(layer: int, inputs: AttentionCall) -> None:
        if layer in modules:
            weights = output_weights(modules[layer], inputs.query.shape[1], inputs.value.shape[-1])
            found.extend(_curve(layer, inputs.queries(n - GROUP_QUERIES, n), n, weights, config) for n in visible)

    with observed(model, observer):
        model(input_ids=input_ids[None].to(model.device), use_cache=False, logits_to_keep=1)
    return found


def _curve(
    layer: int, block: AttentionCall, visible: int, weights: Tensor, config: SparseAttentionConfig
) -> ErrorCurve:
    block = replace(
        block,
        query=block.query.float(),
        key=block.key[:, :, :visible].float(),
        value=block.value[:, :, :visible].float(),
        dropout=0.0,
    )
    dense = weighted_values(block, masked_weights(block, interval_to_mask(block.intervals, visible)))
    whole = torch.einsum("hrd,hod->ro", dense[0], weights).square().sum()
    # ||W e||^2 = e' (W' W) e: a head's errors never need the width of the model.
    gram = weights.transpose(1, 2) @ weights
    budgets = budget_grid(visible)
    errors = []
    for keys in budgets:
        selection = find_selector(config.selector).select(block, block.visible.clamp(max=keys)[:, None], config.always)
        delta = (ENGINES["gather"].attend(block, selection) - dense)[0]
        errors.append(((delta @ gram) * delta).sum((1, 2)) / whole)
    return ErrorCurve(layer, visible, budgets, tuple(map(tuple, torch.stack(errors, dim=1).tolist())))
