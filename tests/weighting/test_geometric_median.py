"""The geometric median against scipy's minimisation, by hand, and where it is one of the points."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from gametalearn import GeometricMedian, InputError
from gametalearn.weighting import geometric_median_weights
from tests.support.records import record


def effective(rows):
    return GeometricMedian()(record(rows)).effective


def sum_of_distances(point, rows):
    return np.linalg.norm(rows - point, axis=1).sum()


def oracle(rows):
    """The median in the span of the differences, found by scipy from the mean."""

    def value_and_slope(point):
        apart = point - rows
        distance = np.maximum(np.linalg.norm(apart, axis=1, keepdims=True), 1e-300)
        return distance.sum(), (apart / distance).sum(0)

    options = {"gtol": 1e-12, "maxiter": 10_000}
    start = rows.mean(0) + 1e-3 * np.abs(rows).max()
    return minimize(value_and_slope, start, jac=True, method="BFGS", options=options).x


@given(st.integers(1, 12), st.integers(1, 8), st.integers(0, 10**6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_no_point_that_scipy_finds_is_nearer(tasks, size, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tasks, size, generator=generator, dtype=torch.float64)
    if spread:
        rows *= torch.logspace(-2, 2, tasks, dtype=torch.float64).unsqueeze(1)
    weights = effective(rows)
    assert float(weights.min()) >= 0
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    found, scipys = (weights @ rows).numpy(), oracle(rows.numpy())
    least = sum_of_distances(scipys, rows.numpy())
    assert sum_of_distances(found, rows.numpy()) <= least * (1 + 1e-7)
    for k in range(tasks):  # and none of the points themselves is
        assert sum_of_distances(found, rows.numpy()) <= (
            sum_of_distances(rows[k].numpy(), rows.numpy()) * (1 + 1e-9)
        )


def test_many_parameters_and_a_common_direction():
    """As gradients are: the median itself is scipy's, not only its sum of distances."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(16, 300, generator=generator, dtype=torch.float64) + 0.3
    rows[:3] *= 5
    found = (effective(rows) @ rows).numpy()
    np.testing.assert_allclose(found, oracle(rows.numpy()), atol=1e-6)


def test_values_to_check_by_hand():
    # the corners of a square: their middle; of an angle of 120 degrees or more: the corner there
    square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    assert effective(square).tolist() == pytest.approx([0.25] * 4)
    flat = torch.tensor([[0.0, 0.0], [1.0, 0.1], [-1.0, 0.1]], dtype=torch.float64)
    assert effective(flat).tolist() == [1, 0, 0]
    # Fermat's point of an equilateral triangle that was made flatter: 120 degrees to all corners
    tall = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert (effective(tall) @ tall).tolist() == pytest.approx([0, 1 / math.sqrt(3)], abs=1e-9)


@pytest.mark.parametrize(
    ("points", "wanted"),
    [
        ([5.0], [1]),
        ([0.0, 3.0], [1 / 2, 1 / 2]),  # any point between: the mean
        ([0.0, 1.0, 7.0], [0, 1, 0]),
        ([0.0, 1.0, 7.0, 8.0], [0, 1 / 2, 1 / 2, 0]),
        ([2.0, 2.0, 2.0], [1 / 3] * 3),
        ([0.0, 2.0, 2.0, 9.0], [0, 1 / 2, 1 / 2, 0]),
        ([0.0, 0.0, 0.0, 1.0, 2.0], [1 / 3, 1 / 3, 1 / 3, 0, 0]),
    ],
)
def test_points_on_a_line(points, wanted):
    line = torch.tensor(points, dtype=torch.float64)
    for direction in ([1.0, 0.0], [0.6, -0.8], [0.3, 1e3]):
        rows = line.outer(torch.tensor(direction, dtype=torch.float64))
        assert effective(rows).tolist() == pytest.approx(wanted)


def test_fewer_than_half_cannot_carry_it_away():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(9, 20, generator=generator, dtype=torch.float64)
    far = rows.clone()
    far[:4] += 1e6
    median, mean = effective(far) @ far, far.mean(0)
    assert float(median.norm()) < 30
    assert float(mean.norm()) > 1e6


def weiszfeld(rows):
    """The iteration as it is printed, on the gradients themselves, in float64."""
    rows = rows.double().numpy()
    point = np.median(rows, axis=0)
    for _ in range(1000):
        inverse = 1 / np.linalg.norm(rows - point, axis=1)
        point = inverse @ rows / inverse.sum()
    return point


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tasks", [5, 8])
@pytest.mark.parametrize("far", [1e2, 1e8, 1e10, 1e15, 1e20])
def test_one_gradient_of_any_length_cannot_take_it_over(far, tasks, dtype):
    generator = torch.Generator().manual_seed(3)
    rows = (1 + 0.1 * torch.randn(tasks, 10, generator=generator, dtype=torch.float64)).to(dtype)
    rows[2] = -far
    weights = effective(rows)
    found = (weights.double() @ rows.double()).numpy()
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(found, weiszfeld(rows), rtol=100 * eps, atol=0)
    assert found == pytest.approx([1.0] * 10, abs=0.2)


def test_gradients_that_are_far_in_different_measure():
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(9, 6, generator=generator, dtype=torch.float64) + 1
    rows[:4] *= torch.tensor([1e3, 1e7, 1e12, 1e20], dtype=torch.float64).unsqueeze(1)
    found = (effective(rows) @ rows).numpy()
    np.testing.assert_allclose(found, weiszfeld(rows), rtol=1e-9, atol=1e-9)


@given(st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([0.0, 1e-16, 1e-9, 1e-7, 1e-4]))
@settings(max_examples=60, deadline=None)
def test_gradients_that_are_almost_equal(tasks, seed, apart):
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    which = torch.randint(2, (tasks,), generator=generator)
    rows = few[which] + apart * torch.randn(tasks, 5, generator=generator, dtype=torch.float64)
    weights = effective(rows)
    assert float(weights.min()) >= 0
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    found, least = (weights @ rows).numpy(), sum_of_distances(oracle(rows.numpy()), rows.numpy())
    assert sum_of_distances(found, rows.numpy()) <= least + 1e-6


def test_the_weights_come_from_inner_products_alone():
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(7, 40, generator=generator, dtype=torch.float64)
    turned = rows @ torch.linalg.qr(torch.randn(40, 40, generator=generator).double()).Q
    wanted = geometric_median_weights(rows @ rows.T)
    torch.testing.assert_close(geometric_median_weights(turned @ turned.T), wanted)
    torch.testing.assert_close(effective(rows), wanted)


def test_nan_is_named():
    rows = torch.ones(3, 2)
    rows[2, 0] = math.nan
    with pytest.raises(InputError, match="gradient of task 2 is not finite"):
        effective(rows)


def test_what_is_no_gramian_is_refused():
    for shape in ((2, 3), (4,), (0, 0)):
        with pytest.raises(InputError, match=r"gramian: expected a \(T, T\) tensor, got"):
            geometric_median_weights(torch.ones(shape))
    bad = torch.eye(3)
    bad[1, 1] = math.nan
    with pytest.raises(InputError, match="Gramian row of task 1 is not finite"):
        geometric_median_weights(bad)
