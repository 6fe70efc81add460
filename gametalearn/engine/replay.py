"""Run a traced program over the chunks of a batch, on worker threads."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gametalearn.adaptation import Learner, Params
from gametalearn.engine.allocator import keep_memory
from gametalearn.engine.cache import Store, settings_key
from gametalearn.engine.loop import loop_gradients, loop_scores
from gametalearn.engine.plan import Plan
from gametalearn.engine.program import (
    Program,
    UntraceableError,
    laid_out,
    trace_gradients,
    trace_scores,
)
from gametalearn.engine.task import Data, Loss, Measured, Result, fixed_tensors, swapping
from gametalearn.engine.workers import run_all
from gametalearn.errors import InputError
from gametalearn.scores import ScoreFunction

__all__ = ["chunks_of", "program_for", "program_inputs", "replay_gradients", "replay_scores"]

_programs: Store[Program | UntraceableError] = Store()
_warned: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

Trace = Callable[[nn.Module, Learner, Loss, ScoreFunction, Params, Params, Data], Program]


def chunks_of(data: Data, size: int) -> list[Data]:
    """Chunks of ``size`` tasks, the last filled up with copies of its last task."""
    chunks = []
    for start in range(0, len(data[0]), size):
        parts = [t[start : start + size] for t in data]
        short = size - len(parts[0])
        if short:
            parts = [torch.cat([t, t[-1:].expand(short, *t.shape[1:])]) for t in parts]
        chunks.append(tuple(laid_out(t) for t in parts))
    return chunks  # type: ignore[return-value]


def program_for(
    trace: Trace,
    model: nn.Module,
    learner: Learner,
    loss: Loss,
    score: ScoreFunction,
    meta: Params,
    data: Data,
) -> Program | UntraceableError:
    """The program for a chunk like ``data``, traced at its first use."""
    with swapping:
        device = data[0].device.type
        if device == "cpu":
            keep_memory()
        fixed = fixed_tensors(model)
        settings = settings_key(learner), settings_key(loss), settings_key(score)
        if None in settings:
            which = ("learner", "loss", "score")[settings.index(None)]
            return UntraceableError(
                f"the {which} is neither a frozen dataclass of plain values nor a function"
            )
        key = (
            trace,
            # What a trace finds, and what stands in it from then on.
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
            (torch.get_default_dtype(), torch.is_anomaly_enabled()),
            *settings,
            tuple((n, tuple(t.shape), t.dtype, t.device) for n, t in meta.items()),
            tuple((n, tuple(t.shape), t.dtype, t.device) for n, t in fixed.items()),
            tuple((tuple(t.shape), t.dtype, t.device) for t in data),
        )

        def make() -> Program | UntraceableError:
            if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
                return UntraceableError("torch.jit compiled a part of it")
            try:
                return trace(model, learner, loss, score, meta, fixed, data)
            except InputError:
                raise
            except UntraceableError as reason:
                return reason
            except Exception as error:  # any module may come: what fails, the loop tries again
                lines = str(error).strip().splitlines() or [type(error).__name__]
                return UntraceableError(lines[0])

        return _programs.get(model, key, make)


def _warn(model: nn.Module, reason: UntraceableError) -> None:
    if model not in _warned:
        _warned[model] = True
        warnings.warn(
            f"gametalearn: {type(model).__name__} is computed task by task in plain autograd, "
            f"exact but slower, because it cannot be replayed: {reason}",
            stacklevel=4,
        )


def program_inputs(model: nn.Module, meta: Params) -> list[Tensor]:
    with swapping:
        tensors = (*meta.values(), *fixed_tensors(model).values())
    return [laid_out(t) for t in tensors]


def replay_gradients(
    model: nn.Module,
    learner: Learner,
    loss: Loss,
    score: ScoreFunction,
    meta: Params,
    data: Data,
    plan: Plan,
) -> Result:
    """Rows, updates, loss and score of every task; by the loop where the module needs it."""
    chunks = chunks_of(data, plan.chunk)
    program = program_for(trace_gradients, model, learner, loss, score, meta, chunks[0])
    if isinstance(program, UntraceableError):
        _warn(model, program)
        return loop_gradients(model, learner, loss, score, meta, data)
    inputs = program_inputs(model, meta)
    tasks, first = len(data[0]), inputs[0]
    sizes = [p.numel() for p in meta.values()]
    dtype = _dtype(meta)
    updates = first.new_empty(tasks, sum(sizes), dtype=dtype)
    rows = updates.clone() if learner.update_is_row else torch.empty_like(updates)
    measured = torch.empty(2, tasks, dtype=_at_least_single(dtype), device=first.device)

    def run(start: int, chunk: Data) -> None:
        with torch.inference_mode():
            *grads, value, points = program(*inputs, *chunk)
            stop = min(start + plan.chunk, tasks)
            _write(updates[start:stop], grads[-len(sizes) :])
            _write(rows[start:stop], grads[: len(sizes)])
            measured[0, start:stop] = value[: stop - start]
            measured[1, start:stop] = points[: stop - start]

    _run_chunks(run, chunks, plan)
    return rows, updates, measured[0], measured[1]


def _dtype(meta: Params) -> torch.dtype:
    return functools.reduce(torch.promote_types, [p.dtype for p in meta.values()])


def _at_least_single(dtype: torch.dtype) -> torch.dtype:
    """Of a loss and a score: a share of 75 has no place in half precision."""
    return torch.promote_types(dtype, torch.float32)


def _write(rows: Tensor, parts: list[Tensor]) -> None:
    """Lay ``(T, *shape)`` tensors side by side in ``(T, P)``."""
    column = 0
    for part in parts:
        part = part[: len(rows)]
        width = part[0].numel()
        rows[:, column : column + width].view(part.shape).copy_(part)
        column += width


def replay_scores(
    model: nn.Module,
    learner: Learner,
    loss: Loss,
    score: ScoreFunction,
    meta: Params,
    data: Data,
    plan: Plan,
) -> Measured:
    """Loss and score of every task after adaptation; by the loop where the module needs it."""
    if len(data[0]) * 4 <= plan.chunk:  # a handful: the loop costs less than a filled-up chunk
        return loop_scores(model, learner, loss, score, meta, data)
    chunks = chunks_of(data, plan.chunk)
    program = program_for(trace_scores, model, learner, loss, score, meta, chunks[0])
    if isinstance(program, UntraceableError):
        _warn(model, program)
        return loop_scores(model, learner, loss, score, meta, data)
    inputs = program_inputs(model, meta)
    tasks, first = len(data[0]), inputs[0]
    measured = torch.empty(2, tasks, dtype=_at_least_single(_dtype(meta)), device=first.device)

    def run(start: int, chunk: Data) -> None:
        with torch.inference_mode():
            value, points = program(*inputs, *chunk)
            stop = min(start + plan.chunk, tasks)
            measured[0, start:stop] = value[: stop - start]
            measured[1, start:stop] = points[: stop - start]

    _run_chunks(run, chunks, plan)
    return measured[0], measured[1]


def _run_chunks(run: Callable[[int, Data], None], chunks: list[Data], plan: Plan) -> None:
    def call(i: int, chunk: Data) -> Callable[[], Any]:
        return lambda: run(i * plan.chunk, chunk)

    run_all([call(i, chunk) for i, chunk in enumerate(chunks)], plan.workers)
