from __future__ import annotations

import math
from pathlib import Path

import evaluate
import pytest

from hf_sparse.measure.metric import TokenPerplexity, token_perplexity


def test_every_token_weighs_the_same() -> None:
    result = TokenPerplexity(keep_in_memory=True).compute(nll=[30.0, 1.0], tokens=[10, 90])
    assert result == {"token_perplexity": pytest.approx(math.exp(31 / 100))}
    assert result["token_perplexity"] != pytest.approx((math.exp(3) + math.exp(1 / 90)) / 2)


def test_batches_add_up_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    metric = TokenPerplexity(cache_dir=str(tmp_path))
    metric.add_batch(nll=[30.0], tokens=[10])
    metric.add_batch(nll=[1.0, 2.0], tokens=[60, 30])
    assert isinstance(metric, evaluate.Metric)
    assert metric.name == "token_perplexity"
    assert metric.compute() == {"token_perplexity": pytest.approx(math.exp(33 / 100))}


def test_sums_are_exact_in_double_precision() -> None:
    result = TokenPerplexity(keep_in_memory=True).compute(nll=[1e16, 1.0, -1e16], tokens=[1, 1, 1])
    assert result["token_perplexity"] == pytest.approx(math.exp(1 / 3), rel=1e-15)


def test_no_folder_is_needed_in_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "file" / "metrics"))
    assert token_perplexity([30.0, 1.0], [10, 90]) == pytest.approx(math.exp(31 / 100))
