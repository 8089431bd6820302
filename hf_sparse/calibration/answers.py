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


def answered(records: Sequence[Record]) -> list[bool]:
    """Whether the dense model picks each true answer among wrong ones.

    Args:
        records: Of `hf_sparse.measure.retrieval.evaluate`, of the dense model among others.

    Raises:
        UserError: if it picks none.
    """
    found = _picked([record for record in records if record["method"] == DENSE])
    if not any(found):
        raise UserError(
            f"the dense model picks none of {len(found)} answers ({', '.join(TASKS)}): a retrieval_loss needs a model "
            "that retrieves"
        )
    return found


def lost_share(records: Sequence[Record]) -> float:
    """Of the answers that the dense model picks, the share that another method does not.

    Args:
        records: As for `answered`, of the dense model and one other method.

    Raises:
        UserError: see `answered`.
    """
    dense, sparse = answered(records), _picked([record for record in records if record["method"] != DENSE])
    return sum(own and not other for own, other in zip(dense, sparse, strict=True)) / sum(dense)


def _picked(records: Sequence[Record]) -> list[bool]:
    """Of all answers, in the order of the prompts' hashes."""
    ordered = sorted(records, key=lambda record: str(record["prompt_sha256"]))
    return [bool(answer["picked"]) for record in ordered for answer in record["answers"]]
