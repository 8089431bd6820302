"""Experiment `windows`: constant, logarithmic and power-law windows, the error in every norm against n."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_sparse.lab.experiment import Cell, Findings, Plot, Setting
from hf_sparse.lab.fits import Interval, shortened, slope, trend
from hf_sparse.lab.inputs import Input, by_input, over_rows
from hf_sparse.lab.topk import NORMS, softmax, top_k_errors
from hf_sparse.laws import Budget
from hf_sparse.results import Record

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


def cells(setting: Setting) -> list[Cell]:
    """Every input at every length."""
    exponents, size = SIZES[setting.scale]
    return [source.fields() | {"n": 2**e, **size, "windows": list(WINDOWS)} for source in INPUTS for e in exponents]


def kept_keys(windows: Sequence[str], n: int) -> list[int]:
    """Keys that each window keeps of n."""
    return [int(WINDOWS[name](torch.tensor(n))) for name in windows]


def measure(cell: Cell, setting: Setting) -> Record:
    """Errors of each window in each norm, mean query, and of single entries the worst query: one number per repeat."""
    windows = cell["windows"]
    kept = kept_keys(windows, cell["n"])
    repeats = over_rows(cell, setting, lambda x, values: top_k_errors(softmax(x), values, kept)[0])
    out: Record = {"kept": kept}
    for name, errors, norms in (("mean", repeats.mean(1), NORMS), ("worst", repeats.max(1), ENTRYWISE)):
        out[name] = {w: {m: shortened(errors[:, NORMS.index(m), i]) for m in norms} for i, w in enumerate(windows)}
    return out


def fit_errors(records: Sequence[Record], label: str, window: str, norm: str) -> dict[str, Any]:
    """Slopes of one error in n: over all lengths and over the longest, for the mean and for the worst query."""
    lengths = [record["n"] for record in records]
    mean = np.array([record["mean"][window][norm] for record in records])
    late = slope(lengths[-LATE:], mean[-LATE:])
    # The largest error of an entry of the matrix is that of the worst query.
    worst = [record["worst"][window].get(norm) for record in records[-LATE:]]
    return {
        "input": label,
        "window": window,
        "norm": norm,
        "slope": slope(lengths, mean).to_dict(),
        "late_slope": late.to_dict(),
        "worst_late_slope": slope(lengths[-LATE:], worst).to_dict() if norm in ENTRYWISE else None,
        "trend": trend(lengths[-LATE:], late),
        "longest": shortened(mean[-1].mean()),
    }


def conclude(records: Sequence[Record]) -> Findings:
    """Slopes and trends of every input, window and norm."""
    inputs, windows = by_input(records), records[0]["windows"]
    fits = [fit_errors(own, label, w, norm) for label, own in inputs.items() for w in windows for norm in NORMS]
    falls = {(fit["input"], fit["window"], fit["norm"]): fit["trend"] == "falls" for fit in fits}
    falling = {norm: [falls[label, w, norm] for label in inputs for w in POWERS] for norm in NORMS}
    staying = {norm: [not falls[label, w, norm] for label in inputs for w in SLOW] for norm in NORMS}
    both = {
        norm: [[falls[label, w, norm] for w in (*SLOW, *POWERS)] == [False] * 2 + [True] * 3 for label in inputs]
        for norm in NORMS
    }
    where = {norm: [label for label, held in zip(inputs, both[norm], strict=True) if held] for norm in NORMS}
    slopes = {(f["window"], f["norm"]): Interval(**f["late_slope"]) for f in fits if f["input"] == PAPER_LIKE}
    more = {
        "power_cases": len(inputs) * len(POWERS),
        "slow_cases": len(inputs) * len(SLOW),
        "falls": "; ".join(f"{norm} {sum(cases)}" for norm, cases in falling.items()),
        "stays": "; ".join(f"{norm} {sum(cases)}" for norm, cases in staying.items()),
        "dichotomy": "; ".join(f"{norm}: {' and '.join(own)}" for norm, own in where.items() if own) or "in no norm",
        "slopes of n^0.5 keys": {norm: slopes["n^0.5", norm] for norm in NORMS},
        "slopes of log2(n)/2 keys": {norm: slopes["log2(n)/2", norm] for norm in ENTRYWISE},
        "slopes of the largest error of an entry": {w: slopes[w, "max entry"] for w in (*SLOW, *POWERS)},
    }
    lengths = sorted({record["n"] for record in records})
    drawn = {w: np.array([r["mean"][w]["max entry"] for r in inputs[PAPER_LIKE]]) for w in (*SLOW, *POWERS[1:])}
    lines = {window: [error.min(1), error.mean(1), error.max(1)] for window, error in drawn.items()}
    plot = Plot("keys n", f"largest error of an entry, {PAPER_LIKE}", lengths, lines)
    figures = {"lengths": lengths, "late_lengths": lengths[-LATE:], "slopes": fits}
    return Findings(figures, more, [list(cases.values()) for cases in (falling, staying, both)], plot)
