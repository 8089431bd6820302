"""Kernels for processors, in C++: compiled on first use where there is a compiler, called through `ctypes`."""

from hf_sparse.kernels.cpu.build import SWITCH, why_not
from hf_sparse.kernels.cpu.calls import attend, quantise, select, supports

__all__ = ["SWITCH", "attend", "quantise", "select", "supports", "why_not"]
