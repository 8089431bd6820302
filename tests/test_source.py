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


def test_a_folder_gives_the_model_that_was_saved(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ModelSource.find(str(tiny_llama))
    model, tokenizer, info = source.model(device_map="cpu"), source.tokenizer(), source.info()
    ids = tiny.tokens(1, 20)
    assert torch.equal(tiny.logits(model, ids), tiny.logits(tiny.model("llama"), ids))
    assert not model.training
    assert tokenizer("w5 w7", add_special_tokens=False)["input_ids"] == [5, 7]
    assert (info["name"], info["max_positions"], info["architecture"]) == ("tiny-llama", tiny.LONGEST, "llama")
    assert (model.dtype, source.model(dtype="bfloat16").dtype) == (torch.float32, torch.bfloat16)
    monkeypatch.chdir(tiny_llama)
    assert info == ModelSource.find(".").info()
    assert str(tiny_llama.parent) not in str(info), "nothing of the machine is in it"


def test_the_revision_of_a_folder_changes_with_its_weights(tiny_llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_llama, tmp_path / tiny_llama.name)
    before = ModelSource.find(str(tiny_llama)).info()
    assert ModelSource.find(str(copy)).info() == before
    weights = load_file(copy / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, copy / "model.safetensors")
    assert ModelSource.find(str(copy)).info()["revision"] != before["revision"]


def test_a_gguf_file_is_identified_by_its_hash_and_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    asked: list[tuple[str, dict[str, Any]]] = []

    def from_pretrained(location: str, **options: Any) -> Any:
        asked.append((location, options))
        return tiny.config("llama")

    for kind in (transformers.AutoConfig, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    source = ModelSource.find(str(tmp_path / "some.gguf"))
    info = source.info()
    assert (info["name"], info["revision"]) == ("some.gguf", hashlib.sha256(b"GGUF").hexdigest()[:16])
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
        ("user/model", r"user/model: We couldn't connect .*; pass a folder or a \.gguf file"),
    ],
)
def test_unusable_models_are_named_in_one_line(
    name: str, message: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for made in ("empty", "profile", "strange"):
        (tmp_path / made).mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "profile" / "sparse_config.json").write_text("{}")
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "martian"}')
    for made in ("headless", "torn"):
        shutil.copytree(tiny_llama, tmp_path / made)
    (tmp_path / "headless" / "model.safetensors").unlink()
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        ModelSource.find(name).model()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "float8"}, "dtype must be one of auto, float32"), ({"device_map": "warp"}, "device 'warp'")],
)
def test_wrong_options_are_refused(tiny_llama: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelSource.find(str(tiny_llama)).model(**options)
