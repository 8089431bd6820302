"""Calibration: from error curves to laws, and what a whole run promises."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

import hf_sparse
from hf_sparse import SparseAttentionConfig
from hf_sparse.calibration import answers, measurements, solve
from hf_sparse.calibration.answers import TASKS, lost_share
from hf_sparse.calibration.calibrate import Calibration, run_calibration
from hf_sparse.calibration.curves import ErrorCurve, budget_grid, error_curves, visible_grid
from hf_sparse.calibration.laws import FAMILIES, Candidates, LawFit, interpolated
from hf_sparse.calibration.lookups import with_lookups
from hf_sparse.calibration.projection import output_weights
from hf_sparse.calibration.target import Target
from hf_sparse.config import files as policy_files
from hf_sparse.errors import UserError
from hf_sparse.measure.data import Document
from hf_sparse.measure.equal_cost import density
from hf_sparse.patching import LayerSupport
from hf_sparse.selectors import parse_selector
from hf_sparse.selectors.grouped import GROUP_QUERIES
from tests import small, tiny
from tests.measure import retrieval_texts

COMMITTED = sorted(path.parent for path in (Path(__file__).parents[1] / "model_cards").rglob("calibration.json"))
LENGTH = 1024
CONFIG = SparseAttentionConfig(min_keys=96, sink_keys=1, recent_keys=2, dense_below=0)
DOCUMENTS = [Document(f"d{i}", small.words(LENGTH + 80, seed=i)) for i in range(4)]


def long_model(name: str = "llama") -> PreTrainedModel:
    return tiny.model(name, max_position_embeddings=2048)


def calibration(
    folder: Path | None = None, target: str = "density=0.3", texts: list[Document] = DOCUMENTS, **options: Any
) -> Calibration:
    arguments: dict[str, Any] = {"config": CONFIG, "length": LENGTH, "folder": folder} | options
    return run_calibration(long_model(), small.tokenizer(), texts, target, **arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibration")


@pytest.fixture(scope="module")
def result(folder: Path) -> Calibration:
    return calibration(folder)


# What is measured.


@given(longest=st.integers(512, 20_000), shortest=st.sampled_from([128, 512]))
def test_curves_are_measured_at_whole_groups_within_the_text(longest: int, shortest: int) -> None:
    grid = visible_grid(shortest, longest)
    assert all(shortest <= n <= longest and n % GROUP_QUERIES == 0 for n in grid)
    assert grid[-1] == longest // GROUP_QUERIES * GROUP_QUERIES
    assert list(grid) == sorted(set(grid))
    assert all(low < n for n in grid for low in budget_grid(n))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_the_slices_of_the_projection_make_what_the_layer_adds(name: str) -> None:
    model = tiny.model(name)
    support = hf_sparse.inspect(model)
    module = model.get_submodule(support.layers[0].name)
    projection = next(child for key, child in module.named_children() if key in ("o_proj", "c_proj", "dense"))
    width = next(p.shape for p in projection.parameters() if p.dim() == 2)[name != "gpt2"]
    dim = width // 4
    heads = torch.randn(3, 4, dim)
    with torch.no_grad():
        expected = projection(heads.flatten(1)) - projection(torch.zeros(1, width))
    found = torch.einsum("rhd,hod->ro", heads, output_weights(module, 4, dim))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_curves_are_errors_of_the_layers_own_output() -> None:
    """Against transformers' own attention weights, value projection and output projection."""
    length, bare = 256, replace(CONFIG, selector="topk", sink_keys=0, recent_keys=0)
    model, ids = tiny.model("llama"), tiny.tokens(1, length)
    support = hf_sparse.inspect(model)
    modules = {layer.layer: model.get_submodule(layer.name) for layer in support.layers}
    curves = error_curves(model, ids[0], [length], modules, bare)
    eager = tiny.model("llama", attn_implementation="eager")
    values: list[torch.Tensor] = []
    for layer in eager.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda _m, _i, out: values.append(out))
    with torch.no_grad():
        weights = eager(input_ids=ids, use_cache=False, output_attentions=True).attentions
    for layer, curve in enumerate(curves):
        assert (curve.layer, curve.visible, curve.budgets) == (layer, length, (128, 181))
        p = weights[layer][0, :, -GROUP_QUERIES:].double()
        v = values[layer].view(length, 2, 16).transpose(0, 1).repeat_interleave(2, dim=0).double()
        projection = eager.model.layers[layer].self_attn.o_proj.weight.double().view(32, 4, 16)
        whole = torch.einsum("ohd,hrd->ro", projection, p @ v).square().sum()
        for place, keys in enumerate(curve.budgets):
            kept = p * (p.argsort(-1, descending=True).argsort(-1) < keys)
            error = torch.einsum("ohd,hrd->hro", projection, (kept / kept.sum(-1, keepdim=True) - p) @ v)
            expected = error.square().sum((1, 2)) / whole
            assert [head[place] for head in curve.errors] == pytest.approx(expected.tolist(), rel=2e-3)


