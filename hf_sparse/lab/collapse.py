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

from hf_sparse.engines.reference import weighted_values
from hf_sparse.lab.experiment import Cell, Experiment, Findings, Setting, Verdict, decide
from hf_sparse.lab.fits import bands, by_length, log_log_slope, medians, quartiles, shortened
from hf_sparse.lab.model import (
    QUERIES,
    SINKS,
    Sample,
    find_window,
    hooks,
    layers_of,
    longest_windows,
    mean_nll,
    row_lengths,
    token_axis,
    visit_samples,
    window_cell,
)
from hf_sparse.lab.plots import Panel
from hf_sparse.lab.topk import EPSILON
from hf_sparse.results import Row

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
    windows = longest_windows(setting.subject)
    more = {"rows": QUERIES[setting.scale], "reference": REFERENCE[setting.scale]}
    plain = [window_cell(window, scaled=False, **more) for window in windows]
    return [*plain, window_cell(windows[0], scaled=True, **more)]


def measure(cell: Cell, setting: Setting) -> Row:
    """Detectors by layer and n, on the logits as they are and scaled after the fact; the mixing of values; the loss."""
    subject = setting.subject
    window = find_window(subject, cell)
    found: list[Row] = []
    outputs: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def visit(sample: Sample) -> None:
        entry = detect(sample.logits, sample.visible, SINKS)
        if not cell["scaled"]:
            scaled = detect(log_scaled(sample, cell["reference"]), sample.visible, SINKS)
            entry["scaled_effective"] = scaled["effective"]
        found.append({"layer": sample.layer, "n": sample.length, **shortened(entry)})
        output = weighted_values(sample.dense.inputs, sample.dense.weights)[0]
        outputs.setdefault(sample.layer, []).append((output, sample.values[:, sample.visible - 1]))

    with log_n_scaling(subject.model, cell["reference"]) if cell["scaled"] else nullcontext():
        visit_samples(subject.model, window, row_lengths(cell["length"], LEAST), cell["rows"], visit)
        # Only where it is compared: a pass costs as much as all the rest.
        compared = cell["document"] == longest_windows(subject)[0].document
        nll = {"nll": mean_nll(subject.model, window)} if compared else {}
    mixed = [
        {"layer": layer, **shortened(mixing(*(torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))))}
        for layer, pairs in outputs.items()
    ]
    return {"detectors": found, "mixing": mixed, **nll}


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
    """The kind of a head, by its mean query.

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


def log_scaled(sample: Sample, reference: int) -> Tensor:
    """The logits times max(1, ln n / ln reference), n the keys that a query sees: `(heads, queries, keys)`."""
    factors = sample.visible.log() / math.log(reference)
    return sample.logits * factors.clamp(min=1)[:, None]


def mixing(outputs: Tensor, values: Tensor) -> dict[str, list[float]]:
    """Whether attention makes tokens alike: outputs of some queries against as many values.

    Args:
        outputs: `(heads, queries, dim)`.
        values: `(heads, queries, dim)`: values of single keys.

    Returns:
        Lists over the heads, for both: `..._rank`, the stable rank ||X||_F^2 / ||X||_2^2; `..._alike`, the squared norm
        of the mean vector over the mean squared norm, 1 if all are the same vector.
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
            axis = token_axis(result, heads)
            seen = torch.arange(1, result.shape[axis] + 1, device=result.device, dtype=torch.float32)
            factors = (seen.log() / math.log(reference)).clamp(min=1).to(result.dtype)
            return result * factors.view([-1] + [1] * (result.dim() - axis - 1))

        return hook

    with hooks() as handles:
        for layer in layers_of(model):
            if getattr(layer.attention, "sliding_window", None) is None:
                module = getattr(layer.attention, "q_norm", layer.attention.q_proj)
                handles.append(module.register_forward_hook(scale(layer.heads("q"))))
        yield model


