"""The package as a wheel installs it, with kernels that were compiled for every CPU of this architecture."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from hf_sparse.kernels.cpu.compiler import find_compiler

ROOT = Path(__file__).parents[1]
MadeOnce = Callable[[str, Callable[[Path], object]], Path]
"""Makes a folder once: see the fixture `made_once`."""


def build_wheel(folder: Path, **variables: str) -> Path:
    """Build a wheel of a copy of the sources into a folder, with environment variables."""
    copy = folder / "copy"
    shutil.copytree(ROOT / "hf_sparse", copy / "hf_sparse", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-c", "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])", str(folder)]
    subprocess.run(command, env={**os.environ, **variables}, cwd=copy, check=True, capture_output=True)
    shutil.rmtree(copy)
    (wheel,) = folder.glob("*.whl")
    return wheel


def installed(made_once: MadeOnce, *, optimised: bool = False) -> Path:
    """A folder with a wheel and, beside it, what is in it.

    Kernels are `optimised` as users have them; or less, which halves the time that six targets take to compile.
    """

    def make(folder: Path) -> None:
        variables = {} if optimised else {"CXX": str(quick_compiler(folder))}
        zipfile.ZipFile(build_wheel(folder, **variables)).extractall(folder)

    return made_once("optimised-wheel" if optimised else "wheel", make)


def quick_compiler(folder: Path) -> Path:
    """A C++ compiler that does what it is told, but at `-O1`."""
    script = folder / "quick-c++"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(find_compiler())} "$@" -O1\n', encoding="utf-8")
    script.chmod(0o755)
    return script


def installed_library(made_once: MadeOnce, *, optimised: bool = False) -> Path:
    """The library of the kernels in that folder."""
    (library,) = (installed(made_once, optimised=optimised) / "hf_sparse" / "kernels" / "cpu").glob("*.so")
    return library


def run_installed(made_once: MadeOnce, code: str) -> str:
    """What code prints that imports the installed package where there is no compiler."""
    environment = {**os.environ, "PYTHONPATH": str(installed(made_once)), "CXX": "/nowhere/c++"}
    environment.pop("HF_SPARSE_CPU", None)
    command = [sys.executable, "-P", "-c", code]  # -P: does not import from the working directory
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
