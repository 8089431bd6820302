"""Experiment `workloads`: adaptive against fixed windows where lengths vary, at equal cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from hf_sparse.lab.experiment import Cell, Experiment, Findings, Setting, Verdict, decide
from hf_sparse.lab.fits import FloatArray, Interval, shortened
from hf_sparse.lab.inputs import Input, by_input, draw_rows
from hf_sparse.lab.plots import Panel
from hf_sparse.lab.topk import NORMS, TopK, softmax
from hf_sparse.laws import Budget, match_cost, total_cost
from hf_sparse.results import Row

BASE = Budget("power", alpha=8.0, exponent=0.5)
"""The package's default law; the others spend as many keys over a workload."""

LAWS = ("fixed", "log", "n^0.25", "n^0.5", "n^0.75", "fraction")
LAW = "n^0.5"
OTHERS_NORM = "lost mass"
COMPARED = ("max entry", "lost mass", "output", "relative output")
STATISTICS = ("mean", "worst length")
WORKLOADS = ("even", "short", "long")

INPUTS = (Input("logits", 1), Input("logits", 3), Input("logits", 1, growth=0.5), Input("signs", 2))

Comparison = dict[str, Any]


def workload_lengths(name: str, lengths: Sequence[int]) -> list[int]:
    """The lengths of a workload, each as often as it occurs.

    Args:
        name: `even` has each length once; in `short` a length is half as frequent as the one before, so that powers of
            two all have the same number of tokens; in `long` twice as frequent.
        lengths: The lengths, rising.
    """
    last = len(lengths) - 1
    counts = {"even": lambda i: 1, "short": lambda i: 2 ** (last - i), "long": lambda i: 2**i}[name]
    return [length for i, length in enumerate(lengths) for _ in range(counts(i))]


@cache
def budgets(name: str, lengths: tuple[int, ...]) -> dict[str, Budget]:
    """The budget of each law that attends to as many keys over a workload as `BASE` does."""
    workload = workload_lengths(name, lengths)
    powers = {law: float(law[2:]) for law in LAWS if law.startswith("n^")}
    return {
        law: match_cost(BASE, "power", workload, powers[law]) if law in powers else match_cost(BASE, law, workload)  # type: ignore[arg-type]
        for law in LAWS
    }


def cells(setting: Setting) -> list[Cell]:
    """Every input at every length."""
    exponents, size = {
        "small": (range(8, 13), {"rows": 16, "repeats": 3}),
        "full": (range(8, 16), {"rows": 32, "repeats": 6}),
    }[setting.scale]
    lengths = [2**e for e in exponents]
    return [source.fields() | {"length": n, "lengths": lengths, **size} for source in INPUTS for n in lengths]


