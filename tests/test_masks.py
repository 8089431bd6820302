"""Masks other than padding: packed sequences, users' own 4-D masks, masks with holes; and the weights that come out."""

from __future__ import annotations

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
    """Position ids that start anew tell transformers of several sequences in one row."""
    if name in ("gpt2", "gpt_oss"):
        pytest.skip("this model does not tell its masks of position ids, with or without us")
    model = sparse_model(name, selector)
    lengths = [30, 9, 21]
    rows = [tiny.tokens(1, length, seed) for seed, length in enumerate(lengths)]
    place = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = tiny.logits(model, torch.cat(rows, dim=1), position_ids=place)
    alone = torch.cat([tiny.logits(model, row) for row in rows], dim=1)
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


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_padding_in_the_middle_runs_dense_and_exact(name: str) -> None:
    ids, mask, _ = tiny.padded([40, 29], "left")
    mask[0, 11:14] = 0
    model = tiny.model(name)
    own = tiny.logits(model, ids, mask)
    ours = tiny.logits(hf_sparse.patch(model, SPARSE), ids, mask)
    assert ours.isfinite().all()
    assert_same(ours[mask.bool()], own[mask.bool()])


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
    """Added to scores, zeros and ones would let every row see everything; PyTorch's SDPA refuses them as well."""
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
