"""Save and load from folders, without the Hub: what is written, what is loaded, and what is refused."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_sparse
from hf_sparse import CalibrationRecord, SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.patching import policy_of
from hf_sparse.policy import Origin, Policy
from hf_sparse.policy.files import NAME, read, write
from hf_sparse.policy.origin import origin_of
from hf_sparse.policy.quality import QualityRow
from hf_sparse.policy.suitability import warn_of_another_base
from tests import small, tiny

IDS = tiny.tokens(1, 80)
HEADS = {0: 4, 1: 4}
FITS = CalibrationRecord(model_type="llama", layers=2, heads=HEADS)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model."""
    return small.save_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def model(base: Path) -> PreTrainedModel:
    """The small model, patched."""
    return hf_sparse.patch(_load(base), small.CONFIG)


def _load(folder: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return loaded


def _logits(model: PreTrainedModel) -> Tensor:
    return tiny.logits(model, IDS)


@pytest.mark.parametrize("weights", [False, True])
def test_what_was_saved_is_loaded(weights: bool, base: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    hf_sparse.save_pretrained(model, tmp_path, weights=weights)
    sparse = _logits(model)
    assert (sparse - _logits(_load(base))).abs().max() > 1e-3
    torch.testing.assert_close(_logits(hf_sparse.from_pretrained(tmp_path)), sparse, rtol=0, atol=1e-6)
    assert (tmp_path / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_what_a_policy_without_weights_consists_of(base: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    hf_sparse.save_pretrained(model, tmp_path / "new" / "folder")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {NAME, "README.md", "config.json"}
    policy = read(tmp_path / "new" / "folder" / NAME)
    assert policy.config == small.CONFIG
    assert policy.base_model == str(base)
    assert set(policy.versions) == {"hf_sparse", "torch", "transformers"}


def test_a_folder_with_weights_opens_dense_in_plain_transformers(
    base: Path, model: PreTrainedModel, tmp_path: Path
) -> None:
    hf_sparse.save_pretrained(model, tmp_path, weights=True)
    assert torch.equal(_logits(_load(tmp_path)), _logits(_load(base)))
    assert AutoTokenizer.from_pretrained(tmp_path)("w5 w7").input_ids == small.tokenizer()("w5 w7").input_ids
    assert read(tmp_path / NAME).base_model is None, "a path of this machine is of no use beside the weights"
    for path in tmp_path.glob("*.json"):
        if path.name != NAME:
            assert "hf_sparse" not in path.read_text(), path.name
    assert policy_of(hf_sparse.from_pretrained(tmp_path)).config == small.CONFIG


def test_the_configuration_is_that_of_the_weights_where_they_differ(model: PreTrainedModel, tmp_path: Path) -> None:
    """Bytes of the base that say float32 would make plain transformers load bfloat16 weights as float32."""
    hf_sparse.save_pretrained(model.to(torch.bfloat16), tmp_path, weights=True)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_model_that_was_never_loaded_is_saved_with_weights(tmp_path: Path) -> None:
    model = hf_sparse.patch(tiny.model("llama"), small.CONFIG)
    with pytest.warns(UserWarning, match="no tokenizer is saved.*not loaded from anywhere"):
        hf_sparse.save_pretrained(model, tmp_path / "full", weights=True)
    assert torch.equal(_logits(hf_sparse.from_pretrained(tmp_path / "full")), _logits(model))
    hf_sparse.save_pretrained(model, tmp_path / "policy")
    assert not (tmp_path / "policy" / "config.json").exists()
    with pytest.raises(UserError, match="names no base model"):
        hf_sparse.from_pretrained(tmp_path / "policy")
    again = hf_sparse.patch(tiny.model("llama"), tmp_path / "policy")
    assert torch.equal(_logits(again), _logits(model))


def test_the_tokenizer_may_be_given(tmp_path: Path) -> None:
    model = hf_sparse.patch(tiny.model("llama"), small.CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_sparse.save_pretrained(model, tmp_path, weights=True, tokenizer=small.tokenizer())
    assert AutoTokenizer.from_pretrained(tmp_path)("w5").input_ids == small.tokenizer()("w5").input_ids


def test_only_a_patched_model_is_saved_and_published(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not patched"):
        hf_sparse.save_pretrained(_load(base), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
        hf_sparse.push_to_hub(_load(base), "me/x")


def test_names_are_checked_first(
    model: PreTrainedModel, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    nothing: Any = None
    with pytest.raises(UserError, match=r"folder must be a path, '\.' for the current folder; got ''"):
        hf_sparse.save_pretrained(model, "")
    with pytest.raises(TypeError, match="repo_id must be user/name, or name; got None"):
        hf_sparse.push_to_hub(model, nothing)
    with pytest.raises(TypeError, match="a policy is named by a Hub id, a folder or a file; got None"):
        hf_sparse.from_pretrained(nothing)
    assert list(tmp_path.iterdir()) == []
    hf_sparse.save_pretrained(model, tmp_path / "new")
    with pytest.raises(UserError, match="new is here, not on the Hub: it has no revision 'main'"):
        hf_sparse.from_pretrained(tmp_path / "new", revision="main")


    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder"):
        hf_sparse.save_pretrained(model, tmp_path / "file")
    with pytest.raises(UserError, match="holds no results"):
        hf_sparse.save_pretrained(model, tmp_path / "newer", results=[tmp_path])
    assert not (tmp_path / "newer").exists()


def test_results_of_the_default_configuration_are_found(base: Path, tmp_path: Path) -> None:
    """The command that measures fills in what `patch` leaves to its default: both are the same configuration."""
    small.save_texts(tmp_path / "texts")
    data = ["--text", str(tmp_path / "texts"), "--lengths", "48,96", "--targets", "40", "--device", "cpu"]
    results = tmp_path / "results"
    command = ["perplexity", str(base), *data, "--methods", "grouped", "--output", str(results)]
    assert small.run_command(*command) == 0
    for config in (SparseAttentionConfig(), SparseAttentionConfig(engine="reference")):
        hf_sparse.save_pretrained(hf_sparse.patch(_load(base), config), tmp_path / "saved", results=[results])
        policy = read(tmp_path / "saved" / NAME)
        assert policy.config == config
        assert {row.metric for row in policy.quality} == {"perplexity", "perplexity_ratio"}
    options = ["--results", str(results), "--output", str(tmp_path / "card")]
    assert small.run_command("card", str(base), *options) == 0
    assert read(tmp_path / "card" / NAME).quality == policy.quality
    other = hf_sparse.patch(_load(base), alpha=99.0)
    with pytest.raises(UserError, match="holds no measurement of this configuration"):
        hf_sparse.save_pretrained(other, tmp_path / "other", results=[results])


def test_a_card_that_is_there_is_edited(model: PreTrainedModel, tmp_path: Path) -> None:
    card = "---\nlicense: mit\ntags:\n- mine\nlanguage: de\n---\n# My model\n\nMy words.\n"
    (tmp_path / "README.md").write_text(card)
    hf_sparse.save_pretrained(model, tmp_path)
    text = (tmp_path / "README.md").read_text()
    found = ModelCard(text)
    assert "# My model\n\nMy words.\n" in text
    assert "## Sparse attention" in text
    assert (found.data.license, found.data.language, found.data.tags[0]) == ("mit", "de", "mine")
    hf_sparse.save_pretrained(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == text


def test_a_base_saved_with_its_policy_in_its_own_folder(base: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    """A hand-made policy beside weights: the folder's own weights are what is meant."""
    tiny.model("llama", seed=3).save_pretrained(tmp_path)
    write(Policy(small.CONFIG), tmp_path / NAME)
    loaded = hf_sparse.from_pretrained(tmp_path)
    assert torch.equal(_logits(loaded), _logits(hf_sparse.patch(tiny.model("llama", seed=3), small.CONFIG)))


def test_arguments_reach_the_base_model(
    base: Path, model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_sparse.save_pretrained(model, tmp_path)
    load, asked = AutoModelForCausalLM.from_pretrained, []

    def from_pretrained(*names: str, **options: Any) -> PreTrainedModel:
        asked.append((*names, options))
        loaded: PreTrainedModel = load(*names, **options)
        return loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    loaded = hf_sparse.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu", quantization_config=None)
    assert loaded.dtype == torch.bfloat16
    given = {"dtype": torch.bfloat16, "device_map": "cpu", "quantization_config": None}
    assert asked == [(str(base), {"trust_remote_code": False, "use_safetensors": True, **given})]


def test_what_is_not_published_from_a_link_out_of_the_folder(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="is a link that leads out of"):
        hf_sparse.save_pretrained(model, tmp_path / "saved")
    assert (tmp_path / "secret").read_text() == "secret"


def test_the_base_may_be_said(model: PreTrainedModel, tmp_path: Path) -> None:
    hf_sparse.save_pretrained(model, tmp_path, base_model="someone/model", base_revision="a" * 40)
    policy = read(tmp_path / NAME)
    assert (policy.base_model, policy.revision) == ("someone/model", "a" * 40)


def test_another_base_may_be_named(model: PreTrainedModel, tmp_path: Path) -> None:
    hf_sparse.save_pretrained(model, tmp_path / "policy")
    tiny.model("llama", seed=5).save_pretrained(tmp_path / "other")
    loaded = hf_sparse.from_pretrained(tmp_path / "policy", base_model=tmp_path / "other")
    assert torch.equal(_logits(loaded), _logits(hf_sparse.patch(tiny.model("llama", seed=5), small.CONFIG)))


def test_quality_goes_with_the_policy_until_its_configuration_changes(base: Path, tmp_path: Path) -> None:
    row = QualityRow(method="grouped", length=64, value=1.5, low=1.4, high=1.6, model="m", documents=("a.txt",))
    write(Policy(small.CONFIG, quality=(row,)), tmp_path / "one" / NAME)
    model = hf_sparse.patch(_load(base), tmp_path / "one")
    hf_sparse.save_pretrained(model, tmp_path / "two")
    assert read(tmp_path / "two" / NAME).quality == (row,)
    assert "1.5000" in (tmp_path / "two" / "README.md").read_text()
    hf_sparse.patch(model, tmp_path / "one", alpha=3.0)
    hf_sparse.save_pretrained(model, tmp_path / "three")
    assert read(tmp_path / "three" / NAME).quality == ()
    assert "Nothing was measured" in (tmp_path / "three" / "README.md").read_text()


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


def test_laws_of_this_model_are_taken(base: Path, tmp_path: Path) -> None:
    write(Policy(replace(small.CONFIG, calibration=FITS), base_model=str(base)), tmp_path / NAME)
    assert policy_of(hf_sparse.from_pretrained(tmp_path)).config.calibration == FITS


def test_changed_laws_are_no_longer_calibrated(base: Path) -> None:
    config = replace(small.CONFIG, calibration=FITS)
    assert policy_of(hf_sparse.patch(_load(base), config, engine="reference")).config.calibration == FITS
    assert policy_of(hf_sparse.patch(_load(base), config, alpha=7.0)).config.calibration is None


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        (Origin("a/model", "1" * 40), "revision 0000.*this model is at 1111"),
        (Origin("a/other", "0" * 40), "made for a/model; this model is a/other"),
        (Origin("a/model", None, "2" * 40), "revision 0000.*this model may be at 2222"),
        (Origin("a/model", "0" * 40), None),
        (Origin("a/model", None, "0" * 40), None),
        (Origin("a/model"), None),
        (Origin("/some/folder"), None),
        (Origin(), None),
    ],
)
def test_another_revision_warns(origin: Origin, message: str | None) -> None:
    policies = [
        Policy(base_model="a/model", revision="0" * 40),
        Policy(SparseAttentionConfig(calibration=CalibrationRecord(base_model="a/model", revision="0" * 40))),
    ]
    for policy in policies:
        if message is not None:
            with pytest.warns(UserWarning, match=message):
                warn_of_another_base(policy, origin)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warn_of_another_base(policy, origin)


def test_what_was_measured_of_another_model_does_not_go_with_this_one(base: Path, tmp_path: Path) -> None:
    write(Policy(small.CONFIG, base_model="a/model", quality=(QualityRow(length=64, value=1.5),)), tmp_path / NAME)
    model: Any = _load(base)
    model.config._name_or_path = "a/other"
    with pytest.warns(UserWarning, match="made for a/model; this model is a/other"):
        hf_sparse.patch(model, tmp_path)
    assert policy_of(model) == Policy(small.CONFIG, base_model="a/model")


def test_where_a_model_came_from(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _load(base)
    assert origin_of(model) == Origin(str(base))
    monkeypatch.chdir(base.parent)
    assert origin_of(_load(Path(base.name))) == Origin(str(base))
    config: Any = model.config
    config._name_or_path, config._commit_hash = "someone/model", "c" * 40
    assert origin_of(model) == Origin("someone/model", "c" * 40)
    config._name_or_path = f"/cache/models--someone--model/snapshots/{'d' * 40}"
    assert origin_of(model) == Origin("someone/model", "d" * 40)
    assert origin_of(tiny.model("llama")) == Origin()


def test_rows_beyond_the_calibration_warn_once(base: Path) -> None:
    config = replace(small.CONFIG, calibration=replace(FITS, fitted_to=40))
    model = hf_sparse.patch(_load(base), config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny.logits(model, IDS[:, :40])
        assert not caught
        tiny.logits(model, IDS)
        tiny.logits(model, IDS)
    assert [str(warning.message)[:53] for warning in caught] == [
        "a row sees 80 keys, 2 times the 40 that the laws were"
    ]


def test_padding_is_not_what_a_row_sees(base: Path) -> None:
    model = hf_sparse.patch(_load(base), replace(small.CONFIG, calibration=replace(FITS, fitted_to=40)))
    ids, mask, _ = tiny.padded([40, 30], "left", extra=40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.logits(model, ids, mask)


def test_a_policy_of_code_is_not_run(base: Path, tmp_path: Path) -> None:
    """A configuration with `auto_map` beside the weights: no question is asked, no code is run."""
    hf_sparse.save_pretrained(hf_sparse.patch(_load(base), small.CONFIG), tmp_path, weights=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('run')")
    with pytest.raises(UserError, match=f"cannot load {tmp_path}"):
        hf_sparse.from_pretrained(tmp_path)


def test_an_adapter_is_not_saved_with_the_policy(model: PreTrainedModel, tmp_path: Path) -> None:
    class Adapter(torch.nn.Module):
        def __init__(self, inner: PreTrainedModel) -> None:
            super().__init__()
            self.inner = inner

        def get_base_model(self) -> PreTrainedModel:
            return self.inner

    with pytest.warns(UserWarning, match="the adapter is not part of the policy"):
        hf_sparse.save_pretrained(Adapter(model), tmp_path)
    with pytest.raises(UserError, match="merge it first"):
        hf_sparse.save_pretrained(Adapter(model), tmp_path, weights=True)


@pytest.mark.parametrize("base_model", [None, "/some/folder"])
def test_a_policy_that_nobody_else_could_load_is_not_published(base_model: str | None, model: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="is published with the Hub id of its base model"):
        hf_sparse.push_to_hub(model, "someone/x", token="hf_x", base_model=base_model)


def test_publishing_offline_is_one_error(model: PreTrainedModel) -> None:
    with pytest.raises(UserError, match=r"^cannot look at someone/x: HF_HUB_OFFLINE is set$"):
        hf_sparse.push_to_hub(model, "someone/x", token="hf_x", base_model="someone/base")


def test_patched_takes_a_policy_and_restores_what_was(base: Path, tmp_path: Path) -> None:
    write(Policy(small.CONFIG), tmp_path / NAME)
    model = hf_sparse.patch(_load(base), alpha=5.0)
    before = policy_of(model)
    with hf_sparse.patched(model, tmp_path):
        assert policy_of(model).config == small.CONFIG
    assert policy_of(model) == before
    assert policy_of(hf_sparse.patch(model, str(tmp_path))).config == small.CONFIG
