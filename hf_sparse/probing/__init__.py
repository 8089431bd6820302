"""Proof of what `inspect` says, for any architecture, on a small random model of it."""

from hf_sparse.probing.configs import default_config, shrink
from hf_sparse.probing.models import class_of, small_model
from hf_sparse.probing.probes import PROBES, Probe, probe
from hf_sparse.probing.refusals import Evidence, evidence

__all__ = ["PROBES", "Evidence", "Probe", "class_of", "default_config", "evidence", "probe", "shrink", "small_model"]
