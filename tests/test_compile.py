"""`torch.compile` and `torch.export` of patched models: one graph, the same logits, and counted when it runs.

Inductor takes long, so that most tests take `aot_eager`, which makes the same graphs and runs them operation by
operation; or, where not what is in a graph but when there is one is in question, `eager`, which takes half as long.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel, StaticCache

import hf_sparse
from hf_sparse import SparseCache, attention, cache, compiled
from hf_sparse.visibility import traced
from tests import sparse, tiny
from tests.inductor import compiler_present
from tests.sparse import SPARSE, assert_same, generated

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*", "ignore::FutureWarning:torch.*")

CACHES: dict[str, Callable[[Any], Any]] = {
    "ours": SparseCache,
    "static": lambda config: StaticCache(config=config, max_cache_len=80),
}
# Half a minute each: another test reads a model that inductor has compiled.
needs_inductor = pytest.mark.skipif(not compiler_present(), reason="no C++ compiler, or no headers of Python")
inductor = pytest.param("inductor", marks=[pytest.mark.slow, needs_inductor])


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def sparse_model(name: str, selector: str, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    """A patched model, as `shallow`."""
    return hf_sparse.patch(shallow(name, dtype), SPARSE, selector=selector, **fields)


def shallow(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of one layer where all are alike: tracing takes as long as a model is deep."""
    layers = {} if name in tiny.HYBRID else {"num_hidden_layers": 1}
    return tiny.model(name, dtype, **layers)


def whole(model: Any, backend: str = "aot_eager") -> Any:
    """The model as one graph, or an error."""
    return torch.compile(model, backend=backend, fullgraph=True)


@torch.no_grad()
def read(call: Any, past: Any, ids: Tensor, mask: Tensor | None, steps: list[int], start: int = 0) -> Tensor:
    """Logits of `ids` from position `start` on, read a few tokens at a time."""
    logits = []
    place = tiny.positions(torch.ones_like(ids) if mask is None else mask)
    for size in steps:
        stop = start + size
        out = call(
            input_ids=ids[:, start:stop],
            # As `generate` has it: a tensor of its own for every token.
            attention_mask=None if mask is None else mask[:, :stop].contiguous(),
            position_ids=place[:, start:stop].contiguous(),
            past_key_values=past,
            use_cache=True,
        )
        logits.append(out.logits)
        start = stop
    return torch.cat(logits, dim=1)


def breaks(model: PreTrainedModel, **fields: Any) -> int:
    """Graph breaks of one forward pass."""
    torch.compiler.reset()
    found: int = torch._dynamo.explain(model)(tiny.tokens(2, 40), **fields).graph_break_count
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_patched_model_has_no_graph_break_of_its_own(name: str) -> None:
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    model = shallow(name)
    of_the_model = breaks(model, attention_mask=mask) if name == "gpt_oss" else 0
    assert breaks(hf_sparse.patch(model, SPARSE), attention_mask=mask) == of_the_model


@pytest.mark.parametrize("fields", [{}, {"use_cache": False}], ids=["with a cache", "without"])
def test_recording_gradients_is_no_reason_for_a_graph_break(fields: dict[str, Any]) -> None:
    assert breaks(sparse_model("llama", "grouped"), **fields) == 0


@pytest.mark.parametrize(("name", "kind"), [("gemma3", "ours"), ("gemma3", "static")])
def test_prefill_and_decode_are_those_of_the_model(name: str, kind: str) -> None:
    """With padding, in one graph each, and with the same counts."""
    ids, mask, _ = tiny.padded([40, 27], "left")
    model = sparse_model(name, "topk")
    steps = [30, *[1] * 10]
    expected = read(model, CACHES[kind](model.config), ids, mask, steps)
    counted = hf_sparse.report(model).rows
    again = hf_sparse.patch(hf_sparse.unpatch(model), SPARSE, selector="topk")
    got = read(whole(again), CACHES[kind](model.config), ids, mask, steps)
    assert_same(got[mask.bool()], expected[mask.bool()])
    assert hf_sparse.report(again).rows == counted


@pytest.mark.parametrize("backend", ["aot_eager", inductor])
def test_a_token_is_no_reason_to_compile_again(backend: str) -> None:
    ids = tiny.tokens(1, 80)
    model = hf_sparse.patch(tiny.model("llama", num_hidden_layers=1), SPARSE)
    call, past = whole(model, backend), SparseCache(model.config)
    expected = read(model, SparseCache(model.config), ids, None, [40, *[1] * 40])
    got = [read(call, past, ids, None, [40, 1, 1])]
    with torch.compiler.set_stance("fail_on_recompile"):
        got.append(read(call, past, ids, None, [1] * 38, start=42))
    assert_same(torch.cat(got, dim=1), expected)
    # Nor is another text, once there was one of another length.
    read(call, SparseCache(model.config), ids, None, [30, 1])
    with torch.compiler.set_stance("fail_on_recompile"):
        read(call, SparseCache(model.config), ids, None, [60, 1])


