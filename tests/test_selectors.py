"""Selectors: exact budgets, visible keys alone, and each against its specification in plain loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_sparse import SparseAttentionConfig
from hf_sparse.call import AttentionCall, Selection
from hf_sparse.kernels.quantised import QuantisedKeys
from hf_sparse.selectors import SELECTORS
from hf_sparse.selectors.grouped import GROUP_QUERIES, Grouped
from tests import calls

INTERVALS = {
    "causal": lambda q_len, kv: calls.causal_intervals(q_len, kv),
    "sliding": lambda q_len, kv: calls.causal_intervals(q_len, kv, window=kv // 3 + 1),
    "left": lambda q_len, kv: calls.causal_intervals(q_len, kv, left=(0, kv // 2)),
    "right": lambda q_len, kv: calls.causal_intervals(q_len, kv, right=(0, q_len // 2)),
    "static": lambda q_len, kv: calls.causal_intervals(q_len, kv, left=(0, 2), spare=(kv - q_len) // 2),
    "static, right": lambda q_len, kv: calls.causal_intervals(q_len, kv, right=(0, q_len), spare=(kv - q_len) // 2),
    "nothing": lambda q_len, kv: calls.causal_intervals(q_len, kv, right=(q_len, 0)),
}
LENGTHS_OF = {
    "grouped": st.sampled_from([1, 2, 7, GROUP_QUERIES, 2 * GROUP_QUERIES]),
    "topk": st.integers(1, 20),
    "window": st.integers(1, 20),
}


WITHOUT_KERNELS = "grouped without kernels"


@pytest.fixture(params=[*SELECTORS, WITHOUT_KERNELS])
def selector(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of each selector; of the one with kernels twice, for PyTorch looks for keys where there are none."""
    name: str = request.param
    if name != WITHOUT_KERNELS:
        return name
    monkeypatch.setattr(Grouped, "uncompiled_reason", lambda *_: "a test wants none")
    return "grouped"


every_way_of_grouped = pytest.mark.parametrize("selector", ["grouped", WITHOUT_KERNELS], indirect=True)
# What the fixture `selector` changes stays the same for all examples.
with_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def problems(draw: st.DrawFn, selector: str) -> tuple[AttentionCall, Tensor, SparseAttentionConfig]:
    """A call, its budgets (any numbers up to what each query sees), and a configuration."""
    q_len = draw(LENGTHS_OF[selector])
    kv_len = q_len + (
        draw(st.integers(0, 40)) if selector not in ("grouped", "shared") else draw(st.sampled_from([0, 20, 500]))
    )
    seed = draw(st.integers(0, 1 << 30))
    heads, kv_heads = draw(st.sampled_from([(4, 2), (3, 3), (4, 1)]))
    intervals = INTERVALS[draw(st.sampled_from(sorted(INTERVALS)))](q_len, kv_len)
    call = calls.inputs(
        intervals, kv_len, heads=heads, kv_heads=kv_heads, dim=4, seed=seed, whole_numbers=draw(st.booleans())
    )
    # Attention so sharp that most weights are zero in float32.
    call = replace(call, query=call.query * draw(st.sampled_from([1, 64])))
    heads = draw(st.sampled_from([1, heads]))
    generator = torch.Generator().manual_seed(seed)
    visible = call.visible[:, None].expand(-1, heads, -1)
    match draw(st.sampled_from(["any", "few", "all"])):
        case "any":
            budgets = (visible * torch.rand(visible.shape, generator=generator)).ceil().long()
        case "few":
            budgets = visible.clamp(max=draw(st.integers(1, 5)))
        case _:
            budgets = visible.clone()
    config = SparseAttentionConfig(
        selector=selector,
        sink_keys=draw(st.integers(0, 6)),
        recent_keys=draw(st.integers(0, 12)),
    )
    return call, budgets, config


def select(problem: tuple[AttentionCall, Tensor, SparseAttentionConfig]) -> Selection:
    call, budgets, config = problem
    return calls.select(config.selector, call, budgets, config)


