"""Attention of a patched layer as an operator of PyTorch, which `torch.compile` and `torch.export` keep as it is.

Which keys a query keeps, and so the work, depends on numbers: what a compiler cannot look through. It sees one
operation from queries, keys and values to outputs, and makes one graph of the model around it. The layer is named by a
number (`LayerState.handle`), and so is the layer of the cache, so that what is counted and kept is so when the graph
runs, and not when it is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_sparse.attention import attend_under, state_of
from hf_sparse.cache import layer_of
from hf_sparse.kernels.quantised import QuantisedKeys
from hf_sparse.monitor import LayerCounters

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor mask, Tensor? sinks, float scaling, float? softcap, "
    "ScalarType? autocast, SymInt state"
)


@torch.library.custom_op(
    "hf_sparse::attend",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor? layer) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    sinks: Tensor | None,
    scaling: float,
    softcap: float | None,
    autocast: torch.dtype | None,
    state: int,
    layer: Tensor | None,
) -> Tensor:
    """`attend_under` without dropout and weights: `(batch, q_len, heads, value_dim)` in the dtype of the values.

    Args:
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, kv_heads, kv_len, head_dim)`.
        value: `(batch, kv_heads, kv_len, value_dim)`.
        mask: From `interval_mask`, or a user's own 4-D mask.
        sinks: `(heads,)` logits of attention sinks.
        scaling: Factor of the scores.
        softcap: Soft cap of the scores.
        autocast: The dtype of autocast, where the model runs in it.
        state: The layer's handle.
        layer: The handle of the cache layer that holds the keys, if it grows in place.
    """
    held = None if layer is None else layer_of(int(layer))
    quantised = QuantisedKeys() if held is None else held.quantised
    sinks = None if sinks is None else sinks.detach()
    with torch.no_grad(), _autocast(query, autocast):
        out, _ = attend_under(
            mask,
            state_of(state),
            query.detach(),
            key.detach(),
            value.detach(),
            scaling=scaling,
            softcap=softcap,
            sinks=sinks,
            quantised=quantised,
            held=held,
        )
    return out.to(value.dtype)


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    batch, heads, queries, _dim = query.shape
    return value.new_empty((batch, queries, heads, value.shape[3]))


@torch.library.custom_op(
    "hf_sparse::attend_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    sinks: Tensor | None,
    scaling: float,
    softcap: float | None,
    autocast: torch.dtype | None,
    state: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values and sinks: the forward pass once more, with a graph, and back through it.

    It is not counted again.
    """
    own = replace(state_of(state), counters=LayerCounters(), observer=None, fitted_to=None)
    states = [x.detach().requires_grad_() for x in (query, key, value, *(() if sinks is None else (sinks,)))]
    with torch.enable_grad(), _recording(), _autocast(query, autocast):
        out, _ = attend_under(
            mask,
            own,
            *states[:3],
            scaling=scaling,
            softcap=softcap,
            sinks=states[3] if sinks is not None else None,
            quantised=QuantisedKeys(),
        )
        grads = torch.autograd.grad(out.to(value.dtype), states, grad, allow_unused=True)
    made = [torch.zeros_like(x) if g is None else g for x, g in zip(states, grads, strict=True)]
    made += [] if sinks is not None else [query.new_empty(0)]
    dq, dk, dv, ds = (x.contiguous() for x in made)
    return dq, dk, dv, ds


@attend_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sinks: Tensor | None, *_: Any) -> Any:
    states = (query, key, value, query.new_empty(0) if sinks is None else sinks)
    return tuple(x.new_empty(x.shape) for x in states)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.rest = inputs[:5], inputs[5:9]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv, ds = attend_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return dq, dk, dv, None, ds if ctx.saved_tensors[4] is not None else None, *[None] * 5


attend.register_autograd(_backward, setup_context=_save)


def _autocast(query: Tensor, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """The autocast that the model ran in when it was compiled, or none."""
    kind = query.device.type
    if dtype is None:
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
    return torch.autocast(kind, dtype)


@contextmanager
def _recording() -> Iterator[None]:
    """Lets autograd record inside of an operator, which PyTorch calls with autograd switched off altogether."""
    guard: Any = torch._C._SetExcludeDispatchKeyGuard
    keys = torch._C.DispatchKey
    with guard(keys.AutogradFunctionality, False), guard(keys.ADInplaceOrView, False):
        yield
