"""The C++ compiler, and one library of the kernels for several targets: sets of CPU instructions.

Only the standard library is imported: `wheel.py` runs this file where the package cannot be imported yet.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_AVX2 = ("-mavx2", "-mfma")
# Loops that the compiler turns into vectors by itself are shorter than 512 bits pay for.
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=256")
_AVX512_VNNI = (*_AVX512, "-mavx512vnni")
_X86 = {
    "generic": (),
    "avx2": _AVX2,
    "avxvnni": (*_AVX2, "-mavxvnni"),
    "avx512": _AVX512,
    "avx512vnni": _AVX512_VNNI,
    "amx": (*_AVX512_VNNI, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
}
_ARM = {
    "generic": (),
    "dotprod": ("-march=armv8.2-a+dotprod",),
    "i8mm": ("-march=armv8.2-a+dotprod+i8mm",),
}
_TARGETS: dict[str, dict[str, tuple[str, ...]]] = {"x86_64": _X86, "amd64": _X86, "aarch64": _ARM, "arm64": _ARM}

# No -ffast-math: loading a library that is linked with it flushes denormal numbers to zero in the whole process.
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fvisibility=hidden")
# Apple's compiler knows no OpenMP: the kernels then run on one thread.
_THREADS = (("-fopenmp",), ())
_COMPILERS = ("c++", "g++", "clang++")
# Seconds for one run of the compiler.
_LONGEST = 300.0


class UnavailableError(Exception):
    """Why there are no compiled kernels, in a sentence."""


def targets(machine: str | None = None) -> dict[str, tuple[str, ...]]:
    """The targets of an architecture, this machine's by default, each with the flags that the compiler takes for it.

    `generic` is for every CPU of the architecture. Of those that a CPU supports, the last is the fastest.
    """
    return _TARGETS.get((machine or platform.machine()).lower(), {"generic": ()})


def find_compiler() -> tuple[str, ...]:
    """The compiler with its arguments: `CXX` if it is set, else the first that is on the path.

    Raises:
        UnavailableError: If there is none.
    """
    if chosen := os.environ.get("CXX"):
        return tuple(shlex.split(chosen))
    for name in _COMPILERS:
        if found := shutil.which(name):
            return (found,)
    raise UnavailableError(
        f"there is no C++ compiler: none of {', '.join(_COMPILERS)} is on the path, and CXX is not set"
    )


def knows(compiler: tuple[str, ...], flags: Iterable[str]) -> bool:
    """Whether a compiler takes these flags.

    Raises:
        UnavailableError: If the compiler cannot be started.
    """
    return not _run(compiler, *flags, "-E", "-x", "c++", os.devnull).returncode


def library_name(sources: Path, *settings: object) -> str:
    """The file name of a library: another one for other sources, flags or `settings`."""
    paths = sorted((*sources.glob("*.cpp"), *sources.glob("*.hpp"), sources / Path(__file__).name))
    content = b"".join(path.read_bytes() for path in paths) + repr(settings).encode()
    return f"kernels-{hashlib.sha256(content).hexdigest()[:16]}.so"


def compile_library(
    compiler: tuple[str, ...], sources: Path, chosen: Mapping[str, tuple[str, ...]], library: Path
) -> None:
    """Write one library with the kernels for each of the `chosen` targets: see `targets`.

    Without any target, it only tells what a CPU supports.

    Raises:
        UnavailableError: If it cannot be compiled.
    """
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            for threads in _THREADS:
                try:
                    objects = compile_objects((*compiler, *threads), sources, chosen, Path(folder))
                    _check(compiler, *threads, "-shared", *map(str, objects), "-o", str(made))
                    made.replace(library)
                    return
                except UnavailableError as error:
                    reason = error
    except OSError as error:
        raise UnavailableError(f"the kernels could not be compiled ({error})") from None
    raise reason


def compile_objects(
    compiler: tuple[str, ...], sources: Path, chosen: Mapping[str, tuple[str, ...]], folder: Path
) -> list[Path]:
    """Compile the sources once for each target, and the dispatcher, side by side.

    Returns:
        The objects in the order to link them in. Of a function of the C++ library that several objects hold, the linker
        takes the first, so that those of a narrow target come before those of a wider one.
    """
    commands: dict[Path, tuple[str, ...]] = {}
    for name, flags in chosen.items():
        for source in sorted(sources.glob("*.cpp"), reverse=True):  # the longest to compile is started first
            if source.name != "dispatch.cpp":
                commands[folder / f"{source.stem}-{name}.o"] = (*flags, f"-DHFS=hfs_{name}", str(source))
    linked = " ".join(f"TARGET({name})" for name in chosen)
    commands[folder / "dispatch.o"] = (f"-DTARGETS={linked}", str(sources / "dispatch.cpp"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wait = [
            pool.submit(_check, compiler, *_FLAGS, *command, "-c", "-o", str(to)) for to, command in commands.items()
        ]
        for done in wait:
            done.result()
    return list(commands)


def _check(compiler: tuple[str, ...], *arguments: str) -> None:
    done = _run(compiler, *arguments)
    if done.returncode:
        complaint = next(iter(done.stderr.strip().splitlines()), f"no message, exit status {done.returncode}")
        raise UnavailableError(f"the C++ compiler {shlex.join(compiler)} failed: {complaint}")


def _run(compiler: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run([*compiler, *arguments], capture_output=True, text=True, timeout=_LONGEST, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise UnavailableError(f"the C++ compiler {shlex.join(compiler)} does not run ({error})") from None
