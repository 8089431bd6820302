"""Caches that hold keys and values in 8 bits: as models that round them and keep them in their own dtype."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import hf_sparse
from hf_sparse import SparseCache, generate_lossless
from hf_sparse.cache import SparseLayer
from hf_sparse.call import AttentionCall
from hf_sparse.engines import ENGINES, dense
from hf_sparse.errors import UserError
from hf_sparse.kernels import cpu
from hf_sparse.kernels.int8 import Int8States
from tests import calls, tiny
from tests.sparse import EXACT, GENERATIONS, assert_same, deviation, generated, sparse_model
from tests.test_cache import ARRANGED

HEADS, DIM = 2, 64
STEPS = [40, 1, 1, 5, 13]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def rounded(states: Tensor) -> Tensor:
    """What 8 bits keep of vectors: whole numbers times a scale in bfloat16, for 32 components each."""
    out = states.float().clone()
    width = 32 if states.shape[-1] % 32 == 0 else states.shape[-1]
    for part in out.split(width, dim=-1):
        scale = (part.abs().amax(-1, keepdim=True) / 126.5).bfloat16().float()
        part.copy_(torch.where(scale > 0, (part / scale).round() * scale, 0))
    return out.to(states.dtype)


class RoundedLayer(DynamicLayer):
    """Rounds as 8 bits do, and keeps the results in full: what a cache in 8 bits is to be like."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(rounded(key_states), rounded(value_states), *args, **kwargs)


