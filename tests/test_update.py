import pytest
import torch

from gametalearn.update import apply_update, clip, combine, meta_rate, sgd


def test_combine_is_a_weighted_sum_of_rows():
    rows = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    assert combine(rows, torch.tensor([0.5, -0.25])).tolist() == [-0.25, 2.0]


def test_clip_by_value_then_by_norm():
    vector = torch.tensor([30.0, -40.0])
    assert clip(vector, value=10).tolist() == [10.0, -10.0]
    assert clip(vector, norm=5).tolist() == pytest.approx([3.0, -4.0])
    assert clip(vector, norm=100).tolist() == [30.0, -40.0]
    assert clip(torch.zeros(2), norm=1.0).tolist() == [0.0, 0.0]


def test_apply_update_equals_a_hand_written_sgd_step():
    a, b = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.zeros(3))
    apply_update(sgd([("a", a), ("b", b)], 9.0), [a, b], torch.arange(7.0), 0.1)
    assert a.flatten().tolist() == pytest.approx([1.0, 0.9, 0.8, 0.7])
    assert b.tolist() == pytest.approx([-0.4, -0.5, -0.6])


def test_schedules_at_their_start_middle_and_end():
    for schedule, wanted in (("constant", [2, 2, 2]), ("linear", [2, 1, 0.2])):
        assert [meta_rate(2, schedule, i, 10) for i in (0, 5, 9)] == pytest.approx(wanted)
    assert [meta_rate(2, "cosine", i, 10) for i in (0, 5, 10)] == pytest.approx([2, 1, 0])
