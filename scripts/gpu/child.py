"""The cases of one check, in this process: python -m gpu.child CHECK DEVICE SKIP. `gpu_check.py` starts it.

Writes a JSON line to stdout when a case begins, and one when it ends. All that anybody else writes goes to stderr.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from importlib import import_module
from typing import Any

from gpu.cases import Case, SkippedError
from gpu.machine import Machine
from gpu.table import BROKEN, CHECKS


def end_with(parent: int) -> None:
    """End this process group when the parent has died: nobody reads its results."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def result_of(case: Case, machine: Machine) -> dict[str, Any]:
    """What a case found, its status and its seconds."""
    begin = time.monotonic()
    try:
        found = {"status": "ok", **case.run()}
        machine.synchronize()
    except SkippedError as error:
        found = {"status": "skipped", "reason": str(error)}
    except Exception as error:
        found = {"status": "crash", "reason": f"{type(error).__name__}: {error}"[:500]}
        found["stderr"] = traceback.format_exc()[-3000:]
    return found | {"seconds": round(time.monotonic() - begin, 2)}


def finite(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that are none become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def main(name: str, device: str, skip: str) -> int:
    """Run the cases from number `skip` on."""
    with os.fdopen(os.dup(1), "w", buffering=1) as out:
        os.dup2(2, 1)

        def say(message: dict[str, Any]) -> None:
            out.write(json.dumps(finite(message)) + "\n")

        check = next(check for check in CHECKS if check.name == name)
        module, _, function = check.source.rpartition(".")
        machine = Machine(device)
        cases = getattr(import_module(f"gpu.{module}"), function)(machine, **check.arguments)
        for number, case in enumerate(cases):
            if number < int(skip):
                continue
            say({"begun": case.name, **case.facts})
            print(f"case {case.name}", file=sys.stderr, flush=True)
            say(result_of(case, machine))
            if not machine.works():
                return BROKEN
    return 0


if __name__ == "__main__":
    threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
    status = main(*sys.argv[1:])
    sys.stderr.flush()
    # Without the interpreter's tidying up, which a broken CUDA context can hang in.
    os._exit(status)
