"""What `hf-sparse bench` does with one layer, on a short text: kernels of SDPA by name, times of host and GPU."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from gpu import settings
from gpu.cases import Case
from gpu.machine import Machine
from hf_sparse.bench.card import card
from hf_sparse.bench.inputs import gaussian
from hf_sparse.bench.layer import Found, time_decode, time_prefill
from hf_sparse.bench.shapes import SHAPES
from hf_sparse.bench.tasks import FLEX, MASKED
from hf_sparse.bench.timing import Rounds


def layer(machine: Machine) -> Iterator[Case]:
    """Both tasks of one layer, without what has to be compiled or takes a mask."""
    inputs = gaussian(SHAPES[machine.pick("llama-8b", "smollm2-135m")], machine.half, machine.device, 0)
    config, rounds = settings.config(), Rounds(repeats=3, seconds=machine.pick(3, 0))

    def facts(found: Found) -> dict[str, Any]:
        """Medians of all times."""
        for own in found.values():
            own |= {quantity: median(times) for quantity, times in own.pop("samples", {}).items()}
        return {"methods": found, "gpu": card(machine.device)}

    def decode() -> dict[str, Any]:
        return facts(time_decode(inputs, machine.pick(32768, 500), config, rounds))

    def prefill() -> dict[str, Any]:
        return facts(time_prefill(inputs, machine.pick(8192, 200), config, rounds, frozenset({FLEX, MASKED})))

    yield Case("decode", decode)
    yield Case("prefill", prefill)
