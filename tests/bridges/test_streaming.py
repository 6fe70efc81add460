"""Streaming agreement against the in-memory rule, and its memory."""

import gc
import weakref
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gametalearn import InputError, agreement_weights
from gametalearn.bridges import stream_agreement


def in_memory(rows: Tensor, normalize: bool = False) -> tuple[Tensor, Tensor]:
    weights = agreement_weights(rows, normalize=normalize)
    combined = weights.double() @ rows.double()
    return combined.to(rows.dtype), weights


def assert_like_in_memory(rows: Tensor, normalize: bool = False, tolerance: float = 1e-6) -> None:
    combined, weights = stream_agreement(lambda i: rows[i], len(rows), normalize=normalize)
    wanted, wanted_weights = in_memory(rows, normalize)
    assert combined.dtype == weights.dtype == rows.dtype
    torch.testing.assert_close(weights, wanted_weights, rtol=tolerance, atol=tolerance)
    largest = float(rows.abs().max())
    torch.testing.assert_close(combined, wanted, rtol=tolerance, atol=tolerance * largest)


@settings(max_examples=40, deadline=None)
@given(
    tasks=st.integers(1, 9),
    size=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    exponent=st.sampled_from([-30, -10, 0, 10, 30]),
    normalize=st.booleans(),
)
def test_equals_in_memory(tasks, size, seed, exponent, normalize):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tasks, size, generator=generator, dtype=torch.float64)
    assert_like_in_memory((rows * 10.0**exponent).float(), normalize)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("first", [1e-30, 1e30])
def test_scales_far_apart(first, normalize):
    rows = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)) / first
    rows[0] *= first**2 if first < 1 else first
    assert torch.isfinite(rows).all()
    assert_like_in_memory(rows, normalize)


@pytest.mark.parametrize("scale", [1e-300, 1e300, 5e-324])
def test_float64_at_the_ends_of_its_range(scale):
    rows = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]], dtype=torch.float64) * scale
    combined, weights = stream_agreement(lambda i: rows[i], 3)
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.5, -0.25], dtype=torch.float64))
    if scale > 5e-324:
        wanted = torch.tensor([1.0, 0.5], dtype=torch.float64)
        torch.testing.assert_close(combined / scale, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    rows = (torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)
    assert_like_in_memory(rows, tolerance=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([[1.0, 2.0], [-1.0, -2.0]]),
        torch.zeros(3, 4),
        torch.tensor([[3.0, 4.0]]),
        torch.tensor([[2.0, 0.0], [-1.0, 3**0.5], [-1.0, -(3**0.5)]]),
    ],
    ids=["opposing", "zero", "one task", "triangle"],
)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_degenerate_is_the_mean(rows, scale, normalize):
    rows = rows * scale
    combined, weights = stream_agreement(lambda i: rows[i], len(rows), normalize=normalize)
    torch.testing.assert_close(weights, torch.full((len(rows),), 1 / len(rows)))
    torch.testing.assert_close(combined, rows.mean(0), rtol=1e-6, atol=float(1e-6 * scale))
    assert_like_in_memory(rows, normalize)


def test_zero_row_among_others():
    rows = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    for normalize in (False, True):
        assert_like_in_memory(rows, normalize)


def test_keeps_the_structure():
    def task(i: int, form: type) -> Any:
        parts = [torch.full((2, 3), i + 1.0), None, torch.ones(4, dtype=torch.float64), None]
        parts[1] = torch.ones(1) if i == 2 else None
        return dict(zip("wbvu", parts, strict=True)) if form is dict else form(parts)

    for form in (tuple, list, dict):
        combined, weights = stream_agreement(partial(task, form=form), 3)
        assert type(combined) is form
        w, b, v, u = combined.values() if isinstance(combined, dict) else combined
        assert w.shape == (2, 3)
        assert (w.dtype, v.dtype, weights.dtype) == (torch.float32, torch.float64, torch.float64)
        torch.testing.assert_close(b, weights[2:].float())
        assert u is None
        wanted = agreement_weights([task(i, form) for i in range(3)])
        torch.testing.assert_close(weights, wanted, check_dtype=False)
    zero, _ = stream_agreement(lambda i: (torch.zeros(2), torch.ones(1)), 2)
    assert zero[0].tolist() == [0, 0]


