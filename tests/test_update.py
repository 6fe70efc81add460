from typing import Any

import pytest
import torch

from gametalearn import InputError, TrainConfig
from gametalearn.build import build_optimizer
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


@pytest.mark.parametrize("kind", ["model", "meta", "tensors"])
def test_a_meta_step_is_the_optimisers_own(kind: str) -> None:
    """AdamW with groups and a scheduler, beside the same with gradients by `backward`."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Linear(3, 2).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())

    def optimizer(model: torch.nn.Linear) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [
            {"params": [model.weight], "lr": 0.1},
            {"params": [model.bias]},
        ]
        return torch.optim.AdamW(groups)

    mine, other, x = optimizer(ours), optimizer(theirs), torch.randn(5, 3, dtype=torch.float64)
    for _ in range(3):
        other.zero_grad()
        theirs(x).square().mean().backward()
        vector = torch.cat([g.flatten() for g in torch.autograd.grad(ours(x).square().mean(),
                                                                     list(ours.parameters()))])  # fmt: skip
        given = {"model": ours, "meta": dict(ours.named_parameters()), "tensors": ours.parameters()}
        apply_update(mine, given[kind], vector)  # type: ignore[arg-type]
        other.step()
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)
    with pytest.raises(InputError, match=r"8 numbers .* shape \(7,\)"):
        apply_update(mine, ours, torch.ones(7))


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_weight_decay_is_torchs(name: str) -> None:
    config = TrainConfig.of("glyphs", meta_optimizer=name, weight_decay=0.3, meta_lr=0.1)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    ours, theirs = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    mine = build_optimizer(config, [("a", ours)])
    other = kinds[name]([theirs], lr=0.1, weight_decay=0.3)
    for step in range(2):
        apply_update(mine, [ours], torch.tensor([0.5, 1.0 + step]))
        theirs.grad = torch.tensor([0.5, 1.0 + step])
        other.step()
    assert torch.equal(ours, theirs)
