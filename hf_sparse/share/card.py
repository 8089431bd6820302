"""The model card: our section and metadata, written into a card that may hold other things too."""

from __future__ import annotations

import re
from collections.abc import Sequence

import yaml
from huggingface_hub import EvalResult, ModelCard

from hf_sparse.config import Policy
from hf_sparse.errors import UserError
from hf_sparse.schema import DENSE
from hf_sparse.share.card_text import BEGIN, END, section
from hf_sparse.share.measured import DECODED

TAGS = ("sparse-attention", "long-context", "transformers")
_LIBRARY = "hf-sparse"
_TASK = "text-generation"
_ARGUMENTS = ("method", "low", "high", "density")
_METRICS = {
    "perplexity_ratio": "perplexity, sparse / dense",
    "perplexity": "perplexity",
    f"{DECODED}perplexity_ratio": "perplexity in decoding, sparse / dense",
    f"{DECODED}perplexity": "perplexity in decoding",
}


def parse_card(text: str | None, name: str) -> ModelCard:
    """A card to edit, or a new one.

    Args:
        text: What the card holds; `None` for a new one.
        name: The repository, or the folder, that it lies in.

    Raises:
        UserError: if its metadata cannot be read, or our section in it has no beginning or end.
    """
    card = _parse(text if text is not None else f"\n# {name.rpartition('/')[2]}\n", name)
    marks: list[str] = re.findall(f"{BEGIN}|{END}", card.text)
    if marks not in ([], [BEGIN, END]):
        raise UserError(
            f"README.md of {name} must hold {BEGIN!r} and then {END!r}, each once, around the section that is written "
            f"anew, or neither of them; it holds them {marks.count(BEGIN)} and {marks.count(END)} times"
        )
    return card


def make_card(
    card: ModelCard, policy: Policy, name: str, *, plots: Sequence[str] = (), license: str | None = None
) -> str:
    """The text of a model card: `card` with our section and metadata; what is not ours stays as it is.

    Args:
        card: From `parse_card`; changed in place.
        policy: What it is about; all figures are from its quality records.
        name: What `from_pretrained` is to be given: the repository, or the name of the folder.
        plots: Paths of images beside the card.
        license: Licence of the base model; an existing card's own goes before it.
    """
    data = card.data
    data["license"] = license = data.get("license") or license
    ours = section(policy, name, plots, license)
    if BEGIN in card.text:
        before, _, rest = card.text.partition(BEGIN)
        card.text = before + ours.rstrip("\n") + rest.partition(END)[2]
    else:
        card.text = card.text.rstrip("\n") + "\n\n" + ours
    if policy.base.is_on_hub:
        data["base_model"] = policy.base_model
    data["library_name"] = data.get("library_name") or _LIBRARY
    data["pipeline_tag"] = data.get("pipeline_tag") or _TASK
    tags = data.get("tags") or []
    data["tags"] = [*tags, *(tag for tag in TAGS if tag not in tags)]
    others = [result for result in data.get("eval_results") or [] if not _is_ours(result)]
    results = others + _eval_results(policy)
    data["eval_results"] = results or None
    data["model_name"] = (data.get("model_name") if others else name.rpartition("/")[2]) if results else None
    text = str(card)
    ModelCard(text)  # what we wrote can be read again
    return text


def license_in(card: str) -> str | None:
    """The licence that a card names, or `None`."""
    try:
        value = _parse(card, "the base model").data.get("license")
    except UserError:
        return None
    return value if isinstance(value, str) else None


def _parse(text: str, name: str) -> ModelCard:
    try:
        # Without a block of metadata, an empty one: huggingface_hub would complain on stderr.
        return ModelCard(text if text.lstrip().startswith("---") else f"---\n{{}}\n---\n{text}")
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(
            f"the metadata of the model card, README.md of {name}, cannot be read: {first}; correct its first lines"
        ) from error


def _eval_results(policy: Policy) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=_TASK,
            dataset_type="text",
            dataset_name=", ".join(record.documents) or "text",
            metric_type=record.metric,
            metric_name=f"{_METRICS[record.metric]} at {record.length:,} tokens"
            + (", dense" if record.method == DENSE else ""),
            metric_value=round(record.value, 6),
            metric_args={"context_length": record.length}
            | {name: value for name in _ARGUMENTS if (value := getattr(record, name)) is not None},
        )
        for record in sorted(policy.quality, key=lambda record: not record.metric.startswith(DECODED))
        if record.metric in _METRICS
    ]


def _is_ours(result: EvalResult) -> bool:
    arguments = result.metric_args
    return (
        result.metric_type in _METRICS
        and isinstance(arguments, dict)
        and {"context_length", "method"} <= set(arguments)
    )
