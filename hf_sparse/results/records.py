"""Measured records on disk: JSON lines that interrupted runs resume from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from hf_sparse.errors import UserError, first_line
from hf_sparse.results.machine import process_state

Record = dict[str, Any]
CellT = TypeVar("CellT")


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
        """Add a record, stamped with the time in UTC.

        Raises:
            UserError: naming the file, if it cannot be written, or the disk is full.
        """
        record = {**record, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write in append mode: lines of several processes do not mix.
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                if os.write(file, line) != len(line):
                    raise OSError("only a part of a record was written; is the disk full?")
            finally:
                os.close(file)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or first_line(error)}") from error
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

    Of several processes, each appends what its own `measure` yields (see `my_share`), and all get all records.

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
