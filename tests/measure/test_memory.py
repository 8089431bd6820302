from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_sparse.bench import prefill_memory
from hf_sparse.bench.shapes import Shape
from hf_sparse.cli import main
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.measure import memory
from hf_sparse.tables import markdown_table
from tests.small import run_command

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")

SHAPE = (4, 2, 32)
CONFIG = SparseAttentionConfig(min_keys=1, sink_keys=1, recent_keys=8)


@linux
def test_all_scores_take_what_they_must() -> None:
    length = 2048
    scores = SHAPE[0] * length**2 * 4
    peak = memory.measure("eager", length, SHAPE, CONFIG, seed=0)
    assert scores < peak < 10 * scores
    sparse = memory.measure("window", length, SHAPE, CONFIG, seed=0)
    assert SHAPE[0] * length * SHAPE[2] * 4 < sparse < peak / 2  # the output at least


def test_exponents_are_those_of_the_rows() -> None:
    rows = [{"method": "eager", "length": n, "peak_mib": 3e-6 * n**2, "mean_keys": None} for n in (512, 1024, 2048)]
    rows += [{"method": "window", "length": n, "peak_mib": n**0.75, "mean_keys": 2 * n**0.5} for n in (512, 1024)]
    assert memory.summarise(rows)["exponents"] == {"eager": 2.0, "window": 0.75, "mean kept keys": 0.5}


def test_a_peak_of_nothing_has_no_exponent() -> None:
    rows = [{"method": "sdpa", "length": n, "peak_mib": float(n > 64), "mean_keys": 2.0 * n} for n in (64, 128)]
    assert memory.summarise(rows)["exponents"] == {"mean kept keys": 1.0}


@linux
def test_the_command_writes_what_it_found_of_calls_too_short_to_be_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "measure", lambda *_: 0.0)
    assert run_command("memory", "--lengths", "64,128", "--prefill", "none", "--output", str(tmp_path)) == 0
    assert "sdpa" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["exponents"]) == {"mean kept keys"}
    assert (tmp_path / "memory.png").is_file()


def test_an_engine_that_cannot_run_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_sparse.engines.why_not", lambda name: f"no {name} here")
    monkeypatch.setattr(memory, "evaluate", None)
    assert run_command("memory", "--engine", "triton", "--output", str(tmp_path / "out")) == 2
    assert "engine 'triton' cannot run here: no triton here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@linux
def test_the_command_leaves_out_what_would_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--lengths",
        "256,1024",
        "--prefill",
        "none",
        "--heads",
        "4",
        "--kv-heads",
        "2",
        "--head-dim",
        "32",
        "--limit",
        "0",
    ]
    with pytest.raises(SystemExit) as done:
        main(["memory", *options, "--output", str(tmp_path), "--json"])
    assert done.value.code == 0
    summary = json.loads(capsys.readouterr().out)
    assert {row["length"] for row in summary["results"]} == {256}
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    assert "masked-sdpa" in (tmp_path / "tables.md").read_text()


@linux
def test_a_prefill_takes_what_it_must() -> None:
    shape, length = Shape(2, 2, 16, 4096, 64, layers=2), 1024
    rows = {row["method"]: row for row in prefill_memory.evaluate([length], shape, CONFIG, repeats=1, seed=0)}
    assert list(rows) == list(prefill_memory.METHODS)
    # The MLP forms three tensors of this size, of which two are alive at a time.
    wide = length * shape.intermediate_size * 4 / 2**20
    for row in rows.values():
        assert 1.5 * wide < row["peak_mib"] < 10 * wide
        assert row["ratio"]["median"] == pytest.approx(row["peak_mib"] / rows["sdpa"]["peak_mib"], rel=0.01)
    assert 0 < rows["hf_sparse"]["density"] < rows["generate"]["density"] == 1
    assert "hf_sparse / sdpa" in markdown_table(*prefill_memory.prefill_table(list(rows.values())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--heads 9 --kv-heads 2", "heads that are a multiple of the kv-heads"),
        ("--heads 99999999999 --kv-heads 1", "shape takes at most 1,024 heads"),
        ("--layers 99999999999", "layers must be at most 1,024"),
        ("--dense-layers 7", "dense_layers names layers [7]"),
    ],
)
def test_what_no_model_can_be_is_refused(
    options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["memory", *options.split(), "--output", str(tmp_path / "out")])
    assert done.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
