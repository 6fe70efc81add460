"""Unit-length gradients, averaged: by hand, against a loop, and at lengths far apart."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gametalearn import InputError, NormalizedMean
from tests.support.records import record


def effective(rows):
    return NormalizedMean()(record(rows)).effective


def test_values_to_check_by_hand():
    # lengths 5, 1 and 3, their mean 3: each gradient counts as if it were 3 long
    rows = torch.tensor([[3.0, 4.0], [0.0, -1.0], [3.0, 0.0]])
    assert effective(rows).tolist() == pytest.approx([3 / 5 / 3, 1.0, 1 / 3])


@given(st.integers(1, 20), st.integers(1, 40), st.integers(0, 10**6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_update_is_the_mean_of_unit_vectors_times_the_mean_length(tasks, size, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tasks, size, generator=generator, dtype=torch.float64)
    if spread:
        rows *= torch.logspace(-6, 6, tasks, dtype=torch.float64).unsqueeze(1)
    lengths = [math.sqrt(math.fsum(x * x for x in row)) for row in rows.tolist()]
    scale = math.fsum(lengths) / tasks**2
    wanted = sum(scale * row / length for row, length in zip(rows, lengths, strict=True))
    torch.testing.assert_close(effective(rows) @ rows, wanted, rtol=1e-10, atol=1e-10 * scale)


def test_a_task_s_length_does_not_turn_the_update():
    rows = torch.randn(6, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    longer = rows * torch.tensor([1, 1, 1, 1, 1, 1e4], dtype=torch.float64).unsqueeze(1)
    one, other = effective(rows) @ rows, effective(longer) @ longer
    cosine = torch.nn.functional.cosine_similarity(one, other, dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_gradient_without_a_direction_keeps_its_weight(dtype):
    """Of 4 tasks, two of length zero: the two others have l = 3."""
    rows = torch.tensor([[2.0, 0.0], [0.0, 4.0], [0.0, 0.0], [0.0, 0.0]], dtype=dtype)
    wanted = [3 / 2 / 4, 3 / 4 / 4, 1 / 4, 1 / 4]
    assert effective(rows).tolist() == pytest.approx(wanted, rel=0.01)
    assert effective(rows[2:3] * 0).tolist() == [1.0]


@pytest.mark.parametrize(
    ("dtype", "ratio"),
    [
        (torch.float64, 1e100),
        (torch.float64, 1e17),
        (torch.float32, 1e30),
        (torch.float32, 1e8),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 200.0),
        (torch.float16, 6e4),
        (torch.float16, 2e3),
    ],
)
def test_a_far_longer_one_takes_no_direction_from_the_others(dtype, ratio):
    """The formula in Python's floats; a task that is 1 / eps times as long is a task as any other."""
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = rows / rows.norm(dim=1, keepdim=True)
    rows[3] *= ratio
    rows = (rows / 2).to(dtype)
    lengths = [math.hypot(*row) for row in rows.tolist()]
    mean = math.fsum(lengths) / 5
    wanted = [mean / (5 * length) for length in lengths]
    assert effective(rows).tolist() == pytest.approx(wanted, rel=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("dtype", "far"), [(torch.float32, 1e30), (torch.float64, 1e300)])
def test_lengths_beyond_squares_stay_in_range(dtype, far):
    rows = torch.eye(3, dtype=dtype) * torch.tensor([far, far / 2, 1 / far], dtype=dtype)
    found = effective(rows)
    assert found.tolist() == pytest.approx([0.25, 0.5, 1 / 3])
    assert torch.isfinite(found @ rows).all()


def test_nan_is_named():
    rows = torch.ones(3, 2)
    rows[1, 0] = math.nan
    with pytest.raises(InputError, match="gradient of task 1 is not finite"):
        effective(rows)
