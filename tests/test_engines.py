"""Engines: the reference against plain loops, and every other engine against the reference."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from hf_sparse import SparseAttentionConfig
from hf_sparse.call import AttentionCall
from hf_sparse.engines import ENGINES, dense
from hf_sparse.errors import UserError
from tests import calls

# Triton has tests of its own: it computes no gradients, and takes long where it is interpreted.
NAMES = [name for name in ENGINES if name not in ("auto", "triton") and calls.unavailable(name) is None]
FAST = [name for name in NAMES if name != "reference"]
WITH_GRADIENTS = [name for name in NAMES if name != "cpu"]

CALLS: dict[str, Callable[..., AttentionCall]] = {
    "plain": lambda **kw: calls.inputs(calls.causal_intervals(6, 11), 11, **kw),
    "decode": lambda **kw: calls.inputs(calls.causal_intervals(1, 11), 11, **kw),
    "padded": lambda **kw: calls.inputs(calls.causal_intervals(6, 11, left=(0, 8), right=(2, 0)), 11, **kw),
    "softcap": lambda **kw: calls.inputs(calls.causal_intervals(6, 11), 11, softcap=1.5, **kw),
    "sinks": lambda **kw: calls.inputs(calls.causal_intervals(6, 11, right=(2, 0)), 11, sinks=True, **kw),
    "both": lambda **kw: calls.inputs(calls.causal_intervals(6, 11), 11, softcap=1.5, sinks=True, **kw),
    "values wider": lambda **kw: calls.inputs(calls.causal_intervals(6, 11), 11, value_dim=13, **kw),
    "values narrower": lambda **kw: calls.inputs(calls.causal_intervals(6, 11), 11, value_dim=3, **kw),
    "no sharing": lambda **kw: calls.inputs(calls.causal_intervals(6, 11), 11, heads=3, kv_heads=3, **kw),
    "one key head": lambda **kw: calls.inputs(calls.causal_intervals(6, 11), 11, heads=6, kv_heads=1, **kw),
    "static": lambda **kw: calls.inputs(calls.causal_intervals(6, 17, spare=6), 17, **kw),
    "square": lambda **kw: calls.inputs(calls.causal_intervals(6, 6), 6, **kw),
    "square, padded": lambda **kw: calls.inputs(calls.causal_intervals(6, 6, left=(0, 3), right=(2, 0)), 6, **kw),
    "square, sliding": lambda **kw: calls.inputs(calls.causal_intervals(6, 6, window=3), 6, **kw),
    "decode, padded": lambda **kw: calls.inputs(calls.causal_intervals(1, 11, left=(0, 4)), 11, **kw),
    "decode, sliding": lambda **kw: calls.inputs(calls.causal_intervals(1, 11, window=3), 11, **kw),
    "decode, static": lambda **kw: calls.inputs(calls.causal_intervals(1, 11, spare=4), 11, **kw),
}
MANY = calls.causal_intervals(1, 2000, left=(0, 300))
"""Visible keys of a decoded query that are more than a thread attends to at a time."""

LAYOUTS = [(1, True), (1, False), (3, False), (6, True)]


def layout(call: AttentionCall, queries_per_group: int) -> int:
    return min(queries_per_group, call.query.shape[2])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("queries_per_group", "per_head"), LAYOUTS)
@pytest.mark.parametrize("kind", CALLS)
def test_engine_is_the_loops(name: str, kind: str, queries_per_group: int, per_head: bool) -> None:
    call = CALLS[kind]()
    selection = calls.random_selection(call, layout(call, queries_per_group), per_head)
    mask = selection.mask(call.query.shape[1], call.key.shape[2])
    out = calls.run_engine(name, call, selection)
    assert out.dtype == call.value.dtype
    assert_close(out.double(), calls.attend(call, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_decoded_row_of_many_keys(name: str, per_head: bool, threads: int) -> None:
    call = calls.inputs(MANY, 2000, sinks=True)
    selection = calls.random_selection(call, 1, per_head)
    expected = calls.run_engine("reference", call, selection)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_close(calls.run_engine(name, call, selection), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("kind", CALLS)
def test_half_precision(name: str, kind: str, dtype: torch.dtype, tolerance: float) -> None:
    call = CALLS[kind](dtype=dtype, dim=32)
    selection = calls.random_selection(call, layout(call, 3), False)
    out = calls.run_engine(name, call, selection)
    assert out.dtype == dtype
    assert_close(out, calls.run_engine("reference", call, selection), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_products_may_be_too_large_for_float16(name: str) -> None:
    """Keys of some models have large components in common, which change no weight."""
    call = CALLS["plain"](dtype=torch.float16, dim=32)
    call.query[..., 0], call.key[..., 0] = 400, 400
    selection = calls.random_selection(call, 3, False)
    expected = calls.run_engine("reference", replace(call, query=call.query.float(), key=call.key.float()), selection)
    assert_close(calls.run_engine(name, call, selection), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["padded", "sinks", "softcap"])
def test_rows_without_keys_give_zeros(name: str, kind: str) -> None:
    call = CALLS[kind]()
    selection = calls.random_selection(call, layout(call, 3), False)
    allowed = selection.allowed.clone()
    allowed[:, :, 0] = False
    selection = replace(selection, allowed=allowed)
    out = calls.run_engine(name, call, selection)
    assert out.isfinite().all()
    assert (out[:, :, :3] == 0).all()
    assert (out[:, :, 3:] != 0).any()


@pytest.mark.parametrize("chunk", [1, 2_000, 5_000])
def test_chunks_do_not_show(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = CALLS["both"]()
    selection = calls.random_selection(call, 1, True)
    whole = calls.run_engine("gather", call, selection)
    monkeypatch.setattr(importlib.import_module("hf_sparse.engines.gather"), "_CHUNK_BYTES", chunk)
    assert_close(calls.run_engine("gather", call, selection), whole)


@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name: str) -> None:
    """Models hand over transposed views, and caches slices of longer buffers."""
    call = CALLS["plain"]()
    selection = calls.random_selection(call, 3, False)
    odd = replace(
        call,
        query=call.query.transpose(1, 2).contiguous().transpose(1, 2),
        key=torch.cat([call.key, call.key], dim=2)[:, :, :11],
        value=call.value.transpose(1, 2).contiguous().transpose(1, 2),
    )
    expected = calls.run_engine(name, call, selection)
    assert_close(calls.run_engine(name, odd, selection), expected)
    turned = replace(call, key=calls.turned(call.key), value=calls.turned(call.value))
    assert_close(calls.run_engine(name, turned, selection), expected)


def differentiable(call: AttentionCall) -> list[Tensor]:
    tensors = [call.query, call.key, call.value] + ([] if call.sinks is None else [call.sinks])
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("name", [name for name in FAST if name in WITH_GRADIENTS])
@pytest.mark.parametrize("kind", ["plain", "padded", "both", "sinks", "values wider"])
def test_gradients_are_those_of_the_reference(name: str, kind: str) -> None:
    call = CALLS[kind](dtype=torch.float64)
    inputs = differentiable(call)
    selection = calls.random_selection(call, 3, False)
    outs = [calls.run_engine(engine, call, selection) for engine in (name, "reference")]
    assert outs[0].dtype == torch.float64
    assert_close(*outs)
    upstream = torch.randn(outs[0].shape, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(out, inputs, upstream) for out in outs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.isfinite().all()
        assert_close(one, other)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
@pytest.mark.parametrize("kind", ["padded", "both"])
def test_gradcheck(name: str, kind: str) -> None:
    call = CALLS[kind](dtype=torch.float64, dim=2, heads=2, kv_heads=1)
    selection = calls.random_selection(call, 3, False)

    def attend(query: Tensor, key: Tensor, value: Tensor, *sinks: Tensor) -> Tensor:
        changed = replace(call, query=query, key=key, value=value, sinks=sinks[0] if sinks else None)
        return calls.run_engine(name, changed, selection)

    assert torch.autograd.gradcheck(attend, differentiable(call), fast_mode=True)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_only_kept_keys_get_a_gradient(name: str) -> None:
    call = CALLS["plain"]()
    _, key, value = differentiable(call)
    selection = calls.random_selection(call, 6, False)
    mask = selection.mask(4, 11)
    mask[..., 5:] = False
    positions = torch.arange(11).expand(2, 2, 1, 11)
    allowed = selection.pairs_of(mask, 2)
    selection = replace(selection, positions=positions, allowed=allowed)
    grads = torch.autograd.grad(calls.run_engine(name, call, selection).sum(), [key, value])
    for grad in grads:
        assert (grad[:, :, 5:] == 0).all()
        assert (grad[:, :, :5] != 0).any()


def test_keys_that_sdpa_cannot_share_on_a_gpu_are_repeated() -> None:
    class OnGpu(Tensor):
        is_cuda = True

    query, key, value = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    key, value, shared = dense.for_sdpa(key.as_subclass(OnGpu), value.as_subclass(OnGpu), 3, flash=True)
    assert not shared
    assert key.shape == value.shape == (2, 6, 7, 8)
    key, value = (x.as_subclass(Tensor) for x in (key, value))
    plain = (key[:, ::3], value[:, ::3])
    assert dense.for_sdpa(*plain, 3, flash=True) == (*plain, True)
    expected = scaled_dot_product_attention(query, *plain, enable_gqa=True)
    assert_close(scaled_dot_product_attention(query, key, value), expected)


@pytest.mark.parametrize("name", [*WITH_GRADIENTS, "dense"])
def test_dropout_drops_weights_and_keeps_the_mean(name: str) -> None:
    call = CALLS["plain"]()
    selection = calls.select("topk", call, call.visible[:, None], SparseAttentionConfig())

    def attend(dropout: float) -> Tensor:
        changed = replace(call, dropout=dropout)
        return dense.attend(changed) if name == "dense" else calls.run_engine(name, changed, selection)

    exact = attend(0.0)
    draws = torch.stack([attend(0.3) for _ in range(600)])
    assert draws.std(0).mean() > 0.05
    error = (draws.mean(0) - exact) / (draws.std(0) / 600**0.5 + 1e-6)
    assert error.abs().mean() < 1.5


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("elements", [1 << 22, 1])
def test_dense_keeps_everything_visible(kind: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = CALLS[kind]()
    monkeypatch.setattr(dense, "_BLOCK_ELEMENTS", elements)
    assert_close(dense.attend(call).double(), calls.attend(call, calls.visible_mask(call)), atol=1e-5, rtol=1e-5)


KERNELS = "cpu" in NAMES


@pytest.mark.parametrize(
    ("kernels", "matrix_unit", "dtype", "kv_len", "way"),
    [
        (True, True, torch.float32, 300, "apart"),
        (True, True, torch.float32, 600, "by the kernels"),
        (True, True, torch.bfloat16, 3000, "apart"),
        (True, True, torch.bfloat16, 7000, "packed"),
        (True, False, torch.bfloat16, 300, "by the kernels"),
        (True, True, torch.float16, 300, "by the kernels"),
        (False, True, torch.float32, 3000, "apart"),
        (False, True, torch.float32, 4000, "packed"),
        (False, False, torch.bfloat16, 300, "packed"),
    ],
)
@pytest.mark.parametrize("left", [(0, 0), (0, 5)])
def test_a_single_query_takes_the_fastest_way(
    left: tuple[int, int],
    kernels: bool,
    matrix_unit: bool,
    dtype: torch.dtype,
    kv_len: int,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SDPA for its heads apart needs that no mask is needed."""
    if kernels and not KERNELS:
        pytest.skip("there are no compiled kernels here")
    monkeypatch.setattr(dense, "_HAS_MATRIX_UNIT", matrix_unit)
    seen: list[str] = []

    def recorded(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append({2: "packed", 6: "apart"}[query.shape[1]])
        return scaled_dot_product_attention(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    if not kernels:
        monkeypatch.setattr(dense.cpu, "unsupported_reason", lambda *_: "none are here")
    call = calls.inputs(calls.causal_intervals(1, kv_len, left=left), kv_len, heads=6, kv_heads=2)
    exact = calls.attend(call, calls.visible_mask(call))
    call = replace(call, query=call.query.to(dtype), key=call.key.to(dtype), value=call.value.to(dtype))
    near = 1e-5 if dtype == torch.float32 else 0.03
    assert_close(dense.attend(call).double(), exact, atol=near, rtol=near)
    if any(left) and way == "apart":
        way = "by the kernels" if kernels and dtype == torch.float32 else "packed"
    assert (seen or ["by the kernels"]) == [way]


@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks", "padded"])
@pytest.mark.parametrize("form", ["bool", "finfo", "-inf"])
def test_dense_under_any_mask(kind: str, form: str) -> None:
    """Masks with holes, as bool or added to the scores; queries without keys give zeros or anything finite."""
    call = CALLS[kind]()
    mask = calls.visible_mask(call)[:, :1] & (torch.arange(11) % 3 != 1)
    given_mask = mask
    if form != "bool":
        lowest = torch.finfo(torch.float32).min if form == "finfo" else -torch.inf
        given_mask = torch.zeros(mask.shape).masked_fill(~mask, lowest)
    out = dense.attend_masked(call, given_mask)
    expected = calls.attend(call, mask.expand(-1, 4, -1, -1))
    alive = mask.any(-1)[..., None].expand_as(out)
    assert out.isfinite().all()
    assert_close(out[alive].double(), expected[alive], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif("cpu" not in NAMES, reason="there are no compiled kernels here")
def test_a_gradient_to_the_attention_sinks_alone_is_not_lost() -> None:
    call = CALLS["sinks"]()
    assert call.sinks is not None
    call.sinks.requires_grad_()
    selection = calls.random_selection(call, 3, False)
    with pytest.raises(UserError, match="no backward pass"):
        calls.run_engine("cpu", call, selection)
    with torch.no_grad():
        calls.run_engine("cpu", call, selection)
