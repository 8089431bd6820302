"""Retrieval of codes ("needles" or "passkeys") from a long text: what a method still finds that was said once.

Sentences such as "The code for Amber is the number 48213." are inserted at even depths into a text. The model reads the
text once; then it is asked for each code from a copy of its cache, so that a question does not see the others.
"""

from __future__ import annotations

import copy
import hashlib
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.measure.evaluation import applied, check_finite, measure_each, sum_counts
from hf_sparse.measure.methods import Methods
from hf_sparse.measure.perplexity import decoded_nll, prefill
from hf_sparse.measure.windows import Window
from hf_sparse.patching import report
from hf_sparse.results import Record, ResultFile

COMMAND = "retrieval"

METHODS = ("topk", "grouped", "window")
"""What is compared with dense attention by default."""

NAMES = (
    "Amber", "Basil", "Cedar", "Delta", "Ember", "Falcon", "Garnet", "Harbor", "Indigo", "Jasper", "Kernel", "Lemon",
    "Maple", "Nectar", "Olive", "Pepper", "Quartz", "Raven", "Saffron", "Timber", "Umber", "Velvet", "Willow", "Yarrow",
)  # fmt: skip
"""Labels of the codes in a text; no two share a first letter."""

DIGITS = 5

_FACT = "\nThe code for {name} is the number {code}.\n"
_QUESTION = "\n\nWhat is the code for {name}?"
# Where texts are about programs, what follows "the code is" may be one.
_ANSWER = "The code for {name} is the number"
# Stands for the text while a chat template is filled in.
_PLACE = "(text)"


@dataclass(frozen=True)
class Question:
    """A code that was inserted into a text, and how the model is asked for it.

    Attributes:
        name: Label of the code.
        code: The digits.
        depth: Where it was inserted: 0 at the start of the text, 1 at its end.
        input_ids: int64 `(length,)`: what follows the text, up to the answer.
        answer_ids: int64 `(tokens,)`: the code as the tokenizer continues `input_ids` with it.
    """

    name: str
    code: str
    depth: float
    input_ids: Tensor
    answer_ids: Tensor


@dataclass(frozen=True)
class Prompt:
    """A text with codes in it, and the questions about them.

    Attributes:
        window: Where the text comes from.
        input_ids: int64 `(length,)`: the text with the codes, and what a chat template puts before it.
        questions: One for each code, by depth.
    """

    window: Window
    input_ids: Tensor
    questions: Sequence[Question]

    @property
    def length(self) -> int:
        """Tokens of the text with the longest question and its answer."""
        return self.window.length

    def about(self) -> Record:
        """What records say of the prompt."""
        return {**self.window.about(), "prompt_sha256": self.sha256}

    @property
    def sha256(self) -> str:
        """Hash of all tokens: of the text, the questions and the answers."""
        digest = hashlib.sha256(self.input_ids.numpy().tobytes())
        for question in self.questions:
            digest.update(b"?" + question.input_ids.numpy().tobytes() + b"!" + question.answer_ids.numpy().tobytes())
        return digest.hexdigest()[:16]


def make_prompts(windows: Sequence[Window], tokenizer: PreTrainedTokenizerBase, codes: int, seed: int) -> list[Prompt]:
    """Insert codes into the text of every window.

    Names and codes are the same at every length of a document. The text is cut at its start so that the prompt and the
    answer are as long as the window. With a chat template, text and question are a message of the user, and the answer
    is begun for the assistant.

    Args:
        windows: Texts at every length; their targets are not used.
        tokenizer: The model's tokenizer.
        codes: Codes in a text, at most `len(NAMES)`.
        seed: Of names and codes.

    Raises:
        UserError: if there are more codes than names, or a window is too short for them.
    """
    if not 1 <= codes <= len(NAMES):
        raise UserError(f"codes must be between 1 and {len(NAMES)}; got {codes}")
    before, after = _surroundings(tokenizer)
    out = []
    for window in windows:
        generator = random.Random(f"{seed} {window.text_sha256}")
        names = generator.sample(NAMES, codes)
        numbers = map(str, generator.sample(range(10 ** (DIGITS - 1), 10**DIGITS), codes))
        depths = [i / (codes - 1) if codes > 1 else 0.5 for i in range(codes)]
        questions = [_question(tokenizer, *each, after) for each in zip(names, numbers, depths, strict=True)]
        facts = [_ids(tokenizer, _FACT.format(name=asked.name, code=asked.code)) for asked in questions]
        longest = max(len(question.input_ids) + len(question.answer_ids) for question in questions)
        room = window.length - len(before) - longest - sum(map(len, facts))
        if room < codes:
            raise UserError(
                f"length {window.length} is too short: {codes} codes and a question take {window.length - room} "
                "tokens; take a longer one, or fewer --codes"
            )
        text = window.input_ids[len(window.input_ids) - room :].tolist()
        ids, start = list(before), 0
        for fact, depth in zip(facts, depths, strict=True):
            stop = round(depth * room)
            ids += text[start:stop] + fact
            start = stop
        out.append(Prompt(window, torch.tensor(ids + text[start:]), questions))
    return out


