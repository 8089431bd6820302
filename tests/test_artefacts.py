"""What releases saved is read to the same values ever after: `tests/artefacts/VERSION`, made by its `save.py`.

Those of 0.1.0 were published under `model_cards`, or saved by that release with spellings that are no longer written.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from setuptools.config.pyprojecttoml import read_configuration
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import SparseCache
from hf_sparse.config.files import load, read
from tests import small

ROOT = Path(__file__).parents[1]
RELEASES = sorted((ROOT / "tests/artefacts").glob("[0-9]*"))
POLICIES = [path for release in RELEASES for path in sorted(release.glob("policies/*.json"))]
MODELS = [release for release in RELEASES if (release / "model").exists()]

of_every_release = pytest.mark.parametrize("release", MODELS, ids=lambda release: release.name)

# Spellings that are read, and no longer written.
RENAMED = {("engine", "native"): "cpu", ("dense_below", None): 256}


def values(data: dict[str, Any]) -> dict[str, Any]:
    """What a file says, in the words of this release."""
    return {
        name: RENAMED.get((name, value), value) if isinstance(value, str | None) else value
        for name, value in data.items()
    }


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_a_policy_has_the_values_and_the_budgets_of_its_release(path: Path) -> None:
    expected = json.loads((path.parents[1] / "expected.json").read_text(encoding="utf-8"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # fields that are not known are kept with a warning
        policy = load(path)
    said, now = values(json.loads(path.read_text(encoding="utf-8"))), policy.to_dict()
    assert {name: now[name] for name in said} == said
    visible = torch.tensor(expected["visible"])
    for layer, budgets in expected["budgets"][path.stem].items():
        assert policy.config.budget(int(layer))(visible).reshape(-1, len(visible)).tolist() == budgets


def test_every_policy_has_budgets_and_every_release_a_policy() -> None:
    for release in RELEASES:
        expected = json.loads((release / "expected.json").read_text(encoding="utf-8"))
        assert expected["budgets"].keys() == {path.stem for path in release.glob("policies/*.json")} != set()


@of_every_release
def test_a_card_has_the_metadata_of_its_release(release: Path, tmp_path: Path) -> None:
    """Read, and written anew by this release, which leaves a card's metadata as they are."""
    for path in (release / "published").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    policy = read(tmp_path / "sparse_config.json")
    before = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert small.run_command("card", str(tmp_path)) == 0
    after = ModelCard.load(tmp_path / "README.md").data
    assert {name: after.to_dict()[name] for name in before if name != "model-index"} == {
        name: value for name, value in before.items() if name != "model-index"
    }
    figures = {(result.metric_name, result.metric_value) for result in after.eval_results or []}
    saved = before["model-index"][0]["results"]
    assert figures == {(metric["name"], metric["value"]) for result in saved for metric in result["metrics"]}
    assert len(figures) > 10
    assert policy.base_model == "someone/model"


@torch.no_grad()
@pytest.mark.parametrize("engine", ["reference", "gather", "auto"])
@pytest.mark.parametrize("selector", ["grouped", "topk", "window"])
@of_every_release
def test_a_model_has_the_logits_of_its_release(release: Path, selector: str, engine: str) -> None:
    saved = load_file(release / "logits.safetensors")
    expected = json.loads((release / "expected.json").read_text(encoding="utf-8"))
    model = hf_sparse.from_pretrained(release / "model", dtype="float32")
    hf_sparse.patch(model, release / "model", selector=selector, engine=engine)
    ids, cached = saved["ids"], saved["keys.0"].shape[2]
    cache = SparseCache(model.config)
    first = model(ids[:, :cached], past_key_values=cache, use_cache=True).logits[0]
    if selector == "grouped":
        for layer, held in enumerate(cache.layers):
            assert_close(held.keys, saved[f"keys.{layer}"], atol=1e-4, rtol=1e-4)
            assert_close(held.values, saved[f"values.{layer}"], atol=1e-4, rtol=1e-4)
    second = model(ids[:, cached:], past_key_values=cache, use_cache=True).logits[0]
    assert_close(torch.cat([first, second]), saved[f"logits.{selector}"], atol=1e-4, rtol=1e-4)
    assert hf_sparse.report(model).density == pytest.approx(expected["density"][selector], abs=1e-6) != 1.0


@torch.no_grad()
@of_every_release
def test_a_cache_is_continued_as_in_its_release(release: Path) -> None:
    saved = load_file(release / "logits.safetensors")
    model = hf_sparse.from_pretrained(release / "model", dtype="float32")
    cache = SparseCache(model.config)
    for layer in range(model.config.num_hidden_layers):
        cache.update(saved[f"keys.{layer}"], saved[f"values.{layer}"], layer)
    length = cache.get_seq_length()
    logits = model(saved["ids"][:, length:], past_key_values=cache, use_cache=True).logits[0]
    assert_close(logits, saved["logits.grouped"][length:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@of_every_release
def test_sparse_attention_is_what_the_logits_are_of(release: Path) -> None:
    """Dense ones differ by more than the tolerance."""
    saved = load_file(release / "logits.safetensors")
    dense = AutoModelForCausalLM.from_pretrained(release / "model", dtype="float32").eval()
    difference = dense(saved["ids"]).logits[0] - saved["logits.grouped"]
    assert difference.abs().amax() > 0.1


def test_this_release_has_artefacts_and_pyproject_takes_its_version() -> None:
    assert hf_sparse.__version__ in {release.name for release in RELEASES}
    assert read_configuration(ROOT / "pyproject.toml")["project"]["version"] == hf_sparse.__version__
    notes = (ROOT / "model_cards/notes/changes.md").read_text(encoding="utf-8")
    assert f"\n## {hf_sparse.__version__}\n" in notes
