"""What transformers' models call: the attention and the mask function of a patched model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from hf_sparse import compiled
from hf_sparse.attention import NAME, REFUSED, STATE, LayerState, attend_under
from hf_sparse.cache import written_layer
from hf_sparse.visibility import interval_mask


def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the signature that transformers' models call.

    Args:
        module: The attention module; patched, so that it has a `LayerState`.
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, kv_heads, kv_len, head_dim)`.
        value: `(batch, kv_heads, kv_len, value_dim)`.
        attention_mask: From `interval_mask`, or a user's own 4-D mask.
        scaling: Factor of the scores; 1 / sqrt(head_dim) if `None`.
        dropout: Probability of dropping a weight.
        softcap: Soft cap of the scores.
        s_aux: `(heads,)` attention-sink logits.
        **kwargs: What else models pass. `output_attentions=True` returns the weights, at n x n cost.

    Returns:
        `(batch, q_len, heads, value_dim)`, and the weights `(batch, heads, q_len, kv_len)` or `None`.

    Raises:
        RuntimeError: If the module was not patched, or no mask reached it.
        ValueError: For an argument in `REFUSED`, and under `torch.jit.trace`.
    """
    state, mask = _checked(module, attention_mask, kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dropout = dropout if module.training else 0.0
    want_weights = bool(kwargs.get("output_attentions"))
    parts = (mask, state, query, key, value)
    options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": s_aux}
    options |= {"dropout": dropout, "want_weights": want_weights}
    if torch.compiler.is_compiling():
        held = written_layer()
        if not (dropout or want_weights):
            layer, kind = None if held is None else held.handle, query.device.type
            autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            numbers = (scaling, softcap, autocast, state.handle)
            return compiled.attend(query, key, value, mask, s_aux, *numbers, layer), None
        quantised = None if held is None else held.quantised
        out, weights = _out_of_the_graph(*parts, **options, quantised=quantised, held=held)
        return out, weights
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        # What is kept would be written down once and for all.
        raise ValueError(
            f"torch.jit.trace cannot follow which keys {type(module).__name__} keeps (layer {state.layer}): use "
            "torch.compile or torch.export, or unpatch the model"
        )
    return attend_under(*parts, **options)


_out_of_the_graph = torch.compiler.disable(attend_under)  # type: ignore[no-untyped-call]
"""The same as a compiled model calls it, which leaves its graph for it."""


def _checked(module: nn.Module, mask: Tensor | None, kwargs: dict[str, Any]) -> tuple[LayerState, Tensor]:
    """What a patched module knows, and its mask; refused where attention would not be what the model asks for."""
    state: LayerState | None = getattr(module, STATE, None)
    if state is None:
        raise RuntimeError(
            f"{type(module).__name__} uses the attention implementation {NAME!r} without having been patched: "
            "load the model as usual and call hf_sparse.patch(model)"
        )
    for name, value in kwargs.items():
        if name in REFUSED and value is not None:
            raise ValueError(f"{type(module).__name__} passes {name!r} to its attention, which hf_sparse cannot honour")
    if mask is None:
        raise RuntimeError(
            f"no mask reached {type(module).__name__} (layer {state.layer}): without it, causality and padding would "
            "be lost. The model does not build its masks through transformers' mask interface, or the mask function "
            f"{NAME!r} is no longer registered"
        )
    return state, mask


def register() -> None:
    """Make the attention and the mask function known to transformers."""
    AttentionInterface.register(NAME, sparse_attention_forward)
    AttentionMaskInterface.register(NAME, interval_mask)
