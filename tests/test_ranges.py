"""Visible ranges and budgets of a call: few queries, read as Python numbers, are like many, read as tensors."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse import SparseAttentionConfig
from hf_sparse.cache import SparseCache
from hf_sparse.laws import BudgetTable
from hf_sparse.visibility import VisibleRanges, interval_mask, ranges, seen_through
from tests import calls, tiny
from tests.sparse import SPARSE

CALLS = {
    "causal": lambda: calls.causal_intervals(5, 5),
    "decode": lambda: calls.causal_intervals(1, 40),
    "left": lambda: calls.causal_intervals(6, 40, left=(0, 37)),
    "right": lambda: calls.causal_intervals(6, 6, right=(2, 0)),
    "static": lambda: calls.causal_intervals(3, 40, spare=8),
    "nothing": lambda: torch.zeros(1, 1, 2, 2, dtype=torch.int32),
}
LAWS = {
    "one law": SparseAttentionConfig(alpha=2.0, min_keys=4, dense_below=8),
    "all dense": SparseAttentionConfig(dense_below=100),
    "full budgets": SparseAttentionConfig(law="fraction", fraction=1.0, dense_below=8),
}


def known(intervals: Tensor, config: SparseAttentionConfig) -> tuple[object, ...]:
    found = VisibleRanges(intervals)
    plan = BudgetTable(config.budget(1)).plan(found)
    numbers = (found.queries, found.total, found.most_visible, found.last_visible, plan.dense, plan.dense_queries)
    tensors = (found.first, found.stop, found.seen, plan.budgets)
    return *numbers, *(x.tolist() for x in tensors), [found.causal(length) for length in (5, 6, 40)]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", CALLS)
def test_few_queries_are_like_many(kind: str, law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few = known(CALLS[kind](), LAWS[law])
    monkeypatch.setattr(ranges, "_FEW", 0)
    assert known(CALLS[kind](), LAWS[law]) == few


@pytest.mark.parametrize("few", [64, 0])
def test_ranges_of_a_padded_batch(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences of 40 keys, 6 queries each, the second one with 37 keys of padding."""
    monkeypatch.setattr(ranges, "_FEW", few)
    found = VisibleRanges(calls.causal_intervals(6, 40, left=(0, 37)))
    assert found.seen.tolist() == [[35, 36, 37, 38, 39, 40], [0, 0, 0, 1, 2, 3]]
    assert (found.queries, found.total, found.most_visible, found.last_visible) == (9, 231, 40, 40)
    assert not found.causal(40)
    plan = BudgetTable(LAWS["one law"].budget(1)).plan(found)
    assert plan.dense_queries == {"fewer than 8 visible keys": 3}
    assert not plan.dense


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_that_is_written_to_is_looked_at_anew(mode: type[AbstractContextManager[Any]]) -> None:
    model = hf_sparse.patch(tiny.model("llama"), SPARSE)
    ids = tiny.tokens(1, 40)
    with mode():
        mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
        before = tiny.logits(model, ids, mask)
        mask[..., 20:, :5] = False
        after = tiny.logits(model, ids, mask)
        assert not torch.equal(after, before)
        assert torch.equal(after, tiny.logits(model, ids, mask.clone()))


@pytest.mark.parametrize("length", [1, 100])
def test_what_a_mask_shows_is_forgotten_with_it(length: int) -> None:
    """At once: budgets of a long text are large."""
    gc.disable()
    try:
        mask = interval_mask(1, length, 100, q_offset=100 - length)
        seen = seen_through(mask, 1, length, 100)
        assert seen is not None
        assert seen_through(mask, 1, length, 100) is seen
        BudgetTable(LAWS["one law"].budget(1)).plan(seen.ranges)
        found = ref(seen.ranges)
        del mask, seen
        assert found() is None
    finally:
        gc.enable()


def test_the_default_device_decides_nothing() -> None:
    """Ranges and budgets are on the CPU, wherever else tensors are made by default."""
    model = hf_sparse.patch(tiny.model("llama"), SPARSE)
    ids, mask, _ = tiny.padded([60, 41], "left")
    place, expected = tiny.positions(mask), tiny.logits(model, ids, mask)
    with torch.device("meta"):
        assert torch.equal(tiny.logits(model, ids, mask, position_ids=place), expected)


def test_the_default_device_moves_no_cache_and_no_audit() -> None:
    model = hf_sparse.patch(tiny.model("llama"), SPARSE)
    ids, order = tiny.tokens(2, 60), torch.tensor([1, 0])

    @torch.no_grad()
    def decoded() -> Tensor:
        hf_sparse.audit(model, rows=4)
        cache = SparseCache(model.config)
        model(ids[:, :59], past_key_values=cache)
        cache.reorder_cache(order)
        out: Tensor = model(ids[order, 59:], past_key_values=cache).logits
        return out

    expected = decoded()
    with torch.device("meta"):
        assert torch.equal(decoded(), expected)
