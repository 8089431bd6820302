"""A small Hub on loopback for tests: as the real one where a client can tell, and failing when it is told to."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {"hf_ada": "ada", "hf_bob": "bob"}


def blob_id(content: bytes) -> str:
    """What git calls a file with this content, or LFS if the file goes through it, as binary files do."""
    if b"\0" in content[:512]:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """A model repository. Every commit is a whole snapshot, path -> content; the first one is the Hub's own.

    Attributes:
        commits: Id -> snapshot, the oldest first.
        refs: `"main"` or `"refs/pr/1"` -> id.
    """

    name: str
    private: bool = False
    commits: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision, without what the Hub itself put there."""
        found = self.commits[self.refs.get(revision, revision)]
        return {name: content for name, content in found.items() if name != ".gitattributes"}

    def commit(self, changes: Mapping[str, bytes | None], ref: str = "main", start: str = "main") -> str:
        """Add a commit to `ref`, from `start` if it is new; `None` deletes a file. Gives its id."""
        files = dict(self.commits.get(self.refs.get(ref, self.refs.get(start, start)), {})) | changes
        oid = hashlib.sha1(f"{self.name} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = {path: content for path, content in files.items() if content is not None}
        self.refs[ref] = oid
        return oid


@dataclass
class Fault:
    """What goes wrong with requests that match `where`, a pattern for "METHOD /path"."""

    where: str
    status: int | None = None
    cut: bool = False  # the connection ends in the middle: of the upload, or of the answer if none came
    announced: int | None = None  # the content length that the answer claims; -1 for none at all


class Hub:
    """The server: runs until it is closed. Clients find it by HF_ENDPOINT=url."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # what was uploaded to LFS, by its SHA-256
        self.requests: list[str] = []  # "METHOD /path" of each
        self.faults: list[Fault] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: Mapping[str, bytes | None]) -> str:
        """Put files into a repository, new or not, without a client; gives the commit."""
        return self.repos.setdefault(name, Repo(name)).commit(files)

    @contextmanager
    def failing(self, where: str, status: int | None = None, **fields: Any) -> Iterator[None]:
        """A `Fault` for the length of a `with` block."""
        self.faults.append(Fault(where, status, **fields))
        try:
            yield
        finally:
            self.faults.pop()

    @contextmanager
    def recording(self) -> Iterator[list[str]]:
        """The requests that came in the `with` block, once it is over."""
        seen, start = list[str](), len(self.requests)
        yield seen
        seen += self.requests[start:]

    def fault(self, request: str) -> Fault:
        """The fault that this request meets."""
        return next((fault for fault in self.faults if re.match(fault.where, request)), Fault(""))


class _RefusedError(Exception):
    """The answer is an error. `code` is what the client tells kinds of errors apart by."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, "X-Error-Code": code, "Retry-After": "0", **headers}


class _Handler(BaseHTTPRequestHandler):
    """One connection. The endpoints are those that `huggingface_hub` and transformers call."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        request = f"{self.command} {unquote(parts.path)}"
        self.hub.requests.append(request)
        self.fault = self.hub.fault(request)
        size, chunked = int(self.headers.get("Content-Length") or 0), "Transfer-Encoding" in self.headers
        if self.fault.cut and (size or chunked):
            self.rfile.read(max(1, size // 2))
            self._hang_up()
            return
        self.body = self._chunks() if chunked else self.rfile.read(size)
        try:
            if self.fault.status is not None:
                raise _RefusedError(self.fault.status, "as the test wants it")
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token and token not in TOKENS:
                raise _RefusedError(401, "Invalid credentials in Authorization header")
            self.user = TOKENS.get(token)
            for methods, pattern, endpoint in _ROUTES:
                if self.command in methods.split() and (match := re.fullmatch(pattern, parts.path)):
                    endpoint(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
                    return
            raise _RefusedError(404, f"Sorry, we can't find {request}", "EntryNotFound")
        except _RefusedError as refused:
            self._answer({"error": str(refused)}, refused.status, refused.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815 - the base class looks for these names

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

    def _answer(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Send bytes, or what JSON can say, as the fault wants it."""
        fault, raw = self.fault, isinstance(content, bytes)
        body: bytes = content if raw else json.dumps(content).encode()
        length = len(body) if fault.announced is None else fault.announced
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if raw else "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if length >= 0:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            sent = body[: len(body) // 2] if fault.cut else body[: length if length >= 0 else None]
            self.wfile.write(sent)
            if len(sent) != length:  # else the answer is complete for the client, which may use the connection again
                self._hang_up()

    def _readable(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and repo.name.split("/")[0] != self.user):
            raise _RefusedError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _writable(self, name: str) -> Repo:
        """The repository, if this user may commit to it: pull requests are open to everyone who can read it."""
        repo = self._readable(name)
        if repo.name.split("/")[0] != self._known_user() and "create_pr" not in self.query:
            raise _RefusedError(403, f"You don't have the rights to write to {name}")
        return repo

    def _oid(self, repo: Repo, revision: str) -> str:
        oid = repo.refs.get(revision or "main", revision)
        if oid not in repo.commits:
            raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def _known_user(self) -> str:
        if self.user is None:
            raise _RefusedError(401, "Invalid username or password.")
        return self.user

    def whoami(self) -> None:
        self._answer({"type": "user", "name": self._known_user()})

    def validate_card(self) -> None:
        self._answer({"errors": [], "warnings": []})

    def create_repo(self) -> None:
        asked = json.loads(self.body)
        namespace = asked.get("organization") or self.user
        if namespace != self._known_user():
            raise _RefusedError(403, f"You don't have the rights to create a model under the namespace {namespace!r}")
        name = f"{namespace}/{asked['name']}"
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        status = 409 if name in self.hub.repos else 200
        self.hub.repos.setdefault(name, Repo(name, private))
        self._answer({"url": f"{self.hub.url}/{name}", "name": name}, status)

    def model_info(self, repo: str, revision: str = "") -> None:
        found = self._readable(repo)
        oid = self._oid(found, revision)
        siblings = [{"rfilename": path} for path in found.commits[oid]]
        self._answer({"id": repo, "sha": oid, "private": found.private, "siblings": siblings})

    def create_branch(self, repo: str, name: str) -> None:
        found = self._writable(repo)
        found.refs[name] = found.refs["main"]
        self._answer({})

    def preupload(self, repo: str, revision: str) -> None:
        found = self._writable(repo)
        before, files = found.commits[self._oid(found, revision)], json.loads(self.body)["files"]
        for asked in files:
            asked["uploadMode"] = "lfs" if b"\0" in base64.b64decode(asked["sample"]) else "regular"
            asked["shouldIgnore"] = False
            if asked["path"] in before:
                asked["oid"] = blob_id(before[asked["path"]])
        self._answer({"files": files})

    def commit_files(self, repo: str, revision: str) -> None:
        """One JSON object a line: a header, then the files. All of them become one commit, or none does."""
        found = self._writable(repo)
        before = self._oid(found, revision)
        header, *items = map(json.loads, self.body.splitlines())
        if header["value"].get("parentCommit") not in (None, before):
            raise _RefusedError(412, "A commit has happened since. Please refresh and try again.")
        changes: dict[str, bytes | None] = {}
        for item in items:
            value = item["value"]
            regular = item["key"] == "file"
            changes[value["path"]] = base64.b64decode(value["content"]) if regular else self.hub.stored[value["oid"]]
        number = sum(ref.startswith("refs/pr/") for ref in found.refs) + 1
        pull = "create_pr" in self.query
        oid = found.commit(changes, f"refs/pr/{number}" if pull else revision, before)
        made = {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid}
        self._answer({**made, "pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{number}" if pull else None})

    def lfs_batch(self, repo: str) -> None:
        self._readable(repo)
        objects = json.loads(self.body)["objects"]
        for asked in objects:
            if asked["oid"] not in self.hub.stored:
                asked["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
        self._answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        self.hub.stored[oid] = self.body
        self._answer({})

    def download(self, repo: str, revision: str, path: str) -> None:
        found = self._readable(repo)
        oid = self._oid(found, revision)
        content = found.commits[oid].get(path)
        about = {"X-Repo-Commit": oid}
        if content is None:
            raise _RefusedError(404, "Entry not found", "EntryNotFound", **about)
        self._answer(content, headers={**about, "ETag": f'"{blob_id(content)}"'})


_REPO = r"/(?P<repo>[^/]+/[^/]+)"
_API = f"/api/models{_REPO}"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_card),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("GET", f"{_API}(/revision/(?P<revision>[^/]+))?", _Handler.model_info),
    ("POST", f"{_API}/branch/(?P<name>[^/]+)", _Handler.create_branch),
    ("POST", f"{_API}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", f"{_API}/commit/(?P<revision>[^/]+)", _Handler.commit_files),
    ("POST", f"{_REPO}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_upload),
    ("HEAD GET", f"{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.download),
]
