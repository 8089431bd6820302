"""What top-k attention of a head costs as a function of k, on a model's own activations, and what can be certified."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from hf_sparse.engines.common import weighted_values
from hf_sparse.lab.certificates import certificate
from hf_sparse.lab.sampling import LayerRows
from hf_sparse.lab.subject import Layer

LEAST = 8
"""Fewest keys of a curve."""


def key_counts(length: int) -> list[int]:
    """The k at which curves are measured: `LEAST`, twice that, ... below `length`; at `length` the error is 0."""
    return [LEAST << i for i in range(32) if LEAST << i < length]


def error_curves(rows: LayerRows, layer: Layer) -> dict[str, list[list[float]]]:
    """Errors of exact top-k for every head and every k of `key_counts`, means over the rows.

    Returns:
        Lists over the heads, then k: `error`, ||W_O (o_k - o)||^2 of the head over ||W_O o||^2 of all heads together,
        the share of the layer's attention output that it gets wrong.
    """
    counts = key_counts(rows.length)
    projection = layer.attention.o_proj.weight.detach().float().cpu()
    heads = len(rows.weights)
    parts = projection.view(len(projection), heads, -1)
    exact = weighted_values(rows.dense.call, rows.dense.weights)[0].float()
    whole = torch.einsum("hrd,ohd->ro", exact, parts).square().sum(-1).clamp(min=1e-30)
    out: list[list[float]] = []
    for head in range(heads):
        p, order = rows.weights[head].sort(dim=-1, descending=True)
        lost = p.double().flip(-1).cumsum(-1).flip(-1)[:, counts]
        sums = _partial_sums(p, rows.values[head][order], counts)
        difference = sums / (1 - lost).clamp(min=1e-12).float().unsqueeze(-1) - exact[head].unsqueeze(1)
        gram = parts[:, head].T @ parts[:, head]
        squared = ((difference @ gram) * difference).sum(-1).clamp(min=0) / whole.unsqueeze(-1)
        out.append(squared.double().mean(0).tolist())
    return {"error": out}


def _partial_sums(p: Tensor, values: Tensor, counts: list[int]) -> Tensor:
    """Sums of the first k terms p_j v_j for every k: `(rows, counts, dim)`."""
    starts = [0, *counts[:-1]]
    pieces = [
        (p[:, None, start:stop] @ values[:, start:stop])[:, 0] for start, stop in zip(starts, counts, strict=True)
    ]
    return torch.stack(pieces, dim=1).cumsum(1)


def certified(rows: LayerRows, alpha: float) -> dict[str, list[float]]:
    """Bounds of top-k with k = alpha sqrt(n) against what it does, means over the rows.

    Returns:
        Lists over the heads: `lost`, the lost mass tau; `certified`, the certificate from kept logits alone;
        `max_entry`, ||q - p||_inf; `floor`, tau / k; `output`, ||o_k - o||; `output_bound`, tau times twice the largest
        distance of a value from their mean, which is at least the diameter.
    """
    kept = math.ceil(alpha * math.sqrt(rows.length))
    p, order = rows.weights.double().sort(dim=-1, descending=True)
    tau = p[..., kept:].sum(-1)
    logits = rows.logits.double().gather(-1, order)[..., :kept]
    bound = certificate(logits.numpy(), (rows.visible - kept).double().numpy())
    values = rows.values
    radius = (values - values.mean(1, keepdim=True)).norm(dim=-1).amax(-1)
    keep = torch.zeros_like(rows.weights).scatter_(-1, order[..., :kept], 1.0)
    sparse = rows.weights * keep / (1 - tau).float().unsqueeze(-1)
    difference = weighted_values(rows.dense.call, (sparse - rows.weights)[None])[0]
    found = {
        "lost": tau,
        "certified": torch.from_numpy(np.asarray(bound)),
        "max_entry": torch.maximum(tau / (1 - tau) * p[..., 0], p[..., kept]),
        "floor": tau / kept,
        "output": difference.norm(dim=-1),
        "output_bound": 2 * tau * radius[:, None],
    }
    return {name: value.double().mean(-1).tolist() for name, value in found.items()}
