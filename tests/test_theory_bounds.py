"""Every bound holds on random inputs, and is reached by the inputs that its docstring names."""

from __future__ import annotations

import inspect
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse.lab import bounds
from hf_sparse.lab.fits import FloatArray
from hf_sparse.lab.topk import NORMS, softmax, top_k_errors

SEEDS = st.integers(0, 10_000)
CLOSE = 1 + 1e-9
ATOL = 1e-12


def scale_of(query: FloatArray, key: FloatArray) -> float:
    """R at B = 1 without position embedding."""
    return float(bounds.rope_scales(query, key, np.zeros(len(query) // 2), np.zeros(1))[0])


def top_k(weights: FloatArray, values: FloatArray, kept: int) -> dict[str, float]:
    """The errors of one window, by norm."""
    return dict(zip(NORMS, top_k_errors(weights, values, [kept])[0][:, 0].tolist(), strict=True))


def lost(weights: FloatArray, kept: int) -> float:
    return top_k(weights, np.ones((len(weights), 1)), kept)["lost mass"]


def random_row(seed: int) -> tuple[FloatArray, int]:
    """Logits of one of several kinds, and how many of them to keep."""
    rng = np.random.default_rng(seed)
    keys = int(rng.integers(2, 60))
    kind = seed % 3
    logits = rng.normal(size=keys) if kind else rng.choice([-1.0, 1.0], size=keys)
    return logits * rng.uniform(0, 8), int(rng.integers(1, keys + 1))


def random_heads(seed: int, head_dim: int = 6, hidden: int = 7) -> tuple[FloatArray, FloatArray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(head_dim, hidden)), rng.normal(size=(head_dim, hidden))


def rotation(frequencies: FloatArray, distance: float) -> FloatArray:
    """The matrix by which RoPE turns a vector at `distance` tokens from the origin, pairs half a head apart."""
    cos, sin = np.diag(np.cos(distance * frequencies)), np.diag(np.sin(distance * frequencies))
    return np.block([[cos, -sin], [sin, cos]])


def test_every_bound_says_what_it_assumes_where_it_is_from_and_when_it_is_tight() -> None:
    functions = [f for _, f in inspect.getmembers(bounds, inspect.isfunction) if f.__module__ == bounds.__name__]
    assert len(functions) >= 8
    for function in functions:
        assert all(part in (function.__doc__ or "") for part in ("Assumes:", "Source:", "Tight:")), function.__name__


# R and the logits


@given(SEEDS)
def test_r_is_the_deviation_of_logits_of_signs_and_bounds_that_of_others(seed: int) -> None:
    query, key = random_heads(seed, head_dim=2, hidden=3)
    # All pairs of inputs with entries of two, and of three, equally likely values, exactly.
    for entries, factor in (([-1.0, 1.0], 1.0), ([-1.0, 0.0, 1.0], 2 / 3)):
        x = np.array(list(itertools.product(entries, repeat=3)))
        assert (x @ query.T @ key @ x.T).std() == pytest.approx(scale_of(query, key) * factor)


@given(SEEDS, st.floats(-50, 50))
def test_rope_scales_are_those_of_the_rotated_matrix(seed: int, distance: float) -> None:
    query, key = random_heads(seed)
    frequencies = np.array([1.0, 0.3, 0.01])
    whole = query.T @ rotation(frequencies, distance).T @ key
    found = bounds.rope_scales(query, key, frequencies, np.array([distance, 0.0]))
    assert found.tolist() == pytest.approx([np.linalg.norm(whole), np.linalg.norm(query.T @ key)])
    # What is rotated is the query, by its position, and the key, by its own: only the distance matters.
    x, y = np.random.default_rng(seed).normal(size=(2, 7))
    left, right = rotation(frequencies, 11 + distance) @ query @ x, rotation(frequencies, 11) @ key @ y
    assert left @ right == pytest.approx(x @ whole @ y)


@given(SEEDS, st.floats(-50, 50))
def test_the_spectral_scale_bounds_every_rotation(seed: int, distance: float) -> None:
    query, key = random_heads(seed)
    whole = query.T @ rotation(np.array([1.0, 0.3, 0.01]), distance).T @ key
    assert np.linalg.norm(whole, 2) <= bounds.spectral_scale(query, key) * CLOSE


def test_the_spectral_scale_is_reached_by_a_head_of_rank_one() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 7))
    query, key = np.outer([1.0, 0.0], a), np.outer([2.0, 0.0], b)
    assert bounds.spectral_scale(query, key) == pytest.approx(np.linalg.norm(query.T @ key, 2))


@given(SEEDS, st.sampled_from([0.5, 0.05]))
def test_the_radius_covers_a_row_as_often_as_it_promises(seed: int, delta: float) -> None:
    rng = np.random.default_rng(seed)
    query, key = random_heads(seed, hidden=24)
    x = rng.choice([-1.0, 1.0], size=(200, 24))
    y = rng.choice([-1.0, 1.0], size=(200, 30, 24))
    form = query.T @ key
    logits = (y @ (x @ form)[:, :, None])[..., 0]
    radius = bounds.logit_radius(scale_of(query, key), float(np.linalg.norm(form, 2)), 30, delta)
    assert (np.abs(logits).max(1) > radius).mean() <= delta
    given_query = [bounds.row_radius(float(np.linalg.norm(form.T @ row)), 30, delta) for row in x]
    assert (np.abs(logits).max(1) > given_query).mean() <= delta


def test_the_radius_is_reached_as_n_grows() -> None:
    hidden, keys = 2048, 1 << 15
    rng = np.random.default_rng(0)
    # W = identity, x = all ones: each logit is a sum of 2,048 signs, that is a binomial.
    logits = 2.0 * rng.binomial(hidden, 0.5, size=(5, keys)) - hidden
    largest = np.abs(logits).max(1).mean()
    assert 0.85 < largest / bounds.row_radius(math.sqrt(hidden), keys, 0.5) < 1
    assert 0.8 < largest / bounds.logit_radius(math.sqrt(hidden), 1.0, keys, 0.5) < 1


@given(SEEDS)
def test_no_weight_is_above_one_half_where_the_spread_leaves_no_room(seed: int) -> None:
    logits, _ = random_row(seed)
    if len(logits) > 2:
        assert bounds.is_vacuous(len(logits), float(np.ptp(logits))) or softmax(logits).max() <= 0.5 * CLOSE


@pytest.mark.parametrize(("above", "vacuous"), [(-0.01, False), (0.01, True)])
def test_one_logit_apart_from_the_rest_takes_half_the_mass_at_the_logarithm_of_n(above: float, vacuous: bool) -> None:
    logits = np.zeros(1001)
    logits[0] = math.log(1000) + above
    assert bounds.is_vacuous(1001, logits[0]) == vacuous == (softmax(logits)[0] > 0.5)


# Top-k


@given(SEEDS)
def test_the_closed_forms_are_the_errors(seed: int) -> None:
    logits, kept = random_row(seed)
    p = softmax(logits)
    v = np.random.default_rng(seed + 1).normal(size=(len(p), 3))
    order = np.argsort(-p, kind="stable")
    cut = np.zeros_like(p)
    cut[order[:kept]] = p[order[:kept]]
    found, size = top_k(p, v, kept), np.linalg.norm(p @ v)
    assert found["lost mass"] == pytest.approx(1 - cut.sum(), abs=ATOL)
    for q, suffix in ((cut / cut.sum(), ""), (cut, ", unnormalised")):
        assert found[f"max entry{suffix}"] == pytest.approx(np.abs(q - p).max(), abs=ATOL)
        assert found[f"output{suffix}"] == pytest.approx(np.linalg.norm((q - p) @ v), abs=ATOL)
        assert found[f"relative output{suffix}"] * size == pytest.approx(found[f"output{suffix}"])
    assert np.abs(cut / cut.sum() - p).sum() == pytest.approx(2 * found["lost mass"], abs=ATOL)
    # Several windows at once, in any order, are each as alone.
    several = top_k_errors(p, v, [kept, 1, len(p), kept])[0]
    assert several[:, 3] == pytest.approx(list(found.values()), abs=ATOL)


@given(SEEDS)
def test_the_output_error_is_within_its_bound(seed: int) -> None:
    logits, kept = random_row(seed)
    p = softmax(logits)
    v = np.random.default_rng(seed + 1).normal(size=(len(p), 3))
    diameter = max(float(np.linalg.norm(a - b)) for a in v for b in v)
    assert top_k(p, v, kept)["output"] <= bounds.output_bound(lost(p, kept), diameter) + ATOL


@given(SEEDS)
def test_no_distribution_on_k_keys_is_below_the_floor(seed: int) -> None:
    logits, kept = random_row(seed)
    p = softmax(logits)
    rng = np.random.default_rng(seed + 2)
    floor = bounds.max_entry_floor(lost(p, kept), kept)
    best = np.argsort(-p)[:kept]
    other = rng.choice(len(p), size=kept, replace=False)
    shifted = p[best] + (1 - p[best].sum()) / kept  # the best that there is
    for support, mass in ((best, shifted), (best, p[best] / p[best].sum()), (other, rng.dirichlet(np.ones(kept)))):
        q = np.zeros_like(p)
        q[support] = mass
        assert floor <= np.abs(q - p).max() + ATOL


@given(st.integers(1, 20), st.integers(1, 60), st.floats(0.1, 6))
def test_equal_kept_entries_reach_the_floor(kept: int, dropped: int, spread: float) -> None:
    p = softmax(np.where(np.arange(kept + dropped) < kept, spread, 0.0))
    floor = bounds.max_entry_floor(lost(p, kept), kept)
    error = top_k(p, np.ones((len(p), 1)), kept)["max entry"]
    assert error == pytest.approx(max(floor, p[-1]))  # above the floor only by a dropped entry


def test_values_apart_reach_the_output_bound_and_no_bound_is_relative() -> None:
    p, v = np.array([0.6, 0.4]), np.array([[1.0], [-1.5]])
    error = top_k(p, v, 1)
    assert error["output"] == pytest.approx(bounds.output_bound(0.4, 2.5))
    assert error["relative output"] > 1e12  # the dense output is 0, up to rounding


@given(SEEDS)
def test_the_certificate_bounds_the_lost_mass(seed: int) -> None:
    logits, kept = random_row(seed)
    ordered = np.sort(logits)[::-1]
    assert bounds.certificate(ordered[:kept], len(logits) - kept) >= lost(softmax(logits), kept) - ATOL


def test_the_certificate_is_exact_when_all_dropped_logits_are_as_large_as_the_smallest_kept() -> None:
    logits = np.array([5.0, 3.0, 1.0, 1.0, 1.0, 1.0])
    assert bounds.certificate(logits[:3], 3) == pytest.approx(lost(softmax(logits), 3))
    assert bounds.certificate(logits, 0) == 0


def test_the_certificate_says_nothing_of_keys_that_are_not_the_largest() -> None:
    logits = np.array([1.0, 0.0, 50.0])
    assert bounds.certificate(logits[:2], 1) < 0.5
    assert softmax(logits)[2] > 0.99
