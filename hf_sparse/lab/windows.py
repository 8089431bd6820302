"""Experiment `windows`: constant, logarithmic and power-law windows, the error in every norm against n."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_sparse.lab.experiment import Cell, Experiment, Findings, Setting, Verdict, decide
from hf_sparse.lab.fits import Interval, shortened, slope, trend
from hf_sparse.lab.inputs import Input, by_input, draw_rows
from hf_sparse.lab.plots import Panel
from hf_sparse.lab.topk import NORMS, TopK, softmax
from hf_sparse.laws import Budget
from hf_sparse.measure.tables import Table
from hf_sparse.results import Row

WINDOWS = {
    "16 keys": Budget("fixed", keys=16),
    "log2(n)/2": Budget("log", alpha=0.5 / np.log(2)),
    "n^0.25": Budget("power", alpha=1.0, exponent=0.25),
    "n^0.5": Budget("power", alpha=1.0, exponent=0.5),
    "n^0.75": Budget("power", alpha=1.0, exponent=0.75),
    "n/5": Budget("fraction", fraction=0.2),
}
SLOW = ("16 keys", "log2(n)/2")
POWERS = ("n^0.25", "n^0.5", "n^0.75")

INPUTS = (Input("logits", 1), Input("logits", 3), Input("signs", 1), Input("signs", 3), Input("logits", 1, growth=0.5))
PAPER_LIKE = INPUTS[2].label
"""Independent bounded entries and a fixed norm: what the paper is said to assume."""

ENTRYWISE = ("max entry", "max entry, unnormalised")
LATE = 4
"""Longest lengths over which a slope is taken to be that of large n."""

SIZES = {
    "small": (range(8, 13), {"rows": 8, "repeats": 3}),
    "full": (range(8, 18), {"rows": 16, "repeats": 6}),
}
_DRAWN_WINDOWS = (*SLOW, "n^0.5", "n^0.75")
_DRAWN_NORMS = ("max entry", "max entry, unnormalised", "lost mass", "output", "relative output")

Fit = dict[str, Any]


def cells(setting: Setting) -> list[Cell]:
    """Every input at every length."""
    exponents, size = SIZES[setting.scale]
    return [source.fields() | {"n": 2**e, **size, "windows": list(WINDOWS)} for source in INPUTS for e in exponents]


def kept_keys(windows: Sequence[str], n: int) -> list[int]:
    """Keys that each window keeps of n."""
    return [int(WINDOWS[name](torch.tensor(n))) for name in windows]


def measure(cell: Cell, setting: Setting) -> Row:
    """Errors of each window in each norm, mean query, and of single entries the worst query: one number per repeat."""
    windows, kept = cell["windows"], kept_keys(cell["windows"], cell["n"])
    repeats = np.array(
        [
            [TopK.of(softmax(x), v, kept).errors() for x, v in draw_rows(Input.of(cell), cell["n"], cell["rows"], rng)]
            for rng in setting.rng(cell).spawn(cell["repeats"])
        ]
    )

    def by_name(values: Any, norms: Sequence[str]) -> Row:
        return {
            window: {norm: shortened(values[:, NORMS.index(norm), i]) for norm in norms}
            for i, window in enumerate(windows)
        }

    return {"kept": kept, "mean": by_name(repeats.mean(1), NORMS), "worst": by_name(repeats.max(1), ENTRYWISE)}


def fit_errors(records: Sequence[Row], label: str, window: str, norm: str) -> Fit:
    """Slopes of one error in n: over all lengths and over the longest, for the mean and for the worst query."""
    lengths = [record["n"] for record in records]
    mean = np.array([record["mean"][window][norm] for record in records])
    late = slope(lengths[-LATE:], mean[-LATE:])
    # The largest error of an entry of the matrix is that of the worst query.
    worst = [record["worst"][window][norm] for record in records[-LATE:]] if norm in ENTRYWISE else None
    return {
        "input": label,
        "window": window,
        "norm": norm,
        "slope": slope(lengths, mean).to_dict(),
        "late_slope": late.to_dict(),
        "worst_late_slope": None if worst is None else slope(lengths[-LATE:], worst).to_dict(),
        "trend": trend(lengths[-LATE:], late),
        "longest": shortened(mean[-1].mean()),
    }


def conclude(records: Sequence[Row]) -> Findings:
    """Slopes, trends and the two claims of the abstract about sufficient and insufficient windows."""
    inputs = by_input(records)
    fits = [
        fit_errors(own, label, window, norm)
        for label, own in inputs.items()
        for window in records[0]["windows"]
        for norm in NORMS
    ]
    falls = {(fit["norm"], fit["input"], fit["window"]): fit["trend"] == "falls" for fit in fits}

    late = {(f["window"], f["norm"]): Interval(**f["late_slope"]) for f in fits if f["input"] == PAPER_LIKE}
    what = f"slopes at large n, {PAPER_LIKE}"

    falling = {n: [falls[n, label, w] for label in inputs for w in POWERS] for n in NORMS}
    staying = {n: [not falls[n, label, w] for label in inputs for w in SLOW] for n in NORMS}
    both = {
        norm: [
            label
            for label in inputs
            if all(falls[norm, label, w] for w in POWERS) and not any(falls[norm, label, w] for w in SLOW)
        ]
        for norm in NORMS
    }
    counts = [
        "; ".join(f"{norm} {sum(cases)}" for norm, cases in column.items()) for column in (falling, staying)
    ]
    verdicts = [
        Verdict(
            "Keeping the largest n^C entries, any C in (0, 1), approximates attention with an error that decreases in "
            "n.",
            "abstract",
            decide(list(falling.values())),
            f"the error falls like a power of n, of {len(inputs) * len(POWERS)} pairs of input and exponent: "
            f"{counts[0]}",
            {f"{what}, n^0.5 keys": {norm: late["n^0.5", norm] for norm in NORMS}},
        ),
        Verdict(
            "With log n entries or fewer the error stays at a constant.",
            "abstract",
            decide(list(staying.values())),
            f"the error does not fall like a power of n, of {len(inputs) * len(SLOW)} pairs of input and window "
            f"({' or '.join(SLOW)}): {counts[1]}",
            {f"{what}, log2(n)/2 keys": {norm: late["log2(n)/2", norm] for norm in ENTRYWISE}},
        ),
        Verdict(
            "There is a dichotomy: in the same norm n^C entries are enough, and log n or fewer are not.",
            "abstract",
            decide([label in labels for labels in both.values() for label in inputs]),
            "; ".join(f"{norm}: {' and '.join(labels)}" for norm, labels in both.items() if labels) or "in no norm",
            {f"{what}, max entry": {window: late[window, "max entry"] for window in (*SLOW, *POWERS)}},
        ),
    ]
    lengths = sorted({record["n"] for record in records})
    figures = {"lengths": lengths, "late_lengths": lengths[-LATE:], "slopes": fits}
    return Findings(figures, verdicts, _panels(inputs, fits, verdicts), [_table(fits, label) for label in inputs])


def _table(fits: Sequence[Fit], label: str) -> Table:
    """Slopes over the longest lengths of every window in every norm, for one input."""
    own = [fit for fit in fits if fit["input"] == label]
    header = [f"{label}: slope in n at large n", *dict.fromkeys(fit["window"] for fit in own)]
    return header, [[norm, *(str(Interval(**f["late_slope"])) for f in own if f["norm"] == norm)] for norm in NORMS]


def _panels(inputs: dict[str, list[Row]], fits: Sequence[Fit], verdicts: Sequence[Verdict]) -> list[Panel]:
    own = inputs[PAPER_LIKE]
    lengths = [record["n"] for record in own]

    def band(window: str, norm: str) -> Any:
        errors = np.array([record["mean"][window][norm] for record in own])
        return [errors.min(1), errors.mean(1), errors.max(1)]

    drawn = [
        Panel(
            f"{norm} ({PAPER_LIKE})",
            verdicts[2].caption,
            lengths,
            "keys n",
            f"{norm}, mean query",
            {window: band(window, norm) for window in _DRAWN_WINDOWS},
        )
        for norm in _DRAWN_NORMS
    ]
    slopes = {(f["norm"], f["input"]): f["late_slope"]["value"] for f in fits if f["window"] == "n^0.5"}
    grid = [[slopes[norm, label] for label in inputs] for norm in NORMS]
    names = [label.replace(", ", ",\n") for label in inputs]
    return [*drawn, Panel("n^0.5 keys", verdicts[0].caption, names, "", "slope at large n", grid=grid, rows=NORMS)]


EXPERIMENT = Experiment(
    name="windows",
    title="Constant, logarithmic and power-law windows on synthetic inputs",
    claim="n^C entries suffice for an error that decreases in n; log n or fewer leave a constant error",
    source="abstract",
    cells=cells,
    measure=measure,
    conclude=conclude,
)
