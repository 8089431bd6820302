"""Experiment `alpha`: laws k(n) = alpha n^C of equal cost, judged by output error; bounds and certificates.

The errors of heads add up in a layer's output as squares, and each key costs the same, so the best laws minimise the
sum of squared errors plus a price times the sum of keys, head by head, at the one price that spends the budget (a
Lagrangian), as in `hf_sparse.calibration.laws`. Here the selection is exact top-k and the curves start at `LEAST_KEYS`
keys, below what a calibrated policy may keep, so that laws are compared rather than a selector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hf_sparse.calibration.projection import output_weights
from hf_sparse.lab.bounds import certificate, max_entry_floor, output_bound
from hf_sparse.lab.experiment import Cell, Experiment, Findings, Setting, Verdict, decide
from hf_sparse.lab.fits import FloatArray, by_length, log_log_slope, shortened
from hf_sparse.lab.model import (
    QUERIES,
    Layer,
    Sample,
    find_window,
    layers_of,
    longest_windows,
    row_lengths,
    visit_samples,
    window_cell,
)
from hf_sparse.lab.plots import Panel
from hf_sparse.lab.topk import TopK
from hf_sparse.results import Row
from hf_sparse.row_errors import row_shape

ALPHA = {"small": 2.0, "full": 8.0}
"""The law alpha sqrt(n) whose cost all others have."""

LEAST = {"small": 128, "full": 512}
"""Smallest n."""

LEAST_KEYS = 8
"""Fewest keys of a curve and of a law."""

WORST = 0.05
"""Share of the heads that counts as the worst."""

RULE = "alpha sqrt(n)"
BEST = "best alpha n^C"
OURS = "per head, by error"
BOUNDS = ("lost", "certified", "max_entry", "floor", "output", "output_bound")

_GRID = [(alpha, exponent) for exponent in (0.0, 0.25, 0.5, 0.75, 1.0) for alpha in np.geomspace(0.01, 4096, 60)]
_STEPS = 60


def cells(setting: Setting) -> Sequence[Cell]:
    """Every document."""
    more = {"rows": QUERIES[setting.scale], "alpha": ALPHA[setting.scale], "least": LEAST[setting.scale]}
    return [window_cell(window, **more) for window in longest_windows(setting.subject)]


def measure(cell: Cell, setting: Setting) -> Row:
    """See `head_errors`: a list with an entry per layer and n."""
    subject = setting.subject
    layers = {layer.index: layer for layer in layers_of(subject.model)}
    found: list[Row] = []

    def visit(sample: Sample) -> None:
        needed = row_shape(sample.dense)["keys_95"][0].mean(-1).tolist()
        entry = head_errors(sample, layers[sample.layer], cell["alpha"]) | {"keys_95": needed}
        found.append({"layer": sample.layer, "n": sample.length, **shortened(entry)})

    lengths = row_lengths(cell["length"], cell["least"])
    visit_samples(subject.model, find_window(subject, cell), lengths, cell["rows"], visit)
    return {"curves": found}


def key_counts(length: int) -> list[int]:
    """The k at which curves are measured: `LEAST_KEYS`, twice that, ... below `length`."""
    return [LEAST_KEYS << i for i in range(32) if LEAST_KEYS << i < length]


def head_errors(sample: Sample, layer: Layer, alpha: float) -> dict[str, FloatArray]:
    """Errors of exact top-k for every head, means over the queries.

    Returns:
        - `error`, `(heads, key_counts)`: ||W_O (o_k - o)||^2 of the head over ||W_O o||^2 of all heads together, the
          share of the layer's attention output that it gets wrong;
        - for k = alpha sqrt(n), `(heads,)`: `lost`, the lost mass tau; `certified`, the certificate from kept logits
          alone; `max_entry`, ||q - p||_inf; `floor`, tau / k; `output`, ||o_k - o||; `output_bound`, tau times twice
          the largest distance of a value from their mean, which is at least the diameter.
    """
    counts = key_counts(sample.length)
    weights, logits, values = (x.double().numpy() for x in (sample.weights, sample.logits, sample.values))
    projection = output_weights(layer.attention, len(weights), values.shape[-1]).double().cpu().numpy()
    exact = np.einsum("hqk,hkd->hqd", weights, values, optimize=True)
    whole = np.square(np.einsum("hqd,hod->qo", exact, projection, optimize=True)).sum(-1).clip(min=1e-30)
    columns: dict[str, list[FloatArray]] = {}
    for head, own in enumerate(values):
        diameter = 2 * float(np.linalg.norm(own - own.mean(0), axis=1).max())
        gram = projection[head].T @ projection[head]
        queries: dict[str, list[FloatArray]] = {}
        for query, visible in enumerate(sample.visible.tolist()):
            kept = min(math.ceil(alpha * math.sqrt(sample.length)), visible)
            top = TopK.of(weights[head, query], own, [*counts, kept])
            difference, tau = top.renormalised, float(top.lost[-1])
            squared = ((difference @ gram) * difference).sum(-1).clip(min=0) / whole[query]
            found = {
                "error": squared[:-1],
                "lost": tau,
                "certified": certificate(np.sort(logits[head, query])[-kept:], visible - kept),
                "max_entry": top.largest[-1],
                "floor": max_entry_floor(tau, kept),
                "output": np.linalg.norm(difference[-1]),
                "output_bound": output_bound(tau, diameter),
            }
            for name, value in found.items():
                queries.setdefault(name, []).append(np.asarray(value))
        for name, parts in queries.items():
            columns.setdefault(name, []).append(np.mean(parts, axis=0))
    return {name: np.array(column) for name, column in columns.items()}


@dataclass(frozen=True)
class Curves:
    """Curves of every head of the layers that see the most keys.

    Attributes:
        counts: For each n, the k measured, and n itself at last.
        error: For each n, `(heads, counts)`: the error at k; 0 at n.
        needed: For each n, `(heads,)`: keys that retain a given mass.
    """

    counts: dict[int, FloatArray]
    error: dict[int, FloatArray]
    needed: dict[int, FloatArray]

    @classmethod
    def of(cls, records: Sequence[Row]) -> Curves:
        """The mean curves of some documents."""
        error, needed = (by_length(records, "curves", name) for name in ("error", "keys_95"))
        counts = {n: np.array([*key_counts(n), n], np.float64) for n in error}
        return cls(counts, {n: np.pad(curves, ((0, 0), (0, 1))) for n, curves in error.items()}, needed)

    @property
    def lengths(self) -> list[int]:
        """The n, rising."""
        return list(self.counts)

    @property
    def heads(self) -> int:
        """Number of heads."""
        return len(self.error[self.lengths[0]])

    def errors(self, keys: FloatArray) -> FloatArray:
        """Errors under `keys` `(lengths, heads, laws)`: the same shape, linear in log k between the measured k."""
        return np.array(
            [
                [
                    np.interp(np.log(k), np.log(self.counts[n]), errors)
                    for k, errors in zip(own, self.error[n], strict=True)
                ]
                for n, own in zip(self.lengths, keys, strict=True)
            ]
        )


Law = tuple[FloatArray, FloatArray]
"""alpha and C of every head, `(heads,)` each."""


def keys_of(law: Law, lengths: Sequence[int]) -> FloatArray:
    """k of every head at every n, at least `LEAST_KEYS` and at most n: `(lengths, *law.shape)`."""
    n = np.asarray(lengths, np.float64).reshape(-1, *[1] * np.ndim(law[0]))
    keys: FloatArray = np.clip(law[0] * n ** law[1], LEAST_KEYS, n)
    return keys


def spend(make: Callable[[float], Law], lengths: Sequence[int], cost: float) -> Law:
    """The law `make(x)`, whose keys grow with x > 0, of at most `cost` keys a query, mean over heads and n."""
    low, high = 1e-8, 1e8
    for _ in range(_STEPS):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if keys_of(make(middle), lengths).mean() < cost else (low, middle)
    return make(low)


def laws_of(curves: Curves, cost: float) -> dict[str, Law]:
    """The laws that are compared, of equal cost: one for all heads, and two ways to one per head."""
    ones, lengths = np.ones(curves.heads), curves.lengths

    def uniform(exponent: float) -> Law:
        return spend(lambda alpha: (alpha * ones, exponent * ones), lengths, cost)

    def error(law: Law) -> float:
        return float(curves.errors(keys_of(law, lengths)[..., None]).sum())

    needed = np.stack(list(curves.needed.values()))
    slopes = log_log_slope(lengths, needed)
    level = np.exp(np.log(needed).mean(0) - slopes * np.log(lengths).mean())
    exponents = np.clip(slopes, 0, 1)
    # Errors and costs of a grid of laws for every head, `(heads, laws)` and `(laws,)`.
    alphas, powers = (np.array(column) for column in zip(*_GRID, strict=True))
    grid = keys_of((alphas, powers), lengths)
    errors = curves.errors(np.repeat(grid[:, None], curves.heads, axis=1)).mean(0)
    costs = grid.mean(0)

    def cheapest(keys_a_price: float) -> Law:
        best = (errors + costs / keys_a_price).argmin(1)
        return alphas[best], powers[best]

    return {
        RULE: uniform(0.5),
        "fixed": uniform(0.0),
        "fraction": uniform(1.0),
        BEST: min((uniform(exponent) for exponent in np.linspace(0, 1, 21)), key=error),
        "per head, by 95 % mass": spend(lambda factor: (factor * level, exponents), lengths, cost),
        OURS: spend(cheapest, lengths, cost),
    }


def conclude(records: Sequence[Row]) -> Findings:
    """Laws fitted on all documents but the last, judged on the last; certificates on all."""
    fitted, held_out = (Curves.of(part) for part in ((records[:-1] or records), records[-1:]))
    alpha, lengths = records[0]["alpha"], fitted.lengths
    cost = float(np.mean([min(alpha * math.sqrt(n), n) for n in lengths]))
    laws: dict[str, Row] = {}
    for name, law in laws_of(fitted, cost).items():
        keys = keys_of(law, lengths)
        errors = held_out.errors(keys[..., None])[..., 0]
        laws[name] = {
            "keys": float(keys.mean()),
            "fitted": float(fitted.errors(keys[..., None]).mean()),
            "held_out": float(errors.mean()),
            "by_n": dict(zip(lengths, errors.mean(1).tolist(), strict=True)),
            "alpha": float(np.median(law[0])),
            "exponent": float(np.median(law[1])),
        }
        if name == RULE:
            by_head = np.sort(errors.mean(0))[::-1]
    concentrated = float(by_head[: math.ceil(WORST * len(by_head))].sum() / by_head.sum())
    ratio = {name: law["held_out"] / laws[RULE]["held_out"] for name, law in laws.items()}
    first, last = lengths[0], lengths[-1]
    bound = {name: by_length(records, "curves", name)[last] for name in BOUNDS}
    informative = float(np.mean(bound["certified"] < 0.5))
    middle = {name: float(np.median(values)) for name, values in bound.items()}
    middle["output_over_bound"] = float(np.median(bound["output"] / np.maximum(bound["output_bound"], 1e-30)))
    figures = {
        "laws": laws,
        "held_out_error_over_rule": ratio,
        "error_in_worst_heads": concentrated,
        "n": last,
        "heads": fitted.heads,
        "bounds": middle,
        "share_certified_below_half": informative,
    }
    where = f"squared output error of exact top-k at equal cost, n = {first:,} to {last:,}, every head, held-out text"
    compared = {
        "keys a query": cost,
        f"error over that of {alpha:g} sqrt(n)": {name: value for name, value in ratio.items() if name != RULE},
        "best single law": f"{laws[BEST]['alpha']:.3g} n^{laws[BEST]['exponent']:.2f}",
        f"share of the error in the worst {100 * WORST:g} % of heads under {alpha:g} sqrt(n)": concentrated,
    }
    verdicts = [
        Verdict(
            "alpha by an objective (least output error at the price of a key, per head) beats alpha sqrt(n) and laws "
            "fitted to retained mass",
            "derived here",
            decide(ratio[OURS] < 0.95 * min(value for name, value in ratio.items() if name != OURS)),
            where,
            compared,
        ),
        Verdict(
            "an adaptive window alpha n^C, 0 < C < 1, has less error than a fixed one at equal cost over lengths",
            "abstract",
            decide(min(ratio[RULE], ratio[BEST]) < ratio["fixed"]),
            where,
            compared,
        ),
        Verdict(
            "the certificate from kept logits is informative on real rows: below one half",
            "derived here",
            decide(informative),
            f"exact top-k, every head of the layers that see {last:,} keys",
            {
                "kept keys": f"{math.ceil(alpha * math.sqrt(last))} of {last:,}",
                "lost mass, median head": middle["lost"],
                "certificate, median head": middle["certified"],
                "share of heads below 0.5": informative,
                "largest error of an entry": middle["max_entry"],
                "its floor tau / k": middle["floor"],
                "output error over its bound tau * diameter": middle["output_over_bound"],
            },
        ),
    ]
    header = ["law", "alpha (median)", "C (median)", "keys a row", "error, fitted texts", "error, held out", "over rule"]
    form = "{alpha:.3g} {exponent:.2f} {keys:.0f} {fitted:.3g} {held_out:.3g}"
    body = [[name, *form.format(**law).split(), f"{ratio[name]:.2f}"] for name, law in laws.items()]
    shown = (RULE, "fixed", "per head, by 95 % mass", OURS)
    order = np.argsort(bound["lost"])
    lost, certified = (np.maximum(bound[name][order], 1e-6) for name in ("lost", "certified"))
    panels = [
        Panel(
            "Laws at equal cost, held-out text",
            verdicts[0].caption,
            lengths,
            "visible keys n",
            "squared output error, mean head",
            {name: list(laws[name]["by_n"].values()) for name in shown},
        ),
        Panel(
            "Lost and certified mass",
            verdicts[2].caption,
            lost.tolist(),
            "lost mass tau",
            "certificate",
            {"a head, mean query": certified},
            {"tight": lost},
            points=True,
        ),
    ]
    return Findings(shortened(figures), verdicts, panels, [(header, body)])


EXPERIMENT = Experiment(
    "alpha",
    "Alpha by an objective, and certificates",
    "alpha n^C performs better than a fixed window; alpha is not derived from the theory",
    "abstract",
    cells,
    measure,
    conclude,
    needs_model=True,
)
