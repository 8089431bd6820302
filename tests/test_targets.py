"""An installed package holds the kernels for every CPU of an architecture, and each target keeps the same keys."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hf_sparse.kernels import cpu
from hf_sparse.kernels.cpu import build, compiler
from tests import calls
from tests.installed import MadeOnce, build_wheel, installed, installed_library, run_installed
from tests.test_grouped import SHAPES, compiled, overlap

pytestmark = pytest.mark.skipif(cpu.unsupported_reason() is not None, reason=str(cpu.unsupported_reason()))
X86 = platform.machine() in ("x86_64", "AMD64")
LANES = {"generic": 4, "avx2": 8, "avxvnni": 8, "avx512": 16, "avx512vnni": 16, "amx": 16, "dotprod": 4, "i8mm": 4}
# Matrix units take heads of a multiple of 64 components, and keys and values in bfloat16.
CASES = [(*shape, dim, dtype) for dim, dtype in ((24, torch.float32), (64, torch.bfloat16)) for shape in SHAPES]
ASK = """
import os
from hf_sparse.kernels.cpu import build
print(build.__file__, build.description(), sep="\\n")
os.environ["HF_SPARSE_CPU"] = "generic"
build._found.cache_clear()
print(build.description())
"""


def attended(q_len: int, kv_len: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What is kept by, and comes out of, a call of that shape."""
    intervals = calls.causal_intervals(q_len, kv_len, left=(0, 5))
    call = calls.inputs(intervals, kv_len, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    selection = compiled(call, torch.full((2, 1, q_len), 90))
    return selection.mask(heads, kv_len), calls.run_engine("cpu", call, selection)


def runnable() -> list[str]:
    """The targets that the compiler and this CPU support, the best last."""
    library, command = build.library(), compiler.find_compiler()
    assert library is not None
    every = compiler.targets().items()
    return [name for name, flags in every if library.hfs_supports(name.encode()) and compiler.knows(command, flags)]


@pytest.mark.parametrize("optimised", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", compiler.targets())
def test_every_target_does_the_same(
    target: str, optimised: bool, made_once: MadeOnce, monkeypatch: pytest.MonkeyPatch
) -> None:
    if target not in runnable():
        pytest.skip(f"this CPU, or the compiler, does not support {target}")
    native = [attended(*case) for case in CASES]
    library = build._load(installed_library(made_once, optimised=optimised))
    assert library.hfs_use(target.encode())
    assert library.hfs_target().decode() == target
    monkeypatch.setattr(build, "library", lambda: library)
    assert cpu.lanes() == LANES[target]
    for case, (expected, expected_out) in zip(CASES, native, strict=True):
        mask, out = attended(*case)
        assert torch.equal(mask.sum(-1), expected.sum(-1))
        assert overlap(mask, expected) > 0.999
        same = (mask == expected).all(-1)
        assert same.float().mean() > 0.95
        assert_close(out[same], expected_out[same])


def test_an_installed_package_needs_no_compiler(made_once: MadeOnce) -> None:
    file, best, forced = run_installed(made_once, ASK).splitlines()
    assert Path(file).is_relative_to(installed(made_once))
    assert best == f"{runnable()[-1]}, compiled at installation"
    assert forced == "generic, compiled at installation"


def test_a_wheel_is_for_this_platform_and_any_python(made_once: MadeOnce) -> None:
    (wheel,) = installed(made_once).glob("*.whl")
    assert re.fullmatch(r"hf_sparse-[\d.]+-py3-none-(?!any).+\.whl", wheel.name)
    assert installed_library(made_once).name == compiler.library_name(Path(build.__file__).parent)


def test_a_wheel_without_a_compiler_is_for_any_platform(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, CXX="/nowhere/c++")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert "hf_sparse/kernels/cpu/dispatch.cpp" in names


@pytest.mark.skipif(not X86 or shutil.which("objdump") is None, reason="reads x86 instructions with objdump")
def test_functions_that_targets_share_run_on_every_cpu(made_once: MadeOnce) -> None:
    """Of a function of the C++ library that several objects hold, the linker keeps one."""
    library = str(installed_library(made_once))

    def lines(*command: str) -> list[str]:
        return subprocess.run([*command, library], capture_output=True, text=True, check=True).stdout.splitlines()

    shared = {line.split()[-1].split("@")[0] for line in lines("nm", "-D", "--defined-only")}
    assert {"hfs_attend", "hfs_supports"} <= shared
    function, wide = "", {}
    for line in lines("objdump", "-d", "--no-show-raw-insn"):
        if header := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            function = header[1]
        elif re.search(r":\s+v|%[yz]mm", line):
            wide.setdefault(function, line)
    assert len(wide) > 20
    assert not {name: line for name, line in wide.items() if name in shared}
