"""Support by probing: the probes hold where they should, catch what is broken, and the committed table is whole."""

from __future__ import annotations

import os
import runpy
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaAttention

import hf_sparse
from hf_sparse import SupportReport, attention, interface
from hf_sparse.probing import PROBES, default_config, evidence, probe, shrink, small_model
from tests.blind import blind_to_offsets, blind_to_padding, blind_to_windows

ROOT = Path(__file__).parents[1]
TABLE = runpy.run_path(str(ROOT / "scripts/support_table.py"))
RECORDS = TABLE["records"]()
VERSIONS = {record["transformers"] for record in RECORDS.values()}

of_the_table = pytest.mark.skipif(
    {transformers.__version__} != VERSIONS, reason=f"the table is of transformers {', '.join(VERSIONS)}"
)


# One for soft caps, chunks, latent and shared keys, recurrent layers, weights shared by layers, towers for images.
@pytest.mark.parametrize(
    "architecture",
    ["llama", "gemma2", "gpt_oss", "llama4_text", "deepseek_v3", "gemma4_text", "zamba2", "phi4_multimodal"],
)
def test_probes_prove_that_an_architecture_can_be_patched(architecture: str) -> None:
    record = TABLE["examined"](architecture)
    assert TABLE["verdict"](record) == "patched", record
    assert record["probes"].keys() == PROBES.keys()
    assert all(one["held"] for name, one in record["probes"].items() if name != "padding inside")


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("falcon", "does not go through transformers' AttentionInterface"),
        ("mamba", "no attention"),
        ("bart", "not causal"),
        ("deepseek_v32", "chooses keys itself (it passes indices)"),
        ("doge", "DogeAttention changes the mask"),
        ("inkling_text", "InklingAttention passes position_bias"),
        ("gemma4_unified_assistant", "not causal"),
    ],
)
def test_a_refusal_gives_its_true_reason(architecture: str, reason: str) -> None:
    record = TABLE["examined"](architecture)
    assert TABLE["verdict"](record) == "refused", record
    assert any(reason in found for found in record["reasons"])


def test_a_wrong_reason_is_told_from_a_true_one() -> None:
    seen = evidence(small_model(default_config("llama")))
    for reason in (
        "does not go through",
        "has no attention",
        "not causal",
        "passes",
        "chooses keys",
        "changes the mask",
    ):
        assert seen.against(SupportReport("LlamaForCausalLM", False, (reason,), ()))


def test_a_small_configuration_has_every_kind_of_layer() -> None:
    large = default_config("qwen3_next")
    small = shrink(large)
    assert set(small.layer_types) == set(large.layer_types)
    assert small.num_hidden_layers <= 8
    assert small.hidden_size <= 64


@pytest.mark.parametrize("architecture", ["gemma3", "musicgen_melody", "phi4_multimodal", "qwen3_5"])
def test_a_configuration_is_as_good_as_a_model(architecture: str) -> None:
    """Also where it holds that of the text tower, which alone the class of the language model takes."""
    config = default_config(architecture)
    by_config, by_model = hf_sparse.inspect(config), hf_sparse.inspect(small_model(config))
    assert by_config.supported
    assert by_config.architecture == by_model.architecture
    assert len(by_config.layers) > len(by_model.layers) > 0
    assert {"vision" in layer.name or "audio" in layer.name for layer in by_config.layers} == {False}


