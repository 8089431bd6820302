"""Experiment `phases`: how many keys carry a row's mass, against the length n and the norm R of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from hf_sparse.lab import phases_panels
from hf_sparse.lab.experiment import Cell, Experiment, Findings, Setting, Verdict, answer_from
from hf_sparse.lab.fits import Interval, freezing_norm, normal_keys, random_energy_exponent, slope
from hf_sparse.lab.inputs import Input, draw_rows
from hf_sparse.lab.rows import EPSILON, mean_shape, row_shape, shortened
from hf_sparse.lab.windows import LATE, by_input
from hf_sparse.measure.tables import Table
from hf_sparse.results import Row

LOST = 0.1
"""k_90 loses this share of the mass."""

SCALED = (0.5, 0.75, 1.0, 1.25, 1.41, 1.75)
"""R / sqrt(ln n) of inputs whose norm grows."""

# Rows of one repeat: more of short ones, which fluctuate more from row to row.
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
    # The exponents of growing norms converge slowly: longer rows for them.
    for inputs, exponents in ((fixed, range(8, longest + 1)), (growing, range(10, longest + 2))):
        for source in inputs:
            for n in (2**e for e in exponents):
                rows = min(most, max(_FEWEST_ROWS, _KEYS_PER_REPEAT // n))
                out.append(source.fields() | {"n": n, "rows": rows, "repeats": repeats})
    return out


def measure(cell: Cell, setting: Setting) -> Row:
    """What `row_shape` counts, averaged over rows: one number per repeat."""
    shapes = [
        mean_shape(row_shape(logits) for logits, _ in draw_rows(Input.of(cell), cell["n"], cell["rows"], rng))
        for rng in setting.rng(cell).spawn(cell["repeats"])
    ]
    return {name: shortened([shape[name] for shape in shapes]) for name in shapes[0]}


def conclude(rows: Sequence[Row]) -> Findings:
    """Exponents of k_90, beside the closed forms, and what they say about sparsity, threshold and collapse."""
    fits = [fit_keys(own) for own in by_input(rows).values()]
    shares = [
        _compare_share(row) for row in rows if row["growth"] == 0 and row["kind"] == "logits" and row["norm"] <= 2
    ]
    verdicts = [_sparse(fits), _threshold(fits), _collapse(rows), _closed_form(shares), _random_energy(fits)]
    figures = {"exponents_of_keys_90": fits, "keys_90_over_n": shares}
    return Findings(figures, verdicts, phases_panels.panels(rows, fits), [exponent_cells(fits)])


def fit_keys(rows: Sequence[Row]) -> dict[str, Any]:
    """The exponent of k_90 of one input: over all lengths, over the longest, and what theory has."""
    source = Input.of(rows[0])
    lengths = [row["n"] for row in rows]
    keys = np.array([row["keys_90"] for row in rows])
    # The closed form at the same lengths, where it says more than one key: its exponent converges as slowly.
    expected = [n * normal_keys(source.norm_at(n), LOST) for n in lengths]
    within = min(expected) > 1
    limit = 1.0 if source.growth == 0 else random_energy_exponent(source.norm)
    return {
        "input": source.label,
        **source.fields(),
        "lengths": [lengths[0], lengths[-1]],
        "exponent": slope(lengths, keys).to_dict(),
        "late_exponent": slope(lengths[-LATE:], keys[-LATE:]).to_dict(),
        "closed_form_exponent": round(float(np.polyfit(np.log(lengths), np.log(expected), 1)[0]), 4)
        if within
        else None,
        "limit": limit,
        "longest": {"n": lengths[-1], "keys_90": shortened(keys[-1].mean())},
    }


def exponent_cells(fits: Sequence[dict[str, Any]]) -> Table:
    """Exponents of k_90 beside the closed form at the same lengths and the limit."""
    header = ["exponent of k_90 in n", "all lengths", "longest lengths", "closed form, same lengths", "limit"]
    return header, [
        [
            fit["input"],
            str(Interval(**fit["exponent"])),
            str(Interval(**fit["late_exponent"])),
            "-" if fit["closed_form_exponent"] is None else f"{fit['closed_form_exponent']:+.2f}",
            f"{fit['limit']:+.2f}",
        ]
        for fit in fits
    ]


def _compare_share(row: Row) -> dict[str, Any]:
    share = Interval.of(np.array(row["keys_90"]) / row["n"])
    return {
        "n": row["n"],
        "sigma": row["norm"],
        **share.to_dict(),
        "closed_form": round(normal_keys(row["norm"], LOST), 4),
    }


def _sparse(fits: Sequence[dict[str, Any]]) -> Verdict:
    surely_less = [fit["late_exponent"]["high"] < 1 - _CLOSE for fit in fits]
    fixed = [fit for fit in fits if fit["growth"] == 0]
    growing = [fit for fit in fits if fit["growth"] > 0]
    sublinear = [fit["norm"] for fit in fixed if fit["late_exponent"]["high"] < 1 - _CLOSE and fit["kind"] == "logits"]
    return Verdict(
        "Attention is n^C-sparse in mass: n^C keys with C < 1 hold 90 % of it.",
        "abstract",
        answer_from(surely_less),
        f"C < {1 - _CLOSE:g} at {sum(f['late_exponent']['high'] < 1 - _CLOSE for f in growing)} of {len(growing)} "
        f"norms that grow as sqrt(ln n); of the fixed norms only from {min(sublinear, default=math.inf):g} on, where n "
        "is too small for the limit, which is C = 1",
        "exponent of k_90 at large n: " + _exponents(fits),
    )


def _threshold(fits: Sequence[dict[str, Any]]) -> Verdict:
    growing = [fit for fit in fits if fit["growth"] == 0.5]
    return Verdict(
        "The regime changes where the norm of the weights grows as sqrt(log n).",
        "machine summary",
        answer_from(
            [
                all(fit["late_exponent"]["high"] < 1 for fit in growing),
                all(a["late_exponent"]["value"] > b["late_exponent"]["value"] for a, b in pairwise(growing)),
            ]
        ),
        "independent logits of spread c sqrt(ln n): C falls from 1 to 0 as c goes from 0 to sqrt(2)",
        "; ".join(
            f"c = {fit['norm']:g}: {Interval(**fit['late_exponent'])} (limit {fit['limit']:.2f})" for fit in growing
        ),
    )


def _collapse(rows: Sequence[Row]) -> Verdict:
    longest = max(row["n"] for row in rows if row["growth"] == 0)
    at_longest = [row for row in rows if row["n"] == longest and row["growth"] == 0 and row["kind"] == "logits"]
    mobile = [row for row in at_longest if row["norm"] < freezing_norm(longest) / 2]
    few = [row for row in at_longest if row["norm"] > freezing_norm(longest)]
    return Verdict(
        "With bounded weights the entries of a row that are not negligible become one, or a bounded number.",
        "machine summary",
        answer_from(
            [
                all(np.mean(row["keys_90"]) < row["n"] / 100 for row in mobile),
                all(max(row["above"]) <= 1 / EPSILON for row in at_longest),
            ]
        ),
        "trivially for entries above a fixed epsilon (at most 1 / epsilon of them), not for the keys that carry the "
        "mass",
        f"n = {longest:,}, freezing at sigma = {freezing_norm(longest):.2f}: "
        + "; ".join(
            f"sigma = {row['norm']:g}: {np.mean(row['above']):.1f} entries above {EPSILON}, k_90 = "
            f"{np.mean(row['keys_90']):,.0f}"
            for row in [*mobile[1::2], *few[-1:]]
        ),
    )


def _closed_form(shares: Sequence[dict[str, Any]]) -> Verdict:
    longest = max(share["n"] for share in shares)
    last = [share for share in shares if share["n"] == longest]
    return Verdict(
        "For independent N(0, sigma^2) logits k_90 / n tends to Phi_c(sigma + Phi^-1(0.1)): linear in n.",
        "derived here",
        answer_from(abs(share["value"] / share["closed_form"] - 1) < 0.02 for share in last),
        "sigma up to 2, in mass (the same formula is in arXiv 2512.07647)",
        f"n = {longest:,}: "
        + "; ".join(
            f"sigma = {share['sigma']:g}: {share['value']:.4f} [{share['low']:.4f}, {share['high']:.4f}] against "
            f"{share['closed_form']:.4f}"
            for share in last
        ),
    )


def _random_energy(fits: Sequence[dict[str, Any]]) -> Verdict:
    growing = [fit for fit in fits if fit["growth"] == 0.5]
    known = [fit for fit in growing if fit["closed_form_exponent"] is not None and fit["norm"] <= 1]
    return Verdict(
        "For sigma = c sqrt(ln n) the exponent of k_90 tends to 1 - c^2 / 2, and to 0 from c = sqrt(2) on (freezing).",
        "derived here",
        answer_from(
            [
                all(abs(fit["exponent"]["value"] - fit["closed_form_exponent"]) < _CLOSE for fit in known),
                all(fit["exponent"]["value"] >= fit["limit"] for fit in growing),
            ]
        ),
        "in mass, independent normal logits; from above and slowly: what is measured is the closed form at these "
        "lengths",
        "; ".join(
            f"c = {fit['norm']:g}: {Interval(**fit['exponent'])}, closed form "
            + ("-" if fit["closed_form_exponent"] is None else f"{fit['closed_form_exponent']:.2f}")
            + f", limit {fit['limit']:.2f}"
            for fit in growing
        ),
    )


def _exponents(fits: Sequence[dict[str, Any]]) -> str:
    chosen = [fit for fit in fits if fit["growth"] > 0 or fit["norm"] in (1, 2, 4, 6)]
    return "; ".join(f"{fit['input']} {Interval(**fit['late_exponent'])}" for fit in chosen)


EXPERIMENT = Experiment(
    name="phases",
    title="Length against weight norm: how many keys carry a row's mass",
    claim="attention is n^C-sparse; the threshold is a norm that grows as sqrt(log n); bounded weights collapse",
    source="abstract",
    cells=cells,
    measure=measure,
    conclude=conclude,
)
