"""What is timed, and how one process times it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gametalearn.benchmark.load import others_share, read
from gametalearn.benchmark.settings import Setting, digest
from gametalearn.environment import device_name
from gametalearn.episodes import TaskBatch
from gametalearn.errors import InputError

# The engine is imported where it is used: learn2learn as shipped runs without it.

__all__ = ["SIDES", "Record", "Side", "call_of", "rows_of", "time_side", "timings", "wait_for"]

Side = Literal[
    "gametalearn",
    "learn2learn",
    "learn2learn-as-shipped",
    "first-order",
    "floor",
    "first-order-floor",
]
SIDES: tuple[Side, ...] = get_args(Side)
WARM_CALLS = 2
"""Calls after the first, the set-up, that are not timed. gametalearn checks its second one."""
WARM_S = 1.0
"""Seconds that these take at least; so long is also the least time over which load is measured."""


@dataclass(frozen=True)
class Record:
    """What a process that timed one side tells.

    Attributes:
        side: what was timed.
        pid: of the process.
        median_ms: the median of ``ms``.
        ms: each timing, in milliseconds, in their order.
        first_call_ms: what the first call took.
        peak_rss_mb: the most memory that the process held until the last timing.
        others_share: see `gametalearn.benchmark.load.others_share`, over warm-up and timings.
        allocator_keeps_memory: whether gametalearn's allocator settings were in force.
        inputs: `digest` of weights and batch.
        warnings: what gametalearn warned of, such as a fall to the plain loop.
        plan: how gametalearn shared the batch out; None for learn2learn.
        device: what it was computed on, and with a GPU whether float32 stood for TF32 there.
        peak_device_mb: the most memory of the GPU that PyTorch's tensors took; None on a CPU.
    """

    side: Side
    pid: int
    median_ms: float
    ms: list[float]
    first_call_ms: float
    peak_rss_mb: float
    others_share: float | None
    allocator_keeps_memory: bool
    inputs: str
    warnings: list[str]
    plan: dict[str, Any] | None
    device: dict[str, Any]
    peak_device_mb: float | None


def time_side(
    side: Side,
    setting: Setting,
    threads: int,
    repeats: int,
    warm_s: float = WARM_S,
    device: str = "cpu",
) -> Record:
    """Time one side in this process, which should do nothing else.

    Args:
        side: what to time.
        setting: the model, batch and inner loop.
        threads: PyTorch threads.
        repeats: timings.
        warm_s: seconds of warm-up, at least.
        device: ``"cpu"``, ``"cuda"`` or one of several GPUs.
    """
    torch.set_num_threads(threads)
    keeps = _keep_memory() if side != "learn2learn-as-shipped" else False
    model, batch = setting.model(), setting.batch()
    inputs = digest(model, batch)
    model, batch = model.to(device), batch.to(device)
    with warnings.catch_warnings(record=True) as caught:
        call = call_of(side, setting, model, batch)
        first, ms, share = timings(call, repeats, warm_s, wait_for(device))
    said = [str(w.message) for w in caught if str(w.message).startswith("gametalearn")]
    learn2learn = side in ("learn2learn", "learn2learn-as-shipped")
    return Record(
        side=side,
        pid=os.getpid(),
        median_ms=statistics.median(ms),
        ms=ms,
        first_call_ms=first,
        peak_rss_mb=_peak_rss_mb(),
        others_share=share,
        allocator_keeps_memory=keeps,
        inputs=inputs,
        warnings=said,
        plan=None if learn2learn else dataclasses.asdict(_plan(setting, model, batch)),
        device=_about(device),
        peak_device_mb=_peak_device_mb(device),
    )


def wait_for(device: str) -> Callable[[], None]:
    """A function that returns when a device has done all that it was given; a CPU has at once."""
    if device == "cpu":
        return lambda: None
    return lambda: torch.cuda.synchronize(device)


def timings(
    call: Callable[[], object], repeats: int, warm_s: float, wait: Callable[[], None] = lambda: None
) -> tuple[float, list[float], float | None]:
    """What the first call took, and each of the timed ones, in ms; and others' share meanwhile.

    Args:
        call: what is timed.
        repeats: timings.
        warm_s: seconds of warm-up, at least.
        wait: returns when all is done that a call has given to a device (`wait_for`).
    """
    first = _milliseconds(call, wait)
    before = read()
    warm = 0
    while warm < WARM_CALLS or time.perf_counter() - before.wall < warm_s:
        call()
        wait()
        warm += 1
    ms = [_milliseconds(call, wait) for _ in range(repeats)]
    return first, ms, others_share(before, read())


def call_of(side: Side, setting: Setting, model: nn.Module, batch: TaskBatch) -> Callable[[], Any]:
    """The function that a side is timed by."""
    if side in ("learn2learn", "learn2learn-as-shipped"):
        return _learn2learn(setting, model, batch)
    if side.startswith("first-order"):
        setting = dataclasses.replace(setting, first_order=True)
    return (_floor if side.endswith("floor") else _gametalearn)(setting, model, batch)


def rows_of(result: Any) -> Tensor:
    """What gametalearn's or learn2learn's call returned, as rows ``(T, P)``."""
    return result if isinstance(result, Tensor) else torch.stack(result)


def _gametalearn(setting: Setting, model: nn.Module, batch: TaskBatch) -> Callable[[], Tensor]:
    from gametalearn.gradients import meta_gradients

    learner, constant = setting.learner(), setting.constant_memory
    return lambda: meta_gradients(model, batch, learner, constant_memory=constant).rows


def _learn2learn(
    setting: Setting, model: nn.Module, batch: TaskBatch
) -> Callable[[], list[Tensor]]:
    """learn2learn's usual loop, which keeps each task's gradient besides: a copy of P numbers."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # of its dependencies; gym prints its advice
            import learn2learn as l2l
    except ImportError as error:
        raise missing(error) from error
    maml = l2l.algorithms.MAML(model, lr=setting.inner_lr, first_order=setting.first_order)
    parameters = list(model.parameters())

    def gradient() -> list[Tensor]:
        rows = []
        for i in range(len(batch)):
            learner = maml.clone()
            for _ in range(setting.steps):
                learner.adapt(F.cross_entropy(learner(batch.support_x[i]), batch.support_y[i]))
            loss = F.cross_entropy(learner(batch.query_x[i]), batch.query_y[i])
            loss.backward()  # type: ignore[no-untyped-call]
            rows.append([p.grad for p in parameters])
            for p in parameters:
                p.grad = None
        return [torch.cat([g.flatten() for g in row]) for row in rows]  # type: ignore[union-attr]

    return gradient


