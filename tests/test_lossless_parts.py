"""The parts of lossless generation: how long drafts are, dense attention of few queries, and the benchmark."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_sparse.engines import dense
from hf_sparse.lossless.pace import MOST, Pace
from tests import calls, small

TOKENS = 256


def seconds(
    pace: Pace, draft: float, query: float, acceptance: float, seed: int = 0, once: float = 0.0, noise: float = 0.0
) -> float:
    """Time of `TOKENS` tokens whose plain decoding takes a second each, and the first draft `once` more."""
    chance = random.Random(seed)
    tokens, total = 0, 0.0
    while tokens < TOKENS:
        gamma = pace.choose(TOKENS - tokens - 1)
        assert 0 <= gamma < TOKENS - tokens
        accepted = 0
        while accepted < gamma and chance.random() < acceptance:
            accepted += 1
        spread = [1 + noise * chance.random() for _ in range(2)]
        times = (gamma * draft * spread[0] + (once if gamma else 0.0), (1 + gamma * query) * spread[1])
        once = 0.0 if gamma else once
        pace.learn(gamma, accepted, accepted < gamma, *times)
        tokens += accepted + 1
        total += sum(times)
    assert tokens == TOKENS
    return total


@pytest.mark.parametrize("draft", [1.0, 1.3])
@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.9, 1.0])
def test_drafts_that_do_not_pay_cost_less_than_5_percent(draft: float, acceptance: float) -> None:
    assert seconds(Pace(), draft, 0.1, acceptance) <= 1.05 * TOKENS


@pytest.mark.parametrize(("draft", "query"), [(0.1, 0.02), (0.25, 0.1), (0.5, 0.05)])
@pytest.mark.parametrize("acceptance", [0.8, 0.95, 0.99])
def test_drafts_have_nearly_the_best_length(draft: float, query: float, acceptance: float) -> None:
    def mean(length: int | None) -> float:
        return sum(seconds(Pace(length), draft, query, acceptance, seed, 1.0, 0.2) for seed in range(20)) / 20

    assert mean(None) <= 1.15 * min(mean(length) for length in range(MOST + 1))


@given(st.integers(0, 20), st.integers(0, 40))
def test_a_fixed_length_is_kept_where_there_is_room(length: int, left: int) -> None:
    pace = Pace(length)
    assert pace.choose(left) == min(length, left)
    pace.learn(length, 0, length > 0, 1.0, 1.0)
    assert pace.choose(left) == min(length, left)


@pytest.mark.parametrize("queries", [1, 2, 3, 5, 9, 32])
@pytest.mark.parametrize("kind", ["plain", "long", "softcap", "sinks", "padded", "window", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kernels", [True, False])
def test_few_queries_attend_to_all_they_see(
    queries: int, kind: str, dtype: torch.dtype, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last queries of a text, the first sequence of which is padded, or sees a window, or has unwritten keys.

    The kernels read many keys of a long text where they lie, if they lie in a row.
    """
    kv_len = 700 if kind == "long" else 173
    intervals = calls.causal_intervals(
        queries,
        kv_len,
        window=40 if kind == "window" else None,
        left=(171, 0) if kind == "padded" else (0, 0),
        spare=20 if kind == "static" else 0,
    )
    call = calls.inputs(
        intervals,
        kv_len=kv_len,
        heads=6,
        kv_heads=2,
        dim=48 if kind == "long" else 16,
        softcap=3.0 if kind == "softcap" else None,
        sinks=kind == "sinks",
        dtype=dtype,
    )
    if kind != "long":
        call = replace(call, key=calls.turned(call.key))
    if not kernels:
        monkeypatch.setattr(dense.cpu, "unsupported_reason", lambda *states: "they are switched off")
    out = dense.attend(call)
    assert out.dtype == dtype
    expected = calls.attend(call, calls.visible_mask(call))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_the_bench_measures_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.save_model(tmp_path / "tiny-llama")
    [text] = small.save_texts(tmp_path / "texts", count=1, tokens=400).iterdir()
    none: list[str] = [part for task in ("decode", "prefill") for part in (f"--{task}", "none")]
    options = [*none, "--cached", "100", "--generate", "120", "--new-tokens", "24", "--repeats", "1", "--seconds", "0"]
    output = ["--lossless", "--text", str(text), "--output", str(tmp_path / "out")]
    assert small.run_command("bench", str(tmp_path / "tiny-llama"), *options, *output) == 0
    printed = capsys.readouterr().out
    for part in ("dynamic-cache / lossless, medians", "lossless: accepted of drafted", "24 of 24"):
        assert part in printed
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    found = {(row["kind"], row["method"]): row for row in summary["results"]}
    for kind in ("cached", "generate"):
        assert found[kind, "lossless"]["same_tokens"] == found[kind, "in-place-cache"]["same_tokens"] == 24
        assert found[kind, "lossless"]["drafts"]["plain"] + found[kind, "lossless"]["drafts"]["checked"] == 23
    assert "drafts" not in found["cached", "hf_sparse"]