def rounding_cache(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [RoundedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def int8_cache(model: PreTrainedModel) -> SparseCache:
    return SparseCache(model.config, nbits=8)


def states(length: int, batch: int = 2, seed: int = 0, dim: int = DIM) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, HEADS, length, dim, generator=generator)
    keys[..., 3] *= 20  # a component that is much larger than others, as keys of real models have
    return keys, values


def read(model: PreTrainedModel, ids: Tensor, cache: Any, steps: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of `ids` read a few tokens at a time."""
    logits = []
    for part, stop in zip(ids.split(steps, dim=1), torch.tensor(steps).cumsum(0).tolist(), strict=True):
        given: dict[str, Any] = {} if mask is None else {"attention_mask": mask[:, :stop]}
        if mask is not None:
            given["position_ids"] = tiny.positions(mask[:, :stop])[:, stop - part.shape[1] :]
        logits.append(model(part, past_key_values=cache, **given).logits.float())
    return torch.cat(logits, dim=1)


# What is stored.


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.336), (torch.bfloat16, 0.672)])
def test_bytes_of_a_token(dtype: torch.dtype, share: float) -> None:
    """Of heads of 64: keys and values in 8 bits with their scales, and the keys in 4 bits with theirs.

    The first layer is dense, and ranks no keys.
    """
    model = hf_sparse.patch(tiny.model("llama", dtype, head_dim=DIM, max_position_embeddings=8192), dense_below=0)
    ids, caches = tiny.tokens(1, 3000), {}
    for nbits in (None, 8):
        caches[nbits] = SparseCache(model.config, nbits=nbits)
        model(ids, past_key_values=caches[nbits])
    stored = caches[8].layers[1].keys
    vector = (stored.codes.nbytes + stored.scales.nbytes) / (3000 * HEADS)
    assert vector == 64 + 2 * 2
    for nbits, in_full in ((None, 2 * 64 * dtype.itemsize), (8, 2 * vector)):
        assert [layer.nbytes for layer in caches[nbits].layers] == [
            in_full * HEADS * (3000 + 3000 // 8) + (0 if place == 0 else (32 + 4) * HEADS * 3632)
            for place in range(tiny.LAYERS)
        ]
        assert caches[nbits].nbytes == sum(layer.nbytes for layer in caches[nbits].layers)
    plain = 2 * 64 * dtype.itemsize
    assert (2 * vector + 32 + 4) / plain == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("dim", [64, 96, 80, 24, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_are_those_of_the_rounding(dim: int, dtype: torch.dtype) -> None:
    """Within half a step of what they were; zeros stay zeros."""
    keys, values = (x.to(dtype) for x in states(33, dim=dim))
    keys[:, :, 4] = 0
    layer = SparseLayer(nbits=8)
    got = layer.update(keys, values)
    for ours, exact in zip(got, (keys, values), strict=True):
        assert isinstance(ours, Int8States)
        assert ours.dtype == dtype
        assert ours.shape == exact.shape
        assert torch.equal(ours.dequantize(), rounded(exact))
        assert torch.equal(ours + 0, rounded(exact))
        width = 32 if dim % 32 == 0 else dim
        most = exact.float().unflatten(-1, (-1, width)).abs().amax(-1, keepdim=True).expand(-1, -1, -1, -1, width)
        allowed = most.flatten(-2) * (0.51 / 126.5 + torch.finfo(dtype).eps)
        assert bool(((ours.dequantize().float() - exact.float()).abs() <= allowed).all())


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_no_number_is_not_hidden(bad: float) -> None:
    keys, values = states(5)
    keys[0, 0, 2, 7] = bad
    stored, _ = SparseLayer(nbits=8).update(keys, values)
    whole = stored.dequantize()
    assert not whole[0, 0, 2, 7].isfinite()
    whole[0, 0, 2] = 0
    assert bool(whole.isfinite().all())


@pytest.mark.parametrize("change", ARRANGED)
def test_a_layer_changes_as_one_in_full_does(change: str) -> None:
    ours, full = SparseLayer(nbits=8), RoundedLayer()
    for layer in (ours, full):
        layer.update(*states(37))
        layer.update(*states(1, seed=1))
        ARRANGED[change](layer)
    batch = 2 if full.keys is None else full.keys.shape[0]
    for seed, length in enumerate([1, 300, 1]):
        for layer in (ours, full):
            layer.update(*states(length, batch, seed + 7))
        assert ours.get_seq_length() == full.get_seq_length()
        assert torch.equal(ours.keys.dequantize(), full.keys)
        assert torch.equal(ours.values.dequantize(), full.values)


def test_states_that_others_put_into_a_layer_are_rounded_with_the_next_token() -> None:
    layer, (keys, values) = SparseLayer(nbits=8), states(9)
    layer.update(*states(4))
    layer.keys, layer.values = keys, values
    assert torch.equal(layer.keys, keys)
    got, _ = layer.update(*states(1, seed=1))
    assert torch.equal(got.dequantize(), rounded(torch.cat([keys, states(1, seed=1)[0]], dim=2)))


def test_what_is_stored_cannot_be_written_to() -> None:
    layer = SparseLayer(nbits=8)
    keys, _ = layer.update(*states(9))
    for write in (lambda: keys.mul_(2), lambda: keys[:, :, 2:4].zero_(), lambda: torch.add(keys[0], 1, out=keys)):
        with pytest.raises(RuntimeError, match="cannot be written to"):
            write()


def test_other_numbers_of_bits_are_refused() -> None:
    for nbits in (4, 16, 8.5, "8"):
        with pytest.raises(ValueError, match="nbits must be 8, or None"):
            SparseCache(tiny.config("llama"), nbits=nbits)  # type: ignore[arg-type]


def test_layers_with_a_window_stay_in_the_dtype_of_the_model() -> None:
    cache = SparseCache(tiny.config("gemma3"), nbits=8)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, SparseLayer]
    for layer in range(2):
        keys, _ = cache.update(*states(4), layer_idx=layer)
        assert isinstance(keys, Int8States) == (layer == 1)


# What models make of it.


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.parametrize("selector", [*EXACT, "grouped"])
def test_a_model_reads_what_it_would_have_rounded(name: str, selector: str) -> None:
    """Prompts and single tokens, with the same counts; and rounding is to be seen."""
    model, ids = sparse_model(name, selector), tiny.tokens(2, sum(STEPS))
    expected = read(model, ids, rounding_cache(model), STEPS)
    counts = hf_sparse.report(model).rows
    hf_sparse.unpatch(model)
    model = sparse_model(name, selector)
    got = read(model, ids, int8_cache(model), STEPS)
    assert_same(got, expected)
    assert hf_sparse.report(model).rows == counts
    if name != "mistral":  # whose layers all have a window
        exact = read(model, ids, SparseCache(model.config), STEPS)
        assert 1e-5 < deviation(got, exact) < 0.1 * float(exact.std())


@pytest.mark.parametrize("selector", EXACT)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_a_prefill_is_decoding(name: str, selector: str) -> None:
    model, ids = sparse_model(name, selector), tiny.tokens(2, 60)
    one_pass = read(model, ids, int8_cache(model), [60])
    assert_same(read(model, ids, int8_cache(model), [50, *[1] * 10]), one_pass)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("selector", [*EXACT, "grouped"])
def test_padding_changes_nothing(side: str, selector: str) -> None:
    model = sparse_model("llama", selector)
    ids, mask, rows = tiny.padded([60, 41], side, extra=3)
    got = model(ids, attention_mask=mask, position_ids=tiny.positions(mask), past_key_values=int8_cache(model)).logits
    for i, row in enumerate(rows):
        alone = model(row[None], past_key_values=int8_cache(model)).logits
        assert_same(got[i, mask[i].bool()], alone[0])


@pytest.mark.parametrize("selector", ["topk", "grouped"])
def test_padding_inside_of_a_text_is_left_out_in_8_bits(selector: str) -> None:
    model, ids = sparse_model("llama", selector), tiny.tokens(2, 48)
    mask = torch.ones_like(ids)
    mask[0, 10:14] = mask[1, 20] = 0
    cache = int8_cache(model)
    got = read(model, ids, cache, [40, *[1] * 8], mask)
    expected = read(model, ids, rounding_cache(model), [40, *[1] * 8], mask)
    assert_same(got[mask.bool()], expected[mask.bool()])
    in_full = SparseCache(model.config)
    read(model, ids, in_full, [40, *[1] * 8], mask)
    assert cache.nbytes < 0.5 * in_full.nbytes


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(("name", "selector"), [("llama", "grouped"), ("gemma3", "topk"), ("gpt2", "grouped")])
def test_generated_tokens(name: str, selector: str, generation: str) -> None:
    model = sparse_model(name, selector)
    options, batch = GENERATIONS[generation], 2
    expected = generated(model, batch, past_key_values=rounding_cache(model), **options)
    assert generated(model, batch, past_key_values=int8_cache(model), **options) == expected


def test_assisted_decoding() -> None:
    model = sparse_model("llama", "topk")
    expected = generated(model, batch=1, past_key_values=rounding_cache(model))
    helper = sparse_model("llama", "window", alpha=1.0)
    assert generated(model, batch=1, past_key_values=int8_cache(model), assistant_model=helper) == expected


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copied_cache_goes_on_by_itself(copied: Callable[[Any], Any]) -> None:
    model, ids = sparse_model("llama", "grouped"), tiny.tokens(1, 40)
    past = int8_cache(model)
    model(ids[:, :30], past_key_values=past)
    twin = copied(past)
    outs = [read(model, ids[:, 30:], cache, [5, 1, 1, 1, 1, 1]) for cache in (past, twin)]
    assert torch.equal(*outs)
    assert torch.equal(past.layers[0].keys.dequantize(), twin.layers[0].keys.dequantize())
    assert past.layers[0].keys.codes.data_ptr() != twin.layers[0].keys.codes.data_ptr()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_model_that_is_not_patched_attends_to_the_same(name: str, attention: str) -> None:
    model, ids = tiny.model(name), tiny.tokens(2, sum(STEPS))
    model.set_attn_implementation(attention)
    assert_same(read(model, ids, int8_cache(model), STEPS), read(model, ids, rounding_cache(model), STEPS))


def test_lossless_text_is_that_of_the_dense_model_with_such_a_cache() -> None:
    model, ids = tiny.model("llama"), tiny.tokens(1, 60)
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    expected = model.generate(ids, past_key_values=rounding_cache(model), **options)
    model = sparse_model("llama", "grouped")
    got = generate_lossless(model, ids, past_key_values=int8_cache(model), gamma=3, **options)
    assert torch.equal(got, expected)
    assert hf_sparse.report(model).drafts.accepted > 0


def test_the_report_says_what_was_read() -> None:
    model = sparse_model("llama", "grouped")
    read(model, tiny.tokens(1, 12), int8_cache(model), [10, 1, 1])
    note = "3 forward passes with a cache that holds keys and values in 8 bits"
    assert hf_sparse.report(model).notes == (note,)


@torch.enable_grad()
def test_gradients_are_refused() -> None:
    model, ids = sparse_model("llama", "grouped"), tiny.tokens(1, 12)
    with pytest.raises(UserError, match=r"nbits=8 has no gradients: run the model under torch\.no_grad"):
        model(ids, past_key_values=int8_cache(model))
    assert generated(model, past_key_values=int8_cache(model))  # which records none


def test_compiling_is_refused() -> None:
    torch.compiler.reset()
    model = sparse_model("llama", "grouped")
    with pytest.raises(UserError, match=r"nbits=8 does not work under torch\.compile"):
        torch.compile(model, backend="eager")(tiny.tokens(1, 12), past_key_values=int8_cache(model))


# What engines make of it.


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("queries", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", ["cpu", "gather", "reference"])
def test_engines_attend_as_to_plain_keys(engine: str, dtype: torch.dtype, queries: int, softcap: float | None) -> None:
    if reason := ENGINES[engine].unavailable_reason():
        pytest.skip(reason)
    call = calls.inputs(
        calls.causal_intervals(queries, 300, left=(0, 5)),
        300,
        heads=6,
        kv_heads=2,
        dim=64,
        value_dim=61,
        dtype=dtype,
        softcap=softcap,
    )
    key, value = (Int8States.rounded(x) for x in (call.key, call.value))
    selection = calls.random_selection(call, 1 if queries == 1 else 64, queries > 1)
    got, expected = (
        ENGINES[engine].attend(AttentionCall(**{**vars(call), "key": k, "value": v}), selection)
        for k, v in ((key, value), (key.dequantize(), value.dequantize()))
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("queries", [1, 5, 100])
def test_dense_attention_reads_them_where_kernels_can(queries: int) -> None:
    call = calls.inputs(calls.causal_intervals(queries, 300, left=(0, 5)), 300, heads=6, kv_heads=2, dim=64)
    key, value = (Int8States.rounded(x) for x in (call.key, call.value))
    given = AttentionCall(**{**vars(call), "key": key, "value": value})
    assert_close(dense.attend(given), dense.attend(given.dequantized()), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(cpu.unsupported_reason() is not None, reason=str(cpu.unsupported_reason()))
def test_kernels_round_keys_in_8_bits_as_plain_ones() -> None:
    keys = Int8States.rounded(states(70)[0])
    center = keys.dequantize().mean(2)
    parts = []
    for each in (keys, keys.dequantize()):
        parts.append(cpu.LAYOUT.allocate(each, 70))
        cpu.LAYOUT.quantise(each, 0, 70, parts[-1], center)
    assert torch.equal(parts[0][0], parts[1][0])
    assert torch.equal(parts[0][1], parts[1][1])
