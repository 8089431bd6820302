"""`Results`: a folder that an evaluation wrote, and what it says of one configuration as `QualityRecord`s."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.results import ROWS, SUMMARY, TABLES, Summary, command_of, inside, write_whole
from hf_sparse.schema import DENSE, QualityRecord
from hf_sparse.selectors import selector_name

_OURS = "hf_sparse"  # as `bench` calls it
_DECODE = "decode"  # as `perplexity` calls the policy itself, its targets read one at a time
DECODED = "decoded_"
"""Before the name of a metric: of tokens that were read one at a time after their context."""

_LAYER_ALONE = ("decode", "prefill")
_ERRORS = ("lost_mass", "output_error")
# What a folder of results may hold that is worth keeping beside the policy.
_KEPT = (SUMMARY, ROWS, TABLES, "*.png")


@dataclass(frozen=True)
class Results:
    """A folder that an evaluation wrote.

    Attributes:
        kind: The command: `"perplexity"`, `"attention-error"`, `"retrieval"` or `"bench"`.
        folder: Where it lies.
        summary: Its `summary.json`.
    """

    kind: str
    folder: Path
    summary: Summary

    @property
    def place(self) -> str:
        """Name of its folder beside a policy: the command, or, where the folder has such a name, `COMMAND-NAME`."""
        name = self.folder.name
        return name if name.startswith(f"{self.kind}-") else self.kind

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Results:
        """The results in `folder`.

        Raises:
            UserError: if there are none.
        """
        path = inside(Path(folder) / SUMMARY, Path(folder))
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            kind = command_of(summary)
            if kind not in _RECORDS:
                raise ValueError(f"it is of {kind}")
        except (OSError, ValueError, TypeError) as error:
            commands = " or ".join((", ".join(list(_RECORDS)[:-1]), list(_RECORDS)[-1]))
            raise UserError(f"{folder} holds no results: pass a folder that hf-sparse {commands} wrote") from error
        return cls(kind, Path(folder), summary)

    def records(self, config: SparseAttentionConfig) -> list[QualityRecord]:
        """What was measured of `config`, and of dense attention beside it.

        Raises:
            UserError: if nothing was, or the summary is not one of this release.
        """
        try:
            records = list(_RECORDS[self.kind](self.summary, config))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.folder / SUMMARY} was not written by this release: it lacks {error}") from error
        if not records and self.kind == "retrieval" and _methods(self.summary, config):
            raise UserError(
                f"{self.folder} holds no retrieval that counts: nowhere is the dense model surely better than chance; "
                "leave it out, or measure other tasks, lengths or more questions"
            )
        if not records:
            raise UserError(
                f"{self.folder} holds no measurement of this configuration: what it measured has other settings; "
                "measure again with the policy"
            )
        return records

    def files(self) -> Iterator[Path]:
        """Rows, summary, tables and plots."""
        for pattern in _KEPT:
            yield from self.folder.glob(pattern)

    def copy_to(self, folder: Path) -> Results:
        """Copy records, summary, tables and plots into the folder `place` in `folder`; gives the copy."""
        target = folder / self.place
        if target.resolve() != self.folder.resolve():
            for path in self.files():
                write_whole(target / path.name, inside(path, self.folder).read_bytes())
        return replace(self, folder=target)


def results_beside(folder: Path, without: Collection[str] = ()) -> list[Results]:
    """The results that lie in a folder of a policy, in subfolders with the names `Results.place`, `without` some.

    Raises:
        UserError: if one holds records without their summary, or a summary that cannot be read.
    """
    found = []
    for kind in _RECORDS:
        for own in [folder / kind, *sorted(folder.glob(f"{kind}-*"))]:
            if own.name in without:
                continue
            if (own / SUMMARY).is_file():
                found.append(Results.read(inside(own, folder)))
            elif (own / ROWS).exists():
                raise UserError(
                    f"{own} holds {ROWS} without {SUMMARY}: make it with hf-sparse {kind} --output {own} and the "
                    "options of that run, or delete the folder"
                )
    return found


def in_order(results: Iterable[Results]) -> list[Results]:
    """The results as cards take them: by command, and of one command that without a name first.

    Raises:
        UserError: if two have the same place.
    """
    found: dict[str, Results] = {}
    for result in results:
        if other := found.get(result.place):
            raise UserError(
                f"{other.folder} and {result.folder} both hold results of {result.kind}, which a policy keeps in "
                f"{result.place}: name the folder of one of them {result.kind}-NAME"
            )
        found[result.place] = result
    return sorted(found.values(), key=lambda result: (list(_RECORDS).index(result.kind), result.place))


def plots(results: Iterable[Results]) -> list[str]:
    """Paths of the plots of `results`, where `Results.copy_to` puts them."""
    return [f"{result.place}/{path.name}" for result in results for path in sorted(result.folder.glob("*.png"))]


def quality(results: Iterable[Results], config: SparseAttentionConfig) -> tuple[QualityRecord, ...]:
    """The records of all `results`, those of a metric from the first that has it: others predicted other tokens.

    Raises:
        UserError: see `Results.records`.
    """
    found: list[QualityRecord] = []
    for result in results:
        known = {record.metric for record in found}
        found += [record for record in result.records(config) if record.metric not in known]
    return tuple(found)


def _same(found: Mapping[str, Any], config: SparseAttentionConfig, **fields: Any) -> bool:
    """Whether two configurations give the same figures, both with `fields`: engines and records change none."""
    fields |= {"engine": "auto", "calibration": None, "extra": {}}
    try:
        measured = SparseAttentionConfig.from_dict({**found, "engine": "auto"})
    except ValueError:
        return False  # a selector or law of a user's own
    return replace(measured, **fields) == replace(config, **fields)


def _about(summary: Mapping[str, Any]) -> dict[str, Any]:
    about = summary["about"]
    return {
        "documents": tuple(document["document"] for document in summary["documents"]),
        "model": about["model"]["name"],
        "dtype": about["dtype"],
        "device": about["device"],
    }


def _methods(summary: Mapping[str, Any], config: SparseAttentionConfig) -> list[str]:
    """The methods that are `config`: one for whole texts, and one for decoding."""
    own = [name for name, found in summary["configs"].items() if found is not None and _same(found, config)]
    return [name for name in own if name != _DECODE][:1] + [name for name in own if name == _DECODE]


def _perplexity_records(summary: Mapping[str, Any], config: SparseAttentionConfig) -> Iterator[QualityRecord]:
    about, selector = _about(summary), selector_name(config.selector)
    for method in _methods(summary, config):
        before = DECODED if method == _DECODE else ""
        for result in _of(summary["results"], (DENSE, method)):
            own = about | {name: result[name] for name in ("length", "density", "tokens")}
            own["method"] = DENSE if result["method"] == DENSE else selector
            yield QualityRecord(metric=f"{before}perplexity", value=result["perplexity"], **own)
            if result["method"] == method:
                yield QualityRecord(metric=f"{before}perplexity_ratio", **_interval(result, "ratio"), **own)
        for verdict in summary["adaptive_vs_fixed"]:
            for found in verdict["by_length"] if verdict["adaptive"] == method else ():
                own = about | {"method": selector, "length": found["length"]}
                yield QualityRecord(metric="ratio_to_fixed", **_interval(found, "ratio"), **own)


def _error_records(summary: Mapping[str, Any], config: SparseAttentionConfig) -> Iterator[QualityRecord]:
    about = _about(summary) | {"method": selector_name(config.selector)}
    for result in _of(summary["results"], _methods(summary, config)):
        own = about | {"length": result["length"], "density": result["density"], "tokens": result["rows"]}
        for metric in _ERRORS:
            for statistic, value in result[metric].items():
                yield QualityRecord(metric=metric, statistic=statistic, **_interval(value, "value"), **own)


def _retrieval_records(summary: Mapping[str, Any], config: SparseAttentionConfig) -> Iterator[QualityRecord]:
    about, selector = _about(summary), selector_name(config.selector)
    for method in _methods(summary, config)[:1]:
        for verdict in _of(summary["verdicts"], (DENSE, method)):
            metric = f"{DECODED if verdict['mode'] == 'decode' else ''}retrieval_{verdict['score']}"
            own = about | {"method": DENSE if verdict["method"] == DENSE else selector}
            for found in verdict["lengths"]:
                if found["counted"]:
                    place = {"length": found["length"], "density": found["density"]}
                    yield QualityRecord(metric=metric, value=found["score"], **place, **own)
            if verdict["method"] == method and verdict["above_dense"] is not None:
                place = {"length": max(summary["lengths"]), "density": verdict["density"]}
                difference = _interval(verdict["above_dense"], "value")
                yield QualityRecord(metric=f"{metric}_above_dense", **difference, **place, **own)


def _bench_records(summary: Mapping[str, Any], config: SparseAttentionConfig) -> Iterator[QualityRecord]:
    about, name = summary["about"], selector_name(config.selector)
    own = {"dtype": about["dtype"], "device": about["device_name"], "model": about["model"]["name"]}
    for kind, condition in summary["conditions"].items():
        # A layer alone is measured sparse, however few keys its queries see, and whichever layer it is.
        alone = {"dense_below": 0, "dense_layers": ()} if kind in _LAYER_ALONE else {}
        if not _same(condition["config"], config, **alone):
            continue
        baseline = summary["break_even"][kind]["against"]
        for result in summary["results"]:
            if result["kind"] != kind or result["method"] not in (baseline, _OURS):
                continue
            metric, place = f"{kind}-{result['quantity']}", {"length": result["length"], **own}
            time = _interval(result, "median")
            if result["method"] == _OURS:
                yield QualityRecord(metric=metric, method=name, density=result.get("density"), **time, **place)
            else:
                yield QualityRecord(metric=metric, method=DENSE, **time, **place)
                speedup = _interval(result["ratio"], "median")
                yield QualityRecord(metric=f"{metric}-speedup", method=name, **speedup, **place)


def _of(results: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    return (result for method in methods for result in results if result["method"] == method)


def _interval(record: Mapping[str, Any], value: str) -> dict[str, Any]:
    return {"value": record[value], "low": record["low"], "high": record["high"]}


_RECORDS = {
    "perplexity": _perplexity_records,
    "attention-error": _error_records,
    "retrieval": _retrieval_records,
    "bench": _bench_records,
}
