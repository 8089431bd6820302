"""The engine for CPUs: compiled kernels gather kept keys and values by tiles that stay in the cache."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from hf_sparse.call import AttentionCall, Selection, SharedSelection
from hf_sparse.engines.base import Engine
from hf_sparse.kernels import cpu


class Cpu(Engine):
    """Attention by kernels that are compiled for this machine's CPU."""

    name = "cpu"

    def unavailable_reason(self) -> str | None:
        """Why there are no compiled kernels: see `Engine.unavailable_reason`."""
        return cpu.unsupported_reason()

    def unsupported_reason(self, call: AttentionCall) -> str | None:
        """Gradients, dropout, other devices and dtypes: see `Engine.unsupported_reason`."""
        if call.learns:
            return "the compiled kernels have no backward pass"
        if call.dropout:
            return "attention dropout is not supported by the compiled kernels"
        return cpu.unsupported_reason(call.key, call.value)

    def attend(self, call: AttentionCall, selection: Selection) -> Tensor:
        """Attention to the kept keys where they lie: see `Engine.attend`."""
        missing = -selection.positions.shape[-1] % cpu.TILE
        runs = selection.runs if isinstance(selection, SharedSelection) else None
        positions, allowed = (
            None if x is None else (F.pad(x, (0, missing)) if missing else x.contiguous())
            for x in (selection.positions, selection.allowed if runs is None else None)
        )
        assert positions is not None
        out = cpu.attend(
            call.scaled_query,
            call.key,
            call.value,
            positions,
            allowed=allowed,
            runs=None if runs is None else runs.contiguous(),
            size=selection.queries_per_group,
            per_head=selection.per_head,
            sinks=None if call.sinks is None else call.sinks.float().contiguous(),
            softcap=call.softcap,
        )
        return out.to(call.value.dtype)
