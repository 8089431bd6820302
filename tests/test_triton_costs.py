"""What kernels move and compute, counted in Triton's interpreter, launch by launch as a call makes them.

Bytes are those of 32-byte sectors, each counted once a launch for reads and once for writes: what comes from or goes to
a GPU's memory if nothing of it is left in a cache from the launch before. What programs ask for, which caches answer in
part, is counted too. The shape is that of a layer of Llama-3.1-8B with one of its eight key heads, each of which costs
the same; the GPU has an eighth of an H100's multiprocessors.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_sparse import SparseAttentionConfig
from hf_sparse.attention import LayerState
from hf_sparse.call import AttentionCall, align
from hf_sparse.engines import ENGINES
from hf_sparse.kernels.layout import Layout
from hf_sparse.kernels.quantised import QuantisedKeys
from hf_sparse.selectors.grouped import by_triton
from tests import calls

pytest.importorskip("triton", reason="triton is not installed")
interpreter = importlib.import_module("triton.runtime.interpreter")
common = importlib.import_module("hf_sparse.kernels.triton.common")
importances = importlib.import_module("hf_sparse.kernels.triton.importance")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")

KV_HEADS, SHARE, DIM = 8, 4, 128
SECTOR = 32


@dataclass
class Cost:
    """Of all launches of a kernel, for all key heads.

    Attributes:
        moved: Bytes of the sectors that were read or written.
        asked: Bytes that programs read or wrote.
        flop: Floating-point or integer operations of matrix products.
        scores: Entries of the products that they were summed up to.
        operations: Elementwise operations on tiles of the shape of those.
    """

    moved: float = 0.0
    asked: float = 0.0
    flop: float = 0.0
    scores: float = 0.0
    operations: float = 0.0


@dataclass
class Meter:
    """Counts what interpreted kernels do.

    Attributes:
        costs: By the name of the kernel.
        sampled: Kernel -> of how many tiles of its second axis one is interpreted, and counted for all of them.
    """

    costs: dict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))
    sampled: dict[str, int] = field(default_factory=dict)
    _sectors: dict[str, list[Any]] = field(default_factory=lambda: {"read": [], "written": []})
    _shapes: set[tuple[int, ...]] = field(default_factory=set)
    _own: Cost = field(default_factory=Cost)

    def access(self, kind: str, pointers: Any, mask: Any) -> None:
        data = pointers.data
        addresses = data[np.broadcast_to(mask.data, data.shape)]
        self._own.asked += addresses.size * pointers.get_element_ty().primitive_bitwidth / 8
        self._sectors[kind].append(np.unique(addresses // np.uint64(SECTOR)))

    def product(self, left: Any, right: Any) -> None:
        rows, inner, columns = *left.data.shape, right.data.shape[1]
        self._own.flop += 2 * rows * inner * columns
        self._own.scores += rows * columns
        self._shapes.add((rows, columns))

    def elementwise(self, out: Any) -> None:
        if out.data.shape in self._shapes:
            self._own.operations += out.data.size

    def launch(self, name: str, grid: tuple[int, ...], run: Callable[[tuple[int, ...]], None]) -> None:
        self._own = Cost()
        for found in (*self._sectors.values(), self._shapes):
            found.clear()
        part = self.sampled.get(name, 1)
        run((grid[0], grid[1] // part, *grid[2:]))
        for sectors in self._sectors.values():
            self._own.moved += SECTOR * len(np.unique(np.concatenate(sectors))) if sectors else 0
        for quantity, value in vars(self._own).items():
            own = self.costs[name]
            setattr(own, quantity, getattr(own, quantity) + KV_HEADS * part * value)


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    meter, builder, kernel = Meter(), interpreter.InterpreterBuilder, interpreter.InterpretedFunction

    def counted(name: str, count: Callable[..., None], *, after: bool = False) -> None:
        original = getattr(builder, name)

        def method(self: Any, *args: Any, **options: Any) -> Any:
            if not after:
                count(*args)
            out = original(self, *args, **options)
            if after:
                count(out)
            return out

        monkeypatch.setattr(builder, name, method)

    counted("create_masked_load", lambda at, mask, *_: meter.access("read", at, mask))
    counted("create_masked_store", lambda at, _, mask, *__: meter.access("written", at, mask))
    counted("create_atomic_rmw", lambda _, at, __, mask, *___: meter.access("written", at, mask))
    counted("create_dot", lambda left, right, *_: meter.product(left, right))
    for name in ("binary_op", "unary_op", "ternary_op", "cast_impl"):
        counted(name, meter.elementwise, after=True)
    run = kernel.run

    def launch(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        meter.launch(self.fn.__name__, grid, lambda own: run(self, *args, grid=own, warmup=warmup, **options))

    monkeypatch.setattr(kernel, "run", launch)
    monkeypatch.setattr(common, "_multiprocessors", lambda _: 132 // KV_HEADS)
    return meter


class Ready(QuantisedKeys):
    """Keys that were quantised before: all components are 0."""

    def up_to(self, key: Tensor, stop: int, layout: Layout, **_: Any) -> tuple[Tensor, Tensor]:
        codes, scales = layout.allocate(key, stop)
        self._center = torch.zeros(*key.shape[:2], key.shape[3])
        return codes.fill_(0x88), scales.fill_(1)


def attend(q_len: int, kv_len: int) -> AttentionCall:
    """The last `q_len` of `kv_len` tokens, with the default law; the interpreter multiplies bfloat16 as its bits."""
    call = calls.inputs(
        calls.causal_intervals(q_len, kv_len, left=(0,), right=(0,)),
        kv_len,
        heads=SHARE,
        kv_heads=1,
        dim=DIM,
        dtype=torch.float16,
    )
    call = replace(call, quantised=Ready())
    state = LayerState(1, SparseAttentionConfig(selector="grouped"))
    plan = state.plan(call.ranges)
    assert plan is not None
    size = min(64, q_len)
    aligned = align(call, plan.budgets, size)
    selection = by_triton(aligned.call, aligned.budgets, state.config.always, size)
    ENGINES["triton"].attend(aligned.call, selection)
    return call


def drawn(groups: Any, values: Tensor, counts: Tensor) -> None:
    """Importance at random, of keys most of which were not ranked, and its counts over the past of the one group."""
    values.copy_(torch.rand(values.shape).pow(8).view(torch.int32))
    past = values[..., groups.sink_keys : groups.stop - groups.recent_keys] >> importances.SHIFT
    counts.copy_(torch.bincount(past.flatten(), minlength=counts.shape[-1]))


@torch.no_grad()
def test_bytes_of_a_decoded_token(meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a byte for a component of a key, its scale and importance; keys and values that are kept; and little else.

    Of 131,072 keys, 67 MB are components, and 24 MB the 5,793 keys and values that are kept.
    """
    length = 131_072
    original = importances.importance

    def importance(query: Tensor, groups: Any, *args: Any) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = original(query, groups, *args)
        drawn(groups, *found[:2])
        return found

    monkeypatch.setattr(importances, "importance", importance)
    meter.sampled = {"_sum_weights": 64}
    attend(1, length)
    found = {name: (round(cost.moved / 1e6, 1), round(cost.asked / 1e6, 1)) for name, cost in meter.costs.items()}
    most = {"_totals": 5, "_sum_weights": 78, "_best": 7, "_attend_tile": 26, "_join_parts": 1}
    assert found.keys() == most.keys()
    assert all(moved <= most[name] for name, (moved, _) in found.items()), found
    assert sum(moved for moved, _ in found.values()) <= 115, found
    assert sum(asked for _, asked in found.values()) <= 145, found


@torch.no_grad()
def test_operations_of_a_prefill(meter: Meter) -> None:
    """One product of 8-bit numbers for each key that a query sees, which is half of what dense attention computes.

    To the last 64 of 2,048 tokens, the keys that are looked at for totals, and those that are kept, are many.
    """
    call = attend(64, 2048)
    dense = 4 * DIM * KV_HEADS * SHARE * float(call.visible.sum())
    share = {name: round(cost.flop / dense, 3) for name, cost in meter.costs.items() if cost.flop}
    most = {"_totals": 0.085, "_sum_weights": 0.515, "_attend_tile": 0.43}
    assert share.keys() == most.keys()
    assert all(own <= most[name] for name, own in share.items()), share
    each = {name: round(cost.operations / cost.scores, 1) for name, cost in meter.costs.items() if cost.scores}
    limits = {"_totals": 26, "_sum_weights": 8, "_attend_tile": 16}
    assert all(own <= limits[name] for name, own in each.items()), each
