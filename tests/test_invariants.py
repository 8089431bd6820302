"""The invariants of the design, each by its number, over every architecture of `tests.tiny`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_sparse
from hf_sparse import SparseAttentionConfig, attention
from hf_sparse.call import AttentionCall
from hf_sparse.engines import ENGINES
from hf_sparse.engines.common import masked_weights
from hf_sparse.selectors import SELECTORS
from tests import calls, tiny
from tests.inductor import compiler_present
from tests.sparse import (
    SPARSE,
    assert_same,
    by_design,
    captured_weights,
    deviation,
    every_architecture,
    every_cache,
    every_exact_selector,
    every_selector,
    every_side,
    generated,
    sparse_model,
    step_by_step,
)

# Triton takes long where it is interpreted, and has a model of its own in test_triton.py.
ENGINE_NAMES = tuple(name for name in ENGINES if name not in ("auto", "triton") and calls.unavailable(name) is None)

# 1. With a budget that covers everything, a patched model is the model.


@by_design
@every_selector
@pytest.mark.parametrize("engine", ENGINE_NAMES)
@every_architecture
def test_invariant_01_all_keys_is_dense(name: str, engine: str, selector: str) -> None:
    ids = tiny.tokens(2, 40)
    model = tiny.model(name)
    model.set_attn_implementation("eager")
    eager = tiny.logits(model, ids)
    # A call whose every query keeps every key may be answered by dense attention: let the last query lose one key, so
    # that selector and engine do the work, and compare the other queries, which do not see it.
    hf_sparse.patch(model, SPARSE, law="fraction", fraction=1.0, max_keys=39, selector=selector, engine=engine)
    ours = tiny.logits(model, ids)
    window = tiny.WINDOW if name == "mistral" else 40
    assert hf_sparse.report(model).rows[-1]["dense_rows"] == {
        "the budget covers all visible keys": 80 if window < 40 else 78
    }
    assert_same(ours[:, :-1], eager[:, :-1])


@pytest.mark.parametrize("fields", [{"alpha": 1e9}, {"law": "fraction", "fraction": 1.0}, {"dense_layers": (0, 1)}])
@every_architecture
def test_invariant_01_all_keys_is_dense_with_padding(name: str, fields: dict[str, Any]) -> None:
    ids, mask, _ = tiny.padded([40, 23], "left")
    model = tiny.model(name)
    own = tiny.logits(model, ids, mask)
    ours = tiny.logits(hf_sparse.patch(model, SPARSE, **fields), ids, mask)
    assert hf_sparse.report(model).density == 1.0
    assert_same(ours[mask.bool()], own[mask.bool()])


@by_design
@every_architecture
def test_invariant_01_in_bfloat16(name: str) -> None:
    """As close to the float32 model as the model's own bfloat16 attention is."""
    ids = tiny.tokens(2, 40)
    exact = tiny.logits(tiny.model(name), ids)
    model = tiny.model(name, torch.bfloat16)
    own = tiny.logits(model, ids)
    for engine in ENGINE_NAMES:
        hf_sparse.patch(model, SPARSE, law="fraction", fraction=1.0, max_keys=39, selector="topk", engine=engine)
        ours = tiny.logits(model, ids)
        assert deviation(ours[:, :-1], exact[:, :-1]) < 1.5 * deviation(own[:, :-1], exact[:, :-1]) + 1e-3


# 2. Every engine computes what the reference computes (on one selection: see test_engines.py).


@every_selector
@every_architecture
def test_invariant_02_engines_agree(name: str, selector: str) -> None:
    ids, mask, _ = tiny.padded([90, 70], "left")
    logits = [
        tiny.logits(sparse_model(name, selector, engine=engine), ids, mask)[mask.bool()] for engine in ENGINE_NAMES
    ]
    for other in logits[1:]:
        assert_same(other, logits[0])


# 3. Padding and neighbours in a batch change nothing.


