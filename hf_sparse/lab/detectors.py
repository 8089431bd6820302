"""Three detectors of attention collapse, which are three different things, and a fourth thing that looks like them.

- epsilon-count: how many entries of a row are above epsilon. A row sums to 1, so that there are at most 1 / epsilon,
  whatever n is: a bounded count alone is no sign of collapse.
- entropy, or freezing: the entropy H tends to 0 and the largest entry to 1, as for independent Gaussian logits whose
  deviation is above sqrt(2 ln n).
- dispersion, or rank: H / ln n tends to 1, the row to a plain mean, and the outputs of all rows to one vector.
- sink-only: the mass is on the first keys, which mean nothing; H is small, but what remains is not frozen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.lab.sampling import LayerRows
from hf_sparse.lab.subject import layers_of, token_axis

EPSILON = 0.01
SINK_MASS = 0.8
FROZEN = 0.8
DISPERSED = 0.95

Kind = Literal["sink-only", "frozen", "dispersed", "none"]
KINDS: tuple[Kind, ...] = ("sink-only", "frozen", "dispersed", "none")


def kind_of(first: float, rest_largest: float, rest_share: float) -> Kind:
    """What a head is, by its mean row.

    Args:
        first: Mass of the first keys.
        rest_largest: Largest weight of the other keys, after renormalising.
        rest_share: Their entropy over the logarithm of their number.

    Returns:
        `sink-only` if the first keys have `SINK_MASS` or more; else `frozen` if one of the others has `FROZEN` of what
        remains; else `dispersed` if the entropy is `DISPERSED` of the most there is; else `none`.
    """
    if first >= SINK_MASS:
        return "sink-only"
    if rest_largest >= FROZEN:
        return "frozen"
    return "dispersed" if rest_share >= DISPERSED else "none"


def detect(logits: Tensor, visible: Tensor, sinks: int) -> dict[str, list[float]]:
    """What the detectors look at, means over the rows.

    Args:
        logits: `(heads, rows, keys)`; -inf for keys that a row does not see.
        visible: Keys that a row sees, all from the first one on, `(rows,)`; more than `sinks` + 1.
        sinks: How many first keys may be sinks.

    Returns:
        Lists over the heads: `above`, entries above `EPSILON`; `largest`, the largest entry; `effective`, e^H with H
        in nats; `first`, mass of the first keys; of the other keys, renormalised, `rest_largest` and `rest_share`,
        their entropy over the logarithm of their number.
    """
    weights = logits.softmax(-1)
    rest = logits[..., sinks:].softmax(-1)
    entropy, rest_entropy = (torch.special.entr(w).sum(-1) for w in (weights, rest))
    found = {
        "above": (weights > EPSILON).sum(-1),
        "largest": weights.amax(-1),
        "effective": entropy.exp(),
        "first": weights[..., :sinks].sum(-1),
        "rest_largest": rest.amax(-1),
        "rest_share": rest_entropy / (visible - sinks).log(),
    }
    return {name: value.double().mean(-1).tolist() for name, value in found.items()}


def log_scaled(rows: LayerRows, reference: int) -> Tensor:
    """The logits of `rows` times max(1, ln n / ln reference), n the keys that a row sees: `(heads, rows, keys)`."""
    factors = rows.visible.log() / math.log(reference)
    return rows.logits * factors.clamp(min=1)[:, None]


def mixing(outputs: Tensor, values: Tensor) -> dict[str, list[float]]:
    """Whether attention makes rows alike: outputs of some rows against as many values.

    Args:
        outputs: `(heads, rows, dim)`.
        values: `(heads, rows, dim)`: values of single keys.

    Returns:
        Lists over the heads, for both: `..._rank`, the stable rank ||X||_F^2 / ||X||_2^2; `..._alike`, the squared norm
        of the mean vector over the mean squared norm, 1 if all rows are the same vector.
    """
    out: dict[str, list[float]] = {}
    for name, x in (("output", outputs.double()), ("value", values.double())):
        squared = x.square().sum((-1, -2)).clamp(min=1e-30)
        out[f"{name}_rank"] = (squared / torch.linalg.matrix_norm(x, 2).square().clamp(min=1e-30)).tolist()
        out[f"{name}_alike"] = (x.mean(1).square().sum(-1) * x.shape[1] / squared).tolist()
    return out


@contextmanager
def log_n_scaling(model: PreTrainedModel, reference: int) -> Iterator[PreTrainedModel]:
    """Run `model` with logits multiplied by max(1, ln n / ln reference) in the layers without a sliding window.

    Queries are multiplied, after their normalisation where they have one. The model was not trained like that.
    """
    handles: list[Any] = []

    def scale(heads: int) -> Any:
        def hook(_: nn.Module, __: object, result: Tensor) -> Tensor:
            axis = token_axis(result, heads)
            seen = torch.arange(1, result.shape[axis] + 1, device=result.device, dtype=torch.float32)
            factors = (seen.log() / math.log(reference)).clamp(min=1).to(result.dtype)
            return result * factors.view([-1] + [1] * (result.dim() - axis - 1))

        return hook

    try:
        for layer in layers_of(model):
            if getattr(layer.attention, "sliding_window", None) is None:
                module = getattr(layer.attention, "q_norm", layer.attention.q_proj)
                handles.append(module.register_forward_hook(scale(layer.heads("q"))))
        yield model
    finally:
        for handle in handles:
            handle.remove()