def conclude(records: Sequence[Row]) -> Findings:
    """The kinds of the heads by n, and the growth of effective entries."""
    plain = [record for record in records if not record["scaled"]]
    forward = next(record for record in records if record["scaled"])
    same_text = next(record for record in plain if record["document"] == forward["document"])
    names = [name for name in plain[0]["detectors"][0] if name not in ("layer", "n")]
    columns = {name: by_length(plain, "detectors", name) for name in names}
    lengths = list(columns["above"])
    first, last = lengths[0], lengths[-1]
    kinds = {}
    for n in lengths:
        heads = zip(*(columns[name][n] for name in ("first", "rest_largest", "rest_share")), strict=True)
        found = [kind_of(*head) for head in heads]
        kinds[n] = {kind: found.count(kind) / len(found) for kind in KINDS}
    growing = {name: columns[name] for name in ("effective", "scaled_effective")}
    growing["forward_effective"] = by_length([forward], "detectors", "effective")
    exponents = {name: quartiles(log_log_slope(list(c), np.stack(list(c.values())))) for name, c in growing.items()}
    growth, scaled, rerun = (exponent["median"] for exponent in exponents.values())
    flat = {
        name: np.array([value for record in plain for layer in record["mixing"] for value in layer[name]])
        for name in ("output_alike", "value_alike", "output_rank", "value_rank")
    }
    collapsed = float(np.mean(flat["output_alike"] >= ALIKE))
    mixed = {name: float(np.median(values)) for name, values in flat.items()}
    cost = forward["nll"] - same_text["nll"]
    middle = {name: dict(zip(lengths, medians(found), strict=True)) for name, found in columns.items()}
    figures = {
        "n": last,
        "kinds": kinds,
        "median": middle,
        "exponent_of_effective": exponents,
        "mixing": mixed | {"share_alike": collapsed},
        "nll_above_own_when_scaled": cost,
    }

    def ends(name: str) -> dict[str, float]:
        return {f"n = {n:,}": middle[name][n] for n in (first, last)}

    where = f"every head of the layers that see {last:,} keys"
    verdicts = [
        Verdict(
            "attention collapses: the entries of a row that are not negligible become one or O(1)",
            "machine summary",
            decide(growth <= 0.1),
            where + ", in the sense of entropy; in the sense of a count above a fixed epsilon it holds for any row",
            {
                f"entries above {EPSILON:g}, median head": ends("above"),
                "effective entries e^H, median head": ends("effective"),
                "exponent of e^H in n, median head": growth,
            },
        ),
        Verdict(
            "attention freezes as n grows: one key besides the sinks takes the mass",
            "derived here",
            decide(kinds[last]["frozen"]),
            where,
            {f"shares of heads at n = {last:,}": kinds[last]},
        ),
        Verdict(
            "attention disperses as n grows: H / ln n tends to 1",
            "derived here",
            decide(kinds[last]["dispersed"]),
            where,
            {
                f"H / ln n without the first {SINKS} keys, median head": ends("rest_share"),
                f"share of heads above {DISPERSED:g}": kinds[last]["dispersed"],
            },
        ),
        Verdict(
            "value mixing makes the outputs of all rows one vector",
            "derived here",
            decide(collapsed),
            where,
            {
                "shared part of the squared norm, median head": {
                    "outputs": mixed["output_alike"], "values": mixed["value_alike"],
                },
                "stable rank, median head": {"outputs": mixed["output_rank"], "values": mixed["value_rank"]},
                f"share of heads whose outputs share more than {ALIKE:g}": collapsed,
            },
        ),
        Verdict(
            "log-n scaling of the logits halves the exponent with which effective entries grow",
            "derived here",
            decide(scaled <= growth / 2),
            where + ", logits scaled after training",
            {
                "factor of the logits": f"max(1, ln n / ln {forward['reference']})",
                "exponent of e^H in n, median head": {
                    "as trained": growth, "scaled": scaled, "all layers rerun scaled": rerun,
                },
                "change of the loss, nats a token": cost,
            },
        ),
    ]  # fmt: skip
    shown = ("above", "effective", "largest", "first", "rest_share")
    header = [
        "n", f"entries above {EPSILON:g}", "e^H", "largest", f"first {SINKS} keys", "H / ln n without them", *KINDS[:3],
    ]  # fmt: skip
    body = [
        [
            f"{n:,}",
            *(f"{middle[name][n]:.3g}" for name in shown),
            *(f"{100 * kinds[n][kind]:.0f} %" for kind in KINDS[:3]),
        ]
        for n in lengths
    ]
    shares = {kind: [100 * kinds[n][kind] for n in lengths] for kind in KINDS}
    entries = {
        "effective entries e^H": bands(columns["effective"]),
        "with log-n scaling": bands(columns["scaled_effective"]),
        f"entries above {EPSILON:g}": bands(columns["above"]),
    }
    what = "entries (band: quartiles of heads)"
    panels = [
        Panel("Kinds of heads", verdicts[1].caption, lengths, "visible keys n", "% of heads", shares, log="x"),
        Panel(
            "Effective entries", verdicts[0].caption, lengths, "visible keys n", what, entries,
            {"sqrt(n)": np.sqrt(lengths)},
        ),
    ]  # fmt: skip
    return Findings(shortened(figures), verdicts, panels, [(header, body)])


EXPERIMENT = Experiment(
    "collapse",
    "Three kinds of attention collapse",
    "attention collapses: a row keeps O(1) entries that are not negligible",
    "machine summary",
    cells,
    measure,
    conclude,
    needs_model=True,
)