def padding_errors(model: PreTrainedModel, side: str, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Logits of real tokens, padded and alone."""
    ids, mask, texts = tiny.padded(lengths, side, extra=3)
    together = tiny.logits(model, ids, mask)
    padded = torch.cat([together[i][mask[i].bool()] for i in range(len(texts))])
    alone = torch.cat([tiny.logits(model, text[None])[0] for text in texts])
    return padded, alone


@every_side
@every_selector
@every_architecture
def test_invariant_03_padding(name: str, selector: str, side: str) -> None:
    model = sparse_model(name, selector)
    padded, alone = padding_errors(model, side, [150, 64, 81])
    assert hf_sparse.report(model).density < 0.6
    assert_same(padded, alone)


@every_selector
@every_architecture
def test_invariant_03_padding_in_bfloat16(name: str, selector: str) -> None:
    """Rounding may tip the choice between two keys of nearly equal score, so what is bounded is the mean."""
    padded, alone = padding_errors(sparse_model(name, selector, torch.bfloat16), "left", [70, 41])
    dense_padded, dense_alone = padding_errors(tiny.model(name, torch.bfloat16), "left", [70, 41])
    assert deviation(padded, alone) < 3 * deviation(dense_padded, dense_alone) + 1e-2


@every_side
@pytest.mark.parametrize(("name", "selector"), [("llama", "grouped"), ("gpt2", "grouped"), ("gemma3", "grouped")])
def test_invariant_03_padding_of_long_texts(name: str, selector: str, side: str) -> None:
    """Long enough for queries that share keys to choose between many."""
    model = hf_sparse.patch(tiny.model(name, max_position_embeddings=1024), SPARSE, alpha=1.0, selector=selector)
    padded, alone = padding_errors(model, side, [900, 637])
    assert_same(padded, alone)


@every_side
def test_invariant_03_padding_by_blocks(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queries are taken a block at a time: where a block ends changes nothing."""
    ids, mask, _ = tiny.padded([200, 150], side)
    for selector in SELECTORS:
        whole = tiny.logits(sparse_model("llama", selector), ids, mask)[mask.bool()]
        with monkeypatch.context() as patch:
            patch.setattr(attention, "_BLOCK_ELEMENTS", 1)
            parts = tiny.logits(sparse_model("llama", selector), ids, mask)[mask.bool()]
        assert_same(parts, whole)


# 4. One pass is the same as token by token.


@every_cache
@every_exact_selector
@every_architecture
def test_invariant_04_prefill_is_decode(name: str, selector: str, cache: str) -> None:
    ids, mask, _ = tiny.padded([26, 17], "left")
    model = sparse_model(name, selector)
    one_pass = tiny.logits(model, ids, mask)
    stepped = step_by_step(model, ids, mask, cache, [1] * 26)
    assert_same(stepped[mask.bool()], one_pass[mask.bool()])


@every_cache
@every_exact_selector
@every_architecture
def test_invariant_04_a_few_tokens_at_a_time(name: str, selector: str, cache: str) -> None:
    ids, mask, _ = tiny.padded([40, 29], "left")
    model = sparse_model(name, selector)
    one_pass = tiny.logits(model, ids, mask)
    stepped = step_by_step(model, ids, mask, cache, [16, 3, 1, 1, 19])
    assert_same(stepped[mask.bool()], one_pass[mask.bool()])


@every_cache
@pytest.mark.parametrize("selector", ["grouped", "topk"])
@every_architecture
def test_invariant_04_neighbours_have_the_same_budgets(name: str, selector: str, cache: str) -> None:
    """Queries of a group choose together, alone they choose alone: how many keys they keep is the same."""
    ids, mask, _ = tiny.padded([70, 45], "left")
    model = sparse_model(name, selector)
    one_pass = tiny.logits(model, ids, mask)
    counted = [(row["rows"], row["mean_keys"]) for row in hf_sparse.report(model).rows]
    hf_sparse.patch(hf_sparse.unpatch(model), SPARSE, selector=selector)
    stepped = step_by_step(model, ids, mask, cache, [60, *[1] * 10])
    assert [(row["rows"], row["mean_keys"]) for row in hf_sparse.report(model).rows] == counted
    # No promise on the values, but they are those of one model and not of two.
    dense = tiny.logits(tiny.model(name), ids, mask)
    real = mask.bool()
    assert deviation(stepped[real], one_pass[real]) < deviation(one_pass[real], dense[real])


# 5. Every way to generate gives the same tokens.


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@every_exact_selector
@every_architecture
def test_invariant_05_caches_give_the_same_tokens(name: str, selector: str, kwargs: dict[str, Any]) -> None:
    model = sparse_model(name, selector)
    dynamic = generated(model, new=8, **kwargs)
    assert generated(model, new=8, use_cache=False, **kwargs) == dynamic
    assert generated(model, new=8, cache_implementation="static", **kwargs) == dynamic


@every_cache
@every_architecture
def test_invariant_05_with_all_keys_the_tokens_are_those_of_the_model(name: str, cache: str) -> None:
    model = tiny.model(name)
    implementation = {} if cache == "dynamic" else {"cache_implementation": "static"}
    for kwargs in ({}, {"num_beams": 3}):
        hf_sparse.unpatch(model)
        own = generated(model, **kwargs)
        hf_sparse.patch(model, SPARSE, alpha=1e9)
        assert generated(model, **implementation, **kwargs) == own


@every_exact_selector
@every_architecture
def test_invariant_05_assisted_decoding(name: str, selector: str) -> None:
    """Checking several guesses in one pass gives the tokens that one at a time gives."""
    model = sparse_model(name, selector)
    alone = generated(model, batch=1)
    assert generated(model, batch=1, prompt_lookup_num_tokens=4) == alone
    assistant = tiny.model("llama", seed=5)
    assert generated(model, batch=1, assistant_model=assistant) == alone
    # An assistant that guesses right is checked on longer runs.
    assert generated(model, batch=1, assistant_model=sparse_model(name, selector)) == alone


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("name", "fields", "backend", "generate"),
    [
        ("llama", {"num_hidden_layers": 1}, "aot_eager", {}),
        ("gemma2", {}, "eager", {"cache_implementation": "static"}),
    ],
)
def test_invariant_05_compiled(name: str, fields: dict[str, Any], backend: str, generate: dict[str, Any]) -> None:
    ids, mask, _ = tiny.padded([24, 17], "left")
    real = mask.bool()
    model = hf_sparse.patch(tiny.model(name, **fields), SPARSE, selector="topk")
    logits, tokens = tiny.logits(model, ids, mask), generated(model, new=3)
    model.forward = torch.compile(model.forward, backend=backend)
    assert_same(tiny.logits(model, ids, mask)[real], logits[real])
    assert generated(model, new=3, **generate) == tokens