def test_storage_that_grows_is_compiled_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_LEAST_SPARE", 4)
    ids = tiny.tokens(1, 50)
    model = sparse_model("llama", "grouped")
    expected = read(model, SparseCache(model.config), ids, None, [20, *[1] * 30])
    torch._dynamo.utils.counters.clear()
    past = SparseCache(model.config)
    assert_same(read(whole(model, "eager"), past, ids, None, [20, *[1] * 30]), expected)
    assert past.layers[0].quantised.nbytes, "keys are quantised at every token"
    # A prompt, a token, and for storage of another size each of: storage to grow, and a token.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


def test_two_models_and_a_copy_are_compiled_side_by_side() -> None:
    ids = tiny.tokens(1, 40)
    models = [sparse_model("llama", "topk"), sparse_model("llama", "topk", alpha=1.0)]
    models.append(copy.deepcopy(models[0]))
    calls = [whole(model, "eager") for model in models]
    for _ in range(2):
        for model, call in zip(models, calls, strict=True):
            assert_same(tiny.logits(call, ids), tiny.logits(model, ids))
    calls = [row["calls"] for model in models for row in hf_sparse.report(model).rows]
    assert set(calls) == {4}


def test_unpatching_and_patching_anew_are_seen_by_a_compiled_model() -> None:
    ids = tiny.tokens(1, 40)
    model = shallow("llama")
    call, dense = whole(model, "eager"), tiny.logits(model, ids)
    for fields in ({}, {"alpha": 1.0}):
        assert_same(tiny.logits(call, ids), dense)
        hf_sparse.patch(model, SPARSE, **fields)
        sparse = tiny.logits(model, ids)
        assert not torch.allclose(sparse, dense)
        assert_same(tiny.logits(call, ids), sparse)
        hf_sparse.unpatch(model)


def test_what_a_compiled_layer_knows_goes_when_it_is_unpatched() -> None:
    model = sparse.sparse_model("llama", "topk")
    tiny.logits(whole(model, "eager"), tiny.tokens(1, 20))
    handles = [state.handle for state in hf_sparse.patching.states(model).values()]
    past = SparseCache(model.config)
    layers = [int(layer.handle) for layer in past.layers]
    hf_sparse.unpatch(model)
    del past
    torch.compiler.reset()
    gc.collect()
    for handle in handles:
        with pytest.raises(KeyError):
            attention.state_of(handle)
    assert [cache.layer_of(handle) for handle in layers] == [None] * tiny.LAYERS


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_gradients_are_those_of_the_model(name: str) -> None:
    """Soft caps and attention sinks among them. Nothing is counted twice for them."""
    ids = tiny.tokens(2, 30)
    model = sparse_model(name, "topk")
    grads = []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=name != "gpt_oss")):
        call(ids, labels=ids, use_cache=False).loss.backward()
        grads.append({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})
        model.zero_grad()
    assert grads[0].keys() == grads[1].keys()
    for name, expected in grads[0].items():
        assert_close(grads[1][name], expected, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
    assert {row["calls"] for row in hf_sparse.report(model).rows} == {2}


@torch.no_grad()
def test_dropout_and_weights_leave_the_graph() -> None:
    """They are attended to outside of it: test_ledger.py counts the breaks of a whole model."""
    ids = tiny.tokens(1, 30)
    model = sparse_model("llama", "topk")
    layer = model.model.layers[0].self_attn
    [expected] = model(ids, output_attentions=True, use_cache=False).attentions
    layer.forward = torch.compile(layer.forward, backend="eager")
    [got] = model(ids, output_attentions=True, use_cache=False).attentions
    assert_same(got, expected)
    layer.attention_dropout = 0.9
    model.train()
    sums = {model(ids, use_cache=False).logits.sum().item() for _ in range(3)}
    assert len(sums) == 3


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float16, [40]), (torch.bfloat16, [39, 1])])
def test_half_precision(dtype: torch.dtype, steps: list[int]) -> None:
    ids = tiny.tokens(1, 40)
    model = sparse_model("llama", "topk", dtype)
    expected = read(model, SparseCache(model.config), ids, None, steps)
    got = read(whole(model), SparseCache(model.config), ids, None, steps)
    assert got.dtype == dtype
    assert_close(got, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_autocast(name: str) -> None:
    """Queries and keys of Qwen-3 are wider than its values there."""
    ids = tiny.tokens(1, 40)
    model = sparse_model(name, "topk")
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(tiny.logits(whole(model), ids), tiny.logits(model, ids), atol=0.05, rtol=0.05)


def test_padding_inside_a_text_is_left_out() -> None:
    ids = tiny.tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, 11], mask[1, 20:23], mask[1, 0] = 0, 0, 0
    model = sparse_model("llama", "topk")
    steps = [34, *[1] * 6]
    expected = read(model, SparseCache(model.config), ids, mask, steps)
    got = read(whole(model, "eager"), SparseCache(model.config), ids, mask, steps)
    assert_same(got[mask.bool()], expected[mask.bool()])


