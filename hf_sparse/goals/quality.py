"""What hf_sparse aims at in quality: perplexity of the last 1,024 tokens of six development documents or more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_sparse.evaluation.perplexity import DENSE
from hf_sparse.goals.judge import Bound, Goal
from hf_sparse.goals.reading import Reading, Summary

_DOCUMENTS = 6
_TARGETS = 1024


@dataclass(frozen=True)
class Perplexity:
    """The ratio of perplexities of a method to dense.

    Attributes:
        model: What the model's name begins with.
        method: One of the methods of `hf-sparse perplexity`.
        length: Tokens of context.
        most: Highest density that counts.
        calibrated: Whether heads must have laws of their own; if not, they must not.
    """

    model: str
    method: str
    length: int
    most: float
    calibrated: bool = True

    def read(self, run: Summary) -> Reading | None:
        """The ratio, and the density of the layers without a sliding window."""
        if not _counts(run, self.model):
            return None
        config = run["configs"].get(self.method) or {}
        for row in run["results"]:
            if (row["method"], row["length"]) == (self.method, self.length):
                density = row["sparse_density"]
                if density is None or density > self.most or (config.get("per_head") is not None) != self.calibrated:
                    return None
                interval = {"median": row["ratio"], "low": row["low"], "high": row["high"]}
                return Reading({"perplexity ratio": interval}, density)
        return None

    def __str__(self) -> str:
        laws = "calibrated" if self.calibrated else "default"
        return f"{self.method} at {self.length:,} tokens, {laws}, density at most {self.most:g} ({self.model})"


@dataclass(frozen=True)
class AgainstFixed:
    """The ratio of perplexities, calibrated adaptive laws over a fixed budget for each head at equal cost."""

    model: str
    lengths: tuple[int, ...]

    def read(self, run: Summary) -> Reading | None:
        """The mean ratio over the lengths."""
        if not _counts(run, self.model) or tuple(run["lengths"]) != self.lengths:
            return None
        if (run["configs"].get("grouped") or {}).get("per_head") is None:
            return None
        for pair in run["adaptive_vs_fixed"]:
            if pair["adaptive"] == "grouped":
                mean = pair["mean"]
                interval = {"median": mean["ratio"], "low": mean["low"], "high": mean["high"]}
                rows = [row for row in run["results"] if row["method"] == "grouped"]
                density = sum(row["sparse_density"] for row in rows) / len(rows)
                return Reading({"adaptive / fixed": interval}, density)
        return None

    def __str__(self) -> str:
        return f"grouped and fixed-grouped over {_listed(self.lengths)} tokens, calibrated ({self.model})"


def _counts(run: Summary, model: str) -> bool:
    if DENSE not in run.get("configs", {}) or not run["about"]["model"]["name"].lower().startswith(model):
        return False
    return len(run["documents"]) >= _DOCUMENTS and run["targets"] == _TARGETS


def _listed(lengths: Sequence[int]) -> str:
    return " and ".join(f"{length:,}" for length in lengths)


def _ratio(name: str, goal: float, least: float, reader: Perplexity) -> Goal:
    of = f"density at most {reader.most:g}"
    return Goal(f"{name}, {of}", Bound("perplexity ratio", goal), Bound("perplexity ratio", least), reader)


_SMOLLM2, _GEMMA3 = "smollm2-135m", "gemma-3-270m"

QUALITY_GOALS = (
    _ratio("SmolLM2, decode, 4,096 tokens, calibrated", 1.002, 1.01, Perplexity(_SMOLLM2, "decode", 4096, 0.10)),
    _ratio("SmolLM2, decode, 8,192 tokens, calibrated", 1.002, 1.01, Perplexity(_SMOLLM2, "decode", 8192, 0.10)),
    _ratio("SmolLM2, prefill, 4,096 tokens, calibrated", 1.005, 1.015, Perplexity(_SMOLLM2, "grouped", 4096, 0.15)),
    _ratio("SmolLM2, prefill, 8,192 tokens, calibrated", 1.005, 1.015, Perplexity(_SMOLLM2, "grouped", 8192, 0.10)),
    *(
        _ratio(
            f"Gemma-3, {kind}, {length:,} tokens, its full layers, calibrated",
            1.003,
            1.01,
            Perplexity(_GEMMA3, method, length, 0.15),
        )
        for length in (8192, 16384)
        for kind, method in (("prefill", "grouped"), ("decode", "decode"))
    ),
    _ratio(
        "SmolLM2, prefill, 4,096 tokens, defaults", 1.005, 1.015, Perplexity(_SMOLLM2, "grouped", 4096, 0.20, False)
    ),
    _ratio(
        "Gemma-3, prefill, 4,096 tokens, its full layers, defaults",
        1.005,
        1.015,
        Perplexity(_GEMMA3, "grouped", 4096, 0.20, False),
    ),
    Goal(
        "SmolLM2, adaptive over fixed at equal cost, 4,096 and 8,192 tokens, calibrated",
        Bound("adaptive / fixed", 1.0),
        Bound("adaptive / fixed", 1.0),
        AgainstFixed(_SMOLLM2, (4096, 8192)),
    ),
)
"""The goals, in the order in which they are shown."""
