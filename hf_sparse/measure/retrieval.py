"""Retrieval: whether a model under a method still finds what a long text says, by likelihood and by what it writes.

The text is read once. Each question is then asked from a copy of its cache, so that it does not see the others; as its
answer, the true one is compared with wrong ones of the same form, and one is written greedily.
"""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from hf_sparse.cache import given_cache
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.measure.evaluation import applied, check_finite, measure_each, sum_counts
from hf_sparse.measure.methods import Methods
from hf_sparse.measure.perplexity import prefill
from hf_sparse.measure.retrieval_prompts import Prompt, Question
from hf_sparse.patching import report
from hf_sparse.patching.caches import cache_argument
from hf_sparse.results import Record, ResultFile
from hf_sparse.selectors import find_selector
from hf_sparse.selectors.grouped import GROUP_QUERIES

COMMAND = "retrieval"


@torch.no_grad()
def read(model: PreTrainedModel, cache: Cache | None, ids: Tensor) -> tuple[Cache, Tensor]:
    """Read int64 `(batch, length)` in one pass; gives the cache, extended, and logits `(batch, vocabulary)`."""
    options = cache_argument(model, cache)
    output = model(input_ids=ids.to(model.device), **options, use_cache=True, logits_to_keep=1)
    return given_cache(output), output.logits[:, -1].float()


def after_questions(
    model: PreTrainedModel, cache: Cache | None, ids: Tensor, questions: Sequence[Question], mode: str
) -> Iterator[tuple[int, Cache, Tensor]]:
    """The place of each question, the cache of its own after it was read, and the logits `(1, vocabulary)` that follow.

    The end of the text, int64 `(length,)`, is read in one pass; in mode `"prefill"` together with the question. In mode
    `"decode"` the questions are read side by side, a token of each in a call. `cache` stays as it is.
    """
    if mode == "prefill":
        for place, question in enumerate(questions):
            yield place, *read(model, copy.deepcopy(cache), torch.cat([ids, question.input_ids])[None])
        return
    cache = copy.deepcopy(cache)
    if len(ids):
        cache, _ = read(model, cache, ids[None])
    assert cache is not None
    cache.batch_repeat_interleave(len(questions))
    waiting = list(range(len(questions)))
    for i in range(max(len(question.input_ids) for question in questions)):
        cache, logits = read(model, cache, torch.stack([questions[place].input_ids[i : i + 1] for place in waiting]))
        left = [j for j, place in enumerate(waiting) if len(questions[place].input_ids) > i + 1]
        for j in (j for j in range(len(waiting)) if j not in left):
            own = copy.deepcopy(cache)
            own.batch_select_indices(torch.tensor([j]))
            yield waiting[j], own, logits[j : j + 1]
        if len(left) < len(waiting):
            waiting = [waiting[j] for j in left]
            cache.batch_select_indices(torch.tensor(left, dtype=torch.int64))


def written(model: PreTrainedModel, cache: Cache, logits: Tensor, count: int) -> Tensor:
    """The `count` tokens that a model writes greedily after `cache`, which is extended: int64 `(count,)`."""
    out = [logits.argmax(-1, keepdim=True)]
    while len(out) < count:
        cache, logits = read(model, cache, out[-1])
        out.append(logits.argmax(-1, keepdim=True))
    return torch.cat(out, dim=1)[0].cpu()


@torch.no_grad()
def candidates_nll(
    model: PreTrainedModel, cache: Cache, logits: Tensor, candidates: Sequence[Tensor], mode: str
) -> Tensor:
    """Nats of each answer after `cache`, which stays as it is: float64 `(candidates,)` on the CPU.

    Answers, int64 `(tokens,)` each, of the same length are read side by side: in mode `"prefill"` in one pass,
    else a token of each in a call. `logits`, `(1, vocabulary)`, predict their first token.
    """
    nll = torch.empty(len(candidates), dtype=torch.float64)
    for length in {len(ids) for ids in candidates}:
        places = [i for i, ids in enumerate(candidates) if len(ids) == length]
        ids = torch.stack([candidates[i] for i in places])
        predicted = [logits.expand(len(places), 1, -1)]
        if length > 1:
            own = copy.deepcopy(cache)
            own.batch_repeat_interleave(len(places))
            options = cache_argument(model, own)
            for part in torch.split(ids[:, :-1], length if mode == "prefill" else 1, dim=1):
                predicted.append(model(input_ids=part.to(model.device), **options, use_cache=True).logits)
        likely = torch.cat([x.float().log_softmax(-1).cpu() for x in predicted], dim=1)
        nll[places] = -likely.gather(2, ids[..., None]).double().sum((1, 2))
    return nll


def answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: Question,
    cache: Cache,
    logits: Tensor,
    mode: str,
) -> Record:
    """What a model that has read a question answers.

    Returns:
        `mode`; `depth`; `nll` of the true answer and `margin`, how much likelier it is than the likeliest wrong one,
        in nats; `picked`, whether it is likelier; `answer`, what was `written` after the question, `exact`, whether
        that begins with the answer, and `found`, the share of its parts that are in it.
    """
    nll = candidates_nll(model, cache, logits, question.candidates, mode)
    true = question.candidates[0]
    # The last number or word of an answer may go on: one more token shows it.
    text = str(tokenizer.decode(written(model, cache, logits, len(true) + 1), skip_special_tokens=True))
    answer = str(tokenizer.decode(true)).strip()
    margin = (nll[1:].min() - nll[0]).item()
    return {
        "mode": mode,
        "depth": question.depth,
        "nll": nll[0].item(),
        "margin": margin,
        "picked": margin > 0,
        "answer": answer,
        "written": text,
        "exact": _says(r"\W*", answer, text),
        "found": sum(_says(r"(.*\W)?", part, text) for part in question.parts) / len(question.parts),
    }


def _says(before: str, words: str, text: str) -> bool:
    """Whether `text` has `words` after what the pattern `before` allows, and ends or goes on with another word."""
    return re.match(rf"{before}{re.escape(words)}(?!\w)", text, re.DOTALL) is not None


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, config: SparseAttentionConfig | None
) -> Record:
    """Ask all questions of a prompt, in each of its modes, under one method; `None` is the model as it is.

    Returns:
        `answers`, what `answered` says for each mode and question; `density`, `mean_keys`, `rows` and `dense_rows` of
        the pass over the text, as for perplexity; `answer_density`, by mode, of all that follows it; `seconds` and
        `mode_seconds`, of the pass over the text and of the questions in each mode.

    Raises:
        UserError: if a likelihood is not finite.
    """
    counts: Record = {"density": 1.0, "mean_keys": None, "rows": None, "dense_rows": None}
    density, seconds = dict.fromkeys(prompt.modes, 1.0), {}
    answers: list[dict[str, Any]] = []
    # Queries that choose their keys together must be read together: what is left of the text goes with the questions.
    size = math.lcm(GROUP_QUERIES, find_selector(config.selector).group_queries if config else 1)
    shared = len(prompt.input_ids) // size * size
    with applied(model, config):
        start = time.perf_counter()
        cache = prefill(model, prompt.input_ids[:shared])
        text_seconds = time.perf_counter() - start
        if config is not None and shared:
            of_text = sum_counts(report(model))
            counts = {name: of_text[name] for name in counts}
        for mode in prompt.modes:
            start, before = time.perf_counter(), None if config is None else report(model)
            own: dict[int, Record] = {}
            rest = prompt.input_ids[shared:]
            for place, after, logits in after_questions(model, cache, rest, prompt.questions, mode):
                own[place] = answered(model, tokenizer, prompt.questions[place], after, logits, mode)
                check_finite(torch.tensor([own[place]["nll"], own[place]["margin"]]), prompt.window.document, model)
            answers += [own[place] for place in range(len(own))]
            seconds[mode] = round(time.perf_counter() - start, 3)
            if before is not None:
                density[mode] = sum_counts(report(model), before=before)["density"]
    times = {"seconds": round(text_seconds, 3), "mode_seconds": seconds}
    return {"answers": answers, **counts, "answer_density": density, **times}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    methods: Methods,
    results: ResultFile,
    about: Record,
) -> list[Record]:
    """Ask the questions of every prompt (`make_prompts`) under every method, as `measure_each` does.

    The model is patched for each sparse measurement, and restored.
    """
    return measure_each(
        COMMAND, prompts, methods, results, about, lambda each, name: measure(model, tokenizer, each, methods[name])
    )
