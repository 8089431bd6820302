"""Lossless generation: whatever drafts are worth, the text is that of the dense model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel, StaticCache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import hf_sparse
from hf_sparse import SparseAttentionConfig, SparseCache, generate_lossless
from hf_sparse.cache import SparseLayer
from hf_sparse.kernels.quantised import QuantisedKeys
from hf_sparse.lossless import generate as loop
from hf_sparse.patching import states
from tests import tiny
from tests.sparse import SPARSE, every_architecture

NEW = 40
PROMPT = 30
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2}


@dataclass(frozen=True)
class Noise(hf_sparse.ScoreSelector):
    """Keeps keys at random: drafts are right now and then."""

    name: str = "noise"

    def score(self, query: Tensor, key: Tensor, call: hf_sparse.AttentionCall) -> Tensor:
        return torch.rand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def dense(name: str, ids: Tensor, seed: int = 0, **kwargs: Any) -> Any:
    """What the model generates that nobody patched."""
    built = tiny.model(name)
    torch.manual_seed(seed)
    return built.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, **kwargs})


def lossless(model: PreTrainedModel, ids: Tensor, seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    return generate_lossless(model, ids, **{"max_new_tokens": NEW, "do_sample": False, **kwargs})


def patched(name: str = "llama", config: SparseAttentionConfig = SPARSE, **fields: Any) -> PreTrainedModel:
    return hf_sparse.patch(tiny.model(name), config, **fields)


@every_architecture
def test_greedy_text_is_that_of_the_dense_model(name: str) -> None:
    """Longer than sliding windows, with layers of all kinds."""
    for seed, length in enumerate((3, PROMPT)):
        ids = tiny.tokens(1, length, seed)
        expected = dense(name, ids, max_new_tokens=25)
        for selector, gamma in itertools.product(("grouped", Noise()), (None, 4)):
            text = lossless(patched(name, selector=selector), ids, gamma=gamma, max_new_tokens=25)
            assert torch.equal(text, expected), (selector, gamma, length)


@pytest.mark.parametrize("gamma", [None, 0, 1, 4, 30])
def test_sampled_text_is_that_of_the_dense_model_with_the_same_seed(gamma: int | None) -> None:
    model = patched()
    for seed in range(4):
        ids = tiny.tokens(1, PROMPT, seed)
        found = []
        for generate in (partial(lossless, model, gamma=gamma), partial(dense, "llama")):
            found.append((generate(ids=ids, seed=seed, **SAMPLED).tolist(), torch.rand(3).tolist()))
        assert found[0] == found[1]
    counted = hf_sparse.report(model).drafts
    assert gamma in (None, 0) or 0 < counted.accepted < counted.drafted


def test_sampled_tokens_have_the_distribution_of_the_dense_model() -> None:
    """Of 4 tokens, the third and the fourth of a text, against their exact probabilities; sparse ones differ."""
    vocab, draws, heat, start = 4, 400, 2.5, torch.tensor([[1, 3, 2, 0, 2, 1, 1, 3, 0, 2, 3, 1]])
    built = tiny.model("llama", seed=1, vocab_size=vocab, pad_token_id=None)
    endings = torch.tensor(list(itertools.product(range(vocab), repeat=3)))
    logits = tiny.logits(built, torch.cat([start.expand(len(endings), -1), endings], dim=1))[:, -4:-1]
    exact = (logits.double() / heat).softmax(-1).gather(2, endings[..., None])[..., 0].prod(1).view(vocab, -1).sum(0)

    def p_value(texts: Tensor) -> float:
        assert texts.shape == (draws, start.shape[1] + 3)
        count = torch.bincount(texts[:, -2] * vocab + texts[:, -1], minlength=vocab * vocab)
        assert exact.min() * draws > 5
        return float(chisquare(count.numpy(), (exact / exact.sum() * draws).numpy()).pvalue)

    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": True, "temperature": heat}
    model = hf_sparse.patch(built, SPARSE, selector="window", alpha=0.5, min_keys=1, sink_keys=0, recent_keys=1)
    assert p_value(model.generate(start, num_return_sequences=draws, **options)) < 1e-3
    one_by_one = [generate_lossless(model, start, gamma=2, **options) for _ in range(draws)]
    assert p_value(torch.cat(one_by_one)) > 1e-3
    counted = hf_sparse.report(model).drafts
    assert draws * 0.1 < counted.accepted < counted.drafted


@settings(max_examples=25)
@given(st.data())
def test_any_pattern_of_acceptance_any_lengths_and_the_cache_goes_on(data: st.DataObject) -> None:
    """Drafts that are right and wrong where they are told to be; afterwards the cache is as after dense passes."""
    ids = tiny.tokens(1, data.draw(st.integers(2, 40), label="prompt"))
    new = data.draw(st.integers(1, 15), label="new tokens")
    gamma = data.draw(st.integers(1, 9), label="gamma")
    name = data.draw(st.sampled_from(["llama", "gemma3"]), label="name")
    right = data.draw(st.lists(st.booleans(), min_size=new + 20, max_size=new + 20), label="right")
    expected = dense(name, ids, max_new_tokens=new + 5)
    model = patched(name)
    cache = SparseCache(model.config)
    inner = loop._Text._draft

    def draft(self: Any, length: int) -> Any:
        drafted, kwargs = inner(self, length)
        for place in range(self.ids.shape[1], drafted.shape[1]):
            wrong = not right[place - ids.shape[1]]
            drafted[0, place] = (expected[0, place] + wrong) % tiny.VOCAB
        return drafted, kwargs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Text, "_draft", draft)
        out = lossless(model, ids, max_new_tokens=new, gamma=gamma, past_key_values=cache)
        assert torch.equal(out, expected[:, : ids.shape[1] + new])
        assert_dense(cache, name, out)
        assert torch.equal(lossless(model, out, max_new_tokens=5, gamma=gamma, past_key_values=cache), expected)
    assert_dense(cache, name, expected)


def assert_dense(cache: Any, name: str, ids: Tensor) -> None:
    """A cache holds what dense passes make of a text without its last token, and the same in few bits."""
    built = tiny.model(name)
    stock = DynamicCache(config=built.config)
    with torch.no_grad():
        built(ids[:, :-1], past_key_values=stock)
    assert cache.get_seq_length() == ids.shape[1] - 1
    for ours, theirs in zip(cache.layers, stock.layers, strict=True):
        assert_close(ours.keys, theirs.keys, atol=2e-4, rtol=2e-4)
        assert_close(ours.values, theirs.values, atol=2e-4, rtol=2e-4)
        assert not getattr(ours, "record_past", False)
        if isinstance(ours, SparseLayer) and ours.quantised._layout is not None:
            assert_few_bits(ours)


def assert_few_bits(layer: SparseLayer) -> None:
    """What a layer keeps in few bits is what one makes of its keys in one go."""
    keys, layout = layer.keys, layer.quantised._layout
    assert keys is not None
    assert layout is not None
    length = keys.shape[2]
    parts = [
        kept.up_to(keys, length, layout, texts=lambda: [(0, length)]) for kept in (layer.quantised, QuantisedKeys())
    ]
    assert torch.equal(parts[0][1][:, :, :length], parts[1][1][:, :, :length])


FAILURES = ("draft", "check", "plain", "streamer", "criterion")


class Failing(BaseStreamer, StoppingCriteria):
    """Fails at a token, as a streamer or as a stopping criterion."""

    def __init__(self, at: int) -> None:
        self.at, self.tokens = at, list[int]()

    def put(self, value: Tensor) -> None:
        if value.dim() == 1:
            self.tokens += value.tolist()
            self._fail()

    def end(self) -> None: ...

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.tokens.append(int(input_ids[0, -1]))
        self._fail()
        return torch.zeros(1, dtype=torch.bool)

    def _fail(self) -> None:
        if len(self.tokens) == self.at:
            raise KeyboardInterrupt


@contextmanager
def failing_pass(model: PreTrainedModel, queries: int, after: int) -> Iterator[None]:
    """The last layer fails in a pass of so many queries, when the others are done with it."""
    seen = 0

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal seen
        hidden = args[0] if args else kwargs["hidden_states"]
        seen += hidden.shape[1] == queries
        if seen > after:
            raise KeyboardInterrupt

    handle = list(states(model))[-1].register_forward_pre_hook(fail, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("failure", FAILURES)
def test_an_error_leaves_cache_and_patch_as_they_were(name: str, failure: str) -> None:
    model = patched(name)
    ids, cache = tiny.tokens(1, PROMPT), SparseCache(model.config)
    before = tiny.logits(model, ids)
    expected = dense(name, ids)
    kwargs: dict[str, Any] = {"gamma": 0 if failure == "plain" else 4, "past_key_values": cache}
    end = Failing(9)
    if failure in ("streamer", "criterion"):
        kwargs |= {"streamer": end} if failure == "streamer" else {"stopping_criteria": [end]}
        with pytest.raises(KeyboardInterrupt):
            lossless(model, ids, **kwargs)
        assert end.tokens == expected[0, PROMPT : PROMPT + 9].tolist()
    else:
        # The prompt has more queries than a draft's pass, of one, and a check's, of five.
        with pytest.raises(KeyboardInterrupt), failing_pass(model, 5 if failure == "check" else 1, 2):
            lossless(model, ids, **kwargs)
    assert torch.equal(tiny.logits(model, ids), before)
    held = cache.get_seq_length()
    assert PROMPT <= held < PROMPT + NEW
    assert {layer.get_seq_length() for layer in cache.layers} == {held}
    assert_dense(cache, name, expected[:, : held + 1])
    rest = PROMPT + NEW - held - 1
    assert torch.equal(lossless(model, expected[:, : held + 1], past_key_values=cache, max_new_tokens=rest), expected)


class Processor(LogitsProcessor):
    """Remembers the texts that it saw, and favours a token by their number."""

    def __init__(self) -> None:
        self.texts: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.texts.append(input_ids[0].tolist())
        scores[0, len(self.texts) % tiny.VOCAB] += 2
        return scores


class Recorder(BaseStreamer, StoppingCriteria):
    """What a streamer and a stopping criterion are given; it stops at a token."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.put_: list[list[int]] = []
        self.texts: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.put_.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.texts.append(input_ids[0].tolist())
        return torch.tensor([int(input_ids[0, -1]) == self.stop])


