"""`observed`: run a model dense, and look at what goes into its attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from hf_sparse.attention import STATE, Observer
from hf_sparse.patching import ModelT, base_model, patched, states


@contextmanager
def observed(model: ModelT, observer: Observer) -> Iterator[ModelT]:
    """Run `model` dense for the length of a `with` block, and show every attention call to `observer` first.

    Args:
        model: As for `patch`.
        observer: Called as `observer(layer, inputs)` with the layer's index and its `AttentionInputs`.
    """
    with patched(model):
        for module, state in states(base_model(model)).items():
            setattr(module, STATE, replace(state, dense="observed", observer=observer))
        yield model
