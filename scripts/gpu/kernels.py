"""The kernels against float64: each with inputs behind which lies poison, and twice for the same bits.

A kernel that is new gets a function here that gives cases, and a line in `gpu.table`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gpu import references
from gpu.cases import LIMITS, Case, twice
from gpu.machine import Machine
from gpu.references import Shape
from hf_sparse.call import AttentionCall, Selection
from hf_sparse.engines import ENGINES


def attend(call: AttentionCall, selection: Selection) -> Tensor:
    """`hf_sparse.kernels.triton.attend`, which the engine calls and nothing else."""
    return ENGINES["triton"].attend(call, selection)


def attend_case(
    shape: Shape,
    machine: Machine,
    name: str = "",
    change: Callable[[AttentionCall], AttentionCall] = lambda call: call,
    per_head: bool = False,
    runs: bool = False,
    **options: Any,
) -> Case:
    """Attention to random keys, against float64; with `runs`, to runs of a list, as the grouped selector gives them."""

    def run() -> dict[str, Any]:
        call = change(references.call_of(shape, machine, **options))
        selection = references.selection_of(shape, machine, per_head=per_head)
        if runs:
            selection = references.runs_of(selection, shape, machine)
        want = references.attend(call, selection)
        return twice(lambda: attend(call, selection), want, LIMITS[shape.dtype])

    return Case(name or shape.name or "defaults", run, shape.facts)


def _prefill(machine: Machine, **sizes: Any) -> Shape:
    """Two groups of queries, as in a prefill."""
    group = machine.pick(64, 3)
    return Shape(**{"queries": 2 * group, "group": group, "kv_heads": machine.pick(8, 2), **sizes})


def basic(machine: Machine) -> Iterator[Case]:
    """Llama-8B's shape."""
    length, width = machine.pick((8192, 1456), (100, 40))
    for dtype in machine.dtypes:
        yield attend_case(Shape(length, width, dtype=dtype, kv_heads=machine.pick(8, 2)), machine)
        yield attend_case(_prefill(machine, length=length, width=width, dtype=dtype), machine)


def dims(machine: Machine) -> Iterator[Case]:
    """Sizes of a head; in decoding, the keys are cut into parts."""
    length, width = machine.pick((4000, 1000), (70, 30))
    for dtype in machine.dtypes:
        for dim in machine.pick((64, 80, 96, 128, 256), (80, 256)):
            for shape in (Shape(), _prefill(machine)):
                shape = replace(shape, length=length, width=width, kv_heads=2, dim=dim, dtype=dtype)
                yield attend_case(shape, machine)


def shapes(machine: Machine) -> Iterator[Case]:
    """GQA, batches and lengths, about tiles of 16 above all; few keys have few candidates."""
    for share in machine.pick((1, 3, 4, 7, 16), (1, 7)):
        for length in machine.pick((1, 15, 16, 17, 1000), (1, 17)):
            for batch in machine.pick((1, 3), (3,)):
                shape = Shape(length, min(length, 333), kv_heads=2, share=share, batch=batch, dtype=machine.half)
                yield attend_case(shape, machine)
        queries = machine.pick(64, 2)
        for batch in (1, 3):
            group = Shape(1000, 333, queries, queries, batch, 2, share, dtype=machine.half)
            yield attend_case(machine.pick(group, replace(group, length=20)), machine)


def options(machine: Machine) -> Iterator[Case]:
    """What some models add to attention, and other ways to lay out selections and states."""
    length, width = machine.pick((1000, 400), (40, 20))
    few = {"length": length, "width": width, "dtype": machine.half, "kv_heads": 2}
    for kind, shape in (("decode", Shape(**few)), ("prefill", _prefill(machine, **few))):
        heads = shape.kv_heads * shape.share
        sinks = torch.randn(heads, generator=machine.generator(1), device=machine.device).to(shape.dtype)
        yield attend_case(shape, machine, f"{kind}, softcap", softcap=1.5)
        yield attend_case(shape, machine, f"{kind}, sinks", sinks=sinks)
        yield attend_case(shape, machine, f"{kind}, softcap and sinks", softcap=1.5, sinks=sinks)
        yield attend_case(shape, machine, f"{kind}, a head a group", per_head=True)
        yield attend_case(shape, machine, f"{kind}, runs", runs=True)
        yield attend_case(shape, machine, f"{kind}, runs, softcap and sinks", runs=True, softcap=1.5, sinks=sinks)
        yield attend_case(replace(shape, dim=64, value_dim=128), machine, f"{kind}, wider values")
        yield attend_case(shape, machine, f"{kind}, as projected", change=_as_projected)
        yield attend_case(replace(shape, width=0), machine, f"{kind}, no candidates but padding")


def _as_projected(call: AttentionCall) -> AttentionCall:
    query, key, value = (references.as_projected(x) for x in (call.query, call.key, call.value))
    return replace(call, query=query, key=key, value=value)


def long(machine: Machine) -> Iterator[Case]:
    """Offsets beyond 2^31, and the number of kept keys that goes with them."""
    length, width = machine.pick((131072, 5793), (300, 50))
    for dtype in machine.dtypes[:1] + machine.dtypes[-1:]:
        yield attend_case(Shape(length, width, dtype=dtype, kv_heads=machine.pick(8, 2)), machine)
        yield attend_case(_prefill(machine, length=length, width=width, dtype=dtype), machine)
    # 3 x 8 x 2^20 keys of 128 numbers are 3.2 x 10^9.
    batch, length, width = machine.pick((3, 1 << 20, 16384), (3, 400, 30))
    yield attend_case(Shape(length, width, batch=batch, dtype=machine.half), machine)
