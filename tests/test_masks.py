"""Masks other than padding: packed sequences, users' own 4-D masks, masks with holes; and the weights that come out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from tests import tiny
from tests.sparse import (
    SPARSE,
    assert_same,
    captured_weights,
    every_architecture,
    every_exact_selector,
    every_selector,
    sparse_model,
)


@every_exact_selector
@every_architecture
def test_packed_sequences_are_like_sequences_alone(name: str, selector: str) -> None:
    """Position ids that start anew tell transformers of several sequences in one."""
    if name in ("gpt2", "gpt_oss"):
        pytest.skip("this model does not tell its masks of position ids, with or without us")
    model = sparse_model(name, selector)
    lengths = [30, 9, 21]
    texts = [tiny.tokens(1, length, seed) for seed, length in enumerate(lengths)]
    place = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = tiny.logits(model, torch.cat(texts, dim=1), position_ids=place)
    alone = torch.cat([tiny.logits(model, text) for text in texts], dim=1)
    assert_same(packed, alone)


@every_selector
@pytest.mark.parametrize("form", ["bool", "additive"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_users_own_interval_mask_is_as_good_as_ours(name: str, form: str, selector: str) -> None:
    """A 4-D mask that is causal, and one that hides the first keys from everyone."""
    ids = tiny.tokens(2, 40)
    model = sparse_model(name, selector)
    causal = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    if name not in tiny.SLIDING:
        assert_same(tiny.logits(model, ids, own_mask(causal, form)), tiny.logits(model, ids))
    causal = causal & (torch.arange(40) >= 7)
    hidden = tiny.logits(model, ids, own_mask(causal, form))[:, 7:]
    assert hf_sparse.report(model).density < 0.75
    own = tiny.model(name)
    own.set_attn_implementation("eager")  # which adds masks to scores: only the additive form means anything there
    dense = tiny.logits(own, ids, own_mask(causal, "additive"))[:, 7:]
    full = tiny.logits(hf_sparse.patch(model, alpha=1e9), ids, own_mask(causal, form))[:, 7:]
    assert_same(full, dense)
    assert not torch.allclose(hidden, dense, atol=1e-2)


def own_mask(mask: Tensor, form: str) -> Tensor:
    return mask if form == "bool" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("form", ["bool", "additive"])
@every_architecture
def test_a_users_own_mask_with_holes_runs_dense_and_exact(name: str, form: str) -> None:
    ids = tiny.tokens(2, 40)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()[None, None] & (
        (torch.arange(40) % 5 != 2) | torch.eye(40).bool()
    )
    model = tiny.model(name)
    model.set_attn_implementation("eager")
    own = tiny.logits(model, ids, own_mask(mask, "additive"))
    hf_sparse.patch(model, SPARSE)
    assert_same(tiny.logits(model, ids, own_mask(mask, form)), own)
    assert hf_sparse.report(model).density == 1.0
    assert hf_sparse.report(model).rows[0]["dense_rows"] == {"mask is not an interval": 80}


HOLES = [11, 12, 13, 25]


def with_holes(length: int = 40, short: int = 29) -> tuple[Tensor, Tensor, Tensor]:
    """A batch whose first text has padding in its middle, its padding mask, and that text without the hidden tokens."""
    ids, mask, _ = tiny.padded([length, short], "left")
    mask[0, HOLES] = 0
    return ids, mask, ids[:1, mask[0].bool()]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_padding_inside_a_text_is_exact_with_all_keys(name: str) -> None:
    ids, mask, _ = with_holes()
    model = tiny.model(name)
    own = tiny.logits(model, ids, mask)
    ours = tiny.logits(hf_sparse.patch(model, SPARSE, law="fraction", fraction=1.0), ids, mask)
    assert ours.isfinite().all()
    assert_same(ours[mask.bool()], own[mask.bool()])


@every_selector
@pytest.mark.parametrize("length", [40, 170])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_padding_inside_a_text_is_no_reason_to_run_dense(name: str, length: int, selector: str) -> None:
    """The same logits, counts and groups of queries as of the text without the tokens that nobody sees."""
    ids, mask, alone = with_holes(length, length - 11)
    model = sparse_model(name, selector)
    together = tiny.logits(model, ids, mask)
    kept = [row["kept"] for row in hf_sparse.report(model).rows]
    assert hf_sparse.report(model).density < 0.75
    assert any("padding hides" in note for note in hf_sparse.report(model).notes)
    model = sparse_model(name, selector)
    assert_same(together[0, mask[0].bool()], tiny.logits(model, alone)[0])
    neighbour = ids[1:, mask[1].bool()]
    assert_same(together[1, mask[1].bool()], tiny.logits(model, neighbour)[0])
    assert kept == [row["kept"] for row in hf_sparse.report(model).rows]


@every_selector
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_padding_inside_a_text_is_decoded_as_in_a_prefill(name: str, selector: str) -> None:
    """Token by token, the cache holding hidden keys: what the text without them gives."""
    ids, mask, alone = with_holes()
    model = sparse_model(name, selector)
    steps, place = [], tiny.positions(mask)
    cache = hf_sparse.SparseCache(model.config)
    with torch.no_grad():
        for start, stop in ((0, 30), *((i, i + 1) for i in range(30, 40))):
            part = slice(start, stop)
            step = model(
                ids[:, part], attention_mask=mask[:, :stop], position_ids=place[:, part], past_key_values=cache
            )
            steps.append(step.logits)
    found = torch.cat(steps, dim=1)
    assert found[mask.bool()].isfinite().all()
    assert_same(found[0, mask[0].bool()][-10:], step_by_step_logits(model, alone)[-10:])


def step_by_step_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits of one text, its last 10 tokens one at a time."""
    cache = hf_sparse.SparseCache(model.config)
    with torch.no_grad():
        parts = [model(ids[:, :-10], past_key_values=cache).logits]
        for i in range(ids.shape[1] - 10, ids.shape[1]):
            parts.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
    return torch.cat(parts, dim=1)[0]


