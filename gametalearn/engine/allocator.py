"""Keep freed memory in the process: on glibc, large tensors otherwise cost a page fault a page.

glibc returns every large block to the system when it is freed, and the next tensor faults its
pages in again: half a million faults a meta-gradient on 84 x 84 images, a third of its time. Three
settings of ``mallopt`` keep the memory instead. They hold for the whole process, so its resident
size stays at its peak. Set ``GAMETALEARN_MALLOC=0`` to leave the allocator alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform

__all__ = ["keep_memory"]

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
SETTINGS = (
    (M_MMAP_MAX, 0),  # large blocks come from the heap, not from a mapping of their own
    (M_TRIM_THRESHOLD, 2**31 - 1),  # and the heap does not shrink
    (M_TOP_PAD, 2**26),  # it grows 64 MiB at a time
    (M_ARENA_MAX, 1),  # one heap for all threads: those of threads are limited to 64 MiB
)


@functools.cache
def keep_memory() -> bool:
    """Set the allocator up, once a process; whether that was done (Linux with glibc only)."""
    if os.environ.get("GAMETALEARN_MALLOC") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    done = [mallopt(option, value) == 1 for option, value in SETTINGS]
    return all(done)
