"""What a selection of keys does to each row of an attention matrix: the mathematics of one block of rows.

A row of dense attention is a probability distribution p over the keys the row sees. Sparse attention keeps a set S of
them and renormalises: q = p / m on S and 0 elsewhere, where m = p(S) is the retained mass. From that follow, with the
lost mass t = 1 - m (arXiv 2512.07647 has the first and the last; the tests check all of them):

- total variation: TV(p, q) = t, so ||q - p||_1 = 2 t;
- ||q - p||_inf = max(t / m * largest p in S, largest p outside S);
- ||q - p||_2^2 = (t / m)^2 * sum of p^2 in S + sum of p^2 outside S;
- output: sum_j (q_j - p_j) v_j = t * (mean of v under p in S - mean of v under p outside S).

An attention sink (gpt-oss `s_aux`) is one more entry of the row that is always kept and worth no value: p sums to 1
with it counted, its mass is retained mass, and all of the above holds unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_sparse.call import AttentionCall
from hf_sparse.engines.reference import weighted_values
from hf_sparse.engines.softmax import attention_weights
from hf_sparse.visibility import interval_to_mask

MASSES = (0.90, 0.95, 0.99)
"""Retained masses for which `row_shape` counts the keys needed."""


@dataclass(frozen=True)
class DenseRows:
    """Dense attention of a block of rows, in float32.

    Attributes:
        inputs: The attention call, cut down to the block.
        scores: `(batch, heads, rows, kv_len)`: products of queries and keys, unscaled.
        weights: `(batch, heads, rows, kv_len)`: p, 0 on keys that a row does not see.
    """

    inputs: AttentionCall
    scores: Tensor
    weights: Tensor

    @classmethod
    def of(cls, inputs: AttentionCall) -> DenseRows:
        """The weights that the model computes for `inputs`: scaling, softcap, interval and sink honoured."""
        batch, heads, rows, dim = inputs.query.shape
        kv_heads, kv_len = inputs.key.shape[1:3]
        query = inputs.query.reshape(batch, kv_heads, -1, dim).float()
        scores = (query @ inputs.key.float().transpose(-1, -2)).view(batch, heads, rows, kv_len)
        return cls(inputs, scores, _weights(inputs, scores, interval_to_mask(inputs.intervals, kv_len)))

    def restricted(self, keep: Tensor) -> Tensor:
        """Weights after keeping the keys `keep` alone, like `weights`: q."""
        return _weights(self.inputs, self.scores, keep)

    def sink(self, weights: Tensor) -> Tensor:
        """Mass that `weights` leave to the attention sink: `(batch, heads, rows)`, 0 in models without one."""
        if self.inputs.sinks is None:
            return torch.zeros_like(weights[..., 0])
        return (1 - weights.sum(-1)).clamp(min=0)

    def blank_padding(self, rows: Tensor) -> Tensor:
        """`rows` `(batch, heads, rows)` with `nan` in the rows that see no key."""
        return torch.where(self.inputs.visible.unsqueeze(1) > 0, rows, torch.nan)


def row_errors(dense: DenseRows, keep: Tensor) -> dict[str, Tensor]:
    """Distance between dense attention and sparse attention to the keys `keep`, for every row.

    Args:
        dense: The dense attention of the rows.
        keep: bool `(batch, heads, rows, kv_len)`: the keys that each row keeps, at least one visible key a row.

    Returns:
        float32 `(batch, heads, rows)` by name, `nan` on padding rows:

        - `retained_mass`: m = 1 - total variation, in 0 ... 1;
        - `l1`: ||q - p||_1, in 0 ... 2;
        - `max_entry`: ||q - p||_inf, in 0 ... 1;
        - `l2`: ||q - p||_2; the root of its sum of squares over rows is the Frobenius norm of the matrix error;
        - `output_error`: ||o_hat - o|| / ||o||, of each head's output before the output projection.
    """
    sparse = dense.restricted(keep)
    sink = dense.sink(sparse) - dense.sink(dense.weights)
    difference = sparse.sub_(dense.weights)
    lost_mass = dense.weights.masked_fill(keep, 0.0).sum(-1)
    output = weighted_values(dense.inputs, dense.weights).float().norm(dim=-1)
    output_difference = weighted_values(dense.inputs, difference).float().norm(dim=-1)
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


def row_shape(dense: DenseRows) -> dict[str, Tensor]:
    """How concentrated each row of dense attention is.

    Returns:
        float32 `(batch, heads, rows)` by name, `nan` on padding rows:

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


def _weights(inputs: AttentionCall, scores: Tensor, keep: Tensor) -> Tensor:
    sinks = None if inputs.sinks is None else inputs.sinks.view(1, -1, 1, 1)
    return attention_weights(scores, keep, sinks, inputs)


def _ascending(x: Tensor) -> Tensor:
    """`x` sorted along its last dimension. On a CPU, NumPy's vectorised sort is an order of magnitude faster."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.sort(x.numpy(), axis=-1))
    return x.sort(dim=-1).values
