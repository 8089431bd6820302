"""Timing methods in turn, and their peak memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch

ResultT = TypeVar("ResultT")

Sample = Mapping[str, float]
"""What was measured by doing the work once, by the name of the quantity."""

MOST_ROUNDS = 200

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_MEMORY = Path("/proc/meminfo")


def alternate(
    samplers: Mapping[str, Callable[[], Sample]], repeats: int, seconds: float
) -> dict[str, dict[str, list[float]]]:
    """Sample every method in turn, round by round, so that a machine whose speed drifts slows them all alike.

    Each round begins with another method: none has the same one before it every time.

    Args:
        samplers: Method -> does its work once.
        repeats: Fewest rounds.
        seconds: Rounds go on for this long, up to `MOST_ROUNDS`.

    Returns:
        Method -> quantity -> one value a round. The values of different methods in the same round are pairs.
    """
    out: dict[str, dict[str, list[float]]] = {name: {} for name in samplers}
    names = list(samplers)
    start = perf_counter()
    done = 0
    while done < repeats or (done < MOST_ROUNDS and perf_counter() - start < seconds):
        first = done % len(names)
        for name in names[first:] + names[:first]:
            for quantity, value in samplers[name]().items():
                out[name].setdefault(quantity, []).append(value)
        done += 1
    return out


def timed(prepare: Callable[[], Any], run: Callable[[Any], object], device: torch.device) -> float:
    """Seconds that `run` takes on what `prepare` gives; `prepare` itself is not timed.

    On CUDA they are those between two events in the stream; elsewhere those of the clock.
    """
    given = prepare()
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        start.record()
        run(given)
        stop.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(stop)) / 1000
    begin = perf_counter()
    run(given)
    return perf_counter() - begin


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def with_peak(call: Callable[[], ResultT], device: torch.device) -> tuple[ResultT, float | None]:
    """What `call` returns, and the peak of memory above what was in use before it, in bytes.

    On CUDA that is PyTorch's own count; on Linux with glibc the resident memory of this process, after free memory
    was given back; elsewhere `None`.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, float(torch.cuda.max_memory_allocated(device) - before)
    if not (_trim() and _CLEAR.exists()):
        return call(), None
    _CLEAR.write_text("5", encoding="ascii")  # the peak starts again from what is in use now
    resident = _listed_bytes(_STATUS, "VmRSS")
    result = call()
    return result, _listed_bytes(_STATUS, "VmHWM") - resident


def available_bytes(device: torch.device) -> float:
    """Memory that is free on `device`, in bytes; infinite where it cannot be known."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return _listed_bytes(_MEMORY, "MemAvailable") if _MEMORY.exists() else float("inf")


def _trim() -> bool:
    """Give memory that was freed back to the system: kept by the allocator, it would hide what a call takes."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return False
    return True


def _listed_bytes(file: Path, name: str) -> float:
    for line in file.read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return 1024.0 * int(line.split()[1])
    raise OSError(f"{file} does not tell {name}")
