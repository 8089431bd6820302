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
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hf_sparse.calibration.laws import cheapest, interpolated
from hf_sparse.calibration.projection import output_weights
from hf_sparse.diagnostics import concentration
from hf_sparse.lab import fits, probe
from hf_sparse.lab.bounds import certificate, max_entry_floor, output_bound
from hf_sparse.lab.experiment import Cell, Findings, Plot, Setting
from hf_sparse.lab.topk import top_k_errors
from hf_sparse.laws import bisect
from hf_sparse.measure.statistics import FloatArray, log_slope
from hf_sparse.results import Record

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
MASS = "per head, by 95 % mass"
OURS = "per head, by error"
BOUNDS = ("lost", "certified", "max_entry", "floor", "output", "output_bound")


def cells(setting: Setting) -> Sequence[Cell]:
    """Every document."""
    more = {"rows": probe.QUERIES[setting.scale], "alpha": ALPHA[setting.scale], "least": LEAST[setting.scale]}
    return [probe.window_cell(window, **more) for window in probe.longest_windows(setting)]


def measure(cell: Cell, setting: Setting) -> Record:
    """See `head_errors`: a list with an entry per layer and n."""
    layers = {layer.index: layer for layer in probe.layers_of(setting.model)}

    def look(sample: probe.Sample) -> dict[str, ArrayLike]:
        needed = concentration(sample.dense)["keys_95"][0]
        return {**head_errors(sample, layers[sample.layer], cell["alpha"]), "keys_95": needed}

    lengths = probe.row_lengths(cell["length"], cell["least"])
    return {"curves": probe.visit_samples(cell, setting, look, lengths)}


def key_counts(length: int) -> list[int]:
    """The k at which curves are measured: `LEAST_KEYS`, twice that, ... below `length`."""
    return [LEAST_KEYS << i for i in range(32) if LEAST_KEYS << i < length]


def head_errors(sample: probe.Sample, layer: probe.Layer, alpha: float) -> dict[str, FloatArray]:
    """Errors of exact top-k for every head and query.

    Returns:
        - `error`, `(heads, queries, key_counts)`: ||W_O (o_k - o)||^2 of the head over ||W_O o||^2 of all heads
          together, the share of the layer's attention output that it gets wrong;
        - `BOUNDS`, for k = alpha sqrt(n), `(heads, queries)`: the lost mass tau and its certificate; ||q - p||_inf and
          tau / k; ||o_k - o|| and its bound, tau times twice the largest distance of a value from their mean, which is
          at least the diameter.
    """
    counts = key_counts(sample.length)
    weights, logits, values = (x.double().numpy() for x in (sample.weights, sample.logits, sample.values))
    projection = output_weights(layer.attention, len(weights), values.shape[-1]).double().cpu().numpy()
    exact = np.einsum("hqk,hkd->hqd", weights, values, optimize=True)
    whole = np.square(np.einsum("hqd,hod->qo", exact, projection, optimize=True)).sum(-1).clip(min=1e-30)
    found: dict[str, list[Any]] = {name: [] for name in ("error", *BOUNDS)}
    for head, own in enumerate(values):
        diameter = 2 * float(np.linalg.norm(own - own.mean(0), axis=1).max())
        gram = projection[head].T @ projection[head]
        for query, visible in enumerate(sample.visible.tolist()):
            kept = min(math.ceil(alpha * math.sqrt(sample.length)), visible)
            errors, difference = top_k_errors(weights[head, query], own, [*counts, kept])
            largest, lost, output = errors[:3, -1]  # in the order of NORMS
            found["error"].append(((difference @ gram) * difference).sum(-1)[:-1].clip(min=0) / whole[query])
            found["lost"].append(lost)
            found["certified"].append(certificate(np.sort(logits[head, query])[-kept:], visible - kept))
            found["max_entry"].append(largest)
            found["floor"].append(max_entry_floor(lost, kept))
            found["output"].append(output)
            found["output_bound"].append(output_bound(lost, diameter))
    return {name: np.reshape(each, (len(values), len(whole), *np.shape(each)[1:])) for name, each in found.items()}


@dataclass(frozen=True)
class Curves:
    """Curves of every head of the layers that see the most keys.

    Attributes:
        error: For each n, `(heads, counts)`: the error at each of `key_counts`, and 0 at n.
        needed: For each n, `(heads,)`: keys that retain 95 % of the mass.
    """

    error: dict[int, FloatArray]
    needed: dict[int, FloatArray]

    @classmethod
    def of(cls, records: Sequence[Record]) -> Curves:
        """The mean curves of some documents."""
        columns = fits.by_length(records, "curves")
        return cls({n: np.pad(curves, ((0, 0), (0, 1))) for n, curves in columns["error"].items()}, columns["keys_95"])

    def errors(self, keys: FloatArray) -> FloatArray:
        """Errors under the keys of laws, as `keys_of` gives them: `(lengths, heads, laws)`."""
        curves = zip(self.error.items(), keys, strict=True)
        return np.stack([interpolated([*key_counts(n), n], error, kept) for (n, error), kept in curves])


