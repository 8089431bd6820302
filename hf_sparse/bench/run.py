"""The cells of a benchmark, measured one after the other, each a row that is not measured twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from hf_sparse.results import Record, ResultFile, record_key

COMMAND = "bench"

KINDS = ("decode", "prefill", "cached", "generate", "padded")
"""`decode` and `prefill` are one attention layer; `cached`, `generate` and `padded` are a model that writes: after full
caches, after a prompt, or after one with a pad token before it, as in batches of unequal texts."""

LAYER_KINDS = KINDS[:2]


@dataclass(frozen=True)
class Cell:
    """One kind of work at one length, by all methods.

    Attributes:
        kind: One of `KINDS`.
        length: Keys that a decoded row sees, rows and keys of a prefill, cached tokens, or tokens of the prompt.
        facts: What else decides the numbers: inputs, configuration, methods.
        measure: Gives what was found, by method.
    """

    kind: str
    length: int
    facts: Mapping[str, Any]
    measure: Callable[[], dict[str, dict[str, Any]]]


def evaluate(cells: Sequence[Cell], results: ResultFile, about: Record) -> list[Record]:
    """Measure every cell that `results` does not hold yet, and give the rows of all.

    All methods of a cell are measured together or not at all: only then can their times be compared.

    Args:
        cells: What to measure.
        results: Where rows are appended: `key`, `command`, `kind`, `length`, `methods`, the cell's facts and `about`.
        about: Machine, versions, threads and seed; what of it decides times is part of the key.
    """
    results.repair()
    done = results.records()
    out = []
    with tqdm(cells, desc=COMMAND, unit="cell") as bar:
        for cell in bar:
            bar.set_postfix_str(f"{cell.kind} {cell.length:,}")
            machine = {name: value for name, value in about.items() if name != "commit"}
            key = record_key(command=COMMAND, kind=cell.kind, length=cell.length, **cell.ranges, **machine)
            if key not in done:
                place = {"key": key, "command": COMMAND, "kind": cell.kind, "length": cell.length}
                results.append({**place, **cell.ranges, "methods": cell.measure(), **about})
                done = results.records()
            out.append(done[key])
    return out
