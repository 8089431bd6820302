"""The texts of a calibration: which are fitted, which are held out, and how many tokens of them are used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_sparse.calibration.target import Target
from hf_sparse.errors import UserError
from hf_sparse.measure.data import Document
from hf_sparse.patching import SupportReport
from hf_sparse.schema import shown

LONGEST = 8192
"""Most tokens of each text that are used by default."""

SHORTEST = 512
"""Visible keys below which no law is fitted; texts have twice as many tokens."""


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
    # A str is an iterable of str too.
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise TypeError(f"{kind}s must be a list of texts; got {shown(texts)}")
    out = []
    for i, text in enumerate(texts):
        if not isinstance(text, str | Document):
            raise TypeError(f"each {kind} must be a str or a Document; got {shown(text)}")
        out.append(Document(f"{kind} {i + 1}", text) if isinstance(text, str) else text)
    return out


def fitted_length(
    target: Target,
    length: int | None,
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    support: SupportReport,
    *,
    extrapolate: bool,
) -> int:
    """Tokens of each text that laws are fitted to: `length`, or as many as all texts and the model have.

    Raises:
        UserError: (a `ValueError`) if that is too few or too many, or the target lies beyond it and `extrapolate` is
            not set.
    """
    least, most = 2 * SHORTEST, _most_tokens(model, support)
    if most < least:
        raise UserError(f"laws are fitted to {least} tokens or more, above the maximum of this model, {most}")
    if length is None:
        length = min(LONGEST, most, _fewest_tokens(documents, tokenizer, least) - 1)
    if length < least:
        raise UserError(f"length: laws are fitted to at least {least} tokens; got {length}")
    at = target.length or length
    for what, tokens in ((f"length {length}", length), (f"the target {target}", at)):
        if tokens > most:
            raise UserError(
                f"{what} is above the maximum of this model, {most} tokens: no query sees more keys than are in its "
                "longest input, or its sliding window"
            )
    if at > length and not extrapolate:
        raise UserError(
            f"the target {target} lies at {at / length:.3g} times the {length} tokens that laws are fitted to: give "
            "longer texts, or ask for extrapolation, for laws that were not measured there"
        )
    return length


def _fewest_tokens(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, least: int) -> int:
    """Tokens of the shortest text; more than `least`, to have one to predict."""
    tokens = [len(tokenizer(d.text, add_special_tokens=False, verbose=False)["input_ids"]) for d in documents]
    fewest = min(tokens)
    if fewest <= least:
        raise UserError(
            f"{documents[tokens.index(fewest)].name} is too short: it has {fewest} tokens, and {least + 1} are needed"
        )
    return fewest


def _most_tokens(model: PreTrainedModel, support: SupportReport) -> int:
    """The model's maximum of tokens, or its sliding window where all layers have one: visible keys grow up to that."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST
    windows = [layer.sliding_window or limit for layer in support.layers if layer.layer not in support.sliding_layers]
    return min(limit, *windows)
