"""From folders of results to `QualityRow`s: what was measured of one configuration, with dense attention beside it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.quality import QualityRow

DENSE = "dense"
SUMMARY = "summary.json"

# What tells the summary of one command from that of another.
_KINDS = {"adaptive_vs_fixed": "perplexity", "slopes": "attention-error"}
_ERRORS = ("lost_mass", "output_error")
# What a folder of results may hold that is worth keeping beside the policy.
_KEPT = (SUMMARY, "rows.jsonl", "tables.md", "*.png")


@dataclass(frozen=True)
class Results:
    """A folder that an evaluation wrote.

    Attributes:
        kind: The command: `"perplexity"` or `"attention-error"`.
        folder: Where it lies.
        summary: Its `summary.json`.
    """

    kind: str
    folder: Path
    summary: Mapping[str, Any]

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Results:
        """The results in `folder`.

        Raises:
            UserError: if there are none.
        """
        path = Path(folder) / SUMMARY
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            kind = next(kind for key, kind in _KINDS.items() if key in summary)
        except (OSError, ValueError, TypeError, StopIteration) as error:
            raise UserError(
                f"{folder} holds no results: pass a folder that `hf-sparse perplexity` or `attention-error` wrote"
            ) from error
        return cls(kind, Path(folder), summary)

    def rows(self, config: SparseAttentionConfig) -> list[QualityRow]:
        """What was measured of `config`, and of dense attention beside it.

        Raises:
            UserError: if nothing was, or the summary is not one of this release.
        """
        try:
            method = self._method(config)
            if method is None:
                raise UserError(
                    f"{self.folder} holds no measurement of this configuration: it measured "
                    f"{', '.join(self.summary['configs'])} with other settings; measure again with the policy"
                )
            rows = _perplexity_rows if self.kind == "perplexity" else _error_rows
            return list(rows(self.summary, method, config.selector))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.folder / SUMMARY} was not written by this release: it lacks {error}") from error

    def _method(self, config: SparseAttentionConfig) -> str | None:
        wanted = _decisive(config)
        for method, found in self.summary["configs"].items():
            if found is not None and _decisive(SparseAttentionConfig.from_dict(found)) == wanted:
                return str(method)
        return None

    def copy_to(self, folder: Path) -> None:
        """Copy rows, summary, tables and plots into a folder named after the command in `folder`."""
        target = folder / self.kind
        if target.resolve() == self.folder.resolve():
            return
        target.mkdir(parents=True, exist_ok=True)
        for pattern in _KEPT:
            for path in self.folder.glob(pattern):
                shutil.copyfile(path, target / path.name)


def results_beside(folder: Path) -> list[Results]:
    """The results that lie in a folder of a policy, in subfolders named after the commands."""
    return [Results.read(folder / kind) for kind in _KINDS.values() if (folder / kind / SUMMARY).is_file()]


def plots(results: Iterable[Results]) -> list[str]:
    """Paths of the plots of `results`, where `Results.copy_to` puts them."""
    return [f"{result.kind}/{path.name}" for result in results for path in sorted(result.folder.glob("*.png"))]


def quality(results: Iterable[Results], config: SparseAttentionConfig) -> tuple[QualityRow, ...]:
    """The rows of all `results`; see `Results.rows`."""
    return tuple(row for result in results for row in result.rows(config))


def _decisive(config: SparseAttentionConfig) -> SparseAttentionConfig:
    """What decides the figures: every engine gives the same, and a calibration's record changes nothing."""
    return replace(config, engine="auto", calibration=None, extra={})


def _about(summary: Mapping[str, Any]) -> dict[str, Any]:
    about = summary["about"]
    return {
        "documents": tuple(document["document"] for document in summary["documents"]),
        "model": about["model"]["name"],
        "dtype": about["dtype"],
        "device": about["device"],
    }


def _perplexity_rows(summary: Mapping[str, Any], method: str, name: str) -> Iterator[QualityRow]:
    about = _about(summary)
    for result in _of(summary["results"], (DENSE, method)):
        own = about | {"length": result["length"], "tokens": result["tokens"]}
        own["method"] = DENSE if result["method"] == DENSE else name
        yield QualityRow(metric="perplexity", value=result["perplexity"], density=result["density"], **own)
        if result["method"] == method:
            yield QualityRow(metric="perplexity_ratio", density=result["density"], **_interval(result, "ratio"), **own)
    for verdict in summary["adaptive_vs_fixed"]:
        if verdict["adaptive"] == method:
            for row in verdict["by_length"]:
                ratio = _interval(row, "ratio")
                yield QualityRow(metric="ratio_to_fixed", method=name, length=row["length"], **ratio, **about)


def _error_rows(summary: Mapping[str, Any], method: str, name: str) -> Iterator[QualityRow]:
    about = _about(summary)
    for result in _of(summary["results"], (method,)):
        for metric in _ERRORS:
            for statistic, value in result[metric].items():
                yield QualityRow(
                    metric=metric,
                    method=name,
                    statistic=statistic,
                    length=result["length"],
                    density=result["density"],
                    tokens=result["rows"],
                    **_interval(value, "value"),
                    **about,
                )


def _of(results: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    return (result for method in methods for result in results if result["method"] == method)


def _interval(row: Mapping[str, Any], value: str) -> dict[str, Any]:
    return {"value": row[value], "low": row["low"], "high": row["high"]}
