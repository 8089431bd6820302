"""The grouped selector: compiled and by PyTorch, against plain loops; its keys in 4 bits; and what attends to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hf_sparse import SparseAttentionConfig
from hf_sparse.call import AttentionCall, Selection, SharedSelection
from hf_sparse.kernels import cpu
from hf_sparse.kernels.quantised import QuantisedKeys
from hf_sparse.selectors import importance
from hf_sparse.selectors.grouped import GROUP_QUERIES, Grouped
from hf_sparse.selectors.importance import PERIOD, WINDOW
from tests import calls

needs_kernels = pytest.mark.skipif(cpu.unsupported_reason() is not None, reason=str(cpu.unsupported_reason()))
CONFIG = SparseAttentionConfig(sink_keys=3, recent_keys=10)
# Queries, keys, heads and key heads; keys of more than a PERIOD, and more heads a key head than registers hold, too.
SHAPES = [
    (1, 900, 3, 1),
    (1, 2500, 10, 2),
    (1, 300, 18, 1),
    (1, 300, 33, 1),
    (1, 300, 2, 2),
    (7, 200, 4, 2),
    (64, 400, 4, 1),
    (128, 1300, 1, 1),
    (192, 500, 2, 2),
]
KINDS = {
    "causal": lambda q_len, kv: calls.causal_intervals(q_len, kv),
    "sliding": lambda q_len, kv: calls.causal_intervals(q_len, kv, window=kv // 2),
    "left": lambda q_len, kv: calls.causal_intervals(q_len, kv, left=(0, kv // 3)),
    "right": lambda q_len, kv: calls.causal_intervals(q_len, kv, right=(0, q_len // 2)),
    "static": lambda q_len, kv: calls.causal_intervals(q_len, kv, left=(0, 2), spare=(kv - q_len) // 2),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_shape = pytest.mark.parametrize(("q_len", "kv_len", "heads", "kv_heads"), SHAPES)


def with_and_without_softcap(kinds: Iterable[str]) -> pytest.MarkDecorator:
    """Every kind with every shape, every other of them with a soft cap: each kind and each shape has both."""
    drawn = [(kind, *shape, (None, 1.5)[(i + j) % 2]) for i, kind in enumerate(kinds) for j, shape in enumerate(SHAPES)]
    return pytest.mark.parametrize(("kind", "q_len", "kv_len", "heads", "kv_heads", "softcap"), drawn)


def compiled(call: AttentionCall, budgets: Tensor, config: SparseAttentionConfig = CONFIG) -> Selection:
    """What the compiled kernels keep."""
    assert Grouped().uncompiled_reason(call) is None
    return calls.select("grouped", call, budgets, config)


def by_pytorch(call: AttentionCall, budgets: Tensor, config: SparseAttentionConfig = CONFIG) -> Selection:
    """The same without kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Grouped, "uncompiled_reason", lambda *_: "a test wants none")
        return calls.select("grouped", call, budgets, config)


Select = Callable[..., Selection]
both_ways = pytest.mark.parametrize("select", [pytest.param(compiled, marks=needs_kernels), by_pytorch])


def problems(
    kind: str, q_len: int, kv_len: int, heads: int, kv_heads: int, softcap: float | None
) -> list[tuple[AttentionCall, Tensor]]:
    """A call, and budgets for each head and for all heads: some too small for the past, some more than it has."""
    call = calls.inputs(KINDS[kind](q_len, kv_len), kv_len, heads=heads, kv_heads=kv_heads, dim=16, softcap=softcap)
    shapes = ((1, heads, 1), (1, 1, 1))
    return [(call, torch.minimum(call.visible[:, None], torch.randint(5, 150, shape))) for shape in shapes]


def assert_sound(selection: Selection, call: AttentionCall, budgets: Tensor) -> Tensor:
    """Every query has its budget of keys, all of which it sees; gives the mask."""
    mask = selection.mask(call.query.shape[1], call.key.shape[2])
    assert torch.equal(mask.sum(-1), budgets.expand(mask.shape[:3]))
    assert torch.equal(selection.kept(call.query.shape[1]), mask.sum(-1))
    assert not (mask & ~calls.visible_mask(call)).any()
    return mask


