"""What tests call in the process of `hub_client`: arguments and values are what JSON can say."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def hub(method: str, **arguments: Any) -> Any:
    """A method of `HfApi`."""
    from huggingface_hub import HfApi

    value = getattr(HfApi(), method)(**arguments)
    if hasattr(value, "__next__"):
        value = list(value)
    return _plain(value)


def upload(repo_id: str, files: dict[str, str], **arguments: Any) -> Any:
    """One commit of text files."""
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(path, content.encode()) for path, content in files.items()]
    return _plain(HfApi().create_commit(repo_id, operations, commit_message="Add files", **arguments))


def read(repo_id: str, filename: str, **arguments: Any) -> str:
    """A file of a repository, by the cache."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo_id, filename, **arguments)).read_text()


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if not hasattr(value, "__dict__"):
        return value
    return {name: _plain(one) for name, one in vars(value).items() if not name.startswith("_")}
