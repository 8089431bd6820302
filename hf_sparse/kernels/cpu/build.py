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
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
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
        machine = (platform.machine(), platform.platform(), _native(compiler))
        digest = hashlib.sha256(content + repr((compiler, _FLAGS, machine)).encode()).hexdigest()
        target = Path(constants.HF_ASSETS_CACHE) / "hf_sparse" / "kernels" / f"{digest[:16]}.so"
        if not target.is_file():
            _compile(compiler, sources, target)
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


def _native(compiler: tuple[str, ...]) -> str:
    """What the compiler predefines here: its version, and the instructions of this CPU.

    CPUs with different instructions may share a name, and a home directory.
    """
    command = [*compiler, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise _UnavailableError(f"the C++ compiler {shlex.join(compiler)} does not run ({error})") from None


def _compile(compiler: tuple[str, ...], sources: list[Path], target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            # Apple's compiler knows no OpenMP: the kernels then run on one thread.
            for threads in (["-fopenmp"], []):
                command = [*compiler, *_FLAGS, *threads, *map(str, sources), "-o", str(made)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST, check=False)
                if done.returncode == 0:
                    made.replace(target)
                    return
    except (OSError, subprocess.SubprocessError) as error:
        raise _UnavailableError(f"the kernels could not be compiled ({error})") from None
    first = next(iter(done.stderr.strip().splitlines()), "no message")
    raise _UnavailableError(f"the C++ compiler {shlex.join(compiler)} failed: {first}")
