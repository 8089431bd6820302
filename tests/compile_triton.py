"""Compiles Triton's kernels for a GPU where there is none, as a process of its own.

    python -m tests.compile_triton 90 gfx942
    python -m tests.compile_triton --brief 90 gfx942

Each kernel is launched as usual, but a launch only compiles. An argument is the compute capability of an NVIDIA GPU,
here of Hopper, or the architecture of one of AMD. A line is printed for what was compiled, with its shared memory in
bytes, the registers of a thread, and some instructions that it has. More shared memory than a program may use ends the
process, and so does a register that is spilled to memory. For a GPU with much and for one with little shared memory,
more is compiled; with `--brief` less, and for all GPUs but the first what reads a prompt alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hf_sparse.kernels.triton import attend, codes, common
from hf_sparse.kernels.triton.best import best
from hf_sparse.kernels.triton.importance import Groups, importance
from hf_sparse.selectors.importance import PERIOD, WINDOW

# KiB that a program may use.
SHARED = {"80": 163, "86": 99, "89": 99, "90": 227, "100": 227, "120": 99, "gfx942": 64}

THOROUGH = ("89", "90")

INSTRUCTIONS = ("wgmma", "tcgen05.mma", "mma.sync", "cp.async", "v_mfma")


class NoDevice:
    """What the compiler asks a driver."""

    def __init__(self, index: int, name: str) -> None:
        self.index, self.name = index, name
        self.target = GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name), 32)

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_only(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    compiled = launch(kernel, *args, grid=grid, warmup=True, **options)
    if compiled in known:
        return
    known.append(compiled)
    text = compiled.asm["ptx"] if "ptx" in compiled.asm else compiled.asm["amdgcn"]
    found = [name for name in INSTRUCTIONS if name in text]
    name = driver.active.name
    registers, spilled = taken(compiled)
    print(name, kernel.__name__, compiled.metadata.shared, registers, *found, flush=True)
    assert compiled.metadata.shared <= SHARED[name] << 10
    assert spilled == 0, f"{kernel.__name__} spills {spilled}"


def taken(compiled: Any) -> tuple[int, int]:
    """Registers of a thread, and what is spilled: bytes of its stack on a GPU of NVIDIA.

    On one of AMD, vector registers, which others are spilled to.
    """
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        counts = (re.findall(rf"vgpr_{name}:\s*(\d+)", text) for name in ("count", "spill_count"))
        registers, spilled = (sum(map(int, found)) for found in counts)
        return registers, spilled
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        dump = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin],
            capture_output=True,
            text=True,
            check=True,
        )
    registers, stack = (max(map(int, re.findall(rf"{name}:(\d+)", dump.stdout))) for name in ("REG", "STACK"))
    return registers, stack


def compile_attend(
    rows: int, share: int, dim: int, width: int, dtype: torch.dtype, *, masked: bool = True, **options: Any
) -> None:
    """With runs, and with a mask if that is wanted too."""
    query = torch.empty(1, share, rows, dim, dtype=dtype)
    key = torch.empty(1, 1, width, dim, dtype=dtype)
    positions = torch.empty(1, 1, 1, width, dtype=torch.int64)
    mask = torch.empty(1, 1, 1, rows * share, width, dtype=torch.bool)
    for keep in (torch.empty(1, 1, 1, rows * share, 3, 2, dtype=torch.int64), *([mask] if masked else [])):
        attend.attend(query, key, key, positions, keep, rows, scaling=0.1, **options)


def compile_select(
    queries: int, size: int, share: int, dim: int, dtype: torch.dtype, softcap: float | None = None
) -> None:
    """What the grouped selector launches, for a text that grows by some tokens; what a soft cap changes of it."""
    for length in (131_072, 131_073, 131_088):
        key = torch.empty(1, 1, length, dim, dtype=dtype)
        parts, center = codes.allocate(key, length), torch.empty(1, 1, dim)
        if queries > 1:
            codes.write(key, length - queries, length, parts, center)
        query = torch.empty(1, share, queries, dim, dtype=dtype)
        groups = Groups(
            query,
            dim**-0.5,
            None,
            torch.empty(1, 1, queries, 2, dtype=torch.int32),
            *parts,
            size,
            4,
            64,
            0,
            length,
            144,
            *((None, None) if queries > 1 else (key, center)),
        )
        budgets = torch.empty(1, share, queries, dtype=torch.int32)
        values, counts, arrived = importance(query, groups, WINDOW, PERIOD)
        if softcap is None:
            best(values, counts, arrived, groups, budgets, 5_664, differ=size > 1)


if __name__ == "__main__":
    known: list[object] = []
    launch = JITFunction.run
    JITFunction.run = compile_only
    # What the wrappers ask of the GPU.
    common._multiprocessors = lambda _: 132
    attend.shared_memory = lambda _: SHARED[driver.active.name] << 10
    brief, gpus = "--brief" in sys.argv, [name for name in sys.argv[1:] if name != "--brief"]
    for index, gpu in enumerate(gpus):
        thorough = gpu in THOROUGH and not brief
        driver.set_active(NoDevice(index, gpu))
        compile_select(1024, 64, 4, 128, torch.bfloat16)
        compile_attend(64, 4, 128, 256, torch.bfloat16, masked=thorough)
        if not brief or index == 0:
            compile_select(1, 1, 4, 128, torch.bfloat16)
            compile_attend(1, 4, 128, 1008, torch.bfloat16, masked=thorough)
        if thorough:
            compile_select(64, 64, 1, 256, torch.float16, softcap=30.0)
            compile_attend(64, 1, 256, 250, torch.float16, softcap=30.0, sinks=torch.empty(1))
            compile_attend(64, 4, 64, 256, torch.float32)
