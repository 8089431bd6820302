"""The cache that grows in place: what it holds, that models take it by themselves, and its keys in few bits."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_sparse
from hf_sparse.cache import SparseCache, SparseLayer, grow_in_place, set_cache_of_pass
from hf_sparse.call import AttentionCall
from hf_sparse.kernels.layout import Layout
from hf_sparse.kernels.quantised import QuantisedKeys
from hf_sparse.patching.caches import cache_argument
from hf_sparse.selectors import importance
from hf_sparse.selectors.grouped import Grouped
from tests import tiny
from tests.sparse import GENERATIONS, SPARSE, generated, sparse_model

HEADS, DIM = 2, 8


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    """As `generate` runs: where gradients are recorded, nothing is written in place."""
    with torch.no_grad():
        yield


def states(length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, HEADS, length, DIM, generator=generator)
    return keys, values


def filled(steps: list[int], batch: int = 2) -> tuple[SparseLayer, DynamicLayer]:
    """A layer of each kind, given the same keys and values."""
    ours, stock = SparseLayer(), DynamicLayer()
    for seed, length in enumerate(steps):
        new = states(length, batch, seed)
        for got, expected in zip(ours.update(*new), stock.update(*new), strict=True):
            assert torch.equal(got, expected)
    return ours, stock


def assert_same(ours: SparseLayer, stock: DynamicLayer) -> None:
    assert ours.get_seq_length() == stock.get_seq_length()
    assert ours.get_mask_sizes(3) == stock.get_mask_sizes(3)
    assert torch.equal(ours.keys, stock.keys)
    assert torch.equal(ours.values, stock.values)


def test_tokens_are_appended_in_place() -> None:
    """The storage moves when it is full, and rarely: less than a key in eight is ever copied."""
    layer = SparseLayer()
    layer.update(*states(1000))
    places = set()
    for seed in range(2000):
        keys, values = layer.update(*states(1, seed=seed))
        places.add((keys.data_ptr(), values.data_ptr()))
        assert keys.shape == (2, HEADS, 1001 + seed, DIM)
    assert len(places) <= 8
    assert torch.equal(keys[:, :, -1:], states(1, seed=1999)[0])


ARRANGED: dict[str, Callable[[Any], None]] = {
    "crop": lambda layer: layer.crop(-5),
    "crop nothing": lambda layer: layer.crop(0),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda layer: layer.batch_repeat_interleave(3),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1])),
    "select by mask": lambda layer: layer.batch_select_indices(torch.tensor([False, True])),
    "offload": lambda layer: (layer.offload(), layer.prefetch()),
    "reset": lambda layer: layer.reset(),
}
CHANGES: dict[str, Callable[[Any], None]] = {
    **ARRANGED,
    "write": lambda layer: (layer.keys[:, :, 3:9].mul_(3), layer.values.add_(1)),
    "assign": lambda layer: (setattr(layer, "keys", layer.keys * 2), setattr(layer, "values", layer.values + 1)),
    "write values": lambda layer: layer.values.add_(1),
    "assign values": lambda layer: setattr(layer, "values", layer.values + 1),
}


@pytest.mark.parametrize("config", [None, "x", tiny.model("llama")], ids=["nothing", "a name", "a model"])
def test_a_cache_is_made_for_a_configuration(config: Any) -> None:
    with pytest.raises(TypeError, match=rf"config must be .* model\.config; got {type(config).__name__}"):
        SparseCache(config)


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_changes_as_the_stock_layer_does(change: str) -> None:
    ours, stock = filled([37, 1, 60])
    for layer in (ours, stock):
        CHANGES[change](layer)
    if change != "reset":
        assert_same(ours, stock)
    batch = 2 if stock.keys is None else stock.keys.shape[0]
    for seed, length in enumerate([1, 1, 300, 1]):
        new = states(length, batch, seed + 7)
        ours.update(*new)
        stock.update(*new)
        assert_same(ours, stock)


def allocate(key: Tensor, room: int) -> tuple[Tensor, Tensor]:
    return key.new_zeros(*key.shape[:2], room, key.shape[3], dtype=torch.int8), key.new_zeros(*key.shape[:2], room)


def quantise(key: Tensor, start: int, stop: int, out: tuple[Tensor, Tensor], center: Tensor) -> None:
    new = key[:, :, start:stop] - center[:, :, None]
    scales = new.abs().amax(-1) / 127
    out[0][:, :, start:stop] = (new / scales[..., None]).round()
    out[1][:, :, start:stop] = scales


PLAIN = Layout(allocate, quantise)


def in_8_bits(kept: QuantisedKeys, keys: Tensor) -> tuple[Tensor, ...]:
    length = keys.shape[2]
    return tuple(part[:, :, :length] for part in kept.up_to(keys, length, PLAIN))


def assert_those_of(keys: Tensor, kept: QuantisedKeys) -> None:
    """What was kept is what one would make of the keys in one go."""
    for got, expected in zip(in_8_bits(kept, keys), in_8_bits(QuantisedKeys(), keys), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_running_keys_in_8_bits_are_those_of_the_keys(change: str | None) -> None:
    """Whatever happens to a cache."""
    layer = SparseLayer()
    for seed, length in enumerate([50, *[1] * 40, 700, 3]):
        keys, _ = layer.update(*states(length, seed=seed))
        in_8_bits(layer.quantised, keys)
    if change is not None:
        CHANGES[change](layer)
    batch = 2 if layer.keys is None else layer.keys.shape[0]
    for seed, length in enumerate([1, 30, 1]):
        keys, _ = layer.update(*states(length, batch, seed + 100))
        assert layer.holds(keys)
        assert_those_of(keys, layer.quantised)


def test_tokens_to_remove_may_be_a_tensor() -> None:
    layer = SparseLayer()
    layer.update(*states(8))
    layer.crop(torch.tensor(-3))
    assert (layer.get_seq_length(), type(layer.get_seq_length())) == (5, int)


def test_a_layer_knows_what_it_holds() -> None:
    layer = SparseLayer()
    keys, _ = layer.update(*states(300))
    assert layer.holds(keys)
    assert layer.holds(keys.clone())
    assert layer.holds(keys.transpose(1, 2).contiguous().transpose(1, 2))
    for other in (keys[:, :, 1:], keys * 2, keys.double(), keys.roll(1, dims=2), keys[:1]):
        assert not layer.holds(other)
    layer.update(*states(1))
    assert not layer.holds(keys)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_is_known_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    """In few bits, the place of the last key may be rounded to one that there is not."""
    layer = SparseLayer()
    keys, _ = layer.update(*states(2200))
    copy, other = keys.clone(), keys.clone()
    other[:, :, -1] += 1
    torch.set_default_dtype(dtype)
    try:
        assert layer.holds(copy)
        assert not layer.holds(other)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_copy_without_hidden_keys_grows_with_its_layer() -> None:
    layer = SparseLayer()
    layer.update(*states(50))
    shown = torch.tensor([[0, 1, 3, *range(5, 50)], [2, *range(3, 50)]])

    def check() -> Tensor:
        keys, values, quantised = layer.without_hidden(shown)
        index = shown[:, None, :, None].expand(-1, HEADS, -1, DIM)
        assert torch.equal(keys, layer.keys.gather(2, index))
        assert torch.equal(values, layer.values.gather(2, index))
        assert_those_of(keys, quantised)
        return keys

    storage = check().data_ptr()
    for seed in range(3):
        layer.update(*states(1, seed=seed))
        shown = torch.nn.functional.pad(shown, (0, 1), value=50 + seed)
        assert check().data_ptr() == storage
    layer.reorder_cache(torch.tensor([1, 1]))
    shown = shown[[1, 1]]
    check()
    layer.values.mul_(2)
    layer.update(*states(1))
    shown = torch.nn.functional.pad(shown, (0, 1), value=53)
    check()
    layer.crop(-3)
    shown = shown[:, :-3]
    check()
    shown = shown[:, 4:]
    check()


class CopiedKeys:
    """Attention that is given keys other than those that the cache has handed out."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change

    def __call__(self, module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hf_sparse.interface.sparse_attention_forward(module, query, self.change(key), *args, **kwargs)


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many keys were rounded, in each call that rounded some."""
    counts: list[int] = []

    def counting(key: Tensor, start: int, stop: int, *rest: Any) -> None:
        counts.append(stop - start)
        layout.quantise(key, start, stop, *rest)

    layout = importance.LAYOUT
    monkeypatch.setattr(importance, "LAYOUT", replace(layout, quantise=counting))
    monkeypatch.setattr(Grouped, "uncompiled_reason", lambda *_: "a test wants none")
    return counts


def ranking_model() -> Any:
    """A model that ranks keys for every token."""
    return hf_sparse.patch(tiny.model("llama"), alpha=1.0, dense_below=0, dense_layers=[], min_keys=24, recent_keys=8)


@pytest.mark.parametrize(("factor", "noted"), [(1.0, False), (1.5, True)])
def test_copies_of_cached_keys_are_rounded_once(
    factor: float, noted: bool, rounded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may attend to a copy of its cache. Keys that are changed after it are rounded anew, and it is said."""
    model = ranking_model()
    functions = ALL_ATTENTION_FUNCTIONS._global_mapping
    monkeypatch.setitem(functions, hf_sparse.attention.NAME, CopiedKeys(lambda key: factor * key))
    cache = SparseCache(model.config)
    model(tiny.tokens(1, 300), past_key_values=cache)
    rounded.clear()
    for seed in range(3):
        model(tiny.tokens(1, 1, seed), past_key_values=cache)
    assert set(rounded) == ({301, 302, 303} if noted else {1})
    assert any("rounded all cached keys" in note for note in hf_sparse.report(model).notes) == noted


WAYS: dict[str, Callable[[Any], Callable[[Tensor, SparseCache], Any]]] = {
    "by place": lambda model: lambda ids, cache: model(ids, None, None, cache),
    "decoder alone": lambda model: lambda ids, cache: model.model(ids, past_key_values=cache),
    "copied": lambda model: partial(_by_name, copy.deepcopy(model)),
    "compiled": lambda model: partial(_by_name, torch.compile(model, backend="eager")),
}


def _by_name(model: Any, ids: Tensor, cache: SparseCache) -> Any:
    return model(ids, past_key_values=cache)


@pytest.mark.parametrize("way", WAYS)
def test_keys_are_rounded_once_however_the_cache_is_given(way: str, rounded: list[int]) -> None:
    torch.compiler.reset()
    model = ranking_model()
    run, cache = WAYS[way](model), SparseCache(model.config)
    run(tiny.tokens(1, 300), cache)
    rounded.clear()
    for seed in range(3):
        run(tiny.tokens(1, 1, seed), cache)
    assert rounded == [1] * 3 * tiny.LAYERS


def test_threads_that_share_a_model_round_keys_once(rounded: list[int]) -> None:
    """A pass of another thread, with a cache of its own, in the middle of a pass."""
    model = ranking_model()
    caches = [SparseCache(model.config) for _ in range(2)]
    for cache in caches:
        model(tiny.tokens(1, 300), past_key_values=cache)
    rounded.clear()

    @torch.no_grad()
    def other() -> None:
        model(tiny.tokens(1, 1), past_key_values=caches[1])

    def meanwhile(*_: Any) -> None:
        handle.remove()
        thread = Thread(target=other)
        thread.start()
        thread.join()

    handle = model.model.layers[0].self_attn.register_forward_pre_hook(meanwhile)
    model(tiny.tokens(1, 1), past_key_values=caches[0])
    assert rounded == [1] * 2 * tiny.LAYERS


def test_a_model_with_cross_attention_in_reserve_takes_its_own_kind_of_cache() -> None:
    model, ids = sparse_model("gpt2", "grouped"), tiny.tokens(1, 40)
    cache = EncoderDecoderCache(SparseCache(model.config), DynamicCache())
    out = model(ids, past_key_values=cache)
    assert torch.equal(out.logits, tiny.logits(model, ids))


def test_keys_are_not_quantised_twice() -> None:
    spans: list[tuple[int, int]] = []
    layer = SparseLayer()
    layout = replace(PLAIN, quantise=lambda key, start, stop, *_: spans.append((start, stop)))
    keys, _ = layer.update(*states(100))
    for seed in range(12):
        layer.quantised.up_to(keys, keys.shape[2], layout)
        keys, _ = layer.update(*states(1, seed=seed))
    assert spans == [(0, 100), *((length, length + 1) for length in range(100, 111))]


def test_a_sequence_that_sees_nothing_does_not_have_all_keys_quantised_anew() -> None:
    spans: list[tuple[int, int]] = []
    layout = replace(PLAIN, quantise=lambda key, start, stop, *_: spans.append((start, stop)))
    keys, kept = states(302)[0], QuantisedKeys()
    for length in (300, 301, 302):
        texts = [(0, length), (length - 1, 0)]
        kept.up_to(keys[:, :, :length], length, layout, texts=lambda texts=texts: texts)
    assert spans == [(0, 300), (300, 301), (301, 302)]


def test_keys_are_quantised_anew_for_other_kernels() -> None:
    keys, kept = states(40)[0], QuantisedKeys()
    for factor in (1, 2, 1):
        layout = replace(PLAIN, quantise=lambda key, *rest, by=factor: quantise(by * key, *rest))
        _, scales = kept.up_to(keys, 40, layout)
        torch.testing.assert_close(scales[:, :, :40], factor * keys.abs().amax(-1) / 127)


def test_a_batch_of_another_size_is_refused() -> None:
    layer = SparseLayer()
    layer.update(*states(5, batch=2))
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(1, 2\)"):
        layer.update(*states(1, batch=1))


@pytest.mark.parametrize("batch", [1, 3])
def test_an_empty_cache_takes_a_batch_of_another_size(batch: int) -> None:
    layer = SparseLayer()
    layer.update(*states(5, batch=2))
    layer.crop(-5)
    new = states(4, batch=batch)
    keys, values = layer.update(*new)
    assert torch.equal(keys, new[0])
    assert torch.equal(values, new[1])


@torch.enable_grad()
def test_gradients_flow_through_what_is_cached() -> None:
    ours, stock = SparseLayer(), DynamicLayer()
    grads = []
    for layer in (ours, stock):
        leaves = [x.requires_grad_() for seed in range(3) for x in states(4, seed=seed)]
        parts = [layer.update(*leaves[i : i + 2]) for i in (0, 2, 4)]
        sum((keys * values).square().sum() for keys, values in parts).backward()
        grads.append([leaf.grad for leaf in leaves])
        with torch.no_grad():
            layer.update(*states(2, seed=9))
    assert_same(ours, stock)
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


@torch.enable_grad()
@pytest.mark.parametrize("cache", [SparseCache, DynamicCache])
def test_queries_alone_may_learn(cache: Callable[..., Any]) -> None:
    """As with adapters of queries alone: no key has a gradient, and the backward pass wants the keys all the same."""
    model = hf_sparse.patch(tiny.model("llama"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    ids = tiny.tokens(2, 60)
    grads = []
    for past in (cache(config=model.config), None):
        with torch.no_grad():
            past = past or model(ids[:, :20]).past_key_values
            if past.get_seq_length() == 0:
                model(ids[:, :20], past_key_values=past)
        (sum(model(part, past_key_values=past).logits.square().sum() for part in ids[:, 20:].split(20, 1))).backward()
        grads.append([x.grad.clone() for x in model.parameters() if x.grad is not None])
        model.zero_grad()
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_what_was_made_in_inference_mode_can_be_continued_outside() -> None:
    layer = SparseLayer()
    with torch.inference_mode():
        keys, _ = layer.update(*states(40))
        in_8_bits(layer.quantised, keys)
    keys, _ = layer.update(*states(10, seed=1))
    assert_those_of(keys, layer.quantised)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_of_a_cache_goes_its_own_way(copied: Callable[[Any], Any]) -> None:
    cache = SparseCache(tiny.config("llama"))
    keys, _ = cache.update(*states(40), layer_idx=0)
    in_8_bits(cache.layers[0].quantised, keys)
    twin = copied(cache)
    cache.update(*states(20, seed=1), layer_idx=0)
    ours, _ = twin.update(*states(20, seed=2), layer_idx=0)
    assert torch.equal(ours, torch.cat([states(40)[0], states(20, seed=2)[0]], dim=2))
    assert torch.equal(cache.layers[0].keys[:, :, 40:], states(20, seed=1)[0])
    assert twin.layers[0].holds(ours)
    assert_those_of(ours, twin.layers[0].quantised)


def test_full_attention_grows_in_place_and_the_rest_is_stock() -> None:
    cache = SparseCache(tiny.config("gemma3"))
    assert isinstance(cache, DynamicCache)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, SparseLayer]
    for _ in range(30):
        for layer in range(2):
            cache.update(*states(1), layer_idx=layer)
    assert cache.get_seq_length() == 30
    assert cache.get_seq_length(1) == 30
    assert [keys.shape[2] for keys, *_ in cache] == [tiny.WINDOW - 1, 30]


@torch.no_grad()
def test_a_filled_cache_of_any_model_can_grow_in_place() -> None:
    model = tiny.model("gemma3")  # Its sliding windows stay with the layers that transformers has for them.
    text, token = tiny.tokens(1, 20), tiny.tokens(1, 1, seed=2)
    caches = [model(text, use_cache=True).past_key_values for _ in range(2)]
    sliding = [layer for layer in caches[1].layers if type(layer) is not DynamicLayer]
    grow_in_place(caches[1])
    assert [layer for layer in caches[1].layers if not isinstance(layer, SparseLayer)] == sliding
    assert 0 < len(sliding) < len(caches[1].layers)
    stock, ours = (model(token, past_key_values=cache).logits for cache in caches)
    assert torch.equal(stock, ours)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "gpt2"])
