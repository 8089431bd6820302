"""`generate_lossless`: a patched model drafts tokens sparsely, and one dense pass over them keeps those that are right.

The draft model has the weights of the model, and its cache: what a draft appends is removed again, and the check
appends the same tokens densely, so that the cache holds the keys and values of the dense model alone.

Text is chosen from the logits of dense passes only, token by token, with the random numbers that dense decoding would
have drawn for that token. A draft draws with the same numbers, so that it mostly finds the same token, and the text
depends neither on drafts nor on their lengths. A drafted token that dense decoding would not have chosen ends the
check. (Rejection as in arXiv 2211.17192 accepts slightly more, but its text depends on the drafts.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, LogitsProcessorList, PreTrainedModel
from transformers.generation import logits_process
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hf_sparse.attention import dense_passes
from hf_sparse.cache import given_cache
from hf_sparse.errors import UserError
from hf_sparse.lossless.caches import crop, recording_past, refuse_cache, restored_after_errors
from hf_sparse.lossless.pace import Pace
from hf_sparse.patching import base_model, is_patched
from hf_sparse.patching.caches import cache_argument, with_cache
from hf_sparse.patching.patcher import drafts_of

_REASON = "prompt or check of generate_lossless"

# Logits processors of transformers that remember the texts they saw. Drafts do without them.
_STATEFUL = (
    logits_process.SynthIDTextWatermarkLogitsProcessor,
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

_REFUSED = ("assistant_model", "custom_generate", "synced_gpus")


def generate_lossless(
    model: nn.Module, inputs: Tensor | None = None, *, gamma: int | None = None, streamer: Any = None, **kwargs: Any
) -> Any:
    """The text that `model.generate` would give before it was patched, faster where contexts are long.

    Greedy text is that of the dense model, and sampled text that of the dense model with the same seed, up to what
    rounding decides: a dense pass over several tokens adds numbers in another order than one over a single token.

    Args:
        model: A patched model.
        inputs: As in `generate`: one prompt, int64 `(1, tokens)`.
        gamma: Tokens of a draft; 0 for none. `None` adapts it to the times and the acceptance seen, and drafts nothing
            where that is not faster.
        streamer: As in `generate`. It gets tokens one by one, as they become certain.
        **kwargs: What else `generate` takes. A cache that is passed should hold a text that was read densely. Logits
            processors that are not transformers' own see the text alone, and no drafts.

    Returns:
        What `generate` returns. `report(model).drafts` says how drafts fared.

    Raises:
        UserError: For a model that is not patched, several sequences, beams or another way of decoding, a cache whose
            tokens cannot be removed, or outputs that are not collected here (attentions, hidden states).
    """
    base = base_model(model)
    if not is_patched(base):
        raise UserError(f"{type(base).__name__} is not patched: call hf_sparse.patch(model) first")
    if gamma is not None and (not isinstance(gamma, int) or isinstance(gamma, bool) or gamma < 0):
        raise UserError(f"gamma must be None or a number of tokens from 0 on; got {gamma!r}")
    for name in _REFUSED:
        if kwargs.get(name):
            raise UserError(f"generate_lossless takes no {name}")

    def decode(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        text = _Text(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, streamer)
        return text.continued(Pace(gamma))

    if (cache := given_cache(kwargs)) is not None:
        kwargs = with_cache(base, kwargs, cache)
    # `generate` itself does not hand a streamer on to such a function.
    generate: Any = model.generate
    return generate(inputs, streamer=streamer, custom_generate=decode, **kwargs)


class _Text:
    """A text that grows: its tokens, and all that the model's next pass needs.

    Attributes:
        ids: The text, int64 `(1, tokens)`. The cache holds all of it but the last token.
        kwargs: Arguments of the next pass, as `generate` hands them from pass to pass.
        scores: Processed logits of every new token, and `logits` the unprocessed ones, if they are asked for.
    """

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        processors: LogitsProcessorList,
        stopping: Any,
        config: Any,
        kwargs: dict[str, Any],
        streamer: Any,
    ) -> None:
        _refuse(config, ids, kwargs)
        self.model, self.ids, self.kwargs, self.config = model, ids, kwargs, config
        self.cache: Cache = given_cache(kwargs)
        self.scores: tuple[Tensor, ...] | None = () if _wants(config, "output_scores") else None
        self.logits: tuple[Tensor, ...] | None = () if _wants(config, "output_logits") else None
        self._processors, self._stopping, self._streamer = processors, stopping, streamer
        self._drafting = LogitsProcessorList(each for each in processors if _keeps_no_state(each))
        self._finished = False

    def continued(self, pace: Pace) -> Any:
        """Read the prompt, and add tokens until the text is finished; gives what `generate` returns."""
        with dense_passes(_REASON):
            out = self.model._prefill(self.ids, self.config, self.kwargs)
        self.kwargs = self.model._update_model_kwargs_for_generation(out, self.kwargs)
        self._accept(out.logits[:, -1:], [])
        del out
        with recording_past(self.cache), self.model._optimize_model_for_decode():
            while not self._finished:
                self._add(pace)
        if self._streamer is not None:
            self._streamer.end()
        if not self.config.return_dict_in_generate:
            return self.ids
        return GenerateDecoderOnlyOutput(
            sequences=self.ids,  # type: ignore[arg-type]
            scores=self.scores,  # type: ignore[arg-type]
            logits=self.logits,  # type: ignore[arg-type]
            **cache_argument(GenerateDecoderOnlyOutput, self.cache),  # type: ignore[arg-type]
        )

    def _add(self, pace: Pace) -> None:
        """Draft and check, or add one token without a draft."""
        start, length = self.ids.shape[1], self.cache.get_seq_length()
        gamma = pace.choose(self.config.max_length - start - 1)
        begin = middle = perf_counter()
        ids, kwargs, drafted = self.ids, self.kwargs, list[int]()
        with restored_after_errors(self.cache, length):
            if gamma:
                ids, kwargs = self._draft(gamma)
                crop(self.cache, length)
                drafted = ids[0, start:].tolist()  # On a GPU, this waits until they are there.
                middle = perf_counter()
            with dense_passes(_REASON):
                out = self._pass(ids, kwargs, gamma + 1)
            accepted = self._accept(out.logits[:, -gamma - 1 :], drafted)
        end = perf_counter()
        added = self.ids.shape[1] - start
        crop(self.cache, length + added)
        self.kwargs = self.model._update_model_kwargs_for_generation(out, dict(self.kwargs), num_new_tokens=added)
        rejected = accepted < min(gamma, added)
        pace.learn(gamma, accepted, rejected, middle - begin, end - middle)
        drafts_of(self.model).count(gamma, accepted, added, middle - begin, end - middle)

    def _draft(self, gamma: int) -> tuple[Tensor, dict[str, Any]]:
        """The text with `gamma` tokens more that sparse attention finds, and the arguments of a pass over them."""
        ids, kwargs = self.ids, dict(self.kwargs)
        with self._numbers_kept():
            for _ in range(gamma):
                out = self._pass(ids, kwargs, 1)
                kwargs = self.model._update_model_kwargs_for_generation(out, kwargs)
                token, _ = self._choose(self._drafting, ids, out.logits[:, -1])
                ids = torch.cat([ids, token[:, None]], dim=-1)
        return ids, kwargs

    def _accept(self, logits: Tensor, drafted: Sequence[int]) -> int:
        """Add the tokens that dense `logits` `(1, queries, vocab)` choose, up to the first that was not drafted.

        Returns:
            How many of the drafted tokens were added.
        """
        for index in range(logits.shape[1]):
            token, scores = self._choose(self._processors, self.ids, logits[:, index])
            if self.scores is not None:
                self.scores += (scores,)
            if self.logits is not None:
                self.logits += (logits[:, index].to(torch.float32, copy=True),)
            self.ids = torch.cat([self.ids, token[:, None]], dim=-1)
            self._finished = bool(self._stopping(self.ids, self.scores).all())
            if self._streamer is not None:
                self._streamer.put(token.cpu())
            as_drafted = index < len(drafted) and int(token) == drafted[index]
            if self._finished or not as_drafted:
                return index + as_drafted
        return len(drafted)

    def _choose(self, processors: LogitsProcessorList, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The next token `(1,)` and its scores, by the very calls of transformers' own loop."""
        scores = processors(ids, logits.to(ids.device, torch.float32, copy=True))  # type: ignore[arg-type]
        if not self.config.do_sample:
            return scores.argmax(dim=-1), scores
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1), scores

    def _pass(self, ids: Tensor, kwargs: Mapping[str, Any], queries: int) -> Any:
        """A pass over the last tokens of `ids`."""
        inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=queries, **kwargs)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = queries
        return self.model(**inputs, return_dict=True)

    def _numbers_kept(self) -> AbstractContextManager[None]:
        """A context after which the random numbers drawn in it are drawn again."""
        if not self.config.do_sample:
            return nullcontext()
        device = self.ids.device
        return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)


def _wants(config: Any, name: str) -> bool:
    return bool(config.return_dict_in_generate and getattr(config, name))


def _keeps_no_state(processor: object) -> bool:
    own = type(processor).__module__ == logits_process.__name__
    return own and not isinstance(processor, _STATEFUL)


def _refuse(config: Any, ids: Tensor, kwargs: Mapping[str, Any]) -> None:
    """Refuse what cannot be done token by token on one cache."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UserError(f"generate_lossless decodes greedily or samples; got {mode.value.replace('_', ' ')}")
    if len(ids) != 1:
        raise UserError(f"generate_lossless takes one sequence at a time; got {len(ids)}")
    for name in ("output_attentions", "output_hidden_states"):
        if _wants(config, name):
            raise UserError(f"generate_lossless does not collect {name.removeprefix('output_').replace('_', ' ')}")
    refuse_cache(given_cache(kwargs))
