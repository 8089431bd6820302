"""Mask functions that forget something, to prove that tests and probes notice."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_sparse.visibility import interval_mask


def blind_to_padding(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    return interval_mask(**kwargs)


def blind_to_windows(mask_function: Any = None, **kwargs: Any) -> Tensor:
    return interval_mask(**kwargs)


def blind_to_offsets(q_offset: Any = 0, **kwargs: Any) -> Tensor:
    return interval_mask(**kwargs)
