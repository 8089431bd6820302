"""Experiment `assumptions`: the claims where the paper's assumptions are violated, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_sparse.lab.bounds import row_radius
from hf_sparse.lab.experiment import Cell, Experiment, Findings, Setting, Verdict, decide
from hf_sparse.lab.fits import Interval, shortened, slope, trend
from hf_sparse.lab.inputs import Input, by_input, draw_rows
from hf_sparse.lab.plots import Panel
from hf_sparse.lab.topk import NORMS, TopK, row_shape, softmax
from hf_sparse.lab.windows import SIZES, kept_keys
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
_DRAWN = (BASELINE, *(VIOLATIONS[name][i] for name, i in zip(list(VIOLATIONS)[1:], (0, 1, 1), strict=True)))


def cells(setting: Setting) -> list[Cell]:
    """Every input at every length."""
    exponents, size = SIZES[setting.scale]
    return [source.fields() | {"n": 2**e, **size} for source in INPUTS for e in exponents]


def measure(cell: Cell, setting: Setting) -> Row:
    """Errors of the window, keys for 90 % of the mass, and the logits against their bound: one number per repeat."""
    n, source = cell["n"], Input.of(cell)
    kept = kept_keys([WINDOW], n)
    # What row_radius gives for a query with ||W^T x||_2 = R, which is what it is on average over bounded queries.
    radius = row_radius(source.norm_at(n), 1.0, n, DELTA)
    out: dict[str, list[float]] = {name: [] for name in (*MEASURED, "keys_90", "logit_over_bound")}
    for rng in setting.rng(cell).spawn(cell["repeats"]):
        queries = [(x, softmax(x), values) for x, values in draw_rows(source, n, cell["rows"], rng)]
        errors = np.mean([TopK.of(p, values, kept).errors() for _, p, values in queries], axis=0)[:, 0]
        for name in MEASURED:
            out[name].append(errors[NORMS.index(name)])
        out["keys_90"].append(float(np.mean([row_shape(p)["keys_90"] for _, p, _ in queries])))
        # A shift of all logits changes nothing: what counts is their distance from their mean.
        out["logit_over_bound"].append(float(np.mean([np.abs(x - x.mean()).max() for x, _, _ in queries])) / radius)
    return {name: shortened(values) for name, values in out.items()}


def _fit(records: Sequence[Row]) -> dict[str, Any]:
    lengths = [record["n"] for record in records]
    slopes = {name: slope(lengths, [record[name] for record in records]) for name in (*MEASURED, "keys_90")}
    return {
        "input": Input.of(records[0]).label,
        "lengths": lengths,
        **{name: fit.to_dict() for name, fit in slopes.items()},
        "trends": {name: trend(lengths, slopes[name]) for name in MEASURED},
        "lost_mass_at_longest": shortened(np.mean(records[-1]["lost mass"])),
        "keys_90_at_longest": shortened(np.mean(records[-1]["keys_90"])),
        "logit_over_bound": shortened(np.mean(records[-1]["logit_over_bound"])),
    }


def conclude(records: Sequence[Row]) -> Findings:
    """For each violated assumption, which conclusions change."""
    inputs = by_input(records)
    fits = {label: _fit(own) for label, own in inputs.items()}
    baseline = fits[BASELINE.label]
    verdicts = [_verdict(name, [fits[s.label] for s in sources], baseline) for name, sources in VIOLATIONS.items()]
    columns = ("keys_90", *MEASURED)
    header = ["input", "exponent of k_90", *(f"{name}, {WINDOW}" for name in MEASURED), "largest logit / bound"]
    body = [
        [label, *(str(Interval(**fit[name])) for name in columns), f"{fit['logit_over_bound']:.2f}"]
        for label, fit in fits.items()
    ]

    def panel(name: str, label: str, verdict: Verdict) -> Panel:
        own = {source.label: inputs[source.label] for source in _DRAWN}
        lengths = [record["n"] for record in inputs[BASELINE.label]]
        lines = {key: [float(np.mean(r[name])) for r in found] for key, found in own.items()}
        return Panel(label, verdict.caption, lengths, "keys n", label, lines)

    grid = [[fit[name]["value"] for name in columns] for fit in fits.values()]
    names = ["k_90", *MEASURED]
    panels = [
        Panel("Slopes in n", verdicts[0].caption, names, "", f"{WINDOW} keys", grid=grid, rows=list(fits)),
        panel("max entry", f"Largest error of an entry, {WINDOW} keys", verdicts[3]),
        panel("keys_90", "Keys for 90 % of the mass", verdicts[2]),
        panel("lost mass", f"Lost mass, {WINDOW} keys", verdicts[3]),
        panel("relative output", f"Relative error of the output, {WINDOW} keys", verdicts[2]),
        panel("logit_over_bound", "Largest logit over its bound", verdicts[1]),
    ]
    return Findings({"window": WINDOW, "fits": list(fits.values())}, verdicts, panels, [(header, body)])


def _verdict(name: str, fits: Sequence[dict[str, Any]], baseline: dict[str, Any]) -> Verdict:
    """Whether a violation breaks sparsity: the error surely falls less, or rises more, than without it."""
    broken = {
        fit["input"]: [norm for norm in MEASURED if fit[norm]["low"] > baseline[norm]["high"] + MARGIN] for fit in fits
    }
    beyond = [fit["input"] for fit in fits if fit["logit_over_bound"] > 1]
    return Verdict(
        f"n^C-sparsity breaks where {name}.",
        "machine summary",
        decide([norm in norms for norms in broken.values() for norm in MEASURED]),
        f"errors of {WINDOW} keys that fall less than unbroken: "
        + ("; ".join(f"{', '.join(norms)} ({label})" for label, norms in broken.items() if norms) or "none")
        + f". Logits beyond their bound: {'; '.join(beyond) or 'none'}",
        {
            fit["input"]: {
                "exponent of k_90": fit["keys_90"]["value"],
                "slope of the largest error of an entry": fit["max entry"]["value"],
                "mass lost at the longest n": fit["lost_mass_at_longest"],
            }
            for fit in (baseline, *fits)
        },
    )


EXPERIMENT = Experiment(
    name="assumptions",
    title="Broken assumptions: unbounded entries, heavy tails, correlated tokens, growing norms",
    claim="n^C-sparsity needs independent bounded entries and a norm that grows no faster than sqrt(log n)",
    source="machine summary",
    cells=cells,
    measure=measure,
    conclude=conclude,
)
