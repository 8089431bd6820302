"""Experiment `windows`: constant, logarithmic and power-law windows, the error in every norm against n."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_sparse.lab import windows_panels
from hf_sparse.lab.experiment import Cell, Experiment, Findings, Setting, Verdict, answer_from
from hf_sparse.lab.fits import Interval, slope, trend
from hf_sparse.lab.inputs import Input, draw_rows
from hf_sparse.lab.rows import NORMS, Floats, row_errors, shortened
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


def cells(setting: Setting) -> list[Cell]:
    """Every input at every length."""
    exponents, size = {
        "small": (range(8, 13), {"rows": 8, "repeats": 3}),
        "full": (range(8, 18), {"rows": 16, "repeats": 6}),
    }[setting.scale]
    return [source.fields() | {"n": 2**e, **size, "windows": list(WINDOWS)} for source in INPUTS for e in exponents]


def measure(cell: Cell, setting: Setting) -> Row:
    """Errors of each window in each norm, mean row, and of single entries the worst row: one number per repeat."""
    n = cell["n"]
    kept = np.array([WINDOWS[name](torch.tensor(n)).item() for name in cell["windows"]])
    means, worsts = [], []
    for rng in setting.rng(cell).spawn(cell["repeats"]):
        rows = [row_errors(*row, kept) for row in draw_rows(Input.of(cell), n, cell["rows"], rng)]
        means.append(np.mean(rows, axis=0))
        worsts.append(np.max(rows, axis=0))
    return {
        "kept": kept.tolist(),
        "mean": _by_name(means, cell["windows"], NORMS),
        "worst": _by_name(worsts, cell["windows"], ENTRYWISE),
    }


def _by_name(
    errors: Sequence[Floats], windows: Sequence[str], norms: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """Errors `(norms, windows)` of each repeat by window and norm."""
    values = np.stack(errors, axis=-1)
    return {
        window: {norm: shortened(values[NORMS.index(norm), i]) for norm in norms} for i, window in enumerate(windows)
    }


def conclude(rows: Sequence[Row]) -> Findings:
    """Slopes, trends and the two claims of the abstract about sufficient and insufficient windows."""
    fits = [
        fit_errors(own, label, window, norm)
        for label, own in by_input(rows).items()
        for window in rows[0]["windows"]
        for norm in NORMS
    ]
    verdicts = [_sufficient(fits), _insufficient(fits), _dichotomy(fits)]
    lengths = sorted({row["n"] for row in rows})
    figures = {"lengths": lengths, "late_lengths": lengths[-LATE:], "slopes": fits}
    return Findings(
        figures,
        verdicts,
        windows_panels.panels(rows, fits, PAPER_LIKE),
        [slope_cells(fits, label) for label in _labels(fits)],
    )


def by_input(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each input by its label, lengths rising."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: int(row["n"])):
        groups.setdefault(Input.of(row).label, []).append(row)
    order = list(dict.fromkeys(Input.of(row).label for row in rows))
    return {label: groups[label] for label in order}


def fit_errors(rows: Sequence[Row], label: str, window: str, norm: str) -> dict[str, Any]:
    """Slopes of one error in n: over all lengths and over the longest, for the mean and for the worst row."""
    lengths = [row["n"] for row in rows]
    mean = np.array([row["mean"][window][norm] for row in rows])
    late = slope(lengths[-LATE:], mean[-LATE:])
    # The largest error of an entry of the matrix, not of a row: that of the worst row.
    worst = [row["worst"][window][norm] for row in rows[-LATE:]] if norm in ENTRYWISE else None
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


def slope_cells(fits: Sequence[dict[str, Any]], label: str) -> Table:
    """Slopes over the longest lengths of every window in every norm, for one input."""
    own = [fit for fit in fits if fit["input"] == label]
    windows = list(dict.fromkeys(fit["window"] for fit in own))
    header = [f"{label}: slope in n at large n", *windows]
    return header, [
        [norm, *(str(Interval(**fit["late_slope"])) for fit in own if fit["norm"] == norm)]
        for norm in dict.fromkeys(fit["norm"] for fit in own)
    ]


def _sufficient(fits: Sequence[dict[str, Any]]) -> Verdict:
    ours = [fit for fit in fits if fit["window"] in POWERS]
    falling = {norm: [fit["trend"] == "falls" for fit in ours if fit["norm"] == norm] for norm in NORMS}
    answer = answer_from(case for cases in falling.values() for case in cases)
    shares = "; ".join(f"{norm} {sum(cases)}" for norm, cases in falling.items())
    chosen = {norm: _fit(fits, PAPER_LIKE, "n^0.5", norm) for norm in NORMS}
    return Verdict(
        "Keeping the largest n^C entries, any C in (0, 1), approximates attention with an error that decreases in n.",
        "abstract",
        answer,
        f"the error falls like a power of n, of {len(ours) // len(NORMS)} pairs of input and exponent: {shares}",
        f"{PAPER_LIKE}, n^0.5 keys, slopes at large n: "
        + "; ".join(f"{norm} {Interval(**fit['late_slope'])}" for norm, fit in chosen.items()),
    )


def _insufficient(fits: Sequence[dict[str, Any]]) -> Verdict:
    ours = [fit for fit in fits if fit["window"] in SLOW]
    staying = {norm: [fit["trend"] != "falls" for fit in ours if fit["norm"] == norm] for norm in NORMS}
    answer = answer_from(case for cases in staying.values() for case in cases)
    shares = "; ".join(f"{norm} {sum(cases)}" for norm, cases in staying.items())
    largest, cut = (_fit(fits, PAPER_LIKE, "log2(n)/2", norm) for norm in ("max entry", "max entry, unnormalised"))
    return Verdict(
        "With log n entries or fewer the error stays at a constant.",
        "abstract",
        answer,
        f"the error does not fall like a power of n, of {len(ours) // len(NORMS)} pairs of input and window "
        f"({' or '.join(SLOW)}): {shares}",
        f"{PAPER_LIKE}, log2(n)/2 keys, slope at large n of the largest error of an entry: "
        f"{Interval(**largest['late_slope'])} if the kept entries are renormalised, {Interval(**cut['late_slope'])} if "
        "not",
    )


def _dichotomy(fits: Sequence[dict[str, Any]]) -> Verdict:
    """Both claims at once: where a row needs more than log n keys and n^C of them are enough."""

    def both(norm: str, label: str) -> bool:
        trends = {fit["window"]: fit["trend"] for fit in fits if (fit["norm"], fit["input"]) == (norm, label)}
        return all(trends[window] == "falls" for window in POWERS) and "falls" not in [
            trends[window] for window in SLOW
        ]

    held = {norm: [label for label in _labels(fits) if both(norm, label)] for norm in NORMS}
    largest = {window: _fit(fits, PAPER_LIKE, window, "max entry") for window in (*SLOW, *POWERS)}
    return Verdict(
        "There is a dichotomy: in the same norm n^C entries are enough, and log n or fewer are not.",
        "abstract",
        answer_from(label in labels for labels in held.values() for label in _labels(fits)),
        "; ".join(f"{norm}: {' and '.join(labels)}" for norm, labels in held.items() if labels) or "in no norm",
        f"{PAPER_LIKE}, slope at large n of the largest error of an entry, renormalised: "
        + ", ".join(f"{window} {Interval(**fit['late_slope'])}" for window, fit in largest.items()),
    )


def _fit(fits: Sequence[dict[str, Any]], label: str, window: str, norm: str) -> dict[str, Any]:
    return next(fit for fit in fits if (fit["input"], fit["window"], fit["norm"]) == (label, window, norm))


def _labels(fits: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(fit["input"] for fit in fits))


EXPERIMENT = Experiment(
    name="windows",
    title="Constant, logarithmic and power-law windows on synthetic inputs",
    claim="n^C entries suffice for an error that decreases in n; log n or fewer leave a constant error",
    source="abstract",
    cells=cells,
    measure=measure,
    conclude=conclude,
)