def overlap(mask: Tensor, expected: Tensor) -> float:
    return float((mask & expected).sum() / expected.sum())


@needs_kernels
@with_and_without_softcap(KINDS)
def test_what_is_kept(kind: str, q_len: int, kv_len: int, heads: int, kv_heads: int, softcap: float | None) -> None:
    """Kernels and PyTorch add up numbers in another order than the loops: another key may win by a rounding error."""
    for call, budgets in problems(kind, q_len, kv_len, heads, kv_heads, softcap):
        mask = assert_sound(compiled(call, budgets), call, budgets)
        plain = assert_sound(by_pytorch(call, budgets), call, budgets)
        size = min(GROUP_QUERIES, q_len)
        expected = calls.select_grouped(call, budgets, CONFIG.sink_keys, CONFIG.recent_keys, size, calls.rough_exp2)
        assert overlap(mask, plain) >= 0.998
        assert overlap(mask, expected) >= 0.998


@both_ways
@with_and_without_softcap(["causal", "sliding"])
def test_rough_exponentials_change_little(
    select: Select, kind: str, q_len: int, kv_len: int, heads: int, kv_heads: int, softcap: float | None
) -> None:
    """They err by up to 6 %: that counts where a soft cap makes all keys much alike."""
    call, budgets = problems(kind, q_len, kv_len, heads, kv_heads, softcap)[0]
    mask = assert_sound(select(call, budgets), call, budgets)
    expected = calls.select_grouped(call, budgets, CONFIG.sink_keys, CONFIG.recent_keys, min(GROUP_QUERIES, q_len))
    assert overlap(mask, expected) >= (0.98 if softcap is None else 0.96)


@both_ways
@pytest.mark.parametrize(("sink_keys", "recent_keys"), [(0, 0), (5, 0), (0, 1), (2, 70), (200, 3)])
@pytest.mark.parametrize("kind", ["causal", "sliding"])
@pytest.mark.parametrize("q_len", [1, 7, GROUP_QUERIES])
def test_sinks_and_recent_keys_of_any_number(
    select: Select, q_len: int, kind: str, sink_keys: int, recent_keys: int
) -> None:
    config = SparseAttentionConfig(sink_keys=sink_keys, recent_keys=recent_keys)
    for call, budgets in problems(kind, q_len, 250, 4, 2, None):
        mask = assert_sound(select(call, budgets, config), call, budgets)
        expected = calls.select_grouped(call, budgets, sink_keys, recent_keys, q_len, calls.rough_exp2)
        assert overlap(mask, expected) >= 0.998


@both_ways
@pytest.mark.parametrize("q_len", [1, 7, 64])
def test_a_head_that_keeps_everything_does_not_choose_for_the_others(select: Select, q_len: int) -> None:
    call = calls.inputs(calls.causal_intervals(q_len, 400), 400, dim=16)
    key = call.key.clone()
    key[:, :, 300] = 3.0
    call = replace(call, query=call.query + 5, key=key)
    budgets = call.visible[:, None].expand(2, 4, -1).clone()
    budgets[:, 1::2] = 100
    mask = assert_sound(select(call, budgets), call, budgets)
    assert mask[..., 300].all()


@both_ways
@pytest.mark.parametrize("kind", ["causal", "sliding", "left", "static"])
def test_grouped_is_topk_where_nothing_is_shared_or_rounded(select: Select, kind: str) -> None:
    """One query of one head, and keys of one component each, whose transforms 4 bits hold."""
    call = calls.inputs(KINDS[kind](1, 300), 300, heads=2, kv_heads=2, dim=16)
    query, key = torch.zeros_like(call.query), torch.zeros_like(call.key)
    query[..., 0] = 2.0
    key.scatter_(-1, torch.randint(2, (*key.shape[:3], 1)), torch.randint(-7, 8, (*key.shape[:3], 1)).float())
    call = replace(call, query=query, key=key)
    budgets = call.visible[:, None].clamp(max=60)
    mask = assert_sound(select(call, budgets), call, budgets)
    # Many scores are equal: which of their keys are kept may differ.
    ours, best = (
        calls.scores(call).masked_fill(~x, -torch.inf).sort(-1).values
        for x in (mask, calls.select_topk(call, budgets, CONFIG.sink_keys, CONFIG.recent_keys))
    )
    assert torch.equal(ours, best)


