"""Triton's kernels: the engine against the reference, the selector against PyTorch; interpreted without a GPU."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import hf_sparse
from hf_sparse import engines, kernels, selectors
from hf_sparse.cache import SparseCache
from hf_sparse.call import AlwaysKept, AttentionCall, Selection, SharedSelection
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.kernels import gpu
from hf_sparse.kernels.quantised import QuantisedKeys
from hf_sparse.selectors import importance, on_gpus
from hf_sparse.selectors.grouped import GROUP_QUERIES, Grouped, by_triton
from hf_sparse.selectors.importance import PERIOD
from hf_sparse.visibility import VisibleRanges
from tests import calls, tiny
from tests.sparse import SPARSE
from tests.test_engines import CALLS, layout
from tests.test_grouped import KINDS

pytest.importorskip("triton", reason="triton is not installed")
tl = importlib.import_module("triton.language")
interpreter = importlib.import_module("triton.runtime.interpreter")
common = importlib.import_module("hf_sparse.kernels.triton.common")
codes = importlib.import_module("hf_sparse.kernels.triton.codes")

ENGINE = engines.ENGINES["triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALWAYS = AlwaysKept(3, 10)


@pytest.fixture(autouse=True)
def _bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter keeps bfloat16 as its bits, and would multiply those: it is given float32 instead."""
    builder = interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def create_float_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(builder, "create_dot", create_float_dot)


@pytest.fixture
def many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is cut into as many parts as it can be."""
    monkeypatch.setattr(common, "_multiprocessors", lambda _: 1 << 20)


def moved(call: AttentionCall) -> AttentionCall:
    states = {field.name: getattr(call, field.name) for field in fields(call)}
    tensors = {name: x.to(DEVICE) for name, x in states.items() if isinstance(x, Tensor)}
    return replace(call, **tensors)


def placed(selection: Selection) -> Selection:
    positions, allowed = (x.to(DEVICE) for x in (selection.positions, selection.allowed))
    return Selection(positions, allowed, selection.queries_per_group, selection.per_head)


def check(call: AttentionCall, selection: Selection) -> None:
    """The engine gives what the reference gives."""
    call, selection = moved(call), placed(selection)
    out = ENGINE.attend(call, selection)
    tolerance = 1e-5 if out.dtype == torch.float32 else 2e-2
    assert out.dtype == call.value.dtype
    assert_close(out, calls.run_engine("reference", call, selection), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", CALLS)
def test_engine_is_the_reference(kind: str) -> None:
    call = CALLS[kind]()
    check(call, calls.random_selection(call, layout(call, 3), False))


@pytest.mark.parametrize(("queries_per_group", "per_head"), [(1, True), (1, False), (6, True)])
@pytest.mark.parametrize("kind", ["both", "values wider"])
def test_layouts(kind: str, queries_per_group: int, per_head: bool) -> None:
    call = CALLS[kind]()
    check(call, calls.random_selection(call, queries_per_group, per_head))


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        (64, torch.float32),
        (64, torch.float16),
        (80, torch.bfloat16),
        (128, torch.float32),
        (128, torch.bfloat16),
        (256, torch.float32),
        (256, torch.float16),
    ],
    ids=str,
)
def test_several_tiles(dim: int, dtype: torch.dtype) -> None:
    """More pairs and keys than a tile has, and neither a multiple of it."""
    call = calls.inputs(calls.causal_intervals(35, 150, left=(0,), right=(0,)), 150, dim=dim, dtype=dtype, sinks=True)
    check(call, calls.random_selection(call, 35, False))


@pytest.mark.parametrize("heads", [3, 4])
def test_whole_groups(heads: int) -> None:
    """64 queries of 3 or 4 heads: 3 tiles of 64 pairs, or 2 of 128."""
    call = calls.inputs(
        calls.causal_intervals(64, 100, left=(0,), right=(0,)),
        100,
        heads=heads,
        kv_heads=1,
        dim=16,
        dtype=torch.bfloat16,
    )
    check(call, calls.random_selection(call, 64, False))


@pytest.mark.parametrize("kind", ["both", "decode, padded"])
@pytest.mark.usefixtures("many_processors")
def test_parts_are_joined(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in decoding: several programs share the keys of a group. The last part is shorter than the others."""
    joined: list[tuple[int, ...]] = []
    attending = importlib.import_module("hf_sparse.kernels.triton.attend")
    join = attending._join_parts
    monkeypatch.setattr(attending, "_join_parts", Recorder(join, joined))
    intervals = CALLS[kind]().intervals
    shifted = torch.where(intervals[..., 1:] > intervals[..., :1], intervals + torch.tensor([0, 289]), intervals)
    call = calls.inputs(shifted, 300, softcap=1.5 if kind == "both" else None, sinks=kind == "both")
    check(call, calls.random_selection(call, layout(call, 3), False))
    assert len(joined) == 1


