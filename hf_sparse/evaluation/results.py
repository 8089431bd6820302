"""Results on disk: one JSON line per measurement, with what is needed to repeat it and to resume a run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_sparse.evaluation.models import ModelInfo

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

    def repair(self) -> None:
        """Cut off a last line that a killed run left unfinished. Only while nobody else writes."""
        if not self.path.exists():
            return
        data = self.path.read_bytes()
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

    def rows(self) -> dict[str, Row]:
        """The rows by their key, the first of each; empty if there is no file."""
        out: dict[str, Row] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                out.setdefault(row["key"], row)
        return out


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write `data` as readable JSON, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)
