"""Triton's kernels: the engine against the reference, scores against plain sums. Interpreted where there is no GPU."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import hf_sparse
from hf_sparse import engines, kernels
from hf_sparse.cache import SparseCache
from hf_sparse.call import AlwaysKept, AttentionCall, Selection
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.kernels import gpu
from hf_sparse.selectors import aggregation
from hf_sparse.selectors.grouped import GROUP_QUERIES, Grouped, select_by
from tests import calls, tiny
from tests.sparse import SPARSE
from tests.test_engines import CALLS, layout

pytest.importorskip("triton", reason="triton is not installed")
tl = importlib.import_module("triton.language")
interpreter = importlib.import_module("triton.runtime.interpreter")
common = importlib.import_module("hf_sparse.kernels.triton.common")
aggregate = importlib.import_module("hf_sparse.kernels.triton.aggregate")
quantise = importlib.import_module("hf_sparse.kernels.triton.quantise").quantise

ENGINE = engines.ENGINES["triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
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


@pytest.mark.parametrize("selector", ["grouped", "shared", "topk", "window"])
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
        assert "7.5" in (gpu.unsupported_reason(torch.device("cuda")) or "")
    monkeypatch.setattr(gpu, "find_spec", lambda _: None)
    for reason in (ENGINE.unsupported_reason(call), calls.unavailable("triton")):
        assert "pip install triton" in (reason or "")
    monkeypatch.setenv("HF_SPARSE_KERNELS", "0")
    assert calls.unavailable("triton") == "HF_SPARSE_KERNELS=0 is set"
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match="pip install triton"):
        importlib.reload(importlib.import_module(f"{kernels.__name__}.triton"))


def plain_aggregated(
    pairs: Tensor, keys: Tensor, kept_lse: Tensor, past_start: Tensor, past_stop: Tensor, first: Tensor | None
) -> Tensor:
    """Aggregated scores by their definition, in float64."""
    scores = torch.einsum("bhgmd,bhnd->bhgmn", pairs.double(), keys.double())
    position = torch.arange(keys.shape[2])
    seen = ((position >= past_start[..., None]) & (position < past_stop[..., None]))[:, None, :, None]
    if first is not None:
        seen = seen & (position >= first[..., None])
    scores = scores.masked_fill(~seen, -torch.inf)
    total = torch.cat([scores, kept_lse.double()[..., None]], dim=-1).logsumexp(-1, keepdim=True)
    return (scores - total).exp().masked_fill(~seen, 0).nan_to_num(0).sum(3)


def voters(groups: int, size: int, length: int, dim: int = 64, batch: int = 1, kv_heads: int = 2) -> dict[str, Tensor]:
    """Groups of pairs at the end of a text, with what each has besides the past keys."""
    generator = torch.Generator().manual_seed(size)
    past_stop = (length - 5 - torch.arange(groups).flip(0) * 11).expand(batch, groups)
    return {
        "pairs": torch.randn(batch, kv_heads, groups, size, dim, generator=generator) * 2 * dim**-0.5,
        "keys": torch.randn(batch, kv_heads, length, dim, generator=generator),
        "kept_lse": 7 + torch.randn(batch, kv_heads, groups, size, generator=generator),
        "past_start": torch.full((batch, groups), 3),
        "past_stop": past_stop.contiguous(),
    }


def check_aggregated(pairs: Tensor, keys: Tensor, first: Tensor | None = None, **rest: Tensor) -> Tensor:
    """Aggregated scores are those of the dequantised vectors, and close to those of the vectors themselves."""
    whole, scales = quantise(keys.to(DEVICE))
    on_device = {name: x.to(DEVICE) for name, x in rest.items()}
    own_first = None if first is None else first.to(DEVICE)
    out = aggregate.aggregated_scores(pairs.to(DEVICE), whole, scales, first=own_first, **on_device).cpu()
    assert out.dtype == torch.float32
    dequantised = [
        (q * scale[..., None]).cpu() for q, scale in ((whole, scales), quantise(pairs.flatten(2, 3).to(DEVICE)))
    ]
    expected = plain_aggregated(dequantised[1].view(pairs.shape), dequantised[0], first=first, **rest)
    assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)
    exact = plain_aggregated(pairs, keys, first=first, **rest)
    assert (out - exact).abs().sum() <= 0.03 * exact.sum()
    return out


@pytest.mark.parametrize(("groups", "size", "dim"), [(2, 20, 64), (1, 130, 80), (2, 65, 128), (1, 17, 256)])
def test_votes(groups: int, size: int, dim: int) -> None:
    call = voters(groups, size, 300, dim)
    out = check_aggregated(**call)
    assert (out[..., :3] == 0).all()
    assert (out[..., -5:] == 0).all()
    assert 0.05 < out.sum() / (2 * groups * size) < 0.95


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize("size", [3, 16, 20])
def test_votes_of_parts_of_the_keys(size: int) -> None:
    """With few pairs the keys are cut; up to 16 of them, scores are stored."""
    check_aggregated(**voters(1, size, 700, batch=2))


def test_few_members_vote_like_many(monkeypatch: pytest.MonkeyPatch) -> None:
    call = voters(1, 8, 300)
    few = check_aggregated(**call)
    monkeypatch.setattr(aggregate, "MOST_PAIRS", 0)
    assert_close(check_aggregated(**call), few)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_votes_in_sliding_windows(kv_heads: int) -> None:
    """Pairs of a group do not all see its oldest keys; some see none of them."""
    call = voters(2, 20, 300)
    call["past_start"] = torch.tensor([[100, 150]])
    first = call["past_start"][:, None, :, None] + torch.arange(20).expand(1, kv_heads, 2, 20) * 10
    first[..., 1, -1] = 300
    out = check_aggregated(**call, first=first)
    assert (out[0, :, 0, :100] == 0).all()


def test_groups_without_older_keys_and_members_without_votes() -> None:
    call = voters(3, 20, 200, batch=2)
    call["past_stop"][0] = torch.tensor([0, 3, 150])
    call["past_start"][1, 2] = 190
    call["kept_lse"][0, 0, 2, :5] = torch.inf
    call["kept_lse"][:, :, :, 7] = -torch.inf
    call["kept_lse"][1, 1, 0] = torch.inf
    out = check_aggregated(**call)
    assert out.isfinite().all()
    assert (out[0, :, :2] == 0).all()
    assert (out[1, 1, 0] == 0).all()
    assert (out[0, :, 2] != 0).any()


def test_keys_in_longer_storage() -> None:
    """A cache keeps keys and scales in buffers that grow."""
    call = voters(1, 4, 160)
    whole, scales = quantise(torch.cat([call["keys"], call["keys"]], dim=2).to(DEVICE))
    rest = {name: x.to(DEVICE) for name, x in call.items() if name not in ("pairs", "keys")}
    pairs = call["pairs"].to(DEVICE)
    parts = [
        aggregate.aggregated_scores(pairs, w, s, **rest)
        for w, s in ((whole[:, :, :160], scales[:, :, :160]), quantise(call["keys"].to(DEVICE)))
    ]
    assert_close(*parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [8, 80])
def test_quantise(dim: int, dtype: torch.dtype) -> None:
    states = torch.randn(2, 50, 3, dim).transpose(1, 2).to(DEVICE, dtype)
    states[0, 0, 0] = 0
    whole, scales = quantise(states)
    assert whole.dtype == torch.int8
    assert (whole.abs().amax(-1) == 127).sum() == 2 * 50 * 3 - 1
    error = (whole * scales[..., None] - states.float()).abs().amax(-1)
    assert (error <= 0.5001 * scales).all()
    assert (whole[0, 0, 0] == 0).all()


GROUPS = {
    "decode": lambda: calls.causal_intervals(1, 300),
    "decode, padded": lambda: calls.causal_intervals(1, 300, left=(0, 100)),
    "sliding": lambda: calls.causal_intervals(7, 300, window=150),
    "two groups": lambda: calls.causal_intervals(2 * GROUP_QUERIES, 300, left=(0, 100), right=(3, 0)),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_grouped_by_triton_is_its_specification(kind: str) -> None:
    """Aggregated scores have 8 significant bits: where two are nearly equal, another key may win."""
    call = calls.inputs(GROUPS[kind](), 300, dim=16)
    assert aggregation.triton_unsupported_reason(moved(call)) is None
    budgets = torch.minimum(call.visible[:, None], torch.randint(5, 70, (2, 4, 1)))
    selection = select_by(aggregation.by_triton, moved(call), budgets, AlwaysKept(3, 10))
    mask = selection.mask(4, 300).cpu()
    expected = calls.select_grouped(call, budgets, 3, 10, min(GROUP_QUERIES, call.query.shape[2]))
    assert torch.equal(mask.sum(-1), budgets)
    assert torch.equal(selection.kept(4).cpu(), budgets)
    assert not (mask & ~calls.visible_mask(call)).any()
    assert (mask & expected).sum() >= 0.98 * expected.sum()
    assert selection.positions.shape[-1] % 16 == 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_a_model_runs_on_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill of a padded batch, then tokens one at a time: what other kernels make of it.

    All but the few queries for which two scores are so close that rounding decides.
    """
    model = tiny.model(name).to(DEVICE)
    ids, mask, _ = (x if isinstance(x, list) else x.to(DEVICE) for x in tiny.padded([78, 64], "left"))
    ways: list[Any] = []
    aggregated = aggregate.aggregated_scores
    monkeypatch.setattr(
        aggregate, "aggregated_scores", lambda *args, **rest: ways.append(args[1].dtype) or aggregated(*args, **rest)
    )

    def logits(name: str) -> Tensor:
        hf_sparse.patch(model, SPARSE, engine=name)
        cache = SparseCache(model.config)
        out, place = [], tiny.positions(mask)
        for start, stop in ((0, 76), *((i, i + 1) for i in range(76, 78))):
            part = slice(start, stop)
            step = model(
                ids[:, part], attention_mask=mask[:, :stop], position_ids=place[:, part], past_key_values=cache
            )
            out.append(step.logits)
        assert 0 < hf_sparse.report(model).density < 0.6
        return torch.cat(out, dim=1)[mask.bool()]

    with monkeypatch.context() as as_on_a_gpu:
        as_on_a_gpu.setattr(Grouped, "select", lambda self, *given: select_by(aggregation.by_triton, *given))
        by_triton = logits("triton")
    assert set(ways) == {torch.int8}
    assert hf_sparse.report(model).notes == ()
    by_gather = logits("gather")
    assert ((by_triton - by_gather).abs().amax(-1) < 1e-3).float().mean() > 0.98
    assert_close(by_triton, by_gather, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("capability", ["89", "90"])
def test_compiles_for_gpus(capability: str, tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does. Needs no GPU: nothing is launched."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.compile_triton", capability],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert run.returncode == 0, run.stderr
    compiled = Counter(line.split()[0] for line in run.stdout.splitlines())
    # Two head_dims in a prefill, in one of them attention in parts; in decoding, lengths that are multiples of 16, and
    # others, and a second head_dim for the aggregated scores.
    assert compiled == {
        "_attend_tile": 2 + 2,
        "_join_parts": 1 + 1,
        "_quantise": 2,
        "_totals": 2,
        "_aggregate": 2,
        "_scores": 2 + 1,
        "_sums": 2 + 1,
    }
