"""Vectors in range: lengths, sums and products against float64, in slices, groups and blocks."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gametalearn import InputError
from gametalearn.weighting import vectors as vectors_module
from gametalearn.weighting.vectors import Vectors, slice_width


@given(
    tasks=st.integers(0, 9),
    size=st.integers(0, 50),
    groups=st.integers(1, 3),
    unit=st.booleans(),
    exponent=st.sampled_from([-250, -30, 0, 30, 250]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_equals_plain_tensors(tasks, size, groups, unit, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(tasks, size, generator=generator, dtype=torch.float64)
    weights = torch.randn(groups, tasks, generator=generator, dtype=torch.float64)
    dtype = torch.float64 if abs(exponent) > 30 else torch.float32
    rows = (plain * 10.0**exponent).to(dtype)
    plain = rows.double() / 10.0**exponent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors_module, "SLICE", 16)
        v = Vectors.of(rows, unit=unit)
        scale = 1.0
        if unit:
            plain = plain / plain.norm(dim=1, keepdim=True).clamp(min=1e-300)
        elif plain.numel():
            scale = float(v.restored(torch.ones((), dtype=torch.float64))) / 10.0**exponent
        lengths, total, each = v.lengths(), v.combined(weights), v.combined(weights[0])
        first, s = v.scores(total)
        _, own = v.scores()
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    close(lengths * scale, plain.norm(dim=1))
    close(first, lengths)
    close(total * scale, weights @ plain)
    close(each, total[0])
    close(s * scale**2, plain @ (weights @ plain).T)
    close(own * scale**2, plain @ plain.sum(0))


def test_one_scale_where_others_are_elsewhere():
    rows = torch.tensor([[1e-200, 2e-200]], dtype=torch.float64)
    v = Vectors.of(rows, largest=lambda own: own * 2)
    torch.testing.assert_close(v.lengths(), torch.tensor([5**0.5 / 4], dtype=torch.float64))
    torch.testing.assert_close(v.restored(v.combined(torch.ones(1).double())), rows[0])
    none = Vectors.of(rows[:0], largest=lambda own: own + 1)  # a process without tasks
    assert none.combined(torch.ones(2, 0).double()).tolist() == [[0, 0], [0, 0]]
    assert none.scores(torch.ones(2).double())[1].shape == (0,)


def test_what_is_not_finite_is_named():
    rows = torch.ones(3, 4)
    rows[1, 2] = float("inf")
    for given_rows, unit in ((rows, True), (rows.double(), False), (rows.double(), True)):
        with pytest.raises(InputError, match="gradient of task 1 is not finite"):
            Vectors.of(given_rows, unit=unit)


@pytest.mark.parametrize(("kind", "entries"), [("cpu", 2**18), ("mps", 2**18), ("cuda", 2**24)])
def test_slices_by_device(kind, entries):
    """All that a CPU's cache takes, or enough for a GPU's launches; never less than a column."""
    assert slice_width(kind, 4) == entries // 4
    assert slice_width(kind, 0) == entries
    assert slice_width(kind, 2 * entries) == 1
