"""The kernels on emulated CPUs use the best target for each, and do what those of this machine do."""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from hf_sparse import SparseAttentionConfig
from hf_sparse.call import Selection, SharedSelection
from hf_sparse.kernels import cpu
from hf_sparse.kernels.cpu import build, compiler
from hf_sparse.kernels.int8 import Int8States
from hf_sparse.selectors.grouped import GROUP_QUERIES
from tests import calls
from tests.installed import MadeOnce, installed_library

ARM_COMPILER = shutil.which("aarch64-linux-gnu-g++")
WANTED = "on Debian, apt-get install g++-aarch64-linux-gnu qemu-user"
pytestmark = pytest.mark.skipif(cpu.unsupported_reason() is not None, reason=str(cpu.unsupported_reason()))
SOURCES = Path(build.__file__).parent
# Architecture, model, and target of the emulated CPUs. The emulator knows no AVX-512.
CPUS = [
    ("x86_64", "Nehalem", "generic"),
    ("x86_64", "Haswell", "avx2"),
    ("aarch64", "cortex-a53", "generic"),
    ("aarch64", "neoverse-n1", "dotprod"),
    ("aarch64", "max", "i8mm"),
]

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
CONFIG = SparseAttentionConfig(sink_keys=3, recent_keys=10)
# Queries, keys, heads that share a key head, components of a key, type, soft cap: more keys than a period of the
# estimate has, more heads than registers hold, and keys so long that sums of products outgrow 16 bits.
CALLS = {
    "decode": (1, 2500, 1, 64, torch.float32, None),
    "decode, capped": (1, 1300, 3, 24, torch.bfloat16, 1.5),
    "decode, two": (1, 700, 2, 24, torch.float16, None),
    "decode, four": (1, 700, 4, 64, torch.float32, None),
    "decode, seven": (1, 700, 7, 64, torch.bfloat16, None),
    "decode, 8 bits": (1, 700, 3, 64, torch.int8, None),
    "decode, long": (1, 700, 1, 264, torch.float32, None),
    "prefill": (64, 1150, 1, 64, torch.float16, None),
    "prefill, capped": (64, 300, 3, 24, torch.float32, 1.5),
    "prefill, groups": (128, 300, 3, 64, torch.bfloat16, None),
    "prefill, 8 bits": (64, 300, 3, 64, torch.int8, None),
    "prefill, few": (7, 300, 3, 24, torch.float16, None),
    "prefill, long": (7, 200, 1, 264, torch.float32, None),
}
MASKED = {"decode, capped", "decode, four", "prefill, capped", "prefill, few"}
"""Calls whose attention is to keys at random, by a mask, instead of to those that are kept."""


class Case:
    """A call of the kernels, and what those of this machine give.

    Attributes:
        parts: Codes, scales, positions and runs of the kept keys, and attention's output.
    """

    def __init__(self, name: str) -> None:
        q_len, kv_len, share, dim, dtype, softcap = CALLS[name]
        call = calls.inputs(
            calls.causal_intervals(q_len, kv_len, left=(0, 5)),
            kv_len,
            heads=2 * share,
            kv_heads=2,
            dim=dim,
            value_dim=dim - 3,
            dtype=torch.float32 if dtype == torch.int8 else dtype,
            softcap=softcap,
        )
        if dtype == torch.int8:
            call = replace(call, key=Int8States.rounded(call.key), value=Int8States.rounded(call.value))
        if "long" in name:  # numbers of one sign and much alike: their products are large
            key = 1 + call.key / 10
            key[:, :, :300:2] *= -1  # so that the first keys, whose mean is subtracted, have none
            call = replace(call, query=1 + call.query / 10, key=key)
        self.call = call = replace(call, query=call.query.float())
        self.heads, self.size = 2 * share, min(GROUP_QUERIES, q_len)
        budgets = torch.minimum(call.visible[:, None], torch.arange(70, 70 + self.heads)[:, None])
        self.kept = calls.select("grouped", call, budgets, CONFIG)
        assert isinstance(self.kept, SharedSelection)
        attended: Selection = self.kept
        if name in MASKED:
            attended = calls.random_selection(call, 1 if q_len == 1 else self.size, q_len > 1)
        missing = -attended.positions.shape[-1] % cpu.TILE
        positions = F.pad(attended.positions, (0, missing))
        runs = attended.runs if isinstance(attended, SharedSelection) else None
        allowed = None if runs is not None else F.pad(attended.allowed, (0, missing))
        out = cpu.attend(
            *(call.scaled_query, call.key, call.value, positions),
            allowed=allowed,
            runs=runs,
            size=attended.queries_per_group,
            per_head=attended.per_head,
            sinks=None,
            softcap=softcap,
        )
        quantised = cpu.LAYOUT.allocate(call.key, kv_len)
        center = call.own_quantised.center
        cpu.LAYOUT.quantise(call.key, 0, kv_len, quantised, center)
        self.parts = (*quantised, self.kept.positions, self.kept.runs, out)
        header = struct.pack(
            "=16qd",
            *(2, self.heads, 2, q_len, kv_len, dim, dim - 3, FORMATS[dtype]),
            *(self.size, self.kept.positions.shape[-1], CONFIG.sink_keys, CONFIG.recent_keys),
            *(attended.queries_per_group, positions.shape[-1], attended.per_head, runs is None),
            softcap or 0.0,
        )
        arrays = (call.key, call.value)
        if isinstance(call.key, Int8States) and isinstance(call.value, Int8States):
            arrays = (call.key.codes, call.value.codes, call.key.scales, call.value.scales)
        arrays += (center, call.scaled_query, call.ranges.first, call.ranges.stop)
        arrays += (budgets.expand(-1, -1, q_len), positions, allowed if runs is None else runs)
        self.written = header + b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in arrays)

    def mask(self, positions: Tensor, runs: Tensor) -> Tensor:
        """Which keys each query keeps: bool `(batch, heads, q_len, kv_len)`."""
        return SharedSelection(positions, runs, self.size).mask(self.heads, self.call.key.shape[2])


