"""The selector on the GPU, whatever kernels it has there, against PyTorch on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gpu import references, settings
from gpu.cases import Case, poisoned_memory
from gpu.machine import Machine
from gpu.references import Shape
from hf_sparse.call import AlwaysKept, AttentionCall, Selection, align
from hf_sparse.call.groups import Aligned
from hf_sparse.selectors import find_selector
from hf_sparse.visibility import VisibleRanges, interval_to_mask

LEAST_OVERLAP = 0.98
"""Of the keys that PyTorch keeps on the CPU, the share that must be kept: sums are rounded in another order."""


_FEW = 2000


@contextmanager
def _without_compiled_kernels() -> Iterator[None]:
    os.environ["HF_SPARSE_KERNELS"] = "0"
    try:
        yield
    finally:
        del os.environ["HF_SPARSE_KERNELS"]


def on_cpu(call: AttentionCall) -> AttentionCall:
    """The same call with all its tensors on the CPU."""
    states = {field.name: getattr(call, field.name) for field in fields(call)}
    moved = {name: x.cpu() for name, x in states.items() if isinstance(x, Tensor)}
    return replace(call, **moved, known_ranges=None)


def problem(call: AttentionCall, *, uneven: bool = False, **law: Any) -> Aligned:
    """A call and its budgets, with its blocks of queries where they belong.

    Args:
        call: The call.
        uneven: Whether every other head keeps half as many keys.
        **law: Fields of the configuration.
    """
    plan = settings.layer(**law).plan(call.ranges)
    assert plan is not None
    budgets = plan.budgets
    if uneven:
        share = 1 + torch.arange(call.query.shape[1]).view(-1, 1) % 2
        budgets = -(-budgets // share)
    return align(call, budgets, find_selector(settings.SELECTOR).group_queries)


def always() -> AlwaysKept:
    """The sinks and recent keys of all checks."""
    return settings.config().always


def chosen(call: AttentionCall, budgets: Tensor, machine: Machine) -> Selection:
    """What the selector keeps on a machine: on a GPU or in the interpreter, by Triton's kernels."""
    selector = find_selector(settings.SELECTOR)
    if machine.interprets:
        by_triton = import_module(type(selector).__module__).by_triton
        selection: Selection = by_triton(call, budgets, always(), min(selector.group_queries, call.query.shape[2]))
        return selection
    return selector.select(call, budgets, always())


def mask_of(selection: Selection, call: AttentionCall) -> Tensor:
    """Kept keys, bool `(batch, heads, q_len, kv_len)`."""
    return selection.mask(call.query.shape[1], call.key.shape[2])


def verdict(mask: Tensor, again: Tensor, want: Tensor, call: AttentionCall, budgets: Tensor) -> dict[str, Any]:
    """Budgets that are kept exactly, nothing invisible, and the keys that PyTorch keeps."""
    found: dict[str, Any] = {}
    wanted = budgets.to(mask.device).expand(mask.shape[:3])
    number = mask.sum(-1)
    invisible = mask & ~interval_to_mask(call.intervals, mask.shape[3])
    same = (mask & want).sum(-1)
    overlap = float(same.sum() / want.sum().clamp(min=1))
    each = same / want.sum(-1).clamp(min=1) + (want.sum(-1) == 0)
    for name, bad in (
        ("budget", number != wanted),
        ("invisible", invisible.any(-1)),
        ("repeats", (mask != again).any(-1)),
    ):
        if bool(bad.any()):
            place = tuple(bad.nonzero()[0].tolist())
            found[name] = {"queries": int(bad.sum()), "first": list(place), "got": int(number[place])}
            found[name] |= {"want": int(wanted[place]), "positions": mask[place].nonzero().flatten()[:20].tolist()}
    worst = tuple(int(x) for x in torch.unravel_index(each.argmin(), each.shape))
    missing = (want[worst] & ~mask[worst]).nonzero().flatten()[:20].tolist()
    found["overlap"] = {"of_all": overlap, "least": float(each.min()), "query": list(worst), "missing": missing}
    return found | {"status": "wrong" if overlap < LEAST_OVERLAP or len(found) > 1 else "ok"}


