"""`ModelSource`: a model that a command names by a Hub id, a folder, a GGUF file or a policy."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_sparse.config import Origin, Policy, SparseAttentionConfig, is_hub_id
from hf_sparse.config import files as policy_files
from hf_sparse.config.hub_io import UNREADABLE
from hf_sparse.config.origin import cached_commit
from hf_sparse.errors import UserError, first_line
from hf_sparse.patching import SupportReport, inspect, patched
from hf_sparse.results import find_device

DTYPES = ("auto", "float32", "bfloat16", "float16")

_WHAT = "a Hub id, a folder that holds a config.json or a .gguf file"
_ADVICE = "pass a folder or a .gguf file, or set HF_HUB_OFFLINE=1 to use what was downloaded before"
_WEIGHTS = (".safetensors", ".bin")
# What is read of each end of a weight file to tell two models in folders of the same name apart.
_SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True)
class ModelSource:
    """A model that was found and not loaded yet. Each part is read when it is asked for.

    Attributes:
        origin: Its folder, or its repository at a commit, branch or tag; the default branch without a revision.
        gguf_file: File in the folder that holds the model.
        policy: The policy that named the model; `None` if the model was named itself.
    """

    origin: Origin
    gguf_file: str | None = None
    policy: Policy | None = None

    @classmethod
    def find(cls, name: str, revision: str | None = None) -> ModelSource:
        """The source that `name` stands for: an existing folder or `.gguf` file, or else a Hub id.

        Where there is a policy, the source is the model that it names.

        Raises:
            UserError: if `name` is a path and nothing usable is there, or a `revision` is asked of it, or a policy is
                wrong.
        """
        if not name.strip():
            raise UserError(f"{name!r} is not a model: pass {_WHAT}")
        path = Path(name).expanduser()
        if revision is not None and path.exists():
            raise UserError(f"{name} is here, not on the Hub: it has no revision {revision!r}")
        if path.is_dir():
            if (path / policy_files.NAME).is_file():
                return cls._of_policy(policy_files.load(path))
            if not (path / "config.json").is_file():
                raise UserError(f"{name} holds no model: there is no config.json; pass a .gguf file by its own name")
            return cls(Origin(str(path.absolute())))
        if path.suffix == ".gguf":
            if not path.is_file():
                raise UserError(f"{name}: no such file")
            if find_spec("gguf") is None:
                raise UserError(f'reading {path.name} needs the package gguf: pip install "hf_sparse[gguf]"')
            return cls(Origin(str(path.parent.absolute())), path.name)
        if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise UserError(f"{name} is not a model: pass {_WHAT}")
        if is_hub_id(name):
            try:
                return cls._of_policy(policy_files.load(name, revision=revision))
            except UserError as error:
                # No such file, no such repository, no Hub: it is a model, or the model's own error says what it is.
                if not isinstance(error.__cause__, OSError):
                    raise
        return cls(Origin(name, revision))

    @classmethod
    def _of_policy(cls, policy: Policy) -> ModelSource:
        return cls(policy.model_origin(), policy=policy)

    @property
    def location(self) -> str:
        """What `from_pretrained` takes: a Hub id or a folder."""
        return str(self.origin.name)

    @property
    def name(self) -> str:
        """Hub id, or the last part of the path."""
        if self.gguf_file is not None or not self._is_here:
            return self.gguf_file or self.location
        return Path(self.location).resolve().name

    @property
    def _is_here(self) -> bool:
        return Path(self.location).is_dir()

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's configuration."""
        return cast("PreTrainedConfig", self._load(AutoConfig))

    @cached_property
    def support(self) -> SupportReport:
        """Whether the model can be patched, and its attention layers."""
        return inspect(self.config)

    def info(self) -> dict[str, Any]:
        """What identifies the model in results, never a path of the machine: `describe` with the source's own name.

        Reads the configuration, and local weights for their hash: the `revision` of a local model is the start of a
        SHA-256, of the GGUF file or of the folder's configuration and weights.
        """
        return describe(self.name, self._fingerprint() if self._is_here else self.commit, self.config)

    @property
    def commit(self) -> str | None:
        """The commit on the Hub, where it is known; `None` for a folder or file."""
        if self._is_here:
            return None
        commit: str | None = getattr(self.config, "_commit_hash", None)
        return commit or cached_commit(self.location, self.origin.revision)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return cast("PreTrainedTokenizerBase", self._load(AutoTokenizer))

    def model(self, *, dtype: str = "auto", device_map: str | None = None) -> PreTrainedModel:
        """The model in evaluation mode.

        Args:
            dtype: One of `DTYPES`; `"auto"` is the dtype the weights are stored in, float32 for a GGUF file, whose
                weights are dequantised.
            device_map: A device such as `"cpu"` or `"cuda:0"`, `"auto"` to spread the model, or `None`.

        Raises:
            UserError: if the model cannot be found, reached or read, or is not taken with these.
        """
        check_loading(dtype, device_map)
        kind = "auto" if dtype == "auto" else getattr(torch, dtype)
        options = {"quantization_config": GgufConfig(dequantize=True)} if self.gguf_file is not None else {}
        model = self._load(AutoModelForCausalLM, dtype=kind, device_map=device_map, **options)
        return cast("PreTrainedModel", model)

    def _load(self, kind: Any, **options: Any) -> Any:
        """What `kind.from_pretrained` gives; one line of error for a model that is absent, out of reach or damaged."""
        given = {"revision": self.origin.revision, "gguf_file": self.gguf_file}
        options |= {name: value for name, value in given.items() if value is not None}
        try:
            return kind.from_pretrained(self.location, trust_remote_code=False, **options)
        except UNREADABLE as error:
            advice = "" if self._is_here else f"; {_ADVICE}"
            raise UserError(f"cannot read the model {self.name}: {first_line(error)}{advice}") from error

    def _fingerprint(self) -> str:
        folder = Path(self.location)
        if self.gguf_file is not None:
            with (folder / self.gguf_file).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()[:16]
        # As it is on disk: once loaded, it also says where it came from.
        digest = hashlib.sha256((folder / "config.json").read_bytes())
        for path in sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLE_BYTES))
                file.seek(max(0, path.stat().st_size - _SAMPLE_BYTES))
                digest.update(file.read())
        return digest.hexdigest()[:16]


def max_positions(config: PreTrainedConfig) -> int | None:
    """Longest input in tokens that a model was made for; `None` if its configuration does not say."""
    longest: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest


def describe(name: str, revision: str | None, config: PreTrainedConfig) -> dict[str, Any]:
    """A model as results name it."""
    return {
        "name": name,
        "revision": revision or "unknown",
        "max_positions": max_positions(config),
        "architecture": config.model_type,
    }


def check_loading(dtype: str, device_map: str | None) -> None:
    """Refuse a dtype or a device that `ModelSource.model` does not take, and say what there is."""
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    check_device(device_map)


def check_device(device_map: str | None) -> None:
    """Refuse a device that is not here."""
    if device_map not in (None, "auto"):
        find_device(device_map)


def check_config(model: PreTrainedModel, config: SparseAttentionConfig) -> None:
    """Refuse a configuration that a model cannot be patched with, and say why."""
    try:
        with patched(model, config):
            pass
    except ValueError as error:
        raise UserError(str(error)) from error
