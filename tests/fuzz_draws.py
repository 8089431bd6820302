"""Random inputs, right and wrong, as users make them; every draw comes from one `random.Random`."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from hf_sparse import SparseAttentionConfig
from hf_sparse.call import AttentionCall

CARDS = Path(__file__).parents[1] / "model_cards"
POLICIES = sorted(CARDS.glob("*/sparse_config.json"))

# Values that no field, or hardly any, takes.
ODD: list[Any] = [
    *(None, True, False, "", "power", "x" * 300, -1, 0, 1, 2.5, -0.0, 1e-300, 1e300, 10**30, -(10**30)),
    *(float("nan"), float("inf"), [], {}, [1], {"a": 1}, {"0": [[1.0, 0.5]]}, [[1, 2]], (), b"x", 1j, "\ud800", "a\nb"),
]
# Field -> what is allowed, and now and then on its limits.
ALLOWED: dict[str, list[Any]] = {
    "alpha": [0.01, 1, 1.5, 3.0, 16.0, 1e6],
    "exponent": [0, 0.3, 0.5, 1.0],
    "law": ["power", "fixed", "fraction", "log"],
    "keys": [None, 1, 5, 1000],
    "fraction": [None, 0.01, 0.3, 1.0],
    "min_keys": [1, 2, 7, 1000],
    "max_keys": [None, 1, 8, 2**31 - 1],
    "sink_keys": [0, 1, 4, 100],
    "recent_keys": [0, 1, 5, 100],
    "selector": ["grouped", "topk", "window"],
    "dense_layers": [None, (), [0], (0, 0), range(1)],
    "dense_below": [0, 1, 20, None],
    "per_head": [None, {0: ((1.0, 0.5), (2.0, 0.5), (3.0, 0.2), (1.5, 0.9))}],
    "extra": [{}, {"later": [1, "a"]}],
}


_SHORT = {"alpha": 1.5, "min_keys": 2, "dense_below": 0, "dense_layers": ()}


def fields(draw: Random) -> dict[str, Any]:
    """Fields of a configuration: in half of the draws, one or two of them odd."""
    chosen = draw.sample(sorted(ALLOWED), draw.randint(0, 6))
    # Mostly so that keys of a short text are dropped.
    out: dict[str, Any] = dict(_SHORT) if draw.random() < 0.8 else {}
    out |= {name: draw.choice(ALLOWED[name]) for name in chosen}
    if out.get("law") in ("fixed", "fraction") and draw.random() < 0.8:
        name = {"fixed": "keys", "fraction": "fraction"}[out["law"]]
        out[name] = draw.choice(ALLOWED[name][1:])
    for _ in range(draw.choice((0, 0, 1, 2))):
        name = draw.choice([*ALLOWED, "engine", "calibration"])
        out[name] = draw.choice(ODD)
    return out


def sparse_config(draw: Random, **more: Any) -> SparseAttentionConfig:
    """A configuration that drops keys of short texts, or, where `fraction=1.0` is drawn, none."""
    law: dict[str, Any] = draw.choice(
        [{"alpha": draw.choice((0.5, 1.0, 2.0, 4.0))}, {"law": "fraction", "fraction": draw.choice((0.1, 0.4, 1.0))}]
    )
    return SparseAttentionConfig(
        min_keys=draw.choice((1, 3, 8)),
        sink_keys=draw.choice((0, 1, 4, 70)),
        recent_keys=draw.choice((0, 1, 4, 70)),
        selector=draw.choice(("grouped", "topk", "window")),
        dense_below=draw.choice((0, 0, 10)),
        dense_layers=(),
        **law | more,
    )


def policy_bytes(draw: Random) -> bytes:
    """A published policy with changes in its values or in its bytes."""
    data = json.loads(draw.choice(POLICIES).read_text(encoding="utf-8"))
    for _ in range(draw.randint(0, 3)):
        _change(data, draw)
    text = json.dumps(data, default=repr, ensure_ascii=draw.random() < 0.9)
    out = bytearray(text.encode("utf-8", "replace"))
    for _ in range(draw.choice((0, 0, 0, 1, 5))):
        place = draw.randrange(len(out))
        match draw.randrange(5):
            case 0:
                out[place] = draw.randrange(256)
            case 1:
                del out[place : place + draw.randint(1, 40)]
            case 2:
                out[place:place] = draw.choice((b"{", b"]", b'"', b"[" * 50, b"1e999", b"\x00", b"NaN", b',"alpha":1'))
            case 3:
                out[place:] = b""
            case 4:
                out[place:place] = out[: place + 40]
        if not out:
            break
    return bytes(out)


def _change(data: Any, draw: Random) -> None:
    """Change one value somewhere inside."""
    while isinstance(data, dict | list) and data:
        key = draw.choice(sorted(data)) if isinstance(data, dict) else draw.randrange(len(data))
        if isinstance(data[key], dict | list) and data[key] and draw.random() < 0.7:
            data = data[key]
            continue
        match draw.randrange(4):
            case 0:
                del data[key]
            case 1:
                data[key] = draw.choice([x for x in ODD if not isinstance(x, tuple | bytes | complex)])
            case 2:
                data[key] = [data[key]] * draw.randint(1, 3)
            case 3 if isinstance(data, dict):
                data[draw.choice(("later", "alpha", "schema_version", "-1", "selector"))] = draw.choice([1, "x", {}])
        return


def padding(draw: Random, batch: int, length: int) -> Tensor | None:
    """A 2-D mask `(batch, length)`: padding before, after and inside of texts, and sequences of nothing else."""
    if draw.random() < 0.2:
        return None
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in mask:
        kind = draw.choice(("none", "left", "right", "both", "holes", "all"))
        cut = draw.randint(0, length)
        if kind in ("left", "both"):
            row[: cut // 2] = 0
        if kind in ("right", "both"):
            row[length - cut // 3 :] = 0
        if kind == "holes":
            for place in draw.sample(range(length), length // 4):
                row[place] = 0
        if kind == "all":
            row[:] = 0
    return mask.bool() if draw.random() < 0.2 else mask


def own_mask(draw: Random, batch: int, heads: int, queries: int, keys: int) -> Tensor:
    """A 4-D mask: causal, with windows, random intervals, holes or rows that see nothing; bool, additive, or a bias."""
    own = torch.arange(keys - queries, keys)[:, None]
    place = torch.arange(keys)
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    mask = (place <= own).expand(draw.choice((1, batch)), 1, queries, keys).clone()
    kind = draw.choice(("causal", "window", "intervals", "holes", "dead", "any", "all", "heads"))
    if kind == "window":
        mask &= place > own - draw.randint(1, keys)
    if kind == "intervals":
        ends = torch.randint(0, keys + 1, (*mask.shape[:3], 2), generator=generator).sort(-1).values
        mask = (place >= ends[..., :1]) & (place < ends[..., 1:])
    if kind == "holes":
        mask &= torch.rand(mask.shape[0], 1, 1, keys, generator=generator) < 0.8
    if kind == "dead":
        mask &= torch.rand(*mask.shape[:3], 1, generator=generator) < 0.7
    if kind == "any":
        mask = torch.rand(mask.shape, generator=generator) < 0.5
    if kind == "all":
        mask[:] = False
    if kind == "heads":
        mask = mask.repeat(1, heads, 1, 1) & (torch.rand(1, heads, queries, keys, generator=generator) < 0.9)
    form = draw.choice(("bool", "bool", "finfo", "-inf", "bias", "int"))
    if form == "int":
        return mask.long()
    if form == "bool":
        return mask
    lowest = -torch.inf if form == "-inf" else torch.finfo(torch.float32).min
    out = torch.zeros(mask.shape).masked_fill(~mask, lowest)
    return out + torch.rand(out.shape, generator=generator) if form == "bias" else out


DTYPES = {torch.float32: 3e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2, torch.float64: 3e-4}
"""Dtypes, and how far two ways of attending in them may be apart."""


def attention_call(draw: Random) -> AttentionCall:
    """Queries, keys and values of any shape; `intervals` are empty: what queries see is in a mask."""
    batch, kv_heads, share = draw.choice((1, 1, 2, 3)), draw.choice((1, 2, 3)), draw.choice((1, 2, 3, 9))
    queries = draw.choice((1, 1, 2, 7, 40, 64, 70, 130))
    keys = queries + draw.choice((0, 0, 1, 5, 60, 300))
    dim = draw.choice((4, 8, 16, 20, 24, 64))
    dtype = draw.choice(list(DTYPES))
    generator = torch.Generator().manual_seed(draw.randrange(2**31))

    def states(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return AttentionCall(
        states(batch, kv_heads * share, queries, dim),
        states(batch, kv_heads, keys, dim) + (draw.choice((0, 3)) if dtype.itemsize > 2 else 0),
        states(batch, kv_heads, keys, draw.choice((dim, 5, 16))),
        torch.empty(0, dtype=torch.int32),
        draw.choice((1.0, 2.0)) * dim**-0.5,
        draw.choice((None, None, 2.0)),
        states(kv_heads * share) if draw.random() < 0.25 else None,
    )
