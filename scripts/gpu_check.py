"""Everything that the kernels for GPUs must do, checked on a machine whose GPU nobody has tried yet.

python scripts/gpu_check.py --phase correct --output correct.jsonl  # are the results right?
python scripts/gpu_check.py --phase time --output time.jsonl        # how fast, beside dense attention? Alone on the GPU

Each check is a process of its own, with its own CUDA context: a crash, a hang or a broken context ends one case of one
check, and the rest goes on in a new process. The most important checks come first. Results are JSON lines, appended as
they come: a record for each case, and one for each check as a whole, without `case`. Run again with the same file, a
check that was ok with the same sources is not repeated.

The status of a case is `ok`, `wrong`, `crash`, `timeout` or `skipped`; a check has the worst of its cases, and is
skipped if they all are. The exit status is 1 unless all checks are ok or skipped.

`--device interpret` runs the same in Triton's interpreter on a CPU, with tiny shapes. `--phase faults` are checks that
fail on purpose. This file needs the standard library alone, the checks need PyTorch, transformers and Triton.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from gpu.table import BROKEN, CHECKS, PHASES, Check

ROOT = Path(__file__).resolve().parents[1]
WORST_LAST = ("skipped", "ok", "timeout", "crash", "wrong")
RESTARTS = 3
"""Processes that a check may lose before the rest of its cases is given up."""

START = 60
"""Seconds that a process may take before its first case, at least: PyTorch may be read from a slow disk."""

LAST_WORDS = 10
"""Seconds that a process may take to end."""

TAIL = 3000
"""Characters of a process's stderr that are kept where it fails."""


class Results:
    """A file of JSON lines that several threads append to, and what it says of earlier runs."""

    def __init__(self, path: Path, sources: str) -> None:
        self._sources, self._lock = sources, threading.Lock()
        self.done: set[str] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # half a line: that run was killed
            if "case" not in record and (record.get("status"), record.get("sources")) == ("ok", sources):
                self.done.add(record["check"])
        self._file = path.open("a", encoding="utf-8")
        if text and not text.endswith("\n"):
            self._file.write("\n")

    def append(self, record: dict[str, Any]) -> None:
        """Write a record, and have the system write it to the disk."""
        with self._lock:
            self._file.write(json.dumps(record | {"sources": self._sources}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


@dataclass
class Outcome:
    """What became of a check."""

    check: Check
    statuses: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def status(self) -> str:
        """The worst status of a case; a check without any case crashed."""
        return max(self.statuses, key=WORST_LAST.index, default="crash")


class Runner:
    """The checks of a phase, each in processes of its own."""

    def __init__(self, args: argparse.Namespace, results: Results) -> None:
        self._args, self._results = args, results
        self._deadline = time.monotonic() + args.seconds

    def run(self, check: Check) -> Outcome:
        """All cases of a check: in one process, and a new one after each that is lost."""
        outcome, start = Outcome(check), time.monotonic()
        if check.name in self._results.done:
            outcome.statuses.append("ok")
            print(f"{check.name}: was ok before, with the same sources", file=sys.stderr)
            return outcome
        begun = 0
        for _ in range(1 + RESTARTS):
            if self._left() < 1:
                status = "timeout" if begun else "skipped"
                self._append(outcome, {"case": "all others", "status": status, "reason": "no time left"})
                break
            before, begun, finished = begun, *self._run_cases(outcome, begun)
            if finished or begun == before:
                break
        else:
            reason = f"given up after {1 + RESTARTS} processes were lost"
            self._append(outcome, {"case": "all others", "status": "skipped", "reason": reason})
        outcome.seconds = round(time.monotonic() - start, 1)
        counts = {status: outcome.statuses.count(status) for status in WORST_LAST if status in outcome.statuses}
        record = {"phase": self._args.phase, "check": check.name, "status": outcome.status}
        self._results.append(record | {"seconds": outcome.seconds, "cases": counts})
        print(line_of(outcome), file=sys.stderr, flush=True)
        return outcome

    def _left(self) -> float:
        return float(self._deadline - time.monotonic())

    def _append(self, outcome: Outcome, record: dict[str, Any]) -> None:
        outcome.statuses.append(record["status"])
        self._results.append({"phase": self._args.phase, "check": outcome.check.name, **record})

    def _run_cases(self, outcome: Outcome, skip: int) -> tuple[int, bool]:
        """Cases begun so far, after a process for those from number `skip` on, and whether it came to its end."""
        check = outcome.check
        with tempfile.TemporaryFile() as stderr:
            process = started(check, self._args.device, skip, stderr)
            first: dict[str, Any] = {"case": "start"}
            begun, case, lines, since = skip, first, lines_of(process), time.monotonic()
            while True:
                own = self._args.each or check.each
                limit = min(max(own, START) if case == first else own, self._left())
                try:
                    message = lines.get(timeout=max(0.0, since + limit - time.monotonic()))
                except queue.Empty:
                    ended(process, at_once=True)
                    fault = {"status": "timeout", "limit": round(limit, 1)}
                    break
                since, before = time.monotonic(), since
                if message is None:
                    code = ended(process)
                    if code in (0, BROKEN):
                        return begun, code == 0
                    name = signal.Signals(-code).name if code < 0 else str(code)
                    fault = {"status": "crash", "exit": name}
                    since = before
                    break
                if "begun" in message:
                    begun, case = begun + 1, {"case": message.pop("begun"), **message}
                else:
                    self._append(outcome, case | message)
                    case = {}
            seconds = round(time.monotonic() - since, 2)
            # Between two cases, inputs of the next one are made.
            self._append(outcome, (case or {"case": "between cases"}) | fault | {"seconds": seconds, **tail_of(stderr)})
            return begun, False


def started(check: Check, device: str, skip: int, stderr: IO[bytes]) -> subprocess.Popen[str]:
    """The process of a check, in a process group of its own, without its cases before number `skip`."""
    path = os.pathsep.join(filter(None, (str(ROOT / "scripts"), str(ROOT), os.environ.get("PYTHONPATH"))))
    own = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"} | ({"TRITON_INTERPRET": "1"} if device == "interpret" else {})
    command = [sys.executable, "-m", "gpu.child", check.name, device, str(skip)]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        cwd=ROOT,
        env=os.environ | own,
        process_group=0,
    )


def lines_of(process: subprocess.Popen[str]) -> queue.Queue[dict[str, Any] | None]:
    """A process's messages, and `None` after the last one."""
    found: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                found.put(json.loads(line))
            except ValueError:
                break  # half a line: the process died
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    return found


def ended(process: subprocess.Popen[str], *, at_once: bool = False) -> int:
    """The exit status of a process, which is killed, with those that it started, at once or if it does not end.

    A process that waits for a driver may not even end then: it is left behind.
    """
    with suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=0 if at_once else LAST_WORDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=LAST_WORDS)
    return -signal.SIGKILL


