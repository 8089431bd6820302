"""Experiment `workloads`: adaptive against fixed windows where lengths vary, at equal cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch

from hf_sparse.lab.experiment import Cell, Findings, Plot, Setting
from hf_sparse.lab.fits import Interval, shortened
from hf_sparse.lab.inputs import Input, by_input, draw_rows
from hf_sparse.lab.topk import NORMS, RENORMALISED, softmax, top_k_errors
from hf_sparse.laws import Budget, LawName, match_cost, total_cost
from hf_sparse.measure.statistics import FloatArray
from hf_sparse.results import Record

BASE = Budget("power", alpha=8.0, exponent=0.5)
"""The package's default law; the others spend as many keys over a workload."""

LAWS: dict[str, tuple[LawName, float | None]] = {
    "fixed": ("fixed", None),
    "log": ("log", None),
    "n^0.25": ("power", 0.25),
    "n^0.5": ("power", 0.5),
    "n^0.75": ("power", 0.75),
    "fraction": ("fraction", None),
}
LAW = "n^0.5"
OTHERS_NORM = "lost mass"
STATISTICS = ("mean", "worst length")
WORKLOADS = ("even", "short", "long")

INPUTS = (Input("logits", 1), Input("logits", 3), Input("logits", 1, growth=0.5), Input("signs", 2))


def workload_lengths(name: str, lengths: Sequence[int]) -> list[int]:
    """The lengths of a workload, of the rising `lengths`, each as often as it occurs.

    `even` has each length once; in `short` a length is half as frequent as the one before, so that powers of two all
    have the same number of tokens; in `long` twice as frequent.
    """
    last = len(lengths) - 1
    return [n for i, n in enumerate(lengths) for _ in range({"even": 1, "short": 2 ** (last - i), "long": 2**i}[name])]


@cache
def budgets(name: str, lengths: tuple[int, ...]) -> dict[str, Budget]:
    """The budget of each law that attends to as many keys over a workload as `BASE` does."""
    workload = workload_lengths(name, lengths)
    return {law: match_cost(BASE, shape, workload, exponent) for law, (shape, exponent) in LAWS.items()}


def cells(setting: Setting) -> list[Cell]:
    """Every input at every length."""
    exponents, size = {
        "small": (range(8, 13), {"rows": 16, "repeats": 3}),
        "full": (range(8, 16), {"rows": 32, "repeats": 6}),
    }[setting.scale]
    lengths = [2**e for e in exponents]
    return [source.fields() | {"length": n, "lengths": lengths, **size} for source in INPUTS for n in lengths]


def measure(cell: Cell, setting: Setting) -> Record:
    """Errors of every law of every workload, averaged over queries of one sequence: one number per repeat.

    Query i of a sequence sees i keys. Queries are drawn one from each of equal stretches of the sequence.
    """
    laws = [budget for name in WORKLOADS for budget in budgets(name, tuple(cell["lengths"])).values()]
    stretches = list(pairwise(np.linspace(0, cell["length"], cell["rows"] + 1)))
    repeats = []
    for rng in setting.rng(cell).spawn(cell["repeats"]):
        errors = []
        for low, high in stretches:
            n = int(rng.integers(math.floor(low) + 1, math.floor(high) + 1))
            kept = [int(law(torch.tensor(n))) for law in laws]
            errors += [top_k_errors(softmax(x), values, kept)[0] for x, values in draw_rows(Input.of(cell), n, 1, rng)]
        repeats.append(np.mean(errors, axis=0))
    values = np.stack(repeats, axis=-1).reshape(len(NORMS), len(WORKLOADS), len(LAWS), -1)
    return {
        norm: {name: dict(zip(LAWS, shortened(of_norm[i]), strict=True)) for i, name in enumerate(WORKLOADS)}
        for norm, of_norm in zip(RENORMALISED, values, strict=False)
    }


def compare(
    law: str, label: str, records: Sequence[Record], norm: str, workload: str, statistic: str
) -> dict[str, Any]:
    """The ratio of errors of one input, a law over fixed: geometric mean over the repeats, with its interval."""
    lengths = [record["length"] for record in records]
    counts = np.array([workload_lengths(workload, lengths).count(length) for length in lengths])

    def error(name: str) -> FloatArray:
        errors = np.array([record[norm][workload][name] for record in records])
        # The worst length is the one that is worst on average over the repeats.
        return np.asarray(counts @ errors / counts.sum() if statistic == "mean" else errors[errors.mean(1).argmax()])

    ratio = Interval.of(np.log(error(law) / error("fixed")))
    return {
        "input": label,
        "workload": workload,
        "norm": norm,
        "statistic": statistic,
        "law": law,
        "error": shortened(error(law).mean()),
        "fixed_error": shortened(error("fixed").mean()),
        "ratio": shortened({end: math.exp(value) for end, value in ratio.to_dict().items()}),
        "better": law if ratio.high < 0 else "fixed" if ratio.low > 0 else "not resolved",
    }


def conclude(records: Sequence[Record]) -> Findings:
    """Adaptive over fixed, on average over a workload and at its worst length."""
    inputs, lengths = by_input(records, "length"), tuple(records[0]["lengths"])
    # Every norm for the law of the claim; one for the others, which show the effect of the exponent.
    comparisons = [
        compare(law, label, inputs[label], norm, workload, statistic)
        for law, label, norm, workload, statistic in product(LAWS, inputs, RENORMALISED, WORKLOADS, STATISTICS)
        if law == LAW or (law != "fixed" and norm == OTHERS_NORM)
    ]
    costs = [
        {
            "workload": name,
            "law": law,
            "parameter": shortened({"fixed": budget.keys, "fraction": budget.fraction}.get(law, budget.alpha)),
            "keys_attended": total_cost(budget, workload_lengths(name, lengths)),
        }
        for name in WORKLOADS
        for law, budget in budgets(name, lengths).items()
    ]
    held, counts, extremes = [], {}, {}
    for statistic in STATISTICS:
        ours = [c for c in comparisons if (c["law"], c["statistic"]) == (LAW, statistic)]
        better = {norm: [c["better"] for c in ours if c["norm"] == norm] for norm in RENORMALISED}
        held.append([c["better"] == LAW for c in ours])
        counts[statistic] = ", ".join(f"{norm} {b.count(LAW)} / {b.count('fixed')}" for norm, b in better.items())
        rising = sorted(ours, key=lambda c: float(c["ratio"]["value"]))
        form = "{ratio[value]:.2f} [{ratio[low]:.2f}, {ratio[high]:.2f}] ({input}, {workload} workload, {norm})"
        extremes[statistic] = {"least": form.format(**rising[0]), "largest": form.format(**rising[-1])}
    lines = {
        f"{label}, {statistic}": [
            c["ratio"]["value"]
            for c in comparisons
            if (c["input"], c["workload"], c["norm"], c["statistic"]) == (label, "even", OTHERS_NORM, statistic)
            and c["law"] != "log"
        ]
        for label, statistic in product(list(inputs)[:2], STATISTICS)
    }
    what = f"{OTHERS_NORM} / that of fixed, even workload"
    plot = Plot("exponent C (1: fraction)", what, (0.25, 0.5, 0.75, 1.0), lines, log="")
    figures = {"lengths": lengths, "budgets": costs, "comparisons": comparisons}
    more = {"cases": len(inputs) * len(WORKLOADS), "counts": counts, "ratio of errors": extremes}
    return Findings(figures, more, held, plot)
