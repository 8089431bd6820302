"""What a layer's attention asks of a GPU: launches, busy time, and where the host waits for it."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu import references, settings
from gpu.cases import Case, SkippedError
from gpu.machine import Machine
from gpu.references import Shape
from hf_sparse.attention import attend
from hf_sparse.bench.layer import SparseStep

Step = Callable[[], object]

DECODE = ("_totals", "_sum_weights", "_best", "_attend_tile", "_join_parts")
"""Kernels of a decode step; besides, the new key and value are copied to the cache."""


def profiled(step: Step, machine: Machine) -> dict[str, Any]:
    """Operations on the device and their time, and operators that PyTorch was called with."""
    activities = [ProfilerActivity.CPU] + ([] if machine.interprets else [ProfilerActivity.CUDA])
    with profile(activities=activities) as found:
        begin = time.perf_counter()
        step()
        machine.synchronize()
        wall = time.perf_counter() - begin
    events = found.events() or []
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    operators = [x for x in events if x.device_type == DeviceType.CPU and x.name.startswith("aten::")]
    busy: Counter[str] = Counter()
    for event in on_device:
        busy[event.name[:80]] += event.time_range.elapsed_us()
    return {
        "device_operations": len(on_device),
        "operators": len([x for x in operators if x.cpu_parent is None or not x.cpu_parent.name.startswith("aten::")]),
        "busy_us": round(sum(busy.values()), 1),
        "wall_us_profiled": round(wall * 1e6, 1),
        "longest": {name: round(us, 1) for name, us in busy.most_common(15)},
        "most_often": dict(Counter(event.name[:80] for event in on_device).most_common(15)),
    }


def synchronisations(step: Step, machine: Machine) -> dict[str, Any]:
    """Calls that wait for the GPU, by the line that makes them."""
    if machine.interprets:
        raise SkippedError("there is no GPU to wait for")
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{x.filename.rpartition('hf_sparse/')[2]}:{x.lineno}" for x in caught if "synchroniz" in str(x.message)]
    return {"synchronisations": len(waits), "places": dict(Counter(waits).most_common())}


def _cases(step: Step, shape: Shape, machine: Machine, predicted: int | None = None) -> Iterator[Case]:
    def warm() -> dict[str, Any]:
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            step()
            machine.synchronize()
            times.append(round((time.perf_counter() - begin) * 1e6, 1))
        return {"host_us": times}

    with torch.no_grad():
        yield Case("warm up", warm, shape.facts)
        yield Case("profile", lambda: {"predicted_operations": predicted} | profiled(step, machine), shape.facts)
        yield Case("synchronisations", lambda: synchronisations(step, machine), shape.facts)


def decode(machine: Machine, length: int) -> Iterator[Case]:
    """One token, whose key a cache takes."""
    shape = Shape(machine.pick(length, 500), kv_heads=machine.pick(8, 2), dtype=machine.half)
    call = settings.with_known_ranges(references.call_of(shape, machine))
    sparse = SparseStep(call, settings.layer())
    yield from _cases(lambda: sparse.undo().attend(), shape, machine, len(DECODE) + 2)


def prefill(machine: Machine, length: int) -> Iterator[Case]:
    """A prompt."""
    length = machine.pick(length, 400)
    shape = Shape(length, queries=length, kv_heads=machine.pick(8, 2), dtype=machine.half)
    call = settings.with_known_ranges(references.call_of(shape, machine))
    yield from _cases(lambda: attend(settings.layer(), call), shape, machine)
