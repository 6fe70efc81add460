"""What is computed for each task by either method, and how it is laid out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gametalearn.adaptation import Params
from gametalearn.engine.loop import loop_gradients, loop_scores
from gametalearn.engine.program import Program, trace_gradients, trace_scores
from gametalearn.engine.task import Data, Measured, Recipe, Result

__all__ = ["GRADIENTS", "SCORES", "Quantities"]


@dataclass(frozen=True)
class Quantities:
    """What is computed for each task, by either method.

    Attributes:
        names: of the results.
        trace: makes a program.
        loop: the same by plain autograd.
        empty: ``empty(meta, T)``: tensors ``(T, *)`` for the results.
        write: ``write(recipe, results, raw)``: what a program returned for their tasks.
    """

    names: tuple[str, ...]
    trace: Callable[[Recipe, Params, Params, Data], Program]
    loop: Callable[..., tuple[Tensor, ...]]
    empty: Callable[[Params, int], tuple[Tensor, ...]]
    write: Callable[[Recipe, tuple[Tensor, ...], Sequence[Tensor]], None]


def _dtype(meta: Params) -> torch.dtype:
    return functools.reduce(torch.promote_types, [p.dtype for p in meta.values()])


def _empty_gradients(meta: Params, tasks: int) -> Result:
    first, size = next(iter(meta.values())), sum(p.numel() for p in meta.values())
    rows = torch.empty(tasks, size, dtype=_dtype(meta), device=first.device)
    return rows, torch.empty_like(rows), *_empty_scores(meta, tasks)


def _empty_scores(meta: Params, tasks: int) -> Measured:
    first = next(iter(meta.values()))
    # a share of 75 has no place in bfloat16
    dtype = torch.promote_types(_dtype(meta), torch.float32)
    loss = torch.empty(tasks, dtype=dtype, device=first.device)
    return loss, torch.empty_like(loss)


def _write_gradients(recipe: Recipe, results: tuple[Tensor, ...], raw: Sequence[Tensor]) -> None:
    rows, updates, *measured = results
    *parts, value, points = raw
    count = len(parts) if recipe.learner.update_is_row else len(parts) // 2
    _lay(updates, parts[-count:])
    _lay(rows, parts[:count])
    _write_scores(recipe, tuple(measured), (value, points))


def _write_scores(recipe: Recipe, results: tuple[Tensor, ...], raw: Sequence[Tensor]) -> None:
    for result, part in zip(results, raw, strict=True):
        result.copy_(part[: len(result)])


def _lay(rows: Tensor, parts: Sequence[Tensor]) -> None:
    """Lay ``(T, *shape)`` tensors side by side in ``(T, P)``."""
    column = 0
    for part in parts:
        part = part[: len(rows)]
        width = part[0].numel()
        rows[:, column : column + width].view(part.shape).copy_(part)
        column += width


GRADIENTS = Quantities(
    ("rows", "updates", "loss", "score"),
    trace_gradients,
    loop_gradients,
    _empty_gradients,
    _write_gradients,
)
SCORES = Quantities(("loss", "score"), trace_scores, loop_scores, _empty_scores, _write_scores)
