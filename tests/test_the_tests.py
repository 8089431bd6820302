"""Proof that the invariants can fail: with a broken part, their tests do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_sparse import attention, interface
from hf_sparse.laws import BudgetPlan
from tests import tiny
from tests.blind import blind_to_offsets, blind_to_padding, blind_to_windows
from tests.sparse import (
    by_design,
    generated,
    sparse_model,
)
from tests.test_invariants import test_invariant_01_all_keys_is_dense as all_keys_is_dense
from tests.test_invariants import test_invariant_03_padding as padding
from tests.test_invariants import test_invariant_04_prefill_is_decode as prefill_is_decode
from tests.test_invariants import test_invariant_05_caches_give_the_same_tokens as caches_give_the_same_tokens


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_forgotten_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the mask function, transformers hands over no mask and says nothing: a model must not run then."""
    model = sparse_model(name, "topk")
    monkeypatch.delitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, attention.NAME)
    with pytest.raises(RuntimeError, match="mask"):
        tiny.logits(model, tiny.tokens(2, 40))
    with pytest.raises(RuntimeError, match="mask"):
        generated(model)


def seeing_everything(batch_size: int, q_length: int, kv_length: int, **_: Any) -> Tensor:
    """A mask function that forgets causality and padding."""
    return torch.tensor([0, kv_length], dtype=torch.int32).expand(batch_size, 1, q_length, 2).contiguous()


@by_design
@pytest.mark.parametrize(
    ("mask_function", "broken"),
    [
        (seeing_everything, lambda: all_keys_is_dense("llama", "gather", "topk")),
        (seeing_everything, lambda: prefill_is_decode("llama", "topk", "dynamic")),
        (blind_to_padding, lambda: padding("llama", "topk", "left")),
        (blind_to_windows, lambda: all_keys_is_dense("gemma3", "gather", "topk")),
        (blind_to_offsets, lambda: prefill_is_decode("llama", "topk", "static")),
        (blind_to_offsets, lambda: caches_give_the_same_tokens("llama", "topk", {})),
    ],
)
def test_a_wrong_mask_breaks_the_invariants(mask_function: Any, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, attention.NAME, mask_function)
    with pytest.raises((AssertionError, RuntimeError)):
        broken()


@by_design
@pytest.mark.parametrize(
    ("ignored", "name"), [("softcap", "gemma2"), ("s_aux", "gpt_oss"), ("scaling", "gemma3"), ("scaling", "gemma2")]
)
def test_an_ignored_argument_breaks_the_invariants(ignored: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(*args: Any, **kwargs: Any) -> Any:
        return interface.sparse_attention_forward(*args, **{**kwargs, ignored: None})

    if ignored == "scaling":
        # The default is what these models ask for: make it differ.
        monkeypatch.setitem(tiny._CONFIGS[name][1], "query_pre_attn_scalar", 64)
    all_keys_is_dense(name, "gather", "topk")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, attention.NAME, forgetful)
    with pytest.raises(AssertionError):
        all_keys_is_dense(name, "gather", "topk")


def test_a_budget_by_the_length_of_the_buffer_breaks_the_invariants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap that the package exists to avoid: n taken from the shape of the keys."""

    def by_shape(self: BudgetPlan) -> Tensor:
        seen = self._seen
        k = self._table[:, torch.full_like(seen, int(seen.max()))].transpose(0, 1)
        return torch.minimum(k, seen[:, None])

    monkeypatch.setattr(BudgetPlan, "budgets", property(by_shape))
    with pytest.raises(AssertionError):
        padding("llama", "topk", "left")
    with pytest.raises(AssertionError):
        prefill_is_decode("llama", "window", "static")