class Recorder:
    """A kernel that notes the grids of its launches."""

    def __init__(self, kernel: object, grids: list[tuple[int, ...]]) -> None:
        self.kernel, self.grids = kernel, grids

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        self.grids.append(grid)
        return self.kernel[grid]  # type: ignore[index]


@pytest.mark.parametrize("programs", [1, 7, 264, 10_000])
@pytest.mark.parametrize("steps", [0, 1, 5, 64, 1000])
def test_parts_cover_all_steps(programs: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "_multiprocessors", lambda _: 132)
    parts, each = common.parts_for(torch.device("cpu"), programs, steps, most=64, programs_each=2)
    assert 1 <= parts <= 64
    assert parts * each >= steps > (parts - 1) * each or steps == 0
    assert parts == 1 or parts * programs <= 264


@pytest.mark.parametrize("kind", ["padded", "sinks", "softcap"])
@pytest.mark.parametrize("cut", [False, True])
def test_rows_without_keys_give_zeros(kind: str, cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if cut:
        monkeypatch.setattr(common, "_multiprocessors", lambda _: 1 << 20)
    call = CALLS[kind]()
    selection = calls.random_selection(call, 3, False)
    selection.allowed[:, :, 0] = False
    call, selection = moved(call), placed(selection)
    out = ENGINE.attend(call, selection)
    assert (out[:, :, :3] == 0).all()
    assert (out[:, :, 3:] != 0).any()
    none = replace(selection, positions=selection.positions[..., :0], allowed=selection.allowed[..., :0])
    assert (ENGINE.attend(call, none) == 0).all()


def test_strides_do_not_matter() -> None:
    """Models hand over transposed views, and caches parts of longer buffers."""
    call = CALLS["plain"]()
    selection = calls.random_selection(call, 3, False)
    odd = replace(
        call,
        query=call.query.transpose(1, 2).contiguous().transpose(1, 2),
        key=torch.cat([call.key, call.key], dim=2)[:, :, :11],
        value=call.value.transpose(2, 3).contiguous().transpose(2, 3),
    )
    wide = torch.cat([selection.allowed, selection.allowed], dim=-1)[..., : selection.allowed.shape[-1]]
    check(odd, replace(selection, allowed=wide, positions=selection.positions.mT.contiguous().mT))


@pytest.mark.parametrize("selector", ["grouped", "topk", "window"])
def test_selections_of_the_selectors(selector: str) -> None:
    call = calls.inputs(calls.causal_intervals(16, 130, left=(0,), right=(0,)), 130)
    config = SparseAttentionConfig(sink_keys=2, recent_keys=8)
    budgets = call.visible[:, None].clamp(max=24)
    check(call, calls.select(selector, call, budgets, config))


def grows(call: AttentionCall) -> AttentionCall:
    return replace(call, key=call.key.requires_grad_())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (grows, "no backward pass"),
        (lambda call: replace(call, dropout=0.1), "dropout is not supported"),
        (lambda call: replace(call, query=call.query.double()), "torch.float32, torch.float64"),
        (lambda call: replace(call, value=torch.zeros(2, 2, 11, 512)), "512"),
    ],
)
def test_what_it_cannot_do_is_refused(change: Callable[[AttentionCall], AttentionCall], reason: str) -> None:
    call = CALLS["plain"]()
    selection = calls.random_selection(call, 3, False)
    with pytest.raises(UserError, match=reason):
        calls.run_engine("triton", moved(change(call)), selection)


