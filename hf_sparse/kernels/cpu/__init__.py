"""Kernels for CPUs, in C++: compiled at installation or on first use, called through `ctypes`."""

from hf_sparse.kernels.cpu.build import SWITCH
from hf_sparse.kernels.cpu.calls import LAYOUT, TILE, attend, decode, lanes, select, unsupported_reason

__all__ = ["LAYOUT", "SWITCH", "TILE", "attend", "decode", "lanes", "select", "unsupported_reason"]
