"""The streamed measurement against whole n x n matrices, and on tiny models of several architectures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse import SparseAttentionConfig
from hf_sparse.diagnostics import DenseBlock, concentration, query_errors
from hf_sparse.errors import UserError
from hf_sparse.laws import total_cost
from hf_sparse.measure import attention_error
from hf_sparse.measure.attention_error import evaluate, measure
from hf_sparse.measure.equal_cost import kept_keys
from hf_sparse.measure.layer_errors import layer_errors
from hf_sparse.measure.methods import error_methods
from hf_sparse.measure.windows import Window
from hf_sparse.patching import inspect
from hf_sparse.results import DENSE, Record, ResultFile, provenance
from hf_sparse.share.source import describe
from tests import tiny
from tests.calls import causal_intervals, select
from tests.calls import inputs as make_inputs

LENGTHS = [64, 150]
CONFIG = SparseAttentionConfig(alpha=2.0, min_keys=4, sink_keys=1, recent_keys=2, dense_below=8)
BARE = SparseAttentionConfig(selector="topk", alpha=2.0, min_keys=1, sink_keys=0, recent_keys=0, dense_below=0)


def window(length: int = max(LENGTHS), seed: int = 3, name: str = "d") -> Window:
    ids = tiny.tokens(1, length, seed)[0]
    return Window(name, f"sha of {name}", ids, ids[-1:])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny.model("llama")


# layer_errors: blocks, key heads and cut keys are an economy, not a change.


@pytest.mark.parametrize("selector", ["topk", "grouped", "window"])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 40}, {"left": (3,), "right": (2,)}, {"window": 90, "left": (5,), "right": (1,)}],
    ids=["causal", "window", "padded", "padded window"],
)
def test_streamed_statistics_are_those_of_whole_matrices(selector: Any, options: dict[str, Any]) -> None:
    length, start = 192, 64
    intervals = causal_intervals(length, length, **({"left": (0,), "right": (0,)} | options))
    call = make_inputs(intervals, length, softcap=5.0, sinks=True)
    config = replace(CONFIG, selector=selector)
    budgets = config.budget(0)(call.visible)[:, None]
    dense = DenseBlock.of(call)
    blocks = [slice(i, i + 64) for i in range(0, length, 64)]
    parts = [select(selector, call.queries(b.start, b.stop), budgets[:, :, b], config).mask(4, length) for b in blocks]
    keep = torch.cat(parts, dim=2)
    whole = query_errors(dense, keep) | concentration(dense)
    rows = slice(start, length)
    seen = call.visible[0, rows] > 0
    found = layer_errors(0, call, start, length, {"m": config})
    for metric, values in whole.items():
        own = values[0, :, rows][:, seen].double()
        order = own.sort(dim=-1, descending=metric != "retained_mass").values
        columns = found[DENSE] if metric in concentration(dense) else found["m"]
        assert columns[f"{metric}_mean"] == pytest.approx(own.mean(-1).tolist(), rel=1e-4, abs=1e-6)
        assert columns[f"{metric}_worst"] == pytest.approx(order[:, :2].mean(-1).tolist(), rel=1e-4, abs=1e-6)
    frobenius = whole["l2"][0, :, rows][:, seen].square().sum(-1).sqrt()
    assert found["m"]["frobenius"] == pytest.approx(frobenius.tolist(), rel=1e-4)
    visible, kept = call.visible[0, rows][seen].double().mean(), budgets[0, 0, rows][seen].double().mean()
    assert found["m"]["kept"] == pytest.approx([kept.item()] * 4, rel=1e-5)
    assert found["m"]["density"] == pytest.approx([(kept / visible).item()] * 4, rel=1e-5)
    assert found[DENSE]["density"] == [1.0] * 4


def test_the_worst_rows_are_worse_than_the_mean(model: PreTrainedModel) -> None:
    for row in measure(model, window(), LENGTHS, {"m": BARE}, 64):
        columns = row["columns"]
        for name in columns:
            if name.endswith("_worst"):
                sign = -1 if name.startswith("retained") else 1
                pairs = zip(columns[name], columns[name.replace("_worst", "_mean")], strict=True)
                assert all(sign * worst >= sign * mean - 1e-6 for worst, mean in pairs)


def test_per_head_laws_reach_their_heads() -> None:
    call = make_inputs(causal_intervals(64, 64, left=(0,), right=(0,)), 64)
    laws = ((1.0, 0.5), (2.0, 0.5), (3.0, 0.5), (4.0, 0.5))
    config = replace(BARE, per_head={1: laws})
    same = layer_errors(0, call, 0, 64, {"m": config})["m"]["kept"]
    own = layer_errors(1, call, 0, 64, {"m": config})["m"]["kept"]
    expected = [np.mean([min(n, math.ceil(alpha * n**0.5)) for n in range(1, 65)]) for alpha, _ in laws]
    assert own == pytest.approx(expected, rel=1e-5)
    assert same == pytest.approx([expected[1]] * 4, rel=1e-5)


# measure: on the activations of real architectures.


def eager_weights(name: str, ids: Tensor) -> tuple[Tensor, ...]:
    """Attention weights of every layer, `(heads, n, n)`, by transformers itself."""
    eager = tiny.model(name, attn_implementation="eager")
    with torch.no_grad():
        out = eager(input_ids=ids[None], use_cache=False, output_attentions=True)
    return tuple(weights[0].double() for weights in out.attentions)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss", "qwen3", "gpt2"])
def test_errors_on_a_model_are_those_of_its_own_weights(name: str) -> None:
    length = 100
    text = window(length)
    rows = {row["method"]: row for row in measure(tiny.model(name), text, [length], {"m": BARE}, length)}
    weights = eager_weights(name, text.input_ids)
    heads = weights[0].shape[0]
    assert rows["m"]["rows"] == length
    assert rows["m"]["columns"]["layer"] == [layer for layer in range(tiny.LAYERS) for _ in range(heads)]
    assert rows["m"]["columns"]["head"] == list(range(heads)) * tiny.LAYERS
    windowed = [layer == 0 and name in tiny.HYBRID for layer in range(tiny.LAYERS) for _ in range(heads)]
    assert rows["m"]["columns"]["windowed"] == windowed
    for layer, p in enumerate(weights):
        visible = torch.full((length,), tiny.WINDOW) if windowed[layer * heads] else torch.arange(length) + 1
        visible = torch.minimum(visible, torch.arange(length) + 1)
        budget = BARE.budget()(visible)
        ranks = p.argsort(-1, descending=True).argsort(-1)
        lost = (p * (ranks >= budget[:, None])).sum(-1)
        place = slice(layer * heads, (layer + 1) * heads)
        assert rows["m"]["columns"]["visible"][place] == pytest.approx(
            [visible.double().mean().item()] * heads, rel=1e-5
        )
        assert rows["m"]["columns"]["l1_mean"][place] == pytest.approx((2 * lost.mean(-1)).tolist(), rel=1e-3)
        assert rows["m"]["columns"]["retained_mass_worst"][place] == pytest.approx(
            (1 - lost.max(-1).values).tolist(), rel=1e-3
        )
        sink = (1 - p.sum(-1)).clamp(min=0)
        entropy = torch.special.entr(p).sum(-1) + torch.special.entr(sink)
        assert rows[DENSE]["columns"]["entropy_mean"][place] == pytest.approx(entropy.mean(-1).tolist(), rel=2e-3)
    assert max(rows["m"]["columns"]["l1_worst"]) > 0.1  # or there was nothing to measure


def test_one_pass_gives_every_length_its_own_result(model: PreTrainedModel) -> None:
    methods = error_methods(None, CONFIG, LENGTHS, inspect(model))
    together = measure(model, window(), LENGTHS, methods, 64)
    for length in LENGTHS:
        alone = measure(model, window(), [length], methods, 64)
        both = [row for row in together if row["length"] == length]
        assert [row["method"] for row in both] == [row["method"] for row in alone] == [DENSE, *methods]
        for one, other in zip(both, alone, strict=True):
            for name, column in one["columns"].items():
                assert column == pytest.approx(other["columns"][name], rel=1e-4, abs=1e-6), name


def test_queries_per_length_are_rounded_up_to_groups(model: PreTrainedModel) -> None:
    def rows(queries_per_length: int) -> list[int]:
        return [row["rows"] for row in measure(model, window(), LENGTHS, {}, queries_per_length)]

    assert rows(1) == [64, 150 - 128]
    assert rows(64) == [64, 150 - 64]
    assert rows(1000) == [64, 150]


def test_a_model_is_left_as_it_was(model: PreTrainedModel) -> None:
    ids = window().input_ids[None]
    before = tiny.logits(model, ids)
    measure(model, window(), LENGTHS, {"m": BARE}, 64)
    assert torch.equal(tiny.logits(model, ids), before)


def test_a_short_window_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="100 tokens"):
        measure(model, window(100), [64, 101], {}, 64)


# error_methods: the same cost for every law.


def test_laws_cost_the_same(model: PreTrainedModel) -> None:
    lengths = [512, 2048, 4096]
    methods = error_methods(None, SparseAttentionConfig(), lengths, inspect(model))
    assert list(methods) == ["topk", "fixed", "fraction", "log", "grouped", "window"]
    assert [config.selector for config in methods.values()] == ["topk"] * 4 + ["grouped", "window"]
    cost = total_cost(methods["topk"].budget(), lengths)
    for config in methods.values():
        assert total_cost(config.budget(), lengths) == pytest.approx(cost, rel=0.005)


def test_another_law_is_matched_by_a_power_law(model: PreTrainedModel) -> None:
    config = SparseAttentionConfig(law="fixed", keys=300, exponent=0.4)
    methods = error_methods(None, config, [512, 4096], inspect(model))
    assert list(methods) == ["topk", "power", "fraction", "log", "grouped", "window"]
    assert methods["power"].exponent == 0.4
    assert methods["grouped"].keys == 300


def test_calibrated_laws_are_compared_with_one_law_at_equal_cost(model: PreTrainedModel) -> None:
    support = inspect(model)
    laws = ((2.0, 0.5), (4.0, 0.3), (1.0, 0.9), (3.0, 0.6))
    config = replace(CONFIG, per_head={1: laws}, dense_layers=(0,), selector="window")
    methods = error_methods(None, config, LENGTHS, support)
    assert list(methods) == ["calibrated", "power", "fixed", "fraction", "log"]
    assert methods["calibrated"] == config
    assert {method.selector for method in methods.values()} == {"window"}
    costs = {name: kept_keys(method, support.layers, LENGTHS) for name, method in methods.items()}
    assert costs["power"] == pytest.approx(costs["calibrated"], rel=0.01)
    assert costs["log"] == pytest.approx(costs["calibrated"], rel=0.01)
    # Kept keys of a row are whole numbers: one more on every row costs that much.
    assert costs["fixed"] == pytest.approx(costs["calibrated"], rel=0.1)
    rows = {row["method"]: row for row in measure(model, window(), [150], methods, 64)}
    assert rows["calibrated"]["columns"]["density"][:4] == [1.0] * 4  # the dense layer
    assert max(rows["calibrated"]["columns"]["l1_mean"][:4]) == 0.0
    assert min(rows["calibrated"]["columns"]["l1_mean"][4:]) > 0.0


def test_methods_are_those_that_are_named(model: PreTrainedModel) -> None:
    support = inspect(model)
    methods = error_methods(["window", "dense", "fixed", "power"], CONFIG, LENGTHS, support)
    assert list(methods) == ["window", "fixed", "power"]
    assert methods["window"] == replace(CONFIG, selector="window")
    assert methods["power"] == replace(CONFIG, selector="topk")
    assert methods["fixed"] == error_methods(None, CONFIG, LENGTHS, support)["fixed"]
    calibrated = replace(CONFIG, per_head={1: ((2.0, 0.5),) * 4})
    assert list(error_methods(["topk", "calibrated"], calibrated, LENGTHS, support)) == ["topk", "calibrated"]
    with pytest.raises(UserError, match=r"methods must be among dense, grouped, topk, window, power, .*; got 'magic'"):
        error_methods(["magic"], CONFIG, LENGTHS, support)
    with pytest.raises(UserError, match="one besides dense, whose errors are 0; got 'dense'"):
        error_methods(["dense"], CONFIG, LENGTHS, support)


def test_lengths_without_a_cost_are_a_users_mistake(model: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="positive"):
        error_methods(None, SparseAttentionConfig(), [0], inspect(model))


# evaluate: rows on disk.


def test_a_run_resumes_where_it_stopped(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = provenance(describe("tiny", "abc", model.config), model, seed=0)
    windows = [window(seed=i, name=f"d{i}") for i in range(2)]
    methods = {"topk": BARE, "fixed": replace(BARE, law="fixed", keys=9)}
    results = ResultFile(tmp_path / "rows.jsonl")
    measured: list[tuple[str, list[str]]] = []

    def spy(
        model: PreTrainedModel, text: Window, lengths: Any, methods: Any, *args: Any, **kwargs: Any
    ) -> list[Record]:
        measured.append((text.document, list(methods)))
        return measure(model, text, lengths, methods, *args, **kwargs)

    monkeypatch.setattr(attention_error, "measure", spy)
    rows = evaluate(model, windows, LENGTHS, methods, results, about)
    assert [(row["document"], row["length"], row["method"]) for row in rows] == [
        (text.document, length, method) for text in windows for length in LENGTHS for method in (DENSE, *methods)
    ]
    assert rows[0]["model"]["revision"] == "abc"
    assert rows[0]["command"] == "attention-error"
    assert rows[1]["config"] == BARE.to_dict()
    lines = results.path.read_text().splitlines()
    assert len(lines) == len(rows)

    assert evaluate(model, windows, LENGTHS, methods, results, about) == rows
    assert measured == [("d0", ["topk", "fixed"]), ("d1", ["topk", "fixed"])]

    # Killed in the middle of the last line: only what it said is measured again.
    results.path.write_text("\n".join(lines)[:-20])
    measured.clear()
    again = evaluate(model, windows, LENGTHS, methods, results, about)
    assert [[row[name] for name in ("key", "columns")] for row in again] == [
        [row[name] for name in ("key", "columns")] for row in rows
    ]
    assert measured == [("d1", ["fixed"])]
    assert len(results.path.read_text().splitlines()) == len(rows)
