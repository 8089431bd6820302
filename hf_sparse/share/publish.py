"""Save, load and publish patched models: `save_pretrained`, `from_pretrained`, `push_to_hub`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hf_sparse.config import Origin, origin_of
from hf_sparse.config import files as policy_files
from hf_sparse.config.hub_io import UNREADABLE, hub_errors
from hf_sparse.errors import UserError, first_line
from hf_sparse.patching import base_model as unwrapped
from hf_sparse.patching import check_calibration, inspect, patch, policy_of, warn_of_another_base
from hf_sparse.schema import shown
from hf_sparse.share.bundle import Bundle, card_in, check_publishable, make_bundle
from hf_sparse.share.remote import Remote
from hf_sparse.share.source import ModelSource

PathLike = str | os.PathLike[str]

MESSAGE = "Publish a sparse attention policy"

# Arguments of from_pretrained that say how to reach the Hub, and those that a configuration alone takes.
_HUB_OPTIONS = frozenset({"token", "cache_dir", "force_download", "local_files_only"})
_CONFIG_OPTIONS = _HUB_OPTIONS | {"revision", "trust_remote_code", "gguf_file", "subfolder", "proxies"}


def save_pretrained(
    model: nn.Module,
    folder: PathLike,
    weights: bool = False,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    results: Sequence[PathLike] = (),
    base_model: str | None = None,
    base_revision: str | None = None,
) -> Path:
    """Write a patched model's policy, `sparse_config.json`, and a model card, beside the base's own `config.json`.

    `config.json` is byte for byte that of the base model. Where that cannot be had (a model built in memory, a base
    that is not in the cache while the Hub is out of reach), a folder without weights gets none.

    Args:
        model: A patched model.
        folder: Where to write; made if it is not there. A card in it is edited, not replaced.
        weights: Also write the weights and the tokenizer, so that plain `AutoModelForCausalLM` opens the folder
            (dense).
        tokenizer: The tokenizer to write with the weights; that of the base model if `None`.
        results: Folders that `hf-sparse perplexity`, `attention-error`, `retrieval` and `bench` wrote: the card reports
            what they measured of this configuration, and nothing else.
        base_model: Hub id of the base model, where the model in hand was loaded from somewhere else.
        base_revision: Its commit, where several were downloaded and transformers does not say which one was loaded.

    Returns:
        The folder.

    Raises:
        ValueError: if the model is not patched, or a folder of results does not hold any.
        TypeError: if `folder` is not a path, or `results` is one and not a list.
    """
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path; got {type(folder).__name__}")
    if not os.fspath(folder):
        raise UserError("folder must be a path, '.' for the current folder; got ''")
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UserError(f"{folder} is not a folder")
    bundle = _bundle(model, Origin(base_model, base_revision), weights, tokenizer, results)
    bundle.write(path, path.resolve().name, card_in(path))
    return path


def from_pretrained(name_or_path: PathLike, **kwargs: Any) -> PreTrainedModel:
    """Load the model that a policy names, at its pinned revision, and patch it.

    A folder or repository that was saved with weights loads its own. Code in a repository is not run, unless the
    caller passes `trust_remote_code=True`, and only safetensors are read, unless the caller passes
    `use_safetensors=False`.

    Args:
        name_or_path: A Hub id, a folder, or a `sparse_config.json`.
        **kwargs: For `AutoModelForCausalLM.from_pretrained`: `device_map`, `dtype`, `quantization_config` and the rest.
            `revision` is that of the policy; the base model's is in the policy. `base_model` names another base: a
            Hub id or a folder.

    Raises:
        UserError: (a `ValueError`) if the policy or its base cannot be found, reached or read, is wrong, or was
            calibrated for another architecture, number of layers or number of heads.
        TypeError: if `name_or_path` is not a name.
    """
    shared = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
    policy = policy_files.load(name_or_path, revision=kwargs.pop("revision", None), **shared)
    named = kwargs.pop("base_model", None)
    origin = policy.model_origin() if named is None else Origin(os.fspath(named))
    base, revision = str(origin.name), origin.revision
    if revision is None and not Path(base).is_dir():
        revision = _current_commit(base, shared)
    options = {"trust_remote_code": False, "use_safetensors": True, **kwargs}
    if revision is not None:
        options["revision"] = revision
    try:
        record = policy.config.calibration
        if record is not None:
            # `patch` checks it again on the model; here, before any weights are fetched.
            known = {name: options[name] for name in _CONFIG_OPTIONS & options.keys()}
            config = AutoConfig.from_pretrained(base, **known)
            check_calibration(record, inspect(config), config)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, **options)
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        of = "" if base == policy.origin.name else f", the base model of {policy.origin.name}"
        raise UserError(f"cannot load {base}{of}: {first_line(error)}") from error
    if named is not None and warn_of_another_base(policy, origin_of(model)):
        policy = replace(policy, quality=())
    return patch(model, policy)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    weights: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    results: Sequence[PathLike] = (),
    base_model: str | None = None,
    base_revision: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Publish a patched model's policy and card on the Hub, in one commit; the repository is made if need be.

    A card that is there is edited, not replaced, and files that are not ours are left alone.

    Args:
        model: A patched model.
        repo_id: The repository: `user/name`, or `name` for one of one's own.
        weights: Also publish weights and tokenizer.
        tokenizer: As in `save_pretrained`.
        results: As in `save_pretrained`.
        base_model: As in `save_pretrained`.
        base_revision: As in `save_pretrained`.
        private: Whether a new repository is private; `None` for the default of the account.
        revision: Branch to commit to, made if need be; the default branch if `None`.
        create_pr: Open a pull request instead of committing.
        commit_message: Of the commit.
        token: As in `huggingface_hub`; what `hf auth login` stored if `None`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: if the model is not patched.
        UserError: (a `ValueError`) without a token or the right to write, if the repository exists and holds
            something else, or the Hub is out of reach. Nothing has been committed then.
        TypeError: if `repo_id` is not a string.
    """
    if not isinstance(repo_id, str):
        raise TypeError(f"repo_id must be user/name, or name; got {shown(repo_id)}")
    bundle = _bundle(model, Origin(base_model, base_revision), weights, tokenizer, results)
    check_publishable(bundle.policy)
    remote = Remote(repo_id, token, revision, create_pr, private).look()
    with TemporaryDirectory() as folder:
        bundle.write(Path(folder), remote.repo_id, remote.card)
        return remote.commit(Path(folder), commit_message or MESSAGE)


