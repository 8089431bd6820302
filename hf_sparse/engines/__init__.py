"""Engines: attend to exactly the keys of a selection. `reference` is the specification of all others."""

from torch import Tensor

from hf_sparse.call import AttentionCall, Selection
from hf_sparse.engines import cpu as compiled
from hf_sparse.engines import triton
from hf_sparse.engines.gather import attend as gather
from hf_sparse.engines.reference import attend as reference
from hf_sparse.errors import UserError
from hf_sparse.kernels import cpu, gpu

__all__ = ["attend", "gather", "reference", "refusal", "why_not"]


def why_not(name: str) -> str | None:
    """Why the engine called `name` cannot run on this machine; `None` if it can."""
    match name:
        case "cpu":
            return cpu.why_not()
        case "triton":
            return gpu.why_not()
        case _:
            return None


def refusal(name: str, inputs: AttentionCall) -> str | None:
    """Why the engine called `name` cannot attend in this call; `None` if it can."""
    match name:
        case "cpu":
            return compiled.refusal(inputs)
        case "triton":
            return triton.refusal(inputs)
        case _:
            return None


def attend(name: str, inputs: AttentionCall, selection: Selection) -> Tensor:
    """Run the engine called `name`: `(batch, heads, rows, value_dim)` in the dtype of the values.

    A row without keys gives zeros.

    Raises:
        UserError: Where `refusal` has a reason.
    """
    if reason := refusal(name, inputs):
        raise UserError(f"engine {name!r} cannot attend here: {reason}; engine 'auto' takes one that can")
    match name:
        case "reference":
            return reference(inputs, selection)
        case "gather":
            return gather(inputs, selection)
        case "cpu":
            return compiled.attend(inputs, selection)
        case "triton":
            return triton.attend(inputs, selection)
        case _:
            raise ValueError(f"unknown engine {name!r}")
