"""Experiment `norms`: R and the spread of logits of every head of a model, against sqrt(ln n) and sqrt(2 ln n)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_sparse.lab import fits, probe
from hf_sparse.lab.bounds import is_vacuous, logit_radius, spectral_scale
from hf_sparse.lab.experiment import Cell, Findings, Plot, Setting
from hf_sparse.lab.scales import head_forms, input_scales, largest_scales, logit_spread, watched_inputs
from hf_sparse.measure.statistics import FloatArray, log_slope
from hf_sparse.results import Record

DELTA = 0.05
"""Probability with which the formal bound on the logits of a query may fail."""


def cells(setting: Setting) -> Sequence[Cell]:
    """The weights alone, and every document."""
    windows, rows = probe.longest_windows(setting), probe.QUERIES[setting.scale]
    weights = {"part": "weights", "length": max(window.length for window in windows)}
    return [weights, *(probe.window_cell(window, part="text", rows=rows) for window in windows)]


def measure(cell: Cell, setting: Setting) -> Record:
    """R and S of every head with B = 1, without RoPE and over all distances; or B and the logits of a text."""
    model, length = setting.model, cell["length"]
    if cell["part"] == "weights":
        spectral = [[spectral_scale(*form) for form in head_forms(layer)] for layer in probe.layers_of(model)]
        scales = {"plain": largest_scales(model, 1), "rope": largest_scales(model, length), "spectral": spectral}
        return {"scales": fits.shortened(scales)}

    with watched_inputs(model) as moments:
        spread = probe.visit_samples(cell, setting, logit_spread, probe.row_lengths(length))
    return {"inputs": fits.shortened(input_scales(model, moments, length)), "spread": spread}


def trivial_rotation(ratio: FloatArray) -> str:
    """Why R cannot depend on the rotation, given R with over R without it; empty if it can.

    Where queries and keys are normalised after their projection, W is the rotation alone, of one norm at any angle.
    """
    trivial = np.allclose(ratio, 1, atol=1e-3)
    return "queries and keys are normalised, so that W is the rotation alone" if trivial else ""


def conclude(records: Sequence[Record]) -> Findings:
    """R and the spread of logits against the thresholds."""
    weights = next(record["scales"] for record in records if record["part"] == "weights")
    texts = [record for record in records if record["part"] == "text"]
    spreads = fits.by_length(texts, "spread")
    deviation, tilted = spreads["deviation"], spreads["tilted"]
    lengths = list(deviation)
    n = lengths[-1]
    layers = sorted({entry["layer"] for entry in texts[0]["spread"] if entry["n"] == n})  # those that see the last n
    squared = np.mean([np.square(text["inputs"]["bound"]) for text in texts], axis=0)
    plain, rope, spectral = ((squared * np.array(weights[name]))[layers] for name in ("plain", "rope", "spectral"))
    gain = (np.array(weights["rope"]) / np.array(weights["plain"]))[layers]
    independent = np.mean([text["inputs"]["independent"] for text in texts], axis=0)[layers]
    measured, root = deviation[n], math.sqrt(math.log(n))
    ratio = independent.ravel() / measured
    medians = {n: float(np.median(values)) for n, values in deviation.items()}
    in_units = {n: float(np.median(values / math.sqrt(math.log(n)))) for n, values in deviation.items()}
    radii = [logit_radius(r, s, n, DELTA) for r, s in zip(rope.ravel(), spectral.ravel(), strict=True)]
    scales = {"R": rope, "independent": independent, "measured": measured, "measured, tilted": tilted[n]}
    figures: dict[str, Any] = {
        "n": n,
        "heads": len(measured),
        "sqrt_ln_n": root,
        "freezing": fits.freezing_norm(n),
        "R_rope": fits.quartiles(rope),
        "R_plain": fits.quartiles(plain),
        "rope_over_plain": fits.quartiles(gain),
        "independent": fits.quartiles(independent),
        "measured": {n: fits.quartiles(values) for n, values in deviation.items()},
        "without_sinks": fits.quartiles(spreads["rest"][n]),
        **{name: fits.quartiles(spreads[name][n]) for name in ("sub_gaussian", "tilted", "spread")},
        "independent_over_measured": fits.quartiles(ratio),
        "share_vacuous": np.mean([is_vacuous(n, 2 * radius) for radius in radii]),
        "share_below_sqrt_ln_n": {name: np.mean(values < root) for name, values in scales.items()},
        "share_below_freezing": {n: np.mean(values < fits.freezing_norm(n)) for n, values in deviation.items()},
        "measured_over_sqrt_ln_n": in_units,
        "exponent_of_ln_n": log_slope(np.log(lengths), list(medians.values()))[0],
        "share_spread_above_ln_n": np.mean(spreads["spread"][n] > math.log(n)),
    }
    more = {
        "first": lengths[0],
        "deviation": fits.quartiles(measured),
        "median deviation": medians,
        "exponent of keys for a share of the mass": fits.random_energy_exponent(in_units[n]),
        "by construction": trivial_rotation(gain),
    }
    spread = {"deviation": fits.bands(deviation), "deviation as tilted": fits.bands(tilted)}
    thresholds = {"sqrt(ln n)": np.sqrt(np.log(lengths)), "sqrt(2 ln n)": np.sqrt(2 * np.log(lengths))}
    plot = Plot("visible keys n", "deviation of logits, quartiles of heads", lengths, spread, thresholds, log="x")
    held = [
        1 - figures["share_vacuous"],
        figures["share_below_sqrt_ln_n"]["measured"],
        abs(figures["exponent_of_ln_n"]) < 0.25,
        (ratio > 1 / 1.25) & (ratio < 1.25),
        None if more["by construction"] else gain > 1.05,
    ]
    return Findings(figures, more, held, plot)