def _current_commit(name: str, options: Mapping[str, Any]) -> str | None:
    """The commit of a base that no policy pins; `None` if it has no configuration.

    Loaded by its commit, all its files belong together; and transformers does not send a default branch without
    safetensors, with the user's token, to a service that converts it.
    """
    with hub_errors(f"cannot read the base model {name}"):
        try:
            return Path(hf_hub_download(name, "config.json", **options)).parent.name
        except RemoteEntryNotFoundError:
            return None


def _bundle(
    model: nn.Module,
    named: Origin,
    weights: bool,
    tokenizer: PreTrainedTokenizerBase | None,
    results: Sequence[PathLike],
) -> Bundle:
    """The files of a patched model; `named` is what the caller says of its base."""
    if isinstance(results, str | os.PathLike):
        raise TypeError(f"results must be a list of folders; got {shown(results)}")
    base = unwrapped(model)
    policy, origin = policy_of(base), origin_of(base)
    if base is not model and weights:
        raise UserError(f"{type(model).__name__} holds an adapter: merge it first, with merge_and_unload()")
    if base is not model:
        warnings.warn("the adapter is not part of the policy: save it, too", UserWarning, stacklevel=3)
    if origin.revision is None and origin.name == policy.base_model:
        # `from_pretrained` loaded what the policy pins.
        origin = replace(origin, revision=policy.revision)
    if weights and tokenizer is None:
        tokenizer = _tokenizer(origin)
    saved = base if weights else None
    bundle = make_bundle(policy, origin, results, base=named, weights=weights, model=saved, tokenizer=tokenizer)
    found = bundle.policy.base
    if found.is_on_hub and found.revision is None and named == Origin():
        warnings.warn(
            f"the revision of {found.name} is not known, so the policy does not pin it: pass base_revision=",
            UserWarning,
            stacklevel=3,
        )
    return bundle


def _tokenizer(origin: Origin) -> PreTrainedTokenizerBase | None:
    why = "the model was not loaded from anywhere"
    if origin.name is not None:
        try:
            return ModelSource(origin).tokenizer()
        except UserError as error:
            why = str(error)
    warnings.warn(f"no tokenizer is saved with the weights: {why}; pass tokenizer=", UserWarning, stacklevel=4)
    return None
