"""What a small model's attention does at run time: is the reason for which it cannot be patched the true one?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hf_sparse.attention import HARMLESS, HONOURED
from hf_sparse.patching import SupportReport, attention_modules
from hf_sparse.probing.models import text

_LENGTH = 40


@dataclass
class Evidence:
    """What a pass over a text showed.

    Attributes:
        calls: Attention calls that went through transformers' interface.
        arguments: Arguments of these calls, not `None`, that a patch does not honour.
        other_masks: Calls with another mask than those made through transformers' mask interface.
        two_way: Classes of attention modules that are not causal, whether they ran or not.
        failure: Why the pass ended early, if it did.
    """

    calls: int = 0
    arguments: set[str] = field(default_factory=set)
    other_masks: int = 0
    two_way: set[str] = field(default_factory=set)
    failure: str = ""

    def against(self, support: SupportReport) -> str:
        """What speaks against the reasons of a refusal; empty if nothing does."""
        reasons = "; ".join(support.reasons)
        if self.failure:
            return ""
        if "does not go through" in reasons or "has no attention" in reasons:
            return f"{self.calls} attention calls go through the interface" if self.calls else ""
        if "not causal" in reasons:
            return "" if self.two_way else "all of its attention is causal"
        named = any(name in reasons for name in self.arguments)
        if "chooses keys" in reasons:  # Where it cannot say which to the attention that runs, by a mask of its own.
            return "" if named or self.other_masks else "it lets all keys be attended to"
        if "passes" in reasons:
            return "" if named else "it passes nothing of the kind"
        if "changes the mask" in reasons:
            return "" if self.other_masks else "it passes masks on as they were made"
        return "" if "encoder-decoder" in reasons else f"there is no way to check {reasons!r}"


def evidence(model: PreTrainedModel) -> Evidence:
    """Watch the attention of a model, which attends eagerly, in one pass over a text."""
    found = Evidence()
    for _, module in attention_modules(model):
        name = type(module).__name__
        if "Cross" in name or getattr(module, "is_causal", None) is False:
            found.two_way.add(name)
    with torch.no_grad(), _watched(found):
        try:
            model(input_ids=text(_LENGTH)[None])
        except Exception as error:
            found.failure = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


@contextmanager
def _watched(found: Evidence) -> Iterator[None]:
    """Count what goes through the interfaces, and let it do what it does."""
    masks: list[Tensor] = []
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS["eager"]

    def made(*args: Any, **kwargs: Any) -> Any:
        masks.append(make_mask(*args, **kwargs))
        return masks[-1]

    def interface(self: AttentionInterface, name: str, eager: Any) -> Any:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
        ) -> Any:
            found.calls += 1
            unknown = kwargs.keys() - HONOURED - HARMLESS
            found.arguments |= {argument for argument in unknown if kwargs[argument] is not None}
            found.other_masks += attention_mask is not None and not any(attention_mask is mask for mask in masks)
            return eager(module, query, key, value, attention_mask, **kwargs)

        return attend

    mapping = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    with patch.dict(mapping, {"eager": made}), patch.object(AttentionInterface, "get_interface", interface):
        yield
