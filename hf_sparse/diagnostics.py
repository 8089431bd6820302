"""Looking into a model's attention: at what goes in (`observed`), and at how far what comes out is off (`audit`).

The dense attention of a query is a probability distribution p over the keys it sees. Sparse attention keeps a set S of
them and renormalises: q = p / m on S and 0 elsewhere, where m = p(S) is the retained mass. From that follow, with the
lost mass t = 1 - m (arXiv 2512.07647 has the first and the last; the tests check all of them):

- total variation: TV(p, q) = t, so ||q - p||_1 = 2 t;
- ||q - p||_inf = max(t / m * largest p in S, largest p outside S);
- ||q - p||_2^2 = (t / m)^2 * sum of p^2 in S + sum of p^2 outside S;
- output: sum_j (q_j - p_j) v_j = t * (mean of v under p in S - mean of v under p outside S).

An attention sink (gpt-oss `s_aux`) is one more entry that is always kept and worth no value: p sums to 1
with it counted, its mass is retained mass, and all of the above holds unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_sparse.attention import STATE, LayerState, Observer, attend
from hf_sparse.call import AttentionCall
from hf_sparse.engines.common import attention_weights, weighted_values
from hf_sparse.monitor import LayerCounters
from hf_sparse.patching import ModelT, base_model, is_patched, patched, states
from hf_sparse.schema import checks
from hf_sparse.visibility import interval_to_mask

MASSES = (0.90, 0.95, 0.99)
"""Retained masses for which `concentration` counts the keys needed."""


@contextmanager
def observed(model: ModelT, observer: Observer) -> Iterator[ModelT]:
    """Run `model` dense for the length of a `with` block, and show every attention call to `observer` first.

    Args:
        model: As for `patch`.
        observer: Called as `observer(layer, call)` with the layer's index and its `AttentionCall`.
    """
    with patched(model), run_by(model, lambda state: replace(state, dense_reason="observed", observer=observer)):
        yield model


@contextmanager
def run_by(model: nn.Module, changed: Callable[[LayerState], LayerState]) -> Iterator[None]:
    """Run a patched model by changed states of its layers for the length of a `with` block; its own count nothing."""
    before = states(base_model(model))
    try:
        for module, state in before.items():
            setattr(module, STATE, changed(replace(state, counters=LayerCounters(), observer=None)))
        yield
    finally:
        for module, state in before.items():
            setattr(module, STATE, state)


def audit(model: nn.Module, rows: int = 16, seed: int = 0) -> None:
    """Measure some queries of every attention call of a patched model from now on; `hf_sparse.report` shows them.

    Of each call of each sparse layer, `rows` neighbouring queries at a random place run densely as well. The
    model computes what it did before, more slowly. `patch` with another configuration and `unpatch` end the audit, as
    does `rows=0`; a new audit begins with nothing measured.

    Args:
        model: A patched model.
        rows: Queries of a call; 0 to stop.
        seed: Of the places.

    Raises:
        ValueError: If the model is not patched, or `rows` is negative.
    """
    checks.integer("rows", rows, least=0)
    base = base_model(model)
    if not is_patched(base):
        raise ValueError(f"{type(base).__name__} is not patched: there is nothing to audit")
    for state in states(base).values():
        state.observer = LayerAudit(state, rows, seed + state.layer) if rows and state.dense_reason is None else None


class LayerAudit:
    """The observer of one sparse layer, which measures neighbouring queries at a random place of every call.

    Their dense attention is formed, and their sparse attention a second time, so that the layer itself runs as ever.

    Args:
        state: The layer's.
        queries: Queries of each sequence that are measured in a call; all of a call that has fewer.
        seed: Of the places.
    """

    def __init__(self, state: LayerState, queries: int, seed: int) -> None:
        self._state = replace(state, counters=LayerCounters(), observer=None)
        self._queries = queries
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._measured: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def __call__(self, layer: int, call: AttentionCall) -> None:
        """Measure some queries of a call."""
        length = call.query.shape[2]
        places = max(1, length - self._queries + 1)
        start = int(torch.randint(places, (), generator=self._generator, device="cpu"))
        stop = min(length, start + self._queries)
        # Queries of a group choose keys together: with so many neighbours on either side, all groups are whole.
        more = self._state.selector.group_queries - 1
        first, last = max(0, start - more), min(length, stop + more)
        _, weights = attend(self._state, replace(call.queries(first, last), dropout=0.0), want_weights=True)
        assert weights is not None
        keep = weights[:, :, start - first : stop - first] > 0
        errors = query_errors(DenseBlock.of(call.queries(start, stop)), keep)
        pair = [errors[name].transpose(0, 1).flatten(1) for name in ("retained_mass", "output_error")]
        seen = ~pair[0][0].isnan()
        self._measured.append((pair[0][:, seen].cpu(), pair[1][:, seen].cpu()))

    def report(self) -> list[dict[str, Any]]:
        """One dictionary per query head: see `SparsityReport.audit`. Empty before any call."""
        if not self._measured:
            return []
        mass, error = (torch.cat(parts, dim=1) for parts in zip(*self._measured, strict=True))
        return [
            {
                "layer": self._state.layer,
                "head": head,
                "rows": mass.shape[1],
                "retained_mass": mass[head].mean().item(),
                "least_retained_mass": mass[head].min().item(),
                "output_error": error[head].mean().item(),
                "largest_output_error": error[head].max().item(),
            }
            for head in range(len(mass) if mass.numel() else 0)
        ]


@dataclass(frozen=True)
class DenseBlock:
    """Dense attention of a block of queries, in float32.

    Attributes:
        call: The attention call, cut down to the block.
        scores: `(batch, heads, q_len, kv_len)`: products of queries and keys, unscaled.
        weights: `(batch, heads, q_len, kv_len)`: p, 0 on keys that a query does not see.
    """

    call: AttentionCall
    scores: Tensor
    weights: Tensor

    @classmethod
    def of(cls, call: AttentionCall) -> DenseBlock:
        """The weights that the model computes for `call`: scaling, softcap, interval and sink honoured."""
        batch, heads, queries, dim = call.query.shape
        kv_heads, kv_len = call.key.shape[1:3]
        query = call.query.reshape(batch, kv_heads, -1, dim).float()
        scores = (query @ call.key.float().transpose(-1, -2)).view(batch, heads, queries, kv_len)
        return cls(call, scores, _weights(call, scores, interval_to_mask(call.intervals, kv_len)))

    def restricted(self, keep: Tensor) -> Tensor:
        """Weights after keeping the keys `keep` alone, like `weights`: q."""
        return _weights(self.call, self.scores, keep)

    def sink(self, weights: Tensor) -> Tensor:
        """Mass that `weights` leave to the attention sink: `(batch, heads, q_len)`, 0 in models without one."""
        if self.call.sinks is None:
            return torch.zeros_like(weights[..., 0])
        return (1 - weights.sum(-1)).clamp(min=0)

    def blank_padding(self, values: Tensor) -> Tensor:
        """`values` `(batch, heads, q_len)` with `nan` for queries that see no key."""
        return torch.where(self.call.visible.unsqueeze(1) > 0, values, torch.nan)


def query_errors(dense: DenseBlock, keep: Tensor) -> dict[str, Tensor]:
    """Distance between dense attention and sparse attention to the keys `keep`, for every query.

    Args:
        dense: The dense attention of the queries.
        keep: bool `(batch, heads, q_len, kv_len)`: the keys that each query keeps, at least one visible key each.

    Returns:
        float32 `(batch, heads, q_len)` by name, `nan` for pad tokens:

        - `retained_mass`: m = 1 - total variation, in [0, 1];
        - `l1`: ||q - p||_1, in [0, 2];
        - `max_entry`: ||q - p||_inf, in [0, 1];
        - `l2`: ||q - p||_2; the root of its sum of squares over queries is the Frobenius norm of the matrix error;
        - `output_error`: ||o_hat - o|| / ||o||, of each head's output before the output projection.
    """
    sparse = dense.restricted(keep)
    sink = dense.sink(sparse) - dense.sink(dense.weights)
    difference = sparse.sub_(dense.weights)
    lost_mass = dense.weights.masked_fill(keep, 0.0).sum(-1)
    output = weighted_values(dense.call, dense.weights).float().norm(dim=-1)
    output_difference = weighted_values(dense.call, difference).float().norm(dim=-1)
    # Sums and maxima of |q - p| are several times as fast as the norms that they are.
    size = difference.abs_()
    errors = {
        "retained_mass": 1 - lost_mass,
        "l1": size.sum(-1) + sink.abs(),
        "max_entry": torch.maximum(size.amax(-1), sink.abs()),
        "output_error": output_difference / output.clamp(min=torch.finfo(torch.float32).tiny),
        "l2": (size.square_().sum(-1) + sink.square()).sqrt(),
    }
    return {name: dense.blank_padding(error) for name, error in errors.items()}


def concentration(dense: DenseBlock) -> dict[str, Tensor]:
    """How concentrated the dense attention of each query is.

    Returns:
        float32 `(batch, heads, q_len)` by name, `nan` for pad tokens:

        - `keys_90`, `keys_95`, `keys_99`: the fewest keys that retain a mass of at least 0.90, 0.95, 0.99;
        - `entropy`: -sum p ln p, in nats, the sink counted.
    """
    # What is lost without the smallest, the two smallest, ... entries. Summed in float64 and from the small end, so
    # that a long tail does not round away.
    lost = _ascending(dense.weights).cumsum(-1, dtype=torch.float64)
    shape = {
        f"keys_{mass * 100:.0f}": (dense.weights.shape[-1] - (lost <= 1 - mass).sum(-1)).float() for mass in MASSES
    }
    shape["entropy"] = torch.special.entr(dense.weights).sum(-1) + torch.special.entr(dense.sink(dense.weights))
    return {name: dense.blank_padding(value) for name, value in shape.items()}


def _weights(call: AttentionCall, scores: Tensor, keep: Tensor) -> Tensor:
    sinks = None if call.sinks is None else call.sinks.view(1, -1, 1, 1)
    return attention_weights(scores, keep, sinks, call)


def _ascending(x: Tensor) -> Tensor:
    """`x` sorted along its last dimension. On a CPU, NumPy's vectorised sort is an order of magnitude faster."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.sort(x.numpy(), axis=-1))
    return x.sort(dim=-1).values
