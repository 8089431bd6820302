"""The experiments of the theory lab that look at a model."""

from __future__ import annotations

from hf_sparse.lab import alpha, collapse, depth, norms, rope_bases
from hf_sparse.lab.experiment import Experiment

EXPERIMENTS: tuple[Experiment, ...] = (
    norms.EXPERIMENT,
    rope_bases.EXPERIMENT,
    depth.EXPERIMENT,
    collapse.EXPERIMENT,
    alpha.EXPERIMENT,
)