def case(
    shape: Shape, machine: Machine, name: str = "", pads: tuple[int, ...] = (), uneven: bool = False, **options: Any
) -> Case:
    """The selector in a call of that shape.

    Args:
        shape: Of the call; its `width` and `group` are not read.
        machine: Where it runs.
        name: Of the case.
        pads: For each sequence, pad tokens before the first of its text.
        uneven: Whether budgets differ between heads.
        **options: Soft cap or sinks.
    """

    def run() -> dict[str, Any]:
        call = references.call_of(shape, machine, **options)
        if pads:
            start = torch.tensor(pads, dtype=torch.int32, device=machine.device).view(-1, 1, 1)
            first, stop = call.intervals.unbind(-1)
            alive = stop > start
            call = replace(call, intervals=torch.stack([(first + start) * alive, stop * alive], dim=-1))
        # Of few keys, the default law leaves out hardly any.
        law = {"alpha": 4.0, "min_keys": 80} if shape.length < _FEW else {}
        given = problem(call, uneven=uneven, **law)
        plain = on_cpu(given.call)
        plain = replace(plain, known_ranges=VisibleRanges(plain.intervals))
        with _without_compiled_kernels():
            selected = find_selector(settings.SELECTOR).select(plain, given.budgets, always())
        want = mask_of(selected, plain).to(machine.device)
        with poisoned_memory():
            mask = mask_of(chosen(given.call, given.budgets, machine), given.call)
        again = mask_of(chosen(given.call, given.budgets, machine), given.call)
        found = verdict(mask, again, want, given.call, given.budgets)
        reason = find_selector(settings.SELECTOR).uncompiled_reason(given.call)
        return found if machine.interprets or reason is None else found | {"status": "wrong", "uncompiled": reason}

    return Case(name or shape.name or "defaults", run, shape.facts)


def basic(machine: Machine) -> Iterator[Case]:
    """Decoding, prefills, several sequences that are padded, soft caps, budgets by head."""
    length, more, queries = machine.pick((8192, 8191, 1024), (300, 401, 64))
    kv_heads, dtype = machine.pick(8, 1), machine.half
    decode = Shape(length, kv_heads=kv_heads, dtype=dtype)
    prefill = replace(decode, queries=queries)
    yield case(decode, machine)
    yield case(prefill, machine)
    yield case(replace(decode, length=more, batch=3), machine, "decode, padded", pads=(0, 100, 333))
    yield case(replace(prefill, length=queries, batch=3), machine, "prefill, padded", pads=(0, queries // 3, 7))
    for kind, shape in (("decode", decode), ("prefill", prefill)):
        yield case(shape, machine, f"{kind}, softcap", softcap=1.5)
        yield case(shape, machine, f"{kind}, budgets by head", uneven=True)
        yield case(replace(shape, dtype=torch.float32), machine, f"{kind}, float32")


def dims(machine: Machine) -> Iterator[Case]:
    """Sizes of a head, GQA and lengths."""
    queries = machine.pick(128, 64)
    for dim in machine.pick((64, 80, 96, 128, 256), (80,)):
        base = Shape(machine.pick(4000, 600), kv_heads=2, dim=dim, dtype=machine.half)
        yield case(base, machine)
        yield case(replace(base, queries=queries), machine)
    for share in machine.pick((1, 3, 7, 16), (3,)):
        for length in machine.pick((300, 1000, 1025, 5000), (300,)):
            base = Shape(length, kv_heads=2, share=share, batch=3, dtype=machine.half)
            yield case(base, machine)
            yield case(replace(base, queries=queries), machine)
    for length in (1, 15, 16, 17):
        yield case(Shape(length, kv_heads=2, dtype=machine.half), machine)
        yield case(Shape(length, queries=length, kv_heads=2, dtype=machine.half), machine)


def long(machine: Machine) -> Iterator[Case]:
    """131,072 keys, and 1,048,576 once."""
    yield case(Shape(machine.pick(131072, 1200), kv_heads=machine.pick(8, 1), dtype=machine.half), machine)
    yield case(Shape(machine.pick(131072, 300), queries=64, kv_heads=1, dtype=machine.half), machine)
    yield case(Shape(machine.pick(1 << 20, 2100), kv_heads=1, dtype=machine.half), machine)
