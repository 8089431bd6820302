"""The kernels that find keys, one by one: keys in 4 bits, the importance of keys, and lists of the most important.

The checks in `gpu.selection` take all of them together, and leave room for rounding; of what they compute from each
other's results, these leave none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gpu import references, selection
from gpu.cases import Case, compared, poisoned_beyond, poisoned_memory
from gpu.machine import Machine
from gpu.references import Shape
from hf_sparse import AttentionCall
from hf_sparse.call import pairs_of
from hf_sparse.selectors import importance
from hf_sparse.selectors.layout import GroupLayout

_POISON = 127

_MOST_OFF = 1e-4
"""Share of numbers that may be rounded to the other neighbour: they lie in the middle, but for rounding."""

_LIMIT = 1e-4
"""Error of importance: sums of the same weights in another order."""


def codes(machine: Machine) -> Iterator[Case]:
    """Keys in 4 bits against PyTorch's, and memory around them that must stay as it was."""
    for dtype in machine.dtypes:
        for dim in machine.pick((64, 80, 96, 128, 256), (80, 256)):
            for start, stop in ((0, machine.pick(5000, 70)), (33, 34), (7, 60)):
                shape = Shape(stop, batch=2, kv_heads=2, dim=dim, dtype=dtype)
                yield _codes_case(shape, start, machine)
    # 3 x 6 x 2^20 keys of 128 numbers are 2.4 x 10^9: places of them do not fit into 32 bits.
    yield _codes_case(Shape(machine.pick(1 << 20, 100), batch=3, kv_heads=6, dtype=machine.half), 0, machine)


def _codes_case(shape: Shape, start: int, machine: Machine) -> Case:
    def run() -> dict[str, Any]:
        from hf_sparse.kernels.triton.codes import LAYOUT

        size = (shape.batch, shape.kv_heads, shape.length, shape.dim)
        states = torch.randn(size, generator=machine.generator(0), device=machine.device, dtype=shape.dtype)
        key = poisoned_beyond(states, 2, 37, torch.nan)
        key[:, :, start] = 0  # a vector of zeros has no scale
        del states
        found = LAYOUT.allocate(key, shape.length + 20)
        for part in found:
            part.fill_(_POISON)
        center = torch.randn(*size[:2], shape.dim, generator=machine.generator(1), device=machine.device)
        LAYOUT.quantise(key, start, shape.length, found, center)
        written = slice(start, shape.length)
        untouched = all(bool((part[:, :, span] == _POISON).all()) for part in found for span in _outside(written))
        scales = torch.empty_like(found[1][:, :, written])
        others, far, first = 0, False, []
        for i in range(shape.batch):  # a sequence at a time, for PyTorch takes several times the memory
            own = importance.LAYOUT.allocate(key[i : i + 1], shape.length)
            importance.LAYOUT.quantise(key[i : i + 1], start, shape.length, own, center[i : i + 1])
            both, want = found[0][i, :, written], own[0][0, :, written]
            got = torch.cat([both & 15, both >> 4], dim=-1)[..., : shape.dim].to(torch.int8) - 8
            scales[i] = own[1][0, :, written]
            other = got != want
            others += int(other.sum())
            far |= bool(((got - want).abs() > 1).any())
            first += [[i, *place] for place in other.nonzero()[:5].tolist()]
        verdict = compared(found[1][:, :, written], scales, 1e-6)
        off = {"untouched": untouched, "other": others, "of": scales.numel() * shape.dim, "first": first[:5]}
        wrong = far or not untouched or others > _MOST_OFF * off["of"]
        return verdict | off | ({"status": "wrong"} if wrong else {})

    return Case(f"{shape.name}, from {start}", run, shape.facts)


def _outside(written: slice) -> tuple[slice, slice]:
    return slice(0, written.start), slice(written.stop, None)


