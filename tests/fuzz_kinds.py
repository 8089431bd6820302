"""What is done with random inputs of each kind, and what must come of it.

An input is held, if results are those of the specification; or refused, with an error of the documented kind: one line,
a `ValueError` or `TypeError`, and nothing is changed. Everything else is wrong.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import hf_sparse
from hf_sparse import SparseAttentionConfig
from hf_sparse.attention import LayerState, attend_under
from hf_sparse.cache import SparseCache
from hf_sparse.call import AttentionCall
from hf_sparse.config import files
from tests import fuzz_draws as draws
from tests import tiny

TOLERANCE = 3e-4
LOWEST = torch.finfo(torch.float32).min / 2
"""What an additive mask holds for a hidden key is less."""

ALL_KEYS = SparseAttentionConfig(law="fraction", fraction=1.0, dense_below=0, dense_layers=())


class WrongError(Exception):
    """What an input came to is neither right nor an error of the documented kind."""


class RefusedError(Exception):
    """The input was refused, as it should be."""


def outcome(kind: str, draw: Random) -> tuple[str, str]:
    """`held`, `refused` or `wrong`, and in a few words why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            KINDS[kind](draw)
    except RefusedError as error:
        return "refused", str(error)
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"[:500]
    return "held", ""


def refused(error: Exception, *named: str) -> RefusedError:
    """The error of a refusal, which must be one line that names one of these."""
    said = str(error)
    if not isinstance(error, ValueError | TypeError) or not said or "\n" in said or len(said) > 1000:
        raise WrongError(f"not a documented error: {type(error).__name__}: {said[:300]!r}") from error
    if named and not any(name in said for name in named):
        raise WrongError(f"the error names none of {', '.join(named)}: {said[:300]!r}") from error
    return RefusedError(said)


def require(holds: Any, what: str) -> None:
    if not holds:
        raise WrongError(what)


