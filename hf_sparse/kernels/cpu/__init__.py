"""Kernels for CPUs, in C++: compiled on first use where there is a compiler, called through `ctypes`."""

from hf_sparse.kernels.cpu.build import SWITCH
from hf_sparse.kernels.cpu.calls import CODES, LAYOUT, TILE, attend, lanes, select, share, unsupported_reason

__all__ = ["CODES", "LAYOUT", "SWITCH", "TILE", "attend", "lanes", "select", "share", "unsupported_reason"]
