"""R and the spread of logits of every head of a model, against sqrt(ln n) and the freezing line sqrt(2 ln n).

Three scales of a head's logits, from what the theory assumes to what is there:

- formal: R = B^2 ||W||_F with B the largest entry of what goes into the projections;
- independent: the standard deviation if the entries of that input were independent, with the variances they have;
- measured: the standard deviation of the logits within a row, the mean over rows.

A softmax does not see a constant added to a row, so that logits are taken relative to the mean of their row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.lab.bounds import FloatArray, rope_scales, spectral_scale
from hf_sparse.lab.rope import frequencies_of
from hf_sparse.lab.sampling import LayerRows
from hf_sparse.lab.subject import Layer, layers_of, split_heads
from hf_sparse.results import Row

_TILTS = (-4.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0)
"""Arguments, in standard deviations, at which a row's moment generating function is compared with a Gaussian's."""


@dataclass(frozen=True)
class HeadForm:
    """The bilinear form of a head: its logit is scaling * (query @ x)^T R_D (key @ y).

    Attributes:
        query: `(head_dim, inputs)`.
        key: `(head_dim, inputs)`.
        scaling: Factor of the scores.
    """

    query: FloatArray
    key: FloatArray
    scaling: float

    def weighted(self, query_scale: FloatArray, key_scale: FloatArray) -> HeadForm:
        """The form of inputs measured in units of their scale, `(inputs,)` each."""
        return HeadForm(self.query * query_scale, self.key * key_scale, self.scaling)

    def over(self, frequencies: FloatArray, distances: FloatArray) -> FloatArray:
        """||W_D||_F at every distance: `(distances,)`."""
        return rope_scales(self.query, self.key, frequencies, distances, 1.0, self.scaling)


def is_normed(layer: Layer) -> bool:
    """Whether queries and keys are normalised after their projection (Gemma-3, Qwen3).

    The logit is then no bilinear form of the layer's input, but one of the normalised queries and keys, whose matrix is
    the rotation alone: they are taken for the inputs.
    """
    return hasattr(layer.attention, "q_norm")


def head_forms(layer: Layer) -> list[HeadForm]:
    """The form of every query head of `layer`."""
    attention = layer.attention
    heads = layer.heads("q")
    if is_normed(layer):
        identity = np.eye(attention.head_dim)
        return [HeadForm(identity, identity, attention.scaling)] * heads
    query, key = (_per_head(part.weight, attention.head_dim) for part in (attention.q_proj, attention.k_proj))
    share = len(query) // len(key)
    return [HeadForm(query[head], key[head // share], attention.scaling) for head in range(heads)]


def _per_head(weight: Tensor, head_dim: int) -> FloatArray:
    return weight.detach().double().cpu().numpy().reshape(-1, head_dim, weight.shape[1])


def weight_scales(model: PreTrainedModel, distances: FloatArray) -> Row:
    """||W_D||_F of every head with B = 1, from the weights alone.

    Args:
        model: The model.
        distances: Query position minus key position, among them those over which to maximise.

    Returns:
        Lists by layer, then head: `plain`, without RoPE; `rope`, the maximum over `distances`; `at`, where it is;
        `least`, the minimum; `rms`, the root mean square over `distances`; `spectral`, a bound of the spectral norm.
    """
    out: dict[str, list[list[float]]] = {name: [] for name in ("plain", "rope", "at", "least", "rms", "spectral")}
    for layer in layers_of(model):
        frequencies = frequencies_of(model, layer)
        columns: dict[str, list[float]] = {name: [] for name in out}
        done: dict[int, FloatArray] = {}
        for form in head_forms(layer):
            # Heads of a layer with normalised queries share one form.
            over = done.setdefault(id(form), form.over(frequencies, distances))
            plain = form.over(np.zeros_like(frequencies), np.zeros(1))[0]
            spectral = spectral_scale(form.query, form.key, 1.0, form.scaling)
            found = (plain, over.max(), distances[over.argmax()], over.min(), math.sqrt((over**2).mean()), spectral)
            for name, value in zip(columns, found, strict=True):
                columns[name].append(float(value))
        for name, values in columns.items():
            out[name].append(values)
    return dict(out)


@dataclass
class InputMoments:
    """What goes into a layer's forms: `(heads or 1, inputs)` each, over the tokens of a text."""

    largest: FloatArray
    deviation: FloatArray

    @classmethod
    def of(cls, x: Tensor) -> InputMoments:
        """Of `x` `(heads or 1, tokens, inputs)`."""
        # Reductions alone: large copies of every layer's input would be more memory than the model.
        x = x.detach().float()
        largest = torch.maximum(x.amax((1, 2)), -x.amin((1, 2)))
        return cls(largest.double().cpu().numpy(), x.std(1).double().cpu().numpy())