@both_ways
@pytest.mark.parametrize("wanted", [WINDOW // 2, PERIOD + WINDOW // 2, PERIOD // 2, PERIOD + PERIOD // 2])
@pytest.mark.parametrize("q_len", [1, GROUP_QUERIES])
def test_a_key_that_outweighs_everything_is_found(select: Select, q_len: int, wanted: int) -> None:
    """Among the keys that are looked at for the estimate, and elsewhere; weights do not fit into a float."""
    kv_len = 3 * PERIOD
    call = calls.inputs(calls.causal_intervals(q_len, kv_len), kv_len, dim=16)
    key = call.key - 2
    key[:, :, wanted] = 8
    call = replace(call, query=call.query.abs() * 30, key=key)
    budgets = torch.full((2, 1, q_len), 90)
    config = SparseAttentionConfig(sink_keys=0, recent_keys=8)
    mask = assert_sound(select(call, budgets, config), call, budgets)
    assert mask[..., wanted].all()


@needs_kernels
@pytest.mark.parametrize("places", ["one tile in sixteen", "all others"])
def test_the_best_of_very_many_are_found_wherever_they_lie(places: str) -> None:
    """Also where a sample of the scores says nothing about the rest of them."""
    call = calls.inputs(calls.causal_intervals(1, 9000), 9000, heads=2, kv_heads=1, dim=16)
    query = call.query[:, :1].expand(-1, 2, -1, -1).contiguous()
    position = torch.arange(9000)
    strong = ((position - 16) // cpu.lanes() % 16 == 0) == (places == "one tile in sixteen")
    strong &= (position >= 16) & (position < 8900)
    key = call.key.clone()
    key[:, :, strong] += query[:, :1] * 100 / query[:, :1].square().sum(-1, keepdim=True)
    budgets = torch.full((2, 1, 1), min(500, int(strong.sum())) + 16 + 64)
    config = SparseAttentionConfig(sink_keys=16, recent_keys=64)
    call = replace(call, query=query, key=key)
    mask = assert_sound(compiled(call, budgets, config), call, budgets)
    assert torch.equal(mask[..., 16:8936].sum(-1), (mask & strong).sum(-1))


@both_ways
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 9000), (GROUP_QUERIES, 2000)])
def test_equal_keys_are_kept_from_the_most_recent_on(select: Select, q_len: int, kv_len: int) -> None:
    call = calls.inputs(calls.causal_intervals(q_len, kv_len), kv_len, dim=16)
    call = replace(call, key=call.key[:, :, :1].expand(-1, -1, kv_len, -1).contiguous())
    budgets = torch.full((2, 1, q_len), 1000)
    mask = assert_sound(select(call, budgets, SparseAttentionConfig(sink_keys=4)), call, budgets)
    position = torch.arange(kv_len)
    stop = call.intervals[..., 1:]
    assert torch.equal(mask, ((position < 4) | ((position >= stop - 996) & (position < stop))).expand_as(mask))


def decoded(parts: tuple[Tensor, Tensor], length: int) -> Tensor:
    """Keys `(batch, kv_heads, length, head_dim)` from codes in 4 bits and scales, as `cpu.LAYOUT` has them."""
    codes, scales = parts
    batch, heads, tiles, eights, size, _ = codes.shape
    fours = torch.stack([codes & 15, codes >> 4], dim=4)
    keys = fours.permute(0, 1, 2, 5, 3, 4, 6).reshape(batch, heads, tiles * size, eights * 8)
    return ((keys.float() - 8) * scales[..., None])[:, :, :length]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_in_4_bits_are_off_by_half_a_step(dtype: torch.dtype) -> None:
    def texts() -> list[tuple[int, int]]:
        return [(3, 70), (0, 60)]

    storage = torch.randn(2, 80, 3, 24).to(dtype).transpose(1, 2)
    key = storage[:, :, 5:78]
    key[0, 0, 7] = 0
    found = decoded(QuantisedKeys().up_to(key, 70, cpu.LAYOUT, texts=texts), 70)
    center = torch.stack([key[0, :, 3:70].float().mean(1), key[1, :, :60].float().mean(1)])
    mixed = importance.mixed(key[:, :, :70].float() - center[:, :, None])
    step = mixed.abs().amax(-1, keepdim=True) / 7
    assert ((found - mixed).abs() <= 0.5001 * step).all()
    codes, scales = (x[:, :, :70] for x in QuantisedKeys().up_to(key, 70, importance.LAYOUT, texts=texts))
    assert torch.equal(found, codes * scales[..., None])


