"""The texts of a calibration: which are fitted, which are held out, and how long an input they give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_sparse.checks import shown
from hf_sparse.errors import UserError
from hf_sparse.measure.data import Document
from hf_sparse.support import SupportReport

LONGEST = 8192
"""Tokens of each text that are used, if not said otherwise and the texts have them."""


def split(
    texts: Sequence[str | Document], held_out: Sequence[str | Document] | None
) -> tuple[list[Document], list[Document]]:
    """Documents to fit laws to, and to check them on: `held_out`, or the last quarter of `texts`, one at least.

    Raises:
        UserError: (a `ValueError`) if there are too few, or some are the same or share a name.
        TypeError: if these are not lists of texts.
    """
    documents = _documents(texts, "text")
    if held_out is None:
        count = max(1, len(documents) // 4)
        documents, checked = documents[:-count], documents[-count:]
    else:
        checked = _documents(held_out, "held-out text")
    if len(documents) < 2 or not checked:
        raise UserError(
            f"calibration takes two texts to fit laws to and one more to check them on; got {len(documents)} and "
            f"{len(checked)}"
        )
    names: dict[str, str] = {}
    for document in (*documents, *checked):
        if document.sha256 in names:
            raise UserError(f"{document.name} and {names[document.sha256]} are the same text: calibration needs others")
        if document.name in names.values():
            raise UserError(f"two texts have the name {document.name}: give each a name of its own")
        names[document.sha256] = document.name
    return documents, checked


def _documents(texts: Sequence[str | Document], kind: str) -> list[Document]:
    # The characters of a text would do for texts.
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise TypeError(f"{kind}s must be a list of texts; got {shown(texts)}")
    out = []
    for i, text in enumerate(texts):
        if not isinstance(text, str | Document):
            raise TypeError(f"each {kind} must be a str or a Document; got {shown(text)}")
        out.append(Document(f"{kind} {i + 1}", text) if isinstance(text, str) else text)
    return out


def longest_input(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    support: SupportReport,
    least: int,
) -> int:
    """The longest input, in tokens, that all texts and the model have, up to `LONGEST`.

    Raises:
        UserError: naming a text that has less than `least`, and one token to predict.
    """
    tokens = [len(tokenizer(d.text, add_special_tokens=False, verbose=False)["input_ids"]) for d in documents]
    fewest = min(tokens)
    if fewest <= least:
        raise UserError(
            f"{documents[tokens.index(fewest)].name} is too short: it has {fewest} tokens, and {least + 1} are needed"
        )
    return min(LONGEST, most_tokens(model, support), fewest - 1)


def most_tokens(model: PreTrainedModel, support: SupportReport) -> int:
    """Tokens up to which an input gives rows that see more and more keys.

    That is as many as the model was made for, and where all layers have sliding windows as many as these.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST
    windows = [layer.sliding_window or limit for layer in support.layers if layer.layer not in support.sliding_layers]
    return min(limit, *windows)
