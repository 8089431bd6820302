"""A small Hub on loopback for tests: as the real one where a client can tell, and failing when it is told to.

with Hub() as hub:
    revision = hub.add("ada/base", {"config.json": b"{}"})
    with hub.failing("POST .*/commit/", status=500):
        ...  # a client with HF_ENDPOINT=hub.url
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_endpoints import ROUTES, Answer, Call, RefusedError
from tests.hub_repos import Repo

TOKENS = {"hf_ada": "ada", "hf_bob": "bob"}
_ENDLESS = 2**28  # bytes after which an endless answer ends after all


@dataclass
class Fault:
    """What goes wrong with requests that match `where`, a pattern for "METHOD /path"."""

    where: str
    status: int | None = None
    message: str = "as the test wants it"
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False  # the connection ends in the middle: of the upload, or of the answer if none came
    announced: int | None = None  # the content length that the answer claims, whatever its real one
    endless: bool = False  # an answer without a length, and without an end
    times: int | None = None  # how often; always if None


class Hub:
    """The server: runs while the `with` block does."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # what was uploaded to LFS, by its SHA-256
        self.requests: list[str] = []  # "METHOD /path" of each
        self.sent: Counter[str] = Counter()  # bytes of answers by path
        self.faults: list[Fault] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: Mapping[str, bytes | None], private: bool = False) -> str:
        """Put files into a repository, new or not, without a client; gives the commit."""
        return self.repos.setdefault(name, Repo(name, private)).commit(files).oid

    @contextmanager
    def failing(self, where: str, status: int | None = None, **fields: Any) -> Iterator[None]:
        """A `Fault` for the length of a `with` block."""
        fault = Fault(where, status, **fields)
        self.faults.append(fault)
        try:
            yield
        finally:
            self.faults.remove(fault)

    @contextmanager
    def recording(self) -> Iterator[list[str]]:
        """The requests that came in the `with` block, once it is over."""
        seen: list[str] = []
        start = len(self.requests)
        yield seen
        seen += self.requests[start:]

    def fault(self, request: str) -> Fault | None:
        """The fault that this request meets, if any."""
        for fault in self.faults:
            if fault.times != 0 and re.match(fault.where, request):
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        request = f"{self.command} {unquote(parts.path)}"
        self.hub.requests.append(request)
        self.fault = self.hub.fault(request) or Fault("")
        size = int(self.headers.get("Content-Length") or 0)
        chunked = "Transfer-Encoding" in self.headers
        if self.fault.cut and (size or chunked):
            self.rfile.read(max(1, size // 2))
            self._hang_up()
            return
        body = self._chunks() if chunked else self.rfile.read(size)
        try:
            if self.fault.status is not None:
                raise RefusedError(self.fault.status, self.fault.message, headers=self.fault.headers)
            query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
            hub = self.hub
            call = Call(hub.repos, hub.stored, hub.url, self._user(), query, dict(self.headers.items()), body)
            self._answer(_dispatch(call, self.command, parts.path))
        except RefusedError as refused:
            self._answer(Answer({"error": str(refused)}, refused.status, refused.headers))

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815 - the base class looks for these names

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def _chunks(self) -> bytes:
        out = b""
        while size := int(self.rfile.readline(), 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def _answer(self, answer: Answer) -> None:
        fault = self.fault
        raw = isinstance(answer.content, bytes)
        body: bytes = answer.content if raw else json.dumps(answer.content).encode()
        length = len(body) if fault.announced is None else fault.announced
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/octet-stream" if raw else "application/json")
        for name, value in (answer.headers or {}).items():
            self.send_header(name, value)
        if not fault.endless:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault.endless:
            self._pour(body)
        elif fault.cut or length > len(body):
            self._send(body[: len(body) // 2] if fault.cut else body)
            self._hang_up()
        else:
            self._send(body[:length])

    def _pour(self, body: bytes) -> None:
        self.close_connection = True
        try:
            self._send(body)
            for _ in range(_ENDLESS // 2**16):
                self._send(b" " * 2**16)
        except OSError:  # the client has had enough
            pass

    def _send(self, data: bytes) -> None:
        self.wfile.write(data)
        self.hub.sent[unquote(urlsplit(self.path).path)] += len(data)


def _dispatch(call: Call, command: str, path: str) -> Answer:
    for method, pattern, endpoint in ROUTES:
        if method == command and (match := re.fullmatch(pattern, path)):
            return endpoint(call, **{name: unquote(value or "") for name, value in match.groupdict().items()})
    raise RefusedError(404, f"Sorry, we can't find {command} {path}")
