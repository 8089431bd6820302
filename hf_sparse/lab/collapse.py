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
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.engines.common import weighted_values
from hf_sparse.lab import fits, probe
from hf_sparse.lab.experiment import Cell, Experiment, Findings, Setting
from hf_sparse.lab.plots import Panel
from hf_sparse.lab.probe import SINKS, Sample
from hf_sparse.lab.topk import EPSILON
from hf_sparse.measure.perplexity import token_nll
from hf_sparse.results import Record

REFERENCE = {"small": 128, "full": 512}
"""Keys up to which log-n scaling leaves logits as they are."""

LEAST = 256
"""Smallest n."""

SINK_MASS = 0.8
FROZEN = 0.8
DISPERSED = 0.95
ALIKE = 0.95

Kind = Literal["sink-only", "frozen", "dispersed", "none"]
KINDS: tuple[Kind, ...] = ("sink-only", "frozen", "dispersed", "none")


def cells(setting: Setting) -> Sequence[Cell]:
    """Every document, and the first one with the logits of all layers scaled."""
    windows = probe.longest_windows(setting)
    more = {"rows": probe.QUERIES[setting.scale], "reference": REFERENCE[setting.scale]}
    plain = [probe.window_cell(window, scaled=False, **more) for window in windows]
    return [*plain, probe.window_cell(windows[0], scaled=True, **more)]


def measure(cell: Cell, setting: Setting) -> Record:
    """Detectors by layer and n, on the logits as they are and scaled after the fact; the mixing of values; the loss."""
    model, window = setting.subject.model, probe.find_window(cell, setting)
    mixed: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def look(sample: Sample) -> Record:
        output = weighted_values(sample.dense.call, sample.dense.weights)[0]
        mixed.setdefault(sample.layer, []).append((output, sample.values[:, sample.visible - 1]))
        entry = detect(sample.logits, sample.visible, SINKS)
        if cell["scaled"]:
            return entry
        scaled = detect(log_scaled(sample, cell["reference"]), sample.visible, SINKS)
        return entry | {"scaled_effective": scaled["effective"]}

    with log_n_scaling(model, cell["reference"]) if cell["scaled"] else nullcontext():
        lengths = probe.row_lengths(cell["length"], LEAST)
        detectors = probe.visit_samples(model, window, lengths, cell["rows"], look)
        out: Record = {"detectors": detectors, "mixing": []}
        for layer, pairs in mixed.items():
            outputs, values = (torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))
            out["mixing"].append({"layer": layer, **fits.shortened(mixing(outputs, values))})
        # Only where it is compared: a pass costs as much as all the rest.
        if cell["document"] == probe.longest_windows(setting)[0].document:
            out["nll"] = float(token_nll(model, window.input_ids, window.targets).mean())
    return out


