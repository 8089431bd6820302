from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import hf_sparse
from hf_sparse.config import files as policy_files
from hf_sparse.errors import UserError
from hf_sparse.laws import total_cost
from hf_sparse.measure import perplexity
from hf_sparse.measure.data import Document
from hf_sparse.measure.equal_cost import kept_keys, with_dense_layers
from hf_sparse.measure.methods import PERPLEXITY_METHODS, perplexity_methods
from hf_sparse.measure.perplexity import evaluate, measure, token_nll
from hf_sparse.measure.perplexity_summary import method_cells, perplexity_cells, summarise, verdict_cells
from hf_sparse.measure.windows import Window, cut_windows
from hf_sparse.results import Record, ResultFile, provenance, record_key
from hf_sparse.share.source import describe
from tests import small, tiny

LENGTHS = [48, 96]
TARGETS = 40
SUPPORT = hf_sparse.inspect(tiny.config("llama"))
METHODS = ("dense", *PERPLEXITY_METHODS)
COMMITTED = sorted(Path(__file__).parents[2].glob("model_cards/*/perplexity/rows.jsonl"))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny.model("llama")


@pytest.fixture(scope="module")
def about(model: PreTrainedModel) -> Record:
    return provenance(describe("tiny", "abc", model.config), model, seed=0)


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    documents = [Document(f"d{i}", small.words(120, seed=i)) for i in range(3)]
    return cut_windows(documents, small.tokenizer(), LENGTHS, TARGETS)


@pytest.fixture(scope="module")
def rows(
    model: PreTrainedModel, windows: list[Window], about: Record, tmp_path_factory: pytest.TempPathFactory
) -> list[Record]:
    results = ResultFile(tmp_path_factory.mktemp("results") / "rows.jsonl")
    return evaluate(
        model, windows, perplexity_methods(PERPLEXITY_METHODS, small.CONFIG, LENGTHS, SUPPORT), results, about
    )


def _plain_nll(model: PreTrainedModel, window: Window) -> torch.Tensor:
    """Cross-entropy the long way: logits of every position, the text shifted by one."""
    text = torch.cat([window.input_ids, window.targets[-1:]])
    logits = tiny.logits(model, text[None, :-1])[0]
    return cross_entropy(logits.double(), text[1:], reduction="none")[-len(window.targets) :]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_token_nll_is_cross_entropy_of_the_last_tokens(
    name: str, windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "_LOGIT_ROWS", 7)
    model = tiny.model(name)
    for window in windows[:2]:
        found = token_nll(model, window.input_ids, window.targets)
        torch.testing.assert_close(found, _plain_nll(model, window), rtol=1e-5, atol=1e-5)


def test_dense_is_the_model_as_it_is(model: PreTrainedModel, windows: list[Window]) -> None:
    row = measure(model, windows[1], None)
    expected = _plain_nll(model, windows[1])
    assert row["nll"] == pytest.approx(expected.sum().item(), rel=1e-6)
    assert row["block_nll"] == pytest.approx([expected[:32].sum().item(), expected[32:].sum().item()], rel=1e-6)
    assert (row["tokens"], row["density"], row["sparse_density"], row["mean_keys"]) == (TARGETS, 1.0, 1.0, None)


def test_sparse_is_what_a_patch_by_hand_gives(windows: list[Window]) -> None:
    model = tiny.model("llama")
    row = measure(model, windows[1], small.CONFIG)
    assert not hf_sparse.is_patched(model)
    hf_sparse.patch(model, small.CONFIG)
    assert row["nll"] == pytest.approx(_plain_nll(model, windows[1]).sum().item(), rel=1e-6)
    report = hf_sparse.report(model)
    assert row["density"] == report.density < 0.6
    assert row["mean_keys"] == pytest.approx(np.mean([r["mean_keys"] for r in report.rows]))


def test_rows_that_ran_dense_are_counted_over_layers(model: PreTrainedModel, windows: list[Window]) -> None:
    row = measure(model, windows[1], dataclasses.replace(small.CONFIG, dense_layers=(0,)))
    assert row["rows"] == 2 * LENGTHS[1]
    assert row["dense_rows"]["in dense_layers"] == LENGTHS[1]
    assert row["dense_rows"]["fewer than 8 visible keys"] == 7


def test_likelihoods_that_are_not_finite_are_refused(windows: list[Window]) -> None:
    model = tiny.model("llama")
    head: torch.nn.Linear = model.lm_head
    head.weight.data[5] = float("nan")
    with pytest.raises(UserError, match=r"d0 are not finite in torch\.float32"):
        measure(model, windows[0], None)


