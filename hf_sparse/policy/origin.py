"""Where a model in memory came from: its Hub id and commit, or its folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel

from hf_sparse.policy.policy import is_hub_id

# A snapshot in the cache of huggingface_hub.
_SNAPSHOT = re.compile(r".*[/\\]models--(?P<name>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})[/\\]?")


@dataclass(frozen=True)
class Origin:
    """What `from_pretrained` was given.

    Attributes:
        name: Hub id, or the absolute path of a folder; `None` for a model that was not loaded.
        revision: Commit on the Hub, where it is known.
        guess: Where it is not, the commit of the default branch when that was last downloaded.
    """

    name: str | None = None
    revision: str | None = None
    guess: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return self.name is not None and not is_hub_id(self.name)


def cached_commit(name: str, revision: str | None = None) -> str | None:
    """The commit that `revision` of a repository stood for when it was last downloaded; `None` if it never was."""
    path = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


def _only_commit(name: str) -> str | None:
    """The commit of a repository that was downloaded, if it was one only."""
    path = try_to_load_from_cache(name, "config.json")
    if not isinstance(path, str):
        return None
    commits = [found.name for found in Path(path).parent.parent.iterdir()]
    return commits[0] if len(commits) == 1 else None


def origin_of(model: PreTrainedModel) -> Origin:
    """Where `model` says that it was loaded from."""
    name: str = getattr(model.config, "_name_or_path", None) or ""
    if snapshot := _SNAPSHOT.fullmatch(name):
        return Origin(snapshot["name"].replace("--", "/", 1), snapshot["commit"])
    if name and Path(name).is_dir():
        return Origin(str(Path(name).absolute()))
    if is_hub_id(name):
        # Newer releases of transformers do not keep the commit that a model was loaded at.
        commit = getattr(model.config, "_commit_hash", None) or _only_commit(name)
        return Origin(name, commit, None if commit else cached_commit(name))
    return Origin()
