"""`hf-sparse memory`: peak memory of one attention call, of a whole prefill, and of caches, dense and sparse."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from hf_sparse.bench.memory import COMMAND, evaluate, memory_tables, plot_memory
from hf_sparse.bench.shapes import parse_shape
from hf_sparse.cli.options import Json, Seed, SparseOptions, parse_integers
from hf_sparse.measure.run import Outcome, write_outcome
from hf_sparse.measure.windows import check_lengths
from hf_sparse.results import check_folder

# Processes in which each prefill is measured.
_REPEATS = 3


@dataclass(frozen=True)
class MemoryOptions:
    """What is measured."""

    lengths: Annotated[str, typer.Option(help="One call: queries and keys, rising.")] = "2048,4096,8192,16384"
    prefill: Annotated[str, typer.Option(help="Model: tokens of the prompt, rising; none to leave it out.")] = "32768"
    cached: Annotated[str, typer.Option(help="Caches: tokens in them, rising; none to leave it out.")] = "32768,131072"
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 9
    kv_heads: Annotated[int, typer.Option(min=1, help="Key heads.")] = 3
    head_dim: Annotated[int, typer.Option(min=1, help="Size of a head.")] = 64
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 2
    limit: Annotated[float, typer.Option(min=0, help="GiB that no single call may be expected to take.")] = 10.0
    seed: Seed = 0
    output: Annotated[Path, typer.Option(help="Folder for summary and plot.")] = Path("results/memory")
    as_json: Json = False


def memory(options: MemoryOptions, sparse: SparseOptions) -> None:
    """Peak memory of one attention call, of a whole prefill, and of caches, dense and sparse (Linux, CPU)."""
    lengths = parse_integers("--lengths", options.lengths)
    prefill, cached = (
        [] if text == "none" else parse_integers(option, text)
        for option, text in (("--prefill", options.prefill), ("--cached", options.cached))
    )
    for given in filter(None, (lengths, prefill, cached)):
        check_lengths(given, 1, None)
    shape = parse_shape(f"{options.heads}/{options.kv_heads}/{options.head_dim}").part(options.layers)
    check_folder(options.output, COMMAND)
    most_bytes = options.limit * 2**30
    summary = evaluate(
        lengths, prefill, cached, shape, sparse.config(), most_bytes=most_bytes, repeats=_REPEATS, seed=options.seed
    )
    outcome = Outcome(summary, memory_tables(summary))
    write_outcome(outcome, options.output, "memory.png", plot_memory)
    print(json.dumps(summary) if options.as_json else f"{outcome}\n\nsummary, tables and plot: {options.output}")