def test_methods_share_one_configuration_and_fixed_costs_the_same() -> None:
    methods = perplexity_methods(PERPLEXITY_METHODS, small.CONFIG, LENGTHS, SUPPORT)
    assert tuple(methods) == METHODS
    assert methods["dense"] is None
    for name in ("topk", "grouped", "window"):
        assert methods[name] == dataclasses.replace(small.CONFIG, selector=name)
    fixed, adaptive = methods["fixed"], methods["topk"]
    assert fixed is not None
    assert adaptive is not None
    assert methods["fixed-grouped"] == dataclasses.replace(fixed, selector="grouped")
    assert (fixed.law, fixed.selector, fixed.min_keys) == ("fixed", "topk", small.CONFIG.min_keys)
    assert fixed.keys is not None
    costs = [total_cost(dataclasses.replace(fixed, keys=fixed.keys + i).budget(), LENGTHS) for i in (-1, 0, 1)]
    away = [abs(cost - total_cost(adaptive.budget(), LENGTHS)) for cost in costs]
    assert min(away) == away[1]


def test_laws_per_head_are_matched_over_all_heads_and_layers() -> None:
    model = tiny.model("gemma3", num_hidden_layers=3, layer_types=["sliding_attention", *["full_attention"] * 2])
    support = hf_sparse.inspect(model)
    laws = {1: ((2.0, 0.5), (6.0, 0.2), (1.0, 0.9), (3.0, 0.6)), 2: ((2.0, 0.4),) * 4}
    config = dataclasses.replace(small.CONFIG, per_head=laws, dense_layers=None, dense_below=0)
    methods = perplexity_methods(
        ["uniform", "fixed", "fixed-grouped", "decode", "decode-topk"], config, LENGTHS, support
    )
    assert methods["decode"] == config
    assert methods["decode-topk"] == dataclasses.replace(config, selector="topk")
    calibrated = with_dense_layers(config, support)
    assert calibrated.dense_layers == (0,)
    wanted = kept_keys(calibrated, support.layers, LENGTHS)
    for name, law, selector in (("uniform", "power", "grouped"), ("fixed", "fixed", "topk")):
        made = methods[name]
        assert made is not None
        assert (made.law, made.selector, made.per_head, made.dense_layers) == (law, selector, None, (0,))
        assert 0.95 * wanted < kept_keys(made, support.layers, LENGTHS) <= 1.001 * wanted


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("selector", ["topk", "window"])
def test_decoding_predicts_as_one_pass_does(name: str, selector: Any, windows: list[Window]) -> None:
    """Selectors that look at each row alone keep the same keys either way."""
    model = tiny.model(name)
    config = dataclasses.replace(small.CONFIG, selector=selector)
    for given in (None, config):
        row = measure(model, windows[1], given, decode=True)
        assert row["block_nll"] == pytest.approx(measure(model, windows[1], given)["block_nll"], rel=1e-4)


def test_decoding_counts_the_rows_of_the_targets_alone(model: PreTrainedModel, windows: list[Window]) -> None:
    config = dataclasses.replace(small.CONFIG, dense_layers=(0,))
    row = measure(model, windows[1], config, decode=True)
    visible = torch.arange(LENGTHS[1] - TARGETS + 1, LENGTHS[1] + 1)
    kept = config.budget()(visible)
    assert row["rows"] == 2 * TARGETS
    assert row["dense_rows"] == {"in dense_layers": TARGETS}
    assert row["density"] == pytest.approx(float((kept + visible).sum() / (2 * visible.sum())))
    assert row["mean_keys"] == pytest.approx(float((kept + visible).double().mean() / 2))


def test_decoding_may_start_from_nothing(model: PreTrainedModel, windows: list[Window]) -> None:
    whole = dataclasses.replace(windows[0], input_ids=windows[0].input_ids[-TARGETS:])
    row = measure(model, whole, dataclasses.replace(small.CONFIG, selector="topk"), decode=True)
    assert row["rows"] == 2 * TARGETS
    assert row["nll"] == pytest.approx(
        measure(model, whole, dataclasses.replace(small.CONFIG, selector="topk"))["nll"], rel=1e-4
    )


def test_the_density_of_full_layers_leaves_sliding_windows_out(windows: list[Window]) -> None:
    model = tiny.model("gemma3")
    row = measure(model, windows[1], dataclasses.replace(small.CONFIG, dense_layers=None), sliding_layers=(0,))
    hf_sparse.patch(model, small.CONFIG, dense_layers=None)
    tiny.logits(model, windows[1].input_ids[None])
    full = [r["density"] for r in hf_sparse.report(model).rows if r["layer"] == 1]
    assert row["sparse_density"] == pytest.approx(np.mean(full))
    assert row["sparse_density"] < row["density"]


