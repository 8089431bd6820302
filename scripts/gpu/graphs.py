"""Decoding in a cache of fixed room: one set of launches for every token, as a CUDA graph that is replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gpu import kernels, references, selection, settings
from gpu.cases import LIMITS, Case, compared, same_bits
from gpu.machine import Machine, microseconds
from gpu.references import Shape
from hf_sparse.kernels.quantised import QuantisedKeys
from hf_sparse.visibility import VisibleRanges

_STEPS = 3


class FixedRoom:
    """A layer of which the host knows the room of its cache alone.

    Args:
        shape: Of a call that sees all of the room.
        machine: Where it runs; a graph is captured on a GPU.
        length: Tokens before the first that is decoded.
    """

    def __init__(self, shape: Shape, machine: Machine, length: int) -> None:
        from hf_sparse.kernels.triton.codes import LAYOUT
        from hf_sparse.selectors.on_gpus import by_triton

        self._machine, self._full = machine, references.call_of(shape, machine)
        self._state = settings.layer()
        self._intervals = self._full.intervals.clone()
        self._budgets = torch.empty(shape.batch, 1, 1, dtype=torch.int32, device=machine.device)
        first = torch.zeros(shape.batch, 1, dtype=torch.int64)
        ranges = VisibleRanges(self._intervals, first, first + shape.length)
        plan, always = self._state.plan(ranges), selection.always()
        assert plan is not None
        widths = (_whole(always.sink_keys + max(1, always.recent_keys)), _whole(plan.most))
        quantised = QuantisedKeys()
        # Less what they have in common, as in `exact`.
        quantised.up_to(self._full.key, length, LAYOUT, texts=lambda: [(0, shape.length)] * shape.batch)
        call = replace(self._full, intervals=self._intervals, known_ranges=ranges, quantised=quantised)
        # Room for all keys: those behind the text are not read before they are the newest.
        quantised.up_to(self._full.key, shape.length, LAYOUT, left=shape.length - length)

        def step() -> Tensor:
            return kernels.attend(call, by_triton(call, self._budgets, always, 1, widths))

        self.see(length)
        step()
        self._step, self._replay = step, _captured(step, machine)

    def see(self, length: int) -> None:
        """Let the queries see so many keys."""
        self._intervals[..., 1] = length
        self._budgets.fill_(int(self._state.budgets.up_to(length)[0, length]))

    def attend(self) -> Tensor:
        """Attention of the queries to what they see."""
        if self._replay is None:
            return self._step()
        graph, out = self._replay
        graph.replay()
        return out

    def exact(self, length: int) -> Tensor:
        """The same where the host knows what queries see, and nothing was rounded before."""
        intervals = self._full.intervals.clone()
        intervals[..., 1] = length
        call = replace(self._full, intervals=intervals, known_ranges=VisibleRanges(intervals))
        plan = self._state.plan(call.ranges)
        assert plan is not None
        return kernels.attend(call, selection.chosen(call, plan.budgets, self._machine))


def _whole(width: int) -> int:
    return -(-width // 16) * 16


def _captured(step: Callable[[], Tensor], machine: Machine) -> tuple[Any, Tensor] | None:
    """A graph of the step, and its output; `None` in the interpreter."""
    if machine.interprets:
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph, out


def decode(machine: Machine) -> Iterator[Case]:
    """Tokens one after the other, by one graph, against the same with all launches made anew."""
    for batch, room, length in machine.pick(((1, 8192, 5000), (3, 32768, 32760)), ((2, 700, 500),)):
        shape = Shape(room, batch=batch, kv_heads=machine.pick(8, 1), dtype=machine.half)

        def run(shape: Shape = shape, length: int = length) -> dict[str, Any]:
            layer, verdicts = FixedRoom(shape, machine, length), []
            for more in range(1, 1 + _STEPS):
                layer.see(length + more)
                out = layer.attend().clone()
                verdicts.append(compared(out, layer.exact(length + more), LIMITS[shape.dtype]))
                verdicts[-1]["repeats"] = same_bits(out, layer.attend())
            wrong = [each for each in verdicts if each["status"] != "ok" or not each["repeats"]]
            return (wrong[0] | {"status": "wrong"}) if wrong else verdicts[-1]

        yield Case(f"room {room}, batch {batch}", run, shape.facts)


def time_decode(machine: Machine, length: int) -> Iterator[Case]:
    """One token of one layer by a graph: what the GPU takes without the host."""
    shape = Shape(machine.pick(length, 300), kv_heads=machine.pick(8, 1), dtype=machine.half)

    def run() -> dict[str, Any]:
        # Two layers take turns, so that a cache does not hold one.
        layers = [FixedRoom(shape, machine, shape.length - 1) for _ in range(2)]
        for layer in layers:
            layer.see(shape.length)
        return microseconds(lambda number: layers[number % 2].attend(), machine)

    yield Case("layer, CUDA graph", run, shape.facts)
