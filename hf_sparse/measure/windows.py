"""The windows of tokens that are evaluated: the same target tokens at every length, with more or less before them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_sparse.errors import UserError
from hf_sparse.measure.data import Document
from hf_sparse.results import Record


@dataclass(frozen=True)
class Window:
    """One input of the model, and the tokens that its last positions should predict.

    Attributes:
        document: Name of the document.
        text_sha256: SHA-256 of the document's text.
        input_ids: int64 `(length,)`.
        targets: int64 `(targets,)`: position `length - targets + i` predicts `targets[i]`.
    """

    document: str
    text_sha256: str
    input_ids: Tensor
    targets: Tensor

    @property
    def length(self) -> int:
        """Input tokens."""
        return len(self.input_ids)

    def about(self) -> Record:
        """What records say of the window."""
        return {
            "length": self.length,
            "document": self.document,
            "text_sha256": self.text_sha256,
            "window_sha256": self.sha256,
        }

    @property
    def sha256(self) -> str:
        """Hash of the tokens: it stands for the text, the place in it, the tokenizer and the protocol at once."""
        digest = hashlib.sha256(f"{len(self.input_ids)} {len(self.targets)}".encode())
        digest.update(self.input_ids.numpy().tobytes() + self.targets.numpy().tobytes())
        return digest.hexdigest()[:16]


def cut_windows(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    targets: int,
    offset: int = 0,
) -> list[Window]:
    """One window per document and length.

    All windows of a document end at its token `offset + max(lengths) + 1`, so that the last `targets` tokens are
    predicted at every length and only the context to their left grows. If the tokenizer has a beginning-of-sequence
    token, every window starts with it, once, in the place of one token of context: a window begins in mid-text, and
    models need a first token to attend to that means nothing.

    Args:
        documents: Texts.
        tokenizer: The model's tokenizer.
        lengths: Input tokens of the windows, the beginning-of-sequence token included.
        targets: Predicted tokens, at most `min(lengths)`.
        offset: Tokens of each document to leave out before the longest window.

    Raises:
        UserError: if a document is too short.
    """
    out = []
    end = offset + max(lengths) + 1
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for document in documents:
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < end:
            raise UserError(
                f"{document.name} is too short: it has {len(ids)} tokens, and {end} are needed (offset {offset} + "
                f"longest length {max(lengths)} + 1)"
            )
        for length in lengths:
            context = torch.tensor(bos + ids[end - 1 - length + len(bos) : end - 1])
            out.append(Window(document.name, document.sha256, context, torch.tensor(ids[end - targets : end])))
    return out


def check_lengths(lengths: Sequence[int], targets: int, max_positions: int | None) -> None:
    """Refuse lengths that do not rise, are too short for the targets or too long for the model (`None`: unknown)."""
    if not lengths or min(lengths) < 2:
        raise UserError(f"lengths must be whole numbers of tokens, 2 or more; got {_listed(lengths)}")
    if list(lengths) != sorted(set(lengths)):
        raise UserError(f"lengths must rise, each given once; got {_listed(lengths)}")
    if not 1 <= targets <= lengths[0]:
        raise UserError(f"targets must be between 1 and the shortest length ({lengths[0]}); got {targets}")
    if max_positions is not None and lengths[-1] > max_positions:
        raise UserError(f"length {lengths[-1]} is above the model's maximum of {max_positions} tokens")


def _listed(lengths: Sequence[int]) -> str:
    return ",".join(map(str, lengths)) or "none"


def common_start(*texts: Sequence[int]) -> int:
    """How many tokens at their start all texts share."""
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*texts, strict=False)))
