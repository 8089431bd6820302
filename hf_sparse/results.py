"""Results on disk: one JSON record per measurement, with what is needed to repeat it and to resume a run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from hf_sparse.errors import UserError, first_line
from hf_sparse.files import check_writable, write_whole
from hf_sparse.machine import device_name, process_state
from hf_sparse.schema import DENSE as DENSE
from hf_sparse.tables import Table, markdown_table

Record = dict[str, Any]
Summary = dict[str, Any]
CellT = TypeVar("CellT")

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


def record_key(**decisive: Any) -> str:
    """A hash of everything that decides a measured number, by which a resumed run finds what it has.

    That is: the command and method, the model and its revision, dtype and kind of device, the tokens of the window
    (see `Window.sha256`), and the configuration. Not: time, host, versions, commit, threads and the seed of a
    bootstrap, which is made anew from the records each time. After a change of the code that should change numbers,
    use another output folder.
    """
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def identity(about: Mapping[str, Any]) -> list[Any]:
    """What of a `provenance` decides measured numbers: a part of the key of every record."""
    return [about["model"]["name"], about["model"]["revision"], about["dtype"], about["device"]]


def provenance(info: Mapping[str, Any], model: PreTrainedModel | torch.Tensor, seed: int) -> Record:
    """How a record was made: model, dtype, device, threads, seed and versions; no path of the machine.

    Args:
        info: What identifies the model.
        model: The model, or a tensor of its dtype on its device.
        seed: Of everything random.
    """
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


def software() -> Record:
    """Versions and commit of the code that runs."""
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
    """A JSONL file of records that several processes append to and that a killed run leaves usable.

    Args:
        path: The file; made with its folders when the first record is written.
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

    def append(self, record: Record) -> None:
        """Add a record, stamped with the time in UTC."""
        record = {**record, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write in append mode: lines of several processes do not mix.
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(file, line) != len(line):
                raise OSError(f"{self.path.name}: only a part of a record was written; is the disk full?")
        finally:
            os.close(file)
        self._appended.add(record["key"])

    def records(self) -> dict[str, Record]:
        """The records by their key, the first of each; an unfinished last line is ignored.

        Raises:
            UserError: naming the file and the line that is not a record.
        """
        out: dict[str, Record] = {}
        for number, line in enumerate(self._read().split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line.decode("utf-8"))
                if not (isinstance(record, dict) and isinstance(record.get("key"), str)):
                    raise ValueError("it must be a JSON object with a key")
            except (ValueError, RecursionError) as error:
                raise self._broken(f"line {number} is not a record: {first_line(error)}") from error
            out.setdefault(record["key"], record)
        return out

    @contextmanager
    def summed_up(self) -> Iterator[None]:
        """A `with` block that summarises records: an error caused by records of an earlier run is told in one line.

        Raises:
            UserError: naming the file.
        """
        try:
            yield
        except UserError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            # Records of this run are not to blame: then the error is ours.
            if self.records().keys() <= self._appended:
                raise
            why = f"its records cannot be summed up: {type(error).__name__}: {first_line(error)}"
            raise self._broken(why) from error

    def _broken(self, why: str) -> UserError:
        return UserError(f"{self.path}: {why}; delete the file, or take another folder")

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise self._broken(f"it cannot be read: {error.strerror or first_line(error)}") from error


def resume(
    results: ResultFile,
    cells: Mapping[str, CellT],
    measure: Callable[[dict[str, CellT]], Iterable[tuple[str, Record]]],
) -> list[Record]:
    """The records of all cells: those that the file holds, and the others, measured now and appended one by one.

    Of several processes, each appends what its own `measure` yields (see `machine.my_share`), and all get all records.

    Args:
        results: The file.
        cells: What to measure, by the key of its record (`record_key`).
        measure: Takes the cells that the file lacks and yields the key and the record of each as soon as it has it.

    Returns:
        One record for each cell, in the order of `cells`.
    """
    state = process_state()
    if state.is_main_process:
        results.repair()
    state.wait_for_everyone()
    done = results.records()
    for key, record in measure({key: cell for key, cell in cells.items() if key not in done}):
        results.append({"key": key, **record})
    state.wait_for_everyone()
    done = results.records()
    return [done[key] for key in cells]


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
