"""Whether the Triton kernels can run; imports no Triton, which may be missing."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from hf_sparse.kernels.cpu import SWITCH

WIDEST = 256
"""Most components of a query, key or value: more do not fit into the shared memory of all GPUs."""

_OLDEST = (8, 0)


def unsupported_reason(device: torch.device | None = None) -> str | None:
    """Why the Triton kernels cannot run on `device`, or, if `None`, on any of this machine; `None` if they can."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 is set"
    if find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    if device is None:
        found = torch.cuda.is_available() or interprets()
        return None if found else "there is no GPU of NVIDIA or AMD that PyTorch can use"
    if device.type == "cpu" and interprets():
        return None
    if device.type != "cuda":
        return f"the model is on {device}, and Triton compiles for GPUs of NVIDIA and AMD"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _OLDEST:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and Triton needs 8.0"
    return None


def interprets() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1), as tests do."""
    from triton import knobs

    return bool(knobs.runtime.interpret)
