"""Several runs of a comparison at a time: worker processes that take one run after another."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from gametalearn.engine.allocator import keep_memory
from gametalearn.errors import InputError, summary
from gametalearn.jobs import Planned, Terms, train_and_test
from gametalearn.live import Outlook, Standing
from gametalearn.progress import interruptible
from gametalearn.stored import read_evaluation

__all__ = ["check_sendable", "in_processes", "work"]


def check_sendable(jobs: int, terms: Terms) -> None:
    """Refuse parts that cannot be sent to other processes."""
    for name in (field.name for field in fields(terms)):
        try:
            pickle.dumps(getattr(terms, name))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(
                f"jobs={jobs}: the {name} cannot be sent to other processes ({summary(error)}); "
                "define it at the top level of a module, or use jobs=1"
            ) from error


def in_processes(
    runs: Sequence[Planned], terms: Terms, jobs: int, standing: Standing
) -> dict[str, str]:
    """`train_and_test` for each run, by ``jobs`` processes, each of which takes one after another.

    On Ctrl-C and SIGTERM all stop after a checkpoint; then this raises KeyboardInterrupt.

    Returns:
        Why runs failed, by their labels; the others have ended.
    """
    waiting, failed = list(runs), dict[str, str]()
    workers = list[_Worker]()
    try:
        with interruptible() as interrupted:
            while waiting or any(worker.run for worker in workers):
                if waiting and all(worker.run for worker in workers) and len(workers) < jobs:
                    workers.append(_Worker.start(terms))
                for worker in workers:
                    if waiting and worker.run is None:
                        worker.take(waiting.pop(0), standing)
                if waiting and len(workers) < jobs:
                    continue
                busy = [worker.line for worker in workers if worker.run]
                multiprocessing.connection.wait(busy, timeout=0.2)
                if interrupted():
                    raise KeyboardInterrupt
                for worker in list(workers):
                    failed |= worker.collect(standing)
                    if worker.gone:
                        workers.remove(worker)
    finally:
        for worker in workers:
            if worker.run:
                worker.process.terminate()
            worker.line.close()  # a worker waiting for its next run ends by itself
        for worker in workers:
            worker.process.join()
    return failed


@dataclass
class _Worker:
    """A process, the connection to it, the run that it trains, and whether it has ended."""

    process: Any
    line: Any
    run: Planned | None = None
    gone: bool = False

    @classmethod
    def start(cls, terms: Terms) -> _Worker:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(terms, there))
        with _deaf_to_ctrl_c():
            process.start()
        there.close()
        return cls(process, here)

    def take(self, run: Planned, standing: Standing) -> None:
        """Train and test this run next."""
        self.run = run
        with contextlib.suppress(BrokenPipeError):  # `collect` says why it has gone
            self.line.send((run, standing.begin(run.rule, run.config.seed)))

    def collect(self, standing: Standing) -> dict[str, str]:
        """See whether the run has ended; why it failed, by its label, if it did."""
        if self.run is None or not self.line.poll():
            return {}
        run, self.run = self.run, None
        try:
            wrong = self.line.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            if self.process.exitcode == 130:  # it alone was interrupted
                raise KeyboardInterrupt from None
            self.line.close()
            self.gone = True
            wrong = "its process ended without an error message, perhaps for lack of memory"
        if wrong is not None:
            return {run.label: wrong}
        found = None if run.tested is None else read_evaluation(run.tested, {})
        if found is not None:
            standing.end(run.rule, run.config.seed, found)
        return {}


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started in this context ignore a terminal's Ctrl-C; their parent ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(terms: Terms, line: Any) -> None:
    """`work` in a process of its own; after each run ``line`` takes its error, or None."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            run, outlook = line.recv()
        except (EOFError, OSError):
            return
        wrong: str | None = None
        try:
            work(run, terms, outlook)
        except KeyboardInterrupt:
            sys.exit(130)
        except InputError as error:
            wrong = str(error)
        with contextlib.suppress(OSError):  # the parent is gone; the next `recv` notices
            line.send(wrong)


def work(run: Planned, terms: Terms, outlook: Outlook | None = None) -> None:
    """`train_and_test` in a worker: with its own number of threads, and keeping freed memory."""
    keep_memory()
    if run.config.threads:
        torch.set_num_threads(run.config.threads)
    train_and_test(run, terms, outlook=outlook)


def _end_with_parent() -> None:
    """If the parent is killed, its child must not go on training beside the parent's successor."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
