"""Memory in large pages: keys that are kept lie far apart, and the CPU looks up the page of each."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

from torch import Tensor

_PAGE = 2 << 20  # bytes of a large page on x86-64, and on ARM with small pages of 4 KiB
_LEAST = 2 * _PAGE  # bytes of a tensor below which there would be no whole page in it, or only one


def ask_for_large_pages(states: Tensor) -> None:
    """Ask Linux to put a tensor on pages of 2 MiB where it has them, before anything is written to it.

    Only advice (`madvise(2)`, MADV_HUGEPAGE): nothing happens on other systems and devices, for small tensors, or where
    /sys/kernel/mm/transparent_hugepage/enabled says `never`.
    """
    if (advise := _madvise()) is None or states.device.type != "cpu" or states.nbytes < _LEAST:
        return
    start = -(-states.data_ptr() // _PAGE) * _PAGE
    stop = (states.data_ptr() + states.nbytes) // _PAGE * _PAGE
    advise(start, stop - start, mmap.MADV_HUGEPAGE)


@cache
def _madvise() -> Any:
    """The C library's function, or `None` where there is none of that advice."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
