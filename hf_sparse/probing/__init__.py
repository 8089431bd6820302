"""Proof of what `inspect` says, for any architecture, on a small random model of it."""

from hf_sparse.probing.build import small_model
from hf_sparse.probing.evidence import Evidence, evidence
from hf_sparse.probing.probes import PROBES, Probe, probe
from hf_sparse.probing.shrink import default_config, shrink

__all__ = ["PROBES", "Evidence", "Probe", "default_config", "evidence", "probe", "shrink", "small_model"]