@needs_kernels
@pytest.mark.parametrize("length", [40, 290])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_in_4_bits_follow_the_cache(dtype: torch.dtype, length: int) -> None:
    """Appended a few at a time, cropped, overwritten and rearranged: as if quantised at once."""
    key = 3 + torch.randn(3, 2, 700, 16).to(dtype)
    starts = [0, 20, 5]

    def up_to(kept: QuantisedKeys, stop: int) -> tuple[Tensor, Tensor]:
        return kept.up_to(key, stop, cpu.LAYOUT, texts=lambda: [(start, max(start, stop)) for start in starts])

    kept = QuantisedKeys()
    for stop in (1, 15, 16, 17, 64, 300, 600):
        up_to(kept, stop)
    kept.crop(length)
    key = torch.cat([key[:, :, :length], torch.randn(3, 2, 700 - length, 16).to(dtype)], dim=2)
    up_to(kept, 570)
    order = [2, 0, 0, 1]
    kept.rearrange(lambda x: x.index_select(0, torch.tensor(order)))
    key, starts = key[order], [starts[i] for i in order]
    followed, fresh = (decoded(up_to(x, 700), 700) for x in (kept, QuantisedKeys()))
    assert torch.equal(followed, fresh)


@needs_kernels
@pytest.mark.parametrize("q_len", [1, 3 * GROUP_QUERIES])
def test_threads_change_nothing(q_len: int) -> None:
    call = calls.inputs(calls.causal_intervals(q_len, 9000), 9000, dim=16)
    budgets = torch.full((2, 1, q_len), 700)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            selection = compiled(call, budgets)
            codes, scales = QuantisedKeys().up_to(call.key, 9000, cpu.LAYOUT)
            found.append((selection.mask(4, 9000), calls.run_engine("cpu", call, selection), codes, scales))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@both_ways
@pytest.mark.parametrize("q_len", [1, GROUP_QUERIES])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_what_is_no_number_does_not_hold_a_call_up(
    select: Select, softcap: float | None, number: float, q_len: int
) -> None:
    call = calls.inputs(calls.causal_intervals(q_len, 500), 500, dim=16, softcap=softcap)
    key, query = call.key.clone(), call.query.clone()
    key[:, :, 100:103] = query[:, 0, -1] = number
    budgets = torch.full((2, 1, q_len), 90)
    for changed in (replace(call, key=key), replace(call, query=query)):
        assert_sound(select(changed, budgets), changed, budgets)


@both_ways
@pytest.mark.parametrize("q_len", [1, GROUP_QUERIES])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_keys_that_nobody_sees_change_nothing(select: Select, q_len: int, number: float) -> None:
    """Of padding, and of a static cache that was never written to."""
    call = calls.inputs(calls.causal_intervals(q_len, 700, left=(0, 90), spare=50), 700, dim=16)
    seen = calls.visible_mask(call)[:, :1].any(2)[..., None]
    budgets = torch.full((2, 1, q_len), 90)
    masks = [select(x, budgets).mask(4, 700) for x in (call, replace(call, key=call.key.masked_fill(~seen, number)))]
    assert torch.equal(*masks)


ALWAYS = CONFIG.always