def tail_of(stderr: IO[bytes]) -> dict[str, str]:
    """The end of what a process wrote to stderr."""
    stderr.seek(0)
    return {"stderr": stderr.read().decode(errors="replace")[-TAIL:]}


def line_of(outcome: Outcome) -> str:
    """A check, its status and its seconds, and how many of its cases are not ok."""
    failed = sum(status not in ("ok", "skipped") for status in outcome.statuses)
    cases = f"{failed} of {len(outcome.statuses)} cases" if failed else f"{len(outcome.statuses)} cases"
    return f"{outcome.check.name:28} {outcome.status:8} {outcome.seconds:7.1f} s  {cases}"


def digest() -> str:
    """What the results depend on, in 12 letters: the sources of the package and of the checks."""
    files = sorted([*ROOT.glob("hf_sparse/**/*.py"), *ROOT.glob("scripts/gpu*/*.py"), *ROOT.glob("tests/*triton*.py")])
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:12]


def chosen(args: argparse.Namespace) -> Iterator[Check]:
    """The checks of the phase that `--only` names."""
    return (check for check in CHECKS if check.phase == args.phase and fnmatch(check.name, args.only))


def run_all(args: argparse.Namespace) -> list[Outcome]:
    """Run the checks, the first one alone."""
    runner = Runner(args, Results(args.output, digest()))
    first, *rest = chosen(args)
    outcomes = [runner.run(first)]
    with ThreadPoolExecutor(args.jobs) as pool:
        return outcomes + list(pool.map(runner.run, rest))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, complete and checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=PHASES, required=True)
    parser.add_argument("--device", choices=("cuda", "interpret"), default="cuda")
    parser.add_argument("--only", metavar="GLOB", default="*", help="checks of such a name, as attend/*")
    parser.add_argument("--seconds", type=float, default=300, help="time for all checks (%(default)s)")
    parser.add_argument("--each", type=float, help="time for a case; 60 seconds, and more for some")
    parser.add_argument("--jobs", type=int, help="checks at a time: 4 for --phase correct on a GPU, else 1")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--list", action="store_true", help="print the checks, in their order, and run none")
    args = parser.parse_args(argv)
    if not any(chosen(args)):
        parser.error(f"--only: no check of phase {args.phase} is called {args.only!r}; --list shows them")
    if not args.list and (args.output is None or args.output.suffix != ".jsonl"):
        parser.error(f"--output must be a file whose name ends in .jsonl; got {args.output}")
    if args.jobs is None:
        args.jobs = 4 if (args.phase, args.device) == ("correct", "cuda") else 1
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1; got {args.jobs}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the checks, or list them; 1 if any is neither ok nor skipped."""
    args = parse(argv)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at once: results are written, and the checks end by themselves
    if args.list:
        for check in chosen(args):
            print(f"{check.name:28} {check.purpose}")
        return 0
    outcomes = run_all(args)
    print("", *map(line_of, outcomes), sep="\n", file=sys.stderr)
    return int(any(outcome.status not in ("ok", "skipped") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
