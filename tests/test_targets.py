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
COMPUTE = """
import sys, torch
from hf_sparse.kernels import cpu
from hf_sparse.kernels.cpu import build
from tests import test_targets
print(build.description(), cpu.lanes(), build.__file__, sep="\\n")
torch.save([test_targets.attended(*case) for case in test_targets.CASES], sys.argv[1])
"""


def attended(
    q_len: int, kv_len: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What is kept by, and comes out of, a call of that shape."""
    intervals = calls.causal_intervals(q_len, kv_len, left=(0, 5))
    call = calls.inputs(intervals, kv_len, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    selection = compiled(call, torch.full((2, 1, q_len), 90))
    return selection.mask(heads, kv_len), calls.run_engine("cpu", call, selection)


def supported() -> list[str]:
    library = build.library()
    assert library is not None
    return [name for name in compiler.targets() if library.hfs_supports(name.encode())]


@pytest.mark.parametrize("target", compiler.targets())
def test_every_target_does_the_same(target: str, tmp_path: Path, made_once: MadeOnce) -> None:
    if target not in supported() or not compiler.knows(compiler.find_compiler(), compiler.targets()[target]):
        pytest.skip(f"this CPU, or the compiler, does not support {target}")
    found = tmp_path / "found"
    about, lanes, file = run_installed(made_once, COMPUTE, str(found), HF_SPARSE_CPU=target).splitlines()
    assert about == f"{target}, compiled at installation"
    assert int(lanes) == LANES[target]
    assert Path(file).is_relative_to(installed(made_once))
    for case, (mask, out) in zip(CASES, torch.load(found), strict=True):
        expected, expected_out = attended(*case)
        assert torch.equal(mask.sum(-1), expected.sum(-1))
        assert overlap(mask, expected) > 0.999
        same = (mask == expected).all(-1)
        assert same.float().mean() > 0.95
        assert_close(out[same], expected_out[same])


def test_an_installed_package_uses_the_best_target_without_a_compiler(made_once: MadeOnce) -> None:
    ask = "from hf_sparse.kernels.cpu import build; print(build.description())"
    known = [name for name in supported() if compiler.knows(compiler.find_compiler(), compiler.targets()[name])]
    assert run_installed(made_once, ask).strip() == f"{known[-1]}, compiled at installation"


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
