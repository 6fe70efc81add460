"""Compare a program with the plain loop: nothing is replayed on trust.

The loop is the definition of what is right. In float32 the two differ by rounding, and a ReLU or a
max-pool near its kink can make much of that, so that the very program that will run is computed
again in float64, where the difference must be at most 1e-9. Where that cannot be done (the forward
casts to a precision of its own), the program may be three times as far from float64 as the loop is.
An inner loop that magnifies rounding is measured by itself: what a change of the parameters in their
last digits does to the loop's result, rounding may do to the program's.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.fx.node import map_aggregate

from gametalearn.adaptation import Params
from gametalearn.engine.task import Data

__all__ = ["Compared", "difference", "random_state_kept"]

BOUND = 1e-9
"""Largest relative difference in float64."""
FACTOR = 3.0
"""How much further from float64 than the loop a program may be, where it is compared in float32."""
SANE = 1e-2
"""Relative difference from float64 below which a program in its own precision is not looked into;
in half precision `SANE_UNITS` last digits, if that is more."""
SANE_UNITS = 64
ALIKE = 1e-4
"""Relative difference in float32 below which a program that was found right is not looked into."""
MAGNIFIED = 30.0
"""How much larger than the effect of a change in the last digits a difference may be."""
MOVES = 8
"""How many such changes are tried: a score such as accuracy jumps at one and not at another."""
FLOOR = 1e-10
"""Values below this are compared by their difference, not its ratio to them."""

Results = tuple[Tensor, ...]
"""Of some tasks: ``(T, *)`` each."""
Loop = Callable[[Params, Params, Data], Results]
"""``loop(meta, fixed, data)``."""


@dataclass(frozen=True)
class Compared:
    """A program and the loop that it must agree with.

    Attributes:
        names: of the results, such as ``("rows", "updates", "loss", "score")``.
        module: the program's graph; ``module(*inputs)`` returns raw results of a chunk of tasks.
        gather: ``gather(meta, raw)``: the results out of the raw ones, in the precision of meta.
        loop: the same by plain autograd.
    """

    names: tuple[str, ...]
    module: GraphModule
    gather: Callable[[Params, Sequence[Tensor]], Results]
    loop: Loop


def difference(
    compared: Compared,
    meta: Params,
    fixed: Params,
    chunk: Data,
    tasks: Sequence[int],
    got: Results,
    *,
    first: bool = True,
) -> str | None:
    """What differs between program and loop on some tasks of a chunk; None if they agree.

    Args:
        compared: what is compared.
        meta, fixed: the meta-parameters, and other parameters and buffers.
        chunk: a chunk of tasks as the program takes it.
        tasks: the numbers of those to compare.
        got: what the program returned for these, ``(len(tasks), *)`` each.
        first: always compute in float64. A program that has been found right is first compared in
            its own precision, to `ALIKE`, and looked into only if it differs by more.
    """
    some, own = _some(chunk, tasks), next(iter(meta.values())).dtype
    expected = None
    if not first or all(p.dtype == torch.float64 for p in meta.values()):
        expected = compared.loop(meta, fixed, some)
        double = own == torch.float64
        wrong = _differs(compared.names, got, expected, BOUND if double else ALIKE)
        if not wrong:
            return None
        if double:
            return _unless_magnified(wrong, compared, meta, fixed, some, got, expected)
    wide = [_double(part) for part in (meta, fixed, chunk)]
    some64, truth, replayed = _some(wide[2], tasks), None, None
    with contextlib.suppress(Exception):  # it casts by itself, or checks what it is given
        truth = compared.loop(wide[0], wide[1], some64)
        with torch.inference_mode():
            inputs = [
                t for part in wide for t in (part.values() if isinstance(part, dict) else part)
            ]
            raw = _Wide(compared.module, own).run(*inputs)
            replayed = tuple(t[list(tasks)] for t in compared.gather(wide[0], raw))
    if truth is not None and replayed is not None:
        wrong = _differs(compared.names, replayed, truth, BOUND)
        if wrong:
            wrong = _unless_magnified(wrong, compared, wide[0], wide[1], some64, replayed, truth)
        sane = max(SANE, SANE_UNITS * torch.finfo(own).eps)
        if not wrong and not _differs(compared.names, got, truth, sane):
            return None
    # In its own precision: as far from the truth as the loop is, or from the loop as its rounding.
    expected = compared.loop(meta, fixed, some) if expected is None else expected
    if truth is not None:
        wrong = _farther(compared.names, got, expected, truth)
    else:
        wrong = _differs(compared.names, got, expected, 16 * torch.finfo(own).eps)
    return wrong and _unless_magnified(wrong, compared, meta, fixed, some, got, expected)


def _some(chunk: Data, tasks: Sequence[int]) -> Data:
    return tuple(t[list(tasks)] for t in chunk)  # type: ignore[return-value]


def _double(part: Any) -> Any:
    if isinstance(part, dict):
        return {n: _double(t) for n, t in part.items()}
    if isinstance(part, Tensor):
        if part.is_complex():
            return part.to(torch.complex128)
        return part.double() if part.is_floating_point() else part
    return tuple(_double(t) for t in part)


def _distances(got: Results, expected: Results) -> list[float]:
    """For each result the largest difference, in relation to the largest value of its task."""
    found = []
    for a, b in zip(got, expected, strict=True):
        a, b = (
            t.detach().double().flatten(1) if t.ndim > 1 else t.double()[:, None] for t in (a, b)
        )
        both = ~(torch.isfinite(a) | torch.isfinite(b))  # two NaNs agree, as do two infinities
        a, b = (t.masked_fill(both, 0.0) for t in (a, b))
        scale = b.abs().amax(1).clamp_min(FLOOR) if b.shape[1] else b.new_ones(len(b))
        error = (a - b).abs().amax(1) if b.shape[1] else b.new_zeros(len(b))
        found.append(float(torch.nan_to_num(error / scale, nan=float("inf")).max()))
    return found


def _differs(names: Sequence[str], got: Results, expected: Results, bound: float) -> str | None:
    for name, distance in zip(names, _distances(got, expected), strict=True):
        if distance > bound:
            return f"{name} differ from the loop's by {distance:.2g} of their size"
    return None


def _farther(names: Sequence[str], got: Results, loop: Results, truth: Results) -> str | None:
    pairs = zip(names, _distances(got, truth), _distances(loop, truth), strict=True)
    for name, mine, theirs in pairs:
        if mine > FACTOR * theirs + 16 * torch.finfo(torch.float32).eps:
            return f"{name} are {mine:.2g} of their size from those in float64, the loop's {theirs:.2g}"
    return None


def _unless_magnified(
    wrong: str,
    compared: Compared,
    meta: Params,
    fixed: Params,
    data: Data,
    got: Results,
    expected: Results,
) -> str | None:
    """``wrong``, unless a change of the parameters in their last digits does as much to the loop."""
    generator = torch.Generator().manual_seed(0)
    unexplained = _distances(got, expected)
    for _ in range(MOVES):
        moved = {
            n: p * (1 + 8 * torch.finfo(p.dtype).eps * _noise(p, generator))
            for n, p in meta.items()
        }
        moved_by = _distances(compared.loop(moved, fixed, data), expected)
        unexplained = [
            0.0 if distance <= max(BOUND, MAGNIFIED * by) else distance
            for distance, by in zip(unexplained, moved_by, strict=True)
        ]
        if not any(unexplained):
            return None
    return wrong


def _noise(p: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)


class _Wide(Interpreter):
    """Runs a program in float64, for tensors that are so."""

    def __init__(self, module: GraphModule, own: torch.dtype) -> None:
        super().__init__(module)
        self.own = own

    def fetch_attr(self, target: str) -> Any:
        return _double(super().fetch_attr(target))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = (map_aggregate(a, self._widened) for a in (args, kwargs))
        return super().call_function(target, args, kwargs)

    def _widened(self, value: Any) -> Any:
        return torch.float64 if value is self.own else value


@contextlib.contextmanager
def random_state_kept() -> Iterator[Callable[[], bool]]:
    """Leave all generators as they were; gives a function that tells whether anyone drew.

    Of Python, numpy and torch. (A trace draws none of torch's numbers: its operators are known by
    their tag.)
    """
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    tensors = torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if cuda else []

    def drawn() -> bool:
        now = np.random.get_state()  # noqa: NPY002
        same = all(np.array_equal(a, b) for a, b in zip(arrays, now, strict=True))
        return random.getstate() != python or not same

    try:
        yield drawn
    finally:
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002
        torch.set_rng_state(tensors)
        if cuda:
            torch.cuda.set_rng_state_all(devices)
