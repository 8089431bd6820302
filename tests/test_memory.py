"""`hf-sparse memory`, and that its exponents are those of its records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_sparse import Engine, SparseAttentionConfig
from hf_sparse.bench import memory
from hf_sparse.bench.caches import IN_8_BITS, measure_caches
from hf_sparse.bench.memory import call_peak, measure_prefills, memory_tables, summarise
from hf_sparse.bench.shapes import Shape
from hf_sparse.errors import UserError
from hf_sparse.results import device_name, markdown_table
from tests.small import run_command

CARD = Path(__file__).parents[1] / "model_cards/memory"
CONFIG = SparseAttentionConfig(min_keys=1, sink_keys=1, recent_keys=8)
SMALL = ["--heads", "4", "--kv-heads", "2", "--head-dim", "32"]
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")


@linux
def test_all_scores_take_what_they_must() -> None:
    shape, length = Shape(4, 2, 32, 64, 64, layers=1), 2048
    scores, output = (shape.heads * length * width * 4 for width in (length, shape.head_dim))
    peak = call_peak("eager", length, shape, CONFIG, seed=0)
    assert scores < peak < 10 * scores
    assert output < call_peak("window", length, shape, CONFIG, seed=0) < peak / 2


@linux
def test_a_prefill_takes_what_it_must() -> None:
    shape, length = Shape(2, 2, 16, 4096, 64, layers=2), 1024
    records = {each["method"]: each for each in measure_prefills([length], shape, CONFIG, repeats=1, seed=0)}
    assert list(records) == list(memory.PREFILL_METHODS)
    # The MLP forms three tensors of this size, of which two are alive at a time.
    wide = length * shape.intermediate_size * 4 / 2**20
    for each in records.values():
        assert 1.5 * wide < each["peak_mib"] < 10 * wide
        assert each["ratio"]["median"] == pytest.approx(each["peak_mib"] / records["sdpa"]["peak_mib"], rel=0.01)
    assert 0 < records["hf_sparse"]["density"] < records["generate"]["density"] == 1
    [table] = memory_tables({"results": [], "exponents": {}, "prefill": list(records.values())})
    assert "hf_sparse / sdpa" in markdown_table(*table)


@linux
def test_caches_hold_what_they_count() -> None:
    """In 8 bits, keys and values with their scales, and keys in 4 bits with theirs: 172 bytes for a head of 64."""
    shape, length = Shape(2, 2, 64, 64, 64, layers=2), 16_384
    results = measure_caches([length], shape, replace(CONFIG, dense_layers=()), 0, memory._in_new_process)
    for each in results:
        item = 4 if each["dtype"] == "float32" else 2
        vectors = {"dynamic-cache": 128 * item, "hf_sparse": 128 * item + 36, IN_8_BITS: 172}[each["method"]]
        assert each["bytes_per_token"] == pytest.approx(vectors * shape.kv_heads, rel=0.15)
        assert each["held_mib"] == pytest.approx(each["bytes_per_token"] * length * shape.layers / 2**20, abs=0.1)
    table = markdown_table(*memory_tables({"results": [], "exponents": {}, "prefill": [], "cached": results})[0])
    assert "float32, n = 16,384 | bfloat16, n = 16,384" in table


def test_exponents_are_those_of_the_records() -> None:
    calls = [{"method": "eager", "length": n, "peak_mib": 3e-6 * n**2, "mean_keys": None} for n in (512, 1024, 2048)]
    calls += [{"method": "window", "length": n, "peak_mib": n**0.75, "mean_keys": 2 * n**0.5} for n in (512, 1024)]
    assert summarise(calls)["exponents"] == {"eager": 2.0, "window": 0.75, "mean kept keys": 0.5}


def test_a_peak_of_zero_has_no_exponent() -> None:
    calls = [{"method": "sdpa", "length": n, "peak_mib": float(n > 64), "mean_keys": 2.0 * n} for n in (64, 128)]
    assert summarise(calls)["exponents"] == {"mean kept keys": 1.0}


def test_the_committed_tables_and_exponents_follow_from_the_committed_records() -> None:
    summary = json.loads((CARD / "summary.json").read_text(encoding="utf-8"))
    assert summarise(summary["results"])["exponents"] == summary["exponents"]
    tables = "\n\n".join(markdown_table(*table) for table in memory_tables(summary))
    assert (CARD / "tables.md").read_text(encoding="utf-8") == tables + "\n"


@linux
def test_the_command_leaves_out_what_would_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--lengths", "256,1024", "--prefill", "none", "--cached", "none", "--limit", "0", *SMALL]
    assert run_command("memory", *options, "--output", str(tmp_path), "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert {each["length"] for each in summary["results"]} == {256}
    assert summary["device_name"] == device_name(torch.device("cpu"))  # as other commands name it
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    assert "masked-sdpa" in (tmp_path / "tables.md").read_text()


def test_calls_too_short_to_be_seen_are_drawn(tmp_path: Path) -> None:
    calls = [{"method": method, "length": 64, "peak_mib": 0.0, "mean_keys": None} for method in ("sdpa", "own")]
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 32, "dtype": "float32"}
    memory.plot_memory({**summarise(calls), "shape": shape}, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 10_000


@linux
def test_an_engine_that_cannot_run_is_refused_at_once() -> None:
    class Absent(Engine):
        name = "absent"

        def unavailable_reason(self) -> str:
            return "none of it here"

    config, shape = SparseAttentionConfig(engine=Absent()), Shape(4, 2, 32, 64, 64, layers=1)
    with pytest.raises(UserError, match="none of it here"):
        memory.evaluate([64], [], [], shape, config, most_bytes=1e9, repeats=1, seed=0)


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
    assert run_command("memory", *options.split(), "--output", str(tmp_path / "out")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
