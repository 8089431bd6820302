"""Experiment `assumptions`: what becomes of the claims where the paper's assumptions are broken, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_sparse.lab import assumptions_panels
from hf_sparse.lab.bounds import row_radius
from hf_sparse.lab.experiment import Cell, Experiment, Findings, Setting, Verdict, answer_from
from hf_sparse.lab.fits import Interval, slope, trend
from hf_sparse.lab.inputs import Input, draw_rows
from hf_sparse.lab.rows import NORMS, row_errors, row_shape, shortened
from hf_sparse.lab.windows import WINDOWS, by_input
from hf_sparse.measure.tables import Table
from hf_sparse.results import Row

WINDOW = "n^0.5"
MEASURED = ("max entry", "lost mass", "output", "relative output")
DELTA = 0.05

MARGIN = 0.05
"""A slope that differs by less is no different to a reader, however small its interval."""

BASELINE = Input("signs", 1)
VIOLATIONS = {
    "entries are not bounded (light tails)": (Input("normal", 1),),
    "tails are heavy": (Input("student", 1, shape=3), Input("student-logits", 1, shape=3)),
    "tokens are not independent": (
        Input("shared", 1, shape=0.9),
        Input("chain", 1, shape=0.99),
        Input("copies", 1, shape=0.5),
    ),
    "the norm of the weights grows": (
        Input("signs", 1, growth=0.25),
        Input("signs", 1, growth=0.5),
        Input("signs", 2, growth=0.5),
        Input("signs", 0.5, growth=1),
    ),
}
INPUTS = (BASELINE, *(source for sources in VIOLATIONS.values() for source in sources))


def cells(setting: Setting) -> list[Cell]:
    """Every input at every length."""
    exponents, size = {
        "small": (range(8, 13), {"rows": 8, "repeats": 3}),
        "full": (range(8, 18), {"rows": 16, "repeats": 6}),
    }[setting.scale]
    return [source.fields() | {"n": 2**e, **size} for source in INPUTS for e in exponents]


def measure(cell: Cell, setting: Setting) -> Row:
    """Errors of the window, keys for 90 % of the mass, and the logits against their bound: one number per repeat."""
    n, source = cell["n"], Input.of(cell)
    kept = np.array([WINDOWS[WINDOW](torch.tensor(n)).item()])
    # What row_radius gives for a query with ||W^T x||_2 = R, which is what it is on average over bounded queries.
    radius = row_radius(source.norm_at(n), 1.0, n, DELTA)
    out: dict[str, list[float]] = {name: [] for name in (*MEASURED, "keys_90", "logit_over_bound")}
    for rng in setting.rng(cell).spawn(cell["repeats"]):
        rows = list(draw_rows(source, n, cell["rows"], rng))
        errors = np.mean([row_errors(*row, kept) for row in rows], axis=0)[:, 0]
        for name in MEASURED:
            out[name].append(errors[NORMS.index(name)])
        out["keys_90"].append(float(np.mean([row_shape(logits)["keys_90"] for logits, _ in rows])))
        # A common shift of all logits changes nothing: what counts is how far they are apart.
        out["logit_over_bound"].append(float(np.mean([np.abs(x - x.mean()).max() for x, _ in rows])) / radius)
    return {name: shortened(values) for name, values in out.items()}


def conclude(rows: Sequence[Row]) -> Findings:
    """For each broken assumption, which conclusions change."""
    fits = [_fit(own) for own in by_input(rows).values()]
    by_label = {fit["input"]: fit for fit in fits}
    verdicts = [
        _verdict(name, [by_label[source.label] for source in sources], by_label[BASELINE.label])
        for name, sources in VIOLATIONS.items()
    ]
    worse = {name: [fit["input"] for fit in fits if name in _worse(fit, fits[0])] for name in MEASURED}
    panels = assumptions_panels.panels(by_input(rows), fits, worse, WINDOW)
    return Findings({"window": WINDOW, "fits": fits}, verdicts, panels, [fit_cells(fits)])


def fit_cells(fits: Sequence[dict[str, Any]]) -> Table:
    """Slopes over all lengths of every input, and how far logits are from their bound."""
    header = ["input", "exponent of k_90", *(f"{name}, {WINDOW}" for name in MEASURED), "largest logit / bound"]
    return header, [
        [
            fit["input"],
            str(Interval(**fit["keys_90"])),
            *(str(Interval(**fit[name])) for name in MEASURED),
            f"{fit['logit_over_bound']:.2f}",
        ]
        for fit in fits
    ]


def _fit(rows: Sequence[Row]) -> dict[str, Any]:
    lengths = [row["n"] for row in rows]
    slopes = {name: slope(lengths, [row[name] for row in rows]) for name in (*MEASURED, "keys_90")}
    return {
        "input": Input.of(rows[0]).label,
        "lengths": lengths,
        **{name: fit.to_dict() for name, fit in slopes.items()},
        "trends": {name: trend(lengths, slopes[name]) for name in MEASURED},
        "lost_mass_at_longest": shortened(np.mean(rows[-1]["lost mass"])),
        "keys_90_at_longest": shortened(np.mean(rows[-1]["keys_90"])),
        "logit_over_bound": shortened(np.mean(rows[-1]["logit_over_bound"])),
    }


def _verdict(name: str, fits: Sequence[dict[str, Any]], baseline: dict[str, Any]) -> Verdict:
    """Whether what is said to break where this assumption is broken does break."""
    broken = {fit["input"]: _worse(fit, baseline) for fit in fits}
    beyond = [fit["input"] for fit in fits if fit["logit_over_bound"] > 1]
    return Verdict(
        f"n^C-sparsity breaks where {name}.",
        "machine summary",
        answer_from(name in norms for norms in broken.values() for name in MEASURED),
        f"errors of {WINDOW} keys that fall less than unbroken: "
        + ("; ".join(f"{', '.join(norms)} ({label})" for label, norms in broken.items() if norms) or "none")
        + f". Logits beyond their bound: {'; '.join(beyond) or 'none'}",
        "exponent of k_90, slope of the largest error of an entry, mass lost at the longest n: "
        + "; ".join(
            f"{fit['input']} {fit['keys_90']['value']:.2f}, {fit['max entry']['value']:+.2f}, "
            f"{fit['lost_mass_at_longest']:.2f}"
            for fit in (baseline, *fits)
        ),
    )


def _worse(fit: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """The norms in which the error of `fit` surely falls less, or rises more, than that of the baseline."""
    return [name for name in MEASURED if fit[name]["low"] > baseline[name]["high"] + MARGIN]


EXPERIMENT = Experiment(
    name="assumptions",
    title="Broken assumptions: unbounded entries, heavy tails, correlated tokens, growing norms",
    claim="n^C-sparsity needs independent bounded entries and a norm that grows no faster than sqrt(log n)",
    source="machine summary",
    cells=cells,
    measure=measure,
    conclude=conclude,
)
