"""Random inputs of every kind come to what they must: `scripts/fuzz.py` tries many more."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_sparse.engines import ENGINES
from hf_sparse.kernels import cpu
from tests.fuzz_kinds import KINDS, outcome
from tests.installed import ROOT

needs_kernels = pytest.mark.skipif(cpu.unsupported_reason() is not None, reason=str(cpu.unsupported_reason()))
COUNTS = json.loads((ROOT / "model_cards/faults/fuzz.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, suppress_health_check=list(HealthCheck), deadline=None, derandomize=True)
@given(draw=st.randoms(use_true_random=False))
def test_an_input_is_held_or_refused(kind: str, draw: Random) -> None:
    assert outcome(kind, draw)[0] != "wrong"


def outcomes(kind: str, number: int) -> list[str]:
    return [outcome(kind, Random(seed))[0] for seed in range(number)]


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_every_kind_are_held_and_refused(kind: str) -> None:
    counts = COUNTS["kinds"][kind]
    assert counts["held"] > counts["tried"] / 10
    assert counts["refused"] > 0
    assert counts["wrong"] == 0
    assert "held" in outcomes(kind, 30)


@needs_kernels
@pytest.mark.parametrize("kind", ["config", "attention", "masks", "caches"])
def test_an_engine_that_is_a_little_off_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ENGINES["cpu"]
    attend = engine.attend

    def off(*arguments: Any) -> Tensor:
        out = attend(*arguments)
        out[..., -1, -1] += 0.2  # one number of the last query of each head
        return out

    monkeypatch.setattr(engine, "attend", off)
    assert "wrong" in outcomes(kind, 80)


def test_an_error_of_another_kind_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise KeyError("alpha")

    monkeypatch.setattr("tests.fuzz_kinds.SparseAttentionConfig", fail)
    assert set(outcomes("config", 5)) == {"wrong"}


def script() -> Any:
    """The module `scripts/fuzz.py`."""
    spec = importlib.util.spec_from_file_location("fuzz_script", ROOT / "scripts/fuzz.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_run_survives_cases_that_crash_or_hang_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fuzz = script()
    monkeypatch.setitem(KINDS, "config", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setitem(KINDS, "policy", lambda _: time.sleep(60))
    monkeypatch.setattr(fuzz, "LIMIT", 2)
    path, earlier = tmp_path / "cases-0.jsonl", {"case": 5, "kind": "config", "outcome": "held", "why": "earlier"}
    path.write_text(json.dumps(earlier) + "\n")
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--cases", "8", "--output", str(tmp_path)])
    assert fuzz.main() == 1
    found = json.loads(capsys.readouterr().out)
    assert found["cases"] == 8
    why = {x["case"]: x["why"] for x in found["wrong"]}
    assert why == {0: "the process ended with exit code -9", 1: "no answer within 2 s", 6: "no answer within 2 s"}
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(x["case"] for x in records) == list(range(8))
    assert records[0] == earlier
