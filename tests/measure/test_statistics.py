from __future__ import annotations

import numpy as np
import pytest

from hf_sparse.measure.statistics import bootstrap_means, percentile_interval


def test_draws_centre_on_the_mean_with_the_spread_of_a_two_stage_sample() -> None:
    # Blocks of one document are equal, so only the choice of documents matters: sd / sqrt(documents).
    means = np.array([1.0, 2.0, 3.0, 6.0])
    nll = np.repeat(means[:, None], 5, axis=1)[None] * 8
    draws = bootstrap_means(nll, np.full(5, 8.0), seed=0)[:, 0]
    assert draws.mean() == pytest.approx(3.0, abs=0.05)
    assert draws.std() == pytest.approx(means.std() / 2, rel=0.05)


def test_blocks_are_resampled_within_documents() -> None:
    blocks = np.array([1.0, 2.0, 3.0, 6.0])
    draws = bootstrap_means(blocks[None, None] * 8, np.full(4, 8.0), seed=0)[:, 0]
    assert draws.std() == pytest.approx(blocks.std() / 2, rel=0.05)
    assert set(np.round(draws * 4, 6)) <= set(np.arange(4, 25, dtype=float))


def test_series_are_resampled_together() -> None:
    rng = np.random.default_rng(0)
    dense = rng.gamma(2.0, 40.0, size=(6, 16))
    draws = bootstrap_means(np.stack([dense, dense + 3.2]), np.full(16, 32.0), seed=1)
    assert draws[:, 0].std() > 0.05
    np.testing.assert_allclose(draws[:, 1] - draws[:, 0], 0.1, rtol=1e-9)


def test_a_short_last_block_weighs_by_its_tokens() -> None:
    draws = bootstrap_means(np.array([[[32.0, 8.0]]]), np.array([32.0, 8.0]), seed=0)
    np.testing.assert_allclose(draws, 1.0)
    draws = bootstrap_means(np.array([[[32.0, 0.0]]]), np.array([32.0, 8.0]), seed=0)
    assert set(np.round(np.unique(draws), 6)) == {0.0, 0.8, 1.0}


def test_the_seed_decides_and_the_number_of_samples_is_met() -> None:
    nll = np.random.default_rng(0).normal(size=(2, 3, 4))
    first, again, other = (bootstrap_means(nll, np.ones(4), seed=seed, samples=1500) for seed in (7, 7, 8))
    assert first.shape == (1500, 2)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_interval_of_a_ratio_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    truth, tokens, hits = 0.02, np.full(16, 32.0), 0
    for trial in range(200):
        of_documents = rng.normal(truth, 0.01, size=(12, 1))
        difference = (of_documents + rng.normal(0, 0.03, size=(12, 16))) * 32
        dense = rng.gamma(2.0, 40.0, size=(12, 16))
        draws = bootstrap_means(np.stack([dense, dense + difference]), tokens, seed=trial, samples=1000)
        low, high = percentile_interval(draws[:, 1] - draws[:, 0])
        hits += low <= truth <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_percentile_interval_cuts_both_tails() -> None:
    assert percentile_interval(np.arange(1001, dtype=float)) == pytest.approx((25.0, 975.0))
    assert percentile_interval(np.arange(1001, dtype=float), confidence=0.5) == pytest.approx((250.0, 750.0))
