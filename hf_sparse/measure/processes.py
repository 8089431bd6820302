"""Sharing an evaluation between the processes of `accelerate launch`, or of `torchrun` on CPUs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState

from hf_sparse.results import ResultFile

ItemT = TypeVar("ItemT")

# Processes wait for the slowest one at the end, which may be long on a CPU.
_PATIENCE = timedelta(days=7)


def process_state() -> PartialState:
    """The processes of this run: one, unless a launcher started several."""
    # Without a GPU, accelerate connects the processes only if it is told that they are meant to use the CPU.
    several_on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    return PartialState(cpu=several_on_cpu, timeout=_PATIENCE)


def my_share(items: Sequence[ItemT], cost: Callable[[ItemT], float]) -> list[ItemT]:
    """This process's share of `items`, the costly ones first so that none is left alone with one at the end."""
    state = process_state()
    return sorted(items, key=cost, reverse=True)[state.process_index :: state.num_processes]


def repair_together(results: ResultFile) -> None:
    """`ResultFile.repair` by one process while the others wait."""
    state = process_state()
    if state.is_main_process:
        results.repair()
    state.wait_for_everyone()