@contextmanager
def watched_inputs(model: PreTrainedModel) -> Iterator[dict[int, tuple[InputMoments, InputMoments]]]:
    """Note the moments of the inputs of queries and keys of every layer, during the forward passes of a block."""
    found: dict[int, tuple[InputMoments, InputMoments]] = {}
    parts: dict[tuple[int, int], InputMoments] = {}
    handles: list[Any] = []

    def note(index: int, side: int, x: Tensor) -> None:
        parts[index, side] = InputMoments.of(x)
        if (index, 0) in parts and (index, 1) in parts:
            found[index] = parts[index, 0], parts[index, 1]

    def normed(layer: Layer, side: str) -> Any:
        def hook(_: nn.Module, __: object, result: Tensor) -> None:
            note(layer.index, "qk".index(side), split_heads(result, layer.heads(side)))

        return hook

    def projected(layer: Layer) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            for side in range(2):
                note(layer.index, side, arguments[0][:1])

        return hook

    try:
        for layer in layers_of(model):
            if is_normed(layer):
                handles.append(layer.attention.q_norm.register_forward_hook(normed(layer, "q")))
                handles.append(layer.attention.k_norm.register_forward_hook(normed(layer, "k")))
            else:
                handles.append(layer.attention.q_proj.register_forward_pre_hook(projected(layer)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def input_scales(model: PreTrainedModel, moments: dict[int, tuple[InputMoments, InputMoments]], length: int) -> Row:
    """B and the logit deviation that independent inputs would have, of every head.

    Returns:
        Lists by layer, then head: `bound`, B (the geometric mean where queries and keys differ), and `independent`, the
        root mean square over distances of ||D_q W_D D_k||_F, with D the standard deviations of the inputs.
    """
    distances = np.unique(np.geomspace(1, length - 1, 48).round())
    out: dict[str, list[list[float]]] = {"bound": [], "independent": []}
    for layer in layers_of(model):
        query, key = moments[layer.index]
        forms = head_forms(layer)
        frequencies = frequencies_of(model, layer)
        bounds, independent = [], []
        for head, form in enumerate(forms):
            q, k = (head * len(side.largest) // len(forms) for side in (query, key))
            bounds.append(math.sqrt(query.largest[q] * key.largest[k]))
            over = form.weighted(query.deviation[q], key.deviation[k]).over(frequencies, distances)
            independent.append(math.sqrt(float((over**2).mean())))
        out["bound"].append(bounds)
        out["independent"].append(independent)
    return dict(out)


def logit_spread(rows: LayerRows, sinks: int) -> dict[str, list[float]]:
    """How far the logits of each head spread, means over the rows.

    Returns:
        Lists over the heads:

        - `deviation`: standard deviation of the logits a row sees; `rest`: the same without the first `sinks` keys;
        - `sub_gaussian`: the least s with E exp(l (x - mean)) <= exp(l^2 s^2 / 2) at the tilts l that are tried;
        - `tilted`: sqrt(2 (ln mean exp(x) - mean)), the s at the tilt of the softmax itself: a Gaussian row with that
          deviation has the same normaliser;
        - `spread`: largest minus smallest logit.
    """
    seen = rows.seen
    late = seen & (torch.arange(rows.length) >= sinks)
    centred, deviation = _standardise(rows.logits, seen)
    _, rest = _standardise(rows.logits, late)
    count = seen.sum(-1)

    def scale(tilt: Tensor) -> Tensor:
        """s of every row at a tilt `(heads, rows)`."""
        log_mean = (centred * tilt.unsqueeze(-1)).masked_fill(~seen, -torch.inf).logsumexp(-1) - count.log()
        return (2 * log_mean.clamp(min=0)).sqrt() / tilt.abs()

    tilts = [scale(tilt / deviation) for tilt in _TILTS]
    spread = rows.logits.amax(-1) - rows.logits.masked_fill(~seen, torch.inf).amin(-1)
    found = {
        "deviation": deviation,
        "rest": rest,
        "sub_gaussian": torch.stack([*tilts, deviation]).amax(0),
        "tilted": scale(torch.ones_like(deviation)),
        "spread": spread,
    }
    return {name: value.double().mean(-1).tolist() for name, value in found.items()}


def _standardise(logits: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Logits minus their mean over the keys `seen`, 0 elsewhere, and their standard deviation `(heads, rows)`."""
    count = seen.sum(-1)
    mean = logits.masked_fill(~seen, 0.0).sum(-1) / count
    centred = (logits - mean.unsqueeze(-1)).masked_fill(~seen, 0.0)
    return centred, (centred.square().sum(-1) / count).sqrt()
