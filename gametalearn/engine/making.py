"""The program for a batch: found among those that were made, or made now, or the reason for none."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from typing import Any

import torch

from gametalearn.adaptation import Params
from gametalearn.engine.cache import Entry, History, Store, key_of, last_change
from gametalearn.engine.check import random_state_kept
from gametalearn.engine.errors import UnreplayableError
from gametalearn.engine.program import Program
from gametalearn.engine.quantities import Quantities
from gametalearn.engine.state import Past, Watch, watch
from gametalearn.engine.swap import swapping
from gametalearn.engine.task import Data, Recipe, fixed_tensors
from gametalearn.errors import InputError
from gametalearn.normalisation import way_of

__all__ = ["clear_programs", "forget", "program_for"]

_store = Store()


def clear_programs() -> None:
    """Forget every program that was traced, so that the next call of each traces anew.

    For when something has changed that cannot be seen: a file or an environment variable that a
    forward reads, the state of a C extension.
    """
    with swapping:
        _store.clear()


def forget(entry: Entry) -> None:
    """Look anew for what an entry is for."""
    with swapping:
        _store.forget(entry)


def program_for(quantities: Quantities, recipe: Recipe, meta: Params, chunk: Data) -> Entry:
    """The program for a chunk like this one, made if there is none yet."""
    with swapping:
        past = _store.past.setdefault(recipe.model, History())
        if past.reason:
            return Entry(reason=past.reason)
        fixed = fixed_tensors(recipe.model, meta)
        form = _form(quantities, meta, fixed, chunk), way_of(recipe.model, recipe.protocol)
        try:
            key = key_of(recipe), form
            kind = form, *map(_kind, (recipe.learner, recipe.loss, recipe.score))
            entry = _store.get(key)
            if entry is None:
                if not past.admits(kind, key):
                    reason = f"what it depends on ({last_change()}) changes all the time"
                    return Entry(reason=reason)
                entry = _made(quantities, recipe, meta, fixed, chunk, past)
                if not past.reason:
                    # what making it has set (a cached table, say) may be part of the key
                    _store.put((key_of(recipe), form), entry)
        except UnreplayableError as reason:
            return Entry(reason=str(reason))
        past.used[kind] = past.used.get(kind, 0) + 1
        return entry


def _form(quantities: Quantities, meta: Params, fixed: Params, chunk: Data) -> Hashable:
    """What a program is made for, apart from the recipe: results, precision, shapes and devices."""
    device = chunk[0].device.type
    return (
        quantities.names,
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        tuple((n, t.shape, t.dtype, t.device) for n, t in (*meta.items(), *fixed.items())),
        tuple((t.shape, t.dtype, t.device) for t in chunk),
    )


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
        if changed is not None:  # it sets something as it runs
            again = _changed_again(quantities, recipe, meta, chunk)
            if again is not None:
                past.reason = f"its forward or loss changes {again} at every call"
                return Entry(reason=past.reason)
            program, changed = _traced(quantities, recipe, meta, fixed, chunk)
        if drawn():
            return Entry(reason="its forward draws random numbers")
        if isinstance(program, UnreplayableError):
            return Entry(reason=str(program))
        if changed is not None:
            past.reason = f"its forward or loss changes {changed}"
            return Entry(reason=past.reason)
        return Entry(program)


def _traced(
    quantities: Quantities, recipe: Recipe, meta: Params, fixed: Params, chunk: Data
) -> tuple[Program | UnreplayableError, str | None]:
    """A program, and what the forward has changed while it was traced; that is put back."""
    before = _seen(recipe)
    program: Program | UnreplayableError
    try:
        with torch.inference_mode(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the forward has to say, the loop says again
            program = quantities.trace(recipe, meta, fixed, chunk)
    except InputError:
        raise
    except UnreplayableError as reason:
        program = reason
    except Exception as error:  # any module may come: what fails, the loop tries again
        lines = str(error).strip().splitlines() or [type(error).__name__]
        program = UnreplayableError(lines[0])
    finally:
        changed = _change(before)
        _restore(before)
    return program, changed


def _changed_again(quantities: Quantities, recipe: Recipe, meta: Params, chunk: Data) -> str | None:
    """What a second run changes, which is put back; None if the first has done it once for all.

    A table that is computed at the first call, say, stays.
    """
    some: Data = tuple(t[:1] for t in chunk)  # type: ignore[assignment]
    before = _seen(recipe)
    for _, was in before:
        was.keep_tensors()
    quantities.loop(recipe, meta, some)
    try:
        after = _seen(recipe)
    except UnreplayableError:  # what the first run has made goes on by itself
        _restore(before)
        raise
    quantities.loop(recipe, meta, some)
    changed = _change(after)
    if changed is not None:
        _restore(before)
    return changed


_Seen = list[tuple[Watch, Past]]


def _seen(recipe: Recipe) -> _Seen:
    """What the parts of a recipe depend on now; a model's own tensors are a program's arguments."""
    others = (recipe.learner, recipe.loss, recipe.score)
    return [watch(recipe.model, recipe.model.modules()), *(watch(part) for part in others)]


def _change(seen: _Seen) -> str | None:
    """The name of something that is no longer as it was."""
    names = (found.changed() for found, _ in seen)
    return next((name for name in names if name is not None), None)


def _restore(seen: _Seen) -> None:
    for _, past in seen:
        past.restore()
