from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_sparse
from hf_sparse import SparseAttentionConfig
from hf_sparse.bench import dense, layer
from hf_sparse.bench.inputs import capture, gaussian
from hf_sparse.bench.run import Cell, evaluate
from hf_sparse.bench.shapes import SHAPES, Shape, parse_shape
from hf_sparse.bench.summary import break_even as crossing
from hf_sparse.bench.summary import exponent, median_interval, summarise
from hf_sparse.bench.timing import alternate, with_peak
from hf_sparse.errors import UserError
from hf_sparse.results import ResultFile
from hf_sparse.visibility import interval_to_mask
from tests import small, tiny
from tests.small import run_command

CPU = torch.device("cpu")
SHAPE = Shape(4, 2, 16, 64, 100, layers=2)
SMALL = ["--shape", "4/2/16", "--new-tokens", "3", "--repeats", "2", "--seconds", "0", "--device", "cpu"]
SMALL += ["--min-keys", "8", "--alpha", "2", "--recent-keys", "8", "--dense-below", "16"]
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))


def _run(*arguments: str) -> int:
    return run_command("bench", *arguments)


def test_methods_take_turns_and_none_is_always_first() -> None:
    calls: list[str] = []

    def sampler(name: str) -> Any:
        def sample() -> dict[str, float]:
            calls.append(name)
            return {"seconds": float(len(calls))}

        return sample

    found = alternate({name: sampler(name) for name in "abc"}, repeats=4, seconds=0.0)
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
    masked = dense.MaskedCall()
    torch.testing.assert_close(masked.attend(masked.prepare(inputs)), right)
    step = gaussian(SHAPE, torch.float32, CPU, seed=0).decode(200, index=3)
    torch.testing.assert_close(dense.CachedCall(step).attend(), dense.sdpa(step))


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
def test_causal_blocks_are_causal(length: int) -> None:
    blocks = dense.causal_blocks(length, CPU)
    seen = torch.arange(-(-length // 128))
    right = seen[:, None] >= seen
    torch.testing.assert_close(blocks.to_dense()[0, 0].bool(), right)
    assert blocks.shape == (1, 1, length, length)


def test_flex_under_causal_blocks_is_causal_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_compiled_flex", lambda: dense.flex_attention)  # compiling takes longer than a test may
    inputs = gaussian(SHAPE, torch.float32, CPU, seed=0).prefill(200)
    torch.testing.assert_close(dense.flex(inputs, dense.causal_blocks(200, CPU)), dense.sdpa(inputs))


def test_ours_goes_back_to_before_the_step() -> None:
    config = SparseAttentionConfig(min_keys=8, alpha=2.0, recent_keys=8)
    found = layer.decode_cell(gaussian(SHAPE, torch.float32, CPU, 0), 300, config, repeats=4, seconds=0.0)
    assert list(found) == ["sdpa", "dynamic-cache", "hf_sparse"]
    assert found["hf_sparse"]["density"] == math.ceil(2 * 300**0.5) / 300
    assert found["dynamic-cache"]["output_error"]["worst"] < 1e-5
    assert 0 < found["hf_sparse"]["output_error"]["mean"] < 1
    assert all(len(each["samples"]["seconds"]) == 4 for each in found.values())


@pytest.mark.parametrize("quick", [0.0, 60.0], ids=["first calls once", "first calls twice"])
def test_a_full_budget_has_no_error(quick: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether a first call is made again may differ between methods: outputs are of the same inputs all the same.
    once = layer._first_calls

    def first_calls(method: layer.Method, device: torch.device) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(layer, "_QUICK", quick if method.run is not dense.sdpa else 60.0)
            return once(method, device)

    monkeypatch.setattr(layer, "_first_calls", first_calls)
    config = SparseAttentionConfig(law="fraction", fraction=1.0)
    inputs = gaussian(SHAPE, torch.float32, CPU, 0)
    for found in (
        layer.decode_cell(inputs, 300, config, 1, 0.0),
        layer.prefill_cell(inputs, 300, config, 1, 0.0, frozenset({"flex"})),
    ):
        assert found["hf_sparse"]["density"] == 1.0
        assert found["hf_sparse"]["output_error"]["worst"] < 1e-5


def test_what_cannot_run_or_fit_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(dense, "flex", broken)
    monkeypatch.setattr(layer, "available_bytes", lambda _: 1000.0)
    inputs = gaussian(SHAPE, torch.float32, CPU, 0)
    found = layer.prefill_cell(inputs, 64, SparseAttentionConfig(), 1, 0.0, frozenset())
    assert found["flex"] == {"skipped": "RuntimeError: no compiler here"}
    assert "not free" in found["masked-sdpa"]["skipped"]
    assert "samples" in found["hf_sparse"]


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


def _rows(ratios: dict[int, float]) -> list[dict[str, Any]]:
    """Ours takes as long as n is, dense `ratio` times that."""
    names = ("model", "dtype", "device", "device_name", "threads", "seed", "versions", "commit")
    return [
        {
            **dict.fromkeys(names, "x"),
            "kind": "decode",
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
    summary = summarise(_rows({1024: 2.0}))
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
    results = summarise(_rows(ratios))["results"]
    found = crossing(results, "sdpa")
    assert found["length"] == (None if length is None else pytest.approx(length, abs=1))
    assert found["measured"] == [min(ratios), max(ratios)]


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


def test_a_cell_is_not_measured_twice(tmp_path: Path) -> None:
    def cell(length: int, **facts: Any) -> Cell:
        return Cell("decode", length, {"inputs": "x", **facts}, lambda: {"sdpa": {"n": length}})

    def never() -> dict[str, dict[str, Any]]:
        raise AssertionError

    results, about = ResultFile(tmp_path / "rows.jsonl"), {"threads": 1, "commit": "a"}
    first = evaluate([cell(8)], results, about)
    again = evaluate([Cell("decode", 8, {"inputs": "x"}, never), cell(16)], results, {"threads": 1, "commit": "b"})
    assert again[0] == first[0]
    assert [row["length"] for row in results.records().values()] == [8, 16]
    assert len({evaluate([cell(8, **facts)], results, about)[0]["key"] for facts in ({}, {"inputs": "y"})}) == 2
    assert evaluate([cell(8)], results, {"threads": 2, "commit": "a"})[0]["key"] != first[0]["key"]


def test_shapes_have_names_or_numbers() -> None:
    assert parse_shape("llama-8b") is SHAPES["llama-8b"]
    assert parse_shape("6/2/32").heads == 6
    part = parse_shape("smollm2-135m").part(2)
    assert (part.layers, part.vocab_size, part.heads) == (2, 49152 // 15, 9)
    for text in ("llama", "6/4/32", "6/2/33", "6/2", "6/0/32", "-6/2/32"):
        with pytest.raises(UserError, match="shape"):
            parse_shape(text)


def test_the_command_measures_everything_writes_it_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
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

    monkeypatch.setattr(layer, "_measure", None)
    monkeypatch.setattr("hf_sparse.bench.end_to_end.alternate", None)
    assert _run(*options, "--json") == 0
    assert json.loads(capsys.readouterr().out) == summary
    assert (tmp_path / "rows.jsonl").read_text().splitlines() == lines


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
        ("--decode none --save-break-even", "--save-break-even needs lengths"),
        ("--shape 9/2/64", "shape needs heads"),
        ("--leave-out sdpa", "leave-out takes some of"),
        ("--selector best", "selector must be one of"),
        ("--alpha 0", "alpha must be"),
        ("--dtype int4", "dtype must be one of"),
        ("--device warp", "device 'warp'"),
        ("--new-tokens 1", "--new-tokens"),
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


def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_sparse.bench.shapes.available_bytes", lambda _: 1000.0)
    assert _run("--shape", "4/2/16", "--device", "cpu", "--cached", "64", "--output", str(tmp_path / "out")) == 2
    assert "GiB, and 0.0 GiB of cpu are free" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    # A layer alone needs no weights.
    layer_alone = ["--decode", "64", "--prefill", "none", "--cached", "none", "--generate", "none"]
    assert _run(*SMALL, *layer_alone, "--output", str(tmp_path / "out")) == 0


def test_lengths_beyond_a_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(small.save_model(tmp_path / "tiny-llama"))
    for arguments, message in (
        ("--generate 250 --cached none", "--generate 250 and the 10 tokens that follow are above"),
        ("--padded 250 --cached none", "--padded 250 and the 10 tokens that follow are above"),
        ("--cached 246", "--cached 246 and the 11 tokens that follow are above"),
    ):
        assert _run(folder, *arguments.split(), "--new-tokens", "10") == 2
        assert f"{message} the model's maximum of 256 tokens" in capsys.readouterr().err
