"""Compiles Triton's kernels for an NVIDIA GPU where there is none, as a process of its own.

    python -m tests.compile_triton 90

Each kernel is launched as usual, but a launch only compiles. The argument is the compute capability, here of Hopper;
a line is printed for what was compiled, with its shared memory in bytes and some instructions that it has.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hf_sparse.kernels.triton import aggregate, attend, common

# What a program may use: on Ada (L4, RTX 4090), as on most cards that are no servers', and on Hopper.
SHARED_BYTES = {89: 99 * 1024, 90: 227 * 1024}


class NoDevice:
    """What the compiler asks a driver."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_only(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    compiled = launch(kernel, *args, grid=grid, warmup=True, **options)
    if compiled in known:
        return
    known.append(compiled)
    found = [name for name in ("wgmma", "mma.sync", "cp.async") if name in compiled.asm["ptx"]]
    print(kernel.__name__, compiled.metadata.shared, *found)
    assert compiled.metadata.shared <= SHARED_BYTES[capability]
    assert compiled.asm["cubin"]


def compile_attend(rows: int, share: int, dim: int, width: int, dtype: torch.dtype, **options: Any) -> None:
    query = torch.empty(1, share, rows, dim, dtype=dtype)
    key = torch.empty(1, 1, width, dim, dtype=dtype)
    columns = torch.empty(1, 1, 1, width, dtype=torch.int64)
    allowed = torch.empty(1, 1, 1, rows * share, width, dtype=torch.bool)
    attend.attend(query, key, key, columns, allowed, rows, scaling=0.1, **options)


def compile_votes(size: int, dim: int, length: int, dtype: torch.dtype, *, windows: bool) -> None:
    keys = torch.empty(1, 1, length, dim, dtype=torch.int8)
    kept_lse = torch.empty(1, 1, 1, size)
    bounds = torch.empty(1, 1, dtype=torch.int64)
    first = torch.empty(1, 1, 1, size, dtype=torch.int64) if windows else None
    members = torch.empty(1, 1, 1, size, dim, dtype=dtype)
    aggregate.aggregated_scores(members, keys, torch.empty(1, 1, length), kept_lse, bounds, bounds, first)


if __name__ == "__main__":
    known: list[object] = []
    capability = int(sys.argv[1])
    driver.set_active(NoDevice(capability))
    launch = JITFunction.run
    JITFunction.run = compile_only
    compile_attend(64, 4, 128, 256, torch.bfloat16)
    compile_attend(64, 1, 256, 250, torch.float16, softcap=30.0, sinks=torch.empty(1))
    for dim in (128, 256):
        compile_votes(256, dim, 512, torch.float32, windows=True)
    compile_votes(4, 256, 512, torch.bfloat16, windows=False)
    # As in decoding, for texts that grow: multiples of 16, and other lengths.
    common._multiprocessors = lambda _: 132
    for length in (1008, 1009, 1015, 992, 978):
        compile_attend(1, 4, 64, length, torch.bfloat16)
        compile_votes(4, 64, length, torch.bfloat16, windows=False)
