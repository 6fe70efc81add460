"""Run a traced program over the chunks of a batch, on worker threads."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from gametalearn.adaptation import Params
from gametalearn.engine.allocator import keep_memory
from gametalearn.engine.cache import Entry, History, Store, key_of, last_change
from gametalearn.engine.check import Compared, difference, random_state_kept
from gametalearn.engine.loop import loop_gradients, loop_scores
from gametalearn.engine.plan import Plan
from gametalearn.engine.program import (
    Program,
    UntraceableError,
    laid_out,
    trace_gradients,
    trace_scores,
)
from gametalearn.engine.records import Watch
from gametalearn.engine.state import Past, UnfrozenError, watch
from gametalearn.engine.swap import swapping
from gametalearn.engine.task import Data, Measured, Recipe, Result, fixed_tensors
from gametalearn.engine.workers import run_all
from gametalearn.errors import InputError
from gametalearn.normalisation import way_of

__all__ = [
    "GRADIENTS",
    "SCORES",
    "chunks_of",
    "clear_programs",
    "program_for",
    "program_inputs",
    "replay_gradients",
    "replay_scores",
]

_store = Store()
_warned: WeakSet[nn.Module] = WeakSet()

STATES, USES = 8, 8
"""Programs made for one module in different states before a state has to come twice to get one,
unless the programs were used this often each."""
CHECKED = frozenset({1, 2, *(10**n for n in range(1, 10))})
"""Calls at which a program is compared with the loop: on two tasks, later on one."""


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


def clear_programs() -> None:
    """Forget every program that was traced, so that the next call of each traces anew.

    For when something has changed that cannot be seen: a file or an environment variable that a
    forward reads, the state of a C extension.
    """
    with swapping:
        _store.clear()


def program_for(quantities: Quantities, recipe: Recipe, meta: Params, chunk: Data) -> Entry:
    """The program for a chunk like this one, made if there is none yet."""
    with swapping:
        device = chunk[0].device.type
        if device == "cpu":
            keep_memory()
        past = _store.past.setdefault(recipe.model, History())
        if past.reason:
            return Entry(reason=past.reason)
        fixed = fixed_tensors(recipe.model)
        form = (
            quantities.names,
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
            tuple((n, t.shape, t.dtype, t.device) for n, t in (*meta.items(), *fixed.items())),
            tuple((t.shape, t.dtype, t.device) for t in chunk),
            way_of(recipe.model, recipe.protocol),
        )
        try:
            key = key_of(recipe), form
        except UnfrozenError as reason:
            return Entry(reason=str(reason))
        entry, kind = (
            _store.get(key),
            (form, *map(_kind, (recipe.learner, recipe.loss, recipe.score))),
        )
        if entry is None:
            made = past.made.get(kind, 0)
            hardly_used = past.used.get(kind, 0) < USES * made
            if made >= STATES and hardly_used and past.missed.get(kind) != key:
                past.missed[kind] = key
                return Entry(reason=f"what it depends on ({last_change()}) changes all the time")
            past.made[kind] = made + 1
            entry = _made(quantities, recipe, meta, fixed, chunk, past)
            if not past.reason:
                # what making it has set (a cached table, say) may be part of the key
                _store.put((key_of(recipe), form), entry)
        past.used[kind] = past.used.get(kind, 0) + 1
        return entry


def _kind(part: object) -> Hashable:
    """Which function or class a learner, loss or score is, whatever its state."""
    kind: Any = type(part)
    return getattr(part, "__code__", kind)  # type: ignore[no-any-return]


def _made(
    quantities: Quantities, recipe: Recipe, meta: Params, fixed: Params, chunk: Data, past: History
) -> Entry:
    """A program, not compared with the loop yet; or why there is none."""
    with random_state_kept() as drawn:
        program, changed = _traced(quantities, recipe, meta, fixed, chunk)
        if changed is not None:
            # It sets something as it runs. If that is done once (a table is computed at the first
            # call), a second run finds it done.
            some: Data = tuple(t[:1] for t in chunk)  # type: ignore[assignment]
            before = _seen(recipe)
            for _, was in before:
                was.keep_tensors()
            quantities.loop(recipe, meta, some)
            after = _seen(recipe)
            quantities.loop(recipe, meta, some)
            again = _changes(after)
            if again:
                _restore(before)
                past.reason = f"its forward or loss changes {again[0]} at every call"
                return Entry(reason=past.reason)
            program, changed = _traced(quantities, recipe, meta, fixed, chunk)
        if drawn():
            return Entry(reason="its forward draws random numbers")
        if isinstance(program, UntraceableError):
            return Entry(reason=str(program))
        if changed is not None:
            past.reason = f"its forward or loss changes {changed}"
            return Entry(reason=past.reason)
        return Entry(program)


_Seen = list[tuple[Watch, Past]]


def _seen(recipe: Recipe) -> _Seen:
    """What the parts of a recipe depend on now; a model's own tensors are a program's arguments."""
    others = (recipe.learner, recipe.loss, recipe.score)
    return [watch(recipe.model, recipe.model.modules()), *(watch(part) for part in others)]


def _changes(seen: _Seen) -> list[str]:
    return [name for found, _ in seen if (name := found.changed()) is not None]


def _restore(seen: _Seen) -> None:
    for _, past in seen:
        past.restore()


def _traced(
    quantities: Quantities, recipe: Recipe, meta: Params, fixed: Params, chunk: Data
) -> tuple[Program | UntraceableError, str | None]:
    """A program, and what the forward has changed while it was traced; that is put back."""
    before = _seen(recipe)
    program: Program | UntraceableError
    try:
        with torch.inference_mode(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the forward has to say, the loop says again
            program = quantities.trace(recipe, meta, fixed, chunk)
    except InputError:
        raise
    except UntraceableError as reason:
        program = reason
    except Exception as error:  # any module may come: what fails, the loop tries again
        lines = str(error).strip().splitlines() or [type(error).__name__]
        program = UntraceableError(lines[0])
    finally:
        changed = _changes(before)
        _restore(before)
    return program, changed[0] if changed else None


def _compare(
    entry: Entry,
    quantities: Quantities,
    recipe: Recipe,
    meta: Params,
    fixed: Params,
    chunk: Data,
    tasks: Sequence[int],
    results: tuple[Tensor, ...],
) -> bool:
    """Whether program and loop agree on some tasks of a chunk; otherwise it is looped from now on.

    ``results`` are those of the chunk.
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
    with random_state_kept():
        got = tuple(t[list(tasks)] for t in results)
        first = entry.calls == 1
        wrong = difference(compared, meta, fixed, chunk, tasks, got, first=first)
    if wrong is None:
        return True
    entry.program, entry.reason, entry.told = None, f"{wrong}, at call {entry.calls}", True
    known = "" if first else "something changed that cannot be seen from Python, or "
    name, shape = type(recipe.model).__name__, tuple(chunk[0].shape)
    warnings.warn(
        f"gametalearn: {name} is computed task by task in plain autograd from now on, which is exact "
        f"but slower. The results of its replay were thrown away: {entry.reason}. Either {known}"
        "this is a bug: please report it with this message, the model's code, the learner "
        f"{recipe.learner}, support inputs of shape {shape} and torch {torch.__version__}",
        stacklevel=2,
    )
    return False


