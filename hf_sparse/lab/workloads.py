"""Experiment `workloads`: adaptive against fixed windows where lengths vary, at equal cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch

from hf_sparse.lab import workloads_panels
from hf_sparse.lab.experiment import Cell, Experiment, Findings, Setting, Verdict, answer_from
from hf_sparse.lab.fits import Interval
from hf_sparse.lab.inputs import Input, draw_rows
from hf_sparse.lab.rows import NORMS, row_errors, shortened
from hf_sparse.laws import Budget, match_cost, total_cost
from hf_sparse.measure.tables import Table
from hf_sparse.results import Row

BASE = Budget("power", alpha=8.0, exponent=0.5)
"""The package's default law; the others spend as many keys over a workload."""

LAWS = ("fixed", "log", "n^0.25", "n^0.5", "n^0.75", "fraction")
LAW = "n^0.5"
OTHERS_NORM = "lost mass"
COMPARED = ("max entry", "lost mass", "output", "relative output")
STATISTICS = ("mean", "worst length")

INPUTS = (Input("logits", 1), Input("logits", 3), Input("logits", 1, growth=0.5), Input("signs", 2))


def workload_lengths(name: str, lengths: Sequence[int]) -> list[int]:
    """The lengths of a workload, each as often as it occurs: powers of two, as many of each, or weighted.

    Args:
        name: `even` has each length once; in `short` a length is half as frequent as the one before, so that all have
            the same number of tokens; in `long` twice as frequent.
        lengths: The lengths, rising.
    """
    counts = {"even": [1] * len(lengths), "short": [2**i for i in reversed(range(len(lengths)))]}
    counts["long"] = counts["short"][::-1]
    return [length for length, count in zip(lengths, counts[name], strict=True) for _ in range(count)]


WORKLOADS = ("even", "short", "long")


@cache
def budgets(name: str, lengths: tuple[int, ...]) -> dict[str, Budget]:
    """The budget of each law that attends to as many keys over a workload as `BASE` does."""
    workload = workload_lengths(name, lengths)

    def matched(law: str) -> Budget:
        if law.startswith("n^"):
            return match_cost(BASE, "power", workload, exponent=float(law[2:]))
        chosen: Literal["fixed", "log", "fraction"] = law  # type: ignore[assignment]
        return match_cost(BASE, chosen, workload)

    return {law: matched(law) for law in LAWS}


def cells(setting: Setting) -> list[Cell]:
    """Every input at every length."""
    exponents, size = {
        "small": (range(8, 13), {"rows": 16, "repeats": 3}),
        "full": (range(8, 16), {"rows": 32, "repeats": 6}),
    }[setting.scale]
    lengths = [2**e for e in exponents]
    return [source.fields() | {"length": n, "lengths": lengths, **size} for source in INPUTS for n in lengths]


def measure(cell: Cell, setting: Setting) -> Row:
    """Errors of every law of every workload, averaged over rows of one sequence: one number per repeat.

    Row i of a sequence sees i keys. Rows are drawn one from each of equal stretches of the sequence.
    """
    laws = [budget for name in WORKLOADS for budget in budgets(name, tuple(cell["lengths"])).values()]
    repeats = [_sequence_errors(cell, laws, rng) for rng in setting.rng(cell).spawn(cell["repeats"])]
    values = np.stack(repeats, axis=-1).reshape(len(NORMS), len(WORKLOADS), len(LAWS), -1)
    return {
        norm: {
            name: {law: shortened(values[NORMS.index(norm), i, j]) for j, law in enumerate(LAWS)}
            for i, name in enumerate(WORKLOADS)
        }
        for norm in COMPARED
    }


