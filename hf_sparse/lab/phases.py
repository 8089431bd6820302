"""Experiment `phases`: how many keys carry a query's mass, against the length n and the norm R of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from hf_sparse.lab import fits
from hf_sparse.lab.experiment import Cell, Experiment, Findings, Setting
from hf_sparse.lab.fits import Interval
from hf_sparse.lab.inputs import Input, by_input, draw_rows
from hf_sparse.lab.plots import Panel
from hf_sparse.lab.topk import EPSILON, row_shape, softmax
from hf_sparse.lab.windows import LATE
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
    """What `row_shape` counts, averaged over queries: one number per repeat."""
    shapes = [
        [row_shape(softmax(logits)) for logits, _ in draw_rows(Input.of(cell), cell["n"], cell["rows"], rng)]
        for rng in setting.rng(cell).spawn(cell["repeats"])
    ]
    return {name: fits.shortened([np.mean([s[name] for s in own]) for own in shapes]) for name in shapes[0][0]}


def fit_keys(records: Sequence[Record]) -> dict[str, Any]:
    """The exponent of k_90 of one input: over all lengths, over the longest, and in theory."""
    source, lengths = Input.of(records[0]), [record["n"] for record in records]
    keys = np.array([record["keys_90"] for record in records])
    # The closed form at the same lengths, where it says more than one key: its exponent converges as slowly.
    expected = [n * fits.normal_keys(source.norm_at(n), LOST) for n in lengths]
    return {
        "input": source.label,
        **source.fields(),
        "lengths": [lengths[0], lengths[-1]],
        "exponent": fits.slope(lengths, keys).to_dict(),
        "late_exponent": fits.slope(lengths[-LATE:], keys[-LATE:]).to_dict(),
        "closed_form_exponent": round(float(fits.log_log_slope(lengths, expected)), 4) if min(expected) > 1 else None,
        "limit": 1.0 if source.growth == 0 else fits.random_energy_exponent(source.norm),
        "longest": {"n": lengths[-1], "keys_90": fits.shortened(keys[-1].mean())},
    }


def conclude(records: Sequence[Record]) -> Findings:
    """Exponents of k_90 beside the closed forms."""
    found = [fit_keys(own) for own in by_input(records).values()]
    grid = [record for record in records if record["growth"] == 0 and record["kind"] == "logits"]
    shares = [
        {"n": record["n"], "sigma": record["norm"]}
        | Interval.of(np.array(record["keys_90"]) / record["n"]).to_dict()
        | {"closed_form": round(fits.normal_keys(record["norm"], LOST), 4)}
        for record in grid
        if record["norm"] <= 2
    ]
    growing = {f"c = {fit['norm']:g}": fit for fit in found if fit["growth"] > 0}
    late = {fit["input"]: Interval(**fit["late_exponent"]) for fit in found}
    sublinear = {label: exponent.high < 1 - _CLOSE for label, exponent in late.items()}
    norms = [fit["norm"] for fit in found if sublinear[fit["input"]] and (fit["kind"], fit["growth"]) == ("logits", 0)]
    n = max(record["n"] for record in grid)
    longest = [record for record in grid if record["n"] == n]
    known = [fit for c, fit in growing.items() if fit["closed_form_exponent"] is not None and fit["norm"] <= 1]
    more: dict[str, Any] = {
        "growing": len(growing),
        "growing_sublinear": sum(sublinear[fit["input"]] for fit in growing.values()),
        "least_norm": min(norms, default=math.inf),
        "exponent of k_90 at large n": {
            fit["input"]: late[fit["input"]] for fit in found if fit["growth"] > 0 or fit["norm"] in (1, 2, 4, 6)
        },
        "C": {c: late[fit["input"]] for c, fit in growing.items()},
        "limit": {c: fit["limit"] for c, fit in growing.items()},
        "n": n,
        "freezing_sigma": fits.freezing_norm(n),
        "k_90 / n below freezing": {
            f"sigma = {record['norm']:g}": float(np.mean(record["keys_90"])) / n
            for record in longest
            if record["norm"] < fits.freezing_norm(n) / 2
        },
        f"entries above {EPSILON:g}": {f"sigma = {r['norm']:g}": float(np.mean(r["above"])) for r in longest},
        "k_90 / n and closed form": {
            f"sigma = {s['sigma']:g}": f"{s['value']:.4f} [{s['low']:.4f}, {s['high']:.4f}] and {s['closed_form']:.4f}"
            for s in shares
            if s["n"] == n
        },
        "exponent": {c: Interval(**fit["exponent"]) for c, fit in growing.items()},
        "closed form": {c: fit["closed_form_exponent"] for c, fit in growing.items()},
    }
    exponents, few = list(more["C"].values()), [share < 0.01 for share in more["k_90 / n below freezing"].values()]
    held = [
        list(sublinear.values()),
        [all(c.high < 1 for c in exponents), all(a.value > b.value for a, b in pairwise(exponents))],
        [all(few), max(max(record["above"]) for record in longest) <= 1 / EPSILON],
        [abs(share["value"] / share["closed_form"] - 1) < 0.02 for share in shares if share["n"] == n],
        [
            all(abs(fit["exponent"]["value"] - fit["closed_form_exponent"]) < _CLOSE for fit in known),
            all(fit["exponent"]["value"] >= fit["limit"] for fit in growing.values()),
        ],
    ]
    header = ["exponent of k_90 in n", "all lengths", "longest lengths", "closed form, same lengths", "limit"]
    body = [
        [
            fit["input"],
            str(Interval(**fit["exponent"])),
            str(late[fit["input"]]),
            "-" if fit["closed_form_exponent"] is None else f"{fit['closed_form_exponent']:+.2f}",
            f"{fit['limit']:+.2f}",
        ]
        for fit in found
    ]
    figures = {"exponents_of_keys_90": found, "keys_90_over_n": shares}
    return Findings(figures, more, held, _panels(grid, list(growing.values())), [(header, body)])


def _panels(grid: Sequence[Record], growing: Sequence[dict[str, Any]]) -> list[Panel]:
    lengths, norms = sorted({record["n"] for record in grid}), sorted({record["norm"] for record in grid})
    places = {(record["norm"], record["n"]): record for record in grid}

    def values(name: str) -> Any:
        return np.array([[np.mean(places[norm, n][name]) for n in lengths] for norm in norms])

    keys, above, names = values("keys_90"), values("above"), [f"R = {norm:g}" for norm in norms]
    # Over two octaves: one is too noisy where few keys have the mass.
    exponents = np.log(keys[:, 2:] / keys[:, :-2]) / np.log(np.array(lengths[2:]) / lengths[:-2])
    entropy = values("entropy") / np.log(lengths)
    shares = {f"R = {norm:g}": keys[norms.index(norm)] / lengths for norm in (1, 2)}
    closed = {f"closed form, {norm:g}": np.full(len(lengths), fits.normal_keys(norm, LOST)) for norm in (1, 2)}
    measured = {"measured": [[fit["exponent"][end] for fit in growing] for end in ("low", "value", "high")]}
    theory = {"closed form, same n": "closed_form_exponent", "limit": "limit"}
    known = {label: [math.nan if f[key] is None else f[key] for f in growing] for label, key in theory.items()}
    c = [fit["norm"] for fit in growing]
    masses = {f"{mass} % of the mass": values(f"keys_{mass}")[:, -1] for mass in (50, 90, 99)}
    some = {names[i]: above[i] for i in range(0, len(norms), math.ceil(len(norms) / 4))}
    return [
        Panel("Exponent C of k_90 between n/2 and 2n", "keys n", "", lengths[1:-1], grid=exponents, rows=names),
        Panel("Keys for 90 % of the mass, fixed norm", "keys n", "k_90 / n", lengths, shares, closed),
        Panel("Growing norms", "c, with R = c sqrt(ln n)", "exponent C of k_90", c, measured, known, log=""),
        Panel(f"Sparsity at n = {lengths[-1]:,}", "R, deviation of the logits", "keys", norms, masses, log="y"),
        Panel("Entropy / ln n: 1, all keys alike; 0, one key", "keys n", "", lengths, grid=entropy, rows=names),
        Panel("Entries that are not negligible", "keys n", f"entries above {EPSILON}", lengths, some, log="x"),
    ]


EXPERIMENT = Experiment("phases", cells, measure, conclude)
