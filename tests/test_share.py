"""Save and load from folders, without the Hub: what is written, what is loaded, and what is refused."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_sparse
from hf_sparse import CalibrationRecord, SparseAttentionConfig
from hf_sparse.config import Origin, Policy, origin_of
from hf_sparse.config.files import NAME, read, write
from hf_sparse.engines.reference import Reference
from hf_sparse.errors import UserError
from hf_sparse.patching import policy_of, warn_of_another_base
from hf_sparse.schema import QualityRecord
from hf_sparse.selectors import parse_selector
from hf_sparse.share.measured import Results
from tests import small, tiny

IDS = tiny.tokens(1, 80)
KEY_NORM = parse_selector(f"{Path(__file__).parents[1]}/scripts/selectors/key_norm.py:KeyNorm")
FITS = CalibrationRecord(model_type="llama", layers=2, heads={0: 4, 1: 4})


@pytest.fixture
def base(tiny_llama: Path) -> Path:
    """The folder of a small model."""
    return tiny_llama


@pytest.fixture
def model(base: Path) -> PreTrainedModel:
    """The small model, patched."""
    return hf_sparse.patch(_load(base), small.CONFIG)


def _load(folder: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return loaded


def _logits(model: PreTrainedModel) -> Tensor:
    return tiny.logits(model, IDS)


def test_a_policy_without_weights(base: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    folder = hf_sparse.save_pretrained(model, tmp_path / "new" / "folder")
    assert {path.name for path in folder.iterdir()} == {NAME, "README.md", "config.json"}
    assert (folder / "config.json").read_bytes() == (base / "config.json").read_bytes()
    policy = read(folder / NAME)
    assert (policy.config, policy.base_model) == (small.CONFIG, str(base))
    assert set(policy.versions) == {"hf_sparse", "torch", "transformers"}
    sparse = _logits(model)
    assert (sparse - _logits(_load(base))).abs().max() > 1e-3
    torch.testing.assert_close(_logits(hf_sparse.from_pretrained(folder)), sparse, rtol=0, atol=1e-6)
    other = hf_sparse.patch(_load(base), alpha=5.0)
    before = policy_of(other)
    with hf_sparse.patched(other, folder):
        assert policy_of(other).config == small.CONFIG
    assert policy_of(other) == before
    assert policy_of(hf_sparse.patch(other, str(folder))).config == small.CONFIG


def test_a_folder_with_weights_opens_dense_in_plain_transformers(
    base: Path, model: PreTrainedModel, tmp_path: Path
) -> None:
    hf_sparse.save_pretrained(model, tmp_path, weights=True)
    assert (tmp_path / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert torch.equal(_logits(_load(tmp_path)), _logits(_load(base)))
    assert AutoTokenizer.from_pretrained(tmp_path)("w5 w7").input_ids == small.tokenizer()("w5 w7").input_ids
    assert read(tmp_path / NAME).base_model is None, "a path of this machine is of no use beside the weights"
    assert [path.name for path in tmp_path.glob("*.json") if "hf_sparse" in path.read_text()] == [NAME]
    loaded = hf_sparse.from_pretrained(tmp_path)
    assert policy_of(loaded).config == small.CONFIG
    torch.testing.assert_close(_logits(loaded), _logits(model), rtol=0, atol=1e-6)
    assert small.run_command("card", str(tmp_path)) == 0
    assert read(tmp_path / NAME).weights, "the card of a folder with weights is still that of one"
    # Bytes of the base that say float32 would make plain transformers load bfloat16 weights as float32.
    hf_sparse.save_pretrained(model.to(torch.bfloat16), tmp_path, weights=True)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_model_that_was_never_loaded(tmp_path: Path) -> None:
    model = hf_sparse.patch(tiny.model("llama"), small.CONFIG)
    with pytest.warns(UserWarning, match="no tokenizer is saved.*not loaded from anywhere"):
        hf_sparse.save_pretrained(model, tmp_path / "full", weights=True)
    assert torch.equal(_logits(hf_sparse.from_pretrained(tmp_path / "full")), _logits(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_sparse.save_pretrained(model, tmp_path / "full", weights=True, tokenizer=small.tokenizer())
    assert AutoTokenizer.from_pretrained(tmp_path / "full")("w5").input_ids == small.tokenizer()("w5").input_ids
    hf_sparse.save_pretrained(model, tmp_path / "policy")
    assert not (tmp_path / "policy" / "config.json").exists()
    with pytest.raises(UserError, match="names no base model"):
        hf_sparse.from_pretrained(tmp_path / "policy")
    assert torch.equal(_logits(hf_sparse.patch(tiny.model("llama"), tmp_path / "policy")), _logits(model))


def test_what_is_wrong_is_found_first(
    model: PreTrainedModel, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    nothing: Any = None
    with pytest.raises(ValueError, match="is not patched"):
        hf_sparse.save_pretrained(_load(base), "new")
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
        hf_sparse.push_to_hub(_load(base), "me/x")
    with pytest.raises(UserError, match=r"folder must be a path, '\.' for the current folder; got ''"):
        hf_sparse.save_pretrained(model, "")
    with pytest.raises(TypeError, match="folder must be a path; got NoneType"):
        hf_sparse.save_pretrained(model, nothing)
    with pytest.raises(UserError, match="holds no results"):
        hf_sparse.save_pretrained(model, "new", results=[tmp_path])
    one: Any = str(tmp_path)
    with pytest.raises(TypeError, match="results must be a list of folders; got '/"):
        hf_sparse.save_pretrained(model, "new", results=one)
    with pytest.raises(TypeError, match="repo_id must be user/name, or name; got None"):
        hf_sparse.push_to_hub(model, nothing)
    for base_model in (None, "/some/folder"):
        with pytest.raises(UserError, match="is published with the Hub id of its base model"):
            hf_sparse.push_to_hub(model, "someone/x", token="hf_x", base_model=base_model)
    with pytest.raises(UserError, match=r"^cannot look at someone/x: HF_HUB_OFFLINE is set$"):
        hf_sparse.push_to_hub(model, "someone/x", token="hf_x", base_model="someone/base")
    with pytest.raises(TypeError, match="a policy is named by a Hub id, a folder or a file; got None"):
        hf_sparse.from_pretrained(nothing)
    with pytest.raises(UserError, match="here, not on the Hub: it has no revision 'main'"):
        hf_sparse.from_pretrained(base, revision="main")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder"):
        hf_sparse.save_pretrained(model, "file")


@pytest.mark.parametrize("config", [SparseAttentionConfig(), small.CONFIG], ids=["default", "saved"])
def test_results_go_with_the_policy_that_they_were_measured_under(
    config: SparseAttentionConfig, base: Path, tmp_path: Path
) -> None:
    """What a command measures of a policy, without options of the default one, with any engine."""
    saved, results = tmp_path / "saved", tmp_path / "results"
    hf_sparse.save_pretrained(hf_sparse.patch(_load(base), config), saved)
    small.save_texts(tmp_path / "texts")
    measured = str(saved if config == small.CONFIG else base)
    data = ["--text", str(tmp_path / "texts"), "--lengths", "48,96", "--targets", "40", "--device", "cpu"]
    command = ["perplexity", measured, *data, "--methods", "grouped", "--output", str(results)]
    assert small.run_command(*command) == 0
    other_engine = hf_sparse.patch(_load(base), config, engine="reference")
    hf_sparse.save_pretrained(other_engine, tmp_path / "again", results=[results])
    quality = read(tmp_path / "again" / NAME).quality
    assert {record.metric for record in quality} == {"perplexity", "perplexity_ratio"}
    assert {record.model for record in quality} == {"tiny-llama"}
    assert small.run_command("card", str(saved), "--results", str(results)) == 0
    assert read(saved / NAME).quality == quality
    with pytest.raises(UserError, match="holds no measurement of this configuration"):
        hf_sparse.save_pretrained(hf_sparse.patch(_load(base), alpha=99.0), tmp_path / "other", results=[results])
    assert not (tmp_path / "other").exists()


def test_which_base_is_loaded_and_how(model: PreTrainedModel, tmp_path: Path) -> None:
    hf_sparse.save_pretrained(model, tmp_path)
    given: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": "cpu", "quantization_config": None}
    loaded = hf_sparse.from_pretrained(tmp_path, use_cache=False, **given)
    assert loaded.dtype == torch.bfloat16
    assert not loaded.config.use_cache
    hf_sparse.save_pretrained(model, tmp_path, base_model="someone/model", base_revision="a" * 40)
    assert read(tmp_path / NAME).base == Origin("someone/model", "a" * 40)
    other = tiny.model("llama", seed=5)
    other.save_pretrained(tmp_path / "other")
    named = hf_sparse.from_pretrained(tmp_path, base_model=tmp_path / "other")
    write(Policy(small.CONFIG), tmp_path / "other" / NAME)  # by hand, beside weights: those are meant
    beside = hf_sparse.from_pretrained(tmp_path / "other")
    expected = _logits(hf_sparse.patch(other, small.CONFIG))
    assert torch.equal(_logits(named), expected)
    assert torch.equal(_logits(beside), expected)


def test_quality_goes_with_the_policy_until_its_configuration_or_model_changes(base: Path, tmp_path: Path) -> None:
    quality = (QualityRecord(method="grouped", length=64, value=1.5, low=1.4, high=1.6, documents=("a.txt",)),)
    write(Policy(small.CONFIG, base_model="a/model", quality=quality), tmp_path / NAME)
    model: Any = _load(base)
    for fields, kept, said in ({}, quality, "1.5000"), ({"alpha": 3.0}, (), "Nothing was measured"):
        hf_sparse.patch(model, tmp_path, **fields)
        hf_sparse.save_pretrained(model, tmp_path / "two")
        assert read(tmp_path / "two" / NAME).quality == kept
        assert said in (tmp_path / "two" / "README.md").read_text()
    model.config._name_or_path = "a/other"
    with pytest.warns(UserWarning, match="made for a/model; this model is a/other"):
        hf_sparse.patch(model, tmp_path)
    assert policy_of(model) == Policy(small.CONFIG, base_model="a/model")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (replace(FITS, model_type="gemma3_text"), "calibrated for model type 'gemma3_text'; this model has 'llama'"),
        (CalibrationRecord(architecture="OtherForCausalLM"), "calibrated for OtherForCausalLM"),
        (replace(FITS, layers=30), "calibrated for 30 attention layers; this model has 2"),
        (replace(FITS, heads={0: 4, 1: 9}), "calibrated for 9 query heads in layer 1; this model has 4"),
        (replace(FITS, heads={7: 4}), "calibrated for 4 query heads in layer 7; this model has no such layer"),
    ],
)
def test_laws_of_another_model_are_refused(
    record: CalibrationRecord, message: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(Policy(replace(small.CONFIG, calibration=record), base_model=str(base)), tmp_path / NAME)
    model = _load(base)
    with pytest.raises(ValueError, match=message):
        hf_sparse.patch(model, tmp_path)
    assert not hf_sparse.is_patched(model)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=message):
        hf_sparse.from_pretrained(tmp_path)


def test_laws_of_this_model_are_taken_until_they_are_changed(base: Path, tmp_path: Path) -> None:
    config = replace(small.CONFIG, calibration=replace(FITS, fitted_to=40))
    write(Policy(config, base_model=str(base)), tmp_path / NAME)
    model = hf_sparse.from_pretrained(tmp_path)
    assert policy_of(model).config.calibration == config.calibration
    ids, mask, _ = tiny.padded([40, 30], "left", extra=40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny.logits(model, IDS[:, :40])
        tiny.logits(model, ids, mask)
        assert not caught, "padding is not seen"
        tiny.logits(model, IDS)
        tiny.logits(model, IDS)
    assert len(caught) == 1
    assert "sees 80 keys, 2 times the 40 that the laws were" in str(caught[0].message)
    assert policy_of(hf_sparse.patch(model, config, engine="reference")).config.calibration == config.calibration
    assert policy_of(hf_sparse.patch(model, config, alpha=7.0)).config.calibration is None


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        (Origin("a/model", "1" * 40), "revision 0000.*this model is at 1111"),
        (Origin("a/other", "0" * 40), "made for a/model; this model is a/other"),
        (Origin("a/model", None, "2" * 40), "revision 0000.*this model may be at 2222"),
        *((origin, None) for origin in (Origin("a/model", "0" * 40), Origin("a/model", None, "0" * 40))),
        *((origin, None) for origin in (Origin("a/model"), Origin("/some/folder"), Origin())),
    ],
)
def test_another_revision_warns(origin: Origin, message: str | None) -> None:
    for policy in (
        Policy(base_model="a/model", revision="0" * 40),
        Policy(SparseAttentionConfig(calibration=CalibrationRecord(base_model="a/model", revision="0" * 40))),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            certain = warn_of_another_base(policy, origin)
        assert certain == (message is not None and origin.guess is None)
        assert len(caught) == (message is not None)
        assert message is None or re.search(message, str(caught[0].message))


def test_where_a_model_came_from(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = _load(base)
    monkeypatch.chdir(base.parent)
    assert origin_of(model) == origin_of(_load(Path(base.name))) == Origin(str(base))
    model.config._name_or_path, model.config._commit_hash = "someone/model", "c" * 40
    assert origin_of(model) == Origin("someone/model", "c" * 40)
    model.config._name_or_path = f"/cache/models--someone--model/snapshots/{'d' * 40}"
    assert origin_of(model) == Origin("someone/model", "d" * 40)
    assert origin_of(tiny.model("llama")) == Origin()


def test_an_adapter_is_not_saved_with_the_policy(model: PreTrainedModel, tmp_path: Path) -> None:
    class Adapter(torch.nn.Module):
        def get_base_model(self) -> PreTrainedModel:
            return model

    with pytest.warns(UserWarning, match="the adapter is not part of the policy"):
        hf_sparse.save_pretrained(Adapter(), tmp_path)
    with pytest.raises(UserError, match="merge it first"):
        hf_sparse.save_pretrained(Adapter(), tmp_path, weights=True)


class Mine(Reference):
    """An engine of a user's own."""

    name = "mine"


