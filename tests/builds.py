"""Kernels for CPUs as they are on other machines, for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from hf_sparse.kernels.cpu import build


@contextmanager
def built_anew(folder: Path, **variables: str) -> Iterator[None]:
    """The kernels are compiled into `folder`, or found there, with these environment variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.setattr(build.constants, "HF_ASSETS_CACHE", str(folder))
        patch.setattr(build, "_found", cache(build._found.__wrapped__))
        yield
