from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import hf_sparse
from hf_sparse import SparseAttentionConfig
from hf_sparse.attention import LayerState
from hf_sparse.bench import dense, layer
from hf_sparse.bench.card import card, installed
from hf_sparse.bench.generation import Generation
from hf_sparse.bench.inputs import capture, gaussian
from hf_sparse.bench.layer import SparseStep, time_decode, time_prefill
from hf_sparse.bench.plot import plot_bench
from hf_sparse.bench.run import evaluate, with_random_weights
from hf_sparse.bench.shapes import SHAPES, Shape, parse_shape
from hf_sparse.bench.summary import break_even, exponent, median_interval, summarise
from hf_sparse.bench.tables import bench_tables
from hf_sparse.bench.tasks import COMPILED, TASKS, BenchSettings
from hf_sparse.bench.timing import Rounds, available_bytes, timed, with_peak
from hf_sparse.call import AttentionCall
from hf_sparse.errors import UserError
from hf_sparse.kernels.cpu import build
from hf_sparse.results import ResultFile, device_name, markdown_table
from hf_sparse.selectors.grouped import Grouped
from hf_sparse.visibility import interval_to_mask
from tests import small, tiny
from tests.inductor import compiler_present
from tests.small import run_command

COMMITTED = sorted(path.parent for path in (Path(__file__).parents[1] / "model_cards/bench").rglob("rows.jsonl"))
CPU = torch.device("cpu")
SHAPE = Shape(4, 2, 16, 64, 100, layers=2)
SMALL = ["--shape", "4/2/16", "--new-tokens", "3", "--repeats", "2", "--seconds", "0", "--device", "cpu"]
SMALL += ["--min-keys", "8", "--alpha", "2", "--recent-keys", "8", "--dense-below", "16"]
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")


def _run(*arguments: str) -> int:
    return run_command("bench", *arguments)


def test_methods_take_turns_and_none_is_always_first() -> None:
    calls: list[str] = []

    def sampler(name: str) -> Any:
        def sample() -> dict[str, float]:
            calls.append(name)
            return {"seconds": float(len(calls))}

        return sample

    found = Rounds(repeats=4, seconds=0.0).alternate({name: sampler(name) for name in "abc"})
    assert calls == list("abc" + "bca" + "cab" + "abc")
    assert found["b"]["seconds"] == [2.0, 4.0, 9.0, 11.0]