def test_a_curve_survives_json() -> None:
    curve = ErrorCurve(3, 512, (96, 128), ((0.5, 0.25), (0.125, 0.0)))
    assert ErrorCurve.from_dict(json.loads(json.dumps(curve.to_dict()))) == curve


# From curves to laws.


def made_curves(heads: dict[int, list[tuple[float, float]]], longest: int = 8192) -> list[ErrorCurve]:
    """Curves of heads with the error a * n ** (2 * c) / k, by layer: their best law is sqrt(a / price) * n ** c."""
    return [
        ErrorCurve(
            layer,
            n,
            budgets := budget_grid(n),
            tuple(tuple(a * n ** (2 * c) / k for k in budgets) for a, c in pairs),
        )
        for layer, pairs in heads.items()
        for n in visible_grid(1024, longest)
    ]


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.5, 0.7])
def test_a_law_of_known_shape_is_found(exponent: float) -> None:
    middle = 3000.0
    scale = 400 / middle**exponent  # 400 keys at 3,000 visible ones
    fit = LawFit({"d": made_curves({0: [(scale**2, exponent)]})}, {0: 1.0}, 96)
    [law] = fit.choose(price=1.0)
    assert fit.laws.exponent[law] == pytest.approx(exponent, abs=0.051)
    assert fit.laws.keys([middle])[0, law] == pytest.approx(400, rel=0.2)


def test_errors_are_linear_in_the_logarithm_of_the_kept_keys() -> None:
    errors = [[4.0, 1.0, 0.0], [8.0, 8.0, 2.0]]
    kept = [64, 128, 128 * 2**0.5, 256, 512, 1024]
    found = interpolated([128, 256, 512], errors, kept)
    assert found == pytest.approx(np.array([[4, 4, 2.5, 1, 0, 0], [8, 8, 8, 8, 2, 2]]))
    each = interpolated([128, 256, 512], errors, [[64, 256], [512, 256]])
    assert each == pytest.approx(np.array([[4, 1], [2, 8]]))


def test_no_other_laws_of_equal_cost_lose_less() -> None:
    """Water-filling with one price, against all pairs of laws that two heads could have."""
    fit = LawFit({"d": made_curves({0: [(90.0, 0.2)], 1: [(2.0, 0.7)]})}, {0: 1.0, 1: 0.3}, 96)
    power = fit.laws.family("power")
    cost, risk = fit.cost[power], fit.risk.mean(0)[:, power]
    total_cost, total_risk = cost[:, None] + cost, risk[0][:, None] + risk[1]
    for price in (3e-2, 1e-1, 3e-1):
        chosen = fit.choose(price)
        affordable = total_cost <= fit.cost[chosen].sum() * (1 + 1e-12)
        assert 1 < affordable.sum() < affordable.size
        assert fit.risk_of(chosen) == pytest.approx(total_risk[affordable].min(), rel=1e-12)


