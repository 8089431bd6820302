"""The engine on FlexAttention against the reference. Kernels take seconds to compile: the tests share a few of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch.testing import assert_close

from hf_sparse import engines, selectors
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.engines import flex, flex_kernel, reference
from hf_sparse.errors import UserError
from hf_sparse.selection import AttentionInputs, Selection
from tests import calls
from tests.test_engines import CALLS, LAYOUTS, differentiable, layout

compiles = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX") or "g++") is None, reason="FlexAttention on a CPU needs a C++ compiler"
)
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Calls for which one kernel is compiled, the smallest first: neither softcap nor sinks, and values as wide as keys.
PLAIN: list[Callable[[], AttentionInputs]] = [
    lambda: calls.inputs(calls.causal_intervals(1, 11, left=(0,), right=(0,)), 11),
    *(CALLS[kind] for kind in CALLS if kind not in {"softcap", "sinks", "both", "values wider", "values narrower"}),
    lambda: calls.inputs(calls.causal_intervals(144, 280, left=(0, 150)), 280),
]


def both(dtype: torch.dtype = torch.float32) -> AttentionInputs:
    """A call with all that changes a kernel."""
    intervals = calls.causal_intervals(6, 11, left=(0, 8), right=(2, 0))
    return calls.inputs(intervals, 11, softcap=1.5, sinks=True, value_dim=16, dtype=dtype)


def check(call: AttentionInputs, selection: Selection, tolerance: float = 1e-5) -> None:
    out = flex.attend(call, selection)
    assert out.dtype == call.value.dtype
    assert_close(out, reference(call, selection), atol=tolerance, rtol=tolerance)


@compiles
@pytest.mark.parametrize(("rows_per_group", "per_head"), [*LAYOUTS, (72, False)])
def test_engine_is_the_reference_with_one_kernel(rows_per_group: int, per_head: bool) -> None:
    for number, make in enumerate(PLAIN):
        call = make()
        selection = calls.random_selection(call, layout(call, rows_per_group), per_head)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            check(call, selection)


@compiles
@pytest.mark.parametrize(("rows_per_group", "per_head"), LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_softcap_and_sinks(rows_per_group: int, per_head: bool, dtype: torch.dtype, tolerance: float) -> None:
    call = both(dtype)
    check(call, calls.random_selection(call, rows_per_group, per_head), tolerance)


@compiles
@pytest.mark.parametrize("capped", [False, True])
def test_rows_without_keys_give_zeros(capped: bool) -> None:
    call = both() if capped else CALLS["padded"]()
    selection = calls.random_selection(call, 3, False)
    allowed = selection.allowed.clone()
    allowed[:, :, 0] = False
    out = flex.attend(call, replace(selection, allowed=allowed))
    assert (out[:, :, :3] == 0).all()
    assert (out[:, :, 3:] != 0).any()


@compiles
@pytest.mark.parametrize("selector", ["window", "topk", "grouped"])
@pytest.mark.parametrize("rows", [1, 40, 320])
def test_selections_of_many_tiles(selector: str, rows: int) -> None:
    """Rows and keys that fill no whole number of tiles, in a batch with pads; windows leave full and empty tiles."""
    intervals = calls.causal_intervals(rows, 450, left=(0, 60), right=(3 if rows > 1 else 0, 0))
    call = calls.inputs(intervals, 450)
    config = SparseAttentionConfig(selector=selector)  # type: ignore[arg-type]
    budgets = call.visible[:, None].clamp(max=150)
    check(call, selectors.select(selector, call, budgets, config))


def test_tiles() -> None:
    mask = torch.zeros(2, 1, 130, 384, dtype=torch.bool)
    mask[0, 0, :, 128:256] = True
    mask[0, 0, 5, 383] = True
    mask[1, 0, 129, 0] = True
    parts, which_parts, full, which_full = flex._tiles(mask)
    assert parts[:, 0].tolist() == [[1, 0], [0, 1]]
    assert full[:, 0].tolist() == [[1, 1], [0, 0]]
    assert which_parts[0, 0, 0, 0] == 2
    assert which_parts[1, 0, 1, 0] == 0
    assert which_full[0, 0, :, 0].tolist() == [1, 1]


@compiles
def test_chunks_and_strides_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    call = CALLS["plain"]()
    selection = calls.random_selection(call, 1, True)
    whole = flex.attend(call, selection)
    query = call.query.transpose(1, 2).contiguous().transpose(1, 2)
    key = torch.cat([call.key, call.key], dim=2)[:, :, :11]
    monkeypatch.setattr(flex, "_CHUNK_BYTES", 1)
    assert_close(flex.attend(replace(call, query=query, key=key), selection), whole)


@compiles
def test_group_larger_than_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_TABLE_BYTES", 1 << 10)
    call = CALLS["plain"]()
    check(call, calls.random_selection(call, 3, False))


def test_refuses_what_flex_attention_cannot_do() -> None:
    call = CALLS["plain"]()
    selection = calls.random_selection(call, 3, False)
    with pytest.raises(UserError, match="float64"):
        engines.attend("flex", CALLS["plain"](dtype=torch.float64), selection)
    with pytest.raises(UserError, match="drops no weights"):
        engines.attend("flex", replace(call, dropout=0.1), selection)
    differentiable(call)
    with pytest.raises(UserError, match="no gradients on a CPU"):
        engines.attend("flex", call, selection)


def test_without_a_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    flex_kernel._compiled.cache_clear()
    call = CALLS["plain"]()
    with pytest.raises(RuntimeError, match="'no-such-compiler' was not found: install"):
        flex.attend(call, calls.random_selection(call, 3, False))


@on_cuda
@pytest.mark.parametrize("sinks", [False, True])
def test_gradients_on_cuda(sinks: bool) -> None:
    call = calls.inputs(calls.causal_intervals(6, 11, left=(0, 4)), 11, dim=32, sinks=sinks)
    selection = calls.random_selection(call, 3, False)
    states = {field.name: getattr(call, field.name) for field in fields(call)}
    moved = replace(call, **{name: x.cuda() for name, x in states.items() if isinstance(x, torch.Tensor)})
    selection = replace(selection, columns=selection.columns.cuda(), allowed=selection.allowed.cuda())
    inputs = differentiable(moved)
    outs = [engine(moved, selection) for engine in (flex.attend, reference)]
    assert_close(*outs, atol=2e-3, rtol=2e-3)
    ours, theirs = (torch.autograd.grad(out.square().sum(), inputs) for out in outs)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, atol=5e-3, rtol=5e-3)
