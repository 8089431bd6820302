"""Kernels for processors, in C++: compiled on first use where there is a compiler, called through `ctypes`."""

from hf_sparse.kernels.cpu.build import SWITCH, why_not
from hf_sparse.kernels.cpu.calls import TILE, attend, quantise, refusal, select

__all__ = ["SWITCH", "TILE", "attend", "quantise", "refusal", "select", "why_not"]
