"""Save, load and publish patched models: `save_pretrained`, `from_pretrained`, `push_to_hub`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PathLike = str | os.PathLike[str]


def save_pretrained(
    model: nn.Module,
    folder: PathLike,
    weights: bool = False,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    results: Sequence[PathLike] = (),
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
        results: Folders that `hf-sparse perplexity`, `attention-error` and `bench` wrote: the card reports what they
            measured of this configuration, and nothing else.

    Returns:
        The folder.

    Raises:
        ValueError: if the model is not patched, or a folder of results does not hold any.
    """
    raise NotImplementedError


def from_pretrained(name_or_path: PathLike, **kwargs: Any) -> PreTrainedModel:
    """Load the model that a policy names, at its pinned revision, and patch it.

    A folder or repository that was saved with weights loads its own. Code in a repository is not run, unless the
    caller passes `trust_remote_code=True`.

    Args:
        name_or_path: A Hub id, a folder, or a `sparse_config.json`.
        **kwargs: For `AutoModelForCausalLM.from_pretrained`: `device_map`, `dtype`, `quantization_config` and the rest.
            `revision` is that of the policy; the base model's is in the policy. `base_model` names another base: a
            Hub id or a folder.

    Raises:
        UserError: (a `ValueError`) if the policy or its base cannot be found, reached or read, is wrong, or was
            calibrated for another architecture, number of layers or number of heads.
    """
    raise NotImplementedError


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    weights: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    results: Sequence[PathLike] = (),
    base_model: str | None = None,
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
        base_model: Hub id of the base model, where the model in hand was loaded from a folder.
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
    """
    raise NotImplementedError
