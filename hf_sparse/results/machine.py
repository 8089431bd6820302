"""What a run has to work with: its devices and their names, and its processes."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState

from hf_sparse.errors import UserError, first_line

ItemT = TypeVar("ItemT")

_CPU_INFO = Path("/proc/cpuinfo")
# Processes wait for the slowest one at the end, which may be long on a CPU.
_TIMEOUT = timedelta(days=7)


@cache
def device_name(device: torch.device) -> str:
    """The name of a GPU or CPU, as its maker gives it."""
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


def process_state() -> PartialState:
    """The processes of this run: one, unless `accelerate launch` or `torchrun` started several."""
    # Without a GPU, accelerate connects the processes only if it is told that they are meant to use the CPU.
    several_on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    return PartialState(cpu=several_on_cpu, timeout=_TIMEOUT)


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes summaries."""
    return bool(process_state().is_main_process)


def my_share(items: Sequence[ItemT], cost: Callable[[ItemT], float]) -> list[ItemT]:
    """This process's share of `items`, costly ones first so that none is left alone with one at the end."""
    state = process_state()
    return sorted(items, key=cost, reverse=True)[state.process_index :: state.num_processes]