def test_no_gradients_are_asked_of_it_without_grad() -> None:
    call = CALLS["plain"]()
    with torch.no_grad():
        check(grows(call), calls.random_selection(call, 3, False))


def test_devices_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    call = CALLS["plain"]()
    monkeypatch.setattr(gpu, "interprets", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "is on cpu" in (ENGINE.unsupported_reason(call) or "")
    assert "is on mps" in (gpu.unsupported_reason(torch.device("mps")) or "")
    assert "no GPU" in (calls.unavailable("triton") or "")
    with pytest.raises(ValueError, match="engine 'triton' cannot run here: there is no GPU"):
        hf_sparse.patch(tiny.model("llama"), engine="triton")
    with monkeypatch.context() as old_gpu:
        old_gpu.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
        assert "7.5" in (gpu.unsupported_reason(torch.device("cuda", 7)) or "")
    monkeypatch.setattr(gpu, "find_spec", lambda _: None)
    for reason in (ENGINE.unsupported_reason(call), calls.unavailable("triton")):
        assert "pip install triton" in (reason or "")
    monkeypatch.setenv("HF_SPARSE_KERNELS", "0")
    assert calls.unavailable("triton") == "HF_SPARSE_KERNELS=0 is set"
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match="pip install triton"):
        importlib.reload(importlib.import_module(f"{kernels.__name__}.triton"))


# Keys in 4 bits.

TEXTS = [(3, 70), (0, 60)]


def encoded(key: Tensor, stops: tuple[int, ...]) -> Tensor:
    """Transforms of keys `(batch, kv_heads, stops[-1], dim)` by their codes, written up to each stop in turn."""
    kept, dim = QuantisedKeys(), key.shape[3]
    for stop in stops:
        both, scales = kept.up_to(key, stop, codes.LAYOUT, texts=lambda: TEXTS)
    assert both.shape[3] == -(-dim // 2)
    components = torch.cat([both & 15, both >> 4], dim=-1).float() - 8
    return (components * scales[..., None])[:, :, : stops[-1]]


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        (7, torch.float32),
        (16, torch.bfloat16),
        (16, torch.float16),
        (80, torch.float16),
        (256, torch.float32),
        (256, torch.bfloat16),
    ],
    ids=str,
)
def test_keys_in_4_bits_are_those_of_pytorch(dim: int, dtype: torch.dtype) -> None:
    """Of any strides, a few at a time; but where a component lies between two codes."""
    key = torch.randn(2, 90, 3, dim).to(dtype).transpose(1, 2)[:, :, 5:78].to(DEVICE)
    key[0, 0, 7] = 0
    both, scales = (x[:, :, :70] for x in QuantisedKeys().up_to(key, 70, importance.LAYOUT, texts=lambda: TEXTS))
    found, expected = encoded(key, (1, 33, 70)), both * scales[..., None]
    center = torch.stack([key[i, :, start:stop].float().mean(1) for i, (start, stop) in enumerate(TEXTS)])
    mixed = importance.mixed(key[:, :, :70].float() - center[:, :, None])
    step = (mixed.abs().amax(-1, keepdim=True) / 7).expand_as(found)
    off = (found - expected).abs() > 0.01 * step
    assert off.float().mean() < 1e-3
    assert ((found - mixed).abs() <= 0.5001 * step).all()


# The grouped selector.