@dataclass
class Launch:
    """One call of a function that launches kernels: its inputs as they were before it, and its result."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]
    result: Any = None

    def again(self) -> Any:
        """The same call."""
        return self.function(*self.args, **self.options)


def launches(call: AttentionCall, budgets: Tensor, machine: Machine) -> dict[str, Launch]:
    """How the selector calls `importance` and `best`, of modules of these names, for a call."""
    modules = {name: import_module(f"hf_sparse.kernels.triton.{name}") for name in ("importance", "best")}
    found: dict[str, Launch] = {}

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call_and_keep(*args: Any, **options: Any) -> Any:
            before = tuple(x.clone() if isinstance(x, Tensor) else x for x in args)
            found[name] = Launch(function, before, options, function(*args, **options))
            return found[name].result

        return call_and_keep

    with ExitStack() as patches:
        for name, module in modules.items():
            patches.enter_context(mock.patch.object(module, name, recorded(name, getattr(module, name))))
        selection.chosen(call, budgets, machine)
    return found


@dataclass
class Found:
    """What went into and came out of `hf_sparse.kernels.triton.best.best` while keys were selected.

    Attributes:
        values: Bits of importance, int32 `(batch, kv_heads, groups, keys)`, of keys from `base` on.
        counts: How many keys of the past have which first bits.
        base: See `values`.
        near: Where the keys of the past begin in a list.
        shift: Bits of a number after the first ones that are counted.
        positions: The lists.
        runs: What pairs keep of them.
    """

    values: Tensor
    counts: Tensor
    base: int
    near: int
    shift: int
    positions: Tensor
    runs: Tensor

    @classmethod
    def of(cls, call: AttentionCall, budgets: Tensor, machine: Machine) -> Found:
        """Select keys for a call."""
        from hf_sparse.kernels.triton.importance import SHIFT

        with poisoned_memory():
            best = launches(call, budgets, machine)["best"]
        values, counts, _, groups = best.args[:4]
        return cls(values, counts, groups.base, groups.near, SHIFT, *best.result[:2])


def groups(machine: Machine) -> Iterator[Case]:
    """Importance, counts and lists, of one group or many, for keys that are often equal too."""
    length, queries = machine.pick((8192, 1024), (300, 64))
    decode = Shape(length, kv_heads=machine.pick(8, 1), dtype=machine.half)
    prefill = replace(decode, queries=queries)
    yield _groups_case(decode, machine, "decode")
    yield _groups_case(prefill, machine, "prefill")
    yield _groups_case(decode, machine, "decode, equal keys", equal=True)
    yield _groups_case(prefill, machine, "prefill, equal keys", equal=True)
    yield _groups_case(prefill, machine, "prefill, softcap, budgets by head", uneven=True, softcap=1.5)
    yield _groups_case(replace(decode, length=machine.pick(131072, 700)), machine, "decode, long")
    yield _groups_case(replace(decode, length=machine.pick(1 << 20, 1200), kv_heads=1), machine, "decode, very long")
    for share in machine.pick((1, 3, 7, 16), ()):
        for dim in (64, 80, 256):
            shape = Shape(3000, queries=128, batch=3, kv_heads=2, share=share, dim=dim, dtype=machine.half)
            yield _groups_case(shape, machine, f"prefill, {share} heads of {dim}")
            yield _groups_case(replace(shape, queries=1), machine, f"decode, {share} heads of {dim}")


def _groups_case(
    shape: Shape, machine: Machine, name: str, equal: bool = False, uneven: bool = False, **options: Any
) -> Case:
    def run() -> dict[str, Any]:
        call = references.call_of(shape, machine, **options)
        if equal:
            # Every key stands 16 times in the text.
            place = torch.arange(shape.length, device=machine.device) % (shape.length // 16)
            call = replace(call, key=call.key[:, :, place])
        law = {"alpha": 4.0, "min_keys": 80} if shape.length < 2000 else {}
        given = selection.problem(call, uneven=uneven, **law)
        size = min(64, given.call.query.shape[2])
        found = Found.of(given.call, given.budgets, machine)
        layout = GroupLayout.of(given.call, given.budgets, selection.always(), size)
        return _verdict(found, given.call, layout)

    return Case(name, run, shape.facts)


def _verdict(found: Found, call: AttentionCall, layout: GroupLayout) -> dict[str, Any]:
    """Importance as PyTorch has it; counts and lists as they follow from the importance that the kernel found."""
    pairs = pairs_of(call.query, call.key.shape[1], layout.size).float() * call.scaling
    want = importance.importance(pairs, replace(call, quantised=None), layout)
    keys = want.shape[3] - found.base
    position = torch.arange(found.base, want.shape[3], device=want.device)
    past = ((position >= layout.edge_stop) & (position < layout.local_start)).expand(*found.values.shape[:3], -1)
    bits = found.values[..., :keys].masked_fill(~past, 0)
    verdict = compared(bits.view(torch.float32), want[..., found.base :].masked_fill(~past, 0), _LIMIT)

    bins = (bits >> found.shift).long()
    counts = torch.zeros_like(found.counts).scatter_add_(3, bins, past.to(found.counts.dtype))
    miscounted = int((counts != found.counts).sum())

    ranked = found.runs[..., 2, 1] - found.runs[..., 2, 0]
    misplaced = int(((ranked != layout.ranked) | (ranked > 0) & (found.runs[..., 2, 0] != found.near)).sum())
    # The most important first, of equal ones the most recent.
    order = bits.masked_fill(~past, -1).flip(-1).sort(dim=-1, descending=True, stable=True).indices
    best = want.shape[3] - 1 - order
    unlike = []
    for number in layout.ranked.unique().tolist():
        mine, right = (x[..., :number].sort(-1).values for x in (found.positions[..., found.near :], best))
        wrong = (mine != right).any(-1) & (layout.ranked == number).any(-1)
        unlike += [[number, *place] for place in wrong.nonzero().tolist()]
    verdict |= {"counts_wrong": miscounted, "pairs_with_other_runs": misplaced, "groups_with_other_lists": unlike[:10]}
    return verdict | ({"status": "wrong"} if miscounted or misplaced or unlike else {})
