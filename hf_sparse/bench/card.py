"""The GPU that a benchmark ran on."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def card(device: torch.device) -> dict[str, Any] | None:
    """What decides times on a GPU beside its name, as `hf_sparse.results.machine.device_name` gives it.

    Returns:
        `driver`, `cuda` (or `hip`), `cudnn` and `triton`: versions, `None` where there are none; `capability`,
        `multiprocessors`, `memory_bytes`, `cache_bytes`. `None` for other devices.
    """
    if device.type != "cuda":
        return None
    facts = torch.cuda.get_device_properties(device)
    return {
        "driver": driver(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "triton": installed("triton"),
        "capability": [facts.major, facts.minor],
        "multiprocessors": facts.multi_processor_count,
        "memory_bytes": facts.total_memory,
        "cache_bytes": getattr(facts, "L2_cache_size", None),
    }


def driver() -> str | None:
    """The version of NVIDIA's driver; `None` where its tool does not say it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.strip().partition("\n")[0] or None


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