def by_pytorch(call: AttentionCall, budgets: Tensor, always: AlwaysKept = ALWAYS) -> Selection:
    """What PyTorch keeps, on the device of the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Grouped, "uncompiled_reason", lambda *_: "a test wants none")
        return Grouped().select(moved(call), budgets, always)


def by_kernels(call: AttentionCall, budgets: Tensor, always: AlwaysKept = ALWAYS) -> SharedSelection:
    """What the kernels keep: sound, and the same for each pair as PyTorch says, but for a few keys."""
    call, heads, kv_len = moved(call), call.query.shape[1], call.key.shape[2]
    assert on_gpus.unsupported_reason(call) is None
    selection = by_triton(call, budgets, always, min(GROUP_QUERIES, call.query.shape[2]))
    mask = selection.mask(heads, kv_len).cpu()
    assert torch.equal(mask.sum(-1), budgets.expand(mask.shape[:3]))
    assert torch.equal(selection.kept(heads).cpu(), mask.sum(-1))
    assert not (mask & ~calls.visible_mask(call)).any()
    assert int(selection.positions.min()) >= 0
    assert int(selection.positions.max()) < kv_len
    assert selection.positions.shape[-1] % 16 == 0
    return selection


def assert_same_keys(call: AttentionCall, budgets: Tensor, always: AlwaysKept = ALWAYS) -> None:
    heads, kv_len = call.query.shape[1], call.key.shape[2]
    found, expected = (select(call, budgets, always).mask(heads, kv_len).cpu() for select in (by_kernels, by_pytorch))
    assert (found & expected).sum() >= 0.998 * expected.sum()


def some_budgets(call: AttentionCall, most: int, *, per_head: bool) -> Tensor:
    """Some too small for the past, some more than it has."""
    shape = (1, call.query.shape[1] if per_head else 1, 1)
    return torch.minimum(call.visible[:, None], torch.randint(5, most, shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("q_len", "kv_len", "kv_heads"), [(1, 200, 2), (7, 200, 1), (GROUP_QUERIES, 150, 1)])
def test_kernels_keep_what_pytorch_keeps(kind: str, q_len: int, kv_len: int, kv_heads: int) -> None:
    call = calls.inputs(KINDS[kind](q_len, kv_len), kv_len, heads=2, kv_heads=kv_heads, dim=16)
    assert_same_keys(call, some_budgets(call, 150, per_head=q_len == 7))


@pytest.mark.parametrize(
    ("dim", "share", "dtype"),
    [(16, 7, torch.float16), (80, 3, torch.bfloat16), (128, 4, torch.bfloat16), (256, 1, torch.float32)],
)
@pytest.mark.parametrize("q_len", [1, 9])
def test_heads_of_any_size_and_number(q_len: int, dim: int, share: int, dtype: torch.dtype) -> None:
    """Of three sequences, with padding of both sides."""
    intervals = calls.causal_intervals(q_len, 120, left=(0, 50, 3), right=(0, q_len // 3, 0))
    call = calls.inputs(
        intervals, 120, heads=share, kv_heads=1, dim=dim, dtype=dtype, softcap=1.5 if dim == 80 else None
    )
    assert_same_keys(call, some_budgets(call, 90, per_head=dim == 16))


@pytest.mark.parametrize(("q_len", "softcap"), [(1, None), (1, 1.5), (2 * GROUP_QUERIES, None)])
@pytest.mark.usefixtures("many_processors")
def test_totals_from_some_of_the_keys(q_len: int, softcap: float | None) -> None:
    """More keys than a period has; programs share those that are looked at, or not the blocks."""
    kv_len = PERIOD + 500
    call = calls.inputs(
        calls.causal_intervals(q_len, kv_len, left=(0,), right=(0,)), kv_len, kv_heads=4, softcap=softcap
    )
    call = replace(call, query=call.query[:, :1], key=call.key[:, :1], value=call.value[:, :1])
    assert_same_keys(call, some_budgets(call, 300, per_head=False))


@pytest.mark.parametrize("q_len", [1, 40])
def test_heads_that_keep_very_different_numbers(q_len: int) -> None:
    """Keys in their order, for more ranks than a program puts into it at a time."""
    call = calls.inputs(calls.causal_intervals(q_len, 900, left=(0,), right=(0,)), 900, heads=3, kv_heads=1)
    assert_same_keys(call, torch.minimum(call.visible[:, None], torch.tensor([30, 420, 800]).view(1, 3, 1)))


@pytest.mark.parametrize("always", [AlwaysKept(), AlwaysKept(5, 0), AlwaysKept(0, 70), AlwaysKept(10**9, 3)], ids=str)
@pytest.mark.parametrize("q_len", [1, 7])
def test_sinks_and_recent_keys_of_any_number(q_len: int, always: AlwaysKept) -> None:
    call = calls.inputs(calls.causal_intervals(q_len, 120, 100, (0,), (0,)), 120, heads=2, kv_heads=1)
    assert_same_keys(call, some_budgets(call, 90, per_head=False), always)


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 4700), (5, 600)])
def test_equal_keys_are_kept_from_the_most_recent_on(q_len: int, kv_len: int) -> None:
    """More of them than a program looks at together, all as important as the last that is kept."""
    call = calls.inputs(calls.causal_intervals(q_len, kv_len, left=(0,), right=(0,)), kv_len, heads=1, kv_heads=1)
    call = replace(call, key=call.key[:, :, :1].expand(-1, -1, kv_len, -1).contiguous())
    budgets = torch.full((1, 1, q_len), kv_len // 3)
    mask = by_kernels(call, budgets, AlwaysKept(4, 0)).mask(1, kv_len).cpu()
    position, stop = torch.arange(kv_len), call.intervals[..., 1:]
    recent = (position >= stop - budgets[0, 0, 0] + 4) & (position < stop)
    assert torch.equal(mask, ((position < 4) | recent).expand_as(mask))


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_one_set_of_launches_decodes_a_text_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known on the host is the room of a cache alone: launches are the same, and keep what is kept where all is known.

    Sequences are of different lengths, and keys behind them are not written yet.
    """
    room, lengths = 500, torch.tensor([379, 290])
    full = moved(calls.inputs(calls.causal_intervals(1, room), room, heads=2, kv_heads=1, dim=16))
    launched: list[Any] = []
    kernel = type(importlib.import_module("hf_sparse.kernels.triton.attend")._attend_tile)  # compiled or interpreted
    run = kernel.run

    def noted(self: Any, *args: Any, grid: Any, **options: Any) -> None:
        facts = [tuple(x.shape) if isinstance(x, Tensor) else x for x in (*args, *options.values())]
        launched.append((self.fn.__name__, grid, facts))
        run(self, *args, grid=grid, **options)

    def step(stop: Tensor, budgets: Tensor, past: int, room: int | None, quantised: QuantisedKeys) -> Tensor:
        intervals = torch.stack([torch.zeros_like(stop), stop], -1).to(torch.int32).view(2, 1, 1, 2).to(DEVICE)
        hidden = torch.arange(full.key.shape[2]) >= stop.view(2, 1, 1)
        key = full.key.masked_fill(hidden[..., None].to(DEVICE), torch.nan)
        bounds = () if room is None else (torch.zeros(2, 1).long(), torch.full((2, 1), room))
        ranges = VisibleRanges(intervals, *bounds)
        call = replace(full, key=key, intervals=intervals, known_ranges=ranges, quantised=quantised)
        launched.clear()
        selection = on_gpus.by_triton(call, budgets, ALWAYS, 1, (16, past))
        kept = selection.mask(2, full.key.shape[2]).sum(-1).cpu()
        assert torch.equal(kept, budgets.expand(-1, 2, -1).cpu())
        return ENGINE.attend(call, selection)

    monkeypatch.setattr(common, "_multiprocessors", lambda _: 8)
    monkeypatch.setattr(kernel, "run", noted)
    quantised, seen = QuantisedKeys(), []
    written = torch.arange(room) < lengths.view(2, 1, 1) - 1
    quantised.up_to(full.key * written[..., None].to(DEVICE), room, codes.LAYOUT, texts=lambda: [(0, room)] * 2)
    for more in range(2):
        budgets = torch.tensor([110, 75 + more]).view(2, 1, 1)
        exact = step(lengths + more, budgets, 112, None, QuantisedKeys())
        out = step(lengths + more, budgets, 160, room, quantised)
        assert_close(out, exact, atol=1e-5, rtol=1e-5)
        seen.append(list(launched))
    assert [name for name, *_ in seen[0]] == ["_totals", "_sum_weights", "_best", "_attend_tile", "_join_parts"]
    assert seen[0] == seen[1]