@pytest.mark.skipif(not compiler_present(), reason="no C++ compiler")
@pytest.mark.usefixtures("_fresh_compiler")
def test_invariant_05_compiled_by_inductor() -> None:
    """The attention alone: each kernel of the rest of a model takes inductor seconds, and is none of ours."""
    ids, mask, _ = tiny.padded([24, 17], "left")
    fields = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    model = hf_sparse.patch(tiny.model("gpt_oss", **fields), SPARSE, selector="topk")
    logits = tiny.logits(model, ids, mask)
    attention = model.model.layers[0].self_attn
    attention.forward = torch.compile(attention.forward, fullgraph=True)
    assert_same(tiny.logits(model, ids, mask)[mask.bool()], logits[mask.bool()])


# 6. Patching can be undone (in full: test_patching.py).


@every_architecture
def test_invariant_06_unpatch_restores(name: str) -> None:
    ids = tiny.tokens(2, 40)
    model, sibling = tiny.model(name), tiny.model(name, seed=3)
    sibling.config = model.config
    config, before, of_sibling = model.config, tiny.logits(model, ids), tiny.logits(sibling, ids)

    def interrupted() -> None:
        with hf_sparse.patched(model, SPARSE):
            assert not torch.equal(tiny.logits(model, ids), before)
            assert torch.equal(tiny.logits(sibling, ids), of_sibling)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.config is config
    assert torch.equal(tiny.logits(model, ids), before)
    hf_sparse.unpatch(hf_sparse.patch(model, SPARSE))
    assert model.config is config
    assert torch.equal(tiny.logits(model, ids), before)


# 7. Saved and loaded, the model is the same; without us it is dense.


