"""Experiment `norms`: R and the spread of logits of every head of a model, against sqrt(ln n) and sqrt(2 ln n)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hf_sparse.lab import fits, probe
from hf_sparse.lab.bounds import is_vacuous, logit_radius
from hf_sparse.lab.experiment import Cell, Claim, Experiment, Findings, Setting
from hf_sparse.lab.fits import FloatArray, quartiles
from hf_sparse.lab.plots import Panel
from hf_sparse.lab.scales import input_scales, logit_spread, watched_inputs, weight_scales
from hf_sparse.results import Row

DELTA = 0.05
"""Probability with which the formal bound on the logits of a query may fail."""

_WHERE = "every head of the layers that see {n:,} keys, logits of a row"

CLAIMS = (
    Claim(
        "R is small enough, R = o(sqrt(log n)), for the concentration bound to say that every entry of A is "
        "n^(-1 +- o(1))",
        "machine summary",
        lambda q: 1 - q["share_vacuous"],
        ["R_rope", "sqrt_ln_n", "share_below_sqrt_ln_n", "share_vacuous"],
        f"{_WHERE}, R from weights and largest inputs",
    ),
    Claim(
        "the logits that the model computes are spread by less than sqrt(log n)",
        "derived here",
        lambda q: q["share_below_sqrt_ln_n"]["measured"],
        ["deviation", "sqrt_ln_n", "share_below_sqrt_ln_n", "share_below_freezing"],
        _WHERE,
    ),
    Claim(
        "the spread of logits does not grow with n, as for fixed weights and independent bounded inputs",
        "derived here",
        lambda q: abs(q["exponent_of_ln_n"]) < 0.25,
        ["median deviation", "exponent_of_ln_n", "measured_over_sqrt_ln_n", "exponent of keys for a share of the mass"],
        "every head of the layers that see {first:,} to {n:,} keys, logits of a row, median head",
    ),
    Claim(
        "entries of the inputs can be taken for independent: the deviation that follows is the measured one within 25 %",
        "machine summary",
        lambda q: q["agree"],
        ["independent", "independent_over_measured"],
        _WHERE,
    ),
    Claim(
        "RoPE raises R: the maximum over relative position is more than 5 % above R without RoPE",
        "derived here",
        lambda q: None if q["by construction"] else q["raised"],
        ["rope_over_plain", "by construction"],
        f"{_WHERE}, weights alone",
    ),
)


def cells(setting: Setting) -> Sequence[Cell]:
    """The weights alone, and every document."""
    windows, rows = probe.longest_windows(setting), probe.QUERIES[setting.scale]
    weights = {"part": "weights", "length": max(window.length for window in windows)}
    return [weights, *(probe.window_cell(window, part="text", rows=rows) for window in windows)]


def measure(cell: Cell, setting: Setting) -> Row:
    """See `weight_scales`, `input_scales` and `logit_spread`; a list `spread` with an entry per layer and n."""
    model, length = setting.subject.model, cell["length"]
    if cell["part"] == "weights":
        return {"scales": fits.shortened(weight_scales(model, np.arange(length, dtype=np.float64)))}
    window, lengths = probe.find_window(cell, setting), probe.row_lengths(length)
    with watched_inputs(model) as moments:
        spread = probe.visit_samples(model, window, lengths, cell["rows"], logit_spread)
    return {"inputs": fits.shortened(input_scales(model, moments, length)), "spread": spread}


def trivial_rotation(ratio: FloatArray) -> str:
    """Why R cannot depend on the rotation, given R with over R without it; empty if it can.

    Where queries and keys are normalised after their projection, W is the rotation alone, of one norm at any angle.
    """
    trivial = np.allclose(ratio, 1, atol=1e-3)
    return "queries and keys are normalised, so that W is the rotation alone" if trivial else ""


def conclude(records: Sequence[Row]) -> Findings:
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
    figures = {
        "n": n,
        "heads": len(measured),
        "sqrt_ln_n": root,
        "freezing": fits.freezing_norm(n),
        "R_rope": quartiles(rope),
        "R_plain": quartiles(plain),
        "rope_over_plain": quartiles(gain),
        "independent": quartiles(independent),
        "measured": {n: quartiles(values) for n, values in deviation.items()},
        "without_sinks": quartiles(spreads["rest"][n]),
        **{name: quartiles(spreads[name][n]) for name in ("sub_gaussian", "tilted", "spread")},
        "independent_over_measured": quartiles(ratio),
        "share_vacuous": np.mean([is_vacuous(n, 2 * radius) for radius in radii]),
        "share_below_sqrt_ln_n": {name: np.mean(values < root) for name, values in scales.items()},
        "share_below_freezing": {n: np.mean(values < fits.freezing_norm(n)) for n, values in deviation.items()},
        "measured_over_sqrt_ln_n": in_units,
        "exponent_of_ln_n": fits.log_log_slope(np.log(lengths), list(medians.values())),
        "share_spread_above_ln_n": np.mean(spreads["spread"][n] > math.log(n)),
    }
    more = {
        "first": lengths[0],
        "deviation": quartiles(measured),
        "median deviation": medians,
        "exponent of keys for a share of the mass": fits.random_energy_exponent(in_units[n]),
        "agree": (ratio > 1 / 1.25) & (ratio < 1.25),
        "raised": gain > 1.05,
        "by construction": trivial_rotation(gain),
    }
    by_layer = measured.reshape(len(layers), -1)
    header = ["layer", "R, RoPE (median head)", "independent", f"measured at n = {n:,}", "least", "most"]
    body = [
        [str(layer), f"{np.median(r):.3g}", *(f"{x:.2f}" for x in (np.median(i), np.median(d), d.min(), d.max()))]
        for layer, r, i, d in zip(layers, rope, independent, by_layer, strict=True)
    ]
    scale = {
        "R, RoPE (median head)": np.median(rope, axis=1),
        "independent entries": np.median(independent, axis=1),
        "measured (band: all heads)": np.quantile(by_layer, [0, 0.5, 1], axis=1),
    }
    spread = {"deviation": fits.bands(deviation), "deviation as tilted": fits.bands(tilted)}
    flat = {"sqrt(ln n)": np.full(len(layers), root)}
    lines = {"sqrt(ln n)": np.sqrt(np.log(lengths)), "sqrt(2 ln n)": [fits.freezing_norm(n) for n in lengths]}
    panels = [
        Panel("Scale of logits by layer", "layer", f"deviation, n = {n:,}", layers, scale, flat, log="y"),
        Panel("Deviation of the logits of a query", "visible keys n", "quartiles of heads", lengths, spread, lines, log="x"),
    ]
    return Findings(figures, more, panels, [(header, body)])


EXPERIMENT = Experiment(
    "norms",
    "R and the spread of logits",
    "R = B^2 ||W||_F stays below sqrt(log n), so that concentration bounds the entries of QK^T",
    "machine summary",
    CLAIMS,
    cells,
    measure,
    conclude,
    needs_model=True,
)
