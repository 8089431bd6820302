"""Experiment `assumptions`: the claims where the paper's assumptions are violated, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_sparse.lab.bounds import row_radius
from hf_sparse.lab.experiment import Cell, Findings, Plot, Setting
from hf_sparse.lab.fits import shortened, slope, trend
from hf_sparse.lab.inputs import Array, Input, by_input, over_rows
from hf_sparse.lab.topk import RENORMALISED, keys_90, softmax, top_k_errors
from hf_sparse.lab.windows import SIZES, kept_keys
from hf_sparse.results import Record

WINDOW = "n^0.5"
DELTA = 0.05

MARGIN = 0.05
"""A slope that differs by less is no different to a reader, however small its interval."""

BASELINE = Input("signs", 1)
VIOLATIONS = {
    "entries are not bounded (light tails)": [Input("normal", 1)],
    "tails are heavy": [Input("student", 1, shape=3), Input("student-logits", 1, shape=3)],
    "tokens are not independent": [
        Input("shared", 1, shape=0.9),
        Input("chain", 1, shape=0.99),
        Input("copies", 1, shape=0.5),
    ],
    "the norm of the weights grows": [
        Input("signs", 1, growth=0.25),
        Input("signs", 1, growth=0.5),
        Input("signs", 2, growth=0.5),
        Input("signs", 0.5, growth=1),
    ],
}
INPUTS = (BASELINE, *(source for sources in VIOLATIONS.values() for source in sources))


def cells(setting: Setting) -> list[Cell]:
    """Every input at every length."""
    exponents, size = SIZES[setting.scale]
    return [source.fields() | {"n": 2**e, **size} for source in INPUTS for e in exponents]


def measure(cell: Cell, setting: Setting) -> Record:
    """Errors of the window, keys for 90 % of the mass, and the logits against their bound: one number per repeat."""
    n, source = cell["n"], Input.of(cell)
    kept = kept_keys([WINDOW], n)
    # What row_radius gives for a query with ||W^T x||_2 = R, which is what it is on average over bounded queries.
    radius = row_radius(source.norm_at(n), n, DELTA)

    def look(logits: Array, values: Array) -> list[float]:
        weights = softmax(logits)
        errors = top_k_errors(weights, values, kept)[0][: len(RENORMALISED), 0]
        # A shift of all logits changes nothing: what counts is their distance from their mean.
        return [*errors, keys_90(weights), np.abs(logits - logits.mean()).max() / radius]

    columns = over_rows(cell, setting, look).mean(1).T
    return dict(zip((*RENORMALISED, "keys_90", "logit_over_bound"), shortened(columns), strict=True))


def fit_input(label: str, records: Sequence[Record]) -> dict[str, Any]:
    """Slopes over all lengths of one input, and its values at the longest."""
    lengths = [record["n"] for record in records]
    slopes = {name: slope(lengths, [record[name] for record in records]) for name in (*RENORMALISED, "keys_90")}
    last = {name: shortened(np.mean(records[-1][name])) for name in ("lost mass", "keys_90", "logit_over_bound")}
    return {
        "input": label,
        "lengths": lengths,
        **{name: fit.to_dict() for name, fit in slopes.items()},
        "trends": {name: trend(lengths, slopes[name]) for name in RENORMALISED},
        "lost_mass_at_longest": last["lost mass"],
        "keys_90_at_longest": last["keys_90"],
        "logit_over_bound": last["logit_over_bound"],
    }


def conclude(records: Sequence[Record]) -> Findings:
    """For each violated assumption, which errors surely fall less, or rise more, than without it."""
    inputs = by_input(records)
    fits = {label: fit_input(label, own) for label, own in inputs.items()}
    baseline = fits[BASELINE.label]
    more: dict[str, Any] = {"worse": [], "beyond": []}
    held = []
    for name, sources in VIOLATIONS.items():
        own = [fits[source.label] for source in sources]
        held.append([[fit[norm]["low"] > baseline[norm]["high"] + MARGIN for norm in RENORMALISED] for fit in own])
        worse = [", ".join(norm for norm, case in zip(RENORMALISED, c, strict=True) if case) for c in held[-1]]
        more["worse"].append("; ".join(f"{w} ({f['input']})" for w, f in zip(worse, own, strict=True) if w) or "none")
        more["beyond"].append("; ".join(fit["input"] for fit in own if fit["logit_over_bound"] > 1) or "none")
        more[name] = {
            fit["input"]: f"exponent of k_90 {fit['keys_90']['value']:.2f}, slope of the largest error of an entry "
            f"{fit['max entry']['value']:.2f}, lost mass at the longest n {fit['lost_mass_at_longest']:.2f}"
            for fit in (baseline, *own)
        }
    drawn = (BASELINE, Input("student", 1, shape=3), Input("chain", 1, shape=0.99), Input("signs", 1, growth=0.5))
    lines = {source.label: [np.mean(record["max entry"]) for record in inputs[source.label]] for source in drawn}
    plot = Plot("keys n", f"largest error of an entry, {WINDOW} keys", baseline["lengths"], lines)
    return Findings({"window": WINDOW, "fits": list(fits.values())}, more, held, plot)
