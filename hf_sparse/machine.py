"""What this machine is called, and the devices it has."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

from hf_sparse.errors import UserError, first_line

_CPU_INFO = Path("/proc/cpuinfo")


@cache
def device_name(device: torch.device) -> str:
    """The name of a GPU or of the processor, as its maker gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def find_device(name: str) -> torch.device:
    """The device called `name`, such as `cpu` or `cuda:0`.

    Raises:
        UserError: if this machine has none of that name, or it holds no numbers; says which there are.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    there = ["cpu"]
    if accelerator is not None:
        there += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    try:
        device = torch.empty(0, device=name).device
        if device.type in {place.partition(":")[0] for place in there}:
            return device
        why = f"this is no machine for {device.type}"
    except (RuntimeError, AssertionError) as error:
        why = first_line(error)
    raise UserError(f"device {name!r} cannot be used: {why}; there is {', '.join(there)}")
