"""What decides a measured number and how it was made: keys of records, models, devices, versions and the commit."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_sparse.results.machine import device_name
from hf_sparse.results.records import Record
from hf_sparse.version import __version__


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
    return {"versions": versions() | {"python": platform.python_version()}, "commit": commit()}


def versions() -> dict[str, str]:
    """Package -> version: this one, and those that it computes with."""
    return {"hf_sparse": __version__, **{name: version(name) for name in ("torch", "transformers")}}


@cache
def commit() -> str | None:
    """The git commit that this package runs from, with `-dirty` after it if files were changed; else `None`."""
    try:
        # The package may be installed inside some other project's checkout: only a commit that has it counts.
        for command in (
            ["ls-files", "--error-unmatch", Path(__file__).name],
            ["describe", "--always", "--dirty", "--abbrev=40"],
        ):
            done = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *command], capture_output=True, text=True, check=True
            )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
