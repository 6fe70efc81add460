"""Agreement weights against a double loop, at the edges that the docstrings name, and the control."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gametalearn import (
    GradientAgreement,
    InputError,
    NormControl,
    agreement_weights,
    agreement_weights_from_gramian,
)
from gametalearn.bridges import stream_agreement
from gametalearn.weighting import agreement as agreement_module
from gametalearn.weighting import vectors as vectors_module
from gametalearn.weighting.vectors import gramian, update_length
from tests.support.records import record

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALF)


def rows(tasks: int, parameters: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tasks, parameters, generator=generator, dtype=torch.float64).to(dtype)


def double_loop(gradients: Tensor, normalize: bool = False) -> list[float]:
    """The formula as it is printed, one inner product at a time, in Python's floats."""
    vectors = [[float(x) for x in g] for g in gradients]
    if normalize:
        lengths = [math.sqrt(math.fsum(x * x for x in g)) or 1.0 for g in vectors]
        vectors = [[x / length for x in g] for g, length in zip(vectors, lengths, strict=True)]
    s = []
    for g in vectors:
        s.append(0.0)
        for h in vectors:
            s[-1] += math.fsum(x * y for x, y in zip(g, h, strict=True))
    total = math.fsum(map(abs, s))
    return [x / total for x in s]


@pytest.mark.parametrize("normalize", [False, True])
@given(st.integers(2, 9), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_equals_a_double_loop(normalize: bool, tasks: int, parameters: int, seed: int) -> None:
    g = rows(tasks, parameters, seed, torch.float64)
    assume(parameters > 1 or not normalize)  # signs alone may cancel exactly
    expected = torch.tensor(double_loop(g, normalize), dtype=torch.float64)
    weights = agreement_weights(g, normalize=normalize)
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-9)
    products = agreement_weights_from_gramian(g @ g.T, normalize=normalize)
    torch.testing.assert_close(products, expected, rtol=1e-9, atol=1e-9)


def test_values_to_check_by_hand() -> None:
    # s = (1*1 + 1*1 - 1*1, 1 + 2 - 1, -1 - 1 + 1) = (1, 2, -1)
    g = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    assert agreement_weights(g).tolist() == [0.25, 0.5, -0.25]
    assert agreement_weights_from_gramian(g @ g.T).tolist() == [0.25, 0.5, -0.25]


