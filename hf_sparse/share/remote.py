"""`Remote`: a repository on the Hub that a folder is to be published in, by one commit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from hf_sparse.checks import shown
from hf_sparse.errors import UserError, first_line
from hf_sparse.policy import is_hub_id
from hf_sparse.policy.files import NAME
from hf_sparse.policy.hub_io import hub_errors
from hf_sparse.share.bundle import CARD, CONFIG

_WEIGHTS = (".safetensors", ".bin", ".gguf")
# What a repository may hold that was made by hand to be filled.
_EMPTY = frozenset({".gitattributes", CARD, "LICENSE", "LICENSE.md", "LICENSE.txt"})


@dataclass(frozen=True)
class Remote:
    """What was found on the Hub, and where to commit.

    Attributes:
        repo_id: `user/name`.
        api: The client, with its token.
        revision: The branch; `None` for the default one.
        create_pr: Whether to open a pull request.
        exists: Whether the repository exists.
        has_branch: Whether the branch exists.
        sha: The commit that was looked at; `None` if there is none.
        files: What it holds.
        card: Its card, or `None`.
    """

    repo_id: str
    api: HfApi
    revision: str | None = None
    create_pr: bool = False
    exists: bool = False
    has_branch: bool = False
    sha: str | None = None
    files: frozenset[str] = field(default_factory=frozenset)
    card: str | None = None

    @classmethod
    def look(
        cls,
        repo_id: str,
        *,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        private: bool | None = None,
        anonymous: bool = False,
    ) -> Remote:
        """Look at what is there; nothing is changed.

        Args:
            repo_id: `user/name`, or `name` for one of one's own.
            token: As in `huggingface_hub`.
            revision: The branch to commit to.
            create_pr: Whether to open a pull request.
            private: Whether the repository must be private.
            anonymous: Whether to look without a token, too.

        Raises:
            UserError: without a token, out of reach of the Hub, or if something else is there.
        """
        if not is_hub_id(repo_id):
            raise UserError(f"{shown(repo_id)} is not the name of a repository: pass user/name, or name")
        known = token is not False and (isinstance(token, str) or get_token() is not None)
        if not known and not anonymous:
            raise UserError(f"cannot publish {repo_id} without a token: log in with `hf auth login`, or set HF_TOKEN")
        api = HfApi(token=token)
        with hub_errors(f"cannot look at {repo_id}"):
            if "/" not in repo_id and known:
                repo_id = f"{api.whoami()['name']}/{repo_id}"
            has_branch = True
            try:
                try:
                    info = api.model_info(repo_id, revision=revision)
                except RevisionNotFoundError:
                    has_branch = False
                    info = api.model_info(repo_id)
            except RepositoryNotFoundError:
                return cls(repo_id, api, revision, create_pr)
            files = frozenset(sibling.rfilename for sibling in info.siblings or [])
            card = None
            if CARD in files:
                path = api.hf_hub_download(repo_id, CARD, revision=info.sha)
                try:
                    card = Path(path).read_text(encoding="utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(f"{CARD} of {repo_id} is no text: {first_line(error)}") from error
        if files - _EMPTY and NAME not in files and not create_pr:
            raise UserError(
                f"{repo_id} exists and is not a published policy: it holds no {NAME}; choose another name, or propose "
                "the change with --create-pr (create_pr=True)"
            )
        if private and info.private is False:
            raise UserError(f"{repo_id} exists and is public: only a new repository can be made private")
        return cls(repo_id, api, revision, create_pr, True, has_branch, info.sha, files, card)

    def additions(self, folder: Path) -> list[tuple[str, Path]]:
        """What of `folder` would be committed: paths in the repository and files, by name."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        out = [(path.relative_to(folder).as_posix(), path) for path in paths]
        own_weights = any(name.endswith(_WEIGHTS) for name, _ in out)
        if not own_weights and any(name.endswith(_WEIGHTS) for name in self.files):
            # The weights that are there belong to the configuration that is there.
            out = [(name, path) for name, path in out if name != CONFIG]
        return out

    def commit(self, folder: Path, message: str, *, private: bool | None = None) -> str:
        """Commit `folder` at once, making repository and branch if need be.

        Args:
            folder: What to publish.
            message: Of the commit.
            private: Whether a new repository is private.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            UserError: if the Hub refuses. Nothing has been committed then.
        """
        operations = [CommitOperationAdd(name, path) for name, path in self.additions(folder)]
        with hub_errors(f"cannot publish {self.repo_id}"):
            if not self.exists:
                self.api.create_repo(self.repo_id, private=private)
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