def same(ours: Tensor, theirs: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    require(ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} and {tuple(theirs.shape)}")
    require(ours.isfinite().all(), f"{what}: not finite")
    off = (ours.double() - theirs.double()).abs() / (1 + theirs.double().abs())
    require(not off.numel() or off.max() <= tolerance, f"{what}: off by {float(off.max()) if off.numel() else 0:.3g}")


NAMES = ("llama", "mistral", "gemma2", "gpt_oss", "gpt2")


@cache
def model(name: str) -> PreTrainedModel:
    """A dense model of one layer: what engines round differently cannot change what a later layer keeps."""
    extra = {"layer_types": ["full_attention"]} if name in tiny.HYBRID else {}
    return tiny.model(name, num_hidden_layers=1, **extra)


# Fields of a configuration.


def config(draw: Random) -> None:
    given = draws.fields(draw)
    try:
        built = SparseAttentionConfig(**given)
    except Exception as error:
        raise refused(error, *given) from None
    again = SparseAttentionConfig.from_dict(json.loads(json.dumps(built.to_dict(), allow_nan=False)))
    require(again == built, f"{again} is not {built}")
    seen = torch.tensor([0, 1, 2, 5, 100, 100_000])
    kept = built.budget(0)(seen)
    require(((kept <= seen) & (kept >= seen.clamp(max=1))).all(), f"budgets {kept.tolist()} of {seen.tolist()}")
    own, ids = model("llama"), tiny.tokens(2, 40)
    dense = tiny.logits(own, ids)
    try:
        with hf_sparse.patched(own, built):
            ours = tiny.logits(own, ids)
            hf_sparse.patch(own, replace(built, engine="reference"))
            same(ours, tiny.logits(own, ids), "engines")
    except (ValueError, TypeError) as error:
        raise refused(error, *given) from None
    finally:
        require(not hf_sparse.is_patched(own), "half patched")
        require(torch.equal(tiny.logits(own, ids), dense), "unpatched, the model is another one")


# Files.


def policy(draw: Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / files.NAME
        path.write_bytes(draws.policy_bytes(draw))
        try:
            found = files.load(draw.choice((path, str(path), folder)))
        except Exception as error:
            require(len(str(error)) < len(str(path)) + 500, f"an error of {len(str(error))} characters")
            raise refused(error, str(path)) from None
        files.write(found, path)
        require(files.read(path) == found, "written and read, it is another one")


# Attention of one layer, under any mask.


def attention(draw: Random) -> None:
    call, settings = draws.attention_call(draw), draws.sparse_config(draw)
    batch, heads, queries, _ = call.query.shape
    mask = draws.own_mask(draw, batch, heads, queries, call.key.shape[2])
    if call.query.dtype == torch.float16 and mask.is_floating_point():
        mask = mask.clamp(min=torch.finfo(torch.float32).min)
    states = [LayerState(0, replace(settings, engine=engine)) for engine in ("reference", "auto", "gather")]
    every = LayerState(0, replace(ALL_KEYS, selector=settings.selector))
    arguments: dict[str, Any] = {"scaling": call.scaling, "softcap": call.softcap, "sinks": call.sinks}
    try:
        outs = [attend_under(mask, x, call.query, call.key, call.value, **arguments)[0] for x in (*states, every)]
    except Exception as error:
        raise refused(error, "attention_mask") from None
    tolerance = draws.DTYPES[call.value.dtype]
    for state, out in zip(states[1:], outs[1:], strict=False):
        same(out, outs[0], f"engine {state.config.engine}", tolerance)
    # SDPA gives the mean of all values to a query from which a bias hides everything by finite numbers.
    seen = (mask if mask.dtype == torch.bool else mask > LOWEST).any(-1).all(1).expand(batch, -1)
    zeros = "mask is not an interval" not in every.counters.dense_queries
    exact = _exact(call, mask)
    same(outs[3] if zeros else outs[3][seen], exact if zeros else exact[seen], "all keys", tolerance)
    _check_counts(states[1], mask, settings, call)


def _exact(call: AttentionCall, mask: Tensor) -> Tensor:
    """Dense attention in float64: `(batch, q_len, heads, value_dim)`; zeros for queries that see nothing."""
    key, value = (x.double().repeat_interleave(call.group_size, 1) for x in (call.key, call.value))
    scores = call.query.double() @ key.transpose(-1, -2) * call.scaling
    if call.softcap is not None:
        scores = call.softcap * (scores / call.softcap).tanh()
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    scores = scores.masked_fill(scores < LOWEST, -torch.inf)
    if call.sinks is not None:
        scores = torch.cat([scores, call.sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1).nan_to_num(0)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2)


def _check_counts(state: LayerState, mask: Tensor, settings: SparseAttentionConfig, call: AttentionCall) -> None:
    """Each query keeps its budget where the mask is made of intervals."""
    counters = state.counters
    require(counters.calls == 1, "calls")
    if "mask is not an interval" in counters.dense_queries:
        return
    visible = mask if mask.dtype == torch.bool else mask == 0
    seen = visible[:, 0].sum(-1).expand(call.query.shape[0], -1)
    require(counters.visible == int(seen.sum()), f"{counters.visible} visible keys, not {int(seen.sum())}")
    wanted = int(settings.budget(0)(seen).sum())
    require(set(counters.kept()) == {wanted}, f"{counters.kept()} kept keys, not {wanted}")


# Masks and lengths, through whole models.


def masks(draw: Random) -> None:
    own = model(draw.choice(NAMES))
    batch, length = draw.choice((1, 2, 3)), draw.choice((0, 1, 2, 9, 33, 66, 140))
    ids = tiny.tokens(batch, length, seed=draw.randrange(1000))
    if length and draw.random() < 0.3:
        mask: Tensor | None = draws.own_mask(draw, batch, 4, length, length)
    else:
        mask = draws.padding(draw, batch, length)
    dense, failure, found = None, None, []
    try:
        # Eager attention takes a bool mask for numbers to add.
        is_bool = mask is not None and mask.dim() == 4 and mask.dtype == torch.bool
        dense = tiny.logits(own, ids, torch.zeros(mask.shape).masked_fill(~mask, 2 * LOWEST) if is_bool else mask)
    except Exception as error:
        failure = type(error)
    drawn = draws.sparse_config(draw)
    try:
        for chosen in (replace(ALL_KEYS, selector=drawn.selector), drawn, replace(drawn, engine="reference")):
            with hf_sparse.patched(own, chosen):
                found.append(tiny.logits(own, ids, mask))
    except Exception as error:
        if dense is None and type(error) is failure:
            raise RefusedError(f"as the dense model does: {error}") from None
        raise refused(error, "attention_mask") from None
    finally:
        require(not hf_sparse.is_patched(own), "half patched")
    for logits in found:
        require(logits.isfinite().all(), "logits are not finite")
    same(found[1], found[2], "engines")
    if dense is None:
        return
    real = torch.ones(batch, length, dtype=torch.bool) if mask is None or mask.dim() == 4 else mask.bool()
    if mask is not None and mask.dim() == 4:
        shown = mask if mask.dtype == torch.bool else mask > LOWEST
        real = shown.any(-1).all(1).expand(batch, -1)
    same(found[0][real], dense[real], "all keys")


# Caches.


def caches(draw: Random) -> None:
    own, batch = model(draw.choice(NAMES)), draw.choice((1, 2, 3))
    steps = [draw.choice((1, 1, 1, 2, 17, 40)) for _ in range(draw.randint(2, 4))]
    changes = [draw.choice(("", "", "", "crop", "reorder", "repeat", "select")) for _ in steps]
    left = [draw.choice((0, 0, 3)) for _ in range(batch)]
    seed, settings = draw.randrange(1000), draws.sparse_config(draw)
    static = not any(changes) and draw.random() < 0.4

    @torch.no_grad()
    def run(past: Any) -> Tensor:
        order, out = Random(seed), []
        mask = torch.tensor(
            [[0] * pads + [1] * (steps[0] - pads) if pads < steps[0] else [1] * steps[0] for pads in left]
        )
        for i, (size, change) in enumerate(zip(steps, changes, strict=True)):
            if i:
                mask = torch.cat([mask, mask.new_ones(len(mask), size)], dim=1)
            ids = tiny.tokens(len(mask), size, seed=seed + i)
            place = tiny.positions(mask)[:, -size:]
            logits = own(ids, attention_mask=mask, position_ids=place, past_key_values=past).logits
            out.append(logits.float()[mask[:, -size:].bool()])
            if change == "crop" and mask.shape[1] > 1:
                number = order.randint(1, mask.shape[1] - 1)
                past.crop(-number)
                mask = mask[:, : mask.shape[1] - number]
            if change in ("reorder", "select"):
                index = [order.randrange(len(mask)) for _ in range(len(mask) if change == "reorder" else 1)]
                chosen = torch.tensor(index)
                (past.reorder_cache if change == "reorder" else past.batch_select_indices)(chosen)
                mask = mask[chosen]
            if change == "repeat":
                past.batch_repeat_interleave(2)
                mask = mask.repeat_interleave(2, 0)
        return torch.cat(out)

    def stock() -> Any:
        return DynamicCache(config=own.config)

    def other() -> Any:
        return StaticCache(config=own.config, max_cache_len=sum(steps) + 3) if static else SparseCache(own.config)

    try:
        dense = run(stock())
    except RuntimeError as error:  # such as a sliding layer that is to be cropped
        raise RefusedError(f"as the dense model does: {error}") from None
    found = []
    reference = replace(settings, engine="reference")
    for chosen, past in ((ALL_KEYS, other()), (settings, other()), (reference, stock())):
        with hf_sparse.patched(own, chosen):
            found.append(run(past))
    require(not hf_sparse.is_patched(own), "half patched")
    same(found[0], dense, "all keys")
    same(found[1], found[2], "caches")


KINDS: dict[str, Callable[[Random], None]] = {
    "config": config,
    "policy": policy,
    "attention": attention,
    "masks": masks,
    "caches": caches,
}
"""Kinds of input."""
