"""What a method costs on a text: how likely what follows it is, and the answers to questions about it.

Needs PyTorch and transformers alone, so that the same code measures every method in an environment of its own. A text
is read in one pass; what follows it, or each question, is then read in another pass, on a copy of the text's cache.
"""

import copy
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHARES = (0.5, 0.25, 0.125)
"""Of the keys, how many are kept."""

RIVAL_DENSE = "dense, older transformers"
"""The dense model where the rivals run."""

BLOCK = 32
"""Tokens whose likelihoods are stored as one sum."""

Block = Callable[[], AbstractContextManager[Any]]


def cache_name(model: Any) -> str:
    """What a model calls its cache: transformers 5.24 gave it the shorter name."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def continued(model: Any, cache: Any, ids: Tensor, start: int) -> Tensor:
    """The logits of int64 `(length,)` after a cache, which is extended: `(length, vocabulary)`.

    Args:
        model: Any causal language model.
        cache: What was read before, of which keys may be missing.
        ids: What to read.
        start: The position of its first token.
    """
    positions = torch.arange(start, start + len(ids))[None]
    options = {cache_name(model): cache, "position_ids": positions}
    logits: Tensor = model(ids[None], use_cache=True, **options).logits[0]
    return logits.float()


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    """The negative log-likelihoods of `targets`, `(targets,)`, that `logits` predict."""
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none").double()


@torch.no_grad()
def read(model: Any, item: dict[str, Any], reading: Block) -> tuple[Any, int]:
    """The cache of a text's context, read in one pass within `reading`, and its length."""
    context = torch.tensor([item["context"]])
    with reading():
        return model(context, use_cache=True, logits_to_keep=1)[cache_name(model)], context.shape[1]


@torch.no_grad()
def follow(model: Any, item: dict[str, Any], cache: Any, start: int) -> dict[str, Any]:
    """What is measured after the context: nats of what follows, or answers."""
    if item["kind"] == "perplexity":
        after = torch.tensor(item["after"])
        nll = nats(continued(model, cache, after[:-1], start), after[1:])
        return {"tokens": len(nll), "block_nll": [part.sum().item() for part in nll.split(BLOCK)]}
    return {"answers": [answer(model, question, copy.deepcopy(cache), start) for question in item["questions"]]}


def answer(model: Any, question: dict[str, Any], cache: Any, start: int) -> dict[str, Any]:
    """Nats of every candidate, of which the first is true, and the tokens that the model writes."""
    ids = torch.tensor(question["ids"])
    first = continued(model, cache, ids, start)[-1:]
    start += len(ids)
    nll = []
    for candidate in map(torch.tensor, question["candidates"]):
        logits = first
        if len(candidate) > 1:
            logits = torch.cat([first, continued(model, copy.deepcopy(cache), candidate[:-1], start)])
        nll.append(nats(logits, candidate).sum().item())
    written = [int(first.argmax())]
    while len(written) < len(question["candidates"][0]):
        logits = continued(model, cache, torch.tensor(written[-1:]), start + len(written) - 1)
        written.append(int(logits[-1].argmax()))
    return {"nll": nll, "written": written}


def items(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What to measure, by its hash."""
    for line in (folder / "items.jsonl").read_text().splitlines():
        yield hashlib.sha256(line.encode()).hexdigest()[:16], json.loads(line)


def measure_all(
    folder: Path,
    methods: list[tuple[str, float | None]],
    measure: Callable[[dict[str, Any], str, float | None], dict[str, Any]],
    about: dict[str, Any],
) -> None:
    """Append to `records.jsonl` what every method at every share does to every item, but for what is there."""
    path = folder / "records.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    done = {record["key"] for record in map(json.loads, lines)}
    for key, item in items(folder):
        for method, share in methods:
            place = {"key": f"{key} {method} {share}", "item": key, "method": method, "share": share}
            if place["key"] in done:
                continue
            facts = {name: item[name] for name in ("kind", "document", "task", "length") if name in item}
            with path.open("a") as file:
                file.write(json.dumps({**place, **facts, **measure(item, method, share), **about}) + "\n")
            print(method, share, *facts.values(), flush=True)
