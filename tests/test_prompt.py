"""`hf_sparse.kept_keys` and `hf-sparse inspect --prompt`: what sparse attention does to one text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hf_sparse
from hf_sparse import SparseCache
from tests import tiny
from tests.small import CONFIG, refusal, run_command, save_model, tokenizer, word_ids, words

TOKENS = 120


@pytest.mark.parametrize("selector", ["grouped", "topk", "window"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_they_are_what_a_written_token_attends_to(kind: str, selector: str) -> None:
    model = hf_sparse.patch(tiny.model(kind), replace(CONFIG, selector=selector, dense_layers=None))
    found = hf_sparse.kept_keys(model, tokenizer(bos=False), words(TOKENS))
    assert found.tokens == words(TOKENS).split()
    ids, cache = torch.tensor([word_ids(TOKENS)]), SparseCache(model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        weights = model(ids[:, -1:], past_key_values=cache, output_attentions=True).attentions
    assert sorted([*found.layers, *found.dense]) == list(range(tiny.LAYERS))
    assert found.layers
    for layer, kept in found.layers.items():
        assert torch.equal(kept, weights[layer][0, :, 0] > 0)
        assert 0 < kept.sum() < kept.numel()


def test_prompts_that_are_short_for_the_budget_are_kept_whole() -> None:
    model = hf_sparse.patch(tiny.model("llama"), replace(CONFIG, dense_below=64))
    found = hf_sparse.kept_keys(model, tokenizer(), words(20))
    assert found.shares.eq(1).all()
    assert found.section().facts["density"] == "1.000 in 2 sparse layers"


def test_the_model_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_sparse.patch(tiny.model("llama"), CONFIG)
    model(torch.tensor([word_ids(40)]))
    before = str(hf_sparse.report(model))
    hf_sparse.kept_keys(model, tokenizer(), words(TOKENS))
    assert str(hf_sparse.report(model)) == before
    monkeypatch.setattr(model, "forward", lambda **_: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        hf_sparse.kept_keys(model, tokenizer(), words(TOKENS))
    monkeypatch.undo()
    model(torch.tensor([word_ids(40)]))
    assert str(hf_sparse.report(model)) != before  # counts go on


def test_refusals() -> None:
    model = tiny.model("llama")
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
        hf_sparse.kept_keys(model, tokenizer(), words(TOKENS))
    hf_sparse.patch(model, CONFIG)
    with pytest.raises(ValueError, match="at least 2 tokens; got 1"):
        hf_sparse.kept_keys(model, tokenizer(bos=False), words(1))
    with pytest.raises(ValueError, match="at most 256 tokens, the model's maximum; got 257"):
        hf_sparse.kept_keys(model, tokenizer(), words(257))
    hf_sparse.patch(model, dense_layers=[0, 1])
    with pytest.raises(ValueError, match="all layers of LlamaForCausalLM run dense"):
        hf_sparse.kept_keys(model, tokenizer(), words(TOKENS))


def test_a_notebook_shows_text_and_picture() -> None:
    model = hf_sparse.patch(tiny.model("llama"), CONFIG)
    found = hf_sparse.kept_keys(model, tokenizer(), words(TOKENS))
    html = found._repr_html_()
    shares = found.shares.mean(0)
    for place in (0, 7, TOKENS - 1):
        share = float(shares[place])
        assert f'style="--share: {share:.3f}" title="{place}: {100 * share:.1f} %"' in html
    assert html.count("data:image/png;base64,") == 1


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    (tmp_path / "prompt.txt").write_text(words(TOKENS), encoding="utf-8")
    return save_model(tmp_path / "model")


def test_the_command(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, page = model_folder.parent / "prompt.txt", model_folder.parent / "page.html"
    assert run_command("inspect", str(model_folder), "--prompt", str(prompt), "--page", str(page)) == 0
    out = capsys.readouterr().out
    assert f"tokens: {TOKENS}" in out
    assert f"page: {page}" in out
    assert "<title>model: prompt.txt</title>" in page.read_text()
    assert run_command("inspect", str(model_folder), "--prompt", str(prompt), "--page", str(page), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dense_layers"] == [0]
    assert [len(own) for own in found["kept"]["1"]] == [TOKENS] * 4  # fewer than min_keys


def test_the_command_refuses(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(model_folder.parent / "missing.txt")
    assert "missing.txt cannot be read" in refusal(capsys, "inspect", str(model_folder), "--prompt", missing)
    prompt = str(model_folder.parent / "prompt.txt")
    arguments = ("inspect", str(model_folder), "--prompt", prompt)
    assert "dtype" in refusal(capsys, *arguments, "--dtype", "int3")
    assert "is not a policy" in refusal(capsys, *arguments, "--policy", "./missing")
    assert "cannot write to the folder" in refusal(capsys, *arguments, "--page", prompt + "/page.html")
    for option, value in {"--policy": "./missing", "--dtype": "int3", "--page": "page.html"}.items():
        assert f"{option} needs a --prompt" in refusal(capsys, "inspect", str(model_folder), option, value)
