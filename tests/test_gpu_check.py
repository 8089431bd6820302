"""The script that checks GPUs: what failures cost, what is left of a killed run, and that its checks can fail."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sparse.call import AttentionCall, Selection
from hf_sparse.visibility import interval_to_mask

ROOT = Path(__file__).parents[1]
SCRIPT = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), "--device", "interpret"]
UNNEEDED = ("datasets", "evaluate", "gguf", "matplotlib", "rich", "typer")


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """The modules of the checks, by name."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return lambda name: importlib.import_module(f"gpu.{name}")


def run(output: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [*SCRIPT, "--output", str(output), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def statuses(output: Path) -> dict[str, str]:
    """Status of every case, and of every check as a whole."""
    return {" ".join(filter(None, (x["check"], x.get("case")))): x["status"] for x in records(output)}


def test_a_failure_costs_one_case(tmp_path: Path) -> None:
    output = tmp_path / "new" / "faults.jsonl"
    done = run(output, "--phase", "faults", "--only", "faults/[!n]*", "--each", "2", "--jobs", "2")
    assert done.returncode == 1
    assert statuses(output) == {
        "faults/wrong": "wrong",
        "faults/wrong wrong": "wrong",
        "faults/wrong right": "ok",
        "faults/abort": "crash",
        "faults/abort before": "ok",
        "faults/abort abort": "crash",
        "faults/abort after": "ok",
        "faults/hang": "timeout",
        "faults/hang hang": "timeout",
        "faults/hang after": "ok",
        "faults/start": "crash",
        "faults/start start": "crash",
    }
    by_case = {(x["check"], x.get("case")): x for x in records(output)}
    wrong = by_case["faults/wrong", "wrong"]["error"]
    assert (wrong["relative"], wrong["worst"], wrong["got"], wrong["want"]) == ("inf", [1, 2], "nan", 6.0)
    abort = by_case["faults/abort", "abort"]
    assert (abort["exit"], abort["dtype"]) == ("SIGABRT", "float32")
    assert abort["stderr"].endswith("case abort\n")
    assert 2 <= by_case["faults/hang", "hang"]["seconds"] < 4
    assert "AttributeError" in by_case["faults/start", "start"]["stderr"]
    last = done.stderr.splitlines()[-4:]
    assert [line.split()[:2] for line in last] == [
        ["faults/wrong", "wrong"],
        ["faults/abort", "crash"],
        ["faults/hang", "timeout"],
        ["faults/start", "crash"],
    ]


def state_of(process: int) -> tuple[str, int]:
    """The state of a process, `"Z"` if it has ended or is there no more, and its parent."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "Z", 0
    state, parent = text.rpartition(")")[2].split()[:2]
    return state, int(parent)


def children_of(process: int) -> list[int]:
    numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [number for number in numbers if state_of(number)[1] == process]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
def test_a_killed_run_leaves_what_it_found_and_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "faults.jsonl"
    arguments = ["--phase", "faults", "--only", "faults/[nh]*", "--jobs", "1"]
    with subprocess.Popen([*SCRIPT, "--output", str(output), *arguments], stderr=subprocess.DEVNULL) as parent:
        until = time.monotonic() + 40
        while not output.exists() or len(output.read_bytes().splitlines()) < 2 or not children_of(parent.pid):
            assert time.monotonic() < until
            time.sleep(0.1)
        [child] = children_of(parent.pid)
        time.sleep(2)  # the child has come to its case without an end
        parent.send_signal(signal.SIGKILL)
    assert statuses(output) == {"faults/none right": "ok", "faults/none": "ok"}
    until = time.monotonic() + 10
    while state_of(child)[0] != "Z":
        assert time.monotonic() < until, "a check outlived its parent"
        time.sleep(0.1)
    with output.open("a", encoding="utf-8") as file:
        file.write('{"phase": "faults", "che')
    again = run(output, *arguments, "--only", "faults/none")
    assert again.returncode == 0
    assert "faults/none: was ok before" in again.stderr
    forgotten = output.read_text(encoding="utf-8").replace('"sources": "', '"sources": "other ')
    output.write_text(forgotten, encoding="utf-8")
    assert run(output, *arguments, "--only", "faults/none").returncode == 0
    *_, whole = records_after_half_a_line(output)
    assert (whole["check"], whole["status"], whole["cases"]) == ("faults/none", "ok", {"ok": 1})


def records_after_half_a_line(output: Path) -> list[dict[str, Any]]:
    lines = output.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[lines.index('{"phase": "faults", "che') + 1 :]]


def test_no_time_left(tmp_path: Path) -> None:
    output = tmp_path / "faults.jsonl"
    assert run(output, "--phase", "faults", "--only", "faults/none", "--seconds", "0.5").returncode == 0
    assert statuses(output) == {"faults/none": "skipped", "faults/none all others": "skipped"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--phase", "correct"], "--output must be a file whose name ends in .jsonl; got None"),
        (["--phase", "correct", "--output", "README.md"], "ends in .jsonl; got README.md"),
        (["--phase", "time", "--only", "nothing*"], "no check of phase time is called 'nothing*'"),
        (["--phase", "time", "--jobs", "0", "--output", "x.jsonl"], "--jobs must be at least 1; got 0"),
    ],
)
def test_mistakes_are_named(arguments: list[str], said: str) -> None:
    done = subprocess.run([*SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    ("phase", "only", "cases"),
    [
        ("time", "profile/131k", 3),
        pytest.param("correct", "find/groups", 3, marks=pytest.mark.slow),
        pytest.param("correct", "*check", 2, marks=pytest.mark.slow),
        pytest.param("time", "prefill/*", 8, marks=pytest.mark.slow),
    ],
)
def test_dry_run(phase: str, only: str, cases: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    output = tmp_path / "found.jsonl"
    done = run(output, "--phase", phase, "--only", only)
    assert done.returncode == 0, output.read_text(encoding="utf-8")
    assert set(statuses(output).values()) <= {"ok", "skipped"}
    assert sum(status == "ok" for status in statuses(output).values()) >= cases


@pytest.mark.parametrize(("module", "check", "cases"), [("finding", "groups", 3), ("graphs", "decode", 1)])
def test_cases_of_a_check(module: str, check: str, cases: int, part: Callable[[str], Any]) -> None:
    """In this process, which has imported what they need."""
    machine = part("machine").Machine("interpret")
    found = [part("child").result_of(case, machine) for case in getattr(part(module), check)(machine)]
    assert {case["status"] for case in found} <= {"ok", "skipped"}, found
    assert sum(case["status"] == "ok" for case in found) >= cases


def test_a_long_prefill_is_begun_if_a_quarter_of_it_promises_that_it_ends(
    part: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = part("machine").Machine("interpret")
    assert next(part("timing").prefill(machine, 131072)).run()["promised_seconds"] > 0
    monkeypatch.setattr(part("timing"), "_MOST_SECONDS", 0.0)
    [case] = part("timing").prefill(machine, 131072)
    with pytest.raises(part("cases").SkippedError, match="a quarter of the length promises"):
        case.run()


def test_ways_to_generate_are_timed_one_by_one(part: Callable[[str], Any]) -> None:
    """So that dense ones are timed if ours crashes, and none twice."""
    models = part("models")
    whole = models._generation(part("machine").Machine("interpret"))
    assert len(whole.methods) > 2
    for name in whole.methods:
        assert models._one(whole, name).methods == [name]


def test_every_check_can_be_found_and_needs_little(part: Callable[[str], Any]) -> None:
    """Its function is there, where packages that a bare machine lacks are missing."""
    places = [check.source for check in part("table").CHECKS if check.name != "faults/start"]
    program = (
        f"import sys, importlib\nfor name in {UNNEEDED}: sys.modules[name] = None\n"
        f"for place in {places}:\n"
        "    module, _, function = place.partition('.')\n"
        "    assert callable(getattr(importlib.import_module('gpu.' + module), function)), place\n"
        # The tests of the kernels need a little more.
        "del sys.modules['rich'], sys.modules['typer']\n"
        "import tests.fixtures, tests.test_triton\n"
    )
    path = os.pathsep.join((str(ROOT / "scripts"), str(ROOT)))
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr


def test_the_list_needs_no_package() -> None:
    done = subprocess.run(
        [sys.executable, "-S", *SCRIPT[1:], "--phase", "correct", "--list"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("environment ")


def exact(call: AttentionCall, selection: Selection) -> Tensor:
    mask = selection.mask(call.query.shape[1], call.key.shape[2])
    key, value = (x.double().repeat_interleave(call.group_size, 1) for x in (call.key, call.value))
    scores = (call.query.double() @ key.transpose(-1, -2) * call.scaling).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1).nan_to_num(0) @ value).to(call.value.dtype)


def to_all_candidates(call: AttentionCall, selection: Selection) -> Tensor:
    return exact(call, replace(selection, allowed=torch.ones_like(selection.allowed)))


def beyond_the_list(call: AttentionCall, selection: Selection) -> Tensor:
    """Reads a position behind the list, as a tile without a mask would."""
    width = selection.positions.shape[-1] + 1
    positions, allowed = (
        x.as_strided((*x.shape[:-1], width), x.stride()) for x in (selection.positions, selection.allowed)
    )
    return exact(call, replace(selection, positions=positions.clamp(max=call.key.shape[2] - 1), allowed=allowed))


def beyond_the_keys(call: AttentionCall, selection: Selection) -> Tensor:
    return exact(call, selection) + 0 * call.key.as_strided((1,), (1,), call.key.shape[2] * call.key.shape[3])


def unwritten(call: AttentionCall, selection: Selection) -> Tensor:
    out = call.value.new_empty(*call.query.shape[:3], call.value.shape[3])
    out[:, :, :-1] = exact(call, selection)[:, :, :-1]
    return out


@pytest.mark.parametrize("mistake", [to_all_candidates, beyond_the_list, beyond_the_keys, unwritten])
def test_a_wrong_kernel_is_found(
    mistake: Callable[..., Tensor], part: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = part("references").Shape(50, 20, queries=6, group=3, kv_heads=2, dim=16, dtype=torch.float32)
    machine = part("machine").Machine("interpret")
    assert part("kernels").attend_case(shape, machine).run()["status"] == "ok"
    monkeypatch.setattr(part("kernels"), "attend", exact)
    assert part("kernels").attend_case(shape, machine).run()["status"] == "ok"
    monkeypatch.setattr(part("kernels"), "attend", mistake)
    assert part("kernels").attend_case(shape, machine).run()["status"] == "wrong"


def test_a_wrong_selection_is_found(part: Callable[[str], Any]) -> None:
    selection, references = part("selection"), part("references")
    call = references.call_of(references.Shape(40, queries=4, kv_heads=1), part("machine").Machine("interpret"))
    visible = interval_to_mask(call.intervals, 40).expand(-1, 4, -1, -1)
    want = visible & (torch.arange(40) % 2 == 0)
    budgets = want.sum(-1)

    def verdict(mask: Tensor, again: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = selection.verdict(mask, again, want, call, budgets)
        return found

    assert verdict(want, want)["status"] == "ok"
    for change, name in (((0, 1, 2, 8), "budget"), ((0, 1, 2, 39), "invisible")):
        mask = want.clone()
        mask[change] = ~mask[change]
        found = verdict(mask, mask)
        assert found["status"] == "wrong"
        assert found[name]["first"] == [0, 1, 2]
    assert set(verdict(want, want.roll(1, -1))) == {"status", "overlap", "repeats"}
    others = visible & (torch.arange(40) % 2 == 1)
    others[..., 0] |= others.sum(-1) < budgets
    found = verdict(others, others)
    assert found["status"] == "wrong"
    assert found["overlap"]["of_all"] < 0.1
