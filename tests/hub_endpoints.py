"""The endpoints that `huggingface_hub` calls to create, upload, list and download models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from tests.hub_repos import Commit, Repo, blob_id, is_large

_DATE = "2026-01-01T00:00:00.000Z"


class RefusedError(Exception):
    """The answer is an error. `code` is what the client tells kinds of errors apart by."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


@dataclass(frozen=True)
class Answer:
    """What goes back: bytes, or what JSON can say."""

    content: Any
    status: int = 200
    headers: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Call:
    """A request, and the state of the server that it may read and change."""

    repos: dict[str, Repo]
    stored: dict[str, bytes]  # what was uploaded to LFS, by its SHA-256
    url: str  # of the server
    user: str | None
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def readable(self, name: str) -> Repo:
        """The repository, if this user may see it."""
        repo = self.repos.get(name)
        if repo is None or (repo.private and repo.owner != self.user):
            raise RefusedError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, name: str) -> Repo:
        """The repository, if this user may change it."""
        repo = self.readable(name)
        if self.user is None:
            raise RefusedError(401, "Invalid username or password.")
        if repo.owner != self.user:
            raise RefusedError(403, f"You don't have the rights to write to {name}")
        return repo

    def commit(self, repo: str, revision: str) -> Commit:
        """The commit that a revision, `""` for the main branch, names."""
        commit = self.readable(repo).find(revision or "main")
        if commit is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def target(self, repo: str, revision: str) -> Repo:
        """The repository that a commit goes to: pull requests are open to everyone who can read it."""
        if "create_pr" in self.query and self.user:
            return self.readable(repo)
        found = self.writable(repo)
        if revision not in found.refs:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found


def whoami(call: Call) -> Answer:
    if call.user is None:
        raise RefusedError(401, "Invalid username or password.")
    return Answer({"type": "user", "name": call.user, "orgs": [], "auth": {"type": "access_token"}})


def validate_card(call: Call) -> Answer:
    try:
        metadata = _metadata(call.json["content"])
        error = None if isinstance(metadata, dict) else "metadata must be a mapping"
    except yaml.YAMLError as wrong:
        error = str(wrong)
    found = {"errors": [{"message": error}] if error else [], "warnings": []}
    return Answer(found, 400 if error else 200)


def _metadata(card: str) -> Any:
    match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", card, re.DOTALL)
    return yaml.safe_load(match[1]) if match else {}


def create_repo(call: Call) -> Answer:
    asked = call.json
    namespace = asked.get("organization") or call.user
    if call.user is None:
        raise RefusedError(401, "Invalid username or password.")
    if namespace != call.user:
        raise RefusedError(403, f"You don't have the rights to create a model under the namespace {namespace!r}")
    name = f"{namespace}/{asked['name']}"
    url = f"{call.url}/{name}"
    if name in call.repos:
        return Answer({"error": "You already created this model repo", "url": url}, 409)
    call.repos[name] = Repo(name, bool(asked.get("private")) or asked.get("visibility") == "private")
    return Answer({"url": url, "name": name})


def model_info(call: Call, repo: str, revision: str = "") -> Answer:
    commit = call.commit(repo, revision)
    return Answer(
        {
            "id": repo,
            "author": repo.split("/")[0],
            "sha": commit.oid,
            "private": call.repos[repo].private,
            "lastModified": _DATE,
            "tags": [],
            "cardData": _metadata(commit.files.get("README.md", b"").decode()),
            "siblings": [
                {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]}
                for entry in commit.tree("", recursive=True) or []
            ],
        }
    )


def tree(call: Call, repo: str, revision: str, path: str = "") -> Answer:
    recursive = call.query.get("recursive", "").lower() in ("1", "true")
    entries = call.commit(repo, revision).tree(path, recursive)
    if entries is None:
        raise RefusedError(404, f"{path} does not exist on {revision}", "EntryNotFound")
    return Answer(entries)


def refs(call: Call, repo: str) -> Answer:
    found = call.readable(repo)
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in found.branches.items()
    ]
    pulls = [{"name": name, "ref": name, "targetCommit": oid} for name, oid in found.pulls.items()]
    return Answer({"branches": branches, "pullRequests": pulls, "converts": [], "tags": []})


