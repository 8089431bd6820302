"""Whether a policy suits a model: another architecture is refused, another base or revision is a warning."""

from __future__ import annotations

import warnings

from transformers import PreTrainedConfig

from hf_sparse.config.origin import Origin
from hf_sparse.config.policy import Policy
from hf_sparse.errors import UserError
from hf_sparse.patching.support import SupportReport
from hf_sparse.schema import CalibrationRecord


def check_calibration(record: CalibrationRecord, support: SupportReport, config: PreTrainedConfig) -> None:
    """Refuse laws that were calibrated for a model with other layers or heads. What a record leaves out is not checked.

    Args:
        record: How the laws came about.
        support: The model's attention layers.
        config: The model's configuration.

    Raises:
        UserError: (a `ValueError`) naming what differs.
    """
    kinds = {config.model_type, config.get_text_config().model_type}
    if record.model_type and record.model_type not in kinds:
        _refuse(f"model type {record.model_type!r}", f"{config.model_type!r}")
    if not record.model_type and record.architecture and record.architecture != support.architecture:
        _refuse(record.architecture, support.architecture)
    if record.layers and record.layers != len(support.layers):
        _refuse(f"{record.layers} attention layers", f"{len(support.layers)}")
    heads = {layer.layer: layer.heads for layer in support.layers}
    for layer, count in record.heads.items():
        if heads.get(layer) != count:
            found = f"{heads[layer]}" if layer in heads else "no such layer"
            _refuse(f"{count} query heads in layer {layer}", found)


def warn_of_another_base(policy: Policy, origin: Origin) -> bool:
    """Warn if a model is known to be another one, or another revision, than what the policy was made for.

    Returns:
        Whether it is, for certain.
    """
    record = policy.config.calibration or CalibrationRecord()
    base = policy.base if policy.base_model else Origin(record.base_model, record.revision)
    if not (base.is_on_hub and origin.is_on_hub):
        return False
    found = origin.revision or origin.guess
    if base.name != origin.name:
        difference = f"{base.name}; this model is {origin.name}"
    elif base.revision is not None and found is not None and base.revision != found:
        at = "is at" if origin.revision else "may be at"
        difference = f"revision {base.revision} of {base.name}; this model {at} {found}"
    else:
        return False
    warnings.warn(
        f"the policy was made for {difference}: its quality was not measured there", UserWarning, stacklevel=4
    )
    return base.name != origin.name or origin.revision is not None


def _refuse(expected: str, found: str) -> None:
    raise UserError(f"the laws were calibrated for {expected}; this model has {found}")
