"""Repositories of the Hub that tests run against: in memory, every commit a whole snapshot."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_LARGEST_REGULAR = 10 * 2**20


def is_large(size: int, start: bytes) -> bool:
    """Whether a file goes through LFS: the Hub takes only small text files in the commit itself."""
    return size > _LARGEST_REGULAR or b"\0" in start[:512]


def blob_id(content: bytes) -> str:
    """What git calls a file with this content, or LFS if the file goes through it."""
    if is_large(len(content), content):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A snapshot: path -> content."""

    oid: str
    parent: str | None
    author: str
    title: str
    files: Mapping[str, bytes]

    def entry(self, path: str) -> dict[str, Any] | None:
        """What the Hub says about a file or a folder; `None` if there is neither."""
        content = self.files.get(path)
        if content is None:
            inside = any(name.startswith(f"{path}/") for name in self.files)
            return {"type": "directory", "path": path, "oid": blob_id(path.encode()), "size": 0} if inside else None
        out = {"type": "file", "path": path, "oid": blob_id(content), "size": len(content)}
        if is_large(len(content), content):
            out["lfs"] = {"oid": out["oid"], "size": len(content), "pointerSize": 130}
        return out

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]] | None:
        """The entries of a folder, `""` for all; `None` if it does not exist."""
        start = f"{folder}/" if folder else ""
        inside = [name for name in self.files if name.startswith(start)]
        if folder and not inside:
            return None
        names = set(inside) if recursive else {start + name[len(start) :].split("/")[0] for name in inside}
        return [entry for name in sorted(names) if (entry := self.entry(name)) is not None]


@dataclass
class Repo:
    """A model repository. It starts with one commit, as on the Hub."""

    name: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # "main" or "refs/pr/1" -> commit

    def __post_init__(self) -> None:
        self.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, title="initial commit")

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    @property
    def branches(self) -> dict[str, str]:
        return {name: oid for name, oid in self.refs.items() if not name.startswith("refs/pr/")}

    @property
    def pulls(self) -> dict[str, str]:
        return {name: oid for name, oid in self.refs.items() if name.startswith("refs/pr/")}

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, a pull request or an id names."""
        return self.commits.get(self.refs.get(revision, revision))

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision, without what the Hub itself put there."""
        return {name: content for name, content in self[revision].files.items() if name != ".gitattributes"}

    def __getitem__(self, revision: str) -> Commit:
        return self.commits[self.refs.get(revision, revision)]

    def history(self, revision: str = "main") -> Iterator[Commit]:
        """The commits of a revision, newest first."""
        commit = self.find(revision)
        while commit is not None:
            yield commit
            commit = self.find(commit.parent) if commit.parent else None

    def commit(
        self,
        changes: Mapping[str, bytes | None],
        ref: str = "main",
        start: str | None = None,
        author: str = "",
        title: str = "Upload",
    ) -> Commit:
        """Add a commit to `ref`, from `start` if it is new. `None` deletes a file, or a folder by `"name/"`."""
        parent = self.find(start or ref)
        files = dict(parent.files) if parent else {}
        for path, content in changes.items():
            if content is None:
                files = {name: old for name, old in files.items() if name != path and not f"{name}/".startswith(path)}
            else:
                files[path] = content
        listing = "".join(f"{name} {blob_id(content)}\n" for name, content in sorted(files.items()))
        seed = f"{self.name} {len(self.commits)} {title}\n{listing}"
        commit = Commit(
            hashlib.sha1(seed.encode()).hexdigest(), parent.oid if parent else None, author or self.owner, title, files
        )
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit
