"""Folders of results: records, summary, tables and plot of one command, and which command a folder belongs to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_sparse.errors import UserError, first_line
from hf_sparse.results.files import check_writable, write_whole
from hf_sparse.results.records import ResultFile
from hf_sparse.results.tables import Table, markdown_table

Summary = dict[str, Any]

ROWS, SUMMARY, TABLES = "rows.jsonl", "summary.json", "tables.md"

CALIBRATE = "calibrate"
CALIBRATION = "calibration.json"

# Files of `calibrate` have names of their own and may lie beside results of the policy that it made.
_OF_CALIBRATE = ("curves.jsonl", "probes.jsonl", "check.jsonl", CALIBRATION)

# Fields by which results of earlier releases, which do not name their command, are recognised, in this order.
_MARKS = {
    "adaptive_vs_fixed": "perplexity",
    "slopes": "attention-error",
    "break_even": "bench",
    "exponents": "memory",
    "experiments": "theory",
    "experiment": "theory",
}


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write `data` as readable JSON, all or nothing."""
    write_whole(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def write_summary(folder: Path, summary: Summary, tables: Sequence[Table]) -> None:
    """Write `summary.json`, and `tables.md` with the same for people."""
    write_json(folder / SUMMARY, summary)
    write_tables(folder, tables)


def write_tables(folder: Path, tables: Sequence[Table]) -> None:
    """Write `tables.md`."""
    write_whole(folder / TABLES, ("\n\n".join(markdown_table(*table) for table in tables) + "\n").encode())


def command_of(found: Mapping[str, Any]) -> str | None:
    """The command that a record or summary comes from; `None` if it is of none."""
    if "command" in found:
        return str(found["command"])
    return next((command for mark, command in _MARKS.items() if mark in found), None)


def default_folder(model: str, command: str) -> Path:
    """`results/MODEL-COMMAND`, where results go unless a user says otherwise."""
    return Path("results") / f"{model.rpartition('/')[2].removesuffix('.gguf')}-{command}"


def plot_name(command: str) -> str:
    """The name of the plot of a command."""
    return command.replace("-", "_") + ".png"


def check_folder(folder: Path, command: str, model: Mapping[str, Any] | None = None) -> None:
    """Refuse a folder that the results of a command cannot go into.

    Args:
        folder: The folder. It need not exist, and is not made.
        command: The command, as records name it.
        model: `name` and `revision` of the model that is measured; `None` where any may be.

    Raises:
        UserError: if it cannot be made or written to, or what it holds cannot be read or comes from another command
            or model.
    """
    check_writable(folder, (ROWS, SUMMARY, TABLES, plot_name(command), *_OF_CALIBRATE))
    for path, found in _held(folder):
        theirs = CALIBRATE if path.name in _OF_CALIBRATE else command_of(found)
        measured = _model(found)
        if theirs != command:
            raise _taken(path, theirs or "something else", command)
        if model is not None and measured is not None and _named(measured) != _named(model):
            raise _taken(path, _named(measured), _named(model))


def _taken(path: Path, theirs: str, ours: str) -> UserError:
    return UserError(f"{path} holds results of {theirs}, not of {ours}: take another folder, or delete it")


def _held(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The records and summaries in a folder, each with its file; those of calibrate if there are no others."""
    paths = [folder / name for name in (ROWS, SUMMARY)]
    if not any(path.exists() for path in paths):
        paths = [folder / name for name in _OF_CALIBRATE]
    for path in paths:
        if path.suffix == ".jsonl":
            for record in ResultFile(path).records().values():
                yield path, record
        elif path.exists():
            yield path, read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: naming the file, if it cannot be read or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it must hold a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}; delete it, or take another folder") from error
    return found


def _model(found: Any) -> Mapping[str, Any] | None:
    """The model that was measured: in a record itself, in a summary under `about`, in a calibration in its check's."""
    while isinstance(found, dict) and "model" not in found:
        found = found.get("about", found.get("check"))
    model = found["model"] if isinstance(found, dict) else None
    return model if isinstance(model, dict) else None


def _named(model: Mapping[str, Any]) -> str:
    return f"{model.get('name')} ({model.get('revision', 'random weights')})"
