"""`hf-sparse report`: the tables of a folder of results, made anew from its records."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from hf_sparse.bench import memory
from hf_sparse.calibration.calibrate import Calibration
from hf_sparse.calibration.tables import calibration_tables
from hf_sparse.cli.bench import BENCH
from hf_sparse.cli.theory import print_theory
from hf_sparse.errors import UserError, first_line
from hf_sparse.measure.run import ATTENTION_ERROR, PERPLEXITY, RETRIEVAL, Kind, Outcome, write_outcome
from hf_sparse.results import (
    CALIBRATION,
    ROWS,
    SUMMARY,
    Record,
    ResultFile,
    Summary,
    command_of,
    plot_name,
    read_json,
    write_tables,
)

_KINDS = {kind.command: kind for kind in (PERPLEXITY, ATTENTION_ERROR, RETRIEVAL, BENCH)}


def run_report(folder: Path, *, write: bool, as_json: bool) -> None:
    """Print what a command found, from the records that it wrote; from its summary where it wrote no records.

    Args:
        folder: The folder of the results.
        write: Write summary, tables and plots anew, too.
        as_json: Print the summary.

    Raises:
        UserError: if the folder holds no results, or records that no summary can be made of.
    """
    try:
        found = _find(folder)
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{folder} holds results that no tables can be made of: {why}") from error
    if as_json:
        print(json.dumps(found.summary))
    else:
        found.show()
    if write:
        found.write()


@dataclass(frozen=True)
class _Found:
    """A summary, what prints it for people, and what writes it with its tables and plots."""

    summary: Summary
    show: Callable[[], object]
    write: Callable[[], object]


def _find(folder: Path) -> _Found:
    records = list(ResultFile(folder / ROWS).records().values())
    summary = read_json(folder / SUMMARY) if (folder / SUMMARY).exists() else None
    command = command_of(records[0] if records else summary or {})
    if command in _KINDS:
        return _evaluation(_KINDS[command], records, summary, folder)
    if command == "theory":
        return _theory(records, summary or {}, folder)
    if command == memory.COMMAND and summary:
        summary |= memory.summarise(summary["results"])
        return _drawn(Outcome(summary, memory.memory_tables(summary)), memory.COMMAND, memory.plot_memory, folder)
    if (folder / CALIBRATION).exists():
        return _calibration(folder)
    raise UserError(f"{folder} holds no results: pass a folder that a command of hf-sparse wrote")


def _drawn(outcome: Outcome, command: str, draw: Callable[[Summary, Path], None], folder: Path) -> _Found:
    write = partial(write_outcome, outcome, folder, plot_name(command), draw)
    return _Found(outcome.summary, partial(print, outcome), write)


def _evaluation(kind: Kind, records: Sequence[Record], summary: Summary | None, folder: Path) -> _Found:
    if records:
        if kind is not BENCH:
            records = _complete(records, summary, folder / ROWS)
        summary = kind.summarise(records, (summary or records[0]).get("seed", 0))
    assert summary is not None
    return _drawn(Outcome(summary, kind.tables(summary)), kind.command, kind.draw, folder)


def _complete(records: Sequence[Record], summary: Summary | None, path: Path) -> list[Record]:
    """The records that `summary` was made of, in its order; all of them if there is none yet.

    Raises:
        UserError: unless there is one for each method, length and document.
    """
    methods = list(dict.fromkeys(each["method"] for each in (summary["results"] if summary else records)))
    lengths = list(summary["lengths"] if summary else dict.fromkeys(record["length"] for record in records))
    texts = list(dict.fromkeys(each["text_sha256"] for each in (summary["documents"] if summary else records)))
    found: dict[tuple[str, int, str], list[Record]] = {}
    for record in records:
        if summary is None or record["config"] == summary["configs"].get(record["method"]):
            found.setdefault((record["method"], record["length"], record["text_sha256"]), []).append(record)
    out = []
    for text, length, method in product(texts, lengths, methods):
        own = found.get((method, length, text), [])
        if len(own) != 1:
            raise UserError(
                f"{path} holds {len(own)} measurements of {method} at {length} tokens of one text, and one is needed: "
                "run the command that wrote it again"
            )
        out += own
    return out


def _theory(records: Sequence[Record], summary: Summary, folder: Path) -> _Found:
    from hf_sparse.lab import run as lab

    if not records:
        raise UserError(f"{folder} holds no {ROWS}, from which the tables of theory are made")
    names = summary["experiments"] if summary else dict.fromkeys(record["experiment"] for record in records)
    experiments = lab.find_experiments(list(names))
    about = summary["about"] if summary else {"seed": records[0]["seed"]}
    found = {
        experiment.name: experiment.conclude([each for each in records if each["experiment"] == experiment.name])
        for experiment in experiments
    }
    made = lab.summarise(experiments, found) | {"about": about}
    show = partial(print_theory, {folder.resolve().name: made}, folder)
    return _Found(made, show, partial(lab.write, experiments, found, about, folder))


def _calibration(folder: Path) -> _Found:
    data = read_json(folder / CALIBRATION)
    checks = folder / "check.jsonl"
    if records := list(ResultFile(checks).records().values()):
        data["check"] = PERPLEXITY.summarise(_complete(records, data["check"], checks), data["check"]["seed"])
    tables = calibration_tables(Calibration.from_dict(data))
    return _Found(data, partial(print, Outcome(data, tables)), partial(write_tables, folder, tables))
