"""Folders of results: each holds those of one command and one model, which is checked before anything is measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_sparse.errors import UserError, first_line
from hf_sparse.evaluation.results import ResultFile
from hf_sparse.files import check_writable
from hf_sparse.outputs import ROWS, SUMMARY, TABLES, command_of

CALIBRATE = "calibrate"
CALIBRATION = "calibration.json"

# What calibrate writes has names of its own, and may lie beside results of the policy that it made.
_OF_CALIBRATE = ("curves.jsonl", "probes.jsonl", "check.jsonl", CALIBRATION)


def check_folder(folder: Path, command: str, model: Mapping[str, Any] | None = None) -> None:
    """Refuse a folder that the results of a command cannot go into.

    Args:
        folder: The folder. It need not be there, and is not made.
        command: Which command, as rows name it.
        model: `name` and `revision` of the model that is measured; `None` where any may be.

    Raises:
        UserError: if it cannot be made or written to, or what it holds cannot be read or comes from another command
            or model.
    """
    plot = command.replace("-", "_") + ".png"
    check_writable(folder, (ROWS, SUMMARY, TABLES, plot, *_OF_CALIBRATE))
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
    """The rows and summaries in a folder, each with its file; those of calibrate if there are no others."""
    paths = [folder / name for name in (ROWS, SUMMARY)]
    if not any(path.exists() for path in paths):
        paths = [folder / name for name in _OF_CALIBRATE]
    for path in paths:
        if path.suffix == ".jsonl":
            for row in ResultFile(path).rows().values():
                yield path, row
        elif path.exists():
            yield path, _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it must hold a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}; delete it, or take another folder") from error
    return found


def _model(found: Any) -> Mapping[str, Any] | None:
    """The model that was measured: a row says it, a summary under `about`, a calibration in that of its check."""
    while isinstance(found, dict) and "model" not in found:
        found = found.get("about", found.get("check"))
    model = found["model"] if isinstance(found, dict) else None
    return model if isinstance(model, dict) else None


def _named(model: Mapping[str, Any]) -> str:
    return f"{model.get('name')} ({model.get('revision', 'random weights')})"