def _surroundings(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """Tokens before the text, and what stands between a question and the beginning of its answer."""
    if not tokenizer.chat_template:
        return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], "\n\n"
    message = [{"role": "user", "content": _PLACE}]
    filled = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    before, _, after = filled.partition(_PLACE)
    return _ids(tokenizer, before), after


def _question(tokenizer: PreTrainedTokenizerBase, name: str, code: str, depth: float, after: str) -> Question:
    asked = _QUESTION.format(name=name) + after + _ANSWER.format(name=name)
    without, whole = _ids(tokenizer, asked), _ids(tokenizer, f"{asked} {code}")
    # A tokenizer may join the last word and the space after it: the answer begins where the tokens part.
    same = next((i for i, (a, b) in enumerate(zip(without, whole, strict=False)) if a != b), len(without))
    return Question(name, code, depth, torch.tensor(whole[:same]), torch.tensor(whole[same:]))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


@torch.no_grad()
def written(model: PreTrainedModel, cache: Cache | None, input_ids: Tensor, count: int) -> Tensor:
    """The `count` tokens that a model writes greedily after `cache` and `input_ids`, int64 `(length,)`."""
    step, out = input_ids.to(model.device), []
    for _ in range(count):
        output = model(input_ids=step[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, step = output.past_key_values, output.logits[0, -1:].argmax(-1)
        out.append(step)
    return torch.cat(out).cpu()


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, config: SparseAttentionConfig | None
) -> Record:
    """Ask for every code of a prompt under one method; `None` is the model as it is.

    Returns:
        `answers`, a dictionary for each question: `name`, `code`, `depth`, `written` (the text of the greedy answer),
        `correct` (whether the first number in it is the code), `nll` (nats of the code's tokens) and `tokens`;
        `density`, `mean_keys`, `rows` and `dense_rows` of the pass over the text, as for perplexity, and
        `answer_density` of all that follows it; `seconds`.

    Raises:
        UserError: if a likelihood is not finite.
    """
    counts: Record = {"density": 1.0, "mean_keys": None, "rows": None, "dense_rows": None, "answer_density": 1.0}
    answers: list[dict[str, Any]] = []
    start = time.perf_counter()
    with applied(model, config):
        cache = prefill(model, prompt.input_ids)
        before = None if config is None else report(model)
        for question in prompt.questions:
            nll = decoded_nll(model, copy.deepcopy(cache), question.input_ids, question.answer_ids)
            # One more token than the code has shows whether its number goes on.
            ids = written(model, copy.deepcopy(cache), question.input_ids, len(question.answer_ids) + 1)
            check_finite(nll, prompt.window.document, model)
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            number = re.search(r"\d+", text)
            correct = number is not None and number[0] == question.code
            answer = {"name": question.name, "code": question.code, "depth": question.depth, "written": text}
            answers.append({**answer, "correct": correct, "nll": nll.sum().item(), "tokens": len(nll)})
        if before is not None:
            of_text, of_answers = sum_counts(before), sum_counts(report(model), before=before)
            counts = {name: of_text[name] for name in ("density", "mean_keys", "rows", "dense_rows")}
            counts["answer_density"] = of_answers["density"]
    return {"answers": answers, **counts, "seconds": round(time.perf_counter() - start, 3)}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    methods: Methods,
    results: ResultFile,
    about: Record,
) -> list[Record]:
    """Ask for the codes of every prompt (`make_prompts`) under every method, as `measure_each` does.

    The model is patched for each sparse measurement, and restored.
    """
    return measure_each(
        COMMAND, prompts, methods, results, about, lambda each, name: measure(model, tokenizer, each, methods[name])
    )
