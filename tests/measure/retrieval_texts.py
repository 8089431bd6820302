"""Texts and a tokenizer for retrieval: words and single characters, enough of them for every task."""

from __future__ import annotations

import random
import re
import string

from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_sparse.measure.retrieval_tasks import MAX_QUESTIONS, NAMES, TASKS
from tests import tiny

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
PATTERN = r" ?[A-Za-z]+|[\s\S]"

WORDS = sorted({"".join(random.Random(i).choices(string.ascii_lowercase, k=5)) for i in range(120)})


def _corpus() -> str:
    """Everything that tasks say."""
    rng = random.Random(0)
    made = [make(rng, MAX_QUESTIONS, WORDS) for make in TASKS.values()]
    said = [text for task in made for _, text in task.facts]
    said += [asked.question + asked.begun for task in made for asked in task.asked]
    return " ".join([*said, *NAMES, *WORDS, "user", "assistant"])


def _vocab() -> dict[str, int]:
    words = set(re.findall(r"[A-Za-z]+", _corpus()))
    known = [*string.ascii_letters, *string.digits, *" .,:?<>\n"]
    known += sorted({form for word in words for form in (word, f" {word}")} - set(known))
    return {"#": 0, **{token: i for i, token in enumerate(known, start=1)}}


VOCAB = _vocab()


def tokenizer(
    template: str | None = None, vocab: dict[str, int] = VOCAB, pattern: str = PATTERN
) -> PreTrainedTokenizerFast:
    """A token for each word with the space before it, and for each other character."""
    inner = Tokenizer(WordLevel(vocab, unk_token="#"))
    inner.pre_tokenizer = Split(Regex(pattern), "isolated")
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="#")  # type: ignore[no-untyped-call]
    made.chat_template = template
    return made


def text(words: int, seed: int = 0) -> str:
    """Sentences of six words, in which all `WORDS` come early."""
    rng = random.Random(seed)
    chosen = rng.sample(WORDS, len(WORDS)) + rng.choices(WORDS, k=words)
    return "".join(f" {word}" + "." * (i % 6 == 5) for i, word in enumerate(chosen[:words]))


def model(name: str = "llama", max_position_embeddings: int = 1024) -> PreTrainedModel:
    """A tiny model with that many tokens."""
    return tiny.model(name, vocab_size=len(VOCAB), max_position_embeddings=max_position_embeddings)
