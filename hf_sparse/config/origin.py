"""`Origin`: where a model or a policy lies, and where a model in memory came from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)
# A snapshot in the cache of huggingface_hub.
_SNAPSHOT = re.compile(r".*[/\\]models--(?P<name>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})[/\\]?")


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a Hub id: `user/name` or `name`."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


@dataclass(frozen=True)
class Origin:
    """A repository on the Hub, or a folder of this machine.

    Attributes:
        name: Hub id, or the absolute path of the folder; `None` for what was never loaded.
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

    @property
    def is_on_hub(self) -> bool:
        """Whether it is a repository on the Hub."""
        return self.name is not None and is_hub_id(self.name)


def cached_commit(name: str, revision: str | None = None) -> str | None:
    """The commit that `revision` of a repository stood for when it was last downloaded; `None` if it never was."""
    path = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


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


def _only_commit(name: str) -> str | None:
    """The commit of a downloaded repository, if only one was downloaded."""
    path = try_to_load_from_cache(name, "config.json")
    if not isinstance(path, str):
        return None
    commits = [found.name for found in Path(path).parent.parent.iterdir()]
    return commits[0] if len(commits) == 1 else None