def test_images_are_seen_as_before() -> None:
    model = small_model(default_config("gemma3"))
    size, patches = model.config.vision_config.image_size, model.config.mm_tokens_per_image
    ids = torch.randint(1, 90, (1, 40), generator=torch.Generator().manual_seed(0))
    ids[0, 10 : 10 + patches] = model.config.image_token_id
    inputs = {"input_ids": ids, "token_type_ids": (ids == model.config.image_token_id).long()}
    inputs["pixel_values"] = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model(**inputs).logits
        without = model(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
        with hf_sparse.patched(model, dense_layers=(), dense_below=0, alpha=1e9, selector="topk"):
            assert torch.allclose(model(**inputs).logits, dense, atol=1e-4)
        with hf_sparse.patched(model, dense_layers=(), dense_below=0, alpha=1.0, min_keys=2, selector="topk"):
            assert not torch.allclose(model(**inputs).logits, dense, atol=1e-2)
    assert not torch.allclose(without, dense, atol=1e-2)


def failed(architecture: str, change: Any = None) -> set[str]:
    """The probes that do not hold, of a small model that `change` was done to."""
    model = small_model(default_config(architecture))
    if change is not None:
        change(model)
    support = hf_sparse.inspect(model)
    assert support.supported
    return {name for name, one in probe(model, support).items() if one.held is False}


@pytest.mark.parametrize(("ignored", "name"), [("softcap", "gemma2"), ("s_aux", "gpt_oss"), ("scaling", "gemma2")])
def test_an_ignored_argument_is_caught(ignored: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(*args: Any, **kwargs: Any) -> Any:
        return interface.sparse_attention_forward(*args, **{**kwargs, ignored: None})

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, attention.NAME, forgetful)
    assert "full budget" in failed(name)
    model = small_model(default_config(name))
    found = probe(model, hf_sparse.inspect(model))["full budget"].found
    assert isinstance(found, float)  # other logits, and not an error


@pytest.mark.parametrize(
    ("mask_function", "name", "caught"),
    [
        (blind_to_padding, "llama", {"left padding", "padding inside", "counts"}),
        (blind_to_windows, "gemma2", {"full budget", "counts"}),
        (blind_to_offsets, "llama", {"decode"}),
    ],
)
def test_a_wrong_mask_is_caught(
    mask_function: Any, name: str, caught: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, attention.NAME, mask_function)
    assert caught <= failed(name)


class Bypassing(LlamaAttention):
    """Calls the interface as others do, and attends by itself."""

    def forward(self, hidden_states: Any, position_embeddings: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        out, _ = super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key = (part(hidden_states).view(shape).transpose(1, 2) for part in (self.q_proj, self.k_proj))
        _, weights = attend(self, query, key, key, attention_mask, scaling=self.scaling)
        return 0 * out + hidden_states.cumsum(1), weights


def test_attention_that_does_not_run_through_us_is_caught() -> None:
    def bypass(model: Any) -> None:
        model.model.layers[1].self_attn.__class__ = Bypassing

    assert "small budget" in failed("llama", bypass)


@of_the_table
def test_the_table_covers_every_architecture_and_knows_each() -> None:
    assert list(RECORDS) == TABLE["architectures"]()
    verdicts = {name: TABLE["verdict"](record) for name, record in RECORDS.items()}
    assert {name for name, verdict in verdicts.items() if verdict not in ("patched", "refused")} == set()
    causal = Counter(verdict for name, verdict in verdicts.items() if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert causal["patched"] >= 120
    for record in RECORDS.values():
        assert not record["supported"] or record["probes"].keys() == PROBES.keys()
        assert record["supported"] or record["reasons"]


@of_the_table
def test_the_tables_are_those_of_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = TABLE["TABLES"].read_text(encoding="utf-8")
    monkeypatch.setitem(TABLE["draw"].__globals__, "TABLES", tmp_path / "tables.md")
    TABLE["draw"]()
    assert (tmp_path / "tables.md").read_text(encoding="utf-8") == committed


def test_readme_counts_what_the_table_counts() -> None:
    rows = [line.split(" | ")[1:] for line in TABLE["TABLES"].read_text(encoding="utf-8").splitlines()[2:6]]
    columns = [[int(cell.strip(" |")) for cell in column] for column in zip(*rows, strict=True)]
    (causal, images) = (f"{column[0]} of {sum(column)}" for column in columns)
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{causal} causal language models and {images} models of images and text" in text


def test_a_process_that_crashes_or_hangs_costs_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    run = TABLE["in_a_process"]
    monkeypatch.setitem(run.__globals__, "examined", lambda name: os._exit(9))
    assert TABLE["verdict"](run("llama")) == "unknown"
    monkeypatch.setitem(run.__globals__, "LIMIT", 0.1)
    monkeypatch.setitem(run.__globals__, "examined", lambda name: time.sleep(60))
    assert run("llama")["failure"] == "no answer within 0.1 s"
