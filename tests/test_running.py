"""Ways of running a patched model that other files do not test: `model_cards/running.md` lists them all."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GenerationConfig, TextGenerationPipeline

import hf_sparse
from tests import small, tiny
from tests.sparse import SPARSE, assert_same, generated, sparse_model

PAGE = Path(__file__).parents[1] / "model_cards" / "running.md"


def test_sampling_draws_the_same_tokens() -> None:
    """From the same seed, whatever cache holds the keys."""
    model, ids = sparse_model("llama", "topk"), tiny.tokens(2, 30)
    drawn = []
    for options in ({}, {"cache_implementation": "dynamic"}, {"use_cache": False}):
        torch.manual_seed(5)
        drawn.append(model.generate(ids, max_new_tokens=12, do_sample=True, top_k=20, **options).tolist())
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.skipif(find_spec("optimum") is None, reason="optimum-quanto is not installed")
@pytest.mark.parametrize("bits", [2, 4])
def test_a_quantised_cache_with_all_keys_is_that_of_the_model(bits: int) -> None:
    model = tiny.model("llama")
    options: dict[str, Any] = {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "quanto", "nbits": bits, "residual_length": 4, "q_group_size": 16},
    }
    expected = generated(model, **options)
    assert generated(hf_sparse.patch(model, SPARSE, alpha=1e9), **options) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_in_few_bits_with_all_keys_are_those_of_the_model(bits: int, dtype: torch.dtype) -> None:
    """Weights of torchao, made before the patch or after it."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    # The other kind of 4 bits that torchao has needs a GPU.
    config = {
        4: quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(16)),
        8: quantization.Int8WeightOnlyConfig(),
    }[bits]
    ids = tiny.tokens(1, 60)
    model, after = tiny.model("llama", dtype), hf_sparse.patch(tiny.model("llama", dtype), SPARSE)
    of_the_weights = tiny.logits(model, ids)
    for each in (model, after):
        quantization.quantize_(each, config)
    dense, tokens = tiny.logits(model, ids), generated(model)
    assert not torch.equal(dense, of_the_weights)
    with hf_sparse.patched(model, SPARSE, alpha=1e9):
        assert_same(tiny.logits(model, ids), dense)
        assert generated(model) == tokens
    sparse = tiny.logits(hf_sparse.patch(model, SPARSE), ids)
    assert not torch.allclose(sparse, dense, atol=0.1)
    assert torch.equal(tiny.logits(after, ids), sparse)


def test_parts_on_the_cpu_and_on_the_disk(tmp_path: Path) -> None:
    """A `device_map` with offloading to the disk. Saved, patched or not, the model is whole."""
    pytest.importorskip("accelerate")
    ids = tiny.tokens(1, 40)
    tiny.model("llama").save_pretrained(tmp_path / "model")
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=devices | {"model.rotary_emb": "cpu", "lm_head": "cpu"},
        offload_folder=tmp_path / "offloaded",
    )
    assert {str(x.device) for x in model.parameters()} == {"cpu", "meta"}
    hf_sparse.patch(model, SPARSE)
    assert_same(tiny.logits(model, ids), tiny.logits(sparse_model("llama", "grouped"), ids))
    assert generated(model) == generated(sparse_model("llama", "grouped"))


def adapted(model: Any) -> Any:
    """A model with LoRA adapters that change what it does."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def test_adapters_around_a_patched_model_and_patched_adapters() -> None:
    """In either order the same model; merged, it has the same logits; unpatched, it is that of PEFT."""
    ids = tiny.tokens(1, 40)
    before, after = adapted(sparse_model("llama", "topk")), adapted(tiny.model("llama"))
    dense = tiny.logits(after, ids)
    assert hf_sparse.patch(after, SPARSE, selector="topk") is after
    sparse = tiny.logits(after, ids)
    assert not torch.allclose(sparse, dense)
    assert torch.equal(tiny.logits(before, ids), sparse)
    assert generated(before) == generated(after)
    assert_same(tiny.logits(before.merge_and_unload(), ids), sparse)
    assert torch.equal(tiny.logits(hf_sparse.unpatch(after), ids), dense)


def test_adapters_of_a_patched_model_learn() -> None:
    ids = tiny.tokens(2, 40)
    model = adapted(sparse_model("llama", "topk")).train()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora" in name)
        assert not parameter.requires_grad or (parameter.grad != 0).any(), name


def test_a_pipeline_writes_what_generate_does() -> None:
    tokenizer = small.tokenizer(bos=False)
    model = sparse_model("llama", "topk")
    options = GenerationConfig(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    pipeline = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    for text in (small.words(30), small.words(17, seed=1)):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        [written] = pipeline(text, generation_config=options, return_tensors=True)
        expected = model.generate(ids, generation_config=options)[0, ids.shape[1] :].tolist()
        assert written["generated_token_ids"][-6:] == expected


@torch.no_grad()
def test_logits_to_keep_are_the_last_ones() -> None:
    model, ids = sparse_model("llama", "topk"), tiny.tokens(2, 40)
    assert_close(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("selector", ["topk", "grouped"])
def test_half_precision_with_all_keys_is_the_model(dtype: torch.dtype, selector: str) -> None:
    ids = tiny.tokens(1, 60)
    model = tiny.model("llama", dtype)
    dense = tiny.logits(model, ids)
    full = tiny.logits(hf_sparse.patch(model, SPARSE, selector=selector, alpha=1e9), ids)
    assert_close(full, dense, atol=0.05, rtol=0.05)
    assert generated(hf_sparse.patch(model, SPARSE, selector=selector))


def test_continuous_batching_is_refused() -> None:
    model = sparse_model("llama", "topk")
    # transformers 5.17 names the implementation that it lacks, later releases the way of running.
    with pytest.raises(ValueError, match=r"continuous batching|paged\|hf_sparse") as caught:
        model.generate_batch([[5, 6, 7]], generation_config=GenerationConfig(max_new_tokens=2))
    assert "\n" not in str(caught.value)


def test_the_page_names_tests_that_exist() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 20
    for row in rows:
        assert re.search(r"`test_\w+\.test_\w+`", row), row
    for file, test in re.findall(r"`(test_\w+)\.(test_\w+)`", PAGE.read_text(encoding="utf-8")):
        source = (Path(__file__).parent / f"{file}.py").read_text(encoding="utf-8")
        assert f"def {test}(" in source, f"{file}.{test}"
