"""`Policy`: the content of `sparse_config.json`, a configuration with its base model and its measured quality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from hf_sparse.config.config import SparseAttentionConfig
from hf_sparse.config.origin import Origin, is_hub_id
from hf_sparse.errors import UserError
from hf_sparse.schema import QualityRecord, checks


@dataclass(frozen=True)
class Policy:
    """What is saved and published: in the file, its fields stand beside those of the configuration.

    Args:
        config: What to attend to.
        base_model: The model that it is for: a Hub id, or an absolute path, which is never published.
        revision: Commit of the base model on the Hub.
        weights: Whether weights lie beside the policy, to be loaded instead of the base model's.
        versions: Package -> version that wrote the policy.
        quality: What was measured.
        origin: Where it was read. Not in the file.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    config: SparseAttentionConfig = field(default_factory=SparseAttentionConfig)
    base_model: Annotated[str, _check_base] | None = None
    revision: checks.GivenName | None = None
    weights: checks.Flag = False
    versions: checks.Versions = field(default_factory=dict)
    quality: Annotated[tuple[QualityRecord, ...], _check_quality] = ()
    origin: Origin = field(default=Origin(), compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.config, SparseAttentionConfig):
            raise ValueError(f"config must be a SparseAttentionConfig; got {type(self.config).__name__}")
        checks.fields(self)

    @property
    def base(self) -> Origin:
        """The base model at its revision."""
        return Origin(self.base_model, self.revision)

    @property
    def has_weights(self) -> bool:
        """Whether it was read from a place that holds weights of its own."""
        if self.weights or not self.origin.is_local:
            return self.weights
        folder = Path(str(self.origin.name))
        return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))

    def model_origin(self) -> Origin:
        """Where to load the model from: the place of the policy if weights lie there, or else the base model.

        Raises:
            UserError: (a `ValueError`) if the policy does not say, or names a folder that is not here, or that was
                never meant for this machine.
        """
        base, place = self.base, self.origin.name
        if self.has_weights:
            return self.origin
        if base.name is None:
            raise UserError(f"{place} names no base model: load one, then hf_sparse.patch(model, ...) it")
        if base.is_local and not self.origin.is_local:
            raise UserError(f"{place} names a folder as its base model, {base.name!r}: it must be a Hub id")
        if base.is_local and not Path(base.name).is_dir():
            raise UserError(f"{place} names the base model {base.name}, and there is no such folder")
        if base.is_on_hub and Path(base.name).is_dir():
            # transformers would take the folder, and no revision of it.
            raise UserError(f"{place} names {base.name} on the Hub, and a folder of that name is here: go elsewhere")
        return base

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that `json.dumps` takes and `from_dict` gives back."""
        own = {name: checks.as_json(getattr(self, name)) for name in ("base_model", "revision", "weights", "versions")}
        return {**self.config.to_dict(), **own, "quality": [record.to_dict() for record in self.quality]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Policy:
        """The inverse of `to_dict`. Unknown keys are kept in the configuration's `extra`, missing ones defaulted.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        own = {name: value for name, value in checks.mapping("a policy", data).items() if name in _OWN}
        config = {name: value for name, value in data.items() if name not in _OWN}
        return cls(SparseAttentionConfig.from_dict(config), **own)


def _check_base(name: str, value: Any) -> Any:
    holds = is_hub_id(checks.text(name, value)) or Path(value).is_absolute()
    return checks.require(holds, name, value, "a Hub id or an absolute path")


def _check_quality(name: str, value: Any) -> tuple[QualityRecord, ...]:
    """`value` as quality records: each may be one already, or what JSON holds of it."""
    out = []
    for i, record in enumerate(checks.sequence(name, value, of="a list of records")):
        try:
            out.append(record if isinstance(record, QualityRecord) else QualityRecord.from_dict(record))
        except ValueError as error:
            raise ValueError(f"{name}[{i}]: {error}") from None
    return tuple(out)


_OWN = frozenset(f.name for f in fields(Policy)) - {"config", "origin"}
