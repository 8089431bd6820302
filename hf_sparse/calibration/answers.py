"""Answers that a configuration loses: of questions about texts, with something hidden in them, that a model answers."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from hf_sparse.errors import UserError
from hf_sparse.measure.data import Document
from hf_sparse.measure.retrieval_prompts import Prompt, make_prompts
from hf_sparse.measure.retrieval_tasks import MAX_QUESTIONS
from hf_sparse.measure.windows import cut_windows
from hf_sparse.results import DENSE, Record

TASKS = ("needle-single", "needle-multikey", "copying")
"""Tasks that small base models can do, too."""


def ask(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> list[Prompt]:
    """Questions of each task about `length` tokens of every document."""
    return make_prompts(cut_windows(documents, tokenizer, [length], targets=1), tokenizer, TASKS, MAX_QUESTIONS, seed)


def lost_share(records: Sequence[Record]) -> float:
    """Of the answers that the dense model picks among wrong ones, the share that another method does not.

    Args:
        records: Of `hf_sparse.measure.retrieval.evaluate`, of the dense model and one other method.

    Raises:
        UserError: if the dense model picks none.
    """
    picked: dict[bool, list[bool]] = {True: [], False: []}
    for record in sorted(records, key=lambda record: str(record["prompt_sha256"])):
        picked[record["method"] == DENSE] += [answer["picked"] for answer in record["answers"]]
    answered = sum(picked[True])
    if not answered:
        raise UserError(
            f"the dense model picks none of {len(picked[True])} answers ({', '.join(TASKS)}): a retrieval_loss needs a "
            "model that retrieves"
        )
    both = zip(picked[True], picked[False], strict=True)
    return sum(dense and not sparse for dense, sparse in both) / answered