def test_packed_sequences_stay_apart() -> None:
    ids = tiny.tokens(1, 40)
    place = torch.cat([torch.arange(15), torch.arange(25)])[None]
    model = sparse_model("llama", "topk")
    expected = tiny.logits(model, ids, position_ids=place)
    assert_same(tiny.logits(whole(model), ids, position_ids=place), expected)
    assert_same(expected[:, :15], tiny.logits(model, ids[:, :15]))


@pytest.mark.parametrize("form", ["bool", "bias"])
def test_a_users_own_mask(form: str) -> None:
    """With holes, so that it is no interval."""
    ids = tiny.tokens(1, 30)
    mask = torch.ones(1, 1, 30, 30, dtype=torch.bool).tril()
    mask[..., 9:14, 3:6] = False
    own = mask if form == "bool" else torch.zeros(1, 1, 30, 30).masked_fill(~mask, torch.finfo(torch.float32).min)
    model = sparse_model("llama", "topk")
    assert_same(tiny.logits(whole(model), ids, own), tiny.logits(model, ids, own))
    reasons = {reason for row in hf_sparse.report(model).rows for reason in row["dense_rows"]}
    assert reasons == {"mask is not an interval"}


WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "batch": 1},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("way", WAYS)
def test_generate_gives_the_same_tokens(way: str) -> None:
    """A compiled forward pass in `generate`, which crops, repeats and reorders its cache in between."""
    model = sparse_model("llama", "topk")
    expected = generated(model, **WAYS[way])
    model.forward = whole(model.forward, "eager")
    assert generated(model, **WAYS[way]) == expected


@pytest.mark.slow
@needs_inductor
@pytest.mark.parametrize(("name", "selector"), [("llama", "grouped"), ("gemma3", "topk")])
def test_reduce_overhead_gives_the_same_tokens(name: str, selector: str) -> None:
    """On a CPU, which has no CUDA graphs to make of it."""
    model = sparse_model(name, selector)
    expected = generated(model)
    model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    assert generated(model) == expected


def test_layers_compiled_one_by_one_find_their_cache() -> None:
    ids = tiny.tokens(1, 44)
    model = sparse.sparse_model("llama", "grouped")
    expected = read(model, SparseCache(model.config), ids, None, [40, *[1] * 4])
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend="eager")
    past = SparseCache(model.config)
    assert_same(read(model, past, ids, None, [40, *[1] * 4]), expected)
    assert not any("rounded all cached keys" in note for note in hf_sparse.report(model).notes)


def test_exported_models_have_the_same_logits() -> None:
    ids = tiny.tokens(1, 40)
    model = sparse_model("llama", "topk")
    with torch.no_grad():
        program = torch.export.export(model, (ids,), {"use_cache": False})
        assert_same(program.module()(ids, use_cache=False).logits, tiny.logits(model, ids))


def call_arguments(model: PreTrainedModel) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 12, 16, generator=generator) for heads in (4, 2, 2))
    mask = hf_sparse.visibility.interval_mask(1, 12, 12)
    state = next(iter(hf_sparse.patching.states(model).values()))
    parts = [x.requires_grad_() for x in (query, key, value)]
    return (*parts, mask, torch.zeros(4, requires_grad=True), 0.25, 2.0, None, state.handle, None)


def test_cuda_graphs_leave_the_operators_out() -> None:
    """Numbers cannot be read while one is captured, and nothing is looked at when it is replayed."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("hf_sparse::")}
    assert names == {f"hf_sparse::{name}" for name in ("attend", "attend_backward", "own_mask", "visible")}
    for name in names:
        operator = getattr(torch.ops.hf_sparse, name.removeprefix("hf_sparse::")).default
        assert torch.Tag.cudagraph_unsafe in operator.tags, name


def test_the_operators_keep_the_rules_of_operators() -> None:
    model = sparse_model("llama", "topk")
    torch.library.opcheck(compiled.attend, call_arguments(model))
    seen = traced.seen_causally(2, torch.arange(5), 9)
    torch.library.opcheck(traced.visible, (seen, torch.arange(5), torch.ones(2, 9).bool()))
    torch.library.opcheck(traced.own_mask, (torch.ones(1, 1, 3, 3).bool(),))


def test_a_mask_that_is_no_interval_is_never_taken_for_one() -> None:
    own = torch.arange(6)
    seen = traced.seen_under(lambda b, h, q, k: (k <= q) & (k != 2), 1, own, 6, 0)
    with pytest.raises(RuntimeError, match="no interval"):
        traced.visible(seen, own, None)