@pytest.mark.parametrize("gamma", [None, 0, 3, 8])
def test_streamers_criteria_and_processors_see_what_they_see_in_dense_decoding(gamma: int | None) -> None:
    ids = tiny.tokens(1, PROMPT)
    stop = dense("llama", ids, logits_processor=[Processor()])[0, PROMPT + 17].item()
    seen = []
    for generate in (lambda **kwargs: dense("llama", ids, **kwargs), None):
        streamer, criterion, processor = Recorder(), Recorder(stop), Processor()
        kwargs: dict[str, Any] = {
            "streamer": streamer,
            "stopping_criteria": [criterion],
            "logits_processor": [processor],
        }
        out = lossless(patched(), ids, gamma=gamma, **kwargs) if generate is None else generate(**kwargs)
        assert streamer.ended == 1
        seen.append((out.tolist(), streamer.put_, criterion.texts, processor.texts))
    assert seen[0] == seen[1]
    assert len(seen[0][0][0]) < PROMPT + NEW


@pytest.mark.parametrize("place", [0, 1, 6, 7, 8])
def test_the_end_of_a_text_may_lie_anywhere_in_a_draft(place: int) -> None:
    ids = tiny.tokens(1, PROMPT)
    text = dense("llama", ids)[0, PROMPT:].tolist()
    end = text[place]
    model = patched()
    cache = SparseCache(model.config)
    out = lossless(model, ids, gamma=6, eos_token_id=end, past_key_values=cache)
    assert torch.equal(out, dense("llama", ids, eos_token_id=end))
    assert out[0, PROMPT:].tolist() == text[: text.index(end) + 1]
    assert_dense(cache, "llama", out)


