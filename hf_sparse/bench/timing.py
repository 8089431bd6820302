"""Time and peak memory of calls."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch

from hf_sparse.errors import UserError

ResultT = TypeVar("ResultT")

MOST_ROUNDS = 200

HOST = "host"
"""The time of a call on CUDA by the clock, beside that of the GPU."""

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True)
class Rounds:
    """How often methods are sampled.

    Attributes:
        repeats: Fewest rounds.
        seconds: Time after which no other round begins; at most `MOST_ROUNDS` are made.
    """

    repeats: int
    seconds: float

    def alternate(self, samplers: Mapping[str, Callable[[], Mapping[str, float]]]) -> dict[str, dict[str, list[float]]]:
        """Sample every method in turn, so that a machine whose speed drifts slows all of them alike.

        Each round begins with another method, so that none always follows the same one. Samplers give what they
        measured by quantity.

        Returns:
            Method -> quantity -> one value per round. Values of different methods in the same round are pairs.
        """
        out: dict[str, dict[str, list[float]]] = {name: {} for name in samplers}
        names = list(samplers)
        start = perf_counter()
        done = 0
        while done < self.repeats or (done < MOST_ROUNDS and perf_counter() - start < self.seconds):
            first = done % len(names)
            for name in names[first:] + names[:first]:
                for quantity, value in samplers[name]().items():
                    out[name].setdefault(quantity, []).append(value)
            done += 1
        return out


def timed(prepare: Callable[[], Any], run: Callable[[Any], object], device: torch.device) -> dict[str, float]:
    """How long `run` takes on the result of `prepare`, which is not timed itself.

    Returns:
        `seconds`, by the clock. On CUDA they are those between two events in the stream, which the GPU takes, and
        `host` is what the clock says until the GPU is done: with what the host does before the first of its kernels.
    """
    given = prepare()
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        stream = torch.cuda.current_stream(device)  # the device need not be the current one
        torch.cuda.synchronize(device)
        begin = perf_counter()
        start.record(stream)
        run(given)
        stop.record(stream)
        torch.cuda.synchronize(device)
        host = perf_counter() - begin
        return {"seconds": float(start.elapsed_time(stop)) / 1000, HOST: host}
    begin = perf_counter()
    run(given)
    return {"seconds": perf_counter() - begin}


def synchronize(device: torch.device) -> None:
    """Wait until all work on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def with_peak(call: Callable[[], ResultT], device: torch.device) -> tuple[ResultT, float | None]:
    """The result of `call`, and its peak of memory above what was in use before it, in bytes.

    It is PyTorch's own count on CUDA, the resident memory of this process on Linux with glibc (free memory is given
    back to the system before), and `None` elsewhere.
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
    _CLEAR.write_text("5", encoding="ascii")  # resets VmHWM to the memory in use now
    resident = _read_bytes(_STATUS, "VmRSS")
    result = call()
    return result, _read_bytes(_STATUS, "VmHWM") - resident


def resident() -> float:
    """Bytes of memory that this process has now, without what it has freed.

    Raises:
        UserError: where the system does not tell.
    """
    if not (_trim() and _STATUS.exists()):
        raise UserError("resident memory is read from /proc, which only Linux has")
    return _read_bytes(_STATUS, "VmRSS")


def mebibytes(size: float) -> float:
    """Bytes as MiB, with one decimal."""
    return round(size / 2**20, 1)


def available_bytes(device: torch.device) -> float:
    """Free memory of `device` in bytes; infinite where it is unknown."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, to use again
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    return _read_bytes(_MEMORY, "MemAvailable") if _MEMORY.exists() else float("inf")


def _trim() -> bool:
    """Give freed memory back to the system: the allocator would use it again, and hide what a call takes."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return False
    return True


def _read_bytes(file: Path, name: str) -> float:
    for line in file.read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return 1024.0 * int(line.split()[1])
    raise OSError(f"{file} has no line {name}")
