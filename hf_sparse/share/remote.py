"""`Remote`: a repository on the Hub that a folder is to be published in, by one commit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from hf_sparse.config import is_hub_id
from hf_sparse.config.files import NAME
from hf_sparse.config.hub_io import hub_errors
from hf_sparse.errors import UserError, first_line
from hf_sparse.schema import shown
from hf_sparse.share.bundle import CARD, CONFIG

_WEIGHTS = (".safetensors", ".bin", ".gguf")
# What a repository may hold that was made by hand to be filled.
_EMPTY = frozenset({".gitattributes", CARD, "LICENSE", "LICENSE.md", "LICENSE.txt"})


@dataclass(frozen=True)
class Remote:
    """Where to commit, and what `look` found there.

    Attributes:
        repo_id: `user/name`, or `name` for one of one's own.
        token: As in `huggingface_hub`.
        revision: The branch to commit to; `None` for the default one.
        create_pr: Whether to open a pull request.
        private: Whether the repository must be private.
        sha: The commit that was looked at; `None` if there is no repository.
        has_branch: Whether the branch exists.
        files: What it holds.
        card: Its card, or `None`.
    """

    repo_id: str
    token: str | bool | None = None
    revision: str | None = None
    create_pr: bool = False
    private: bool | None = None
    sha: str | None = None
    has_branch: bool = False
    files: frozenset[str] = frozenset()
    card: str | None = None

    @cached_property
    def api(self) -> HfApi:
        """The client, with its token."""
        return HfApi(token=self.token)

    def look(self, *, anonymous: bool = False) -> Remote:
        """The same with what is on the Hub, where nothing is changed; `anonymous` also without a token.

        Raises:
            UserError: without a token, out of reach of the Hub, or if something else is there.
        """
        if not is_hub_id(self.repo_id):
            raise UserError(f"{shown(self.repo_id)} is not the name of a repository: pass user/name, or name")
        known = self.token is not False and (isinstance(self.token, str) or get_token() is not None)
        if not known and not anonymous:
            raise UserError(
                f"cannot publish {self.repo_id} without a token: log in with `hf auth login`, or set HF_TOKEN"
            )
        with hub_errors(f"cannot look at {self.repo_id}"):
            name = self.repo_id
            if "/" not in name and known:
                name = f"{self.api.whoami()['name']}/{name}"
            has_branch = True
            try:
                try:
                    info = self.api.model_info(name, revision=self.revision)
                except RevisionNotFoundError:
                    has_branch = False
                    info = self.api.model_info(name)
            except RepositoryNotFoundError:
                return replace(self, repo_id=name)
            files = frozenset(sibling.rfilename for sibling in info.siblings or [])
            card = self._read_card(name, info.sha) if CARD in files else None
        if files - _EMPTY and NAME not in files and not self.create_pr:
            raise UserError(
                f"{name} exists and is not a published policy: it holds no {NAME}; choose another name, or propose "
                "the change with --create-pr (create_pr=True)"
            )
        if self.private and info.private is False:
            raise UserError(f"{name} exists and is public: only a new repository can be made private")
        return replace(self, repo_id=name, sha=info.sha, has_branch=has_branch, files=files, card=card)

    def _read_card(self, name: str, sha: str | None) -> str:
        try:
            return Path(self.api.hf_hub_download(name, CARD, revision=sha)).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{CARD} of {name} is no text: {first_line(error)}") from error

    def additions(self, folder: Path) -> list[tuple[str, Path]]:
        """What of `folder` would be committed: paths in the repository and files, by name."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        out = [(path.relative_to(folder).as_posix(), path) for path in paths]
        own_weights = any(name.endswith(_WEIGHTS) for name, _ in out)
        if not own_weights and any(name.endswith(_WEIGHTS) for name in self.files):
            # The weights that are there belong to the configuration that is there.
            out = [(name, path) for name, path in out if name != CONFIG]
        return out

    def commit(self, folder: Path, message: str) -> str:
        """The address of a commit, or pull request, that adds the files of `folder`.

        Repository and branch are made if need be.

        Raises:
            UserError: if the Hub refuses. Nothing has been committed then.
        """
        operations = [CommitOperationAdd(name, path) for name, path in self.additions(folder)]
        with hub_errors(f"cannot publish {self.repo_id}"):
            if self.sha is None:
                self.api.create_repo(self.repo_id, private=self.private)
            if self.revision is not None and not self.has_branch and not self.create_pr:
                self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            done = self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                revision=self.revision if self.has_branch or not self.create_pr else None,
                create_pr=self.create_pr,
                # What was looked at is what is changed: nobody else's commit is overwritten.
                parent_commit=self.sha,
            )
        return done.pr_url or done.commit_url