def _sequence_errors(cell: Cell, laws: Sequence[Budget], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """The mean of `row_errors` over rows: `(norms, laws)`."""
    edges = np.linspace(0, cell["length"], cell["rows"] + 1)
    errors = []
    for low, high in pairwise(edges):
        n = int(rng.integers(math.floor(low) + 1, math.floor(high) + 1))
        kept = np.array([law(torch.tensor(n)).item() for law in laws])
        errors += [row_errors(*row, kept) for row in draw_rows(Input.of(cell), n, 1, rng)]
    return np.asarray(np.mean(errors, axis=0))


def conclude(rows: Sequence[Row]) -> Findings:
    """Adaptive over fixed, on average over a workload and at its worst length."""
    totals = [total for label in _labels(rows) for total in _totals(rows, label)]
    # Every norm for the law of the claim; one for the others, which show what another exponent would do.
    compared = [(total, law) for law in LAWS for total in totals if law == LAW or total["norm"] == OTHERS_NORM]
    comparisons = [_compare(total, law) for total, law in compared if law != "fixed"]
    lengths = tuple(rows[0]["lengths"])
    costs = [
        {
            "workload": name,
            "law": law,
            "parameter": shortened(_parameter(budget)),
            "keys_attended": total_cost(budget, workload_lengths(name, lengths)),
        }
        for name in WORKLOADS
        for law, budget in budgets(name, lengths).items()
    ]
    figures = {"lengths": lengths, "budgets": costs, "comparisons": comparisons}
    verdicts = [_verdict(comparisons, statistic) for statistic in STATISTICS]
    tables = [comparison_cells(comparisons, LAW)]
    return Findings(figures, verdicts, workloads_panels.panels(rows, comparisons), tables)


def _totals(rows: Sequence[Row], label: str) -> list[dict[str, Any]]:
    """Errors of one input over each workload: `(repeats,)` by law, for each norm and statistic."""
    own = sorted((row for row in rows if Input.of(row).label == label), key=lambda row: int(row["length"]))
    lengths = [row["length"] for row in own]
    out = []
    for norm in COMPARED:
        for name in WORKLOADS:
            counts = np.array([workload_lengths(name, lengths).count(length) for length in lengths])
            errors = {law: np.array([row[norm][name][law] for row in own]) for law in LAWS}
            # The worst length is the one that is worst on average over the repeats.
            by_statistic = {
                "mean": {law: counts @ e / counts.sum() for law, e in errors.items()},
                "worst length": {law: e[e.mean(1).argmax()] for law, e in errors.items()},
            }
            out += [
                {"input": label, "workload": name, "norm": norm, "statistic": statistic, "errors": by_law}
                for statistic, by_law in by_statistic.items()
            ]
    return out


def _compare(total: dict[str, Any], law: str) -> dict[str, Any]:
    """The ratio of errors, a law over fixed: geometric mean over the repeats, with its interval."""
    errors, fixed = total["errors"][law], total["errors"]["fixed"]
    ratio = Interval.of(np.log(errors / fixed))
    better = law if ratio.high < 0 else "fixed" if ratio.low > 0 else "not resolved"
    return {
        **{name: total[name] for name in ("input", "workload", "norm", "statistic")},
        "law": law,
        "error": shortened(errors.mean()),
        "fixed_error": shortened(fixed.mean()),
        "ratio": shortened({name: math.exp(value) for name, value in ratio.to_dict().items()}),
        "better": better,
    }


def comparison_cells(comparisons: Sequence[dict[str, Any]], law: str) -> Table:
    """Ratios of errors, `law` over fixed, by input and workload, in every norm."""
    own = [c for c in comparisons if c["law"] == law]
    places = list(dict.fromkeys((c["input"], c["workload"]) for c in own))
    columns = [(norm, statistic) for norm in COMPARED for statistic in STATISTICS]
    header = [f"error of {law} / fixed, equal cost", *(f"{norm}, {statistic}" for norm, statistic in columns)]
    return header, [
        [
            f"{label}, {name} workload",
            *(
                _ratio_text(c)
                for norm, statistic in columns
                for c in own
                if (c["input"], c["workload"], c["norm"], c["statistic"]) == (label, name, norm, statistic)
            ),
        ]
        for label, name in places
    ]


def _verdict(comparisons: Sequence[dict[str, Any]], statistic: str) -> Verdict:
    own = [c for c in comparisons if c["law"] == LAW and c["statistic"] == statistic]
    counts = {
        norm: [[c["better"] for c in own if c["norm"] == norm].count(who) for who in (LAW, "fixed")]
        for norm in COMPARED
    }
    cases = sum(c["norm"] == COMPARED[0] for c in own)
    best = min(own, key=lambda c: float(c["ratio"]["value"]))
    worst = max(own, key=lambda c: float(c["ratio"]["value"]))
    where = "on average over the lengths" if statistic == "mean" else "at the worst length"
    return Verdict(
        f"A window alpha n^C is more accurate than a fixed one at equal cost where lengths vary: {where}.",
        "abstract",
        answer_from(c["better"] == LAW for c in own),
        f"C = 0.5, better / worse of {cases} pairs of input and workload: "
        + ", ".join(f"{norm} {a} / {b}" for norm, (a, b) in counts.items()),
        f"ratio of errors from {_ratio_text(best)} ({best['input']}, {best['workload']} workload, {best['norm']}) to "
        f"{_ratio_text(worst)} ({worst['input']}, {worst['workload']} workload, {worst['norm']})",
    )


def _ratio_text(comparison: dict[str, Any]) -> str:
    ratio = comparison["ratio"]
    return f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _parameter(budget: Budget) -> float:
    match budget.law:
        case "fixed":
            return float(budget.keys)
        case "fraction":
            return budget.fraction
        case _:
            return float(budget.alpha)  # type: ignore[arg-type]


def _labels(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(Input.of(row).label for row in rows))


EXPERIMENT = Experiment(
    name="workloads",
    title="Adaptive against fixed windows where lengths vary, at equal cost",
    claim="alpha n^C is more accurate than a fixed window at equal cost on flexible lengths",
    source="abstract",
    cells=cells,
    measure=measure,
    conclude=conclude,
)