def test_on_a_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    params = list(model.parameters())
    x, y = torch.randn(5, 10, 4), torch.randn(5, 10, 1)

    def gradient(i: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(nn.functional.mse_loss(model(x[i]), y[i]), params)

    combined, weights = stream_agreement(gradient, 5)
    tasks = [gradient(i) for i in range(5)]
    torch.testing.assert_close(weights, agreement_weights(tasks), rtol=1e-6, atol=1e-6)
    for k, part in enumerate(combined):
        wanted = sum(w * task[k] for w, task in zip(weights, tasks, strict=True))
        torch.testing.assert_close(part, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_memory_does_not_grow(normalize):
    """At every call no earlier gradient is alive, and few tensors of its size are."""
    size = 1000
    peaks = []
    for tasks in (3, 30):
        alive: list[weakref.ref[Tensor]] = []
        counts: list[int] = []

        def gradient(i: int, tasks=tasks, alive=alive, counts=counts) -> Tensor:
            assert all(ref() is None for ref in alive)
            if i in (0, tasks - 1):  # a look at everything takes its time
                kinds = (t for t in gc.get_objects() if issubclass(type(t), Tensor))
                counts.append(sum(t.numel() >= size for t in kinds))
            row = torch.sin(torch.arange(size) * (i + 1.0))
            alive.append(weakref.ref(row))
            return row

        stream_agreement(gradient, tasks, normalize=normalize)
        assert len(alive) == 2 * tasks
        peaks.append(max(counts) - counts[0])
    assert peaks[0] == peaks[1] == (3 if normalize else 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_names_the_task_that_is_not_finite(bad):
    rows = torch.ones(3, 4)
    rows[1, 2] = bad
    with pytest.raises(InputError, match="task 1 is not finite"):
        stream_agreement(lambda i: (rows[i],), 3)


def test_notices_a_second_pass_that_differs():
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(InputError, match=r"task_gradient\(0\) returned a different gradient"):
        stream_agreement(lambda i: torch.randn(5, generator=generator), 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["drawn anew", "shuffled", "turned", "parts swapped"])
def test_notices_a_second_pass_of_the_same_length(kind, dtype):
    """Dropout in a large model, say, whose gradients are all about as long."""
    generator = torch.Generator().manual_seed(0)
    calls = iter(range(100))

    def gradient(i: int) -> tuple[Tensor, ...]:
        g = torch.ones(20_000) if kind == "drawn anew" else torch.linspace(-1, 2, 20_000) * (i + 1)
        again = next(calls) >= 4
        if kind == "drawn anew":
            g = g * (torch.rand(20_000, generator=generator).argsort() < 10_000)
        elif kind == "shuffled" and again:
            g = g.flip(0)
        elif kind == "turned" and again:
            g = -g
        a, b = g.to(dtype).split(10_000)
        return (b, a) if kind == "parts swapped" and again else (a, b)

    with pytest.raises(InputError, match="different gradient in the second pass, as long as the f"):
        stream_agreement(gradient, 4)


@pytest.mark.parametrize(
    ("dtype", "noise"), [(torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 4e-3)]
)
def test_rounding_may_differ_between_the_passes(dtype, noise):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 30_000, generator=generator) + 0.1

    def gradient(i: int) -> dict[str, Tensor]:
        g = rows[i] * (1 + noise * torch.randn(30_000, generator=generator))
        a, b = g.to(dtype).split([10_000, 20_000])
        return {"a": a, "b": b} if torch.rand((), generator=generator) < 0.5 else {"b": b, "a": a}

    _, weights = stream_agreement(gradient, 4)
    torch.testing.assert_close(weights, agreement_weights(rows).to(dtype), rtol=0.05, atol=0.01)


def test_none_in_one_pass_is_zeros_in_the_other():
    calls = iter(range(100))

    def gradient(i: int) -> tuple[Tensor | None, Tensor]:
        return (None if next(calls) < 3 else torch.zeros(2), torch.ones(5) * (i + 1))

    combined, weights = stream_agreement(gradient, 3)
    assert combined[0] is not None
    torch.testing.assert_close(weights, torch.tensor([1 / 6, 2 / 6, 3 / 6]))


def test_bad_input():
    with pytest.raises(InputError, match="num_tasks must be at least 1, got 0"):
        stream_agreement(lambda i: torch.ones(2), 0)
    with pytest.raises(InputError, match="gradient of task 1 is a tuple"):
        stream_agreement(lambda i: (torch.ones(2),) * (1 + i), 2)
    with pytest.raises(InputError, match="gradient of task 1 is a dict"):
        stream_agreement(lambda i: {"a": torch.ones(2)} if i else [torch.ones(2)], 2)
    with pytest.raises(InputError, match=r"part 0 is \(3,\) in task 1, \(2,\) before"):
        stream_agreement(lambda i: torch.ones(2 + i), 2)
    for bad, message in (
        (None, "gradient of task 0: expected a tensor, got a NoneType"),
        (1.0, "gradient of task 0: expected a tensor, got a float"),
        ([1.0, 2.0], "gradient of task 0, part 0: expected a tensor, got a float"),
        (np.ones(2), r"part 0: expected a tensor, got a float64; .*torch.as_tensor"),
        ({"w": torch.ones(2).long()}, "part w: expected floating-point numbers, got torch.int64"),
    ):
        with pytest.raises(InputError, match=message):
            stream_agreement(lambda i, bad=bad: bad, 2)  # type: ignore[misc]
    with pytest.raises(InputError, match="every part of every task's gradient is None"):
        stream_agreement(lambda i: (None,), 2)