def measure(cell: Cell, setting: Setting) -> Row:
    """Errors of every law of every workload, averaged over queries of one sequence: one number per repeat.

    Query i of a sequence sees i keys. Queries are drawn one from each of equal stretches of the sequence.
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


def _sequence_errors(cell: Cell, laws: Sequence[Budget], rng: np.random.Generator) -> FloatArray:
    """The mean of `TopK.errors` over queries: `(norms, laws)`."""
    errors = []
    for low, high in pairwise(np.linspace(0, cell["length"], cell["rows"] + 1)):
        n = int(rng.integers(math.floor(low) + 1, math.floor(high) + 1))
        kept = [int(law(torch.tensor(n))) for law in laws]
        errors += [TopK.of(softmax(x), values, kept).errors() for x, values in draw_rows(Input.of(cell), n, 1, rng)]
    return np.asarray(np.mean(errors, axis=0))


def _comparisons(label: str, records: Sequence[Row]) -> list[Comparison]:
    """Ratios of errors of one input, each law over fixed: geometric means over the repeats, with intervals."""
    lengths = [record["length"] for record in records]
    out = []
    for norm in COMPARED:
        for name in WORKLOADS:
            counts = np.array([workload_lengths(name, lengths).count(length) for length in lengths])
            by_law = {law: np.array([record[norm][name][law] for record in records]) for law in LAWS}
            # The worst length is the one that is worst on average over the repeats.
            statistics = {
                "mean": {law: counts @ errors / counts.sum() for law, errors in by_law.items()},
                "worst length": {law: errors[errors.mean(1).argmax()] for law, errors in by_law.items()},
            }
            for statistic, found in statistics.items():
                # All norms for the law of the claim; one for the others, which show the effect of the exponent.
                for law in LAWS if norm == OTHERS_NORM else (LAW,):
                    ratio = Interval.of(np.log(found[law] / found["fixed"]))
                    better = law if ratio.high < 0 else "fixed" if ratio.low > 0 else "not resolved"
                    out.append(
                        {
                            "input": label,
                            "workload": name,
                            "norm": norm,
                            "statistic": statistic,
                            "law": law,
                            "error": shortened(found[law].mean()),
                            "fixed_error": shortened(found["fixed"].mean()),
                            "ratio": shortened({end: math.exp(x) for end, x in ratio.to_dict().items()}),
                            "better": better,
                        }
                    )
    return out


def conclude(records: Sequence[Row]) -> Findings:
    """Adaptive over fixed, on average over a workload and at its worst length."""
    inputs = by_input(records, "length")
    found = [c for label, own in inputs.items() for c in _comparisons(label, own) if c["law"] != "fixed"]
    comparisons = sorted(found, key=lambda c: LAWS.index(c["law"]))
    lengths = tuple(records[0]["lengths"])
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
    ours = [c for c in comparisons if c["law"] == LAW]
    places = {(c["input"], c["workload"], c["norm"], c["statistic"]): c for c in ours}
    columns = [(norm, statistic) for norm in COMPARED for statistic in STATISTICS]
    header = [f"error of {LAW} / fixed, equal cost", *(f"{norm}, {statistic}" for norm, statistic in columns)]
    body = [
        [f"{label}, {name} workload", *(_ratio(places[label, name, *column]) for column in columns)]
        for label in inputs
        for name in WORKLOADS
    ]
    verdicts = [_verdict([c for c in ours if c["statistic"] == statistic], statistic) for statistic in STATISTICS]
    figures = {"lengths": lengths, "budgets": costs, "comparisons": comparisons}
    return Findings(figures, verdicts, _panels(inputs, comparisons, verdicts), [(header, body)])


def _verdict(own: Sequence[Comparison], statistic: str) -> Verdict:
    counts = {
        norm: [[c["better"] for c in own if c["norm"] == norm].count(law) for law in (LAW, "fixed")]
        for norm in COMPARED
    }
    ordered = sorted(own, key=lambda c: float(c["ratio"]["value"]))
    where = "on average over the lengths" if statistic == "mean" else "at the worst length"
    return Verdict(
        f"A window alpha n^C is more accurate than a fixed one at equal cost where lengths vary: {where}.",
        "abstract",
        decide([c["better"] == LAW for c in own]),
        f"C = 0.5, better / worse of {len(own) // len(COMPARED)} pairs of input and workload: "
        + ", ".join(f"{norm} {a} / {b}" for norm, (a, b) in counts.items()),
        {
            f"{end} ratio of errors": f"{_ratio(c)} ({c['input']}, {c['workload']} workload, {c['norm']})"
            for end, c in (("least", ordered[0]), ("largest", ordered[-1]))
        },
    )


def _ratio(comparison: Comparison) -> str:
    return "{value:.2f} [{low:.2f}, {high:.2f}]".format(**comparison["ratio"])


def _parameter(budget: Budget) -> Any:
    return {"fixed": float(budget.keys), "fraction": budget.fraction}.get(budget.law, budget.alpha)


def _panels(
    inputs: dict[str, list[Row]], comparisons: Sequence[Comparison], verdicts: Sequence[Verdict]
) -> list[Panel]:
    lengths = [record["length"] for record in next(iter(inputs.values()))]
    drawn = ("fixed", "log", LAW, "fraction")

    def errors(records: Sequence[Row], law: str) -> list[float]:
        return [float(np.mean(record[OTHERS_NORM]["even"][law])) for record in records]

    panels = [
        Panel(
            label, verdicts[1].caption, lengths, "length of the sequence", f"{OTHERS_NORM}, mean query",
            {law: errors(own, law) for law in drawn}, log="x",
        )
        for label, own in list(inputs.items())[:3]
    ]  # fmt: skip
    for statistic, verdict in zip(STATISTICS, verdicts, strict=True):
        own = [c for c in comparisons if (c["law"], c["statistic"]) == (LAW, statistic)]
        places = list(dict.fromkeys((c["input"], c["workload"]) for c in own))
        ratios = {(c["input"], c["workload"], c["norm"]): c["ratio"]["value"] for c in own}
        grid = [[ratios[*place, norm] for norm in COMPARED] for place in places]
        rows, what = [", ".join(place) for place in places], f"error of {LAW} / fixed"
        panels.append(Panel(statistic, verdict.caption, COMPARED, "", what, grid=grid, rows=rows))
    exponents = {"fixed": 0.0, "n^0.25": 0.25, "n^0.5": 0.5, "n^0.75": 0.75, "fraction": 1.0}
    even = [c for c in comparisons if (c["norm"], c["workload"]) == (OTHERS_NORM, "even")]
    ratios = {(c["input"], c["statistic"], c["law"]): c["ratio"]["value"] for c in even}
    lines = {
        f"{label}, {statistic}": [ratios.get((label, statistic, law), 1.0) for law in exponents]
        for label in list(inputs)[:2]
        for statistic in STATISTICS
    }
    what = f"{OTHERS_NORM} / that of fixed"
    x = list(exponents.values())
    panels.append(Panel("Which exponent", verdicts[1].caption, x, "C (0: fixed, 1: fraction)", what, lines, log="y"))
    return panels


EXPERIMENT = Experiment(
    name="workloads",
    title="Adaptive against fixed windows where lengths vary, at equal cost",
    claim="alpha n^C is more accurate than a fixed window at equal cost on flexible lengths",
    source="abstract",
    cells=cells,
    measure=measure,
    conclude=conclude,
)
