"""The synthetic experiments of the theory lab: against closed forms, against published simulations, and repeatable."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hf_sparse.lab import windows, workloads
from hf_sparse.lab.experiment import Experiment, Setting, judge
from hf_sparse.lab.fits import Interval, freezing_norm, normal_keys, random_energy_exponent, slope, trend
from hf_sparse.lab.inputs import Input, draw_rows
from hf_sparse.lab.run import EXPERIMENTS
from hf_sparse.lab.topk import NORMS, keys_90, softmax
from hf_sparse.laws import total_cost

SYNTHETIC = [experiment for experiment in EXPERIMENTS.values() if not experiment.needs_model]
SMALL = Setting("small", 0)
KINDS = [Input("logits", 1), Input("student-logits", 1, shape=5), Input("signs", 1), Input("normal", 1)]
KINDS += [Input("student", 1, shape=5), Input("shared", 1, shape=0.5), Input("chain", 1, shape=0.5)]
KINDS += [Input("copies", 1, shape=0.5)]


def rows_of(source: Input, n: int, rows: int, seed: int = 0) -> list[Any]:
    return list(draw_rows(source, n, rows, np.random.default_rng(seed)))


# One row.


def test_keys_for_most_of_the_mass_where_the_answer_is_known() -> None:
    assert keys_90(np.array([2, 16, 1, 8, 4, 1]) / 32) == 4
    assert keys_90(np.full(200, 1 / 200)) == pytest.approx(180, abs=1)


# The inputs.


@pytest.mark.parametrize("source", KINDS, ids=lambda source: source.kind)
def test_logits_have_the_deviation_that_the_norm_says(source: Input) -> None:
    # A common direction of the tokens shifts all logits of a row alike: the deviation over queries and keys counts it.
    logits = np.array([logits for seed in range(60) for logits, _ in rows_of(source, 256, 4, seed)])
    # W is drawn anew for each seed, and its few large directions move the deviation: 60 seeds leave about 10 %.
    assert math.sqrt(np.square(logits).mean()) == pytest.approx(1, rel=0.15)
    for row, values in rows_of(source, 50, 2):
        assert row.shape == (50,)
        assert values.shape[0] == 50
        assert row.dtype == values.dtype == np.float32


def test_correlations_and_copies_are_there() -> None:
    (_, copied), *_ = rows_of(Input("copies", 1, shape=0.5), 256, 1)
    assert np.allclose(copied, np.tile(copied[:16], (16, 1)), atol=1e-5)
    assert not np.isclose(copied[0], copied[1:16], atol=1e-3).all(1).any()
    (_, chained), *_ = rows_of(Input("chain", 1, shape=0.9), 20_000, 1)
    neighbours = np.mean([np.corrcoef(column[1:], column[:-1])[0, 1] for column in chained.T])
    assert neighbours == pytest.approx(0.9, abs=0.03)
    (_, shared), *_ = rows_of(Input("shared", 1, shape=0.9), 2000, 1)
    assert np.square(shared.mean(0)).sum() / np.square(shared).sum(1).mean() == pytest.approx(0.9, abs=0.05)
    (tail, _), *_ = rows_of(Input("student-logits", 1, shape=3), 20_000, 1)
    assert stats.kurtosis(tail) > 5
    assert Input("logits", 2, growth=0.5).norm_at(1000) == pytest.approx(2 * math.sqrt(math.log(1000)))


# Closed forms and published simulations.


@pytest.mark.parametrize(("spread", "share"), [(1.0, 0.6109), (2.0, 0.2362)])
def test_keys_for_nine_tenths_of_the_mass_follow_the_closed_form(spread: float, share: float) -> None:
    assert normal_keys(spread, 0.1) == pytest.approx(share, abs=5e-5)
    n = 2**14
    found = [keys_90(softmax(logits)) / n for logits, _ in rows_of(Input("logits", spread), n, 40)]
    error = float(np.std(found)) / math.sqrt(40)
    # Within three standard errors; the bias at this n is far below it at sigma 1, and 1 % at 2.
    assert np.mean(found) == pytest.approx(share, abs=3 * error + 0.01 * share * (spread - 1))


def test_the_closed_form_is_the_tilted_normal() -> None:
    for spread, lost in ((0.5, 0.3), (1.0, 0.1), (2.5, 0.05)):
        threshold = stats.norm.isf(normal_keys(spread, lost))
        # Mass below the threshold under the density of a standard normal times exp(spread x), by quadrature.
        x = np.linspace(-12, 12, 200_001)
        tilted = np.exp(spread * x - x**2 / 2)
        assert tilted[x < threshold].sum() / tilted.sum() == pytest.approx(lost, abs=1e-3)


SIMULATED_EXPONENTS = {0.5: 0.92, 0.75: 0.81, 1.0: 0.65, 1.25: 0.42, 1.41: 0.33, 1.75: 0.19}
"""Exponents of k_90 from n = 2^10 to 2^18 for sigma = c sqrt(ln n), by c: independent simulations."""


def test_limits_of_the_random_energy_model() -> None:
    assert [random_energy_exponent(c) for c in (0.0, 1.0, math.sqrt(2), 2.0)] == pytest.approx([1, 0.5, 0, 0])
    assert [freezing_norm(131_072) / 2**0.5, freezing_norm(131_072)] == pytest.approx([3.43, 4.85], abs=0.005)
    # Far below freezing the largest entry vanishes, far above it takes nearly everything.
    below, above = (
        np.mean([softmax(x).max() for x, _ in rows_of(Input("logits", sigma), 4096, 20)]) for sigma in (0.5, 40.0)
    )
    assert below < 0.01
    assert above > 0.8


SIMULATED_SLOPES = {("n^0.5", "max entry"): -0.40, ("n^0.75", "max entry"): -0.52, ("log2(n)/2", "max entry"): -0.07}
SIMULATED_SLOPES |= {("n^0.5", "output"): -0.23, ("log2(n)/2", "max entry, unnormalised"): -0.74}
"""Slopes in n up to 2^17 for normal logits of sigma = 1: independent simulations."""


# Fits.


def test_a_power_law_has_its_exponent_and_a_constant_has_none() -> None:
    lengths = [256, 512, 1024, 2048]
    noise = 1 + 0.01 * np.random.default_rng(0).standard_normal((4, 5))
    power = slope(lengths, np.array(lengths)[:, None] ** -0.5 * noise)
    assert power.low < -0.5 < power.high
    assert trend(lengths, power) == "falls"
    assert trend(lengths, slope(lengths, noise)) == "level"
    assert trend(lengths, slope(lengths, (1 / np.log(lengths))[:, None] * noise)) == "falls slowly"
    assert trend(lengths, slope(lengths, np.log(lengths)[:, None] * noise)) == "rises"
    assert slope(lengths, np.zeros((4, 2))).value == pytest.approx(0)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    intervals = [Interval.of(rng.standard_normal(4)) for _ in range(2000)]
    assert np.mean([i.low < 0 < i.high for i in intervals]) == pytest.approx(0.95, abs=0.015)


def test_answers() -> None:
    claim = {"text": "t", "source": "abstract", "evidence": ["a > b", "c"], "where": "n = {n:,}"}
    quantities = {"a": {"b": {"x": 0.5}}, "c": "", "n": 4096}
    found = [
        judge(claim, held, quantities) for held in (True, [True, False], [[False] * 20, [True] + [False] * 19], None)
    ]
    assert [verdict["answer"] for verdict in found] == ["holds", "holds in part", "fails", "not testable here"]
    assert (found[0]["where"], found[0]["evidence"]) == ("n = 4,096", "b: x: 0.5")


# Workloads.


def test_every_law_of_a_workload_costs_the_same() -> None:
    lengths = tuple(2**e for e in range(8, 13))
    for name in workloads.WORKLOADS:
        workload = workloads.workload_lengths(name, lengths)
        target = total_cost(workloads.BASE, workload)
        for law, budget in workloads.budgets(name, lengths).items():
            # A whole number of keys on every row: the cost moves in steps.
            assert total_cost(budget, workload) == pytest.approx(target, rel=0.005), (name, law)


def test_workloads_weigh_lengths_as_they_say() -> None:
    lengths = [256, 512, 1024]
    assert workloads.workload_lengths("even", lengths) == lengths
    short = workloads.workload_lengths("short", lengths)
    assert {length * short.count(length) for length in lengths} == {1024}
    assert [workloads.workload_lengths("long", lengths).count(length) for length in lengths] == [1, 2, 4]


# The experiments.


def measured(experiment: Experiment, chosen: slice, setting: Setting = SMALL) -> list[Any]:
    return [cell | experiment.measure(cell, setting) for cell in experiment.cells(setting)[chosen]]


@pytest.mark.parametrize("experiment", SYNTHETIC, ids=lambda experiment: experiment.name)
def test_a_cell_is_the_same_alone_and_after_others_and_another_seed_is_not(experiment: Experiment) -> None:
    together = measured(experiment, slice(0, 3))
    assert measured(experiment, slice(2, 3)) == together[2:]
    assert measured(experiment, slice(2, 3), Setting("small", 1)) != together[2:]


def test_verdicts_turn_with_the_data() -> None:
    experiment = SYNTHETIC[0]
    rows = measured(experiment, slice(None))

    def answers(powers: float, slow: float) -> list[str]:
        """The verdicts if errors went as these powers of n."""
        exponents = {window: slow if window in windows.SLOW else powers for window in windows.WINDOWS}
        faked = []
        for row in rows:
            errors = {w: {norm: [row["n"] ** e, 1.01 * row["n"] ** e] for norm in NORMS} for w, e in exponents.items()}
            faked.append(row | {"mean": errors, "worst": errors})
        return [verdict["answer"] for verdict in experiment.verdicts(windows.conclude(faked))]

    assert answers(-0.5, 0.0) == ["holds", "holds", "holds"]
    assert answers(-0.5, -0.5) == ["holds", "fails", "fails"]
    assert answers(0.0, 0.1) == ["fails", "holds", "fails"]
