"""Compilation of the kernels for the CPU at hand, once; later processes load the compiled library."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

from huggingface_hub import constants

SWITCH = "HF_SPARSE_KERNELS"
"""The environment variable that turns compiled kernels off when set to `0`: PyTorch does everything then."""

# No -ffast-math: loading a library that is linked with it flushes denormal numbers to zero in the whole process.
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# What asks for all instructions of this CPU: the first of these that the compiler knows. Some versions of Clang know
# only the second for ARM; for x86 it would mean less.
_NATIVE = (("-march=native",), ("-mcpu=native",), ())
_COMPILERS = ("c++", "g++", "clang++")
# Seconds for one run of the compiler.
_LONGEST = 300.0


class _UnavailableError(Exception):
    """Why there are no kernels here, in a sentence."""


def library() -> ctypes.CDLL | None:
    """The compiled kernels; `None` where `unsupported_reason` says why."""
    return _found()[0]


def unsupported_reason() -> str | None:
    """Why there are no compiled kernels on this machine; `None` if there are. Compiles them the first time."""
    return _found()[1]


@cache
def _found() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        return ctypes.CDLL(str(_compiled())), None
    except _UnavailableError as error:
        return None, str(error)
    except OSError as error:
        return None, f"the compiled kernels cannot be loaded ({error})"


def _compiled() -> Path:
    if os.environ.get(SWITCH) == "0":
        raise _UnavailableError(f"{SWITCH}=0 is set")
    compiler = _compiler()
    with as_file(files(__package__)) as folder:
        sources = sorted(folder.glob("*.cpp"))
        content = b"".join(path.read_bytes() for path in sorted((*sources, *folder.glob("*.hpp"))))
        flags, instructions = _native(compiler)
        machine = (platform.machine(), platform.platform(), instructions)
        digest = hashlib.sha256(content + repr((compiler, flags, machine)).encode()).hexdigest()
        target = Path(constants.HF_ASSETS_CACHE) / "hf_sparse" / "kernels" / f"{digest[:16]}.so"
        if not target.is_file():
            _compile(compiler, flags, sources, target)
    return target


def _compiler() -> tuple[str, ...]:
    if chosen := os.environ.get("CXX"):
        return tuple(shlex.split(chosen))
    for name in _COMPILERS:
        if found := shutil.which(name):
            return (found,)
    raise _UnavailableError(
        f"there is no C++ compiler: none of {', '.join(_COMPILERS)} is on the path, and CXX is not set"
    )


def _native(compiler: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The flags to compile with here, and what the compiler predefines then: its version, and this CPU's instructions.

    CPUs with different instructions may share a name, and a home directory.
    """
    for native in _NATIVE:
        flags = (*_FLAGS, *native)
        command = [*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            raise _UnavailableError(f"the C++ compiler {shlex.join(compiler)} does not run ({error})") from None
        if done.returncode == 0:
            return flags, done.stdout
    raise _UnavailableError(f"the C++ compiler {shlex.join(compiler)} does not run ({_complaint(done)})")


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    return next(iter(done.stderr.strip().splitlines()), f"no message, exit status {done.returncode}")


def _compile(compiler: tuple[str, ...], flags: tuple[str, ...], sources: list[Path], target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            # Apple's compiler knows no OpenMP: the kernels then run on one thread.
            for threads in (["-fopenmp"], []):
                command = [*compiler, *flags, *threads, *map(str, sources), "-o", str(made)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST, check=False)
                if done.returncode == 0:
                    made.replace(target)
                    return
    except (OSError, subprocess.SubprocessError) as error:
        raise _UnavailableError(f"the kernels could not be compiled ({error})") from None
    raise _UnavailableError(f"the C++ compiler {shlex.join(compiler)} failed: {_complaint(done)}")
