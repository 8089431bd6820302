"""Retrieval tasks in the manner of RULER (arXiv 2404.06654): what is hidden in a long text, and what is asked about it.

All text is made from a random generator and words of the text itself; nothing is downloaded. Every question has one
true answer and three wrong ones of the same form, and is asked for by beginning the answer, so that models that were
never trained to follow instructions can go on with it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

CANDIDATES = 4
"""Answers to choose from: the true one comes first."""

MAX_QUESTIONS = 8
"""Most questions about a text."""

NAMES = (
    "Amber", "Basil", "Cedar", "Delta", "Ember", "Falcon", "Garnet", "Harbor", "Indigo", "Jasper", "Kernel", "Lemon",
    "Maple", "Nectar", "Olive", "Pepper", "Quartz", "Raven", "Saffron", "Timber", "Umber", "Velvet", "Willow", "Yarrow",
)  # fmt: skip
"""Labels of what is hidden in a text; no two share a first letter."""

_SENTENCES = (
    "The password of the archive is",
    "The locker at the station has the number",
    "The red boat was sold under the licence",
    "The distance to the lighthouse in steps is",
    "The invoice of the carpenter came to",
    "The radio of the expedition sends on channel",
    "The old violin in the museum has the serial number",
    "The greenhouse was insured under the policy",
)
"""What single needles say: a sentence of its own for each."""

# Parts of an answer with several parts; variables that take over a number; words that are copied, and shown before.
_PARTS, _HOPS, _COPIED, _SHOWN = 2, 1, 6, 4
# Fewest numbers of a text, so that there are enough for wrong answers.
_LEAST = _PARTS + CANDIDATES - 1
# How often words occur: common and rare ones, and those of each level of frequency.
_COMMON, _RARE, _TIMES = 8, 60, 6
_LEVELS = ((2, 27), (4, 9), (8, 3), (16, 1))


@dataclass(frozen=True)
class Asked:
    """A question.

    Attributes:
        question: What is asked.
        begun: How the answer begins.
        answers: How it goes on, `CANDIDATES` times: the true answer first. Each begins with a space.
        parts: What the true answer consists of.
        depth: Where in the text it is said, 0 at the start and 1 at the end; `None` if in several places.
    """

    question: str
    begun: str
    answers: tuple[str, ...]
    parts: tuple[str, ...]
    depth: float | None = None


@dataclass(frozen=True)
class Made:
    """A task for one text.

    Attributes:
        asked: Questions.
        facts: What is inserted into the text, and at which depth, from the first to the last.
        deck: Words that are shuffled again and again in the place of the text; none if the text is used.
    """

    asked: Sequence[Asked]
    facts: Sequence[tuple[float, str]] = ()
    deck: Sequence[str] = ()


Maker = Callable[[random.Random, int, Sequence[str]], Made]
"""Makes a task: takes a generator, the number of questions, and words of the text, all different."""


def single(rng: random.Random, count: int, words: Sequence[str]) -> Made:
    """Sentences that have nothing in common, each of which says a number; it is asked how one of them ends."""
    question = "\n\nOne sentence in the text ends with a number. Repeat it."
    return _needles(rng, count, [(begun, question) for begun in _SENTENCES])


def multikey(rng: random.Random, count: int, words: Sequence[str]) -> Made:
    """Codes of different names in the same words: each is asked for among all the others."""
    return _needles(rng, count, [(_begun(name), f"\n\nWhat is the code for {name}?") for name in NAMES])


def _needles(rng: random.Random, count: int, kinds: Sequence[tuple[str, str]]) -> Made:
    """Sentences that end with a number, some of `kinds`: how a sentence begins, and how its number is asked for."""
    numbers = _numbers(rng, count)
    said = list(zip(_depths(count), rng.sample(kinds, count), numbers, strict=False))
    asked = [Asked(question, begun, *_answers(rng, [code], numbers), depth) for depth, (begun, question), code in said]
    return Made(asked, [(depth, f"\n{begun} {code}.\n") for depth, (begun, _), code in said])


def multivalue(rng: random.Random, count: int, words: Sequence[str]) -> Made:
    """Names with several codes each, in different places: all codes of a name are asked for, in their order."""
    names, numbers = rng.sample(NAMES, count), _numbers(rng, _PARTS * count)
    owners = rng.sample([*names] * _PARTS, _PARTS * count)
    said = list(zip(_depths(len(owners)), owners, numbers, strict=False))
    asked = [
        Asked(
            f"\n\nWhat are the {_PARTS} codes for {name}?",
            f"The {_PARTS} codes for {name} are the numbers",
            *_answers(rng, [code for _, owner, code in said if owner == name], numbers),
        )
        for name in names
    ]
    return Made(asked, [(depth, f"\nOne code for {name} is the number {code}.\n") for depth, name, code in said])


def multiquery(rng: random.Random, count: int, words: Sequence[str]) -> Made:
    """Codes of different names, several of which are asked for at once."""
    keys = max(count, _LEAST)
    numbers, names = _numbers(rng, keys), rng.sample(NAMES, keys)
    code = dict(zip(names, numbers, strict=True))
    asked = []
    for i in range(count):
        chosen = [names[(i + j) % keys] for j in range(_PARTS)]
        listed = " and ".join(chosen)
        answers = _answers(rng, [code[name] for name in chosen], numbers)
        asked.append(
            Asked(f"\n\nWhat are the codes for {listed}?", f"The codes for {listed} are the numbers", *answers)
        )
    order = rng.sample(names, keys)
    return Made(
        asked,
        [(depth, f"\n{_begun(name)} {code[name]}.\n") for depth, name in zip(_depths(keys), order, strict=True)],
    )


def variable_tracking(rng: random.Random, count: int, words: Sequence[str]) -> Made:
    """Variables that hold a number, and others that take it over later: the number of the last one is asked for."""
    numbers = _numbers(rng, count)
    names = rng.sample(NAMES, count * (_HOPS + 1))
    chains = [names[i :: len(names) // (_HOPS + 1)] for i in range(count)]
    # Which chain goes on at each place of the text.
    turns = rng.sample([*range(count)] * (_HOPS + 1), count * (_HOPS + 1))
    facts = []
    for i, (depth, turn) in enumerate(zip(_depths(len(turns)), turns, strict=True)):
        step = turns[:i].count(turn)
        value = f"the same number as {chains[turn][step - 1]}" if step else f"the number {numbers[turn]}"
        facts.append((depth, f"\n{chains[turn][step]} has {value}.\n"))
    asked = [
        Asked(
            f"\n\nWhich number has {chain[-1]}?",
            f"{chain[-1]} has the number",
            *_answers(rng, [code], numbers),
        )
        for chain, code in zip(chains, numbers, strict=False)
    ]
    return Made(asked, facts)


def copying(rng: random.Random, count: int, words: Sequence[str]) -> Made:
    """Lists of words without sense: how a list goes on is asked, from its first words."""
    size = _SHOWN + _COPIED
    drawn = rng.sample(words, size * max(count, CANDIDATES))
    notes = [drawn[i : i + size] for i in range(0, len(drawn), size)]
    asked, facts = [], []
    for depth, note in zip(_depths(count), notes, strict=False):
        wrong = rng.sample([other for other in notes if other is not note], CANDIDATES - 1)
        answers = tuple(" " + " ".join(each[_SHOWN:]) for each in (note, *wrong))
        begun = "Note: " + " ".join(note[:_SHOWN])
        asked.append(Asked("\n\nRepeat the whole note.", begun, answers, tuple(note[_SHOWN:]), depth))
        facts.append((depth, f"\nNote: {' '.join(note)}.\n"))
    return Made(asked, facts)


def common_words(rng: random.Random, count: int, words: Sequence[str]) -> Made:
    """A list of words of which a few come again and again: all of these but one are told, and that one is asked for."""
    drawn = rng.sample(words, _COMMON + _RARE)
    common, rare = drawn[:_COMMON], drawn[_COMMON:]
    asked = []
    for word in rng.sample(common, count):
        others = [other for other in common if other != word]
        begun = f"The {_COMMON} words that occur most often are {', '.join(rng.sample(others, len(others)))},"
        asked.append(Asked("\n\nWhich words occur most often in the list?", begun, *_answers(rng, [word], rare)))
    return Made(asked, deck=common * _TIMES + rare)


def frequent_words(rng: random.Random, count: int, words: Sequence[str]) -> Made:
    """A list of words, few of them frequent and many rare: which of four is the most frequent one is asked."""
    drawn = iter(rng.sample(words, sum(number for number, _ in _LEVELS)))
    levels = [([next(drawn) for _ in range(number)], times) for number, times in _LEVELS]
    asked = []
    for _ in range(count):
        four = [rng.choice(level) for level, _ in levels]
        shown = rng.sample(four, len(four))
        question = f"\n\nWhich of the words {', '.join(shown[:-1])} and {shown[-1]} occurs most often in the list?"
        begun = "Of these words, the one that occurs most often is"
        asked.append(Asked(question, begun, *_answers(rng, four[:1], four)))
    return Made(asked, deck=[word for level, times in levels for word in level * times])


TASKS: Mapping[str, Maker] = {
    "needle-single": single,
    "needle-multikey": multikey,
    "needle-multivalue": multivalue,
    "needle-multiquery": multiquery,
    "variable-tracking": variable_tracking,
    "copying": copying,
    "common-words": common_words,
    "frequent-words": frequent_words,
}
"""All tasks, by the names that commands and records use."""

OF_WORDS = {
    "copying": (_SHOWN + _COPIED) * MAX_QUESTIONS,
    "common-words": _COMMON + _RARE,
    "frequent-words": sum(number for number, _ in _LEVELS),
}
"""Tasks that are made of words of the text, and how many different ones they take."""


def _begun(name: str) -> str:
    return f"The code for {name} is the number"


def _depths(count: int) -> list[float]:
    """Even depths from the start of a text to its end."""
    return [i / (count - 1) if count > 1 else 0.5 for i in range(count)]


def _numbers(rng: random.Random, count: int) -> list[str]:
    """Numbers of five digits, all different: as many as are hidden, and enough to choose from."""
    return list(map(str, rng.sample(range(10_000, 100_000), max(count, _LEAST))))


def _answers(
    rng: random.Random, parts: Sequence[str], others: Iterable[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The candidates, and the parts of the true one. In each wrong one, one of `others` takes the place of a part."""
    answers = [list(parts)]
    for other in rng.sample([other for other in others if other not in parts], CANDIDATES - 1):
        place = rng.randrange(len(parts))
        answers.append([*parts[:place], other, *parts[place + 1 :]])
    return tuple(" " + ", ".join(answer) for answer in answers), tuple(parts)
