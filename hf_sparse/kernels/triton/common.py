"""Helpers of all kernels: what the device offers, work cut into parts, exponentials to the base 2, and soft caps."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

Rest = ParamSpec("Rest")
Result = TypeVar("Result")

# Exponentials to the base 2 are what GPUs compute.
LOG2_E = tl.constexpr(math.log2(math.e))

# Below all scores, and finite: the difference of two such numbers is 0, not NaN.
LOWEST = tl.constexpr(-1e30)


def on_its_device(function: Callable[Concatenate[Tensor, Rest], Result]) -> Callable[Concatenate[Tensor, Rest], Result]:
    """Launch the kernels of a function on the GPU of its first argument, which need not be the current one."""

    @wraps(function)
    def launch(first: Tensor, /, *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        with torch.cuda.device(first.get_device()):
            return function(first, *args, **kwargs)

    return launch


def parts_for(device: torch.device, programs: int, steps: int, *, most: int, programs_each: int) -> tuple[int, int]:
    """Parts into which to cut the work of each program, so that few programs fill the GPU.

    Args:
        device: Where the programs run.
        programs: Programs before cutting.
        steps: Tiles that each of them reads.
        most: Most parts.
        programs_each: Programs that each multiprocessor should get.

    Returns:
        Number of parts, and steps in each; the last part may be shorter.
    """
    wanted = programs_each * _multiprocessors(device) // max(1, programs)
    each = max(1, triton.cdiv(steps, max(1, min(wanted, most))))
    return max(1, triton.cdiv(steps, each)), each


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may use; those of Hopper where kernels are interpreted."""
    if device.type != "cuda":
        return 227 << 10
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block)


def launches(device: torch.device) -> None:
    """Compile and launch a small kernel, which raises what is raised where Triton cannot do that."""
    with torch.cuda.device(device):
        _one[(1,)](torch.empty(1, dtype=torch.int32, device=device))


@triton.jit
def _one(out):
    tl.store(out, 1)


@triton.jit
def fold(scores, highest, mass):
    """Fold a tile of scores `(pairs, keys)`, to the base 2, into the running maximum and sum of each pair.

    Returns the weights of the tile and the factor of what was summed before, both relative to the new maximum.
    """
    before = highest
    highest = tl.maximum(before, tl.max(scores, 1))
    fade = tl.exp2(before - highest)
    weights = tl.exp2(scores - highest[:, None])
    return weights, fade, highest, mass * fade + tl.sum(weights, 1)


@triton.jit
def capped(scores, softcap):
    """Soft-capped scores: `softcap * tanh(scores / softcap)`."""
    # tanh(x) = 1 - 2 / (1 + exp(2x))
    return softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores / softcap * (2.0 * LOG2_E))))