@with_fixture
@given(data=st.data())
def test_each_row_keeps_its_budget_of_keys_that_it_sees(selector: str, data: st.DataObject) -> None:
    call, budgets, _ = problem = data.draw(problems(selector))
    selection = select(problem)
    heads, kv_len = call.query.shape[1], call.key.shape[2]
    mask = selection.mask(heads, kv_len)
    assert selection.positions.min() >= 0
    assert selection.positions.max() < kv_len
    assert torch.equal(mask.sum(-1), budgets.expand(mask.shape[:3]))
    # As many as were named: no key is named twice to one query.
    assert torch.equal(selection.kept(heads), mask.sum(-1))
    assert not (mask & ~calls.visible_mask(call)).any()


@cache
def call_and_visible(kind: str, q_len: int, kv_len: int) -> tuple[AttentionCall, Tensor]:
    """A call, and which keys its queries see: the same for every selector, and slow to find by loops."""
    call = calls.inputs(INTERVALS[kind](q_len, kv_len), kv_len, heads=2, kv_heads=1, dim=4)
    # These may be late queries of a long text: keys that they no longer see came before.
    call = replace(call, origin=torch.zeros(2, dtype=torch.int64))
    return call, calls.visible_mask(call)


@pytest.mark.parametrize("kind", INTERVALS)
@pytest.mark.parametrize("kv_len", [0, 20, 1500])
@pytest.mark.parametrize("q_len", [1, 7, GROUP_QUERIES, 2 * GROUP_QUERIES])
def test_budgets_of_every_kind(selector: str, kind: str, kv_len: int, q_len: int) -> None:
    """As above, for all combinations."""
    kv_len += q_len
    call, visible = call_and_visible(kind, q_len, kv_len)
    call = replace(call)  # without what another selector has kept of its keys
    config = SparseAttentionConfig(sink_keys=2, recent_keys=3)
    for most in (1, 5, 100, 190, kv_len):
        budgets = call.visible[:, None].clamp(max=most)
        selection = calls.select(selector, call, budgets, config)
        mask = selection.mask(2, kv_len)
        assert torch.equal(mask.sum(-1), budgets.expand(-1, 2, -1))
        assert torch.equal(selection.kept(2), mask.sum(-1))
        assert not (mask & ~visible).any()


@given(problems("topk"))
def test_topk_is_the_sort(problem: tuple[AttentionCall, Tensor, SparseAttentionConfig]) -> None:
    call, budgets, config = problem
    mask = select(problem).mask(call.query.shape[1], call.key.shape[2])
    assert torch.equal(mask, calls.select_topk(call, budgets, config.sink_keys, config.recent_keys))


@given(problems("window"))
def test_window_is_sinks_and_the_most_recent(problem: tuple[AttentionCall, Tensor, SparseAttentionConfig]) -> None:
    call, budgets, config = problem
    mask = select(problem).mask(call.query.shape[1], call.key.shape[2])
    assert torch.equal(mask, calls.select_window(call, budgets, config.sink_keys, config.recent_keys))


@every_way_of_grouped
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_scores_the_most_recent_key_wins(selector: str, dtype: torch.dtype) -> None:
    # All keys the same, and whole numbers: scores that are equal stay so however a product is summed.
    call = calls.inputs(calls.causal_intervals(8, 64), 64, dtype=dtype, whole_numbers=True)
    call = replace(call, key=call.key[:, :, :1].expand(-1, -1, 64, -1))
    config = SparseAttentionConfig(sink_keys=0, recent_keys=0)
    budgets = torch.full((2, 1, 8), 5)
    expected = torch.zeros(2, 4, 8, 64, dtype=torch.bool)
    for i in range(8):
        expected[:, :, i, 64 - 8 + i + 1 - 5 : 64 - 8 + i + 1] = True
    assert torch.equal(calls.select("topk", call, budgets, config).mask(4, 64), expected)
    grouped = calls.select(selector, call, budgets, config).mask(4, 64)
    assert torch.equal(grouped, expected)


