"""Engines: attend to exactly the keys of a selection. `reference` is the specification of all others."""

from __future__ import annotations

from torch import Tensor

from hf_sparse.call import AttentionCall, Selection
from hf_sparse.engines.base import Engine
from hf_sparse.engines.cpu import Cpu
from hf_sparse.engines.gather import Gather
from hf_sparse.engines.reference import Reference
from hf_sparse.engines.triton import Triton
from hf_sparse.errors import UserError

__all__ = ["AUTO", "ENGINES", "Engine", "attend", "choose", "find_engine", "slow_reason"]

AUTO = "auto"
"""The name that lets `choose` choose."""

ENGINES: dict[str, Engine] = {engine.name: engine for engine in (Reference(), Gather(), Cpu(), Triton())}
"""The engines by name."""


def find_engine(engine: str | Engine) -> Engine | None:
    """The engine that a configuration names, or holds; `None` for `"auto"`."""
    if isinstance(engine, Engine):
        return engine
    return None if engine == AUTO else ENGINES[engine]


def choose(call: AttentionCall, selection: Selection) -> Engine:
    """The fastest engine that can attend to `selection` in `call`."""
    if selection.shares_nothing:
        # Masking all keys costs less than copying keys for each query and head.
        return ENGINES["reference"]
    fast = ENGINES["triton" if call.key.is_cuda else "cpu"]
    return ENGINES["gather"] if fast.unsupported_reason(call) else fast


def slow_reason(call: AttentionCall) -> str | None:
    """Why `choose` takes no fused kernel on a GPU in this call; `None` if it does, and on other devices."""
    return ENGINES["triton"].unsupported_reason(call) if call.key.is_cuda else None


def attend(engine: Engine | None, call: AttentionCall, selection: Selection) -> Tensor:
    """Attention by an engine, or by the fastest one that can: `(batch, heads, q_len, value_dim)`.

    Raises:
        UserError: If `engine` cannot attend in this call, or gives something else.
    """
    if engine is None:
        return choose(call, selection).attend(call, selection)
    if reason := engine.unsupported_reason(call):
        raise UserError(f"engine {engine.name!r} cannot attend here: {reason}; engine 'auto' takes one that can")
    out = engine.attend(call, selection)
    shape, dtype = (*call.query.shape[:3], call.value.shape[3]), call.value.dtype
    if not isinstance(out, Tensor) or out.shape != shape or out.dtype != dtype:
        found = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise UserError(f"engine {engine.name!r}: attend must return {dtype} {shape}; got {found}")
    return out
