"""Prompts of retrieval tasks: facts inserted into a text at given depths, an exact number of tokens in all."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_sparse.errors import UserError
from hf_sparse.measure.retrieval_tasks import MAX_QUESTIONS, OF_WORDS, TASKS, Asked, Made
from hf_sparse.measure.windows import Window, common_start
from hf_sparse.results import Record

MODES = ("prefill", "decode")
"""How a question is read: in one pass with the end of the text, or token by token."""

# Stands for the text while a chat template is filled in.
_PLACE = "(text)"
# Tokens that a fact may be moved towards the start of the text, to stand between two sentences.
_MOST_MOVED = 64
_WORD = re.compile(r"[^\W\d_]{4,8}")


@dataclass(frozen=True)
class Question:
    """How a model is asked for something that a text says.

    Attributes:
        depth: See `Asked`, as for `parts`.
        parts: What the true answer consists of.
        input_ids: int64 `(length,)`: what follows the text, up to the answer.
        candidates: int64 `(tokens,)` each: answers as the tokenizer continues `input_ids` with them, the true one
            first.
    """

    depth: float | None
    parts: tuple[str, ...]
    input_ids: Tensor
    candidates: Sequence[Tensor]


@dataclass(frozen=True)
class Prompt:
    """A text, the questions of one task about it, and how they are read.

    Attributes:
        window: Where the text comes from.
        task: Name of the task.
        input_ids: int64 `(length,)`: the text with its facts, and what a chat template puts before it.
        questions: All questions.
        modes: Some of `MODES`.
    """

    window: Window
    task: str
    input_ids: Tensor
    questions: Sequence[Question]
    modes: Sequence[str]

    @property
    def length(self) -> int:
        """Tokens of the text with the longest question and its longest answer."""
        return self.window.length

    def about(self) -> Record:
        """What records say of the prompt."""
        about = {"task": self.task, "modes": list(self.modes), "prompt_sha256": self._digest().hexdigest()[:16]}
        return {**self.window.about(), **about}

    @property
    def sha256(self) -> str:
        """Hash of all tokens, of the text, the questions and the answers, and of the modes."""
        digest = self._digest()
        digest.update(repr((self.task, *self.modes)).encode())
        return digest.hexdigest()[:16]

    def _digest(self) -> hashlib._Hash:
        digest = hashlib.sha256(self.input_ids.numpy().tobytes())
        for question in self.questions:
            for mark, ids in ((b"?", question.input_ids), *((b"!", answer) for answer in question.candidates)):
                digest.update(mark + ids.numpy().tobytes())
        return digest


def make_prompts(
    windows: Sequence[Window],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    questions: int,
    seed: int,
    modes: Sequence[str] = MODES,
) -> list[Prompt]:
    """The prompts of every task for every window.

    Questions and facts are the same at every length of a document. The text is cut at its start so that prompt,
    question and answer are as long as the window. With a chat template, text and question are a message of the user,
    and the answer is begun for the assistant.

    Args:
        windows: Texts at every length; their targets are not used.
        tokenizer: The model's tokenizer.
        tasks: Some of `TASKS`.
        questions: Of each task about a text, at most `MAX_QUESTIONS`.
        seed: Of everything random.
        modes: Some of `MODES`.

    Raises:
        UserError: for an unknown task or mode or a number out of range, if a window is too short for its facts and
            questions, or if a text has too few words.
    """
    _check("tasks", tasks, list(TASKS))
    _check("modes", modes, MODES)
    if not 1 <= questions <= MAX_QUESTIONS:
        raise UserError(f"questions must be between 1 and {MAX_QUESTIONS}; got {questions}")
    longest = {window.text_sha256: window for window in sorted(windows, key=lambda window: window.length)}
    words = {text: _words(tokenizer, window) for text, window in longest.items()}
    return [
        _prompt(window, tokenizer, task, words[window.text_sha256], questions, seed, modes)
        for window in windows
        for task in tasks
    ]


def _check(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known or names.count(name) > 1:
            raise UserError(f"{what} must be among {', '.join(known)}, each given once; got {name!r}")


def _prompt(
    window: Window,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    words: Sequence[str],
    count: int,
    seed: int,
    modes: Sequence[str],
) -> Prompt:
    if task in OF_WORDS and len(words) < OF_WORDS[task]:
        raise UserError(
            f"{window.document} has {len(words)} different words that {task} can use in its longest window; it takes "
            f"{OF_WORDS[task]}, of 4 to 8 letters and the usual number of tokens"
        )
    rng = random.Random(f"{seed} {window.text_sha256} {task}")
    made = TASKS[task](rng, count, words)
    before, after = _surroundings(tokenizer)
    questions = [_question(tokenizer, asked, after) for asked in made.asked]
    facts = [(depth, _ids(tokenizer, fact)) for depth, fact in made.facts]
    longest = max(len(each.input_ids) + max(map(len, each.candidates)) for each in questions)
    room = window.length - len(before) - longest - sum(len(fact) for _, fact in facts)
    if room < len(facts) + 1:
        raise UserError(
            f"length {window.length} is too short for {task}: facts and the longest question take "
            f"{window.length - room} tokens; take a longer one, or fewer --questions"
        )
    text = _shuffled(tokenizer, made, room, rng) if made.deck else window.input_ids.tolist()
    text = text[len(text) - room :]
    ids = before + _inserted(tokenizer, text, facts)
    return Prompt(window, task, torch.tensor(ids), questions, modes)


def _shuffled(tokenizer: PreTrainedTokenizerBase, made: Made, room: int, rng: random.Random) -> list[int]:
    """At least `room` tokens of the words of a deck, which is shuffled each time that it is used up."""
    ids = {word: _ids(tokenizer, f" {word}") for word in made.deck}
    out: list[int] = []
    while len(out) < room:
        out += [token for word in rng.sample(made.deck, len(made.deck)) for token in ids[word]]
    return out


def _inserted(
    tokenizer: PreTrainedTokenizerBase, text: Sequence[int], facts: Sequence[tuple[float, list[int]]]
) -> list[int]:
    """The text with its facts, each after a sentence that ends near its depth, if one does."""
    ends = {token for token in set(text) if str(tokenizer.decode([token])).endswith((".", "!", "?", "\n"))}
    out: list[int] = []
    start = 0
    for depth, fact in facts:
        wanted = round(depth * len(text))
        nearest = range(wanted, max(start, wanted - _MOST_MOVED), -1)
        stop = next((i for i in nearest if text[i - 1] in ends), wanted)
        out += [*text[start:stop], *fact]
        start = stop
    return [*out, *text[start:]]


def _words(tokenizer: PreTrainedTokenizerBase, window: Window) -> list[str]:
    """Words of the text, all of as many tokens as most of them, so that no answer is likelier for being shorter."""
    found = dict.fromkeys(_WORD.findall(str(tokenizer.decode(window.input_ids.tolist())).lower()))
    size = {word: len(_ids(tokenizer, f" {word}")) for word in found}
    usual = Counter(size.values()).most_common(1)[0][0] if size else 0
    return [word for word in found if size[word] == usual]


def _surroundings(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """Tokens before the text, and what stands between a question and the beginning of its answer."""
    if not tokenizer.chat_template:
        return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], "\n\n"
    message = [{"role": "user", "content": _PLACE}]
    filled = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    before, _, after = filled.partition(_PLACE)
    return _ids(tokenizer, before), after


def _question(tokenizer: PreTrainedTokenizerBase, asked: Asked, after: str) -> Question:
    begun = asked.question + after + asked.begun
    without, *whole = (_ids(tokenizer, begun + answer) for answer in ("", *asked.answers))
    # A tokenizer may join the last word and the space after it: the answer begins where the tokens part.
    same = common_start(without, *whole)
    return Question(asked.depth, asked.parts, torch.tensor(without[:same]), [torch.tensor(ids[same:]) for ids in whole])


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
