"""Gradient agreement in memory that does not grow with the number of tasks."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from gametalearn.errors import InputError, require_whole
from gametalearn.weighting.agreement import rounding, shares, vanish
from gametalearn.weighting.vectors import Vectors, wide_type
from gametalearn.weighting.weights import (
    TaskGradient,
    check_finite,
    check_tensor,
    largest_entries,
)

__all__ = ["stream_agreement"]

REPEATED = 1e-3
"""How far, relatively, a gradient's length may move between the passes; CUDA moves it by 1e-6."""

PROJECTED = 1e-2
"""How far its projection on fixed random numbers may move, relative to its length; 8 eps of the
gradient's dtype at least, as single entries move by more than their sum of squares."""

COLUMNS = 2**12
"""Random numbers of a row; each row of as many entries has one number more, a factor."""

G = TypeVar("G", bound=TaskGradient)
"""A tensor, or a sequence or dict of them."""

Parts = dict[object, Tensor]
"""The parts of a gradient that are not None, by position or name, each a row ``(1, p)``; or sums of
such parts, each ``(p,)`` in the wide type."""


def stream_agreement(
    task_gradient: Callable[[int], G], num_tasks: int, *, normalize: bool = False
) -> tuple[G, Tensor]:
    """The agreement weights of T tasks, and their combination, from one gradient at a time.

        w_i = s_i / sum_k |s_k|,  s_i = <g_i, sum_j g_j>
        combination = sum_i w_i g_i

    as in `agreement_weights`. The first pass finds sum_j g_j and the largest entry of all, by which
    everything is divided so that products stay in range; the second finds s_i and sums s_i g_i, to
    be divided by sum |s_i| at the end. So each gradient is computed twice, and what is held at a
    time is one gradient and two sums in float64 (three with ``normalize``), and a float64 copy of
    one part of the gradient, whatever T is.

    Args:
        task_gradient: the gradient of task i, 0 <= i < T: a tensor, a sequence or a dict of tensors
            (None stands for zeros), such as `torch.autograd.grad` returns. Called in order, twice
            for each i; the second gradient must be the first again, so whatever is random in it
            (dropout, the drawing of examples) must depend on i alone. What it changes changes twice:
            batch norm's running statistics take in each task two times, so halve its ``momentum``
            (0.05 for 0.1), or put back the model's ``buffers()`` as they were after task T - 1.
        num_tasks: T, at least 1.
        normalize: scale each g_i to unit length for the weights, as in `agreement_weights`.

    Returns:
        The combination, in the form, dtypes and devices of a task's gradient (a part that is None
        in every task stays None), and the weights ``(T,)``. One task, or all s_k zero up to
        rounding: the plain mean and uniform weights. For the latter, sum |G_ij| is not at hand, and
        its upper bound (sum ||g_i||)^2 stands in: sum |s| <= 4 * eps * (sum ||g_i||)^2, with
        float32's eps for half precision, too.

    Raises:
        InputError: no tasks; a gradient that is not finite (the message names the task), or that
            differs from task 0's in form; a second pass that does not repeat the first, by the
            gradient's length or its inner product with fixed random numbers.

    >>> tasks = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    >>> stream_agreement(lambda i: tasks[i], 3)
    (tensor([1.0000, 0.5000]), tensor([ 0.2500,  0.5000, -0.2500]))
    """
    require_whole("stream_agreement: num_tasks", num_tasks, 1)
    form: _Form[G] = _Form()
    total: Parts = {}  # sum of v_i = g_i over the largest entry so far, or over its own length
    scale = 0.0  # the largest entry so far
    lengths: list[tuple[float, float]] = []  # as products, since they may leave the range
    projections: list[float] = []

    def vectors(parts: Parts, top: float, length: float) -> dict[object, Vectors]:
        own = normalize and top > 0
        return _vectors(parts, top, 1 / length) if own else _vectors(parts, scale or 1.0)

    for task in range(num_tasks):
        parts = form.parts(task, task_gradient(task))
        top, length = _length(task, parts)
        lengths.append((top, length))
        projections.append(_projection(parts, top))
        if top > scale:
            if not normalize:
                _multiply(total, scale / top)
            scale = top
        _add(total, vectors(parts, top, length))
        del parts  # before the next one is computed

    combination: Parts = {}  # sum of s_i g_i / scale
    plain: Parts = {} if normalize else total  # sum of g_i / scale
    s = torch.zeros(num_tasks, dtype=torch.float64)
    bound = 0.0  # sum ||v_i||
    for task, (top, length) in enumerate(lengths):
        parts = form.parts(task, task_gradient(task))
        _check_repeated(task, _length(task, parts), (top, length))
        moved = abs(_projection(parts, top) - projections[task])
        if moved > max(PROJECTED, 8 * torch.finfo(form.dtype).eps) * length:
            raise InputError(
                f"stream_agreement: task_gradient({task}) returned a different gradient in the second "
                "pass, as long as the first and in another direction; seed its randomness by the task"
            )
        s[task] = _score(vectors(parts, top, length), total)
        bound += float(top > 0) if normalize else top / (scale or 1.0) * length
        _add(combination, _vectors(parts, scale or 1.0), float(s[task]))
        if normalize:
            _add(plain, _vectors(parts, scale or 1.0))
        del parts

    threshold = rounding(form.dtype)
    size = float(s.abs().sum())
    if bool(vanish(s, bound**2, threshold)):
        combination, size = plain, float(num_tasks)
    _multiply(combination, 1 / size)
    _multiply(combination, scale)
    return form.build(combination), form.weights(shares(s, bound**2, threshold))


