"""Time of one layer's attention in the shape of Llama-8B: kernels and the whole, beside dense attention.

Each time stands beside a prediction: the longer of the bytes that it must move and the operations that it must do, at
the ceilings that this process measured. Inputs alternate between sets that do not fit into the L2 cache together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gpu import finding, kernels, references, selection, settings
from gpu.cases import Case, SkippedError
from gpu.machine import Ceilings, Machine, microseconds
from gpu.references import Shape
from hf_sparse import AttentionCall
from hf_sparse.attention import LayerState, attend
from hf_sparse.bench import dense
from hf_sparse.bench.layer import SparseStep
from hf_sparse.kernels.quantised import QuantisedKeys
from hf_sparse.selectors import find_selector
from hf_sparse.selectors.importance import PERIOD, WINDOW

_SETS_BYTES = 200e6
"""Four times an L2 cache."""

_MOST_SECONDS = 60.0
"""A longer prefill is not begun."""

_LONG = 1 << 16
"""Queries from which a quarter of them is tried first."""

_BLOCK = 1024
"""Queries at the end of a text that kernels of a prefill are timed with: a layer takes its queries in such blocks."""


class Layer:
    """Inputs of one layer, and how long everything takes on them.

    Args:
        shape: Of the call.
        machine: Where it runs.
    """

    def __init__(self, shape: Shape, machine: Machine) -> None:
        self.shape, self.machine, self.ceilings = shape, machine, Ceilings.of(machine)
        size = shape.dtype.itemsize * shape.dim * shape.kv_heads * (2 * shape.length + 2 * shape.share * shape.queries)
        number = min(8, max(2, math.ceil(machine.pick(_SETS_BYTES, 1.0) / size)))
        self.calls = [settings.with_known_ranges(references.call_of(shape, machine, seed)) for seed in range(number)]

    def each(self, items: list[Any], run: Callable[[Any], object]) -> dict[str, Any]:
        """Time of `run` on the items in turn."""

        def timed(number: int) -> object:
            with torch.no_grad():
                return run(items[number % len(items)])

        return microseconds(timed, self.machine) | {"sets": len(items)}

    def record(self, found: dict[str, Any], *, bytes: float, flop: float, part: bool = False) -> dict[str, Any]:
        """Times with what was predicted, and, unless only a part was done, dense attention's time over them."""
        predicted = self.ceilings.predicted(bytes=bytes, flop=flop)
        times = predicted | {"measured_over_predicted": found["measured_us"] / max(predicted["predicted_us"], 0.1)}
        return found | times | ({} if part else {"ratio_to_dense": self.dense_us / found["measured_us"]})

    @property
    def dense_ways(self) -> list[str]:
        """Ways to attend to all keys: SDPA's own choice, its back ends, and, for one query, its heads as queries."""
        return [
            "default",
            *dense.backends(self.machine.device),
            *(["heads as queries"] if self.shape.queries == 1 else []),
        ]

    @cache  # noqa: B019 - one layer a process
    def dense(self, way: str) -> dict[str, Any]:
        """Time of dense attention."""
        if way == "heads as queries":
            return self.each(self.calls, _heads_as_queries)
        return self.each(self.calls, lambda call: dense.sdpa(call, None if way == "default" else way))

    @property
    def dense_us(self) -> float:
        """Of the fastest way that works here."""
        times = []
        for way in self.dense_ways:
            try:
                times.append(self.dense(way)["measured_us"])
            except RuntimeError:
                continue
        return min(times)

    def dense_cases(self) -> Iterator[Case]:
        """Each of `dense_ways`."""
        shape = self.shape
        pairs = sum(int(call.visible.sum()) for call in self.calls[:1]) * shape.kv_heads * shape.share
        kv = 2 * shape.kv_heads * shape.length * shape.dim * shape.dtype.itemsize

        def run(way: str) -> dict[str, Any]:
            try:
                found = self.dense(way)
            except RuntimeError as error:
                raise SkippedError(f"SDPA, {way}: {error}"[:500]) from None
            return self.record(found, bytes=kv, flop=4.0 * pairs * shape.dim)

        for way in self.dense_ways:
            yield Case(f"dense, {way}", lambda way=way: run(way), shape.facts)


def _heads_as_queries(call: AttentionCall) -> Tensor:
    """The query heads that share a key head as queries of one head: keys and values are read once for all of them."""
    query = call.query.view(call.query.shape[0], call.key.shape[1], call.group_size, call.query.shape[3])
    return scaled_dot_product_attention(query, call.key, call.value, scale=call.scaling)


