"""Texts with look-ups: notes hidden in prose, and each repeated later, so that only who looks back can go on."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from hf_sparse.errors import UserError
from hf_sparse.measure.data import Document

# Prose between two notes, in characters, and up to twice as much to a sentence's end: each group of queries of the
# grouped selector sees a note or two.
_APART = 160
# Words of a note, and how many notes may lie between one and its repetition at most.
_WORDS, _BACK = 4, 400
# Different words that a text must have, so that notes cannot be guessed.
_LEAST = 100
_WORD = re.compile(r"\b[^\W\d_]{4,9}\b")
_ENDS = (".", "!", "?")


def with_lookups(documents: Sequence[Document], seed: int) -> list[Document]:
    """Each document with notes in it, a number and words of the text, about half of which repeat an earlier one.

    Notes far back are repeated as often as near ones. What follows a number that was there before can be told only by
    looking it up, which prose hardly asks for.

    Raises:
        UserError: if a document has too few different words.
    """
    return [_noted(document, random.Random(f"{seed} {document.sha256}")) for document in documents]


def _noted(document: Document, rng: random.Random) -> Document:
    words = sorted(set(_WORD.findall(document.text)))
    if len(words) < _LEAST:
        raise UserError(f"{document.name} has {len(words)} different words; look-ups take {_LEAST} of 4 to 9 letters")
    notes: dict[int, str] = {}
    parts: list[str] = []
    start = 0
    for space in re.finditer(r"\s+", document.text):
        apart = space.start() - start
        if apart < _APART or (apart < 2 * _APART and document.text[space.start() - 1] not in _ENDS):
            continue
        parts.append(document.text[start : space.start()])
        start = space.end()
        if notes and rng.random() < 0.5:
            # The logarithm of the distance is even: all distances between one note and `_BACK` count.
            back = round(min(_BACK, len(notes)) ** rng.random())
            number = list(notes)[-back]
        else:
            number = rng.randrange(10_000, 100_000)
            notes[number] = " ".join(rng.sample(words, _WORDS))
        parts.append(f"Entry {number} of the register: {notes[number]}.")
    return Document(f"{document.name}, with look-ups", "\n".join([*parts, document.text[start:]]))