@every_architecture
def test_invariant_07_save_and_load(name: str, tmp_path: Path) -> None:
    ids = tiny.tokens(2, 40)
    model = tiny.model(name)
    model.save_pretrained(tmp_path / "base")
    dense = tiny.logits(model, ids)
    config = replace(SPARSE, per_head={1: ((1.0, 0.5), (2.0, 0.5), (3.0, 0.5), (1.0, 0.7))})
    sparse = tiny.logits(hf_sparse.patch(model, config), ids)
    model.save_pretrained(tmp_path / "patched")
    written = (tmp_path / "patched" / "config.json").read_text()
    assert written == (tmp_path / "base" / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched", **tiny.attention(name)).eval()
    assert torch.equal(tiny.logits(loaded, ids), dense)
    again = SparseAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert torch.equal(tiny.logits(hf_sparse.patch(loaded, again), ids), sparse)


# 8. More budget never hurts (a pretrained model: test_real_model.py).


def retained_mass(inputs: AttentionCall, mask: Tensor) -> Tensor:
    """Mass of dense attention on the keys of `mask`: `(batch, heads, q_len)`."""
    return (masked_weights(inputs, _visible(inputs)) * mask).sum(-1)


def _visible(inputs: AttentionCall) -> Tensor:
    positions = torch.arange(inputs.key.shape[2])
    return (positions >= inputs.intervals[..., :1]) & (positions < inputs.intervals[..., 1:])


@every_selector
@every_architecture
def test_invariant_08_more_budget_never_lowers_retained_mass(name: str, selector: str) -> None:
    seen: list[AttentionCall] = []
    model = tiny.model(name)
    with hf_sparse.observed(model, lambda layer, call: seen.append(call)):
        tiny.logits(model, tiny.tokens(2, 64))
    assert len(seen) == tiny.LAYERS
    for inputs in seen:
        smaller, before = torch.zeros(2, 4, 64, 64, dtype=torch.bool), torch.zeros(2, 4, 64)
        for fraction in (0.05, 0.1, 0.2, 0.5, 1.0):
            config = replace(SPARSE, law="fraction", fraction=fraction, min_keys=1)
            budgets = config.budget()(inputs.visible)[:, None]
            mask = calls.select(selector, inputs, budgets, config).mask(4, 64)
            mass = retained_mass(inputs, mask)
            # What a query kept it still keeps, so that no kind of measure can get worse.
            assert not (smaller & ~mask).any()
            assert (mass >= before - 1e-6).all()
            smaller, before = mask, mass
        if name != "gpt_oss":  # sinks take mass of their own
            assert_same(before, torch.ones_like(before))


# 9. The report counts what happened (in full: test_monitor.py).


@every_cache
@every_architecture
def test_invariant_09_report_counts(name: str, cache: str) -> None:
    """Kept and visible keys, counted again from the weights that the layers used."""
    ids, mask, _ = tiny.padded([40, 23], "left")
    model = sparse_model(name, "topk")
    kept, visible = torch.zeros(tiny.LAYERS, 4), torch.zeros(tiny.LAYERS)
    windows = [tiny.WINDOW if name in tiny.SLIDING else 40, tiny.WINDOW if name == "mistral" else 40]
    with captured_weights() as used:
        step_by_step(model, ids, mask, cache, [30, *[1] * 10])
    for layer, found in used.items():
        assert len(found) == 11
        for weights in found:
            kept[layer] += (weights > 0).sum((0, 2, 3))
    for layer, window in enumerate(windows):
        visible[layer] = sum(min(n + 1, window) for length in (40, 23) for n in range(length))
    report = hf_sparse.report(model)
    for row in report.rows:
        assert row["density"] == pytest.approx(float(kept[row["layer"], row["head"]] / visible[row["layer"]]))
    assert report.density == pytest.approx(float(kept.sum() / visible.sum() / 4))
    assert report.density < 0.75


# 10. What models do to their attention is honoured. Invariant 1 compares with the model's own attention; here is the
# proof that each of these changes something, so that ignoring it would be seen there.


def unpatched_difference(name: str, **overrides: Any) -> float:
    ids = tiny.tokens(2, 40)
    return float((tiny.logits(tiny.model(name), ids) - tiny.logits(tiny.model(name, **overrides), ids)).abs().max())


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 64}),
        ("gemma3", {"query_pre_attn_scalar": 64}),
        *((name, {"sliding_window": 24}) for name in tiny.SLIDING),
    ],
)
def test_invariant_10_tiny_models_are_sensitive(name: str, overrides: dict[str, Any]) -> None:
    assert unpatched_difference(name, **overrides) > 0.1


def test_invariant_10_tiny_models_are_sensitive_to_sinks() -> None:
    ids = tiny.tokens(2, 40)
    model = tiny.model("gpt_oss")
    before = tiny.logits(model, ids)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e4)
    assert (tiny.logits(model, ids) - before).abs().max() > 0.1


