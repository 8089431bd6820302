"""A layer's whole attention: the engine `triton` against float64 with the same selector, with and without a cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gpu import references, settings
from gpu.cases import LIMITS, Case, twice
from gpu.machine import Machine
from gpu.references import Shape
from hf_sparse import AttentionCall, Engine, Selection
from hf_sparse.attention import attend
from hf_sparse.cache import SparseLayer
from hf_sparse.monitor import make_report


@dataclass(frozen=True)
class Float64(Engine):
    """The attention that is right."""

    name: str = "float64"

    def attend(self, call: AttentionCall, selection: Selection) -> Tensor:
        """In float64, rounded once: see `Engine.attend`."""
        return references.attend(call, selection).to(call.value.dtype)


def attended(call: AttentionCall, engine: str | Engine) -> tuple[Tensor, dict[str, Any]]:
    """What a sparse layer gives, and what it counted: kept keys over visible ones, and calls that were slow."""
    state = settings.layer(engine=engine)
    with torch.no_grad():
        out, _ = attend(state, call)
    return out, {"density": make_report({1: state.counters}).density, "slow": dict(state.counters.slow)}


def case(shape: Shape, machine: Machine, name: str, **options: Any) -> Case:
    """Engine `triton` against float64, with the same selector."""

    def run() -> dict[str, Any]:
        call = references.call_of(shape, machine, **options)
        want, right = attended(call, Float64())
        counted: list[dict[str, Any]] = []

        def ours() -> Tensor:
            out, facts = attended(call, "triton")
            counted.append(facts)
            return out

        found = twice(ours, want, LIMITS[shape.dtype])
        # The selector is the same for both, so that its slow ways are, too.
        if any(facts != right for facts in counted) or (right["slow"] and not machine.interprets):
            found["status"] = "wrong"
        return found | {"counted": counted[0], "counted_in_float64": right}

    return Case(name, run, shape.facts)


def cached(shape: Shape, machine: Machine, name: str) -> Case:
    """The last query after a cache got its keys a few at a time, against the same keys at once."""

    def run() -> dict[str, Any]:
        call = references.call_of(shape, machine)
        want, _ = attended(call, "triton")
        layer = SparseLayer()
        cuts = [0, shape.length // 2, shape.length // 2 + 1, shape.length - 3, shape.length - 1, shape.length]
        for start, stop in pairwise(cuts):
            key, value = layer.update(call.key[:, :, start:stop], call.value[:, :, start:stop])
            seen = torch.tensor([0, stop], dtype=torch.int32, device=machine.device).view(1, 1, 1, 2)
            step = replace(
                call, key=key, value=value, quantised=layer.quantised, intervals=seen.expand(shape.batch, -1, -1, -1)
            )
            out, _ = attended(step, "triton")
        return twice(lambda: out, want, LIMITS[shape.dtype])

    return Case(name, run, shape.facts)


def basic(machine: Machine) -> Iterator[Case]:
    """Decoding and prefills in every dtype, and what models add to attention."""
    length, queries = machine.pick((8192, 1000), (600, 70))
    for dtype in machine.dtypes:
        shape = Shape(length, kv_heads=machine.pick(8, 2), dtype=dtype)
        yield case(shape, machine, f"decode, {dtype}")
        yield case(replace(shape, batch=3), machine, f"decode, batch 3, {dtype}")
        yield case(replace(shape, queries=queries), machine, f"prefill, {dtype}")
    shape = Shape(length, kv_heads=2, dtype=machine.half)
    sinks = torch.randn(8, generator=machine.generator(1), device=machine.device).to(machine.half)
    for kind, own in (("decode", shape), ("prefill", replace(shape, queries=queries))):
        yield case(own, machine, f"{kind}, softcap and sinks", softcap=1.5, sinks=sinks)
    yield cached(shape, machine, "a cache that grew")
    yield cached(replace(shape, batch=3), machine, "a cache that grew, batch 3")