@every_way_of_grouped
@with_fixture
@given(data=st.data())
def test_neighbours_keep_the_recent_keys_of_every_row(selector: str, data: st.DataObject) -> None:
    call, budgets, config = problem = data.draw(problems(selector))
    mask = select(problem).mask(call.query.shape[1], call.key.shape[2])
    position = torch.arange(call.key.shape[2])
    stop = call.intervals[..., 1:].long()
    recent = budgets.clamp(max=config.recent_keys)[..., None]
    must = (position >= stop - recent) & (position < stop)
    assert not (must & ~mask).any()


@every_way_of_grouped
def test_the_blocks_of_rows_of_a_call_share_its_quantised_keys(selector: str) -> None:
    """What earlier queries left behind, or a cache kept, changes nothing."""
    q_len, kv_len = 3 * GROUP_QUERIES, 1500
    call = calls.inputs(calls.causal_intervals(q_len, kv_len, left=(0, 77)), kv_len)
    config = SparseAttentionConfig(alpha=2.0, min_keys=8, sink_keys=2, recent_keys=16, dense_below=0)
    budgets = config.budget()(call.visible)[:, None]
    together = replace(call, quantised=QuantisedKeys())
    for start in range(0, q_len, GROUP_QUERIES):
        part = budgets[:, :, start : start + GROUP_QUERIES]
        alone, shared = (
            calls.select(selector, x.queries(start, start + GROUP_QUERIES), part, config).mask(4, kv_len)
            for x in (call, together)
        )
        assert torch.equal(alone, shared)


@every_way_of_grouped
@pytest.mark.parametrize("pad", [0, 100])
@pytest.mark.parametrize("wanted", [5, 1400, 2900])
def test_the_one_key_is_found(selector: str, wanted: int, pad: int) -> None:
    """Two queries with room for one more key, among thousands."""
    kv_len, wanted = 3000 + pad, wanted + pad
    call = calls.inputs(calls.causal_intervals(2, kv_len, left=(pad, pad)), kv_len)
    key = 0.3 * call.key
    key[:, :, wanted] = 3.0
    call = replace(call, query=call.query + 5, key=key)
    config = SparseAttentionConfig(sink_keys=2, recent_keys=8)
    budgets = torch.full((2, 1, 2), 2 + 8 + 2)
    mask = calls.select(selector, call, budgets, config).mask(4, kv_len)
    assert mask[..., wanted].all()


@every_way_of_grouped
@pytest.mark.parametrize("kv_len", [400, 3000])
def test_neighbours_keep_what_they_attend_to_together(selector: str, kv_len: int) -> None:
    """A key that every query of the group wants is kept by every query."""
    call = calls.inputs(calls.causal_intervals(GROUP_QUERIES, kv_len), kv_len)
    key = call.key.clone()
    wanted = [30, 77, 200]
    # Point every query of a key head the same way, and these keys with it.
    query = call.query + 5
    key[:, :, wanted] = 3.0
    call = replace(call, query=query, key=key)
    config = SparseAttentionConfig(sink_keys=0, recent_keys=8)
    budgets = torch.full((2, 1, GROUP_QUERIES), GROUP_QUERIES + 8 + 3)
    mask = calls.select(selector, call, budgets, config).mask(4, kv_len)
    assert mask[..., wanted].all()


def test_sinks_are_kept_by_every_selector(selector: str) -> None:
    """From the budget on that recent and sink keys need, also where that is less than a group has queries."""
    call = calls.inputs(calls.causal_intervals(GROUP_QUERIES, 400, left=(0, 37)), 400)
    config = SparseAttentionConfig(sink_keys=4, recent_keys=8)
    budgets = torch.full((2, 1, GROUP_QUERIES), 12)
    mask = calls.select(selector, call, budgets, config).mask(4, 400)
    assert mask[0, ..., :4].all()
    assert mask[1, ..., 37:41].all()


@every_way_of_grouped
@pytest.mark.parametrize("kv_len", [400, 3000])
def test_neighbours_keep_their_sinks(selector: str, kv_len: int) -> None:
    call = calls.inputs(calls.causal_intervals(GROUP_QUERIES, kv_len, left=(0, 37)), kv_len)
    config = SparseAttentionConfig(sink_keys=4, recent_keys=8)
    budgets = torch.full((2, 1, GROUP_QUERIES), GROUP_QUERIES + 8 + 4)
    mask = calls.select(selector, call, budgets, config).mask(4, kv_len)
    assert mask[0, ..., :4].all()
    assert mask[1, ..., 37:41].all()