class _Form(Generic[G]):
    """What the gradients of all tasks have in common: structure, shapes, dtypes, devices."""

    def __init__(self) -> None:
        self._type: type | None = None
        self._keys: list[object] = []
        # For each part that some task has: its shape, and a zero of its dtype and device.
        self._shape: dict[object, torch.Size] = {}
        self._zero: Parts = {}

    def parts(self, task: int, gradient: G) -> Parts:
        """The parts of a task's gradient as rows; an `InputError` if they do not fit those before."""
        kind: type = list if isinstance(gradient, list) else tuple
        found: dict[Any, Tensor | None]
        if isinstance(gradient, Mapping):
            kind, found = dict, dict(gradient)
        elif isinstance(gradient, Iterable) and not isinstance(gradient, Tensor):
            found = dict(enumerate(gradient))
        else:
            check_tensor(gradient, f"stream_agreement: gradient of task {task}")
            kind, found = Tensor, {0: gradient}
        for key, part in found.items():
            if part is not None:
                check_tensor(part, f"stream_agreement: gradient of task {task}, part {key}")
        if self._type is None:
            self._type, self._keys = kind, list(found)
        if kind is not self._type or found.keys() != set(self._keys):
            raise InputError(
                f"stream_agreement: the gradient of task {task} is a {kind.__name__} of parts "
                f"{list(found)[:6]}, that of task 0 a {self._type.__name__} of {self._keys[:6]}"
            )
        given = {key: part.detach() for key, part in found.items() if part is not None}
        for key, part in given.items():
            self._zero.setdefault(key, part.new_zeros(()))
            shape = self._shape.setdefault(key, part.shape)
            if shape != part.shape:
                raise InputError(
                    f"stream_agreement: part {key} is {tuple(part.shape)} in task {task}, "
                    f"{tuple(shape)} before"
                )
        return {key: part.reshape(1, -1) for key, part in given.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The widest of the parts."""
        if not self._zero:
            raise InputError("stream_agreement: every part of every task's gradient is None")
        return reduce(torch.promote_types, (zero.dtype for zero in self._zero.values()))

    def build(self, parts: Parts) -> G:
        """Sums of ``parts`` in the form of a task's gradient; zeros where there is none."""
        whole: dict[object, Tensor | None] = dict.fromkeys(self._keys)
        for key, zero in self._zero.items():
            part, shape = parts.get(key), self._shape[key]
            zeros = zero.expand(shape).clone()
            whole[key] = zeros if part is None else part.to(zero.dtype).view(shape)
        built: Any = whole
        if self._type is Tensor:
            built = whole[0]
        elif self._type in (list, tuple):
            built = self._type(whole.values())
        return built  # type: ignore[no-any-return]

    def weights(self, values: Tensor) -> Tensor:
        """``(T,)`` in the widest dtype of the parts, on the first one's device."""
        return values.to(next(iter(self._zero.values())).device, self.dtype)


def _vectors(parts: Parts, scale: float, factor: float = 1.0) -> dict[object, Vectors]:
    """The parts of factor * g / scale."""
    return {
        key: Vectors(row, scale, row.new_full((1,), factor, dtype=wide_type(row)))
        for key, row in parts.items()
    }


def _length(task: int, parts: Parts) -> tuple[float, float]:
    """The largest absolute entry a, and b such that the gradient's length is a * b."""
    tops = [largest_entries(row) for row in parts.values()]
    for top in tops:
        check_finite(top, "gradient", task)
    scale = max(map(float, tops), default=0.0)
    lengths = (float(v.lengths()) for v in _vectors(parts, scale or 1.0).values())
    return scale, math.hypot(*lengths)


def _projection(parts: Parts, scale: float) -> float:
    """<g / scale, z>, z normal numbers that depend on a part's key and the place in it alone."""
    total = 0.0
    for key, vectors in _vectors(parts, scale or 1.0).items():
        generator = torch.Generator().manual_seed(zlib.crc32(str(key).encode()))
        columns = torch.randn(COLUMNS, generator=generator).to(vectors.factor)
        for part in vectors.slices():
            rows = torch.nn.functional.pad(part[0], (0, -part.shape[1] % COLUMNS)).view(-1, COLUMNS)
            factors = torch.randn(len(rows), generator=generator).to(vectors.factor)
            total += float(factors @ (rows @ columns))
    return total


def _check_repeated(task: int, now: tuple[float, float], before: tuple[float, float]) -> None:
    scale = max(now[0], before[0]) or 1.0
    new, old = (a / scale * b for a, b in (now, before))
    if abs(new - old) > REPEATED * old:
        raise InputError(
            f"stream_agreement: task_gradient({task}) returned a different gradient in the second "
            f"pass (its length differs by {abs(new - old) / max(new, old):.1%}); seed its randomness "
            "by the task"
        )


def _score(vectors: dict[object, Vectors], total: Parts) -> float:
    """<v_i, total>; a part that no task had before is zero, as it was then."""
    return math.fsum(float(v.scores(total[key])[1]) for key, v in vectors.items() if key in total)


def _add(sums: Parts, vectors: dict[object, Vectors], weight: float = 1.0) -> None:
    for key, part in vectors.items():
        term = part.combined(torch.full_like(part.factor, weight))
        sums[key] = sums[key].add_(term) if key in sums else term


def _multiply(sums: Parts, factor: float) -> None:
    for part in sums.values():
        part.mul_(factor)
