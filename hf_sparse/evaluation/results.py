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
from hf_sparse.evaluation.models import ModelInfo
from hf_sparse.files import write_whole

Row = dict[str, Any]


def row_key(**decisive: Any) -> str:
    """A hash of everything that decides a measured number, by which a run that starts again knows what it has.

    That is: the command and method, the model and its revision, dtype and kind of device, the tokens of the window
    (see `Window.sha256`), and the configuration. Not: time, host, versions, commit, threads and seed (which only
    drives the bootstrap, made anew from the rows each time). After a change of the code that should change numbers,
    give another output folder.
    """
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def provenance(info: ModelInfo, model: PreTrainedModel, seed: int) -> Row:
    """What every row says about how it was made; no path of the machine."""
    device = model.device
    return {
        "model": info.to_dict(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
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
