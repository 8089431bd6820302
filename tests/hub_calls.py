"""What tests call in the process of `hub_client`: arguments and values are what JSON can say."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Logits = list[list[float]]  # by position and word
LENGTH = 64


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


def push(base: str, repo_id: str, fields: Mapping[str, Any], **arguments: Any) -> str:
    """Patch a base model and publish it; gives the address."""
    import hf_sparse

    return hf_sparse.push_to_hub(hf_sparse.patch(_model(base), **fields), repo_id, **arguments)


def load(name: str, **arguments: Any) -> Logits:
    """The logits of a published model."""
    import hf_sparse

    return _logits(hf_sparse.from_pretrained(name, **arguments))


def save(base: str, fields: Mapping[str, Any], folder: str, **arguments: Any) -> None:
    """Patch a base model and save it."""
    import hf_sparse

    hf_sparse.save_pretrained(hf_sparse.patch(_model(base), **fields), folder, **arguments)


def policy(name: str) -> dict[str, Any]:
    """What the policy of a repository says."""
    from hf_sparse.policy import files as policy_files

    return policy_files.load(name).policy.to_dict()


def patch(base: str, name: str, **arguments: Any) -> Logits:
    """The logits of a base model that is patched with a published policy."""
    import hf_sparse

    return _logits(hf_sparse.patch(_model(base, **arguments), name))


def dense(name: str) -> Logits:
    """The logits of what plain transformers makes of a repository."""
    return _logits(_model(name))


def command(arguments: list[str]) -> dict[str, Any]:
    """`hf-sparse` with these arguments: exit code, stdout and stderr. Any other exception would be a traceback."""
    from hf_sparse.cli import main

    code: Any = None
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def _model(name: str, **arguments: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name, **arguments)


def _logits(model: Any) -> Logits:
    from tests import tiny

    out: Logits = tiny.logits(model.eval(), tiny.tokens(1, LENGTH))[0].tolist()
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if not hasattr(value, "__dict__"):
        return value
    return {name: _plain(one) for name, one in vars(value).items() if not name.startswith("_")}
