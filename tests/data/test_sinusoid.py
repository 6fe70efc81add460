import math

import pytest
import torch

from gametalearn.data import Sinusoid
from gametalearn.errors import InputError


def test_targets_are_one_sine_a_task_over_support_and_query() -> None:
    batch = Sinusoid(shots=10, queries=90, seed=3).sample(50)
    x, y = (
        torch.cat([getattr(batch, f"support_{v}"), getattr(batch, f"query_{v}")], 1) for v in "xy"
    )
    # y = a sin x + b cos x: fitted by least squares, independently of the code under test
    basis = torch.cat([x.sin(), x.cos()], dim=2).double()
    fit = torch.linalg.lstsq(basis, y.double()).solution
    torch.testing.assert_close(basis @ fit, y.double(), atol=1e-5, rtol=1e-5)
    amplitude = fit.norm(dim=1)
    phase = torch.atan2(-fit[:, 1], fit[:, 0])
    assert amplitude.min() >= 0.1
    assert amplitude.max() <= 5
    assert phase.min() >= 0
    assert phase.max() <= math.pi
    assert x.abs().max() <= 5


def test_the_ranges_are_covered_uniformly() -> None:
    batch = Sinusoid(shots=1, queries=1, seed=0).sample(20000)
    counts = torch.histc(batch.support_x, bins=10, min=-5, max=5)
    assert (counts - 2000).abs().max() < 5 * math.sqrt(2000)
    # E y^2 over the phase is A^2 / 2, and E A^2 = (5^3 - 0.1^3) / (3 * 4.9)
    assert batch.support_y.square().mean() == pytest.approx((5**3 - 0.1**3) / (6 * 4.9), rel=0.05)


def test_shapes_and_group() -> None:
    batch = Sinusoid(shots=3, queries=7, group=2).sample(4)
    assert batch.support_x.shape == batch.support_y.shape == (4, 3, 1)
    assert batch.query_x.shape == batch.query_y.shape == (4, 7, 1)
    assert batch.support_y.dtype == torch.float32
    assert batch.group.tolist() == [2] * 4
    assert batch.classes is None


def test_a_part_is_a_share_of_the_same_batch() -> None:
    whole, part = Sinusoid(seed=5), Sinusoid(seed=5)
    for _ in range(2):
        expected = whole.sample(6)[2:4]
        assert torch.equal(part.sample(6, part=slice(2, 4)).query_y, expected.query_y)


def test_seed_and_state() -> None:
    source = Sinusoid(seed=1)
    source.sample(3)
    state = source.state_dict()
    after = source.sample(2).query_y
    other = Sinusoid(seed=9)
    other.load_state_dict(state)
    assert torch.equal(other.sample(2).query_y, after)
    fresh = source.with_seed(1)
    assert torch.equal(fresh.sample(3).query_y, Sinusoid(seed=1).sample(3).query_y)
    assert not torch.equal(Sinusoid(seed=1).sample(1).query_y, Sinusoid(seed=2).sample(1).query_y)


@pytest.mark.parametrize("wrong", [{"shots": 0}, {"queries": -1}])
def test_bad_sizes_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sinusoid(**wrong)
    with pytest.raises(InputError, match="num_tasks"):
        Sinusoid().sample(0)
