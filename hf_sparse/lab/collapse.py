"""Experiment `collapse`: whether attention collapses as n grows, in which sense, and the effect of log-n scaling.

- epsilon-count: how many entries of a query are above epsilon. They sum to 1, so there are at most 1 / epsilon,
  whatever n is: a bounded count alone is no sign of collapse.
- entropy, or freezing: the entropy H tends to 0 and the largest entry to 1, as for independent Gaussian logits whose
  deviation is above sqrt(2 ln n).
- dispersion, or rank: H / ln n tends to 1, attention to a plain mean, and the outputs of all queries to one vector.
- sink-only: the mass is on the first keys, which mean nothing; H is small, but what remains is not frozen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.engines.common import weighted_values
from hf_sparse.lab import fits, probe
from hf_sparse.lab.experiment import Cell, Findings, Plot, Setting
from hf_sparse.lab.probe import SINKS, Sample
from hf_sparse.lab.topk import EPSILON
from hf_sparse.measure.perplexity import token_nll
from hf_sparse.measure.statistics import log_slope
from hf_sparse.results import Record

REFERENCE = {"small": 128, "full": 512}
"""Keys up to which log-n scaling leaves logits as they are."""

LEAST = 256
"""Smallest n."""

SINK_MASS, FROZEN = 0.8, 0.8
"""Mass of the first keys of a sink-only head; else of one other key, of what remains, of a frozen head."""

DISPERSED, ALIKE = 0.95, 0.95
"""Entropy over the most there is of a dispersed head; and how alike outputs are that count as one vector."""

MIXING = ("output_alike", "value_alike", "output_rank", "value_rank")
DECISIVE = ("first", "rest_largest", "rest_share")
KINDS = ("sink-only", "frozen", "dispersed", "none")


def cells(setting: Setting) -> Sequence[Cell]:
    """Every document, and the first one with the logits of all layers scaled."""
    windows = probe.longest_windows(setting)
    more = {"rows": probe.QUERIES[setting.scale], "reference": REFERENCE[setting.scale]}
    plain = [probe.window_cell(window, scaled=False, **more) for window in windows]
    return [*plain, probe.window_cell(windows[0], scaled=True, **more)]


def measure(cell: Cell, setting: Setting) -> Record:
    """Detectors by layer and n, on the logits as they are and scaled after the fact; the mixing of values; the loss."""
    model, window = setting.model, probe.find_window(cell, setting)
    mixed: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def look(sample: Sample) -> dict[str, Tensor]:
        output = weighted_values(sample.dense.call, sample.dense.weights)[0]
        mixed.setdefault(sample.layer, []).append((output, sample.values[:, sample.visible - 1]))
        entry = detect(sample.logits, sample.visible)
        if cell["scaled"]:
            return entry
        factors = (sample.visible.log() / math.log(cell["reference"])).clamp(min=1)
        scaled = detect(sample.logits * factors[:, None], sample.visible)
        return entry | {"scaled_effective": scaled["effective"]}

    with log_n_scaling(model, cell["reference"]) if cell["scaled"] else nullcontext():
        lengths = probe.row_lengths(cell["length"], LEAST)
        out: Record = {"detectors": probe.visit_samples(cell, setting, look, lengths), "mixing": []}
        for layer, pairs in mixed.items():
            outputs, values = (torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))
            out["mixing"].append({"layer": layer, **fits.shortened(mixing(outputs, values))})
        # Only where it is compared: a pass costs as much as all the rest.
        if cell["document"] == probe.longest_windows(setting)[0].document:
            out["nll"] = float(token_nll(model, window.input_ids, window.targets).mean())
    return out


def detect(logits: Tensor, visible: Tensor) -> dict[str, Tensor]:
    """The quantities of the detectors, `(heads, queries)` by name; arguments are those of `Sample`.

    `above`: entries above `EPSILON`; `largest`: the largest entry; `effective`: e^H with H in nats; `first`: mass of
    the first `SINKS` keys; of the other keys, renormalised, `rest_largest` and `rest_share`, their entropy over the
    logarithm of their number.
    """
    weights = logits.softmax(-1)
    rest = logits[..., SINKS:].softmax(-1)
    entropy, rest_entropy = (torch.special.entr(w).sum(-1) for w in (weights, rest))
    return {
        "above": (weights > EPSILON).sum(-1),
        "largest": weights.amax(-1),
        "effective": entropy.exp(),
        "first": weights[..., :SINKS].sum(-1),
        "rest_largest": rest.amax(-1),
        "rest_share": rest_entropy / (visible - SINKS).log(),
    }


def kind_of(first: float, rest_largest: float, rest_share: float) -> str:
    """Which of `KINDS` a head is, by the `DECISIVE` quantities of its mean query; see `detect`."""
    if first >= SINK_MASS:
        return "sink-only"
    if rest_largest >= FROZEN:
        return "frozen"
    return "dispersed" if rest_share >= DISPERSED else "none"


def mixing(outputs: Tensor, values: Tensor) -> dict[str, list[float]]:
    """Whether attention makes tokens alike: outputs of some queries against values of as many keys.

    Both are `(heads, queries, dim)`. Lists over the heads, for both: `..._rank`, the stable rank ||X||_F^2 / ||X||_2^2;
    `..._alike`, the squared norm of the mean vector over the mean squared norm, 1 if all are the same vector.
    """
    out: dict[str, list[float]] = {}
    for name, x in (("output", outputs.double()), ("value", values.double())):
        squared = x.square().sum((-1, -2)).clamp(min=1e-30)
        out[f"{name}_rank"] = (squared / torch.linalg.matrix_norm(x, 2).square().clamp(min=1e-30)).tolist()
        out[f"{name}_alike"] = (x.mean(1).square().sum(-1) * x.shape[1] / squared).tolist()
    return out


@contextmanager
def log_n_scaling(model: PreTrainedModel, reference: int) -> Iterator[None]:
    """Run `model` with logits multiplied by max(1, ln n / ln reference) in the layers without a sliding window.

    Queries are multiplied, after their normalisation where they have one. The model was not trained like that.
    """

    def scale(heads: int) -> Any:
        def hook(_: nn.Module, __: object, result: Tensor) -> Tensor:
            axis = probe.token_axis(result, heads)
            seen = torch.arange(1, result.shape[axis] + 1, device=result.device, dtype=torch.float32)
            factors = (seen.log() / math.log(reference)).clamp(min=1).to(result.dtype)
            return result * factors.view([-1] + [1] * (result.dim() - axis - 1))

        return hook

    with probe.hooked(
        (getattr(layer.attention, "q_norm", layer.attention.q_proj), scale(layer.heads("q")))
        for layer in probe.layers_of(model)
        if getattr(layer.attention, "sliding_window", None) is None
    ):
        yield


def conclude(records: Sequence[Record]) -> Findings:
    """The kinds of the heads by n, and the growth of effective entries."""
    plain = [record for record in records if not record["scaled"]]
    forward = next(record for record in records if record["scaled"])
    same_text = next(record for record in plain if record["document"] == forward["document"])
    columns = fits.by_length(plain, "detectors")
    lengths = list(columns["above"])
    n = lengths[-1]
    found = {
        length: [kind_of(*head) for head in zip(*(columns[name][length] for name in DECISIVE), strict=True)]
        for length in lengths
    }
    growing = {name: columns[name] for name in ("effective", "scaled_effective")}
    growing["forward_effective"] = fits.by_length([forward], "detectors")["effective"]
    exponents = {
        name: fits.quartiles(log_slope(list(column), np.stack(list(column.values()), axis=-1))[0])
        for name, column in growing.items()
    }
    layers = [layer for record in plain for layer in record["mixing"]]
    mixed = {name: np.concatenate([layer[name] for layer in layers]) for name in MIXING}
    figures: dict[str, Any] = {
        "n": n,
        "kinds": {length: {kind: own.count(kind) / len(own) for kind in KINDS} for length, own in found.items()},
        "median": {name: {at: np.median(heads) for at, heads in column.items()} for name, column in columns.items()},
        "exponent_of_effective": exponents,
        "mixing": {name: np.median(values) for name, values in mixed.items()}
        | {"share_alike": np.mean(mixed["output_alike"] >= ALIKE)},
        "nll_above_own_when_scaled": forward["nll"] - same_text["nll"],
    }
    more = {"factor of the logits": f"max(1, ln n / ln {forward['reference']})"}
    names = {"effective": "e^H", "scaled_effective": "e^H, log-n scaling", "above": f"entries above {EPSILON:g}"}
    lines = {label: fits.bands(columns[name]) for name, label in names.items()}
    plot = Plot("visible keys n", "entries, quartiles of heads", lengths, lines, {"sqrt(n)": np.sqrt(lengths)})
    kinds, alike = figures["kinds"][n], figures["mixing"]["share_alike"]
    growth, scaled = (exponents[name]["median"] for name in ("effective", "scaled_effective"))
    held = [growth <= 0.1, kinds["frozen"], kinds["dispersed"], alike, scaled <= growth / 2]
    return Findings(figures, more, held, plot)