def test_a_patched_model_uses_it_by_itself(name: str) -> None:
    model = sparse_model(name, "grouped")
    ids = tiny.tokens(1, 20)
    grown = {SparseLayer, DynamicSlidingWindowLayer}
    out: Any = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert {type(layer) for layer in out.past_key_values.layers} <= grown
    assert {type(layer) for layer in model(ids).past_key_values.layers} <= grown
    assert {type(layer) for layer in model(ids, use_cache=True).past_key_values.layers} <= grown
    assert model(ids, use_cache=False).past_key_values is None
    assert hf_sparse.report(model).notes == ()

    hf_sparse.unpatch(model)
    out = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    for cache in (out.past_key_values, model(ids).past_key_values):
        assert type(cache) is DynamicCache
        assert not any(isinstance(layer, SparseLayer) for layer in cache.layers)


class ShortName(LlamaForCausalLM):
    """A model that calls its cache as those of transformers 5.24 do."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, cache: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, attention_mask, past_key_values=cache, **kwargs)


def test_models_that_call_it_cache_get_one_and_are_given_one() -> None:
    model = hf_sparse.patch(ShortName(tiny.config("llama")).eval(), SPARSE)
    ids = tiny.tokens(1, 20)
    for out in (model(ids), model(ids, cache=None)):
        assert {type(layer) for layer in out.past_key_values.layers} == {SparseLayer}
    mine = DynamicCache(config=model.config)
    assert model(ids, None, mine).past_key_values is mine
    assert model(ids[:, :1], cache=mine).past_key_values is mine
    assert {type(layer) for layer in mine.layers} == {DynamicLayer}
    assert hf_sparse.report(model).notes[0].startswith("1 forward passes with a cache that makes new tensors")


def test_own_calls_give_models_a_cache_by_their_own_name_for_it() -> None:
    """From transformers 5.24 on, the longer name is deprecated, in what is passed and in what comes back."""
    for folder in ("hf_sparse", "scripts"):
        for path in (Path(__file__).parents[1] / folder).rglob("*.py"):
            assert not re.findall(r"past_key_values\s*=|\.past_key_values", path.read_text(encoding="utf-8")), path


def test_another_cache_is_used_where_asked_for() -> None:
    model = sparse_model("llama", "grouped")
    ids = tiny.tokens(1, 20)
    mine = DynamicCache(config=model.config)
    assert model(ids, past_key_values=mine).past_key_values is mine
    assert {type(layer) for layer in mine.layers} == {DynamicLayer}
    mine = DynamicCache(config=model.config)
    arguments: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    out: Any = model.generate(ids, past_key_values=mine, **arguments)
    assert out.past_key_values is mine
    assert {type(layer) for layer in mine.layers} == {DynamicLayer}
    out = model.generate(ids, cache_implementation="dynamic", **arguments)
    assert {type(layer) for layer in out.past_key_values.layers} == {DynamicLayer}
    out = model.generate(ids, cache_implementation="static", **arguments)
    assert isinstance(out.past_key_values, StaticCache)


def test_what_other_caches_cost_is_counted() -> None:
    model = sparse_model("llama", "grouped")
    past = DynamicCache(config=model.config)
    model(tiny.tokens(1, 20), past_key_values=past)
    assert hf_sparse.report(model).notes == ()
    for _ in range(2):
        model(tiny.tokens(1, 1), past_key_values=past)
    copied = tiny.LAYERS * 2 * 2 * 16 * 4 * (20 + 21)  # layers, keys and values, kv_heads, head_dim, bytes, tokens
    (note,) = hf_sparse.report(model).notes
    assert note.startswith("2 forward passes")
    assert f"{copied:,} bytes" in note
    assert str(hf_sparse.report(model)).endswith(note)
    hf_sparse.patch(model, alpha=9.0)
    assert hf_sparse.report(model).notes == ()


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(("name", "selector"), [("llama", "grouped"), ("llama", "topk"), ("gemma3", "grouped")])
def test_the_same_tokens_as_with_the_stock_cache(name: str, selector: str, generation: str) -> None:
    model = sparse_model(name, selector)
    expected = generated(model, cache_implementation="dynamic", **GENERATIONS[generation])
    assert generated(model, **GENERATIONS[generation]) == expected
    if "num_return_sequences" not in GENERATIONS[generation]:
        cache = SparseCache(model.config)
        assert generated(model, past_key_values=cache, **GENERATIONS[generation]) == expected


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_assisted_decoding_gives_the_same_tokens(name: str) -> None:
    """The draft model is wrong now and then, so that the cache is cropped."""
    model = sparse_model(name, "topk")
    expected = generated(model, batch=1)
    assert generated(model, batch=1, assistant_model=sparse_model(name, "window", alpha=1.0)) == expected


def test_a_conversation_goes_on_with_the_cache_of_its_beginning() -> None:
    model = sparse_model("llama", "topk")
    ids = tiny.tokens(1, 40)
    expected: Any = model.generate(ids, max_new_tokens=5, do_sample=False)
    past = SparseCache(model.config)
    model(ids[:, :30], past_key_values=past)
    for cache in (copy.deepcopy(past), past):
        assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False), expected)


@torch.enable_grad()
def test_training_is_as_with_the_stock_cache() -> None:
    model = sparse_model("llama", "topk").train()
    out: Any = model(tiny.tokens(1, 20), use_cache=True)
    assert {type(layer) for layer in out.past_key_values.layers} == {DynamicLayer}


@pytest.mark.parametrize("selector", ["grouped", "topk"])
@pytest.mark.parametrize("left", [0, 37])
def test_decoding_selects_alike_with_any_cache(left: int, selector: str) -> None:
    """One query with rounded keys that the cache keeps, and with such as are made anew: the same output."""
    state = hf_sparse.attention.LayerState(0, replace(SPARSE, min_keys=16, selector=selector))
    layer = SparseLayer()
    cache = Cache(layers=[layer])
    layer.update(*states(6000 + left))
    starts = (left, 0)
    for seed in range(20):
        keys, values = layer.update(*states(1, seed=seed))
        if seed == 10:
            layer.reorder_cache(torch.tensor([1, 0]))
            starts = starts[::-1]
            layer.crop(-3)
            keys, values = layer.update(*states(1, seed=90))
        queries = torch.cat(states(1, seed=seed + 50), dim=1)
        intervals = torch.tensor([[[[start, keys.shape[2]]]] for start in starts], dtype=torch.int32)
        outs = []
        for given in (cache, None):
            set_cache_of_pass(given)
            outs.append(hf_sparse.attention.attend(state, AttentionCall(queries, keys, values, intervals, 1.0))[0])
        assert torch.equal(*outs)


class HandsOn(LlamaForCausalLM):
    """A model that names no cache among its arguments, as Evolla's does, and hands all others on."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().forward(input_ids=input_ids, **kwargs)


class Closed(LlamaForCausalLM):
    """A model that takes nothing but tokens."""

    def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
        return super().forward(input_ids=input_ids)


def test_a_model_that_hands_arguments_on_is_given_its_cache() -> None:
    made, ids = tiny.model("llama"), tiny.tokens(1, 20)
    cache = SparseCache(made.config)
    expected = made(ids).logits[:, -1]
    assert cache_argument(Closed(made.config), cache) == {}
    model = HandsOn(made.config).eval()
    model.load_state_dict(made.state_dict())
    model(ids[:, :-1], **cache_argument(model, cache))
    assert cache.get_seq_length() == 19
    torch.testing.assert_close(model(ids[:, -1:], **cache_argument(model, cache)).logits[:, -1], expected)
