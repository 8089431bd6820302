"""The configuration that checks run with, and a layer's calls under it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hf_sparse import AttentionCall, SparseAttentionConfig
from hf_sparse.attention import LayerState
from hf_sparse.visibility import VisibleRanges

SELECTOR = "grouped"


def config(**fields: Any) -> SparseAttentionConfig:
    """Every query and every layer is sparse, with 16 * sqrt(n) of n keys."""
    given: dict[str, Any] = {"selector": SELECTOR, "alpha": 16.0, "dense_below": 0, "dense_layers": (), **fields}
    return SparseAttentionConfig(**given)


def layer(**fields: Any) -> LayerState:
    """A sparse layer."""
    return LayerState(1, config(**fields))


def with_known_ranges(call: AttentionCall) -> AttentionCall:
    """The call of any layer but the first: what queries see was read from the GPU for that one."""
    return replace(call, known_ranges=VisibleRanges(call.intervals))