@every_selector
def test_weights_behind_hidden_keys_are_those_that_were_used(selector: str) -> None:
    ids, mask, _ = with_holes()
    model = sparse_model("llama", selector)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=tiny.positions(mask), output_attentions=True)
    for weights in out.attentions:
        assert weights.shape == (2, 4, 40, 40)
        assert (weights[0, ..., HOLES] == 0).all()
        assert_same(weights[0, :, mask[0].bool()].sum(-1), torch.ones(4, 36))
        assert (weights.triu(1) == 0).all()


def test_generate_finds_pad_tokens_inside_an_unmasked_prompt() -> None:
    """`generate` makes such a mask of a prompt that has no mask and holds the pad token's id."""
    model = sparse_model("llama", "topk")
    prompt = tiny.tokens(1, 40).clamp(min=1)
    prompt[0, HOLES] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(prompt, **options)[0, 40:]
    assert hf_sparse.report(model).density < 0.75
    alone = model.generate(prompt[:, prompt[0] != 0], **options)[0, 36:]
    assert tokens.tolist() == alone.tolist()


@every_selector
@every_architecture
def test_output_attentions_are_the_weights_that_were_used(name: str, selector: str) -> None:
    if name == "gpt2":
        pytest.skip("this model keeps the wish for weights from its attention, with or without us")
    ids, mask, _ = tiny.padded([40, 29], "left")
    model = sparse_model(name, selector)
    with captured_weights() as used, torch.no_grad():
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=tiny.positions(mask),
            output_attentions=True,
            use_cache=False,
        )
    assert len(out.attentions) == tiny.LAYERS
    for layer, weights in enumerate(out.attentions):
        assert torch.equal(weights, used[layer][0])
    assert_same(out.logits[mask.bool()], tiny.logits(model, ids, mask)[mask.bool()])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_mask_of_whole_numbers_is_refused(dtype: torch.dtype) -> None:
    """Added to scores, zeros and ones would let every query see everything; PyTorch's SDPA refuses them as well."""
    mask = torch.ones(40, 40, dtype=dtype).tril()[None, None]
    model = hf_sparse.patch(tiny.model("llama"), SPARSE)
    with pytest.raises(ValueError, match=rf"attention_mask .* bool .* floating point .*; got {str(dtype)[6:]}"):
        tiny.logits(model, tiny.tokens(1, 40), mask)


def test_a_mask_longer_than_the_keys_is_refused() -> None:
    """As where layers of a cache were cut to lengths of their own: the mask has the length of one of them."""
    model = hf_sparse.patch(tiny.model("llama"), SPARSE)
    cache = hf_sparse.SparseCache(model.config)
    ids = tiny.tokens(1, 40)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.layers[1].crop(-15)
        with pytest.raises(ValueError, match="see 41 keys, but layer 1 has 26"):
            model(ids[:, :1], past_key_values=cache)