@pytest.mark.parametrize("new", [1, 2, 3, 7])
def test_no_token_too_many(new: int) -> None:
    ids = tiny.tokens(1, PROMPT)
    assert torch.equal(lossless(patched(), ids, gamma=5, max_new_tokens=new), dense("llama", ids, max_new_tokens=new))


def test_scores_and_logits_are_those_of_dense_decoding() -> None:
    ids = tiny.tokens(1, PROMPT)
    kwargs: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, **SAMPLED}
    theirs, ours = dense("llama", ids, **kwargs), lossless(patched(), ids, gamma=3, **kwargs)
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-4, rtol=1e-4)
    assert_dense(ours.past_key_values, "llama", ours.sequences)


@pytest.mark.parametrize("side", ["left", "inside"])
def test_padding(side: str) -> None:
    ids = tiny.tokens(1, PROMPT)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 7) if side == "left" else [11, 12, 17]] = 0
    expected = dense("llama", ids, attention_mask=mask)
    assert torch.equal(lossless(patched(), ids, gamma=4, attention_mask=mask), expected)


def test_prompts_in_chunks_and_other_caches() -> None:
    ids = tiny.tokens(1, PROMPT)
    model, expected = patched(), dense("llama", ids)
    assert torch.equal(lossless(model, ids, gamma=4, prefill_chunk_size=8), expected)
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        assert torch.equal(lossless(model, ids, gamma=4, past_key_values=cache), expected)


