"""Where goals of speed and memory are read in the summary of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_sparse.bench import end_to_end, prefill_memory
from hf_sparse.bench.layer import SPARSE
from hf_sparse.goals.reading import Reading, Summary


@dataclass(frozen=True)
class SpeedUp:
    """Dense time over ours.

    Attributes:
        kind: One of `run.KINDS`.
        quantity: Which of its times.
        length: Tokens.
        against: The dense method; `None` for the fastest that was measured.
        where: What the run must say of machine and model.
    """

    kind: str
    quantity: str
    length: int
    against: str | None
    where: Mapping[str, object]

    def read(self, run: Summary) -> Reading | None:
        """The speed-up, and what share of 1 / density it is; nothing where all rows ran dense."""
        found = _results(run, self.kind, self.quantity, self.length, self.where)
        dense = [row["ratio"] for name, row in found.items() if name != SPARSE and self.against in (None, name)]
        if not dense or found[SPARSE]["density"] == 1:
            return None
        ratio, density = min(dense, key=lambda each: each["median"]), found[SPARSE]["density"]
        share = {name: value * density for name, value in ratio.items()}
        return Reading({"speed-up": ratio, "share of 1/density": share}, density)

    def __str__(self) -> str:
        return f"{self.kind} at n = {self.length:,}{_where_text(self.where)}"


@dataclass(frozen=True)
class Growth:
    """The exponent of length with which our time to decode grows, in one layer, fitted from `first` to `last`."""

    first: int
    last: int
    where: Mapping[str, object]

    def read(self, run: Summary) -> Reading | None:
        """The exponent, and what it is above that of the law; nothing if the law is not one power of length."""
        law = run["conditions"].get("decode", {}).get("config", {}) if _is_of(run, self.where) else {}
        if law.get("law") != "power" or law["per_head"]:
            return None
        for fit in run["exponents"]:
            if (fit["kind"], fit["method"]) == ("decode", SPARSE) and _ends(fit["lengths"]) == (self.first, self.last):
                own = {name: fit[old] for name, old in (("median", "exponent"), ("low", "low"), ("high", "high"))}
                over = {name: value - law["exponent"] for name, value in own.items()}
                density = _results(run, "decode", "seconds", self.last, self.where)[SPARSE]["density"]
                return Reading({"exponent": own, "exponent - C": over}, density)
        return None

    def __str__(self) -> str:
        return f"decode from n = {self.first:,} to {self.last:,}{_where_text(self.where)}"


@dataclass(frozen=True)
class Overhead:
    """What a patched model takes longer than stock `generate` where all its rows run dense: the worst of `lengths`."""

    kind: str
    quantity: str
    lengths: tuple[int, ...]
    where: Mapping[str, object]

    def read(self, run: Summary) -> Reading | None:
        """The time that is added, in percent; nothing unless every row ran dense at every length."""
        found = [_results(run, self.kind, self.quantity, length, self.where) for length in self.lengths]
        if not all(SPARSE in each and each[SPARSE]["density"] == 1 for each in found):
            return None
        ratio = min((each[end_to_end.BASELINE]["ratio"] for each in found), key=lambda each: each["median"])
        turned = (("median", "median"), ("low", "high"), ("high", "low"))
        return Reading({"overhead": {name: 100 / ratio[old] - 100 for name, old in turned}}, 1.0)

    def __str__(self) -> str:
        lengths = " and ".join(f"{length:,}" for length in self.lengths)
        return f"{self.kind} at n = {lengths}, all dense{_where_text(self.where)}"


@dataclass(frozen=True)
class Memory:
    """Peak memory of a prefill over that of dense SDPA, both above the model and its keys and values."""

    length: int

    def read(self, run: Summary) -> Reading | None:
        """The ratio of the peaks."""
        for row in run.get(prefill_memory.KEY, ()):
            if (row["method"], row["length"]) == (SPARSE, self.length):
                return Reading({"peak memory": row["ratio"]}, row["density"])
        return None

    def __str__(self) -> str:
        return f"prefill memory at n = {self.length:,}"


def _results(
    run: Summary, kind: str, quantity: str, length: int, where: Mapping[str, object]
) -> dict[str, dict[str, Any]]:
    """The results of a cell, by method; none if `run` is of something else."""
    if not _is_of(run, where):
        return {}
    place = (kind, quantity, length)
    return {row["method"]: row for row in run["results"] if (row["kind"], row["quantity"], row["length"]) == place}


def _is_of(run: Summary, where: Mapping[str, object]) -> bool:
    if "conditions" not in run:  # a run of another command than `hf-sparse bench`
        return False
    about = run["about"]
    facts = {**about["model"], **about}
    return all(facts.get(name) == value for name, value in where.items())


def _ends(lengths: Sequence[int]) -> tuple[int, int]:
    return lengths[0], lengths[-1]


def _where_text(where: Mapping[str, object]) -> str:
    return f" ({', '.join(f'{name} {value}' for name, value in where.items())})"
