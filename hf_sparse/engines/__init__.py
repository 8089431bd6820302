"""Engines: attend to exactly the keys of a selection. `reference` is the specification of all others."""

from torch import Tensor

from hf_sparse.engines.gather import attend as gather
from hf_sparse.engines.native import attend as native
from hf_sparse.engines.reference import attend as reference
from hf_sparse.engines.triton import attend as triton
from hf_sparse.kernels import cpu, gpu
from hf_sparse.selection import AttentionInputs, Selection

__all__ = ["attend", "gather", "native", "reference", "triton", "why_not"]


def why_not(name: str) -> str | None:
    """Why the engine called `name` cannot run on this machine; `None` if it can."""
    match name:
        case "native":
            return cpu.why_not()
        case "triton":
            return gpu.why_not()
        case _:
            return None


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
        case "triton":
            return triton(inputs, selection)
        case "flex":
            # Imported where it is used: it brings the compiler with it.
            from hf_sparse.engines.flex import attend as flex

            return flex(inputs, selection)
        case _:
            raise ValueError(f"unknown engine {name!r}")
