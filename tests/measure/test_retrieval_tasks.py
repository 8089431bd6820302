"""What retrieval tasks hide in a text, and that the true answer to each question is there."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from hf_sparse.measure.retrieval_tasks import CANDIDATES, MAX_QUESTIONS, TASKS, Made
from tests.measure.retrieval_texts import WORDS

COUNTS = (1, 5, MAX_QUESTIONS)


def make(task: str, count: int = 5, seed: int = 0) -> Made:
    return TASKS[task](random.Random(seed), count, WORDS)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("task", TASKS)
def test_questions_have_one_true_answer_and_wrong_ones_of_its_form(task: str, count: int) -> None:
    made = make(task, count)
    assert len(made.asked) == count
    assert bool(made.facts) != bool(made.deck)
    for asked in made.asked:
        assert len(set(asked.answers)) == CANDIDATES
        assert all(re.findall(r"\w+", answer) for answer in asked.answers)
        assert re.findall(r"\w+", asked.answers[0]) == list(asked.parts)
        assert {answer.startswith(" ") for answer in asked.answers} == {True}
        assert len({len(re.findall(r"\w+", answer)) for answer in asked.answers}) == 1
    depths = [depth for depth, _ in made.facts]
    assert depths == sorted(depths)
    assert made == make(task, count)
    assert made != make(task, count, seed=1)


@pytest.mark.parametrize("task", ["needle-single", "needle-multikey"])
def test_a_needle_says_its_answer_where_it_is_said_to_be(task: str) -> None:
    made = make(task)
    assert [asked.depth for asked in made.asked] == [0, 0.25, 0.5, 0.75, 1]
    for asked, (depth, fact) in zip(made.asked, made.facts, strict=True):
        assert (depth, fact) == (asked.depth, f"\n{asked.begun}{asked.answers[0]}.\n")
        others = "".join(text for _, text in made.facts if text != fact)
        assert all(part not in others for part in asked.parts)
    # Single needles have no words in common, keys differ by their name alone.
    starts = [asked.begun for asked in made.asked]
    assert len(set(starts)) == 5
    assert len({re.sub(r"for \w+", "", begun) for begun in starts}) == (5 if task == "needle-single" else 1)


def test_several_values_are_asked_for_in_their_order() -> None:
    made = make("needle-multivalue")
    for asked in made.asked:
        name = asked.begun.split()[4]
        found = [re.findall(r"\d+", fact)[0] for _, fact in made.facts if f" {name} " in fact]
        assert found == list(asked.parts)
        assert len(found) == 2


@pytest.mark.parametrize("count", COUNTS)
def test_several_codes_are_asked_for_at_once(count: int) -> None:
    made = make("needle-multiquery", count)
    codes = {fact.split()[3]: re.findall(r"\d+", fact)[0] for _, fact in made.facts}
    for asked in made.asked:
        names = re.findall(r"[A-Z]\w+", asked.begun)[1:]
        assert [codes[name] for name in names] == list(asked.parts)
        assert len(names) == 2


@pytest.mark.parametrize("count", COUNTS)
def test_variables_lead_to_their_number(count: int) -> None:
    made = make("variable-tracking", count)
    values: dict[str, str] = {}
    for _, fact in made.facts:  # in the order of the text
        name, value = fact.split()[0], fact.rstrip(".\n").split()[-1]
        values[name] = values.get(value, value)
    assert len(values) == 2 * count
    for asked in made.asked:
        name = asked.begun.split()[0]
        assert values[name] == asked.parts[0]
        assert not any(fact.startswith(f"\n{name}") and asked.parts[0] in fact for _, fact in made.facts)


def test_a_note_goes_on_as_it_did() -> None:
    made = make("copying")
    for asked, (_, fact) in zip(made.asked, made.facts, strict=True):
        assert fact == f"\n{asked.begun}{asked.answers[0]}.\n"


def test_the_common_word_that_is_not_told_is_asked_for() -> None:
    made = make("common-words", MAX_QUESTIONS)
    times = Counter(made.deck)
    common = {word for word, _ in times.most_common(8)}
    assert {times[word] for word in common} == {6}
    assert {times[word] for word in times.keys() - common} == {1}
    for asked in made.asked:
        told = set(re.findall(r"\w+", asked.begun.partition(" are ")[2]))
        assert {asked.parts[0]} == common - told
        assert not {answer.strip() for answer in asked.answers[1:]} & common
    assert len({asked.parts for asked in made.asked}) == MAX_QUESTIONS


def test_the_most_frequent_of_four_words_is_asked_for() -> None:
    made = make("frequent-words")
    times = Counter(made.deck)
    for asked in made.asked:
        words = [answer.strip() for answer in asked.answers]
        assert sorted(words) == sorted(re.findall(r"[a-z]{5}", asked.question.partition("words ")[2])[:4])
        assert sorted((times[word] for word in words), reverse=True) == [27, 9, 3, 1]
        assert times[words[0]] == 27
