"""Run a traced program over the chunks of a batch, on worker threads."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch import Tensor, nn

from gametalearn.adaptation import Params
from gametalearn.engine.cache import Entry
from gametalearn.engine.check import Compared, difference, random_state_kept
from gametalearn.engine.loop import loop_scores
from gametalearn.engine.making import forget, program_for
from gametalearn.engine.plan import Plan
from gametalearn.engine.program import laid_out
from gametalearn.engine.quantities import GRADIENTS, SCORES, Quantities
from gametalearn.engine.swap import swapping
from gametalearn.engine.task import Data, Measured, Recipe, Result, fixed_tensors
from gametalearn.engine.workers import run_all
from gametalearn.errors import InputError

__all__ = ["chunks_of", "program_inputs", "replay_gradients", "replay_scores"]

CHECKED = frozenset({1, 2, *(10**n for n in range(1, 10))})
"""Calls at which a program is compared with the loop: on two tasks, later on one."""

_warned: WeakSet[nn.Module] = WeakSet()


def replay_gradients(recipe: Recipe, meta: Params, data: Data, plan: Plan) -> Result:
    """Rows, updates, loss and score of every task; by the loop where the module needs it."""
    return _replay(GRADIENTS, recipe, meta, data, plan)  # type: ignore[return-value]


def replay_scores(recipe: Recipe, meta: Params, data: Data, plan: Plan) -> Measured:
    """Loss and score of every task after adaptation; by the loop where the module needs it."""
    if len(data[0]) * 4 <= plan.chunk:  # a handful: the loop costs less than a filled-up chunk
        return loop_scores(recipe, meta, data)
    return _replay(SCORES, recipe, meta, data, plan)  # type: ignore[return-value]


def _replay(
    quantities: Quantities, recipe: Recipe, meta: Params, data: Data, plan: Plan
) -> tuple[Tensor, ...]:
    """The results for every task; by the loop where the module needs it."""
    chunks = chunks_of(data, plan.chunk)
    entry = program_for(quantities, recipe, meta, chunks[0])
    program = entry.program
    if program is None:
        try:
            results = quantities.loop(recipe, meta, data)
        except BaseException:  # it may not be the module's fault that there is no program
            forget(entry)
            raise
        _looped(recipe, entry)
        return results
    inputs = program_inputs(recipe.model, meta)
    if not all(bool(inputs[i].all()) for i in program.nonzero):
        return quantities.loop(recipe, meta, data)
    results = quantities.empty(meta, len(data[0]))

    def part(number: int) -> tuple[Tensor, ...]:
        start = number * plan.chunk
        return tuple(t[start : start + plan.chunk] for t in results)

    def run(number: int, chunk: Data) -> None:
        with torch.inference_mode():
            quantities.write(recipe, part(number), program(*inputs, *chunk))

    try:
        run_all([functools.partial(run, i, chunk) for i, chunk in enumerate(chunks)], plan.workers)
    except Exception:  # a label without an output, say: the loop tells what is wrong
        results = quantities.loop(recipe, meta, data)
        entry.program, entry.reason = None, "its program failed where the loop does not"
        _looped(recipe, entry)
        return results
    with swapping:  # whoever else is at this program waits until it has been compared
        entry.calls += 1
        for number, chunk in enumerate(chunks if plan.verify else chunks[: entry.calls in CHECKED]):
            try:
                if not _agree(quantities, recipe, meta, chunk, entry, part(number), plan.verify):
                    break
            except InputError:  # so it is told again in the next call
                forget(entry)
                raise
    return results if entry.program is not None else quantities.loop(recipe, meta, data)


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


def program_inputs(model: nn.Module, meta: Params) -> list[Tensor]:
    """The first arguments of a program: meta-parameters, other parameters and buffers."""
    with swapping:
        return [laid_out(t) for t in (*meta.values(), *fixed_tensors(model, meta).values())]


def _agree(
    quantities: Quantities,
    recipe: Recipe,
    meta: Params,
    chunk: Data,
    entry: Entry,
    results: tuple[Tensor, ...],
    every: bool,
) -> bool:
    """Whether program and loop agree on tasks of a chunk; otherwise it is looped from now on.

    Args:
        quantities, recipe, meta, chunk: what is computed, where, and on what.
        entry: what came of making the program.
        results: of the program, for the chunk.
        every: compare all tasks; else the first, and in the first call the last.
    """
    if entry.program is None:
        return False

    def gather(meta: Params, raw: Sequence[Tensor]) -> tuple[Tensor, ...]:
        results = quantities.empty(meta, len(chunk[0]))
        quantities.write(recipe, results, raw)
        return results

    compared = Compared(
        quantities.names,
        entry.program.module,
        gather,
        lambda meta, fixed, data: quantities.loop(recipe, meta, data, fixed=fixed),
    )
    fixed, count, first = fixed_tensors(recipe.model, meta), len(results[0]), entry.calls == 1
    tasks = list(range(count)) if every else sorted({0, count - 1 if first else 0})
    with random_state_kept():
        got = tuple(t[tasks] for t in results)
        wrong = difference(compared, meta, fixed, chunk, tasks, got, first=first)
    if wrong is not None:
        entry.program, entry.reason, entry.told = None, f"{wrong}, at call {entry.calls}", True
        _thrown_away(recipe, chunk, entry.reason, first)
    return wrong is None


def _thrown_away(recipe: Recipe, chunk: Data, reason: str, first: bool) -> None:
    """Say that a program was wrong."""
    known = "" if first else "something changed that cannot be seen from Python, or "
    name, shape = type(recipe.model).__name__, tuple(chunk[0].shape)
    warnings.warn(
        f"gametalearn: {name} is computed task by task in plain autograd from now on, which is exact "
        f"but slower. The results of its replay were discarded: {reason}. Either {known}"
        "this is a bug: please report it with this message, the model's code, the learner "
        f"{recipe.learner}, support inputs of shape {shape} and torch {torch.__version__}",
        stacklevel=3,
    )


def _looped(recipe: Recipe, entry: Entry) -> None:
    """Say once for a module that it is not replayed."""
    if recipe.model not in _warned and not entry.told:
        _warned.add(recipe.model)
        warnings.warn(
            f"gametalearn: {type(recipe.model).__name__} is computed task by task in plain autograd, "
            f"exact but slower, because it cannot be replayed: {entry.reason}",
            stacklevel=5,
        )
