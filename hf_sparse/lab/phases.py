"""Experiment `phases`: how many keys carry a query's mass, against the length n and the norm R of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from hf_sparse.lab.experiment import Cell, Experiment, Findings, Setting, Verdict, decide
from hf_sparse.lab.fits import (
    Interval,
    freezing_norm,
    log_log_slope,
    normal_keys,
    random_energy_exponent,
    shortened,
    slope,
)
from hf_sparse.lab.inputs import Input, by_input, draw_rows
from hf_sparse.lab.plots import Panel
from hf_sparse.lab.topk import EPSILON, mean_shape, softmax
from hf_sparse.lab.windows import LATE
from hf_sparse.results import Row

LOST = 0.1
"""k_90 loses this share of the mass."""

SCALED = (0.5, 0.75, 1.0, 1.25, 1.41, 1.75)
"""R / sqrt(ln n) of inputs whose norm grows."""

# Queries of one repeat: more of short ones, which fluctuate more.
_KEYS_PER_REPEAT = 2**20
_MOST_ROWS, _FEWEST_ROWS = 256, 32
_CLOSE = 0.05

Fit = dict[str, Any]


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


def measure(cell: Cell, setting: Setting) -> Row:
    """What `row_shape` counts, averaged over queries: one number per repeat."""
    shapes = [
        mean_shape(softmax(logits) for logits, _ in draw_rows(Input.of(cell), cell["n"], cell["rows"], rng))
        for rng in setting.rng(cell).spawn(cell["repeats"])
    ]
    return {name: shortened([shape[name] for shape in shapes]) for name in shapes[0]}


def fit_keys(records: Sequence[Row]) -> Fit:
    """The exponent of k_90 of one input: over all lengths, over the longest, and in theory."""
    source = Input.of(records[0])
    lengths = [record["n"] for record in records]
    keys = np.array([record["keys_90"] for record in records])
    # The closed form at the same lengths, where it says more than one key: its exponent converges as slowly.
    expected = [n * normal_keys(source.norm_at(n), LOST) for n in lengths]
    closed_form = round(float(log_log_slope(lengths, expected)), 4) if min(expected) > 1 else None
    return {
        "input": source.label,
        **source.fields(),
        "lengths": [lengths[0], lengths[-1]],
        "exponent": slope(lengths, keys).to_dict(),
        "late_exponent": slope(lengths[-LATE:], keys[-LATE:]).to_dict(),
        "closed_form_exponent": closed_form,
        "limit": 1.0 if source.growth == 0 else random_energy_exponent(source.norm),
        "longest": {"n": lengths[-1], "keys_90": shortened(keys[-1].mean())},
    }


def _compare_share(record: Row) -> Fit:
    share = Interval.of(np.array(record["keys_90"]) / record["n"])
    closed_form = round(normal_keys(record["norm"], LOST), 4)
    return {"n": record["n"], "sigma": record["norm"], **share.to_dict(), "closed_form": closed_form}


def conclude(records: Sequence[Row]) -> Findings:
    """Exponents of k_90 beside the closed forms, and the verdicts on sparsity, threshold and collapse."""
    fits = [fit_keys(own) for own in by_input(records).values()]
    grid = [record for record in records if record["growth"] == 0 and record["kind"] == "logits"]
    shares = [_compare_share(record) for record in grid if record["norm"] <= 2]
    verdicts = _verdicts(fits, grid, shares)
    header = ["exponent of k_90 in n", "all lengths", "longest lengths", "closed form, same lengths", "limit"]
    body = [
        [
            fit["input"],
            str(Interval(**fit["exponent"])),
            str(Interval(**fit["late_exponent"])),
            "-" if fit["closed_form_exponent"] is None else f"{fit['closed_form_exponent']:+.2f}",
            f"{fit['limit']:+.2f}",
        ]
        for fit in fits
    ]
    figures = {"exponents_of_keys_90": fits, "keys_90_over_n": shares}
    return Findings(figures, verdicts, _panels(grid, fits, verdicts), [(header, body)])


def _verdicts(fits: Sequence[Fit], grid: Sequence[Row], shares: Sequence[Fit]) -> list[Verdict]:
    growing = [fit for fit in fits if fit["growth"] == 0.5]
    less = {fit["input"]: fit["late_exponent"]["high"] < 1 - _CLOSE for fit in fits}
    sublinear = [f["norm"] for f in fits if less[f["input"]] and f["growth"] == 0 and f["kind"] == "logits"]
    late = {f"c = {fit['norm']:g}": Interval(**fit["late_exponent"]) for fit in growing}
    values = [interval.value for interval in late.values()]
    longest = max(record["n"] for record in grid)
    at_longest = [record for record in grid if record["n"] == longest]
    mobile = [record for record in at_longest if record["norm"] < freezing_norm(longest) / 2]
    frozen = [record for record in at_longest if record["norm"] > freezing_norm(longest)]
    last = [share for share in shares if share["n"] == longest]
    known = [fit for fit in growing if fit["closed_form_exponent"] is not None and fit["norm"] <= 1]
    return [
        Verdict(
            "Attention is n^C-sparse in mass: n^C keys with C < 1 hold 90 % of it.",
            "abstract",
            decide(list(less.values())),
            f"C < {1 - _CLOSE:g} at {sum(less[f['input']] for f in growing)} of {len(growing)} norms that grow as "
            f"sqrt(ln n); of the fixed norms only from {min(sublinear, default=math.inf):g} on, where n is too small "
            "for the limit, which is C = 1",
            {
                f"exponent of k_90 at large n, {fit['input']}": Interval(**fit["late_exponent"])
                for fit in fits
                if fit["growth"] > 0 or fit["norm"] in (1, 2, 4, 6)
            },
        ),
        Verdict(
            "The regime changes where the norm of the weights grows as sqrt(log n).",
            "machine summary",
            decide([all(interval.high < 1 for interval in late.values()), all(a > b for a, b in pairwise(values))]),
            "independent logits of spread c sqrt(ln n): C falls from 1 to 0 as c goes from 0 to sqrt(2)",
            {"C at large n": late, "limit": {f"c = {fit['norm']:g}": fit["limit"] for fit in growing}},
        ),
        Verdict(
            "With bounded weights the entries of a row that are not negligible become one, or a bounded number.",
            "machine summary",
            decide(
                [
                    all(np.mean(record["keys_90"]) < record["n"] / 100 for record in mobile),
                    all(max(record["above"]) <= 1 / EPSILON for record in at_longest),
                ]
            ),
            "trivially for entries above a fixed epsilon (at most 1 / epsilon of them), not for the keys that carry "
            "the mass",
            {"n": longest, "freezing at sigma": freezing_norm(longest)}
            | {
                f"sigma = {record['norm']:g}": {
                    "k_90": float(np.mean(record["keys_90"])),
                    f"entries above {EPSILON:g}": float(np.mean(record["above"])),
                }
                for record in [*mobile[1::2], *frozen[-1:]]
            },
        ),
        Verdict(
            "For independent N(0, sigma^2) logits k_90 / n tends to Phi_c(sigma + Phi^-1(0.1)): linear in n.",
            "derived here",
            decide([abs(share["value"] / share["closed_form"] - 1) < 0.02 for share in last]),
            "sigma up to 2, in mass (the same formula is in arXiv 2512.07647)",
            {"n": longest}
            | {
                f"sigma = {share['sigma']:g}": f"{share['value']:.4f} [{share['low']:.4f}, {share['high']:.4f}] "
                f"against {share['closed_form']:.4f}"
                for share in last
            },
        ),
        Verdict(
            "For sigma = c sqrt(ln n) the exponent of k_90 tends to 1 - c^2 / 2, and to 0 from c = sqrt(2) on "
            "(freezing).",
            "derived here",
            decide(
                [
                    all(abs(fit["exponent"]["value"] - fit["closed_form_exponent"]) < _CLOSE for fit in known),
                    all(fit["exponent"]["value"] >= fit["limit"] for fit in growing),
                ]
            ),
            "in mass, independent normal logits; from above and slowly: what is measured is the closed form at these "
            "lengths",
            {
                f"c = {fit['norm']:g}": {
                    "measured": Interval(**fit["exponent"]),
                    "closed form": fit["closed_form_exponent"] or "-",
                    "limit": fit["limit"],
                }
                for fit in growing
            },
        ),
    ]


def _panels(grid: Sequence[Row], fits: Sequence[Fit], verdicts: Sequence[Verdict]) -> list[Panel]:
    lengths, norms = sorted({record["n"] for record in grid}), sorted({record["norm"] for record in grid})
    places = {(record["norm"], record["n"]): record for record in grid}

    def values(name: str) -> Any:
        return np.array([[np.mean(places[norm, n][name]) for n in lengths] for norm in norms])

    keys, names = values("keys_90"), [f"R = {norm:g}" for norm in norms]
    # Over two octaves: one is too noisy where few keys have the mass.
    exponents = np.log(keys[:, 2:] / keys[:, :-2]) / np.log(np.array(lengths[2:]) / lengths[:-2])
    growing = [fit for fit in fits if fit["growth"] > 0]
    bands = np.array([[fit["exponent"][end] for fit in growing] for end in ("low", "value", "high")])
    shares = {f"normal logits, R = {norm:g}": keys[norms.index(norm)] / lengths for norm in (1, 2)}
    theory = {f"closed form, R = {norm:g}": np.full(len(lengths), normal_keys(norm, LOST)) for norm in (1, 2)}
    closed = [math.nan if (f := fit["closed_form_exponent"]) is None else f for fit in growing]
    chosen = norms[:: max(1, len(norms) // 4)][:4]
    return [
        Panel(
            "k_90 between n/2 and 2n", verdicts[0].caption, lengths[1:-1], "keys n", "exponent C", grid=exponents,
            rows=names,
        ),
        Panel("Fixed norm", verdicts[3].caption, lengths, "keys n", "k_90 / n", shares, theory),
        Panel(
            "Norms that grow as sqrt(ln n)",
            verdicts[4].caption,
            [fit["norm"] for fit in growing],
            "c, with sigma = c sqrt(ln n)",
            "exponent C of k_90",
            {"measured": bands},
            {"closed form, same n": closed, "limit": [fit["limit"] for fit in growing]},
            log="",
        ),
        Panel(
            f"n = {lengths[-1]:,}",
            verdicts[1].caption,
            norms,
            "deviation of the logits, sigma = R",
            "keys",
            {f"keys for {mass} % of the mass": values(f"keys_{mass}")[:, -1] for mass in (50, 90, 99)},
            log="y",
        ),
        Panel(
            "Entropy / ln n", verdicts[2].caption, lengths, "keys n", "1: all keys alike, 0: one key",
            grid=values("entropy") / np.log(lengths), rows=names,
        ),
        Panel(
            "Entries that are not negligible",
            verdicts[2].caption,
            lengths,
            "keys n",
            f"entries above {EPSILON}",
            {f"R = {norm:g}": values("above")[norms.index(norm)] for norm in chosen},
            log="x",
        ),
    ]  # fmt: skip


EXPERIMENT = Experiment(
    name="phases",
    title="Length against weight norm: how many keys carry a row's mass",
    claim="attention is n^C-sparse; the threshold is a norm that grows as sqrt(log n); bounded weights collapse",
    source="abstract",
    cells=cells,
    measure=measure,
    conclude=conclude,
)
