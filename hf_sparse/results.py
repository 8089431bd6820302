"""Results on disk: one JSON line per measurement, with what is needed to repeat it and to resume a run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_sparse.errors import UserError, first_line
from hf_sparse.files import check_writable, write_whole
from hf_sparse.machine import device_name

Row = dict[str, Any]

ROWS, SUMMARY, TABLES = "rows.jsonl", "summary.json", "tables.md"

# What tells the rows or summary of one command from those of another, in this order, where they do not say it.
_MARKS = {
    "adaptive_vs_fixed": "perplexity",
    "slopes": "attention-error",
    "break_even": "bench",
    "exponents": "memory",
    "experiments": "theory",
    "experiment": "theory",
    "runs": "goals",
}


def command_of(found: Mapping[str, Any]) -> str | None:
    """The command that a row or summary comes from; `None` if it is of none."""
    if "command" in found:
        return str(found["command"])
    return next((command for mark, command in _MARKS.items() if mark in found), None)


def row_key(**decisive: Any) -> str:
    """A hash of everything that decides a measured number, by which a run that starts again knows what it has.

    That is: the command and method, the model and its revision, dtype and kind of device, the tokens of the window
    (see `Window.sha256`), and the configuration. Not: time, host, versions, commit, threads and seed (which only
    drives the bootstrap, made anew from the rows each time). After a change of the code that should change numbers,
    give another output folder.
    """
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def provenance(info: Mapping[str, Any], model: PreTrainedModel | torch.Tensor, seed: int) -> Row:
    """What every row says about how it was made; no path of the machine. Of `model`, its dtype and device."""
    device = model.device
    return {
        "model": dict(info),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "seed": seed,
        **software(),
    }


def software() -> Row:
    """Versions and commit of what ran."""
    versions = {name: version(name) for name in ("hf_sparse", "torch", "transformers")}
    return {"versions": versions | {"python": platform.python_version()}, "commit": commit()}


@cache
def commit() -> str | None:
    """The git commit that this package runs from, with `-dirty` after it if files were changed; else `None`."""
    try:
        # The package may be installed inside some other project's checkout: only a commit that has it counts.
        for command in (
            ["ls-files", "--error-unmatch", "results.py"],
            ["describe", "--always", "--dirty", "--abbrev=40"],
        ):
            done = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *command], capture_output=True, text=True, check=True
            )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


class ResultFile:
    """A JSONL file that several processes append to and a killed run leaves usable.

    Args:
        path: The file; made with its folders when the first row is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._appended: set[str] = set()

    def repair(self) -> None:
        """Cut off a last line that a killed run left unfinished. Only while nobody else writes."""
        data = self._read()
        if data and not data.endswith(b"\n"):
            with self.path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)

    def append(self, row: Row) -> None:
        """Add a row, stamped with the time in UTC."""
        row = {**row, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write in append mode: lines of several processes do not mix.
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(file, line) != len(line):
                raise OSError(f"{self.path.name}: the disk took a part of a row only; is it full?")
        finally:
            os.close(file)
        self._appended.add(row["key"])

    def rows(self) -> dict[str, Row]:
        """The rows by their key, the first of each; empty if there is no file. An unfinished last line is none.

        Raises:
            UserError: naming the file and the line that is not a row.
        """
        out: dict[str, Row] = {}
        for number, line in enumerate(self._read().split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line.decode("utf-8"))
                if not (isinstance(row, dict) and isinstance(row.get("key"), str)):
                    raise ValueError("it must be a JSON object with a key")
            except (ValueError, RecursionError) as error:
                raise self._broken(f"line {number} is not a row: {first_line(error)}") from error
            out.setdefault(row["key"], row)
        return out

    @contextmanager
    def summed_up(self) -> Iterator[None]:
        """While rows are made use of: what those of an earlier run lack, or hold in its place, as one line.

        Raises:
            UserError: naming the file.
        """
        try:
            yield
        except UserError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            # Rows that this run has made are not to blame: then the error is ours.
            if self.rows().keys() <= self._appended:
                raise
            raise self._broken(f"its rows cannot be summed up: {type(error).__name__}: {first_line(error)}") from error

    def _broken(self, why: str) -> UserError:
        return UserError(f"{self.path}: {why}; delete the file, or take another folder")

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise self._broken(f"it cannot be read: {error.strerror or first_line(error)}") from error


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write `data` as readable JSON, all or nothing."""
    write_whole(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


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