def test_dense_is_always_there_and_first() -> None:
    assert list(perplexity_methods(["window"], small.CONFIG, LENGTHS, SUPPORT)) == ["dense", "window"]


@pytest.mark.parametrize(
    ("names", "config", "message"),
    [
        (["topk", "magic"], small.CONFIG, "methods must be among dense, topk.*; got 'magic'"),
        (["fixed"], dataclasses.replace(small.CONFIG, law="fixed", keys=9), "leave them out with --methods"),
    ],
)
def test_methods_that_make_no_sense_are_refused(names: list[str], config: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        perplexity_methods(names, config, LENGTHS, SUPPORT)


def test_a_fixed_config_can_be_measured_without_its_warning(
    model: PreTrainedModel, windows: list[Window], recwarn: pytest.WarningsRecorder
) -> None:
    config = perplexity_methods(["fixed"], small.CONFIG, LENGTHS, SUPPORT)["fixed"]
    measure(model, windows[0], config)
    assert not [w for w in recwarn if "grow no faster" in str(w.message)]


def test_every_window_is_measured_with_every_method(rows: list[Record]) -> None:
    assert {(row["document"], row["length"], row["method"]) for row in rows} == {
        (f"d{i}", length, method) for i in range(3) for length in LENGTHS for method in METHODS
    }
    assert len({row["key"] for row in rows}) == len(rows)
    assert all(row["versions"]["torch"] == torch.__version__ for row in rows)


def test_a_run_that_starts_again_measures_nothing_twice(
    model: PreTrainedModel, windows: list[Window], about: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = ResultFile(tmp_path / "rows.jsonl")
    methods = perplexity_methods(["window"], small.CONFIG, LENGTHS, SUPPORT)
    first = evaluate(model, windows, methods, results, about)
    monkeypatch.setattr(perplexity, "measure", None)
    assert evaluate(model, windows, methods, results, {**about, "seed": 5, "threads": 9}) == first


@pytest.mark.parametrize("change", ["method", "revision", "dtype", "targets"])
def test_whatever_decides_a_number_is_measured_anew(
    model: PreTrainedModel, windows: list[Window], about: Record, tmp_path: Path, change: str
) -> None:
    results = ResultFile(tmp_path / "rows.jsonl")
    evaluate(model, windows[:1], perplexity_methods(["window"], small.CONFIG, LENGTHS, SUPPORT), results, about)
    config, now, window = small.CONFIG, dict(about), windows[0]
    match change:
        case "method":
            config = dataclasses.replace(config, alpha=3.0)
        case "revision":
            now["model"] = {**about["model"], "revision": "def"}
        case "dtype":
            now["dtype"] = "bfloat16"
        case "targets":
            window = dataclasses.replace(window, targets=window.targets[1:])
    before = len(results.records())
    evaluate(model, [window], perplexity_methods(["window"], config, LENGTHS, SUPPORT), results, now)
    assert len(results.records()) - before == (1 if change == "method" else 2)


def test_summary_agrees_with_plain_sums(rows: list[Record]) -> None:
    summary = summarise(rows, seed=0)
    json.dumps(summary, allow_nan=False)
    results = {(row["method"], row["length"]): row for row in summary["results"]}

    def mean(method: str, length: int) -> float:
        cell = [row for row in rows if (row["method"], row["length"]) == (method, length)]
        return float(sum(row["nll"] for row in cell)) / (3 * TARGETS)

    for (method, length), row in results.items():
        assert row["perplexity"] == pytest.approx(math.exp(mean(method, length)), rel=1e-9)
        assert row["ratio"] == pytest.approx(math.exp(mean(method, length) - mean("dense", length)), rel=1e-9)
        assert row["low"] <= row["ratio"] <= row["high"]
        assert row["tokens"] == 3 * TARGETS
    assert results["dense", 48]["low"] == results["dense", 48]["high"] == 1.0
    over = {row["method"]: row for row in summary["methods"]}
    ratios = [results["window", length]["ratio"] for length in LENGTHS]
    assert over["window"]["mean"]["ratio"] == pytest.approx(math.sqrt(ratios[0] * ratios[1]), rel=1e-9)
    assert over["window"]["worst"]["ratio"] == pytest.approx(max(ratios), rel=1e-9)
    assert over["window"]["worst_length"] == LENGTHS[int(np.argmax(ratios))]


def _made_rows(excess: dict[str, dict[int, float]]) -> list[Record]:
    """Records of 8 documents with dense likelihoods of wide spread and `excess` nats per token above them."""
    rng = np.random.default_rng(0)
    dense = rng.gamma(2.0, 40.0, size=(8, 16))
    out = []
    for method, by_length in {"dense": dict.fromkeys(excess["topk"], 0.0), **excess}.items():
        for length, more in by_length.items():
            for i, blocks in enumerate(dense):
                noise = 0.0 if method == "dense" else rng.normal(0, 0.005, size=16)
                blocks = blocks + 32 * (more + noise)
                out.append(
                    {
                        "method": method,
                        "length": length,
                        "document": f"d{i}",
                        "text_sha256": str(i),
                        "tokens": 512,
                        "block_tokens": 32,
                        "nll": blocks.sum(),
                        "block_nll": blocks.tolist(),
                        "density": 1.0,
                        "mean_keys": None,
                        "seconds": 1.0,
                        "config": None,
                    }
                    | dict.fromkeys(("model", "dtype", "device", "device_name", "versions", "commit"))
                )
    return out


def test_intervals_are_paired_and_cover_a_known_truth() -> None:
    summary = summarise(_made_rows({"topk": {512: 0.02, 1024: 0.05}}), seed=0)
    for length, truth in ((512, 0.02), (1024, 0.05)):
        [row] = [r for r in summary["results"] if (r["method"], r["length"]) == ("topk", length)]
        assert row["low"] < math.exp(truth) < row["high"]
        # Unpaired, the spread between the texts would make it wider than the ratio itself.
        assert row["high"] - row["low"] < 0.01


def test_the_verdict_is_for_the_better_one_and_for_none_if_they_are_alike() -> None:
    made = {
        "topk": {512: 0.02, 1024: 0.02},
        "fixed": {512: 0.0, 1024: 0.06},
        "grouped": {512: 0.03, 1024: 0.03},
        "fixed-grouped": {512: 0.03, 1024: 0.03},
    }
    summary = summarise(_made_rows(made), seed=0)
    header, cells = verdict_cells(summary)
    better = {(row[0], row[1]): row[-1] for row in cells}
    assert header[-1] == "better"
    assert better["topk / fixed", "512"] == "fixed"
    assert better["topk / fixed", "1024"] == "topk"
    assert better["topk / fixed", "all lengths"] == "topk"
    assert better["topk / fixed", "worst length"] == "topk"
    assert better["grouped / fixed-grouped", "worst length"] == "not resolved"
    worst = summary["adaptive_vs_fixed"][0]["worst"]
    assert worst["ratio"] == pytest.approx(math.exp(0.02 - 0.06), rel=2e-3)


def test_tables_have_a_row_for_each_answer(rows: list[Record]) -> None:
    summary = summarise(rows, seed=0)
    for cells, number in ((perplexity_cells, 12), (method_cells, 5), (verdict_cells, 8)):
        header, lines = cells(summary)
        assert len(lines) == number
        assert {len(line) for line in lines} == {len(header)}


def test_rows_of_an_earlier_release_lack_the_density_of_full_layers(rows: list[Record]) -> None:
    old, new = rows[:-1], {**rows[-1], "sparse_density": 0.5 * rows[-1]["density"]}
    header, lines = perplexity_cells(summarise([*({**row, "sparse_density": None} for row in old), new], seed=0))
    shown = [line[header.index("density, full layers")] for line in lines]
    assert sum(text != "-" for text in shown) <= 1
    assert "-" in shown


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parts[-3])
def test_committed_rows_are_found_again(path: Path) -> None:
    """A run with the policy beside these rows still looks for the keys under which they were stored."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    config = dataclasses.replace(policy_files.read(path.parents[1] / policy_files.NAME).config, calibration=None)
    # What is matched to laws of heads needs the model.
    names = [name for name in METHODS if config.per_head is None or not name.startswith("fixed")]
    methods = perplexity_methods(names, config, sorted({row["length"] for row in rows}), SUPPORT)
    rows = [row for row in rows if row["method"] in methods]
    assert {row["method"] for row in rows} >= {"dense", "grouped"}
    for row in rows:
        config = methods[row["method"]]
        assert row["key"] == record_key(
            command="perplexity",
            model=[row["model"]["name"], row["model"]["revision"], row["dtype"], row["device"]],
            window=row["window_sha256"],
            method=row["method"],
            config=None if config is None else config.to_dict(),
        )