def missing(error: ImportError) -> InputError:
    """What to say where learn2learn cannot be imported."""
    return InputError(
        f"bench: learn2learn cannot be imported ({error}); install it with `make learn2learn`"
    )


def _floor(setting: Setting, model: nn.Module, batch: TaskBatch) -> Callable[[], None]:
    from gametalearn.adaptation import default_loss, model_parameters
    from gametalearn.benchmark.floor import floor_of
    from gametalearn.engine.task import data_of

    meta, data = model_parameters(model), data_of(batch)
    return floor_of(
        model, setting.learner(), default_loss, meta, data, _plan(setting, model, batch)
    )


def _plan(setting: Setting, model: nn.Module, batch: TaskBatch) -> Any:
    from gametalearn.adaptation import model_parameters
    from gametalearn.engine.plan import choose
    from gametalearn.engine.task import data_of

    return choose(model_parameters(model), data_of(batch), setting.learner())


def _keep_memory() -> bool:
    from gametalearn.engine.allocator import keep_memory

    return keep_memory()


def _milliseconds(call: Callable[[], object], wait: Callable[[], None]) -> float:
    """From a device that has nothing to do to one that has nothing to do."""
    wait()
    start = time.perf_counter()
    call()
    wait()
    return (time.perf_counter() - start) * 1e3


def _about(device: str) -> dict[str, Any]:
    """A device by name; of a GPU also whether it may compute float32 in TF32, a setting of PyTorch."""
    name: dict[str, Any] = {"name": device_name(device)}
    if device == "cpu":
        return name
    return name | {
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
    }


def _peak_device_mb(device: str) -> float | None:
    return None if device == "cpu" else torch.cuda.max_memory_allocated(device) / 2**20


def _peak_rss_mb() -> float:
    """The most memory this process has held; `getrusage` would count its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = [x for x in status.read_text().splitlines() if x.startswith("VmHWM")]
        return int(lines[0].split()[1]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