def in_one_call(call: AttentionCall, budgets: Tensor) -> Tensor:
    out = Grouped().decode(call, budgets, ALWAYS)
    assert out is not None
    return out


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("extras", [{}, {"softcap": 1.5, "sinks": True}], ids=["plain", "softcap and sinks"])
@pytest.mark.parametrize(("kv_len", "heads", "kv_heads"), [(1, 2, 1), (900, 3, 1), (2500, 10, 2), (300, 33, 1)])
@every_kind
def test_decoding_in_one_call_is_to_select_and_to_attend(
    kind: str, kv_len: int, heads: int, kv_heads: int, dtype: torch.dtype, extras: dict[str, Any]
) -> None:
    call = calls.inputs(
        KINDS[kind](1, kv_len), kv_len, heads=heads, kv_heads=kv_heads, dim=16, value_dim=24, dtype=dtype, **extras
    )
    # As models have them: heads next to each other, and keys in a cache with room to spare.
    query, key = call.query.reshape(-1, 1, heads, 16).transpose(1, 2), calls.turned(call.key)
    call = replace(call, query=query, key=key)
    for shape in ((1, heads, 1), (1, 1, 1)):
        budgets = torch.minimum(call.visible[:, None], torch.randint(1, 150, shape))
        expected = calls.run_engine("cpu", call, compiled(call, budgets))
        assert torch.equal(in_one_call(replace(call, quantised=QuantisedKeys()), budgets), expected)


@needs_kernels
def test_a_decoding_call_that_fails_leaves_no_key_out(monkeypatch: pytest.MonkeyPatch) -> None:
    call, shorter = (calls.inputs(calls.causal_intervals(1, length), 600, dim=16) for length in (600, 599))
    budgets, keys = torch.full((2, 1, 1), 90), QuantisedKeys()
    in_one_call(replace(shorter, quantised=keys), budgets)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "decode", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            in_one_call(replace(call, quantised=keys), budgets)
    _, scales = keys.up_to(call.key, 600, cpu.LAYOUT)
    assert (scales[:, :, 599] > 0).all()
    assert torch.equal(in_one_call(replace(call, quantised=keys), budgets), in_one_call(call, budgets))


class Other(Grouped):
    def select(self, call: AttentionCall, *args: Any) -> Selection:
        return super().select(call, *args)


@pytest.mark.parametrize("reason", ["gradients", "dropout", "no kernels", "another selection"])
def test_decoding_in_one_call_is_left_to_others_where_it_cannot_be_done(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = calls.inputs(calls.causal_intervals(1, 600), 600, dim=16, dropout=0.1 * (reason == "dropout"))
    if reason == "gradients":
        call = replace(call, query=call.query.requires_grad_())
    if reason == "no kernels":
        monkeypatch.setattr(Grouped, "uncompiled_reason", lambda *_: "a test wants none")
    selector = Other() if reason == "another selection" else Grouped()
    assert selector.decode(call, torch.full((2, 1, 1), 90), ALWAYS) is None


@needs_kernels
@pytest.mark.parametrize("q_len", [1, GROUP_QUERIES])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.device("meta")], ids=str)
def test_defaults_of_pytorch_do_not_matter(default: torch.dtype | torch.device, q_len: int) -> None:
    """What the kernels write to has the type and the place that they know."""
    call = calls.inputs(calls.causal_intervals(q_len, 600), 600, dim=16)
    budgets = torch.full((2, 1, q_len), 90)

    def attended() -> Tensor:
        fresh = replace(call, intervals=call.intervals.clone())
        if q_len == 1:
            return in_one_call(fresh, budgets)
        return calls.run_engine("cpu", fresh, compiled(fresh, budgets))

    expected, before = attended(), torch.get_default_dtype()
    if isinstance(default, torch.device):
        with default:
            assert torch.equal(attended(), expected)
        return
    torch.set_default_dtype(default)
    try:
        assert torch.equal(attended(), expected)
    finally:
        torch.set_default_dtype(before)


@both_ways
@pytest.mark.parametrize("q_len", [1, GROUP_QUERIES])
@pytest.mark.parametrize("name", ["sink_keys", "recent_keys"])
def test_lists_are_no_longer_than_the_text(select: Select, name: str, q_len: int) -> None:
    call = calls.inputs(calls.causal_intervals(q_len, 600), 600, dim=16)
    budgets = torch.full((2, 1, q_len), 90)
    selection = select(call, budgets, SparseAttentionConfig(**{name: 1_000_000}))
    assert selection.positions.shape[-1] <= 608 + 96
    assert_sound(selection, call, budgets)


DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@needs_kernels
@pytest.mark.parametrize(
    ("engine", "dtype"), [*(("cpu", dtype) for dtype in DTYPES), ("gather", torch.float32)], ids=str
)
@pytest.mark.parametrize(
    ("q_len", "share"), [(1, 1), (1, 3), (1, 4), (1, 5), (1, 16), (1, 33), (7, 1), (7, 33), (2 * GROUP_QUERIES, 3)]
)
@pytest.mark.parametrize("extras", [{}, {"softcap": 1.5, "sinks": True}], ids=["plain", "softcap and sinks"])
def test_engines_attend_to_runs_as_the_reference_does(
    engine: str, q_len: int, share: int, dtype: torch.dtype, extras: dict[str, object]
) -> None:
    """Heads that are no multiple of a register wide, of keys and of values; so many keys that threads share them."""
    intervals = calls.causal_intervals(q_len, 1500, left=(0, 300), right=(0, q_len // 3))
    for value_dim in (16, 21):
        call = calls.inputs(
            intervals,
            1500,
            heads=2 * share,
            kv_heads=2,
            dim=24,
            value_dim=value_dim,
            dtype=dtype,
            **extras,  # type: ignore[arg-type]
        )
        most = torch.arange(100, 700, 600 // (2 * share))[: 2 * share]
        selection = compiled(call, torch.minimum(call.visible[:, None], most[:, None]))
        assert isinstance(selection, SharedSelection)
        out = calls.run_engine(engine, call, selection)
        assert out.dtype == dtype
        assert_close(out, calls.run_engine("reference", call, selection), atol=DTYPES[dtype], rtol=DTYPES[dtype])


@pytest.mark.parametrize(("queries_per_group", "share"), [(1, 1), (1, 3), (3, 2)])
def test_runs_say_the_same_as_a_mask(queries_per_group: int, share: int) -> None:
    """Random runs, some of them empty, of shuffled positions."""
    generator = torch.Generator().manual_seed(queries_per_group * share)
    groups, pairs = 6 // queries_per_group, queries_per_group * share
    positions = torch.rand(2, 2, groups, 50, generator=generator).argsort(-1)
    bounds = torch.randint(51, (2, 2, groups, pairs, 6), generator=generator).sort(-1).values
    bounds[0, 0, 0, 0, 1] = bounds[0, 0, 0, 0, 0]
    selection = SharedSelection(positions, bounds.unflatten(-1, (3, 2)), queries_per_group)
    place = selection.pairs_of(torch.arange(2 * 2 * share * 6).view(2, 2 * share, 6), 2)
    expected = torch.zeros(2 * 2 * share * 6, 50, dtype=torch.bool)
    for b, head, group, pair in torch.cartesian_prod(*(torch.arange(n) for n in place.shape)).tolist():
        for start, stop in selection.runs[b, head, group, pair].tolist():
            expected[place[b, head, group, pair], positions[b, head, group, start:stop]] = True
    expected = expected.view(2, 2 * share, 6, 50)
    assert torch.equal(selection.mask(2 * share, 50), expected)
    assert torch.equal(selection.kept(2 * share), expected.sum(-1))
    same = Selection(positions, selection.allowed, queries_per_group, per_head=False)
    assert torch.equal(same.mask(2 * share, 50), expected)


@pytest.mark.parametrize("dim", [8, 16, 24, 64, 80, 96, 256, 7])
def test_transforms_leave_products_as_they_are(dim: int) -> None:
    """But for the factor by which all of them grow; one large component is spread over a block."""
    key, query = torch.randn(20, dim, dtype=torch.float64), torch.randn(30, dim, dtype=torch.float64)
    half = -(-dim // 2)
    block = 2 * (half & -half)
    assert_close(importance.mixed(key) @ importance.mixed(query).T, block * key @ query.T)
    if dim % 2 == 0:
        assert_close(importance.mixed(key), calls.mixed(key) * block**0.5)
    one = torch.zeros(dim)
    one[0] = 1.0
    assert (importance.mixed(one).abs() == 1).sum() == block