@linux
def test_peak_memory_is_that_of_the_call_alone() -> None:
    size = 1 << 26
    ones = torch.ones(size, dtype=torch.uint8)
    _, none = with_peak(lambda: int(ones[0]), CPU)
    kept, once = with_peak(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    _, freed = with_peak(lambda: int((kept + ones)[0]), CPU)
    assert none is not None
    assert once is not None
    assert freed is not None
    assert none < size / 8 < size * 0.9 < once < size * 1.2
    assert size * 0.9 < freed < size * 1.3


def test_dense_methods_are_the_same_attention() -> None:
    inputs = gaussian(SHAPE, torch.float32, CPU, seed=0).prefill(200)
    right = dense.sdpa(inputs)
    mask = interval_to_mask(inputs.intervals, 200)
    key, value = (x.repeat_interleave(2, dim=1) for x in (inputs.key, inputs.value))
    scores = (inputs.query @ key.transpose(-1, -2) * inputs.scaling).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(scores.softmax(-1) @ value, right)
    torch.testing.assert_close(dense.MaskedSdpa()(inputs), right)
    step = gaussian(SHAPE, torch.float32, CPU, seed=0).decode(200, index=3)
    torch.testing.assert_close(dense.cached_step(step), dense.sdpa(step))


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
def test_causal_blocks_are_causal(length: int) -> None:
    blocks = dense.causal_blocks(length, CPU)
    seen = torch.arange(-(-length // 128))
    right = seen[:, None] >= seen
    torch.testing.assert_close(blocks.to_dense()[0, 0].bool(), right)
    assert blocks.shape == (1, 1, length, length)


def test_flex_under_causal_blocks_is_causal_attention() -> None:
    inputs = gaussian(SHAPE, torch.float32, CPU, seed=0).prefill(200)
    # Not compiled, which takes longer than a test may.
    out = flex_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        block_mask=dense.causal_blocks(200, CPU),
        scale=inputs.scaling,
        enable_gqa=True,
    )
    torch.testing.assert_close(out, dense.sdpa(inputs))


def test_a_sparse_step_is_taken_back_before_the_next() -> None:
    config = SparseAttentionConfig(min_keys=8, alpha=2.0, recent_keys=8)
    found = time_decode(gaussian(SHAPE, torch.float32, CPU, 0), 300, config, Rounds(4, 0.0))
    assert list(found) == ["sdpa", "packed-sdpa", "dense-layer", "dynamic-cache", "hf_sparse"]
    assert found["packed-sdpa"]["output_error"]["worst"] < 1e-5
    assert found["dense-layer"]["output_error"]["worst"] < 1e-5
    assert found["hf_sparse"]["density"] == math.ceil(2 * 300**0.5) / 300
    assert found["dynamic-cache"]["output_error"]["worst"] < 1e-5
    assert 0 < found["hf_sparse"]["output_error"]["mean"] < 1
    assert all(len(each["samples"]["seconds"]) == 4 for each in found.values())


def test_sparse_steps_round_only_new_keys() -> None:
    seen = []

    class Watching(Grouped):
        def select(self, call: AttentionCall, *args: Any) -> Any:
            seen.append(call.quantised)
            return super().select(call, *args)

    config = SparseAttentionConfig(selector=Watching(name="watching"), dense_below=0)
    step = SparseStep(gaussian(SHAPE, torch.float32, CPU, 0).decode(300, 0), LayerState(0, config))
    step.attend()
    step.undo().attend()
    assert seen[0] is seen[1] is not None


def test_a_full_budget_has_no_error() -> None:
    config = SparseAttentionConfig(law="fraction", fraction=1.0)
    inputs, once = gaussian(SHAPE, torch.float32, CPU, 0), Rounds(1, 0.0)
    for found in (
        time_decode(inputs, 300, config, once),
        time_prefill(inputs, 300, config, once, frozenset({"flex"})),
    ):
        assert found["hf_sparse"]["density"] == 1.0
        assert found["hf_sparse"]["output_error"]["worst"] < 1e-5


def test_what_cannot_run_or_fit_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(dense, "flex", broken)
    monkeypatch.setattr("hf_sparse.bench.layer.available_bytes", lambda _: 1000.0)
    inputs = gaussian(SHAPE, torch.float32, CPU, 0)
    found = time_prefill(inputs, 64, SparseAttentionConfig(), Rounds(1, 0.0), frozenset())
    assert found["flex"] == {"skipped": "RuntimeError: no compiler here"}
    assert "not free" in found["masked-sdpa"]["skipped"]
    assert "samples" in found["hf_sparse"]


@pytest.fixture
def kernels_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA's kernels are asked for as on CUDA: a CPU has one of them."""
    names = dense.backends(torch.device("cuda"))
    monkeypatch.setattr(dense, "backends", lambda _: names)


@pytest.mark.usefixtures("kernels_of_gpus")
@pytest.mark.filterwarnings("ignore")
def test_kernels_of_sdpa_that_do_not_run_are_named() -> None:
    """In one layer, and in a model: the others are measured."""
    inputs = gaussian(SHAPE, torch.float32, CPU, 0)
    config, once = SparseAttentionConfig(), Rounds(1, 0.0)
    generation = Generation(tiny.model("llama"), replace(config, dense_layers=()), 2, real=False)
    for found in (
        time_decode(inputs, 300, config, once),
        time_prefill(inputs, 64, config, once, frozenset({"flex"})),
        generation.from_prompt(torch.arange(40) % 7, once),
    ):
        for name in ("cudnn", "efficient"):
            assert found[name].keys() == {"skipped"}
            assert "RuntimeError" in found[name]["skipped"]
        assert all("samples" in found[name] for name in ("flash", "hf_sparse"))


def test_what_is_compiled_is_timed_apart_as_often_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    attend = dense.sdpa

    def called(name: str) -> Callable[..., Tensor]:
        return lambda inputs, **_: order.append(name) or attend(inputs)

    for name in ("sdpa", "flex"):
        monkeypatch.setattr(dense, name, called(name))
    inputs = gaussian(SHAPE, torch.float32, CPU, 0)
    found = time_prefill(inputs, 64, SparseAttentionConfig(), Rounds(3, 0.0), frozenset({"masked-sdpa"}))
    assert [len(each["samples"]["seconds"]) for each in found.values()] == [3, 3, 3]
    assert order[-6:] == ["sdpa"] * 3 + ["flex"] * 3


def test_no_method_reads_keys_that_another_has_just_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be in the CPU's cache, where those of a model's next layer are not."""
    read: list[int] = []

    def noted(inputs: AttentionCall) -> None:
        read.append(inputs.key.data_ptr())

    step = SparseStep.attend
    for place, name in ((dense, "sdpa"), (layer, "attend_densely"), (dense, "cached_step")):
        whole = getattr(place, name)
        monkeypatch.setattr(place, name, lambda inputs, whole=whole, **_: noted(inputs) or whole(inputs))
    monkeypatch.setattr(SparseStep, "attend", lambda self: noted(self.inputs) or step(self))
    time_decode(gaussian(SHAPE, torch.float32, CPU, 0), 300, SparseAttentionConfig(), Rounds(20, 0.0))
    timed = read[-80:]
    assert len(set(timed)) > 4
    assert all(one != other for one, other in pairwise(timed))


def test_times_of_host_and_gpu_have_tables_of_their_own() -> None:
    records = _records({1024: 2.0})
    for found in records[0]["methods"].values():
        if "samples" in found:
            found["samples"]["host"] = [4 * x for x in found["samples"]["seconds"]]
        found |= {"warm_up": 1.0, "peak_mib": 1.0, "output_error": {"mean": 0.0, "worst": 0.0}}
    tables = {header[0]: {row[0]: row[1] for row in rows} for header, rows in bench_tables(summarise(records))}
    gpu, host = (tables[f"decode, one layer, n cached keys{more}"] for more in ("", ": by the host's clock"))
    assert (gpu["sdpa"], host["sdpa"]) == ("2.05e+03 s", "8.19e+03 s")
    assert "ideal: 1 / density" in gpu
    assert host.keys() == {"sdpa", "hf_sparse", "sdpa / hf_sparse"}


def test_records_of_a_gpu_say_what_decides_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    found = card(torch.device("cuda"))
    assert found is not None
    assert (found["capability"], found["cache_bytes"]) == ([9, 0], 50 << 20)
    assert {"driver", "cuda", "hip", "cudnn", "triton"} <= found.keys()
    assert card(CPU) is None
    assert installed("torch") == version("torch")
    assert installed("no-such-package") is None


def test_a_gpu_is_timed_in_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another one is current, whose stream would be empty."""
    recorded: list[object] = []

    class Event:
        def __init__(self, **_: object) -> None: ...

        def record(self, stream: object = "cuda:0") -> None:
            recorded.append(stream)

        def elapsed_time(self, _: object) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_stream", str)
    found = timed(lambda: None, lambda _: recorded.append("run"), torch.device("cuda:1"))
    assert recorded == ["cuda:1", "run", "cuda:1"]
    assert found["seconds"] == 0.002


def test_memory_that_pytorch_keeps_to_use_again_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("memory_reserved", 60), ("memory_allocated", 10), ("mem_get_info", (20, 80))):
        monkeypatch.setattr(torch.cuda, name, lambda _, size=size: size)
    assert available_bytes(torch.device("cuda:1")) == 70


def test_real_inputs_are_repeated_and_end_with_the_texts_end() -> None:
    model = tiny.model("llama")
    inputs = capture(model, torch.tensor(small.word_ids(50)), seed=0)
    assert inputs.captured is not None
    long = inputs.prefill(120)
    for name in ("query", "key", "value"):
        states, once = getattr(long, name), getattr(inputs.captured, name)
        torch.testing.assert_close(states[:, :, -50:], once)
        torch.testing.assert_close(states[:, :, :20], once[:, :, -20:])
    step = inputs.decode(120, index=0)
    torch.testing.assert_close(step.query, long.query[:, :, -1:])
    assert step.intervals.tolist() == [[[[0, 120]]]]
    assert not torch.equal(inputs.decode(120, index=1).query, step.query)
    with pytest.raises(UserError, match="caps its scores"):
        capture(tiny.model("gemma2"), torch.tensor(small.word_ids(50)), seed=0)


def _records(ratios: dict[int, float], task: str = "decode") -> list[dict[str, Any]]:
    """Sparse attention takes n seconds at length n, dense `ratio` times that."""
    names = ("model", "dtype", "device", "device_name", "threads", "seed", "versions", "commit")
    return [
        {
            **dict.fromkeys(names, "x"),
            "kind": task,
            "length": n,
            "methods": {
                "sdpa": {"samples": {"seconds": [n * ratio, n * ratio, 3.0 * n * ratio]}},
                "hf_sparse": {"samples": {"seconds": [n, n, 3.0 * n]}, "density": 0.5},
                "flash": {"skipped": "not here"},
            },
        }
        for n, ratio in ratios.items()
    ]


def test_ratios_are_of_the_same_round() -> None:
    summary = summarise(_records({1024: 2.0}))
    [dense_row, ours] = summary["results"]
    assert dense_row["median"] == 2048.0
    assert dense_row["ratio"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert ours["ratio"] is None
    assert (ours["low"], ours["high"], ours["repeats"]) == (1024, 3072, 3)
    assert summary["skipped"] == [{"kind": "decode", "length": 1024, "method": "flash", "reason": "not here"}]


@pytest.mark.parametrize(
    ("ratios", "length"),
    [
        ({1024: 0.5, 4096: 2.0}, 2048),
        ({1024: 0.25, 4096: 2.0, 8192: 4.0}, round(1024 * 4 ** (2 / 3)) + 1),
        ({1024: 2.0, 2048: 0.5, 8192: 2.0}, 4096),
        ({1024: 1.0, 4096: 2.0}, 1024),
        ({1024: 2.0, 4096: 0.9}, None),
    ],
)
def test_break_even_is_where_the_ratio_crosses_one_for_good(ratios: dict[int, float], length: int | None) -> None:
    results = summarise(_records(ratios))["results"]
    found = break_even(results, "sdpa")
    assert found["length"] == (None if length is None else pytest.approx(length, abs=1))
    assert found["measured"] == [min(ratios), max(ratios)]


@pytest.mark.parametrize(
    ("decode", "prefill", "dense_below"),
    [
        ({1024: 0.5, 4096: 2.0}, {512: 2.0, 1024: 3.0}, 2048),
        ({1024: 2.0, 4096: 3.0}, {512: 0.5, 8192: 2.0}, 2048),
        ({1024: 2.0, 4096: 2.0}, {512: 0.25, 8192: 0.5}, 8192),
        ({1024: 0.5, 4096: 0.9}, {512: 2.0, 1024: 3.0}, 4096),
    ],
)
def test_dense_below_is_where_neither_decode_nor_prefill_is_slower(
    decode: dict[int, float], prefill: dict[int, float], dense_below: int
) -> None:
    records = _records(decode), _records(prefill, "prefill")
    assert summarise([*records[0], *records[1]])["dense_below"] == dense_below
    assert all("dense_below" not in summarise(each) for each in records)


def test_exponents_are_those_of_long_texts() -> None:
    def series(lengths: list[int]) -> list[dict[str, Any]]:
        place = {"kind": "decode", "method": "sdpa", "quantity": "seconds"}
        times = {n: 1e-6 * (n**0.75 if n >= 16384 else n) for n in lengths}
        return [{**place, "length": n, "median": t, "low": t / 2, "high": t * 2} for n, t in times.items()]

    fit = exponent(series([1024, 16384, 65536]))
    assert (fit["exponent"], fit["lengths"]) == (0.75, [16384, 65536])
    assert fit["seconds_at_1"] == pytest.approx(1e-6)
    # Both ends may be off by log 2, independently, over a distance of log 4.
    assert fit["high"] - 0.75 == pytest.approx(0.75 - fit["low"], abs=2e-3) == pytest.approx(0.5**0.5, abs=1e-3)
    assert exponent(series([1024, 2048]))["exponent"] == 1.0
    assert exponent(series([1024]))["exponent"] is exponent(series([1024]))["low"] is None


def test_the_interval_of_a_median_holds_95_percent() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    # Binomial(9, 1/2): both extremes miss with 0.4 %, the next pair with 3.9 %, the one after that with 18 %.
    assert median_interval([float(i) for i in range(9)]) == (1.0, 7.0)


def test_nothing_is_measured_twice(tmp_path: Path) -> None:
    def records(*decode: int, alpha: float = 2.0) -> list[dict[str, Any]]:
        lengths = dict.fromkeys(TASKS, ()) | {"decode": decode}
        config = SparseAttentionConfig(alpha=alpha, min_keys=8, recent_keys=8)
        settings = BenchSettings(lengths, config, 2, frozenset(), Rounds(1, 0.0), seed=0)
        return evaluate(with_random_weights(settings, "tiny", SHAPE, torch.float32, CPU), ResultFile(tmp_path / "rows"))

    [first] = records(64)
    assert records(64, 80)[0] == first
    [other] = records(64, alpha=3.0)
    assert other["key"] != first["key"]
    assert [record["length"] for record in ResultFile(tmp_path / "rows").records().values()] == [64, 80, 64]


def test_shapes_have_names_or_numbers() -> None:
    assert parse_shape("llama-8b") is SHAPES["llama-8b"]
    assert parse_shape("6/2/32").heads == 6
    part = parse_shape("smollm2-135m").part(2)
    assert (part.layers, part.vocab_size, part.heads) == (2, 49152 // 15, 9)
    for text in ("llama", "6/4/32", "6/2/33", "6/2", "6/0/32", "-6/2/32"):
        with pytest.raises(UserError, match="shape"):
            parse_shape(text)


def test_the_command_measures_everything_writes_it_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = ["--decode", "64,256", "--prefill", "64,128", "--cached", "96", "--generate", "64,96", "--padded", "64"]
    options = [*SMALL, *lengths, "--leave-out", "flex", "--output", str(tmp_path)]
    assert _run(*options) == 0
    printed = capsys.readouterr().out
    for part in (
        "decode, one layer",
        "prefill, one layer",
        "prompt of n: time to first token",
        "padded prompt",
        "sdpa / hf_sparse",
        "break-even",
    ):
        assert part in printed
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    kinds = ["decode", "decode", "prefill", "prefill", "cached", "generate", "generate", "padded"]
    assert [row["kind"] for row in rows] == kinds
    assert all(row["device_name"] and row["threads"] and row["versions"]["torch"] for row in rows)
    assert list(rows[-1]["methods"]) == ["dynamic-cache", "static-cache", "hf_sparse"]
    ours = rows[-1]["methods"]["hf_sparse"]
    assert len(ours["tokens"]) == 3
    assert 0 < ours["density"] < 1
    assert rows[-1]["config"]["dense_layers"] == []
    assert set(ours["samples"]) == {"first_token", "token"}
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert f"hf_sparse.patch(model, dense_below={summary['dense_below']})" in printed
    assert summary["about"]["cpu_capability"]["torch"] == torch.backends.cpu.get_cpu_capability()
    assert summary["about"]["cpu_capability"]["kernels"] == build.description()

    assert _run(*options, "--json") == 0
    assert json.loads(capsys.readouterr().out) == summary
    assert (tmp_path / "rows.jsonl").read_text().splitlines() == lines


@pytest.mark.slow
@pytest.mark.skipif(not compiler_present(), reason="no C++ compiler, or no headers of Python")
def test_compiled_models_take_turns_with_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is compiled while tokens are timed, or the command fails."""
    lengths = ["--decode", "none", "--prefill", "none", "--generate", "64", "--cached", "96,200"]
    options = [*SMALL, *lengths, "--layers", "1"]
    assert _run(*options, "--compiled", "--output", str(tmp_path)) == 0
    rows = {row["length"]: row["methods"] for row in ResultFile(tmp_path / "rows.jsonl").records().values()}
    assert COMPILED.keys().isdisjoint(rows.pop(64))
    for methods in rows.values():
        assert list(methods) == ["dynamic-cache", "static-cache", "hf_sparse", *COMPILED]
        for name, plain in COMPILED.items():
            assert len(methods[name]["samples"]["token"]) == 2
            assert methods[name]["tokens"] == methods[plain]["tokens"]
            assert methods[name]["density"] == methods[plain]["density"]
    printed = capsys.readouterr().out
    for line in ("hf_sparse, compiled / hf_sparse ", "dynamic-cache, compiled / hf_sparse, compiled, medians"):
        assert line in printed


def test_a_model_that_cannot_be_compiled_whole_is_named() -> None:
    model = tiny.model("llama")
    model.model.norm.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    generation = Generation(model, SparseAttentionConfig(), 2, real=False, compiled=True)
    found = generation.from_cache(torch.arange(40) % 7, Rounds(1, 0.0))
    for name, plain in COMPILED.items():
        assert found[name].keys() == {"skipped"}
        assert "samples" in found[plain]


def test_a_real_model_is_measured_on_its_own_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.save_model(tmp_path / "tiny-llama")
    [text] = small.save_texts(tmp_path / "texts", count=1, tokens=400).iterdir()
    lengths = ["--decode", "300", "--prefill", "none", "--cached", "100", "--generate", "120"]
    options = [*SMALL[2:], *lengths, "--text", str(text), "--output", str(tmp_path), "--alpha", "1000", "--json"]
    assert _run(str(tmp_path / "tiny-llama"), *options) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["about"]["model"]["name"] == "tiny-llama"
    assert "layer 1 on 256 tokens" in summary["conditions"]["decode"]["inputs"]
    # All keys are kept: whatever the way, a greedy model writes the same.
    written = [row for row in summary["results"] if row["kind"] in ("cached", "generate")]
    assert {row["method"] for row in written} == {"dynamic-cache", "static-cache", "hf_sparse"}
    assert {row["same_tokens"] for row in written} == {3}


def test_a_policy_decides_what_each_layer_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = small.save_model(tmp_path / "tiny-llama")
    heads = hf_sparse.inspect(tiny.model("llama")).layers[1].heads
    laws = {0: ((9.0, 0.5),) * heads, 1: ((2.0, 0.5),) * heads}
    policy = tmp_path / "policy" / "sparse_config.json"
    policy.parent.mkdir()
    [text] = small.save_texts(tmp_path / "texts", count=1, tokens=400).iterdir()
    options = [str(folder), *SMALL[2:8], "--cached", "none", "--generate", "none", "--prefill", "none", "--json"]
    options += ["--decode", "100", "--policy", str(policy), "--text", str(text), "--output", str(tmp_path / "out")]
    policy.write_text(json.dumps(SparseAttentionConfig(min_keys=4, recent_keys=8, per_head=laws).to_dict()))
    assert _run(*options) == 0
    [ours] = [row for row in json.loads(capsys.readouterr().out)["results"] if row["method"] == "hf_sparse"]
    assert ours["density"] == 0.2  # 2 * 100 ** 0.5 keys of the captured layer 1
    policy.write_text(json.dumps(SparseAttentionConfig(per_head={7: laws[1]}).to_dict()))
    assert _run(*options) == 2
    assert "7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--decode some", "--decode takes whole numbers"),
        ("--decode 64,32", "lengths must rise"),
        ("--decode none --prefill none --cached none --generate none", "nothing is left to measure"),
        ("--shape 9/2/64", "shape needs heads"),
        ("--leave-out sdpa", "leave-out takes some of"),
        ("--selector best", "selector must be one of"),
        ("--alpha 0", "alpha must be"),
        ("--dtype int4", "dtype must be one of"),
        ("--device warp", "device 'warp'"),
        ("--new-tokens 1", "--new-tokens"),
        ("--cached none --compiled", "--compiled needs lengths of --cached"),
        ("--policy somewhere", "--policy needs a MODEL"),
        ("--text somewhere", "--text needs a MODEL"),
        ("--revision main", "--revision needs a MODEL"),
        ("somewhere --shape 4/2/16", "--shape makes a model: leave it out with somewhere"),
        ("somewhere --layers 2", "--layers makes a model"),
        ("--shape 99999999999/1/16", "shape takes at most 1,024 heads"),
        ("--shape 4/2/16 --layers 99999999999", "layers must be at most 1,024; got 99999999999"),
        ("--shape 4/2/16 --cached 300 --dense-layers 7", "dense_layers names layers [7]"),
        ("--shape 4/2/16 --generate none --cached none --dense-layers 7", "dense_layers names layers [7]"),
        ("--decode 99999999999", "--decode takes whole numbers"),
        ("missing.gguf", "no such file"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run(*arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = ["--shape", "1024/4/32", "--layers", "64", "--device", "cpu", "--output", str(tmp_path / "out")]
    assert _run(*large, "--cached", "64") == 2
    assert re.search(r"takes [\d,]+\.\d GiB, and [\d,]+\.\d GiB of cpu are free", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    # One layer needs no weights.
    assert _run(*large, "--decode", "64", "--prefill", "none", "--cached", "none", "--generate", "none") == 0


def test_lengths_beyond_a_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(small.save_model(tmp_path / "tiny-llama"))
    for arguments, message in (
        ("--generate 250 --cached none", "--generate 250 and the 10 tokens that follow are above"),
        ("--padded 250 --cached none", "--padded 250 and the 10 tokens that follow are above"),
        ("--cached 246", "--cached 246 and the 11 tokens that follow are above"),
    ):
        assert _run(folder, *arguments.split(), "--new-tokens", "10") == 2
        assert f"{message} the model's maximum of 256 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: "/".join(folder.parts[-2:]))
def test_a_committed_summary_follows_from_its_records(folder: Path) -> None:
    summary = summarise([json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()])
    # Logarithms may differ in the last digit between machines.
    digits = {"parse_float": lambda text: f"{float(text):.12g}"}
    assert json.loads(json.dumps(summary), **digits) == json.loads((folder / "summary.json").read_text(), **digits)
    tables = "\n\n".join(markdown_table(*table) for table in bench_tables(summary))
    assert (folder / "tables.md").read_text() == tables + "\n"


def test_a_panel_has_four_lines_and_its_legend_beside_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = _records({1024: 0.5, 4096: 2.0})
    for name in ("dynamic-cache", "flash", "cudnn", "a-new-kernel"):
        for record in records:
            record["methods"][name] = record["methods"]["sdpa"]
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot_bench(summarise([{**record, "model": {"name": "x"}} for record in records]), tmp_path / "bench.png")
    [axes] = figures[0].axes
    figures[0].draw_without_rendering()
    legend = axes.get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == 4
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_commands_name_the_machine_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small.save_model(tmp_path / "tiny-llama")
    small.save_texts(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    none = "--prefill none --cached none --generate none --decode"
    for command in (
        f"bench --shape 4/2/16 --device cpu {none} 64",
        "perplexity tiny-llama --text texts --device cpu --lengths 48 --targets 40 --methods window",
        "attention-error tiny-llama --text texts --device cpu --lengths 48,96",
        "theory --experiment workloads --device cpu",
    ):
        assert run_command(*command.split(), "--output", command.split()[0]) == 0
    names = set()
    for path in tmp_path.glob("*/**/summary.json"):
        summary = json.loads(path.read_text())
        names.add(summary.get("about", summary)["device_name"])
    assert names == {device_name(CPU)}
