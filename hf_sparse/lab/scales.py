"""Three scales of the logits of every head of a model, from what the theory assumes to what is there.

- formal: R = B^2 ||W||_F with B the largest entry of the inputs of the projections;
- independent: the standard deviation if the entries of those inputs were independent, with the variances they have;
- measured: the standard deviation of the logits of a query, the mean over queries.

A softmax ignores a constant added to all logits of a query, so they are taken relative to their mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.lab.bounds import rope_scales
from hf_sparse.lab.probe import SINKS, Layer, Sample, frequencies_of, hooked, layers_of, split_heads
from hf_sparse.measure.statistics import FloatArray
from hf_sparse.results import Record

_TILTS = (-4.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0)
"""Arguments, in standard deviations, at which the moment generating function is compared with a Gaussian's."""

Form = tuple[FloatArray, FloatArray]
"""The bilinear form of a head, `(head_dim, inputs)` each: its logit is (query @ x)^T R_D (key @ y)."""

Moments = tuple[FloatArray, FloatArray]
"""Largest entry `(heads or 1,)` and standard deviation `(heads or 1, inputs)` of inputs, over the tokens of a text."""


def is_normed(layer: Layer) -> bool:
    """Whether queries and keys are normalised after their projection (Gemma-3, Qwen3).

    The logit is then no bilinear form of the layer's input, but one of the normalised queries and keys, whose matrix is
    the rotation alone: they are taken for the inputs.
    """
    return hasattr(layer.attention, "q_norm")


def head_forms(layer: Layer) -> list[Form]:
    """The form of every query head of `layer`, the factor of the scores included."""
    attention, heads = layer.attention, layer.heads("q")
    if is_normed(layer):
        identity = np.eye(attention.head_dim)
        return [(attention.scaling * identity, identity)] * heads
    query, key = (
        part.weight.detach().double().cpu().numpy().reshape(-1, attention.head_dim, part.weight.shape[1])
        for part in (attention.q_proj, attention.k_proj)
    )
    return [(attention.scaling * query[head], key[head * len(key) // heads]) for head in range(heads)]


def largest_scales(model: PreTrainedModel, distances: int) -> list[list[float]]:
    """max ||W_D||_F over the `distances` D = 0, 1, ... of query and key, from the weights alone: by layer, then head.

    One distance is the same as no RoPE.
    """
    over = np.arange(distances, dtype=np.float64)
    return [
        [float(rope_scales(*form, frequencies_of(model, layer), over).max()) for form in head_forms(layer)]
        for layer in layers_of(model)
    ]


@contextmanager
def watched_inputs(model: PreTrainedModel) -> Iterator[dict[tuple[int, str], Moments]]:
    """Note the moments of the inputs of every layer's forms during forward passes, by layer and side, `q` or `k`."""
    found: dict[tuple[int, str], Moments] = {}

    def note(layer: Layer, side: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], result: Tensor) -> None:
            x = split_heads(result, layer.heads(side)) if is_normed(layer) else arguments[0][:1]
            # Reductions alone: large copies of every layer's input would be more memory than the model.
            x = x.detach().float()
            largest, deviation = torch.maximum(x.amax((1, 2)), -x.amin((1, 2))), x.std(1)
            found[layer.index, side] = largest.double().cpu().numpy(), deviation.double().cpu().numpy()

        return hook

    with hooked(
        (getattr(layer.attention, f"{side}_{'norm' if is_normed(layer) else 'proj'}"), note(layer, side))
        for layer, side in product(layers_of(model), "qk")
    ):
        yield found


def input_scales(model: PreTrainedModel, moments: dict[tuple[int, str], Moments], length: int) -> Record:
    """B and the logit deviation that independent inputs would have, of every head.

    Lists by layer, then head: `bound`, B (the geometric mean where queries and keys differ), and `independent`, the
    root mean square over distances of ||D_q W_D D_k||_F, with D the standard deviations of the inputs.
    """
    distances = np.unique(np.geomspace(1, length - 1, 48).round())
    out: Record = {"bound": [], "independent": []}
    for layer in layers_of(model):
        forms, frequencies = head_forms(layer), frequencies_of(model, layer)
        found = []
        for head, (query, key) in enumerate(forms):
            (q_largest, q_scale), (k_largest, k_scale) = (
                [moment[head * len(moment) // len(forms)] for moment in moments[layer.index, side]] for side in "qk"
            )
            over = rope_scales(query * q_scale, key * k_scale, frequencies, distances)
            found.append([float(np.sqrt(q_largest * k_largest)), float(np.sqrt((over**2).mean()))])
        for name, values in zip(out, zip(*found, strict=True), strict=True):
            out[name].append(list(values))
    return out


def logit_spread(sample: Sample) -> dict[str, Tensor]:
    """How far the logits of each head and query spread, `(heads, queries)` by name.

    - `deviation`: standard deviation of the logits a query sees; `rest`: the same without the first `SINKS` keys;
    - `sub_gaussian`: the least s with E exp(l (x - mean)) <= exp(l^2 s^2 / 2) at the tilts l that are tried;
    - `tilted`: sqrt(2 (ln mean exp(x) - mean)), the s at the tilt of the softmax itself: Gaussian logits with that
      deviation have the same normaliser;
    - `spread`: largest minus smallest logit.
    """
    logits, keys = sample.logits, torch.arange(sample.length)
    seen = keys < sample.visible[:, None]
    centred, deviation = _standardise(logits, seen)

    def scale(tilt: Tensor) -> Tensor:
        """s of every query at a tilt `(heads, queries)`."""
        log_sum = (centred * tilt.unsqueeze(-1)).masked_fill(~seen, -torch.inf).logsumexp(-1)
        return (2 * (log_sum - seen.sum(-1).log()).clamp(min=0)).sqrt() / tilt.abs()

    return {
        "deviation": deviation,
        "rest": _standardise(logits, seen & (keys >= SINKS))[1],
        "sub_gaussian": torch.stack([*(scale(tilt / deviation) for tilt in _TILTS), deviation]).amax(0),
        "tilted": scale(torch.ones_like(deviation)),
        "spread": logits.amax(-1) - logits.masked_fill(~seen, torch.inf).amin(-1),
    }


def _standardise(logits: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Logits minus their mean over the keys `seen`, 0 elsewhere, and their standard deviation `(heads, queries)`."""
    count = seen.sum(-1)
    mean = logits.masked_fill(~seen, 0.0).sum(-1) / count
    centred = (logits - mean.unsqueeze(-1)).masked_fill(~seen, 0.0)
    return centred, (centred.square().sum(-1) / count).sqrt()
