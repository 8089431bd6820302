"""The configuration objects of a patched model: copies of its own, which name our attention implementation.

Other models may share the originals, and are to stay dense.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_sparse.attention import NAME
from hf_sparse.patching.support import attention_modules

# The internal attribute: the property's setter would also change sub-configurations (vision towers).
_IMPLEMENTATION = "_attn_implementation_internal"


@dataclass(frozen=True)
class _Own:
    """A configuration of the model, the copy in its place, and what the copy said at first."""

    original: PreTrainedConfig
    copy: PreTrainedConfig
    first: dict[str, Any]

    def hand_back(self) -> None:
        """What was changed while the model was patched (`resize_token_embeddings` does so) stays changed."""
        for name, value in vars(self.copy).items():
            # Configurations are handed back by themselves; those whose layers differ refuse to be compared.
            if name == _IMPLEMENTATION or isinstance(value, PreTrainedConfig):
                continue
            if name not in self.first or self.first[name] != value:
                vars(self.original)[name] = value


class OwnConfigs:
    """Copies of all configuration objects that the modules of `model` hold. Nothing is changed before `put_in`."""

    def __init__(self, model: PreTrainedModel) -> None:
        # One memo for all: a configuration inside another stays the very object that modules hold themselves.
        memo: dict[int, Any] = {}
        originals = {id(value): value for _, _, value in _bound(model)}
        copies = {key: copy.deepcopy(value, memo) for key, value in originals.items()}
        self._all = [_Own(originals[key], new, copy.deepcopy(vars(new))) for key, new in copies.items()]

    def put_in(self, model: PreTrainedModel) -> None:
        """Put the copies in the places of the originals, and make them ask for our implementation."""
        copies = {id(own.original): own.copy for own in self._all}
        for module, name, value in _bound(model):
            if (copied := copies.get(id(value))) is not None:
                setattr(module, name, copied)
        self.name_us(model)

    def name_us(self, model: PreTrainedModel) -> None:
        """Make the attention modules of `model` ask for our implementation."""
        for _, module in attention_modules(model):
            setattr(module.config, _IMPLEMENTATION, NAME)

    def put_back(self, model: PreTrainedModel) -> None:
        """Put the originals back, with what was changed in the copies, but for the attention implementation."""
        by_copy = {id(own.copy): own for own in self._all}
        for module, name, value in _bound(model):
            if own := by_copy.get(id(value)):
                setattr(module, name, own.original)
        for own in self._all:
            own.hand_back()


def asked_for(model: PreTrainedModel) -> set[str]:
    """The implementations that the attention modules of `model` ask for."""
    return {str(getattr(module.config, _IMPLEMENTATION)) for _, module in attention_modules(model)}


def _bound(model: PreTrainedModel) -> list[tuple[Any, str, PreTrainedConfig]]:
    return [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, PreTrainedConfig)
    ]
