"""Training through a patched model: gradients, recomputed activations, dropout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

import hf_sparse
from tests import tiny
from tests.sparse import (
    SPARSE,
    by_design,
    every_architecture,
    every_selector,
    sparse_model,
)


def gradients(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@by_design
@every_architecture
def test_gradients_with_all_keys_are_those_of_the_model(name: str) -> None:
    ids = tiny.tokens(2, 40)
    model = tiny.model(name)
    model.set_attn_implementation("eager")
    own = gradients(model, ids[:, :-1])
    # As in invariant 1: selector and engine do the work, and the last row, which loses a key, has no loss.
    hf_sparse.patch(model, SPARSE, law="fraction", fraction=1.0, max_keys=39, engine="gather")
    model.zero_grad()
    labels = ids.clone()
    labels[:, -1] = -100
    model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == own.keys()
    for parameter, grad in ours.items():
        assert_close(grad, own[parameter], atol=1e-4, rtol=1e-3, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@every_selector
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_training_with_checkpoints(name: str, selector: str) -> None:
    """Recomputed activations give the same gradients, and every projection of attention gets one."""
    ids = tiny.tokens(2, 40)
    model = sparse_model(name, selector).train()
    plain = gradients(model, ids)
    model.gradient_checkpointing_enable()
    again = gradients(model, ids)
    assert again.keys() == plain.keys()
    for parameter, grad in again.items():
        assert grad.isfinite().all()
        assert_close(grad, plain[parameter], atol=1e-5, rtol=1e-4)
        if "attn" in parameter:
            assert (grad != 0).any(), parameter
    assert any("attn" in parameter for parameter in again)


@pytest.mark.parametrize("selector", ["grouped", "topk"])
def test_training_lowers_the_loss(selector: str) -> None:
    ids = tiny.tokens(2, 40)
    model = sparse_model("llama", selector).train()
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if "self_attn" in name], lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        value = model(input_ids=ids, labels=ids, use_cache=False).loss
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.9 * losses[0]


def test_dropout_is_applied_in_training_alone() -> None:
    ids = tiny.tokens(2, 40)
    model = hf_sparse.patch(tiny.model("llama", attention_dropout=0.5), SPARSE)
    still = tiny.logits(model, ids)
    assert torch.equal(tiny.logits(model, ids), still)
    model.train()
    assert not torch.allclose(tiny.logits(model, ids), tiny.logits(model, ids))
