"""What is set before anything is imported; what tests share is in `fixtures`."""

from __future__ import annotations

import importlib
import os

import pytest

# No test may depend on what the network says. huggingface_hub reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

# The tests run side by side, one process a core: more threads would only fight over the same cores. NumPy's libraries
# and processes that tests start read this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# For a handful of kernels, inductor need not start a process a core that imports PyTorch, nor try which vectors the C++
# compiler knows by programs of its own: each takes longer than the kernels.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")


def pytest_configure(config: pytest.Config) -> None:
    """Leave out seconds of imports in a process that only hands tests to others, which wait for it."""
    if config.getoption("dist", "no") == "no":
        config.pluginmanager.register(importlib.import_module("tests.fixtures"))
