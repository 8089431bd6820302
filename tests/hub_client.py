"""A process of its own that talks to the Hub of `hub_server`, called from tests as if it were here.

The address of the Hub is read when `huggingface_hub` is imported, tests themselves run offline, and a model that was
published is to be loaded where nothing else was done before. One process serves many calls: starting one takes long.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Outcome:
    """What a call gave, or the error that it ended in: the names of its classes, most special first, and message."""

    value: Any
    errors: list[str]
    message: str
    traceback: str
    warnings: list[str]


class Client:
    """The process. `call` runs functions of `tests.hub_calls` in it, with `environment` on top of the one here.

    Args:
        url: Of the Hub.
        home: A folder for its cache; it also works in there.
        token: Who it is, unless a call says otherwise.
    """

    def __init__(self, url: str, home: Path, token: str | None = "hf_ada") -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home, self.token = home, token
        with (home / "stderr.txt").open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.hub_client"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=home,
                env=environment(url, home),
                text=True,
            )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()  # to leave takes it seconds
        self._process.communicate()

    def attempt(self, function: str, *, token: str | None = "", **arguments: Any) -> Outcome:
        """Call a function; its error is part of the outcome. `token=None` is nobody."""
        asked = {"function": function, "arguments": arguments, "token": self.token if token == "" else token}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the client is gone:\n" + (self.home / "stderr.txt").read_text())
        return Outcome(**json.loads(line))

    def call(self, function: str, *, token: str | None = "", **arguments: Any) -> Any:
        """The value of a function that is to succeed."""
        outcome = self.attempt(function, token=token, **arguments)
        assert not outcome.errors, outcome.traceback
        return outcome.value


def environment(url: str, home: Path, token: str | None = None) -> dict[str, str]:
    """The variables of a process that uses this Hub and keeps everything in `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    ours = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    return {**kept, **ours, **({"HF_TOKEN": token} if token else {})}


def _serve(calls: IO[str], answers: IO[str]) -> None:
    # huggingface_hub tries again for half a minute before it gives up.
    pause = time.sleep
    time.sleep = lambda seconds: pause(min(float(seconds), 0.01))
    for line in calls:
        asked = json.loads(line)
        os.environ.pop("HF_TOKEN", None)
        if asked["token"]:
            os.environ["HF_TOKEN"] = asked["token"]
        value, errors, message, trace = None, [], "", ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                functions = importlib.import_module("tests.hub_calls")
                value = getattr(functions, asked["function"])(**asked["arguments"])
            except Exception as error:
                errors = [kind.__name__ for kind in type(error).__mro__]
                message, trace = str(error), traceback.format_exc()
        said = [str(warning.message) for warning in caught]
        outcome = {"value": value, "errors": errors, "message": message, "traceback": trace, "warnings": said}
        print(json.dumps(outcome, default=str), file=answers, flush=True)


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as answers, contextlib.redirect_stdout(sys.stderr):
        _serve(sys.stdin, answers)