def test_embeddings_instead_of_tokens() -> None:
    ids, found = tiny.tokens(1, PROMPT), []
    for model, generate in ((patched(), partial(generate_lossless, gamma=4)), (tiny.model("llama"), None)):
        embedded = model.get_input_embeddings()(ids).detach()
        call: Any = model.generate if generate is None else partial(generate, model)
        found.append(call(inputs_embeds=embedded, max_new_tokens=NEW, do_sample=False).tolist())
    assert found[0] == found[1]
    assert len(found[0][0]) == NEW


def test_threads_share_a_model() -> None:
    """One checks while another drafts."""
    model, found = patched(), {}

    def generate(seed: int) -> None:
        for _ in range(3):
            found.setdefault(seed, []).append(lossless(model, tiny.tokens(1, PROMPT, seed), gamma=3))

    threads = [Thread(target=generate, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(3):
        expected = dense("llama", tiny.tokens(1, PROMPT, seed))
        assert len(found[seed]) == 3
        assert all(torch.equal(text, expected) for text in found[seed])


def test_the_report_counts_drafts() -> None:
    model, ids = patched(), tiny.tokens(1, PROMPT)
    assert "lossless" not in str(hf_sparse.report(model))
    lossless(model, ids, gamma=3)
    found = hf_sparse.report(model)
    counted = found.drafts
    assert counted.plain + counted.checked == NEW - 1
    assert 0 < counted.accepted <= counted.drafted <= 3 * counted.checks
    assert counted.checked == counted.accepted + counted.checks
    assert min(counted.draft_seconds, counted.check_seconds) > 0
    assert f"{counted.checks} checks accepted {counted.accepted} of {counted.drafted} drafted tokens" in str(found)
    lossless(model, ids, gamma=0)
    assert hf_sparse.report(model).drafts.plain == counted.plain + NEW - 1
    reasons = {reason for row in found.rows for reason in row["dense_rows"]}
    assert "prompt or check of generate_lossless" in reasons
    assert found.density < 1
    hf_sparse.patch(model, alpha=9.0)
    assert hf_sparse.report(model).drafts == type(counted)()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "beam search"),
    "returned": ({"num_return_sequences": 3, "do_sample": True}, "one sequence at a time; got 3"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
    "static": ({"cache_implementation": "static"}, "StaticLayer"),
    "no cache": ({"use_cache": False}, "must be a SparseCache or DynamicCache .*; got NoneType"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "collect attentions"),
    "hidden": ({"output_hidden_states": True, "return_dict_in_generate": True}, "collect hidden states"),
    "assistant": ({"assistant_model": tiny.model("llama")}, "assistant_model"),
    "gamma": ({"gamma": -1}, "gamma must be None or a number of tokens from 0 on; got -1"),
    "half": ({"gamma": 1.5}, "got 1.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    kwargs, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        lossless(patched(), tiny.tokens(1, 10), **kwargs)
    assert "\n" not in str(caught.value)


def test_batches_unpatched_models_and_fixed_caches_are_refused() -> None:
    model = patched()
    with pytest.raises(ValueError, match="one sequence at a time; got 2"):
        lossless(model, tiny.tokens(2, 10))
    with pytest.raises(ValueError, match="StaticLayer"):
        lossless(model, tiny.tokens(1, 10), past_key_values=StaticCache(config=model.config, max_cache_len=90))
    with pytest.raises(ValueError, match=r"not patched: call hf_sparse\.patch"):
        lossless(hf_sparse.unpatch(model), tiny.tokens(1, 10))
