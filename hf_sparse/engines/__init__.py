"""Engines: attend to exactly the keys of a selection. `reference` is the specification of all others."""

from torch import Tensor

from hf_sparse.engines.gather import attend as gather
from hf_sparse.engines.native import attend as native
from hf_sparse.engines.reference import attend as reference
from hf_sparse.kernels import cpu
from hf_sparse.selection import AttentionInputs, Selection

__all__ = ["attend", "gather", "native", "reference", "why_not"]


def why_not(name: str) -> str | None:
    """Why the engine called `name` cannot run on this machine; `None` if it can."""
    return cpu.why_not() if name == "native" else None


def attend(name: str, inputs: AttentionInputs, selection: Selection) -> Tensor:
    """Run the engine called `name`: `(batch, heads, rows, value_dim)` in the dtype of the values.

    A row without keys gives zeros.
    """
    match name:
        case "reference":
            return reference(inputs, selection)
        case "gather":
            return gather(inputs, selection)
        case "native":
            return native(inputs, selection)
        case _:
            raise ValueError(f"unknown engine {name!r}")
