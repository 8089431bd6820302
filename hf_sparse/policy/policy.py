"""`Policy`: the content of `sparse_config.json`, a configuration with its base model and its measured quality."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_sparse.checks import check_mapping, check_name, check_text, check_versions, shown
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.policy.quality import QualityRow

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)


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

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    config: SparseAttentionConfig = field(default_factory=SparseAttentionConfig)
    base_model: str | None = None
    revision: str | None = None
    weights: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)
    quality: tuple[QualityRow, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.config, SparseAttentionConfig):
            raise ValueError(f"config must be a SparseAttentionConfig; got {type(self.config).__name__}")
        if self.base_model is not None:
            check_text("base_model", self.base_model)
            if not is_hub_id(self.base_model) and not Path(self.base_model).is_absolute():
                raise ValueError(f"base_model must be a Hub id or an absolute path; got {shown(self.base_model)}")
        if self.revision is not None:
            check_name("revision", self.revision, empty=False)
        if not isinstance(self.weights, bool):
            raise ValueError(f"weights must be true or false; got {shown(self.weights)}")
        object.__setattr__(self, "versions", check_versions("versions", self.versions))
        if isinstance(self.quality, str | Mapping) or not isinstance(self.quality, Sequence):
            raise ValueError(f"quality must be a list of rows; got {shown(self.quality)}")
        object.__setattr__(self, "quality", tuple(self.quality))

    @property
    def base_is_local(self) -> bool:
        """Whether the base model is a folder of this machine."""
        return self.base_model is not None and not is_hub_id(self.base_model)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that `json.dumps` takes and `from_dict` gives back."""
        own = {name: getattr(self, name) for name in ("base_model", "revision", "weights")}
        return {
            **self.config.to_dict(),
            **own,
            "versions": dict(self.versions),
            "quality": [row.to_dict() for row in self.quality],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Policy:
        """The inverse of `to_dict`. Unknown keys are kept in the configuration's `extra`, missing ones defaulted.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        check_mapping("a policy", data)
        own = {name: value for name, value in data.items() if name in _OWN}
        config = SparseAttentionConfig.from_dict({name: value for name, value in data.items() if name not in _OWN})
        return cls(config, **own | {"quality": _rows(own.get("quality", ()))})


_OWN = frozenset(f.name for f in fields(Policy)) - {"config"}


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a Hub id: `user/name` or `name`."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def _rows(rows: Any) -> tuple[QualityRow, ...]:
    if isinstance(rows, str | Mapping) or not isinstance(rows, Sequence):
        raise ValueError(f"quality must be a list of rows; got {shown(rows)}")
    out = []
    for i, row in enumerate(rows):
        try:
            out.append(QualityRow.from_dict(row))
        except ValueError as error:
            raise ValueError(f"quality[{i}]: {error}") from None
    return tuple(out)