def commits(call: Call, repo: str, revision: str) -> Answer:
    call.commit(repo, revision)
    return Answer(
        [
            {"id": one.oid, "title": one.title, "message": "", "date": _DATE, "authors": [{"user": one.author}]}
            for one in call.repos[repo].history(revision)
        ]
    )


def create_branch(call: Call, repo: str, name: str) -> Answer:
    found = call.writable(repo)
    start = call.commit(repo, call.json.get("startingPoint", "main"))
    if name in found.refs:
        raise RefusedError(409, f"Reference already exists: refs/heads/{name}")
    found.refs[name] = start.oid
    return Answer({})


def preupload(call: Call, repo: str, revision: str) -> Answer:
    call.target(repo, revision)
    commit = call.commit(repo, revision)
    out = []
    for asked in call.json["files"]:
        large = is_large(asked["size"], base64.b64decode(asked["sample"]))
        old = commit.files.get(asked["path"])
        known = {} if old is None else {"oid": blob_id(old)}
        out.append({"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **known})
    return Answer({"files": out})


def commit_files(call: Call, repo: str, revision: str) -> Answer:
    """One JSON object a line: a header, then the files. All of them become one commit, or none does."""
    found = call.target(repo, revision)
    before = call.commit(repo, revision)
    changes: dict[str, bytes | None] = {}
    title = ""
    for line in call.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            title = value["summary"]
            if value.get("parentCommit") not in (None, before.oid):
                raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        elif item["key"] == "file":
            changes[value["path"]] = base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            if value["oid"] not in call.stored:
                raise RefusedError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
            changes[value["path"]] = call.stored[value["oid"]]
        else:
            changes[value["path"]] = None
    number = len(found.pulls) + 1 if "create_pr" in call.query else None
    ref = f"refs/pr/{number}" if number else revision
    commit = found.commit(changes, ref, before.oid, call.user or "", title)
    made = {"commitUrl": f"{call.url}/{repo}/commit/{commit.oid}", "commitOid": commit.oid}
    if number:
        made["pullRequestUrl"] = f"{call.url}/{repo}/discussions/{number}"
    return Answer(made)


def lfs_batch(call: Call, repo: str) -> Answer:
    call.readable(repo)
    out = []
    for asked in call.json["objects"]:
        missing = asked["oid"] not in call.stored
        actions = {"actions": {"upload": {"href": f"{call.url}/lfs/{asked['oid']}"}}} if missing else {}
        out.append({"oid": asked["oid"], "size": asked["size"], **actions})
    return Answer({"transfer": "basic", "objects": out})


def lfs_upload(call: Call, oid: str) -> Answer:
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise RefusedError(400, "the content does not have this SHA-256")
    call.stored[oid] = call.body
    return Answer({})


def download(call: Call, repo: str, revision: str, path: str) -> Answer:
    commit = call.commit(repo, revision)
    content = commit.files.get(path)
    about = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    if content is None:
        raise RefusedError(404, "Entry not found", "EntryNotFound", about)
    about["ETag"] = f'"{blob_id(content)}"'
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", ""))
    if match is None:
        return Answer(content, headers=about)
    first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
    if first > last:
        raise RefusedError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
    about["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    return Answer(content[first : last + 1], 206, about)


_REPO = r"/(?P<repo>[^/]+/[^/]+)"
_API = f"/api/models{_REPO}"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/validate-yaml", validate_card),
    ("POST", "/api/repos/create", create_repo),
    ("GET", _API, model_info),
    ("GET", f"{_API}/revision/(?P<revision>[^/]+)", model_info),
    ("GET", f"{_API}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?", tree),
    ("GET", f"{_API}/refs", refs),
    ("GET", f"{_API}/commits/(?P<revision>[^/]+)", commits),
    ("POST", f"{_API}/branch/(?P<name>[^/]+)", create_branch),
    ("POST", f"{_API}/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", f"{_API}/commit/(?P<revision>[^/]+)", commit_files),
    ("POST", f"{_REPO}.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", lfs_upload),
    ("HEAD", f"{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", download),
    ("GET", f"{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", download),
]