@pytest.fixture
def many_slices(many_processors: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Several programs look for the best keys of a group. Gives their number, for each launch, and launches twice."""
    finding, found = importlib.import_module("hf_sparse.kernels.triton.best"), list[int]()
    best, grids = finding.best, list[tuple[int, ...]]()

    def twice(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        first, again = (best(*args, **options) for _ in range(2))
        assert all(torch.equal(*each) for each in zip(first, again, strict=True))
        found.extend(grid[0] for grid in grids)
        return again

    monkeypatch.setattr(finding, "_TILE", 32)
    monkeypatch.setattr(finding, "_best", Recorder(finding._best, grids))
    monkeypatch.setattr(finding, "best", twice)
    return found


@pytest.mark.parametrize("q_len", [1, 23])
def test_programs_share_the_keys_of_a_group(q_len: int, many_slices: list[int]) -> None:
    """Some of them find nothing: keys that nobody sees, or no past, lie in their slices. 69 pairs are two tiles."""
    intervals = calls.causal_intervals(q_len, 200, left=(0, 100, 190), right=(0,) * 3)
    call = calls.inputs(intervals, 200, heads=3, kv_heads=1, dim=16)
    assert_same_keys(call, some_budgets(call, 100, per_head=q_len > 1))
    assert min(many_slices) > 5


@pytest.mark.parametrize("q_len", [1, 5])
def test_programs_share_equal_keys(q_len: int, many_slices: list[int]) -> None:
    """The most recent of them are kept, in whatever slice they lie."""
    test_equal_keys_are_kept_from_the_most_recent_on(q_len, 300)
    assert min(many_slices) > 5


@pytest.mark.parametrize(("q_len", "number"), [(1, torch.nan), (7, torch.inf)])
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN slice")
def test_what_is_no_number_does_not_hold_a_call_up(q_len: int, number: float) -> None:
    """Nor do keys that nobody sees change anything."""
    call = calls.inputs(calls.causal_intervals(q_len, 120, left=(50,), right=(0,), spare=20), 120, heads=2, kv_heads=1)
    budgets = torch.full((1, 1, q_len), 30)
    key, query = call.key.clone(), call.query.clone()
    key[:, :, 70:73] = query[:, 0, -1] = number
    for changed in (replace(call, key=key), replace(call, query=query)):
        by_kernels(changed, budgets)
    seen = calls.visible_mask(call)[:, :1].any(2)[..., None]
    hidden = replace(call, key=call.key.masked_fill(~seen, number))
    assert torch.equal(*(by_kernels(x, budgets).mask(2, 120) for x in (call, hidden)))


def test_a_token_that_is_cut_short_leaves_no_key_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that writes its key was not launched."""
    full = moved(calls.inputs(calls.causal_intervals(1, 300), 300, heads=2, kv_heads=1, dim=16))
    quantised = QuantisedKeys()

    def step(length: int) -> None:
        intervals = full.intervals.clone()
        intervals[..., 0], intervals[..., 1] = 0, length
        call = replace(full, key=full.key[:, :, :length], intervals=intervals, quantised=quantised)
        by_triton(call, torch.full((1, 1, 1), 30), ALWAYS, 1)

    def scales() -> Tensor:
        return quantised.up_to(full.key, 1, codes.LAYOUT)[1]

    step(298)
    scales()[:, :, 298:] = torch.nan
    with monkeypatch.context() as broken:
        broken.setattr(importlib.import_module("hf_sparse.kernels.triton.importance"), "_totals", {})
        with pytest.raises(KeyError):
            step(299)
    step(300)
    assert scales()[:, :, :300].isfinite().all()


def test_a_key_that_outweighs_everything_is_found() -> None:
    """Weights do not fit into a float."""
    call = calls.inputs(calls.causal_intervals(1, 300, left=(0,), right=(0,)), 300, heads=2, kv_heads=1)
    key = call.key - 2
    key[:, :, 120] = 8
    call = replace(call, query=call.query.abs() * 30, key=key)
    assert by_kernels(call, torch.full((1, 1, 1), 30)).mask(2, 300)[..., 120].all()


@pytest.mark.parametrize(("dim", "value_dim", "dtype"), [(16, 21, torch.float32), (80, 80, torch.bfloat16)])
@pytest.mark.parametrize(("q_len", "share"), [(1, 17), (7, 3)])
@pytest.mark.parametrize("extras", [{}, {"softcap": 1.5, "sinks": True}], ids=["plain", "softcap and sinks"])
def test_engine_attends_to_runs(
    q_len: int, share: int, dim: int, value_dim: int, dtype: torch.dtype, extras: dict[str, Any]
) -> None:
    intervals = calls.causal_intervals(q_len, 300, left=(0, 100), right=(0, q_len // 3))
    call = calls.inputs(
        intervals, 300, heads=2 * share, kv_heads=2, dim=dim, value_dim=value_dim, dtype=dtype, **extras
    )
    most = torch.linspace(10, 250, 2 * share).long()
    selection = by_pytorch(call, torch.minimum(call.visible[:, None], most[:, None]))
    call = moved(call)
    out = ENGINE.attend(call, selection)
    assert out.transpose(1, 2).is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert_close(out, calls.run_engine("reference", call, selection), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("cut", [False, True])
def test_engine_attends_to_any_runs(cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of shuffled positions, some of them empty, those of a whole group among them."""
    if cut:
        monkeypatch.setattr(common, "_multiprocessors", lambda _: 1 << 20)
    call = calls.inputs(calls.causal_intervals(24, 150), 150)
    positions = torch.rand(2, 2, 2, 150).argsort(-1)
    bounds = torch.randint(150, (2, 2, 2, 24, 4)).sort(-1).values
    bounds[0, 0, 0, 0, 1] = bounds[0, 0, 0, 0, 0]
    bounds[1, 1, 1] = 0
    selection = SharedSelection(positions.to(DEVICE), bounds.unflatten(-1, (2, 2)).to(DEVICE), 12)
    call = moved(call)
    out = ENGINE.attend(call, selection)
    assert_close(out, calls.run_engine("reference", call, selection), atol=1e-5, rtol=1e-5)
    assert (out[1, 2:, 12:] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_a_model_runs_on_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill, then tokens one at a time: what other kernels make of it.

    All but the few queries for which two scores are so close that rounding decides.
    """
    model = tiny.model(name).to(DEVICE)
    ids, mask, _ = (x if isinstance(x, list) else x.to(DEVICE) for x in tiny.padded([65], "left"))
    selections: list[Selection] = []

    def select(self: Grouped, call: AttentionCall, budgets: Tensor, always: AlwaysKept) -> Selection:
        selections.append(by_triton(call, budgets, always, min(GROUP_QUERIES, call.query.shape[2])))
        return selections[-1]

    def logits(name: str) -> Tensor:
        hf_sparse.patch(model, replace(SPARSE, selector="grouped"), engine=name)
        cache = SparseCache(model.config)
        out, place = [], tiny.positions(mask)
        for start, stop in ((0, 64), (64, 65)):
            part = slice(start, stop)
            step = model(
                ids[:, part], attention_mask=mask[:, :stop], position_ids=place[:, part], past_key_values=cache
            )
            out.append(step.logits)
        assert 0 < hf_sparse.report(model).density < 0.6
        return torch.cat(out, dim=1)[mask.bool()]

    with monkeypatch.context() as as_on_a_gpu:
        as_on_a_gpu.setattr(Grouped, "select", select)
        as_on_a_gpu.setattr(selectors, "_OWN", {select})
        ours = logits("triton")
    assert selections
    assert hf_sparse.report(model).notes == ()
    others = logits("gather")
    assert ((ours - others).abs().amax(-1) < 1e-3).float().mean() > 0.98
    assert_close(ours, others, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "gpus",
    [
        "--brief 90 gfx942",
        *(pytest.param(gpus, marks=pytest.mark.slow) for gpus in ("80 86", "89", "90", "100 120", "gfx942")),
    ],
)
def test_compiles_for_gpus(gpus: str, compiled_at: Path) -> None:
    """The interpreter takes more than the compiler does. Needs no GPU: nothing is launched."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.compile_triton", *gpus.split()],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_CACHE_DIR": str(compiled_at / "triton")},
    )
    assert run.returncode == 0, run.stderr
    compiled = {tuple(line.split()[:2]) for line in run.stdout.splitlines()}
    names = {"_attend_tile", "_join_parts", "_write", "_totals", "_sum_weights", "_best", "_order"}
    assert compiled == {(gpu, name) for gpu in gpus.removeprefix("--brief ").split() for name in names}
