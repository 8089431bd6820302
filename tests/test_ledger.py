"""The known failures: `ledger.json` says which configurations fail and why, and each is tried here.

What no longer fails must leave the ledger: the list shrinks by a fix alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

import hf_sparse
from hf_sparse.cache import SparseCache
from hf_sparse.errors import UserError
from hf_sparse.kernels import cpu
from hf_sparse.visibility import traced
from tests import tiny
from tests.sparse import SPARSE, sparse_model, step_by_step
from tests.test_faults import fail_in_a_hook

LEDGER: dict[str, str] = json.loads(Path(__file__).with_name("ledger.json").read_text(encoding="utf-8"))
IDS = tiny.tokens(1, 90)

Failure = Callable[[], object]
FAILURES: dict[str, tuple[type[Exception], str, Failure]] = {}


def fails(name: str, kind: type[Exception] = AssertionError, said: str = "") -> Callable[[Failure], Failure]:
    """Registers what is done, and the error that it ends in: an `AssertionError` where a promise is not kept."""

    def register(action: Failure) -> Failure:
        FAILURES[name] = kind, said, action
        return action

    return register


def tried(name: str) -> None:
    """Try a configuration that fails."""
    FAILURES[name][2]()
    pytest.fail(f"{name!r} works: take it out of tests/ledger.json, and out of this file")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", LEDGER)
def test_what_is_in_the_ledger_fails_as_it_says(name: str) -> None:
    kind, said, _ = FAILURES[name]
    with pytest.raises(kind, match=re.escape(said) or None):
        tried(name)


def test_the_ledger_holds_what_is_tried_and_nothing_else() -> None:
    assert sorted(LEDGER) == sorted(FAILURES)
    assert all(LEDGER.values())


def own_mask() -> torch.Tensor:
    """Causal, but for two keys that only some queries see."""
    mask = torch.ones(90, 90).tril().bool()
    mask[50:, 10] = mask[70, 30] = False
    return mask[None, None]


@fails("a 4-D bias with a soft cap", ValueError, "cannot be combined with softcap")
def _() -> None:
    tiny.logits(sparse_model("gemma2", "grouped"), IDS, own_mask() * 0.5)


@fails("a 4-D mask of whole numbers", ValueError, "must be bool")
def _() -> None:
    tiny.logits(sparse_model("llama", "grouped"), IDS, own_mask().long())


@fails("a 4-D mask with holes", AssertionError, "dense")
def _() -> None:
    model = sparse_model("llama", "grouped")
    tiny.logits(model, IDS, own_mask())
    assert hf_sparse.report(model).density < 1, "dense"


@fails("a cache whose pass was cut short", ValueError, "a cache whose layers differ in length")
def _() -> None:
    model = hf_sparse.patch(tiny.model("llama", num_hidden_layers=4), SPARSE)
    cache = SparseCache(model.config)
    with torch.no_grad():
        model(IDS[:, :80], past_key_values=cache)
        fail_in_a_hook(model, MemoryError())
        try:
            model(IDS[:, 80:85], past_key_values=cache)
        except MemoryError:
            model(IDS[:, 80:85], past_key_values=cache)


@fails("a text of no tokens", IndexError)
def _() -> None:
    tiny.logits(sparse_model("llama", "grouped"), IDS[:, :0])


@fails("continuous batching", ValueError, "continuous batching")
def _() -> None:
    model = sparse_model("llama", "topk")
    model.generate_batch([[5, 6, 7]], generation_config=GenerationConfig(max_new_tokens=2))


@fails("float64", AssertionError, "without compiled kernels")
def _() -> None:
    model = sparse_model("llama", "grouped", torch.float64)
    tiny.logits(model, IDS)
    notes = "; ".join(hf_sparse.report(model).notes)
    assert not notes, notes


@fails("heads of odd widths", AssertionError, "without compiled kernels")
def _() -> None:
    model = hf_sparse.patch(tiny.model("llama", head_dim=12), SPARSE)
    tiny.logits(model, IDS)
    notes = "; ".join(hf_sparse.report(model).notes)
    assert not notes, notes


@fails("gradients with engine cpu", UserError, "")
def _() -> None:
    sparse_model("llama", "grouped", engine="cpu")(IDS, labels=IDS).loss.backward()


@fails("grouped, token by token", AssertionError, "other logits")
def _() -> None:
    model = sparse_model("llama", "grouped")
    stepped = step_by_step(model, IDS, torch.ones_like(IDS), "dynamic", [1] * 90)
    assert torch.allclose(stepped, tiny.logits(model, IDS), atol=1e-2), "other logits"


def unbroken(training: bool, **fields: bool) -> None:
    model = hf_sparse.patch(tiny.model("llama", num_hidden_layers=1), SPARSE, selector="topk")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5 * training
    torch.compiler.reset()
    found = torch._dynamo.explain(model.train(training))(IDS, use_cache=False, **fields)
    assert not found.graph_break_count, f"{found.graph_break_count} breaks"


@fails("torch.compile with dropout", AssertionError, "breaks")
def _() -> None:
    unbroken(True)


@fails("torch.compile with output_attentions", AssertionError, "breaks")
def _() -> None:
    unbroken(False, output_attentions=True)


@fails("torch.compile with a mask that is no interval", RuntimeError, "no interval")
def _() -> None:
    seen = traced.seen_under(lambda b, h, q, k: (k <= q) & (k != 2), 1, torch.arange(6), 6, 0)
    traced.visible(seen, torch.arange(6), None)


@fails("torch.export without the model", KeyError)
def _() -> None:
    model = sparse_model("llama", "topk")
    with torch.no_grad():
        program = torch.export.export(model, (IDS,), {"use_cache": False})
        hf_sparse.unpatch(model)
        program.module()(IDS, use_cache=False)


@fails("torch.func.vmap", RuntimeError)
def _() -> None:
    model = sparse_model("llama", "grouped")
    with torch.no_grad():
        torch.func.vmap(lambda ids: model(ids[None], use_cache=False).logits)(tiny.tokens(2, 60))


@fails("torch.jit.trace", ValueError, "torch.jit.trace cannot follow")
def _() -> None:
    model = sparse_model("llama", "grouped").requires_grad_(False)
    torch.jit.trace(lambda ids: model(ids, use_cache=False).logits, tiny.tokens(1, 60), check_trace=False)


if cpu.unsupported_reason() is not None:  # All heads are slow then, and there is no engine that has no gradients.
    for name in ("float64", "heads of odd widths", "gradients with engine cpu"):
        FAILURES.pop(name), LEDGER.pop(name)
