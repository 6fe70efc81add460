"""Keep freed memory in the process: on glibc, large tensors otherwise cost a page fault a page."""

from __future__ import annotations

import ctypes
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


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, for the tensors that come next.

    glibc returns every large block to the system when it is freed, and the next tensor faults its
    pages in again: half a million faults for one meta-gradient on 84 x 84 images, a third of its
    time. Four settings of ``mallopt`` keep the memory instead. Call this once, at the start of a
    program; the command line does so by itself, and nothing else in the library does.

    It holds for the whole process and cannot be undone: the process stays as large as it was at its
    largest. It has no effect on the memory of a GPU, where another allocator stands in for glibc's
    (jemalloc, tcmalloc), without glibc (macOS, Windows, musl), and where the environment has
    ``GAMETALEARN_MALLOC=0``.

    Returns:
        Whether glibc has taken the settings.
    """
    if os.environ.get("GAMETALEARN_MALLOC") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    done = [mallopt(option, value) == 1 for option, value in SETTINGS]
    return all(done)
