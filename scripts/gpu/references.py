"""Inputs of an attention call that show mistakes, and attention in float64 by plain PyTorch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gpu.cases import poisoned_beyond
from gpu.machine import Machine
from hf_sparse.call import AttentionCall, Selection, SharedSelection

SCORE_STD = 2.0
"""Standard deviation of scores: attention is neither uniform nor to one key alone."""

_FAR = 1 << 40


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention call; the defaults are a decode step of Llama-8B.

    Attributes:
        length: Keys.
        width: Candidate keys of a group of queries, at most `length`.
        queries: The last ones of a text of that many keys.
        group: Queries in a group.
        share: Query heads that share a key head.
    """

    length: int = 1000
    width: int = 250
    queries: int = 1
    group: int = 1
    batch: int = 1
    kv_heads: int = 8
    share: int = 4
    dim: int = 128
    value_dim: int | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def facts(self) -> dict[str, Any]:
        """The sizes as a record holds them."""
        return {"shape": asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")}}

    @property
    def name(self) -> str:
        """What differs from the defaults."""
        parts = [f"{name} {value}" for name, value in self.facts["shape"].items() if value != getattr(Shape(), name)]
        return ", ".join(part.replace("dtype ", "") for part in parts)


def call_of(shape: Shape, machine: Machine, seed: int = 0, **options: Any) -> AttentionCall:
    """Random queries, keys and values, and causal intervals. Behind the last key lies NaN, as in a cache's storage."""
    generator = machine.generator(seed)

    def states(heads: int, length: int, dim: int) -> Tensor:
        size = (shape.batch, heads, length, dim)
        return torch.randn(size, generator=generator, device=machine.device, dtype=shape.dtype)

    stop = torch.arange(shape.length - shape.queries + 1, shape.length + 1, dtype=torch.int32, device=machine.device)
    intervals = torch.stack([torch.zeros_like(stop), stop], dim=-1).expand(shape.batch, 1, -1, -1)
    key = states(shape.kv_heads, shape.length, shape.dim)
    value = states(shape.kv_heads, shape.length, shape.value_dim or shape.dim)
    return AttentionCall(
        states(shape.kv_heads * shape.share, shape.queries, shape.dim) * SCORE_STD,
        poisoned_beyond(key, 2, 37, torch.nan),
        poisoned_beyond(value, 2, 37, torch.nan),
        intervals.contiguous(),
        shape.dim**-0.5,
        **options,
    )


def selection_of(shape: Shape, machine: Machine, *, per_head: bool = False, seed: int = 0) -> Selection:
    """Random candidates of each group, of which each pair is allowed most, and one pair in each group nothing.

    Three more candidates, which no pair is allowed, name the first key once more. Behind each list lie positions far
    beyond the keys, and permission to read them.
    """
    generator = machine.generator(seed)
    groups = shape.queries // shape.group * (shape.share if per_head else 1)
    pairs = shape.group * (1 if per_head else shape.share)
    lists = shape.batch * shape.kv_heads * groups
    kept = min(shape.width, shape.length)
    chosen = [
        torch.randperm(shape.length, generator=generator, device=machine.device)[:kept].sort().values
        for _ in range(lists)
    ]
    positions = torch.stack(chosen).view(shape.batch, shape.kv_heads, groups, kept)
    positions = torch.nn.functional.pad(positions, (0, 3))
    uniform = torch.rand(*positions.shape[:3], pairs, kept + 3, generator=generator, device=machine.device)
    allowed = uniform < 0.8
    allowed[..., 0] = True
    allowed[..., kept:] = False
    if pairs > 1:
        allowed[:, :, :, -1] = False
    positions, allowed = poisoned_beyond(positions, 3, 13, _FAR), poisoned_beyond(allowed, 4, 13, True)
    return Selection(positions, allowed, shape.group, per_head)


def runs_of(selection: Selection, shape: Shape, machine: Machine, seed: int = 0) -> SharedSelection:
    """The same lists, of which each pair keeps three runs: from the start, from a half on, and up to the last quarter.

    The last pair of a group keeps nothing.
    """
    kept = min(shape.width, shape.length)
    generator = torch.Generator().manual_seed(seed)
    pairs = selection.allowed.shape[:4]
    starts = torch.tensor([0, kept // 2, kept - kept // 4]).expand(*pairs, 3)
    room = torch.tensor([kept // 2, kept - kept // 4 - kept // 2, kept // 4])
    lengths = (torch.rand(*pairs, 3, generator=generator) * (room + 1)).long()
    lengths[:, :, :, -1] *= shape.group == shape.share == 1
    runs = torch.stack([starts, starts + lengths], dim=-1)
    return SharedSelection(selection.positions, runs.to(machine.device), selection.queries_per_group)


def attend(call: AttentionCall, selection: Selection) -> Tensor:
    """Attention to the allowed keys in float64, a group at a time: `(batch, heads, q_len, value_dim)`."""
    batch, heads, queries, _ = call.query.shape
    kv_heads, dim = call.value.shape[1], call.value.shape[3]
    pairs = selection.pairs_of(call.query, kv_heads)
    sinks = None
    if call.sinks is not None:
        every = call.sinks.double()[None, :, None].expand(batch, heads, queries)
        sinks = selection.pairs_of(every, kv_heads)
    out = torch.zeros(*pairs.shape[:4], dim, dtype=torch.float64, device=pairs.device)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in pairs.shape[:3])).tolist():
        b, h, g = place
        position = selection.positions[b, h, g]
        scores = pairs[b, h, g].double() @ call.key[b, h][position].double().T * call.scaling
        if call.softcap is not None:
            scores = call.softcap * (scores / call.softcap).tanh()
        scores = scores.masked_fill(~selection.allowed[b, h, g], -torch.inf)
        own = scores if sinks is None else torch.cat([scores, sinks[b, h, g, :, None]], dim=-1)
        # A pair without keys has no maximum, and no weights.
        weights = (scores - own.amax(-1, keepdim=True).clamp(min=-1e30)).exp()
        total = (own - own.amax(-1, keepdim=True).clamp(min=-1e30)).exp().sum(-1, keepdim=True)
        out[b, h, g] = weights / total.clamp(min=1e-300) @ call.value[b, h][position].double()
    return selection.queries_of(out, heads)


def as_projected(states: Tensor) -> Tensor:
    """The same numbers in memory `(batch, length, heads, dim)`, as projections leave them."""
    return states.transpose(1, 2).contiguous().transpose(1, 2)