def root(n: Tensor) -> Tensor:
    return 2 * n.sqrt()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"selector": KEY_NORM}, "selector 'key-norm' is {}: publish one of grouped, topk, window"),
        ({"engine": Mine()}, "engine 'mine' is {}: publish one of auto, reference, gather, cpu, triton"),
        ({"law": root}, "law 'root' is {}: publish one of power, fixed, fraction, log"),
    ],
    ids=["selector", "engine", "law"],
)
def test_code_is_not_published(
    fields: dict[str, Any], message: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = message.format(r"code of your own and cannot be published in sparse_config\.json") + "$"
    model = hf_sparse.patch(_load(base), small.CONFIG, **fields)
    for weights in (False, True):
        with pytest.raises(UserError, match=message):
            hf_sparse.save_pretrained(model, tmp_path / "new", weights=weights, tokenizer=small.tokenizer())
        with pytest.raises(UserError, match=message):
            hf_sparse.push_to_hub(model, "someone/x", weights=weights, base_model="a/b", token="hf_x")
    with pytest.raises(UserError, match=message):
        write(policy_of(model), tmp_path / NAME)
    assert list(tmp_path.iterdir()) == []
    # The configuration as a summary of results has it.
    config = policy_of(model).config
    (tmp_path / NAME).write_text(json.dumps(config.to_dict()))
    capsys.readouterr()
    for command in (["card", str(base), "--output", str(tmp_path / "new")], ["publish", str(base), "someone/x"]):
        assert re.search(message, small.refusal(capsys, *command, "--policy", str(tmp_path)))
    assert not (tmp_path / "new").exists()
    # What was measured with an engine holds with any other; what another selector or law was measured at does not.
    results, plain = small.save_results(tmp_path / "results", config), hf_sparse.patch(_load(base), small.CONFIG)
    if "engine" in fields:
        hf_sparse.save_pretrained(plain, tmp_path / "new", results=[results])
        assert len(read(tmp_path / "new" / NAME).quality) == 20
    else:
        with pytest.raises(UserError, match="holds no measurement of this configuration"):
            hf_sparse.save_pretrained(plain, tmp_path / "new", results=[results])


def test_retrieval_that_does_not_count_is_not_taken_for_that_of_another_policy(tmp_path: Path) -> None:
    committed = Path(__file__).parents[1] / "model_cards/retrieval/qwen2.5-coder-1.5b/summary.json"
    summary = json.loads(committed.read_text(encoding="utf-8"))
    for verdict in summary["verdicts"]:
        verdict["above_dense"] = None
        for each in verdict["lengths"]:
            each["counted"] = 0
    (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    found = Results.read(tmp_path)
    with pytest.raises(UserError, match="no retrieval that counts: nowhere is the dense model surely better"):
        found.records(SparseAttentionConfig())
    with pytest.raises(UserError, match="holds no measurement of this configuration"):
        found.records(SparseAttentionConfig(alpha=99.0))