def test_dearer_keys_are_kept_more_rarely() -> None:
    fit = LawFit({"d": made_curves({0: [(90.0, 0.2), (2.0, 0.7)]})}, {0: 1.0}, 96)
    costs = [fit.cost[fit.choose(10.0**power)].sum() for power in range(-6, 1)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 3 * costs[-1]


def test_a_head_without_error_keeps_the_fewest_keys() -> None:
    fit = LawFit({"d": made_curves({0: [(0.0, 0.5), (90.0, 0.5)]})}, {0: 1.0}, 128)
    quiet, loud = fit.choose(1e-3)
    assert fit.cost[quiet] == 128
    assert fit.cost[loud] > 128


def test_rows_that_stay_dense_cost_all_their_keys_under_every_law() -> None:
    fit = LawFit({"d": made_curves({0: [(90.0, 0.5)]}, 2048)}, {0: 1.0}, 96, dense_below=4096)
    assert fit.cost.min() == fit.cost.max()
    assert np.abs(fit.risk).max() == 0


def test_intervals_hold_the_law_and_widen_with_the_documents() -> None:
    alike = {f"d{i}": made_curves({0: [(90.0, 0.5)]}) for i in range(5)}
    unlike = {f"d{i}": made_curves({0: [(90.0 * 3.0**i, 0.3 + 0.1 * i)]}) for i in range(5)}
    [(low, high, exponent_low, exponent_high)] = LawFit(alike, {0: 1.0}, 96).intervals(1.0, seed=0)
    assert low == high
    assert exponent_low == exponent_high
    fit = LawFit(unlike, {0: 1.0}, 96)
    [(low, high, exponent_low, exponent_high)] = fit.intervals(1.0, seed=0)
    assert low < high
    assert exponent_low <= fit.laws.exponent[fit.choose(1.0)[0]] <= exponent_high


def test_the_family_that_made_the_curves_is_best_on_documents_left_out() -> None:
    for exponent, name in ((0.0, "constant"), (1.0, "linear")):
        scale = 300 / 3000**exponent
        curves = {f"d{i}": made_curves({0: [((1 + 0.1 * i) * scale**2, exponent)]}) for i in range(3)}
        costs = LawFit(curves, {0: 1.0}, 96).held_out(1.0)
        assert set(costs) == set(FAMILIES)
        other = "linear" if name == "constant" else "constant"
        assert costs[name] < 0.95 * costs[other]
        assert costs[name] <= costs["power"] * 1.02


def test_a_left_out_document_has_no_part_in_its_own_laws() -> None:
    low, high = (made_curves({0: [(size, 0.5)]}) for size in (90.0, 900.0))
    fit = LawFit({"low": low, "high": high}, {0: 1.0}, 96)
    from_low, from_high = (LawFit({"d": curves}, {0: 1.0}, 96).choose(1.0) for curves in (low, high))
    expected = (fit.risk[1, 0, from_low] + fit.risk[0, 0, from_high]) / 2
    assert fit.held_out_error(1.0) == pytest.approx(expected.item(), rel=1e-12)
    assert from_low.tolist() != from_high.tolist()


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_laws_follow_from_the_grid_and_reach_what_they_say(folder: Path) -> None:
    """The error curves behind them are too large to commit: everything that does not need these is worked out anew."""
    data = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    config = SparseAttentionConfig.from_dict(data["config"])
    [published] = [path for path in (folder, folder.parent) if (path / policy_files.NAME).is_file()]
    assert policy_files.read(published / policy_files.NAME).config == config
    record = config.calibration
    assert record is not None
    assert record.intervals is not None
    assert config.per_head is not None
    fitted = [LayerSupport(layer, "", record.heads[layer], 1, None) for layer in record.intervals]
    assert density(config, fitted, [record.reached_at or 0]) == data["density"]
    found = data["density"]
    if record.target == "retrieval_loss":
        rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
        found = lost_share([row for row in rows if row["document"] in record.held_out])
    assert found == record.reached == data["reached"]
    assert str(Target(record.target, record.target_value, record.reached_at)) == data["target"]
    grid = Candidates.spanning(record.fitted_to, config.min_keys)
    power = grid.family("power")
    laws = {(float(f"{a:.4g}"), c) for a, c in zip(grid.alpha[power], grid.exponent[power], strict=True)}
    alphas, exponents = ({law[i] for law in laws} for i in (0, 1))
    for layer, heads in config.per_head.items():
        assert set(heads) <= laws
        for low, high, exponent_low, exponent_high in record.intervals[layer]:
            assert {low, high} <= alphas
            assert {exponent_low, exponent_high} <= exponents


# Whole runs.


def test_the_target_is_reached_and_what_was_found_can_be_patched(result: Calibration) -> None:
    assert result.met
    assert 0.27 < result.density <= 0.3
    record = result.config.calibration
    assert record is not None
    assert result.config.per_head is not None
    assert record.documents == ("d0", "d1", "d2")
    assert record.held_out == ("d3",)
    assert (record.fitted_from, record.fitted_to, record.reached_at) == (512, LENGTH, LENGTH)
    assert {layer: len(laws) for layer, laws in result.config.per_head.items()} == record.heads
    assert record.intervals is not None
    for layer, laws in result.config.per_head.items():
        assert [len(interval) for interval in record.intervals[layer]] == [4] * len(laws)
    model = hf_sparse.patch(long_model(), result.config)
    tiny.logits(model, tiny.tokens(1, LENGTH))
    assert hf_sparse.report(model).density == pytest.approx(result.density, abs=2e-3)
    [measured] = [row for row in result.check["results"] if row["method"] == "calibrated"]
    [uniform] = [row for row in result.check["results"] if row["method"] == "uniform"]
    assert measured["density"] == pytest.approx(uniform["density"], rel=0.01)


def test_files_hold_the_result(folder: Path, result: Calibration) -> None:
    assert policy_files.read(folder / "sparse_config.json").config == result.config
    assert json.loads((folder / "calibration.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    assert str(folder) not in (folder / "calibration.json").read_text()


def test_nothing_is_measured_twice(folder: Path, result: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "error_curves", None)
    lines = {path.name: path.read_text() for path in folder.glob("*.jsonl")}
    assert set(lines) == {"curves.jsonl", "probes.jsonl", "check.jsonl"}
    again = calibration(folder)
    assert again.config == result.config
    assert {path.name: path.read_text() for path in folder.glob("*.jsonl")} == lines
    # Another target needs no other measurements of the heads.
    assert calibration(folder, "output_error=0.3").met


def test_a_killed_run_goes_on_where_it_was(
    folder: Path, result: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in folder.glob("*.jsonl"):
        text = path.read_text()
        (tmp_path / path.name).write_text(text[: -len(text.splitlines()[-1]) // 2])
    measured: list[int] = []
    real = error_curves

    def counting(*args: Any) -> list[ErrorCurve]:
        measured.append(1)
        return real(*args)

    monkeypatch.setattr(measurements, "error_curves", counting)
    assert calibration(tmp_path).config == result.config
    assert len(measured) == 1


def test_held_out_texts_decide_nothing(folder: Path, result: Calibration) -> None:
    names = [json.loads(line)["document"] for line in (folder / "curves.jsonl").read_text().splitlines()]
    assert names == ["d0", "d1", "d2"]
    other = Document("other", small.words(LENGTH + 80, seed=9))
    again = calibration(folder, texts=DOCUMENTS[:3], held_out=[other])
    assert again.config.per_head == result.config.per_head
    assert again.check["documents"][0]["document"] == "other"
    assert len((folder / "curves.jsonl").read_text().splitlines()) == 3


def test_a_perplexity_is_sought_on_fitted_texts_and_measured_on_others(folder: Path, result: Calibration) -> None:
    found = calibration(folder, "perplexity_ratio=1.2")
    rows = [json.loads(line) for line in (folder / "check.jsonl").read_text().splitlines()]
    assert {row["document"] for row in rows} - {"other"} == {"d0", "d3"}
    assert {document["document"] for document in found.check["documents"]} == {"d3"}
    [measured] = [row for row in found.check["results"] if row["method"] == "calibrated"]
    assert found.reached == measured["ratio"]


def answered(*methods: tuple[str, list[bool]]) -> list[dict[str, Any]]:
    """Records of one prompt: whether the true answers are picked, by method."""
    return [
        {"method": method, "prompt_sha256": "a", "answers": [{"picked": one} for one in picked]}
        for method, picked in methods
    ]


def test_answers_are_lost_of_those_that_the_dense_model_picks() -> None:
    dense = [True, True, True, True, False, False]
    assert lost_share(answered(("dense", dense), ("calibrated", dense))) == 0
    assert lost_share(answered(("calibrated", [True, False, True, True, True, False]), ("dense", dense))) == 1 / 4
    with pytest.raises(UserError, match=r"the dense model picks none of 2 answers \(needle-single, .*retrieval_loss"):
        lost_share(answered(("dense", [False, False]), ("calibrated", [True, True])))


def test_lost_answers_are_sought_on_fitted_texts_and_measured_on_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solve, "_TRIALS", 3)
    monkeypatch.setattr(answers, "TASKS", TASKS[:1])
    texts = [Document(f"d{i}", retrieval_texts.text(LENGTH + 80, i)) for i in range(4)]
    model = retrieval_texts.model(max_position_embeddings=2048)
    tokenizer = retrieval_texts.tokenizer()
    found = run_calibration(
        model, tokenizer, texts, "retrieval_loss=0.2", config=CONFIG, length=LENGTH, folder=tmp_path
    )
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {(row["task"], row["length"]) for row in rows} == {(TASKS[0], LENGTH)}

    def losses(*documents: str) -> dict[float, float]:
        """Lost answers about some texts, by the density of what was tried."""
        own = [row for row in rows if row["document"] in documents]
        tried = {row["density"] for row in own} - {1.0}
        return {at: lost_share([row for row in own if row["density"] in (1, at)]) for at in tried}

    # The sparsest laws that lose few enough on the fitted texts are checked on the held-out one.
    tried, [(density, lost)] = losses("d0", "d1", "d2"), losses("d3").items()
    assert {row["document"] for row in rows} == {document.name for document in texts}
    assert tried[density] <= 0.2
    assert {at for at, share in tried.items() if share > 0.2} == {at for at in tried if at < density} != set()
    assert found.reached == lost
    assert found.met == (lost <= 0.2)


def test_a_model_that_answers_nothing_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "TASKS", TASKS[:1])
    monkeypatch.setattr(measurements, "error_curves", None)
    texts = [Document(f"d{i}", retrieval_texts.text(LENGTH + 80, i)) for i in range(4)]
    model = retrieval_texts.model(max_position_embeddings=2048)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(UserError, match="the dense model picks none of 48 answers"):
        run_calibration(model, retrieval_texts.tokenizer(), texts, "retrieval_loss=0.2", config=CONFIG, length=LENGTH)


def test_a_target_that_is_not_reached_is_said_so(folder: Path, result: Calibration) -> None:
    with pytest.warns(UserWarning, match=r"the target density=0\.01 was not reached: 0\.\d"):
        config = hf_sparse.calibrate(
            long_model(),
            small.tokenizer(),
            DOCUMENTS,
            "density=0.01",
            config=CONFIG,
            length=LENGTH,
            folder=folder,
        )
    assert config.calibration is not None
    assert config.calibration.reached is not None
    assert config.calibration.reached > 0.01


def test_only_full_layers_of_a_hybrid_model_have_laws() -> None:
    model = long_model("gemma3")
    texts = [document.text for document in DOCUMENTS]
    found = run_calibration(model, small.tokenizer(), texts, "density=0.4", config=CONFIG, length=LENGTH)
    assert found.config.dense_layers == (0,)
    assert found.config.per_head is not None
    assert set(found.config.per_head) == {1}
    assert found.met
    [row] = [row for row in found.check["results"] if row["method"] == "calibrated"]
    assert row["sparse_density"] == pytest.approx(found.density, abs=2e-3)
    assert row["density"] != row["sparse_density"]


def test_the_model_is_left_as_it_was(folder: Path, result: Calibration) -> None:
    model = long_model().train()
    ids = tiny.tokens(1, 50)
    before = tiny.logits(model, ids)
    run_calibration(model, small.tokenizer(), DOCUMENTS, "density=0.3", config=CONFIG, length=LENGTH, folder=folder)
    assert model.training
    assert not hf_sparse.is_patched(model)
    assert torch.equal(tiny.logits(model, ids), before)


def test_a_selector_of_a_users_own_is_calibrated_and_no_file_claims_to_hold_it(
    tmp_path: Path, result: Calibration
) -> None:
    selector = parse_selector(f"{Path(__file__).parents[1] / 'scripts' / 'selectors' / 'key_norm.py'}:KeyNorm")
    found = calibration(tmp_path, texts=DOCUMENTS[:3], config=replace(CONFIG, selector=selector))
    assert found.met
    assert found.config.selector == selector
    assert found.config.calibration is not None
    assert found.config.calibration.selector == "key-norm"
    assert json.loads((tmp_path / "calibration.json").read_text())["config"]["selector"]["class"] == "KeyNorm"
    assert not (tmp_path / policy_files.NAME).exists()
    assert found.check["results"] != result.check["results"]


def test_beyond_the_fitted_length_only_on_request() -> None:
    with pytest.raises(ValueError, match=r"density=0\.3@1100 lies at 1\.07 times the 1024 tokens"):
        calibration(target="density=0.3@1100")
    found = calibration(target="density=0.3@1100", extrapolate=True)
    assert found.config.calibration is not None
    assert (found.config.calibration.fitted_to, found.config.calibration.reached_at) == (LENGTH, 1100)
    assert found.check["lengths"] == [1100]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 512}, "at least 1024 tokens; got 512"),
        ({"length": 1200}, "is too short: it has 1104 tokens"),
        ({"length": 4096}, "length 4096 is above the maximum of this model, 2048 tokens"),
        (
            {"target": "density=0.3@4096", "extrapolate": True},
            "the target density=0.3@4096 is above the maximum of this model, 2048 tokens",
        ),
        (
            {"length": None, "held_out": [Document("empty.txt", "")]},
            "empty.txt is too short: it has 0 tokens, and 1025",
        ),
        ({"config": replace(CONFIG, dense_layers=(9,))}, r"dense_layers names layers \[9\]"),
        ({"held_out": [DOCUMENTS[0]]}, "d0 and d0 are the same text"),
        ({"held_out": [Document("d1", "other")]}, "two texts have the name d1"),
        ({"held_out": []}, "two texts to fit laws to and one more"),
        ({"texts": DOCUMENTS[:2]}, "got 1 and 1"),
        ({"config": SparseAttentionConfig(law="fixed", keys=200)}, "law='power' and without per_head"),
        ({"config": replace(CONFIG, dense_layers=(0, 1))}, "no layer to fit a law to: all 2 are dense"),
        ({"target": "speed=2"}, "target metric must be one of density"),
        ({"target": "density=2"}, "density must be above 0 and below 1; got 2.0"),
        ({"target": "perplexity_ratio=0.9"}, "above 1 and below inf"),
        ({"target": "retrieval_loss=0"}, "retrieval_loss must be above 0 and below 1; got 0.0"),
        ({"target": "retrieval_loss=0.1"}, "d0 has 0 different words that copying can use"),
        ({"target": "density"}, "METRIC=VALUE or METRIC=VALUE@LENGTH"),
        ({"target": "density=1e"}, "METRIC=VALUE or METRIC=VALUE@LENGTH"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_anything_is_measured(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurements, "error_curves", None)
    with pytest.raises(ValueError, match=message):
        calibration(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": "a string"}, "texts must be a list of texts; got 'a string'"),
        ({"texts": None}, "texts must be a list of texts; got None"),
        ({"texts": [3, 4, 5]}, "each text must be a str or a Document; got 3"),
        ({"held_out": "a string"}, "held-out texts must be a list of texts; got 'a string'"),
    ],
)
def test_texts_are_lists_of_texts(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        calibration(**options)


def test_a_patched_model_and_one_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="laws are fitted to 1024 tokens or more, above the maximum of this model, 256"):
        run_calibration(tiny.model("llama"), small.tokenizer(), DOCUMENTS)
    with pytest.raises(ValueError, match="LlamaForCausalLM is patched"):
        run_calibration(hf_sparse.patch(long_model()), small.tokenizer(), DOCUMENTS)
    with pytest.raises(ValueError, match="BloomForCausalLM cannot be patched"):
        run_calibration(tiny.unsupported("bloom"), small.tokenizer(), DOCUMENTS)


def test_targets_are_written_as_they_are_read() -> None:
    for text in ("density=0.15@4096", "output_error=0.01", "perplexity_ratio=1.005", "retrieval_loss=0.02@8192"):
        assert str(Target.parse(text)) == text
    assert Target.parse(" density = 0.15 @ 4096 ") == Target("density", 0.15, 4096)
    assert math.isclose(Target.parse("output_error=1e-3").value, 1e-3)


# Look-ups.

LETTERS = "abcdefghij"
PROSE = " ".join(f"{a}{b}{c}{d}." for a in LETTERS for b in LETTERS for c in LETTERS for d in LETTERS)


def test_repeated_notes_say_the_same_near_and_far() -> None:
    (document,) = with_lookups([Document("text", PROSE)], seed=3)
    notes = re.findall(r"Entry (\d+) of the register: ([^.]+)\.", document.text)
    said = dict(notes)
    assert all(said[number] == words for number, words in notes)
    assert len(set(said.values())) == len(said)
    again = [i for i, note in enumerate(notes) if note in notes[:i]]
    assert 0.3 < len(again) / len(notes) < 0.7
    distance = [next(back for back in range(1, i + 1) if notes[i - back] == notes[i]) for i in again]
    assert min(distance) == 1
    assert max(distance) > 20
    assert with_lookups([Document("text", PROSE)], seed=3) == [document]


def test_a_text_of_few_words_cannot_hold_look_ups() -> None:
    with pytest.raises(UserError, match=r"poem has 2 different words; look-ups take 100 of 4 to 9 letters"):
        with_lookups([Document("poem", "rose rose gate rose")], seed=0)


def test_laws_are_fitted_to_look_ups_beside_prose(result: Calibration) -> None:
    texts = [Document(document.name, f"{document.text} {PROSE}") for document in DOCUMENTS]
    plain, noted = (calibration(texts=texts, lookups=lookups) for lookups in (False, True))
    assert plain.config.per_head == result.config.per_head
    assert noted.config.per_head != plain.config.per_head
    assert noted.config.calibration is not None
    assert noted.config.calibration.documents == tuple(
        name for document in DOCUMENTS[:3] for name in (document.name, f"{document.name}, with look-ups")
    )
    assert noted.config.calibration.held_out == ("d3",)
