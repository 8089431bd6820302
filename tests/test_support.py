"""Support by probing: the probes hold where they should, catch what is broken, and the committed table is whole."""

from __future__ import annotations

import json
import os
import runpy
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

import hf_sparse
from hf_sparse import SupportReport, attention
from hf_sparse.probing import PROBES, default_config, evidence, probe, shrink, small_model
from hf_sparse.visibility import interval_mask

ROOT = Path(__file__).parents[1]
TABLE = runpy.run_path(str(ROOT / "scripts/support_table.py"))
RECORDS = TABLE["records"]()
VERSIONS = {record.get("transformers", "?") for record in RECORDS.values()}

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
        ("gptj", "does not go through transformers' AttentionInterface"),
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
        return attention.sparse_attention_forward(*args, **{**kwargs, ignored: None})

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, attention.NAME, forgetful)
    assert "full budget" in failed(name)


def blind_to_padding(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    return interval_mask(**kwargs)


def blind_to_windows(mask_function: Any = None, **kwargs: Any) -> Tensor:
    return interval_mask(**kwargs)


def blind_to_offsets(q_offset: Any = 0, **kwargs: Any) -> Tensor:
    return interval_mask(**kwargs)


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
    assert Counter(verdicts.values())["patched"] >= 120
    for record in RECORDS.values():
        assert not record["supported"] or record["probes"].keys() == PROBES.keys()
        assert record["supported"] or record["reasons"]


def test_the_table_is_that_of_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = TABLE["TABLES"].read_text(encoding="utf-8")
    monkeypatch.setitem(TABLE["draw"].__globals__, "TABLES", tmp_path / "tables.md")
    if {transformers.__version__} == VERSIONS:
        TABLE["draw"]()
        assert (tmp_path / "tables.md").read_text(encoding="utf-8") == committed
    number = Counter(json.loads(line)["supported"] for line in TABLE["RECORDS"].read_text().splitlines())
    assert f"{number[True]} of {number.total()} architectures" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_process_that_crashes_or_hangs_costs_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    run = TABLE["in_a_process"]
    monkeypatch.setitem(run.__globals__, "examined", lambda name: os._exit(9))
    assert TABLE["verdict"](run("llama")) == "unknown"
    monkeypatch.setitem(run.__globals__, "LIMIT", 0.1)
    monkeypatch.setitem(run.__globals__, "examined", lambda name: time.sleep(60))
    assert run("llama")["failure"] == "no answer within 0.1 s"
