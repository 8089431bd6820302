"""Experiment `phases`: how many keys carry a query's mass, against the length n and the norm R of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from hf_sparse.lab.experiment import Cell, Findings, Plot, Setting
from hf_sparse.lab.fits import Interval, freezing_norm, normal_keys, random_energy_exponent, shortened, slope
from hf_sparse.lab.inputs import Array, Input, by_input, over_rows
from hf_sparse.lab.topk import EPSILON, keys_90, softmax
from hf_sparse.lab.windows import LATE
from hf_sparse.measure.statistics import log_slope
from hf_sparse.results import Record

LOST = 0.1
"""k_90 loses this share of the mass."""

SCALED = (0.5, 0.75, 1.0, 1.25, 1.41, 1.75)
"""c = R / sqrt(ln n) of inputs whose norm grows."""

# Queries of one repeat: more of short ones, which fluctuate more.
_KEYS_PER_REPEAT = 2**20
_MOST_ROWS, _FEWEST_ROWS = 256, 32
_CLOSE = 0.05


def cells(setting: Setting) -> list[Cell]:
    """Fixed norms over a grid with n; norms that grow as sqrt(ln n); and tokens, to compare with normal logits."""
    small = setting.scale == "small"
    grid = (0.5, 1, 2, 3, 4, 6) if small else np.arange(0.5, 8.5, 0.5).tolist()
    longest, repeats, most = (12, 3, 32) if small else (17, 4, _MOST_ROWS)
    fixed = [Input("logits", norm) for norm in grid] + [Input("signs", norm) for norm in (1, 2, 4)]
    growing = [Input("logits", scale, growth=0.5) for scale in SCALED]
    out = []
    # The exponents of growing norms converge slowly, hence longer queries for them.
    for inputs, exponents in ((fixed, range(8, longest + 1)), (growing, range(10, longest + 2))):
        for source in inputs:
            for n in (2**e for e in exponents):
                rows = min(most, max(_FEWEST_ROWS, _KEYS_PER_REPEAT // n))
                out.append(source.fields() | {"n": n, "rows": rows, "repeats": repeats})
    return out


def measure(cell: Cell, setting: Setting) -> Record:
    """Keys for 90 % of the mass and entries above `EPSILON`, averaged over queries: one number per repeat."""

    def look(logits: Array, _: Array) -> list[int]:
        weights = softmax(logits)
        return [keys_90(weights), int(np.count_nonzero(weights > EPSILON))]

    keys, above = over_rows(cell, setting, look).mean(1).T
    return {"keys_90": shortened(keys), "above": shortened(above)}


def fit_keys(records: Sequence[Record]) -> dict[str, Any]:
    """The exponent of k_90 of one input: over all lengths, over the longest, and in theory."""
    source, lengths = Input.of(records[0]), [record["n"] for record in records]
    keys = np.array([record["keys_90"] for record in records])
    # The closed form at the same lengths, where it says more than one key: its exponent converges as slowly.
    expected = [n * normal_keys(source.norm_at(n), LOST) for n in lengths]
    return {
        "input": source.label,
        **source.fields(),
        "lengths": [lengths[0], lengths[-1]],
        "exponent": slope(lengths, keys).to_dict(),
        "late_exponent": slope(lengths[-LATE:], keys[-LATE:]).to_dict(),
        "closed_form_exponent": round(float(log_slope(lengths, expected)[0]), 4) if min(expected) > 1 else None,
        "limit": 1.0 if source.growth == 0 else random_energy_exponent(source.norm),
        "longest": {"n": lengths[-1], "keys_90": shortened(keys[-1].mean())},
    }


def conclude(records: Sequence[Record]) -> Findings:
    """Exponents of k_90 beside the closed forms."""
    found = [fit_keys(own) for own in by_input(records).values()]
    grid = [record for record in records if record["growth"] == 0 and record["kind"] == "logits"]
    shares = [
        {"n": record["n"], "sigma": record["norm"]}
        | Interval.of(np.array(record["keys_90"]) / record["n"]).to_dict()
        | {"closed_form": round(normal_keys(record["norm"], LOST), 4)}
        for record in grid
        if record["norm"] <= 2
    ]
    growing = {f"c = {fit['norm']:g}": fit for fit in found if fit["growth"] > 0}
    late = {fit["input"]: Interval(**fit["late_exponent"]) for fit in found}
    exponents = {c: late[fit["input"]] for c, fit in growing.items()}
    sublinear = {label: exponent.high < 1 - _CLOSE for label, exponent in late.items()}
    norms = [fit["norm"] for fit in found if sublinear[fit["input"]] and (fit["kind"], fit["growth"]) == ("logits", 0)]
    n = max(record["n"] for record in grid)
    longest = {f"sigma = {record['norm']:g}": record for record in grid if record["n"] == n}
    below = {s: r for s, r in longest.items() if r["norm"] < freezing_norm(n) / 2}
    form = "{value:.4f} [{low:.4f}, {high:.4f}] and {closed_form:.4f}"
    at_longest = {f"sigma = {share['sigma']:g}": share for share in shares if share["n"] == n}
    more: dict[str, Any] = {
        "growing": len(growing),
        "growing_sublinear": sum(sublinear[fit["input"]] for fit in growing.values()),
        "least_norm": min(norms, default=math.inf),
        "exponent of k_90 at large n": {
            fit["input"]: late[fit["input"]] for fit in found if fit["growth"] > 0 or fit["norm"] in (1, 2, 4, 6)
        },
        "C": exponents,
        "limit": {c: fit["limit"] for c, fit in growing.items()},
        "n": n,
        "freezing_sigma": freezing_norm(n),
        "k_90 / n below freezing": {s: float(np.mean(r["keys_90"])) / n for s, r in below.items()},
        f"entries above {EPSILON:g}": {s: float(np.mean(r["above"])) for s, r in longest.items()},
        "k_90 / n and closed form": {sigma: form.format(**share) for sigma, share in at_longest.items()},
        "exponent": {c: Interval(**fit["exponent"]) for c, fit in growing.items()},
        "closed form": {c: fit["closed_form_exponent"] for c, fit in growing.items()},
    }
    known = [fit for fit in growing.values() if fit["closed_form_exponent"] is not None and fit["norm"] <= 1]
    few = [share < 0.01 for share in more["k_90 / n below freezing"].values()]
    held = [
        list(sublinear.values()),
        [all(c.high < 1 for c in exponents.values()), all(a.value > b.value for a, b in pairwise(exponents.values()))],
        [all(few), max(max(record["above"]) for record in longest.values()) <= 1 / EPSILON],
        [abs(share["value"] / share["closed_form"] - 1) < 0.02 for share in at_longest.values()],
        [
            all(abs(fit["exponent"]["value"] - fit["closed_form_exponent"]) < _CLOSE for fit in known),
            all(fit["exponent"]["value"] >= fit["limit"] for fit in growing.values()),
        ],
    ]
    figures = {"exponents_of_keys_90": found, "keys_90_over_n": shares}
    measured = {"measured": [[fit["exponent"][end] for fit in growing.values()] for end in ("low", "value", "high")]}
    theory = {
        label: [math.nan if fit[name] is None else fit[name] for fit in growing.values()]
        for label, name in (("closed form, same n", "closed_form_exponent"), ("limit", "limit"))
    }
    plot = Plot("c, with R = c sqrt(ln n)", "exponent C of k_90", SCALED, measured, theory, log="")
    return Findings(figures, more, held, plot)
