"""Experiment `norms`: R and the spread of logits of every head of a model, against sqrt(ln n) and sqrt(2 ln n)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hf_sparse.lab.bounds import is_vacuous, logit_radius
from hf_sparse.lab.experiment import Cell, Experiment, Findings, Setting, Verdict, decide
from hf_sparse.lab.fits import (
    FloatArray,
    bands,
    by_length,
    freezing_norm,
    log_log_slope,
    medians,
    quartiles,
    random_energy_exponent,
    shortened,
)
from hf_sparse.lab.model import QUERIES, Sample, find_window, longest_windows, row_lengths, visit_samples, window_cell
from hf_sparse.lab.plots import Panel
from hf_sparse.lab.scales import input_scales, logit_spread, watched_inputs, weight_scales
from hf_sparse.results import Row

DELTA = 0.05
"""Probability with which the formal bound on the logits of a query may fail."""


def cells(setting: Setting) -> Sequence[Cell]:
    """The weights alone, and every document."""
    windows = longest_windows(setting.subject)
    weights = {"part": "weights", "length": max(window.length for window in windows)}
    return [weights, *(window_cell(window, part="text", rows=QUERIES[setting.scale]) for window in windows)]


def measure(cell: Cell, setting: Setting) -> Row:
    """See `weight_scales`, `input_scales` and `logit_spread`; a list `spread` with an entry per layer and n."""
    subject = setting.subject
    if cell["part"] == "weights":
        return {"scales": shortened(weight_scales(subject.model, np.arange(cell["length"], dtype=np.float64)))}
    spread: list[Row] = []

    def visit(sample: Sample) -> None:
        spread.append({"layer": sample.layer, "n": sample.length, **shortened(logit_spread(sample))})

    with watched_inputs(subject.model) as moments:
        window = find_window(subject, cell)
        visit_samples(subject.model, window, row_lengths(cell["length"]), cell["rows"], visit)
    return {"inputs": shortened(input_scales(subject.model, moments, cell["length"])), "spread": spread}


def trivial_rotation(ratio: FloatArray) -> str:
    """Why R cannot depend on the rotation, given R with over R without it; empty if it can.

    Where queries and keys are normalised after their projection, W is the rotation alone, of one norm at any angle.
    """
    trivial = np.allclose(ratio, 1, atol=1e-3)
    return "queries and keys are normalised, so that W is the rotation alone" if trivial else ""


def conclude(records: Sequence[Row]) -> Findings:
    """R against the thresholds, and which assumption makes the difference."""
    weights = next(record["scales"] for record in records if record["part"] == "weights")
    texts = [record for record in records if record["part"] == "text"]
    spreads = {name: by_length(texts, "spread", name) for name in texts[0]["spread"][0] if name not in ("layer", "n")}
    deviation = spreads["deviation"]
    lengths = list(deviation)
    first, last = lengths[0], lengths[-1]
    layers = sorted({entry["layer"] for entry in texts[0]["spread"] if entry["n"] == last})  # those that see the last n
    squared = np.mean([np.square(text["inputs"]["bound"]) for text in texts], axis=0)
    plain, rope, spectral = ((squared * np.array(weights[name]))[layers] for name in ("plain", "rope", "spectral"))
    gain = (np.array(weights["rope"]) / np.array(weights["plain"]))[layers]
    independent = np.mean([text["inputs"]["independent"] for text in texts], axis=0)[layers]
    measured = deviation[last]
    ratio = independent.ravel() / measured
    root = math.sqrt(math.log(last))
    middle = dict(zip(lengths, medians(deviation), strict=True))
    in_units = {n: float(np.median(values / math.sqrt(math.log(n)))) for n, values in deviation.items()}
    growth = float(log_log_slope(np.log(lengths), list(middle.values())))
    vacuous = np.array(
        [
            is_vacuous(last, 2 * logit_radius(r, s, last, DELTA))
            for r, s in zip(rope.ravel(), spectral.ravel(), strict=True)
        ]
    )
    scales = {"R": rope, "independent": independent, "measured": measured, "measured, tilted": spreads["tilted"][last]}
    below = {name: float(np.mean(values < root)) for name, values in scales.items()}
    thawed = {n: float(np.mean(values < freezing_norm(n))) for n, values in deviation.items()}
    figures = {
        "n": last,
        "heads": len(measured),
        "sqrt_ln_n": root,
        "freezing": freezing_norm(last),
        "R_rope": quartiles(rope),
        "R_plain": quartiles(plain),
        "rope_over_plain": quartiles(gain),
        "independent": quartiles(independent),
        "measured": {n: quartiles(values) for n, values in deviation.items()},
        "without_sinks": quartiles(spreads["rest"][last]),
        **{name: quartiles(spreads[name][last]) for name in ("sub_gaussian", "tilted", "spread")},
        "independent_over_measured": quartiles(ratio),
        "share_vacuous": float(np.mean(vacuous)),
        "share_below_sqrt_ln_n": below,
        "share_below_freezing": thawed,
        "measured_over_sqrt_ln_n": in_units,
        "exponent_of_ln_n": growth,
        "share_spread_above_ln_n": float(np.mean(spreads["spread"][last] > math.log(last))),
    }
    where = f"every head of the layers that see {last:,} keys, logits of a row"
    verdicts = [
        Verdict(
            "R is small enough, R = o(sqrt(log n)), for the concentration bound to say that every entry of A is "
            "n^(-1 +- o(1))",
            "machine summary",
            decide(1 - np.mean(vacuous)),
            where + ", R from weights and largest inputs",
            {
                "R = B^2 ||W||_F at its worst relative position, heads": quartiles(rope),
                "sqrt(ln n)": root,
                "share of heads with R below it": below["R"],
                "share of heads whose bound on the entries of A is vacuous": figures["share_vacuous"],
            },
        ),
        Verdict(
            "the logits that the model computes are spread by less than sqrt(log n)",
            "derived here",
            decide(below["measured"]),
            where,
            {
                "deviation, heads": quartiles(measured),
                f"share of heads below sqrt(ln n) = {root:.2f}": below["measured"],
                f"share below sqrt(2 ln n) = {freezing_norm(last):.2f}": thawed[last],
            },
        ),
        Verdict(
            "the spread of logits does not grow with n, as for fixed weights and independent bounded inputs",
            "derived here",
            decide(abs(growth) < 0.25),
            where.replace(f"{last:,} keys", f"{first:,} to {last:,} keys") + ", median head",
            {
                "deviation by n": {f"{n:,}": value for n, value in middle.items()},
                "exponent of ln n": growth,
                "c, deviation over sqrt(ln n), first and last n": f"{in_units[first]:.2f}, {in_units[last]:.2f}",
                "exponent 1 - c^2 / 2 of keys for a share of the mass, independent Gaussian logits": (
                    random_energy_exponent(in_units[last])
                ),
            },
        ),
        Verdict(
            "entries of the inputs can be taken for independent: the deviation that follows is the measured one within "
            "25 %",
            "machine summary",
            decide((ratio > 1 / 1.25) & (ratio < 1.25)),
            where,
            {"deviation if independent, heads": quartiles(independent), "over the measured one": quartiles(ratio)},
        ),
        Verdict(
            "RoPE raises R: the maximum over relative position is more than 5 % above R without RoPE",
            "derived here",
            "not testable here" if trivial_rotation(gain) else decide(gain > 1.05),
            where + ", weights alone",
            {"R at its worst distance over R without RoPE": quartiles(gain)}
            | ({"by construction": why} if (why := trivial_rotation(gain)) else {}),
        ),
    ]
    by_layer = measured.reshape(len(layers), -1)
    header = ["layer", "R, RoPE (median head)", "independent", f"measured at n = {last:,}", "least", "most"]
    body = [
        [
            str(layer),
            f"{np.median(rope[i]):.3g}",
            f"{np.median(independent[i]):.2f}",
            f"{np.median(by_layer[i]):.2f}",
            f"{by_layer[i].min():.2f}",
            f"{by_layer[i].max():.2f}",
        ]
        for i, layer in enumerate(layers)
    ]
    ends = [np.quantile(by_layer, q, axis=1) for q in (0, 0.5, 1)]
    roots = {"sqrt(ln n)": np.sqrt(np.log(lengths)), "sqrt(2 ln n)": [freezing_norm(n) for n in lengths]}
    panels = [
        Panel(
            "Scale of logits by layer",
            verdicts[0].caption,
            layers,
            "layer",
            f"deviation of logits, n = {last:,}",
            {
                "R, RoPE (median head)": np.median(rope, 1),
                "independent entries": np.median(independent, 1),
                "measured (band: all heads)": ends,
            },
            {"sqrt(ln n)": np.full(len(layers), root)},
            log="y",
        ),
        Panel(
            "Measured deviation of the logits of a query",
            verdicts[2].caption,
            lengths,
            "visible keys n",
            "deviation (band: quartiles of heads)",
            {"deviation": bands(deviation), "deviation as tilted": bands(spreads["tilted"])},
            roots,
            log="x",
        ),
    ]
    return Findings(shortened(figures), verdicts, panels, [(header, body)])


EXPERIMENT = Experiment(
    "norms",
    "R and the spread of logits",
    "R = B^2 ||W||_F stays below sqrt(log n), so that concentration bounds the entries of QK^T",
    "machine summary",
    cells,
    measure,
    conclude,
    needs_model=True,
)
