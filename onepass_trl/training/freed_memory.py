"""Memory that a step frees is kept for the next one, on a CPU.

glibc gives it back to the system. A row of thousands of tokens has tensors of tens of megabytes,
whose pages would all be made again: 6 to 8 percent of a step's time (benchmarks/README.md).
"""

from __future__ import annotations

import ctypes
import os
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's malloc.h
_LARGEST = 2**31 - 1
_OPTIONS_OF_USERS = ("MALLOC_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Make glibc's allocator keep what is freed, in the whole process; return whether it does.

    Other allocators, and a glibc with options in the environment, stay as they are.
    """
    if sys.platform != "linux" or any(name.startswith(_OPTIONS_OF_USERS) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    # The manual of glibc limits the first one to 32 MiB, and some versions refuse more. The second
    # one alone would do harm: glibc then no longer raises the first one itself.
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, _LARGEST))