Law = tuple[FloatArray, FloatArray]
"""alpha and C, `(heads or 1, laws)`: a law for each head or for all, or several to choose from."""


def keys_of(law: Law, lengths: Sequence[int]) -> FloatArray:
    """k at every n, at least `LEAST_KEYS` and at most n: `(lengths, heads or 1, laws)`."""
    n = np.reshape(np.asarray(lengths, np.float64), (-1, 1, 1))
    return np.asarray(np.clip(law[0] * n ** law[1], LEAST_KEYS, n))


def laws_of(curves: Curves, cost: float) -> dict[str, Law]:
    """The laws that are compared, of `cost` keys a query, mean over heads and n: for all heads, and two for each."""
    lengths = list(curves.error)

    def spend(make: Callable[[float], Law]) -> Law:
        """The law `make(x)` of at most that cost; its keys grow with x > 0."""
        cheap, _ = bisect(lambda x: bool(keys_of(make(x), lengths).mean() < cost), 1e-8, 1e8, logarithmic=True)
        return make(cheap)

    def uniform(exponent: float) -> Law:
        return spend(lambda alpha: (np.array([[alpha]]), np.array([[exponent]])))

    slopes, level = log_slope(lengths, np.transpose(list(curves.needed.values())))
    scale, power = np.exp(level)[:, None], np.clip(slopes, 0, 1)[:, None]
    alphas, exponents = np.tile(np.geomspace(0.01, 4096, 60), 5)[None], np.repeat([0.0, 0.25, 0.5, 0.75, 1.0], 60)[None]
    keys = keys_of((alphas, exponents), lengths)
    errors, costs = curves.errors(keys).mean(0), keys.mean((0, 1))

    def by_error(keys_a_price: float) -> Law:
        best = cheapest(errors, costs, 1 / keys_a_price)[:, None]
        return alphas[0, best], exponents[0, best]

    single = [uniform(exponent) for exponent in np.linspace(0, 1, 21)]
    return {
        RULE: uniform(0.5),
        "fixed": uniform(0.0),
        "fraction": uniform(1.0),
        BEST: min(single, key=lambda law: curves.errors(keys_of(law, lengths)).sum()),
        MASS: spend(lambda factor: (factor * scale, power)),
        OURS: spend(by_error),
    }


def conclude(records: Sequence[Record]) -> Findings:
    """Laws fitted on all documents but the last, judged on the last; certificates on all."""
    fitted, held_out = (Curves.of(part) for part in ((records[:-1] or records), records[-1:]))
    alpha, lengths = records[0]["alpha"], list(fitted.error)
    n = lengths[-1]
    cost = float(np.mean([min(alpha * math.sqrt(n), n) for n in lengths]))
    chosen = laws_of(fitted, cost)
    keys = {name: keys_of(law, lengths) for name, law in chosen.items()}
    errors = {name: held_out.errors(own) for name, own in keys.items()}
    laws = {
        name: {
            "keys": keys[name].mean(),
            "fitted": fitted.errors(keys[name]).mean(),
            "held_out": errors[name].mean(),
            "by_n": dict(zip(lengths, errors[name].mean((1, 2)), strict=True)),
            "alpha": np.median(law[0]),
            "exponent": np.median(law[1]),
        }
        for name, law in chosen.items()
    }
    by_head = np.sort(errors[RULE].mean((0, 2)))[::-1]
    ratio = {name: float(error.mean() / errors[RULE].mean()) for name, error in errors.items()}
    columns = fits.by_length(records, "curves")
    bound = {name: columns[name][n] for name in BOUNDS}
    over = bound["output"] / np.maximum(bound["output_bound"], 1e-30)
    figures = {
        "laws": laws,
        "held_out_error_over_rule": ratio,
        "error_in_worst_heads": by_head[: math.ceil(WORST * len(by_head))].sum() / by_head.sum(),
        "n": n,
        "heads": len(fitted.needed[n]),
        "bounds": {name: np.median(values) for name, values in (bound | {"output_over_bound": over}).items()},
        "share_certified_below_half": np.mean(bound["certified"] < 0.5),
    }
    more = {
        "first": lengths[0],
        "keys a query": cost,
        "best single law": f"{laws[BEST]['alpha']:.3g} n^{laws[BEST]['exponent']:.2f}",
        "kept keys": f"{math.ceil(alpha * math.sqrt(n))} of {n:,}",
    }
    shown = {name: errors[name].mean((1, 2)) for name in (RULE, "fixed", MASS, OURS)}
    plot = Plot("visible keys n", "squared output error at equal cost, held-out text", lengths, shown)
    others = min(value for name, value in ratio.items() if name != OURS)
    best, certified_share = min(ratio[RULE], ratio[BEST]), figures["share_certified_below_half"]
    held = [ratio[OURS] < 0.95 * others, best < ratio["fixed"], certified_share]
    return Findings(figures, more, held, plot)