@cache
def cases() -> dict[str, Case]:
    return {name: Case(name) for name in CALLS}


def arm_program(folder: Path, optimised: bool) -> None:
    """Write a program with the kernels for all ARM CPUs: as users have them, or less optimised, in half the time."""
    less = () if optimised else ("-O1",)
    targets = {name: (*flags, *less) for name, flags in compiler.targets("aarch64").items()}
    objects = compiler.compile_objects((str(ARM_COMPILER),), SOURCES, targets, folder)
    compile_driver(str(ARM_COMPILER), folder, "-static", *objects)


def compile_driver(compiler: str, folder: Path, *linked: str | Path) -> None:
    driver = Path(__file__).parent / "emulated" / "driver.cpp"
    command = [compiler, "-std=c++17", "-O1", f"-I{SOURCES}", driver, *linked, "-o", folder / "driver"]
    subprocess.run(list(map(str, command)), check=True)


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["-O1", "-O3"])
def optimised(request: pytest.FixtureRequest) -> bool:
    """Whether kernels are compiled as users have them."""
    return bool(request.param)


@pytest.fixture(scope="module", params=CPUS, ids=lambda x: f"{x[0]}-{x[1]}")
def found(
    request: pytest.FixtureRequest, optimised: bool, tmp_path_factory: pytest.TempPathFactory, made_once: MadeOnce
) -> dict[str, list[Tensor]]:
    """What the kernels give for all calls on an emulated CPU: see `Case.parts`."""
    machine, model, target = request.param
    emulator = shutil.which(f"qemu-{machine}") or shutil.which(f"qemu-{machine}-static")
    if emulator is None or (machine == "aarch64" and ARM_COMPILER is None):
        pytest.skip(f"there is no qemu-{machine}, or no compiler for it: {WANTED}")
    level = "optimised" if optimised else "quick"
    if machine == "aarch64":
        program = made_once(f"{level}-arm", lambda folder: arm_program(folder, optimised)) / "driver"
    elif platform.machine() != machine:
        pytest.skip(f"the kernels for {machine} are compiled on {machine}")
    else:
        library = installed_library(made_once, optimised=optimised)
        linked = (library, f"-Wl,-rpath,{library.parent}")
        made = made_once(f"{level}-driver", lambda folder: compile_driver(compiler.find_compiler()[0], folder, *linked))
        program = made / "driver"
    folder = tmp_path_factory.mktemp("emulated")
    wanted, results = (folder / name for name in ("calls", "results"))
    wanted.write_bytes(b"".join(case.written for case in cases().values()))
    command = [emulator, "-cpu", model, str(program), str(wanted), str(results)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.split() == [target]
    given, at, out = bytearray(results.read_bytes()), 0, {}
    for name, case in cases().items():
        out[name] = []
        for part in case.parts:
            values = torch.frombuffer(given, dtype=part.dtype, count=part.numel(), offset=at)
            out[name].append(values.view(part.shape))
            at += part.nbytes
    assert at == len(given)
    return out


@pytest.mark.parametrize("name", CALLS)
def test_emulated_cpus_do_the_same(name: str, found: dict[str, list[Tensor]]) -> None:
    """Sums of numbers are rounded in another order: of keys that are almost equally important, another may be kept."""
    case = cases()[name]
    codes, scales, positions, runs, out = found[name]
    assert torch.equal(codes, case.parts[0])
    assert torch.equal(scales, case.parts[1])
    assert torch.equal(runs, case.parts[3])
    mask, expected = case.mask(positions, runs), case.mask(*case.parts[2:4])
    assert torch.equal(mask.sum(-1), expected.sum(-1))
    assert (mask & ~expected).sum() <= 0.001 * expected.sum()
    assert_close(out, case.parts[4], atol=1e-5, rtol=1e-5)
