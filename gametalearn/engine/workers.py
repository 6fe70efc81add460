"""Threads that share out the chunks of a batch, each computing on one core."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["run_all"]

R = TypeVar("R")
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_lock = threading.Lock()


def _pool(workers: int) -> ThreadPoolExecutor:
    """``workers`` single-threaded threads; a forked process makes its own."""
    key = (os.getpid(), workers)
    with _lock:
        if key not in _pools:
            barrier = threading.Barrier(workers + 1)
            threads = torch.get_num_threads()

            def start() -> None:
                torch.set_num_threads(1)  # this thread's; see the restoration below
                barrier.wait()

            pool = ThreadPoolExecutor(workers, "gametalearn", initializer=start)
            for _ in range(workers):
                pool.submit(int)  # a thread starts with the first call that finds none idle
            barrier.wait()
            torch.set_num_threads(threads)  # also the default of threads that start later
            _pools[key] = pool
        return _pools[key]


def run_all(calls: Sequence[Callable[[], R]], workers: int) -> list[R]:
    """The results of all calls, in order; by ``workers`` threads if there is more than one."""
    if workers <= 1 or len(calls) <= 1:
        return [call() for call in calls]
    futures = [_pool(workers).submit(call) for call in calls]
    return [future.result() for future in futures]
