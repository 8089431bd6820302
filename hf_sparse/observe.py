"""`observed` and `audit`: look at what goes into a model's attention, and how good what comes out of it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from hf_sparse.attention import STATE, Observer
from hf_sparse.audit import LayerAudit
from hf_sparse.checks import check_integer
from hf_sparse.patching import ModelT, base_model, is_patched, patched, states


@contextmanager
def observed(model: ModelT, observer: Observer) -> Iterator[ModelT]:
    """Run `model` dense for the length of a `with` block, and show every attention call to `observer` first.

    Args:
        model: As for `patch`.
        observer: Called as `observer(layer, inputs)` with the layer's index and its `AttentionCall`.
    """
    with patched(model):
        for module, state in states(base_model(model)).items():
            setattr(module, STATE, replace(state, dense="observed", observer=observer))
        yield model


def audit(model: nn.Module, rows: int = 16, seed: int = 0) -> None:
    """Measure some rows of every attention call of a patched model from now on; `hf_sparse.report(model)` shows them.

    Of each call of each sparse layer, `rows` neighbouring rows at a random place are attended to densely as well. The
    model computes what it did before, more slowly. `patch` with another configuration and `unpatch` end the audit, as
    does `rows=0`; a new audit begins with nothing measured.

    Args:
        model: A patched model.
        rows: Rows of a call; 0 to stop.
        seed: Of the places.

    Raises:
        ValueError: If the model is not patched, or `rows` is negative.
    """
    check_integer("rows", rows, least=0)
    base = base_model(model)
    if not is_patched(base):
        raise ValueError(f"{type(base).__name__} is not patched: there is nothing to audit")
    for state in states(base).values():
        state.observer = LayerAudit(state, rows, seed + state.layer) if rows and state.dense is None else None
