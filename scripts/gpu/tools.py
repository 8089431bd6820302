"""Tools that run checks of their own: pytest and compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu import finding, kernels, layers, selection
from gpu.cases import Case, SkippedError
from gpu.machine import Machine
from gpu.references import Shape

_TAIL = 4000
_SANITIZER = "/usr/local/cuda/bin/compute-sanitizer"


def tests(machine: Machine) -> Iterator[Case]:
    """The tests of the Triton kernels, which take a GPU if there is one."""

    def run() -> dict[str, Any]:
        side_by_side = ["-n", "6"] if find_spec("xdist") is not None and not machine.interprets else []
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *side_by_side]
        command += ["tests/test_triton.py", *machine.pick([], ["-k", "several_tiles and 80"])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode in (3, 4, 5) or "ModuleNotFoundError" in done.stderr + done.stdout:
            raise SkippedError(f"pytest cannot run these tests here: {(done.stdout + done.stderr)[-_TAIL:]}")
        failed = re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE)
        status = "ok" if done.returncode == 0 else "wrong"
        return {"status": status, "failed": failed, "output": done.stdout[-_TAIL:], "exit": done.returncode}

    yield Case("pytest", run)


def sanitizer(machine: Machine, tool: str) -> Iterator[Case]:
    """The check `small` under compute-sanitizer; in the interpreter without it, as a rehearsal."""

    def run() -> dict[str, Any]:
        command = [sys.executable, "-m", "gpu.child", "small", machine.pick("cuda", "interpret"), "0"]
        if not machine.interprets:
            program = shutil.which("compute-sanitizer") or _SANITIZER
            if not Path(program).exists():
                raise SkippedError("compute-sanitizer is not installed")
            options = ["--tool", tool, "--error-exitcode", "99", "--report-api-errors", "no"]
            command = [program, *options, *command]
        # A cached block of memory is larger than a tensor: addresses behind the tensor would count as right.
        env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        output = done.stdout + done.stderr
        summary = re.findall(r"=+ (.*SUMMARY.*)", output)
        if not machine.interprets and ("Device not supported" in output or not summary):
            raise SkippedError(f"{tool} does not run here: {output[-_TAIL:]}")
        found = re.findall(r"=+ (?:Invalid|Error|Race|Warning|Potential).*(?:\n=+ .*){0,8}", output)
        statuses = re.findall(r'"status": "(\w+)"', done.stdout)
        bad = done.returncode or not statuses or set(statuses) - {"ok", "skipped"}
        return {
            "status": "wrong" if bad else "ok",
            "cases": statuses,
            "summary": summary,
            "found": found[:5],
            "exit": done.returncode,
            "output": output[-_TAIL:],
        }

    yield Case(tool, run)


def small(machine: Machine) -> Iterator[Case]:
    """Every kernel once or twice, on shapes that are no multiples of a tile."""
    shape = Shape(length=200, width=70, kv_heads=2, dim=80, dtype=machine.half)
    yield from list(finding.codes(machine))[:2]
    yield kernels.attend_case(shape, machine, "attend, decode")
    prefill = Shape(length=200, width=70, queries=20, group=20, kv_heads=2, dim=80, dtype=machine.half)
    yield kernels.attend_case(prefill, machine, "attend, prefill")
    yield selection.case(Shape(length=700, kv_heads=2, dtype=machine.half), machine, "select, decode")
    yield selection.case(Shape(length=700, queries=70, kv_heads=2, dtype=machine.half), machine, "select, prefill")
    yield layers.case(Shape(length=700, queries=70, kv_heads=2, dtype=machine.half), machine, "layer, prefill")