@every_selector
@every_architecture
def test_invariant_10_attention_is_the_models_own(name: str, selector: str) -> None:
    """Weights and outputs of a sparse layer: the model's own attention, restricted to the kept keys."""
    ids = tiny.tokens(2, 40)
    with captured_weights() as used:
        tiny.logits(sparse_model(name, selector), ids)
    eager = tiny.model(name)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        first = eager(input_ids=ids, output_attentions=True, use_cache=False).attentions[0]
    ours = used[0][0]
    assert ours.shape == first.shape == (2, 4, 40, 40)
    kept = ours > 0
    assert 0 < kept.sum() < (first > 0).sum()
    # The first layer sees the same input, sparse or dense. Without the other keys, the kept ones share their mass;
    # attention sinks keep theirs, so compare ratios within a query.
    best = (first * kept).argmax(-1, keepdim=True)
    ratio = ours / ours.gather(-1, best)
    expected = first / first.gather(-1, best)
    assert_close(ratio[kept], expected[kept], atol=1e-4, rtol=1e-3)
    if name != "gpt_oss":
        assert_close(ours.sum(-1), torch.ones(2, 4, 40))


def test_invariant_10_sinks_keep_their_mass_when_keys_are_dropped() -> None:
    ids = tiny.tokens(2, 40)
    model = sparse_model("gpt_oss", "topk")
    seen: list[AttentionCall] = []
    with hf_sparse.observed(model, lambda layer, call: seen.append(call)):
        tiny.logits(model, ids)
    with captured_weights() as used:
        tiny.logits(model, ids)
    inputs, weights = seen[0], used[0][0]
    assert inputs.sinks is not None
    scores = inputs.query @ inputs.key.repeat_interleave(2, 1).transpose(-1, -2) * inputs.scaling
    exp = scores.exp() * (weights > 0)
    expected = exp / (exp.sum(-1, keepdim=True) + inputs.sinks.exp().view(1, 4, 1, 1))
    assert_close(weights, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("split", [0, 70])
def test_rows_that_keep_everything_are_attended_densely_with_the_same_result(
    split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("llama")
    fields = {"alpha": 3.0, "min_keys": 8, "sink_keys": 1, "recent_keys": 4, "dense_layers": (), "dense_below": 150}
    ids = tiny.tokens(2, 260)
    with torch.no_grad(), hf_sparse.patched(model, **fields):
        cache = model(ids[:, :split], use_cache=True).past_key_values if split else None
        seen: list[int] = []
        count = attention.leading_dense
        monkeypatch.setattr(attention, "leading_dense", lambda *given: seen.append(count(*given)) or seen[-1])
        fast = model(ids[:, split:], past_key_values=cache).logits
        report = hf_sparse.report(model)
    # Whole groups of the text: queries 0 to 127, of which the first `split` belong to an earlier call.
    assert set(seen) == {128 - split}
    monkeypatch.setattr(attention, "leading_dense", lambda *_: 0)
    with torch.no_grad(), hf_sparse.patched(model, **fields):
        cache = model(ids[:, :split], use_cache=True).past_key_values if split else None
        slow = model(ids[:, split:], past_key_values=cache).logits
        assert hf_sparse.report(model).rows == report.rows
    assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_one_row_after_dense_rows_has_its_own_budget() -> None:
    model = tiny.model("llama")
    fields = {"alpha": 3.0, "min_keys": 8, "sink_keys": 1, "recent_keys": 4, "dense_layers": (), "dense_below": 129}
    ids = tiny.tokens(1, 129)
    with torch.no_grad(), hf_sparse.patched(model, **fields):
        whole = model(ids).logits[:, -1]
        kept = hf_sparse.report(model).rows[0]["mean_keys"] * 129
    with torch.no_grad(), hf_sparse.patched(model, **fields):
        cache = model(ids[:, :128], use_cache=True).past_key_values
        step = model(ids[:, 128:], past_key_values=cache).logits[:, -1]
    assert_close(whole, step, atol=1e-5, rtol=1e-5)
    budget = SparseAttentionConfig(**fields).budget()(torch.tensor([129])).item()
    assert round(kept) == 128 * 129 // 2 + budget
