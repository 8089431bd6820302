"""The machine that checks run on, and what it can do at most."""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from gpu.cases import Case

Value = TypeVar("Value")

_SLOW = 2.0
"""Seconds after which calls are not repeated to warm up, or for a third sample."""


class Machine:
    """A GPU, or Triton's interpreter on a CPU.

    Args:
        name: `"cuda"` or `"interpret"`.

    Attributes:
        interprets: Whether Triton's kernels are interpreted: only tiny shapes are finished in time.
        device: Where tensors lie.
    """

    def __init__(self, name: str) -> None:
        self.interprets = name == "interpret"
        self.device = torch.device("cpu" if self.interprets else "cuda")
        if not self.interprets:
            torch.cuda.init()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def pick(self, gpu: Value, tiny: Value) -> Value:
        """`gpu`, or `tiny` for the interpreter."""
        return tiny if self.interprets else gpu

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What kernels take. The interpreter would multiply bfloat16 by its bits."""
        every = (torch.bfloat16, torch.float16, torch.float32)
        return every[1:] if self.interprets else every

    @property
    def half(self) -> torch.dtype:
        """The dtype that models come in."""
        return self.dtypes[0]

    def synchronize(self) -> None:
        """Wait for all work, and raise what it met."""
        if not self.interprets:
            torch.cuda.synchronize()

    def works(self) -> bool:
        """Whether the GPU still takes work; after an illegal address, it never does in this process."""
        try:
            if not self.interprets:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            return float(torch.ones(2, device=self.device).sum()) == 2
        except RuntimeError:
            return False

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers on the device."""
        return torch.Generator(self.device).manual_seed(seed)


def microseconds(run: Callable[[int], object], machine: Machine, *, seconds: float = 1.0) -> dict[str, Any]:
    """Time of `run(number)`, called with 0, 1, 2 ...: medians, after one call or two that do not count.

    `measured_us` is the time between two events in the stream, `host_us` that by the clock until all is done, and
    `enqueue_us` that until the call returns.
    """
    begin = time.perf_counter()
    for number in range(2):
        if time.perf_counter() - begin < _SLOW:
            run(number)
            machine.synchronize()
    device: list[float] = []
    host: list[float] = []
    enqueue: list[float] = []
    begin = time.perf_counter()
    while len(host) < 50:
        spent = time.perf_counter() - begin
        if host and spent > (seconds if len(host) >= 3 else _SLOW):
            break
        start, stop = None, None
        if not machine.interprets:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        at = time.perf_counter()
        if start is not None:
            start.record()
        run(len(host))
        if stop is not None:
            stop.record()
        enqueue.append(time.perf_counter() - at)
        machine.synchronize()
        host.append(time.perf_counter() - at)
        device.append(host[-1] if start is None or stop is None else start.elapsed_time(stop) / 1e3)
    medians = {"measured_us": device, "host_us": host, "enqueue_us": enqueue}
    found: dict[str, Any] = {name: round(statistics.median(values) * 1e6, 1) for name, values in medians.items()}
    return found | {"least_us": round(min(device) * 1e6, 1), "repeats": len(host)}


@dataclass(frozen=True)
class Ceilings:
    """What the machine was measured to do at most.

    Attributes:
        bytes: A second, read and written, of a large copy.
        flop: A second, of a large matrix product in 16 bits.
    """

    bytes: float
    flop: float

    @classmethod
    def of(cls, machine: Machine) -> Ceilings:
        """Measured now, on random numbers."""
        size = machine.pick(1 << 30, 1 << 20)
        source = torch.randint(0, 100, (size,), dtype=torch.int8, device=machine.device)
        target = torch.empty_like(source)
        copied = microseconds(lambda _: target.copy_(source), machine, seconds=0.2)["measured_us"]
        side = machine.pick(8192, 256)
        left, right = (torch.randn(side, side, device=machine.device).to(machine.half) for _ in range(2))
        product = microseconds(lambda _: left @ right, machine, seconds=0.2)["measured_us"]
        return cls(2 * size / copied * 1e6, 2 * side**3 / product * 1e6)

    def predicted(self, *, bytes: float, flop: float) -> dict[str, float]:
        """The least time for so many bytes and operations: the longer of both."""
        times = (bytes / self.bytes, flop / self.flop)
        return {"bytes": bytes, "flop": flop, "predicted_us": round(max(times) * 1e6, 1)}


def environment(machine: Machine) -> Iterator[Case]:
    """What any other result depends on."""
    yield Case("software", software)
    yield Case("device", lambda: device(machine))
    yield Case("ceilings", lambda: ceilings(machine))
    yield Case("triton", lambda: triton_reason(machine))


def software() -> dict[str, Any]:
    """Versions, and the compilers that Triton and the CPU's kernels look for."""
    from hf_sparse.bench.card import installed

    packages = ("torch", "triton", "transformers", "accelerate", "numpy", "datasets", "typer", "pytest", "hypothesis")
    tools = ("cc", "gcc", "c++", "nvcc", "compute-sanitizer", "ncu")
    return {
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "packages": {name: installed(name) for name in packages},
        "tools": {name: shutil.which(name) for name in tools},
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
    }


def device(machine: Machine) -> dict[str, Any]:
    """The card and its limits, and what its driver says of it."""
    if machine.interprets:
        return {"device": f"Triton's interpreter on {platform.machine()}"}
    card = torch.cuda.get_device_properties(machine.device)
    names = ("name", "total_memory", "multi_processor_count", "L2_cache_size", "regs_per_multiprocessor", "warp_size")
    shared = ("shared_memory_per_block", "shared_memory_per_block_optin", "shared_memory_per_multiprocessor")
    facts = {name: getattr(card, name, None) for name in (*names, *shared)}
    wanted = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,mig.mode.current"
    try:
        command = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv"]
        facts["nvidia_smi"] = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        facts["nvidia_smi"] = str(error)
    free, total = torch.cuda.mem_get_info()
    return facts | {"capability": list(torch.cuda.get_device_capability()), "free_bytes": free, "all_bytes": total}


def ceilings(machine: Machine) -> dict[str, Any]:
    """The fastest copy and product, and a loop of empty launches."""
    found = Ceilings.of(machine)
    one = torch.zeros(1, device=machine.device)
    launch = microseconds(lambda _: [one.add_(1) for _ in range(100)], machine, seconds=0.2)
    return {"bytes_per_s": found.bytes, "flop_per_s": found.flop, "launch_us": launch["measured_us"] / 100}


def triton_reason(machine: Machine) -> dict[str, Any]:
    """Whether the package would use its Triton kernels here at all."""
    from hf_sparse.kernels import gpu

    reason = gpu.unsupported_reason(machine.device)
    return {} if reason is None else {"status": "wrong", "reason": reason}
