"""Freed memory that a training step uses again, on a CPU with glibc.

By default glibc maps each large tensor anew, and the first touch of each of its pages costs a fault: 13 to
15% of a small bf16 model's step (benchmarks/LOG.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_KEEP = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
# Where glibc's moving thresholds end for a process that uses large blocks.
_USUAL = ((_M_MMAP_MAX, 65536), (_M_TRIM_THRESHOLD, 64 << 20), (_M_TOP_PAD, 128 << 10))
_MMAP_THRESHOLD = 32 << 20


@contextlib.contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Let glibc keep what is freed; on leaving, free memory goes back to the system.

    For steps that need the same blocks again and again: where their sizes keep changing, the heap breaks up
    and grows (counting the operations of a 300M model took 22 GB in place of 5). Other C libraries are left
    alone, and so is a user's own setting (MALLOC_*).
    """
    libc = None if any(name.startswith("MALLOC_") for name in os.environ) else _glibc()
    if libc is None:
        yield
        return
    for option, value in _KEEP:
        libc.mallopt(option, value)
    try:
        yield
    finally:
        for option, value in (*_USUAL, (_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)):
            libc.mallopt(option, value)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
    except OSError:
        return None