def detect(logits: Tensor, visible: Tensor, sinks: int) -> dict[str, list[float]]:
    """The quantities of the detectors, means over the queries.

    Args:
        logits: `(heads, queries, keys)`; -inf for keys that a query does not see.
        visible: Keys that a query sees, all from the first one on, `(queries,)`; more than `sinks` + 1.
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


def kind_of(first: float, rest_largest: float, rest_share: float) -> Kind:
    """The kind of a head, by its mean query; see `detect`.

    `sink-only` if the first keys have `SINK_MASS` or more; else `frozen` if one of the others has `FROZEN` of what
    remains; else `dispersed` if the entropy is `DISPERSED` of the most there is; else `none`.
    """
    if first >= SINK_MASS:
        return "sink-only"
    if rest_largest >= FROZEN:
        return "frozen"
    return "dispersed" if rest_share >= DISPERSED else "none"


def log_scaled(sample: Sample, reference: int) -> Tensor:
    """The logits times max(1, ln n / ln reference), n the keys that a query sees: `(heads, queries, keys)`."""
    factors = sample.visible.log() / math.log(reference)
    return sample.logits * factors.clamp(min=1)[:, None]


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
def log_n_scaling(model: PreTrainedModel, reference: int) -> Iterator[PreTrainedModel]:
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

    with probe.hooks() as handles:
        for layer in probe.layers_of(model):
            if getattr(layer.attention, "sliding_window", None) is None:
                module = getattr(layer.attention, "q_norm", layer.attention.q_proj)
                handles.append(module.register_forward_hook(scale(layer.heads("q"))))
        yield model


def conclude(records: Sequence[Record]) -> Findings:
    """The kinds of the heads by n, and the growth of effective entries."""
    plain = [record for record in records if not record["scaled"]]
    forward = next(record for record in records if record["scaled"])
    same_text = next(record for record in plain if record["document"] == forward["document"])
    columns = fits.by_length(plain, "detectors")
    lengths = list(columns["above"])
    n = lengths[-1]
    kinds = {}
    for length in lengths:
        heads = zip(*(columns[name][length] for name in ("first", "rest_largest", "rest_share")), strict=True)
        found = [kind_of(*head) for head in heads]
        kinds[length] = {kind: found.count(kind) / len(found) for kind in KINDS}
    growing = {name: columns[name] for name in ("effective", "scaled_effective")}
    growing["forward_effective"] = fits.by_length([forward], "detectors")["effective"]
    layers = [layer for record in plain for layer in record["mixing"]]
    flat = {
        name: np.concatenate([layer[name] for layer in layers])
        for name in ("output_alike", "value_alike", "output_rank", "value_rank")
    }
    median = {name: {length: np.median(heads) for length, heads in column.items()} for name, column in columns.items()}
    exponents = {
        name: fits.quartiles(fits.log_log_slope(list(column), np.stack(list(column.values()))))
        for name, column in growing.items()
    }
    figures: dict[str, Any] = {
        "n": n,
        "kinds": kinds,
        "median": {name: median[name] for name in plain[0]["detectors"][0] if name in median},
        "exponent_of_effective": exponents,
        "mixing": {name: np.median(values) for name, values in flat.items()}
        | {"share_alike": np.mean(flat["output_alike"] >= ALIKE)},
        "nll_above_own_when_scaled": forward["nll"] - same_text["nll"],
    }
    more = {"factor of the logits": f"max(1, ln n / ln {forward['reference']})"}
    names = {
        "above": f"entries above {EPSILON:g}",
        "effective": "e^H",
        "largest": "largest",
        "first": f"first {SINKS} keys",
        "rest_share": "H / ln n without them",
    }
    body = [
        [
            f"{length:,}",
            *(f"{median[name][length]:.3g}" for name in names),
            *(f"{100 * kinds[length][kind]:.0f} %" for kind in KINDS[:3]),
        ]
        for length in lengths
    ]
    shares: dict[str, Any] = {kind: [100 * kinds[length][kind] for length in lengths] for kind in KINDS}
    drawn = {"effective": "e^H", "scaled_effective": "e^H, log-n scaling", "above": names["above"]}
    entries = {label: fits.bands(columns[name]) for name, label in drawn.items()}
    root = {"sqrt(n)": np.sqrt(lengths)}
    panels = [
        Panel("Kinds of heads", "visible keys n", "% of heads", lengths, shares, log="x"),
        Panel("Effective entries", "visible keys n", "entries, quartiles of heads", lengths, entries, root),
    ]
    growth, scaled = (exponents[name]["median"] for name in ("effective", "scaled_effective"))
    alike = figures["mixing"]["share_alike"]
    held = [growth <= 0.1, kinds[n]["frozen"], kinds[n]["dispersed"], alike, scaled <= growth / 2]
    return Findings(figures, more, held, panels, [(["n", *names.values(), *KINDS[:3]], body)])


EXPERIMENT = Experiment("collapse", cells, measure, conclude, needs_model=True)
