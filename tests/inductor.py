"""Whether the default backend of `torch.compile` can run here."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path


def compiler_present() -> bool:
    """Whether inductor can build its kernels: a C++ compiler, and the headers of Python."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return headers.exists() and any(shutil.which(name) for name in ("g++", "c++", "clang++"))
