"""Whether the Triton kernels can run; imports Triton only where a GPU is tried, for it may be missing or broken."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib.util import find_spec

import torch

from hf_sparse.errors import first_line
from hf_sparse.kernels.cpu import SWITCH

WIDEST = 256
"""Most components of a query, key or value: more do not fit into the shared memory of all GPUs."""

_OLDEST = (8, 0)

# Bytes of shared memory that a program needs: what GPUs of AMD have, for which tests compile the kernels, too.
_LEAST_SHARED = 64 << 10


def unsupported_reason(device: torch.device | None = None) -> str | None:
    """Why the Triton kernels cannot run on `device`, or, if `None`, on any of this machine; `None` if they can.

    The first time that a GPU is asked about, a small kernel is compiled and launched there.
    """
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 is set"
    if find_spec("triton") is None:
        package = "triton-windows" if platform.system() == "Windows" else "triton"
        return f"the package triton is not installed (pip install {package})"
    if device is None:
        found = torch.cuda.is_available() or interprets()
        return None if found else "there is no GPU of NVIDIA or AMD that PyTorch can use"
    if device.type == "cpu" and interprets():
        return None
    if device.type != "cuda":
        return f"the model is on {device}, and Triton compiles for GPUs of NVIDIA and AMD"
    return reason_of_gpu(device)


@cache
def reason_of_gpu(device: torch.device) -> str | None:
    """The same for a GPU, if Triton is installed. Found out once."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _OLDEST:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and Triton needs 8.0"
    try:
        from hf_sparse.kernels.triton.common import launches, shared_memory

        if (shared := shared_memory(device)) < _LEAST_SHARED:
            return f"a program has {shared >> 10} KiB of shared memory on this GPU, and the kernels need 64"
        launches(device)
    except Exception as error:
        # What is raised where there is no compiler for Triton's launcher, or a driver that is too old, differs.
        return f"Triton does not work here: {type(error).__name__}: {first_line(error)}"
    return None


def interprets() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1), as tests do."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)
