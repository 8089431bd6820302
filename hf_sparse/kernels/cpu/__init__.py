"""Kernels for CPUs, in C++: compiled on first use where there is a compiler, called through `ctypes`."""

from hf_sparse.kernels.cpu.build import SWITCH, why_not
from hf_sparse.kernels.cpu.calls import LAYOUT, TILE, attend, lanes, refusal, select

__all__ = ["LAYOUT", "SWITCH", "TILE", "attend", "lanes", "refusal", "select", "why_not"]