def _looped(recipe: Recipe, entry: Entry) -> None:
    """Say once for a module that it is not replayed."""
    if recipe.model not in _warned and not entry.told:
        _warned.add(recipe.model)
        warnings.warn(
            f"gametalearn: {type(recipe.model).__name__} is computed task by task in plain autograd, "
            f"exact but slower, because it cannot be replayed: {entry.reason}",
            stacklevel=5,
        )


def program_inputs(model: nn.Module, meta: Params) -> list[Tensor]:
    """The first arguments of a program: meta-parameters, frozen parameters and buffers."""
    with swapping:
        return [laid_out(t) for t in (*meta.values(), *fixed_tensors(model).values())]


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
            with swapping:
                _store.forget(entry)
            raise
        _looped(recipe, entry)
        return results
    inputs, tasks = program_inputs(recipe.model, meta), len(data[0])
    if not all(bool(inputs[i].all()) for i in program.nonzero):
        return quantities.loop(recipe, meta, data)
    results = quantities.empty(meta, tasks)

    def run(start: int, chunk: Data) -> None:
        with torch.inference_mode():
            raw = program(*inputs, *chunk)
            part = tuple(t[start : start + plan.chunk] for t in results)
            quantities.write(recipe, part, raw)

    try:
        _run_chunks(run, chunks, plan)
    except Exception:  # a label without an output, say: the loop tells what is wrong
        results = quantities.loop(recipe, meta, data)
        entry.program, entry.reason = None, "its program failed where the loop does not"
        _looped(recipe, entry)
        return results
    with swapping:  # whoever else is at this program waits until it has been compared
        entry.calls += 1
        some = chunks if plan.verify else chunks[: entry.calls in CHECKED]
        fixed = fixed_tensors(recipe.model) if some else {}
        for number, chunk in enumerate(some):
            start = number * plan.chunk
            count = min(plan.chunk, tasks - start)
            compared = range(count) if plan.verify else {0, count - 1 if entry.calls == 1 else 0}
            part = tuple(t[start : start + count] for t in results)
            if not _compare(entry, quantities, recipe, meta, fixed, chunk, sorted(compared), part):
                break
    return results if entry.program is not None else quantities.loop(recipe, meta, data)


def _run_chunks(run: Callable[[int, Data], None], chunks: list[Data], plan: Plan) -> None:
    def call(i: int, chunk: Data) -> Callable[[], Any]:
        return lambda: run(i * plan.chunk, chunk)

    run_all([call(i, chunk) for i, chunk in enumerate(chunks)], plan.workers)


def _dtype(meta: Params) -> torch.dtype:
    return functools.reduce(torch.promote_types, [p.dtype for p in meta.values()])


def _empty_gradients(meta: Params, tasks: int) -> Result:
    first, size = next(iter(meta.values())), sum(p.numel() for p in meta.values())
    rows = torch.empty(tasks, size, dtype=_dtype(meta), device=first.device)
    return rows, torch.empty_like(rows), *_empty_scores(meta, tasks)


def _empty_scores(meta: Params, tasks: int) -> Measured:
    first = next(iter(meta.values()))
    dtype = torch.promote_types(
        _dtype(meta), torch.float32
    )  # a share of 75 has no place in bfloat16
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


def replay_gradients(recipe: Recipe, meta: Params, data: Data, plan: Plan) -> Result:
    """Rows, updates, loss and score of every task; by the loop where the module needs it."""
    return _replay(GRADIENTS, recipe, meta, data, plan)  # type: ignore[return-value]


def replay_scores(recipe: Recipe, meta: Params, data: Data, plan: Plan) -> Measured:
    """Loss and score of every task after adaptation; by the loop where the module needs it."""
    if len(data[0]) * 4 <= plan.chunk:  # a handful: the loop costs less than a filled-up chunk
        return loop_scores(recipe, meta, data)
    return _replay(SCORES, recipe, meta, data, plan)  # type: ignore[return-value]