@given(st.integers(1, 64), st.integers(1, 300), st.integers(0, 10**6), st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_absolute_weights_sum_to_one(
    tasks: int, parameters: int, seed: int, dtype: torch.dtype
) -> None:
    for normalize in (False, True):
        weights = agreement_weights(rows(tasks, parameters, seed, dtype), normalize=normalize)
        assert weights.dtype == dtype
        assert weights.shape == (tasks,)
        tolerance = 1e-6 + tasks * torch.finfo(dtype).eps
        assert float(weights.double().abs().sum()) == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("exponent", range(-30, 31, 5))
@pytest.mark.parametrize("normalize", [False, True])
def test_invariant_to_a_common_scale_in_float32(exponent: int, normalize: bool) -> None:
    g = rows(7, 50)
    expected = agreement_weights(g, normalize=normalize)
    scaled = agreement_weights(g * 10.0**exponent, normalize=normalize)
    torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_invariant_to_a_common_scale_in_float64(scale: float) -> None:
    g = rows(5, 30, dtype=torch.float64)
    for normalize in (False, True):
        expected = agreement_weights(g, normalize=normalize)
        scaled = agreement_weights(g * scale, normalize=normalize)
        torch.testing.assert_close(scaled, expected, rtol=1e-9, atol=1e-12)


def test_cosine_is_invariant_to_each_length() -> None:
    g = rows(6, 40, dtype=torch.float64)
    lengths = torch.logspace(-200, 200, 6, dtype=torch.float64).unsqueeze(1)
    expected = agreement_weights(g, normalize=True)
    stretched = agreement_weights(g * lengths, normalize=True)
    torch.testing.assert_close(stretched, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(agreement_weights(g), agreement_weights(g * lengths))


@given(st.permutations(range(8)), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_equivariant_to_permutation(order: list[int], seed: int) -> None:
    g = rows(8, 60, seed)
    expected = agreement_weights(g)[order]
    torch.testing.assert_close(agreement_weights(g[order]), expected, rtol=1e-5, atol=1e-6)


@given(st.integers(4, 40), st.integers(2, 50), st.integers(0, 10**6), st.sampled_from(DTYPES))
@settings(max_examples=40, deadline=None)
def test_an_opposing_row_of_equal_length_gets_a_negative_weight(
    tasks: int, parameters: int, seed: int, dtype: torch.dtype
) -> None:
    one = rows(1, parameters, seed, dtype)
    g = one.repeat(tasks, 1)
    odd = seed % tasks
    g[odd] = -one[0]
    for normalize in (False, True):
        weights = agreement_weights(g, normalize=normalize)
        assert weights[odd] < 0
        assert (weights[torch.arange(tasks) != odd] > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
def test_zero_gradients_and_one_task_give_uniform(dtype: torch.dtype, normalize: bool) -> None:
    for tasks in (1, 2, 5):
        weights = agreement_weights(torch.zeros(tasks, 7, dtype=dtype), normalize=normalize)
        assert weights.dtype == dtype
        assert torch.equal(weights, torch.full((tasks,), 1 / tasks, dtype=dtype))
    for single in (rows(1, 9, dtype=dtype), -rows(1, 9, dtype=dtype)):
        assert agreement_weights(single, normalize=normalize).tolist() == [1.0]
    assert agreement_weights(torch.zeros(3, 0, dtype=dtype)).tolist() == pytest.approx(
        [1 / 3] * 3, rel=1e-2
    )
    assert torch.equal(agreement_weights_from_gramian(torch.zeros(4, 4)), torch.full((4,), 0.25))


def test_a_zero_row_among_others_has_no_weight() -> None:
    g = rows(4, 20)
    g[2] = 0
    for normalize in (False, True):
        assert agreement_weights(g, normalize=normalize)[2] == 0


def cancelling(kind: str, g: Tensor) -> Tensor:
    """Rows that sum to zero up to the rounding of their entries."""
    if kind == "last":
        return torch.cat([g[:-1], -g[:-1].sum(0, keepdim=True)])
    if kind == "centred":
        return g - g.mean(0)
    if kind == "same sign":
        return torch.cat([g[:-1].abs(), -g[:-1].abs().sum(0, keepdim=True)])
    if kind == "lengths":
        return cancelling(
            "last", g * torch.logspace(-2, 2, len(g), dtype=g.dtype, device=g.device).unsqueeze(1)
        )
    return torch.cat([g, -g])


@pytest.mark.parametrize("kind", ["last", "centred", "same sign", "lengths", "pairs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("tasks", "parameters"),
    [
        (2, 5),
        (3, 1),
        (4, 10_000),
        (5, 3),
        (8, 100_003),
        (16, 2_000),
        (64, 1),
        (300, 17),
        (700, 100),
    ],
)
def test_rows_that_sum_to_zero_give_uniform(
    kind: str, dtype: torch.dtype, tasks: int, parameters: int
) -> None:
    for seed in range(3):
        g = cancelling(kind, rows(tasks, parameters, seed, dtype))
        uniform = torch.full((len(g),), 1 / len(g), dtype=dtype)
        assert torch.equal(agreement_weights(g), uniform)
        assert torch.equal(agreement_weights_from_gramian(g @ g.T), uniform)


@given(st.integers(2, 300), st.integers(1, 200), st.integers(0, 10**6), st.floats(-30, 30))
@settings(max_examples=60, deadline=None)
def test_rows_that_sum_to_zero_of_any_shape_and_scale(
    tasks: int, parameters: int, seed: int, exponent: float
) -> None:
    g = cancelling("last", rows(tasks, parameters, seed) * 10.0**exponent)
    assert torch.equal(agreement_weights(g), torch.full((tasks,), 1 / tasks))


@pytest.mark.parametrize("dtype", HALF)
def test_rows_that_sum_to_zero_in_half_precision(dtype: torch.dtype) -> None:
    for tasks, parameters in ((2, 50), (16, 200), (100, 30)):
        g = cancelling("pairs", rows(tasks, parameters, dtype=dtype))
        assert torch.equal(agreement_weights(g), torch.full((len(g),), 1 / len(g), dtype=dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_rows_in_half_precision_are_taken_for_what_they_are(dtype: torch.dtype) -> None:
    """The formula on the same numbers: sums that are small, and determined all the same."""
    opposed = torch.tensor([[1.0, 0.0], [-0.95, 0.0]], dtype=dtype)
    small = cancelling("last", rows(16, 200, dtype=torch.float64)).to(dtype)
    for g in (opposed, small):
        wanted = torch.tensor(double_loop(g), dtype=torch.float64)
        torch.testing.assert_close(
            agreement_weights(g).double(), wanted, rtol=torch.finfo(dtype).eps, atol=0
        )
        _, streamed = stream_agreement(lambda i, g=g: g[i], len(g))  # type: ignore[misc]
        torch.testing.assert_close(streamed, agreement_weights(g), rtol=0, atol=0)
    assert agreement_weights(opposed).tolist() == pytest.approx([0.513, -0.487], abs=3e-3)


def test_a_small_but_real_sum_is_no_zero() -> None:
    """One part in ten thousand is far above float32's rounding."""
    g = cancelling("last", rows(16, 1000, dtype=torch.float64))
    g[0] *= 1 + 1e-4
    weights = agreement_weights(g.float())
    assert not torch.allclose(weights, torch.full((16,), 1 / 16), atol=1e-3)
    torch.testing.assert_close(weights, agreement_weights(g).float(), rtol=0, atol=5e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_is_an_error_that_names_the_task(
    bad: float, dtype: torch.dtype
) -> None:
    g = rows(5, 30, dtype=dtype)
    g[3, 17] = bad
    for normalize in (False, True):
        with pytest.raises(InputError, match="gradient of task 3 is not finite"):
            agreement_weights(g, normalize=normalize)
    g[4, 0] = bad
    with pytest.raises(InputError, match=r"task 3 \(and of 1 more\)"):
        agreement_weights(g)
    with pytest.raises(InputError, match="Gramian row of task 3 is not finite"):
        agreement_weights_from_gramian(torch.eye(5).index_fill(0, torch.tensor([3]), bad))


def test_a_row_that_is_not_finite_among_very_many_tasks() -> None:
    g = rows(1500, 3)
    g[1200, 1] = math.nan
    with pytest.raises(InputError, match="gradient of task 1200 is not finite"):
        agreement_weights(g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", ["random", "last", "centred", "pairs", "zero", "cancel a little"])
def test_blocks_for_very_many_tasks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, normalize: bool
) -> None:
    g = rows(150, 40, dtype=torch.float64)
    if kind == "zero":
        g = torch.zeros_like(g)
    elif kind == "cancel a little":
        g = cancelling("last", g)
        g[0] *= 1.01
    elif kind != "random":
        g = cancelling(kind, g)
    g = g.to(dtype)
    expected = agreement_weights(g, normalize=normalize)
    monkeypatch.setattr(agreement_module, "BLOCK", 64)
    weights = agreement_weights(g, normalize=normalize)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(weights, expected, rtol=4 * eps, atol=eps)


def test_columns_are_taken_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    g = rows(5, 1003)
    whole = agreement_weights(g)
    monkeypatch.setattr(vectors_module, "SLICE", 64)
    torch.testing.assert_close(agreement_weights(g), whole)
    assert float(update_length(g, whole)) == pytest.approx(float((whole @ g).norm()), rel=1e-5)


def test_forms_of_gradients_give_the_same_weights() -> None:
    g = rows(4, 10)
    expected = agreement_weights(g)
    parts = [{"b": t[4:].view(2, 3), "a": t[:4]} for t in g]
    assert torch.equal(agreement_weights(parts), expected)
    reordered = [dict(reversed(list(p.items()))) if i % 2 else p for i, p in enumerate(parts)]
    assert torch.equal(agreement_weights(reordered), expected)
    assert torch.equal(agreement_weights([list(p.values()) for p in parts]), expected)
    assert torch.equal(agreement_weights(tuple(g)), expected)
    assert torch.equal(agreement_weights([t.view(2, 5) for t in g]), expected)
    # What autograd returns for a parameter that a task does not use is a zero gradient.
    g[1, 4:] = 0
    unused: list[dict[str, Tensor | None]] = [dict(p) for p in parts]
    unused[1]["b"] = None
    for task in unused:
        task["no task uses it"] = None
    assert torch.equal(agreement_weights(unused), agreement_weights(g))


def test_stacked_gradients_become_rows_as_the_message_says() -> None:
    model, x, y = torch.nn.Linear(3, 2), rows(4 * 5, 3).view(4, 5, 3), rows(4 * 5, 2).view(4, 5, 2)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        prediction: Tensor = torch.func.functional_call(model, given, x)
        return (prediction - y).square().mean()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    with pytest.raises(InputError) as error:
        agreement_weights(gradients)
    (remedy,) = re.findall(r"torch\.cat\(.*\)", str(error.value))
    wanted = agreement_weights([torch.func.grad(loss)(parameters, x[i], y[i]) for i in range(4)])
    torch.testing.assert_close(agreement_weights(eval(remedy)), wanted)


def test_weights_carry_no_graph_and_leave_gradients_alone() -> None:
    g = rows(4, 10).requires_grad_()
    before = g.detach().clone()
    assert not agreement_weights(g).requires_grad
    assert torch.equal(g, before)


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        (torch.ones(3), r"expected a \(T, P\) tensor with T >= 1, got \(3,\)"),
        (torch.ones(0, 3), r"got \(0, 3\)"),
        (torch.ones(2, 3, dtype=torch.int64), "floating-point"),
        ([], "at least one task"),
        ([[None], [None]], "None"),
        ([torch.ones(2), torch.ones(3)], r"\(3,\) in task 1"),
        ([{"a": torch.ones(2)}, {"b": torch.ones(2)}], "tasks 0 and 1 differ in their parts: a, b"),
        (None, "T per-task gradients of tensors; got a NoneType"),
        (1.0, "got a float"),
        ("rows", "got a str"),
        (
            {"a": torch.ones(2)},
            r"got a dict; .* torch.cat\(\[g.flatten\(1\) for g in gradients.val",
        ),
        (np.ones((2, 3)), r"task 0, part 0: expected a tensor, got a float64; .*torch.as_tensor"),
        ([np.ones(3)], r"task 0, part 0: expected a tensor, got a float64; .*torch.as_tensor"),
        ([torch.ones(3), None], "task 1: expected a tensor, got a NoneType"),
        ([1.0, 2.0], "task 0: expected a tensor, got a float; numbers and arrays become tensors"),
        ([[1.0, 2.0], [3.0, 4.0]], "task 0, part 0: expected a tensor, got a float"),
        (
            [{"w": torch.ones(2)}, {"w": [1.0, 2.0]}],
            "task 1, part w: expected a tensor, got a list",
        ),
        ([torch.ones(3), torch.ones(3).long()], "task 1: expected floating-point numbers, got"),
        (torch.eye(3).to_sparse(), "a dense tensor, got torch.sparse_coo"),
    ],
)
def test_malformed_gradients(gradients: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        agreement_weights(gradients)


@pytest.mark.parametrize(
    ("gramian", "message"),
    [
        (torch.ones(2, 3), r"\(T, T\) tensor, got \(2, 3\)"),
        (torch.ones(0, 0), r"got \(0, 0\)"),
        (torch.ones(2, 2, dtype=torch.int32), "floating-point"),
        (None, "expected a tensor, got a NoneType"),
        ([[1.0, 0.0], [0.0, 1.0]], "expected a tensor, got a list; .*torch.as_tensor"),
        (np.eye(2), "expected a tensor, got a ndarray"),
        (torch.eye(2).to_sparse(), "dense"),
    ],
)
def test_malformed_gramians(gramian: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        agreement_weights_from_gramian(gramian)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gramian_that_is_not_finite_names_the_task_whose_gradient_is_not(bad: float) -> None:
    """Its products with all others are not finite either."""
    g = rows(4, 10)
    g[2, 5] = bad
    with pytest.raises(InputError, match=r"Gramian row of task 2 is not finite"):
        agreement_weights_from_gramian(g @ g.T)
    overflown = torch.eye(3).index_put((torch.tensor([1]), torch.tensor([2])), torch.tensor(bad))
    with pytest.raises(InputError, match=r"Gramian row of task 1 is not finite"):
        agreement_weights_from_gramian(overflown)


@pytest.mark.parametrize(
    ("gramian", "message"),
    [
        ([[1.0, 0.0], [0.0, -1.0]], r"G\[1, 1\] .* \(a squared length is not negative\)"),
        ([[-1.0]], r"G\[0, 0\]"),
        ([[1.0, 0.5], [0.2, 1.0]], r"G\[0, 1\] .* tasks 0 and 1 \(G_ij = G_ji\); pass G = g @ g.T"),
        ([[1.0, 0.0, 0.0], [0.0, 1.0, -2.0], [0.0, -2.0, 1.0]], r"G\[1, 2\] .*sqrt\(G_ii G_jj\)"),
        ([[0.0, 1.0], [1.0, 0.0]], r"G\[0, 1\]"),
        ([[1.0, 1.01], [1.01, 1.0]], r"G\[0, 1\]"),
    ],
)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_no_gramian_is_refused(
    gramian: list[list[float]], message: str, scale: float, dtype: torch.dtype
) -> None:
    with pytest.raises(InputError, match=message):
        agreement_weights_from_gramian(torch.tensor(gramian, dtype=dtype) * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
def test_rounding_is_no_reason_to_refuse_a_gramian(dtype: torch.dtype, normalize: bool) -> None:
    """Parallel, opposing and zero rows of lengths far apart, their products summed in ``dtype``."""
    generator = torch.Generator().manual_seed(0)
    for size in (1, 30, 3000):
        lengths = torch.tensor([1.0, 30.0, 0.01, 1.0, 0.0, 1.0])
        g = torch.randn(1, size, generator=generator).expand(6, -1) * lengths.unsqueeze(1)
        g[3] = torch.randn(size, generator=generator)
        g[5] *= -1
        g = (g / size**0.5).to(dtype)
        products = torch.zeros(6, 6, dtype=dtype)
        for part in torch.split(g, 100, dim=1):
            products += part @ part.T
        products[0, 1] *= 1 + 4 * torch.finfo(dtype).eps
        products[4, 4] = -torch.finfo(dtype).eps
        weights = agreement_weights_from_gramian(products, normalize=normalize)
        assert torch.isfinite(weights).all()
        if dtype == torch.float32:  # nor is it where the dtype promises more
            agreement_weights_from_gramian(products.double(), normalize=normalize)


def test_gramian_is_relative_to_the_longest_gradient() -> None:
    g = rows(5, 30)
    wide = g.double() @ g.double().T
    for scale in (1e-30, 1.0, 1e30):
        torch.testing.assert_close(
            gramian(g * scale), wide / wide.diagonal().max(), rtol=1e-5, atol=1e-7
        )
    assert gramian(g.double() * 1e250).diagonal().max() == 1
    assert not gramian(torch.zeros(3, 4)).any()


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1.0, 1e30, 1e200])
def test_update_length(scale: float) -> None:
    g, w = rows(4, 25, dtype=torch.float64), torch.tensor([0.5, -0.25, 0.125, 0.0])
    assert float(update_length(g * scale, w)) / scale == pytest.approx(
        float((w.double() @ g).norm())
    )


# The rules.


def test_rule_weighs_rows_or_updates() -> None:
    gradients, updates = rows(5, 20), rows(5, 20, seed=1)
    both = record(gradients, updates=updates)
    weights = GradientAgreement()(both)
    assert torch.equal(weights.effective, agreement_weights(gradients))
    assert torch.equal(weights.raw, weights.effective)
    weights = GradientAgreement(signal="update")(both)
    assert torch.equal(weights.effective, agreement_weights(updates))
    weights = GradientAgreement(normalize=True)(both)
    assert torch.equal(weights.effective, agreement_weights(gradients, normalize=True))
    with pytest.raises(InputError, match="signal must be 'meta_gradient' or 'update', got 'row'"):
        GradientAgreement(signal="row")  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
def test_control_has_the_means_direction_and_agreements_length(seed: int) -> None:
    g = rows(6, 300, seed, torch.float64)
    control = NormControl()(record(g)).effective @ g
    agreement = agreement_weights(g) @ g
    mean = g.mean(0)
    assert float(control.norm()) == pytest.approx(float(agreement.norm()), rel=1e-12)
    torch.testing.assert_close(control / control.norm(), mean / mean.norm(), rtol=0, atol=1e-12)


def test_control_equals_uniform_where_agreement_does() -> None:
    for g in (cancelling("last", rows(7, 100)), torch.zeros(7, 3), rows(1, 5)):
        weights = NormControl()(record(g)).effective
        torch.testing.assert_close(weights, torch.full((len(g),), 1 / len(g)))
