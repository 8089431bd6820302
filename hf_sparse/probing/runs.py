"""What a small model gives for texts: in one pass, padded and alone, token by token, and in `generate`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import hf_sparse
from hf_sparse.cache import given_cache
from hf_sparse.patching.caches import cache_argument
from hf_sparse.probing.models import positions, text

SHORT, LENGTH, LONG = 31, 48, 150
"""Tokens of the texts that probes read. The longest one has more than two groups of queries that share keys."""


def texts(seed: int, first: int, second: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """A batch of two texts, padded on one side to the length of the first: tokens and mask `(2, first)`."""
    ids, mask = torch.zeros(2, first, dtype=torch.long), torch.zeros(2, first, dtype=torch.long)
    for row, length in enumerate((first, second)):
        place = slice(first - length, first) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = text(length, seed=2 * seed + row), 1
    return ids, mask


def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits `(batch, length, vocabulary)` of one pass without a cache; those of padding are 0."""
    out: Any = model(input_ids=ids, attention_mask=mask, use_cache=False, **placed(model, positions(mask)))
    found: Tensor = out.logits.float()
    return found * mask[:, :, None]


def placed(model: PreTrainedModel, place: Tensor) -> dict[str, Tensor]:
    """Position ids, if `model` takes any."""
    known = inspect.signature(type(model).forward).parameters
    return {"position_ids": place} if "position_ids" in known else {}


def alone(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of each text without its padding, one text after the other."""
    rows = [row[real][None] for row, real in zip(ids, mask.bool(), strict=True)]
    return torch.cat([logits(model, row, torch.ones_like(row))[0] for row in rows])


def stepped(model: PreTrainedModel, ids: Tensor, stops: Sequence[int]) -> Tensor:
    """Logits of tokens read behind a cache, up to each of `stops` in turn."""
    found, start = [], 0
    past: Any = None
    if getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        past = (hf_sparse.SparseCache if hf_sparse.is_patched(model) else DynamicCache)(config=model.config)
    for stop in stops:
        mask = torch.ones_like(ids[:, :stop])
        out: Any = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask,
            use_cache=True,
            **cache_argument(model, past),
            **placed(model, positions(mask)[:, start:]),
        )
        past, start = given_cache(out) if past is None else past, stop
        found.append(out.logits.float())
    return torch.cat(found, dim=1)


def generated(model: PreTrainedModel, seed: int, **kwargs: Any) -> Tensor:
    """Logits of tokens that `generate` adds to a padded batch."""
    ids, mask = texts(seed, LENGTH, SHORT, "left")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    out: Any = model.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options, **kwargs
    )
    return torch.stack(out.logits).float()


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the standard deviation of `theirs`; infinite if something is not finite."""
    if not bool(ours.isfinite().all() and theirs.isfinite().all()):
        return math.inf
    return float((ours - theirs).abs().max() / theirs.std())
