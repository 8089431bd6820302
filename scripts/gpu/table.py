"""The checks, in their order: by importance. Read by the parent, which imports no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PHASES = ("correct", "time", "faults")

BROKEN = 75
"""Exit status of a check's process whose CUDA context can be used no more: other cases need another process."""


@dataclass(frozen=True)
class Check:
    """A check: a function that gives cases.

    Attributes:
        name: Its name.
        purpose: What it finds out.
        phase: One of `PHASES`.
        source: `module.function` of this package. The function takes a `Machine` and the arguments, and gives cases.
        arguments: Further arguments.
        each: Seconds that a case may take.
    """

    name: str
    purpose: str
    phase: str
    source: str
    arguments: dict[str, Any] = field(default_factory=dict)
    each: float = 60


def _correct(name: str, source: str, purpose: str, each: float = 60, **arguments: Any) -> Check:
    return Check(name, purpose, "correct", source, arguments, each)


def _time(name: str, source: str, purpose: str, each: float = 60, **arguments: Any) -> Check:
    return Check(name, purpose, "time", source, arguments, each)


_LENGTHS = {"8k": 8192, "32k": 32768, "131k": 131072}

CHECKS = (
    _correct(
        "environment", "machine.environment", "card, driver, versions, shared memory, ceilings of copy and matmul"
    ),
    _correct("attend/basic", "kernels.basic", "the attention kernel in the shape of Llama-8B, three dtypes"),
    _correct("select/basic", "selection.basic", "the selector against PyTorch on the CPU: decode, prefill, padding"),
    _correct("layer/basic", "layers.basic", "selector and engine of a layer, Triton against plain PyTorch"),
    _correct(
        "model/generate", "models.generate", "a random Llama: generate by Triton, gather, padded, static cache", 120
    ),
    _correct("graph/decode", "graphs.decode", "tokens in a cache of fixed room, by one CUDA graph that is replayed"),
    _correct("find/codes", "finding.codes", "keys in 4 bits: every number, and the memory around them"),
    _correct(
        "find/groups", "finding.groups", "importance of keys, its counts, and lists of the most important, exactly"
    ),
    _correct("attend/dims", "kernels.dims", "head_dim 64 to 256, three dtypes, decode and prefill"),
    _correct("attend/shapes", "kernels.shapes", "GQA of 1 to 16 heads, batches, lengths 1 to 1,000"),
    _correct(
        "attend/options", "kernels.options", "soft cap, sinks, groups of one head, wider values, strides, no keys"
    ),
    _correct("select/dims", "selection.dims", "the selector with head_dim 64 to 256, GQA and batches"),
    _correct("attend/long", "kernels.long", "131,072 and 1,048,576 keys"),
    _correct("select/long", "selection.long", "131,072 and 1,048,576 keys", 120),
    _correct("memcheck", "tools.sanitizer", "compute-sanitizer: addresses, on small shapes", 200, tool="memcheck"),
    _correct("racecheck", "tools.sanitizer", "compute-sanitizer: races in shared memory", 200, tool="racecheck"),
    _correct("pytest", "tools.tests", "tests/test_triton.py, without the interpreter", 240),
    _time("machine", "machine.environment", "the card and its ceilings, with nothing beside it"),
    *(
        _time(f"decode/{name}", "timing.decode", "one layer: one query, kernels and dense back ends", length=length)
        for name, length in _LENGTHS.items()
    ),
    *(
        _time(f"prefill/{name}", "timing.prefill", "one layer: all queries, kernels and dense back ends", length=length)
        for name, length in list(_LENGTHS.items())[:2]
    ),
    _time("graph/131k", "graphs.time_decode", "one layer: one query, by a CUDA graph", length=131072),
    _time("bench/layer", "benching.layer", "what hf-sparse bench measures of one layer, and its back ends", 90),
    _time(
        "profile/131k", "profiles.decode", "launches, busy time and synchronisations of a decode step", length=131072
    ),
    _time("profile/prefill", "profiles.prefill", "the same of a prefill of 8,192 tokens", length=8192),
    _time("model/decode", "models.time_decode", "four layers of Llama-8B after 131,072 tokens", 120, length=131072),
    _time("model/prefill", "models.time_prefill", "four layers of Llama-8B, 32,768 tokens", 120, length=32768),
    _time("prefill/131k", "timing.prefill", "131,072 queries, if those of 32,768 promise it soon", 150, length=131072),
    Check("faults/none", "gives a right number", "faults", "faults.none"),
    Check("faults/wrong", "gives a wrong number, then a right one", "faults", "faults.wrong"),
    Check("faults/abort", "aborts in its second case of three", "faults", "faults.abort"),
    Check("faults/hang", "hangs in its first case of two", "faults", "faults.hang"),
    Check("faults/start", "cannot even start", "faults", "faults.missing"),
    Check("small", "what compute-sanitizer runs", "inner", "tools.small"),
)
