"""The length from which sparse attention is not slower than dense on this machine: measured once, kept, used later.

`hf-sparse bench --save-break-even` measures and keeps it. What is kept is a default for `dense_below` and nothing else:
it moves no budget of a row that is sparse, a `dense_below` that is given wins over it, and commands that evaluate a
model never read it.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from hf_sparse.config import SparseAttentionConfig
from hf_sparse.machine import device_name

SWITCH = "HF_SPARSE_BREAK_EVEN"
"""The environment variable that, set to `0`, makes every machine behave as one on which nothing was measured."""


@dataclass(frozen=True)
class Machine:
    """What a break-even is true of.

    Attributes:
        device_name: The processor or GPU.
        dtype: Of keys and values, such as `"float32"`.
        heads: Query heads.
        kv_heads: Key heads.
        head_dim: Size of a head.
        config: Hash of the configuration, but for what stays dense.
        versions: Of hf_sparse and torch.
    """

    device_name: str
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    config: str
    versions: Mapping[str, str]

    @classmethod
    def here(
        cls, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], config: SparseAttentionConfig
    ) -> Machine:
        """This machine, for layers of `shape` (query heads, key heads, head dimension) under `config`."""
        fields = replace(config, dense_below=0, dense_layers=None).to_dict()
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
        versions = {name: version(name) for name in ("hf_sparse", "torch")}
        return cls(device_name(device), str(dtype).removeprefix("torch."), *shape, digest, versions)

    @property
    def file(self) -> Path:
        """Where its break-even is kept: among the assets of Hugging Face libraries in the user's cache."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]
        return Path(constants.HF_ASSETS_CACHE) / "hf_sparse" / "break_even" / f"{digest}.json"


def save(machine: Machine, dense_below: int, measured: Mapping[str, Any]) -> Path:
    """Keep a measured break-even; gives the file.

    Args:
        machine: What it is true of.
        dense_below: Visible keys from which sparse attention is not slower.
        measured: How it was measured, for people who look into the file.
    """
    path = machine.file
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    content = {"dense_below": dense_below, "machine": asdict(machine), "measured": dict(measured)}
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def load(machine: Machine) -> int | None:
    """The break-even kept for `machine`; `None` if there is none, or it is switched off.

    A file that cannot be read is left out with a warning.
    """
    if os.environ.get(SWITCH) == "0" or not machine.file.is_file():
        return None
    try:
        found = json.loads(machine.file.read_text(encoding="utf-8"))["dense_below"]
        if isinstance(found, bool) or not isinstance(found, int) or found < 0:
            raise ValueError(f"dense_below must be a whole number, at least 0; got {found!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"{machine.file} holds no break-even ({error}): it is not used; delete it, or measure anew with "
            "hf-sparse bench --save-break-even",
            UserWarning,
            stacklevel=2,
        )
        return None
    return found
