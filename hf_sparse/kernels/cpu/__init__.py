"""Kernels for CPUs, in C++: compiled on first use where there is a compiler, called through `ctypes`."""

from hf_sparse.kernels.cpu.build import SWITCH
from hf_sparse.kernels.cpu.calls import LAYOUT, TILE, attend, lanes, select, unsupported_reason

__all__ = ["LAYOUT", "SWITCH", "TILE", "attend", "lanes", "select", "unsupported_reason"]
