"""`ModelSource`: what a name stands for, and models that cannot be used."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_sparse.errors import UserError
from hf_sparse.share.source import ModelSource
from tests import tiny


@pytest.fixture
def folder(tiny_llama: Path) -> Path:
    return tiny_llama


def test_a_folder_gives_the_model_that_was_saved(folder: Path) -> None:
    source = ModelSource.find(str(folder))
    model, tokenizer, info = source.model(device_map="cpu"), source.tokenizer(), source.info()
    ids = tiny.tokens(1, 20)
    assert torch.equal(tiny.logits(model, ids), tiny.logits(tiny.model("llama"), ids))
    assert not model.training
    assert tokenizer("w5 w7", add_special_tokens=False)["input_ids"] == [5, 7]
    assert (info["name"], info["max_positions"], info["architecture"]) == ("tiny-llama", tiny.LONGEST, "llama")


def test_dtype_is_the_one_asked_for(folder: Path) -> None:
    source = ModelSource.find(str(folder))
    assert source.model(dtype="bfloat16").dtype == torch.bfloat16
    assert source.model().dtype == torch.float32


def test_nothing_of_the_machine_is_in_the_info(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    info = ModelSource.find(".").info()
    assert info == ModelSource.find(str(folder)).info()
    assert str(folder.parent) not in str(info)


def test_the_revision_of_a_folder_changes_with_its_weights(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    before = ModelSource.find(str(folder)).info()
    assert ModelSource.find(str(copy)).info() == before
    weights = load_file(copy / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, copy / "model.safetensors")
    assert ModelSource.find(str(copy)).info()["revision"] != before["revision"]


def test_a_gguf_file_is_identified_by_its_hash_and_dequantised(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    asked: list[tuple[Any, dict[str, Any]]] = []
    config = tiny.config("llama")

    def from_pretrained(location: str, **options: Any) -> Any:
        asked.append((location, options))
        return config

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    source = ModelSource.find(str(tmp_path / "some.gguf"))
    assert source.info()["name"] == "some.gguf"
    assert source.info()["revision"] == hashlib.sha256(b"GGUF").hexdigest()[:16]
    source.model()
    location, options = asked[-1]
    assert (location, options["gguf_file"]) == (str(tmp_path), "some.gguf")
    assert options["quantization_config"].dequantize


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.gguf", "no such file"),
        ("./missing", "is not a model"),
        ("/nowhere/model", "is not a model"),
        ("a/b/c", "is not a model"),
        ("notes.txt", "is not a model"),
        ("empty", "there is no config.json"),
        ("profile", "profile names no base model"),
        ("damaged.gguf", "cannot read the model damaged.gguf"),
        ("strange", "cannot read the model strange: .*martian"),
        ("headless", "cannot read the model headless"),
        ("torn", "cannot read the model torn"),
    ],
)
def test_unusable_models_are_named_in_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    for made in ("empty", "profile", "strange"):
        (tmp_path / made).mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "profile" / "sparse_config.json").write_text("{}")
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "martian"}')
    for made in ("headless", "torn"):
        shutil.copytree(folder, tmp_path / made)
    (tmp_path / "headless" / "model.safetensors").unlink()
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        ModelSource.find(name).model()
    assert "\n" not in str(caught.value)


def test_a_hub_out_of_reach_is_one_line_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'.\nCheck your connection.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(UserError, match=r"user/model: We couldn't connect .*; pass a folder or a \.gguf file"):
        ModelSource.find("user/model").tokenizer()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "float8"}, "dtype must be one of auto, float32"), ({"device_map": "warp"}, "device 'warp'")],
)
def test_wrong_options_are_refused(folder: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelSource.find(str(folder)).model(**options)
