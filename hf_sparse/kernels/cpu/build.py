"""The compiled kernels that a process uses: those in the package, or those compiled for this CPU on first use."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
from contextlib import suppress
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

from huggingface_hub import constants

from hf_sparse.errors import UserError
from hf_sparse.kernels.cpu.compiler import (
    UnavailableError,
    compile_library,
    find_compiler,
    knows,
    library_name,
    targets,
)

SWITCH = "HF_SPARSE_KERNELS"
"""The environment variable that turns compiled kernels off when set to `0`: PyTorch does everything then."""

TARGET = "HF_SPARSE_CPU"
"""The environment variable that names the target to use, such as `avx2`, instead of the best that the CPU supports."""

# Instructions in the order that suits this CPU; others can run them, too.
_TUNING = ("-mtune=native",)


def library() -> ctypes.CDLL | None:
    """The compiled kernels; `None` where `unsupported_reason` says why."""
    return _found()[0]


def unsupported_reason() -> str | None:
    """Why there are no compiled kernels on this machine; `None` if there are. Compiles them the first time.

    Raises:
        UserError: If `HF_SPARSE_CPU` names a target that cannot be used here.
    """
    found, about = _found()
    return about if found is None else None


def description() -> str | None:
    """The target in use, and when it was compiled: `avx2, compiled on first use`; `None` without compiled kernels."""
    found, about = _found()
    return None if found is None else f"{found.hfs_target().decode()}, {about}"


@cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    try:
        return _chosen()
    except UnavailableError as error:
        return None, str(error)
    except OSError as error:
        return None, f"the compiled kernels cannot be loaded ({error})"


def _chosen() -> tuple[ctypes.CDLL, str]:
    """The library, and when it was compiled."""
    if os.environ.get(SWITCH) == "0":
        raise UnavailableError(f"{SWITCH}=0 is set")
    with as_file(files(__package__)) as sources:
        with suppress(OSError):
            installed = _load(sources / library_name(sources))
            if any(installed.hfs_use(name.encode()) for name in reversed(_usable(installed))):
                return installed, "compiled at installation"
        return _load(_compiled(sources)), "compiled on first use"


def _load(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    found.hfs_target.restype = ctypes.c_char_p
    return found


def _usable(dispatcher: ctypes.CDLL) -> list[str]:
    """The targets that this CPU supports, the fastest last; of them, the one that is asked for."""
    supported = [name for name in targets() if dispatcher.hfs_supports(name.encode())]
    if not (wanted := os.environ.get(TARGET)):
        return supported
    if wanted not in supported:
        raise UserError(f"{TARGET}={wanted} is no target of this CPU: it supports {', '.join(supported)}")
    return [wanted]


def _compiled(sources: Path) -> Path:
    """A library with the best target for this CPU alone: others would take time, and not be used."""
    compiler = find_compiler()
    usable = _usable(_load(_made(compiler, sources)))
    for name in reversed(usable):
        if _place(compiler, sources, name).is_file() or knows(compiler, targets()[name]):
            return _made(compiler, sources, name)
    raise UserError(f"{TARGET}={usable[0]}: the C++ compiler {shlex.join(compiler)} cannot compile for it")


def _made(compiler: tuple[str, ...], sources: Path, *names: str) -> Path:
    """The library with these targets, compiled now or before."""
    path = _place(compiler, sources, *names)
    if not path.is_file():
        tuned = (*compiler, *_TUNING) if knows(compiler, _TUNING) else compiler
        compile_library(tuned, sources, {name: targets()[name] for name in names}, path)
    return path


def _place(compiler: tuple[str, ...], sources: Path, *names: str) -> Path:
    machine = (platform.system(), platform.machine(), *platform.libc_ver())
    return Path(constants.HF_ASSETS_CACHE) / "hf_sparse" / "kernels" / library_name(sources, compiler, names, machine)