def test_budgets_are_spent_where_older_keys_weigh_nothing(selector: str) -> None:
    """All weight on the recent keys: in float32 the weights of the past ones are zero, and they are kept alike."""
    kv_len = 3000
    call = calls.inputs(calls.causal_intervals(GROUP_QUERIES, kv_len, left=(0, 2000)), kv_len)
    key = torch.where(torch.arange(kv_len)[:, None] < kv_len - GROUP_QUERIES, -20.0, 20.0).expand_as(call.key)
    call = replace(call, query=torch.full_like(call.query, 20.0), key=key)
    config = SparseAttentionConfig(sink_keys=0, recent_keys=8)
    for more in (1, 10, 100):
        budgets = torch.full((2, 1, GROUP_QUERIES), GROUP_QUERIES + 8 + more)
        mask = calls.select(selector, call, budgets, config).mask(4, kv_len)
        assert torch.equal(mask.sum(-1), budgets.expand(2, 4, GROUP_QUERIES))
        assert not (mask & ~calls.visible_mask(call)).any()


@pytest.mark.parametrize("q_len", [1, GROUP_QUERIES])
@pytest.mark.parametrize("change", [calls.turned, lambda key: key[..., :1].expand_as(key)], ids=["turned", "expanded"])
def test_strides_do_not_matter(selector: str, change: Callable[[Tensor], Tensor], q_len: int) -> None:
    """Numbers of a key that lie far from each other, or that are one and the same."""
    call = calls.inputs(calls.causal_intervals(q_len, 800, left=(0, 30)), 800)
    budgets, config = torch.full((2, 1, q_len), 90), SparseAttentionConfig()
    key = change(call.key)
    assert key.stride(3) != 1
    masks = [
        calls.select(selector, replace(call, key=x), budgets, config).mask(4, 800) for x in (key, key.contiguous())
    ]
    assert torch.equal(*masks)


def test_a_row_keeps_what_it_keeps_whoever_its_neighbours_are(selector: str) -> None:
    """Each sequence of a batch, each block of groups, alone and together; padded or not."""
    q_len, kv_len = 3 * GROUP_QUERIES, 1500
    pad = 77
    together = calls.inputs(calls.causal_intervals(q_len, kv_len, left=(0, pad)), kv_len)
    config = SparseAttentionConfig(alpha=2.0, min_keys=8, sink_keys=2, recent_keys=16, dense_below=0)
    budgets = config.budget()(together.visible)[:, None]
    mask = calls.select(selector, together, budgets, config).mask(4, kv_len)
    for start in range(0, q_len, GROUP_QUERIES):
        block = together.queries(start, start + GROUP_QUERIES)
        alone = calls.select(selector, block, budgets[:, :, start : start + GROUP_QUERIES], config).mask(4, kv_len)
        assert torch.equal(alone, mask[:, :, start : start + GROUP_QUERIES])
    for b, cut in ((0, 0), (1, pad)):
        alone_call = replace(
            together,
            query=together.query[b : b + 1],
            key=together.key[b : b + 1, :, cut:],
            value=together.value[b : b + 1, :, cut:],
            intervals=together.intervals[b : b + 1] - cut,
        )
        alone = calls.select(selector, alone_call, budgets[b : b + 1], config).mask(4, kv_len - cut)
        assert torch.equal(alone, mask[b : b + 1, ..., cut:])


def test_selection_carries_no_gradient_and_leaves_the_call_alone(selector: str) -> None:
    call = calls.inputs(calls.causal_intervals(8, 30), 30)
    before = [call.query.clone(), call.key.clone(), call.intervals.clone()]
    call.query.requires_grad_()
    selection = calls.select(selector, call, torch.full((2, 1, 8), 5), SparseAttentionConfig())
    assert not selection.positions.requires_grad
    for tensor, copy in zip([call.query, call.key, call.intervals], before, strict=True):
        assert torch.equal(tensor, copy)