def keys_in_4_bits(shape: Shape) -> int:
    """Bytes of all keys in 4 bits, with their scales."""
    return shape.kv_heads * shape.length * (shape.dim // 2 + 4)


def ranked(shape: Shape) -> float:
    """Bytes of them that a selector reads: some of them twice, for the totals of weights."""
    return keys_in_4_bits(shape) * (1 + WINDOW / PERIOD)


def _block_cases(layer: Layer) -> Iterator[Case]:
    """The selector, and the attention kernel on what it keeps, for the last block of queries."""
    shape = replace(layer.shape, queries=min(layer.shape.queries, layer.machine.pick(_BLOCK, 64)))
    calls = [call.queries(layer.shape.queries - shape.queries, layer.shape.queries) for call in layer.calls]
    heads, part = shape.kv_heads * shape.share, shape.queries < layer.shape.queries
    groups = max(1, shape.queries // find_selector(settings.SELECTOR).group_queries)
    # One number a key and group goes out. Products of 8-bit numbers are twice as fast as the ceiling, in 16 bits.
    lists, scores = 4.0 * shape.kv_heads * groups * shape.length, 1.0 * heads * shape.dim * shape.queries * shape.length

    @cache
    def given() -> list[tuple[AttentionCall, Tensor]]:
        aligned = [selection.problem(replace(call, quantised=QuantisedKeys())) for call in calls]
        return [(each.call, each.budgets) for each in aligned]

    def choose(problem: tuple[AttentionCall, Tensor]) -> Any:
        return selection.chosen(*problem, layer.machine)

    def select() -> dict[str, Any]:
        found = layer.each(given(), choose)
        return layer.record(found, bytes=ranked(shape) + 2 * lists, flop=scores, part=part)

    def attention() -> dict[str, Any]:
        kept = [(call, choose((call, budgets))) for call, budgets in given()]
        width = kept[0][1].positions.shape[3]
        number, pairs = shape.kv_heads * groups * width, shape.share * shape.queries // groups
        found = layer.each(kept, lambda item: kernels.attend(*item))
        moved = number * (2 * shape.dim * shape.dtype.itemsize + 8)
        return {"width": width} | layer.record(found, bytes=moved, flop=4.0 * number * pairs * shape.dim, part=part)

    @cache
    def launched() -> list[dict[str, finding.Launch]]:
        return [finding.launches(*problem, layer.machine) for problem in given()]

    def kernel(name: str, bytes: float, flop: float) -> dict[str, Any]:
        found = layer.each([each[name] for each in launched()], finding.Launch.again)
        return layer.record(found, bytes=bytes, flop=flop, part=part)

    def importance() -> dict[str, Any]:
        return kernel("importance", ranked(shape) + lists, scores)

    def codes() -> dict[str, Any]:
        from hf_sparse.kernels.triton.codes import LAYOUT

        out = LAYOUT.allocate(calls[0].key, shape.length)
        center = torch.zeros(*calls[0].key.shape[:2], shape.dim, device=out[0].device)
        found = layer.each(calls, lambda call: LAYOUT.quantise(call.key, 0, shape.length, out, center))
        keys = shape.kv_heads * shape.length * shape.dim * shape.dtype.itemsize
        return layer.record(found, bytes=keys + keys_in_4_bits(shape), flop=0, part=True)

    yield Case("codes of all keys", codes, shape.facts)
    yield Case(f"importance, {shape.queries} queries", importance, shape.facts)
    yield Case(f"best, {shape.queries} queries", lambda: kernel("best", lists, 0), shape.facts)
    yield Case(f"select, {shape.queries} queries", select, shape.facts)
    yield Case(f"attend, {shape.queries} queries", attention, shape.facts)


def _sparse(layer: Layer, items: list[Any], run: Callable[[LayerState, Any], object]) -> Case:
    """The whole attention of a sparse layer."""
    shape, state = layer.shape, settings.layer()

    def timed() -> dict[str, Any]:
        plan = state.plan(layer.calls[0].ranges)
        assert plan is not None
        kept = float(plan.budgets.sum()) * (shape.kv_heads * shape.share / plan.budgets.shape[1])
        seen = float(layer.calls[0].visible.sum()) * shape.kv_heads * shape.share
        # Keys and values are read once for each group of queries.
        blocks = max(1, shape.queries // find_selector(settings.SELECTOR).group_queries)
        lists = 2 * shape.kv_heads * blocks * plan.most * shape.dim * shape.dtype.itemsize
        # The importance of each key goes out, and comes back.
        lists += 2 * 4 * shape.kv_heads * blocks * shape.length
        found = layer.each(items, lambda item: run(state, item))
        slow = {"slow": dict(state.counters.slow)}
        return slow | layer.record(found, bytes=ranked(shape) + lists, flop=(seen + 4 * kept) * shape.dim)

    return Case("layer", timed, shape.facts)


def decode(machine: Machine, length: int) -> Iterator[Case]:
    """One query. The layer appends its key to a cache first, and takes it out again after that."""
    shape = Shape(machine.pick(length, 500), kv_heads=machine.pick(8, 2), dtype=machine.half)
    layer = Layer(shape, machine)
    yield from layer.dense_cases()
    steps = [SparseStep(call, settings.layer()) for call in layer.calls]
    yield _sparse(layer, steps, lambda _, step: step.undo().attend())
    yield from _block_cases(layer)


def prefill(machine: Machine, length: int) -> Iterator[Case]:
    """As many queries as keys."""
    length = machine.pick(length, 400)
    shape = Shape(length, queries=length, kv_heads=machine.pick(8, 2), dtype=machine.half)
    if length > machine.pick(_LONG, 300):
        quarter = replace(shape, length=length // 4, queries=length // 4)
        call = settings.with_known_ranges(references.call_of(quarter, machine))
        with torch.no_grad():
            found = microseconds(lambda _: attend(settings.layer(), call), machine, seconds=0)
        promised = 16 * found["measured_us"] / 1e6
        if promised > _MOST_SECONDS:
            yield Case("promised", lambda: _too_long(promised), shape.facts)
            return
        yield Case("promised", lambda: {"promised_seconds": promised}, shape.facts)
        del call
    layer = Layer(shape, machine)
    yield from layer.dense_cases()
    yield _sparse(layer, layer.calls, attend)
    yield from _block_cases(layer)


def _too_long(promised: float) -> dict[str, Any]:
    raise SkippedError(f"a quarter of the length promises {promised:.0f} seconds")
