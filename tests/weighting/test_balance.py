"""Unequal shares that were asked for: rules over objectives start from them and work within them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gametalearn import InputError, TaskGradients, make_rule

RULES = ("gradnorm", "uncertainty", "uncertainty-positive", "dwa", "dtp")
SHARE = (3, 1)
OPTIONS: dict[str, dict[str, Any]] = {"dwa": {"period": 1}}


def batch(seed: int, tasks: tuple[int, ...] = (3, 1)) -> TaskGradients:
    """Objective 1 has ten times the loss and the gradient of objective 0."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.repeat_interleave(torch.arange(len(tasks)), torch.tensor(tasks))
    scale = 10.0**group
    rows = torch.randn(len(group), 6, generator=generator, dtype=torch.float64) * scale[:, None]
    loss = (0.5 + torch.rand(len(group), generator=generator, dtype=torch.float64)) * scale
    score = 0.9 - 0.5 * group + 0.05 * torch.rand(len(group), generator=generator)
    return TaskGradients(rows, rows, loss, score.double(), group)


def made(name: str, **more: Any) -> Any:
    return make_rule(name, objectives=2, **OPTIONS.get(name, {}), **more)


@pytest.mark.parametrize("name", RULES)
def test_effective_weights_are_share_times_weight_and_add_up(name: str) -> None:
    rule, plain = made(name, balance=SHARE), made(name)
    moved = False
    for step in range(8):
        gradients = batch(step)
        found, peer = rule(gradients), plain(gradients)
        # what is learned does not depend on the shares
        torch.testing.assert_close(found.raw, peer.raw, rtol=0, atol=0)
        w = found.raw
        per_objective = torch.stack([found.effective[:3].sum(), found.effective[3]])
        by_hand = torch.tensor(SHARE) / 4 * w
        by_hand = by_hand * w.mean() / by_hand.sum()
        torch.testing.assert_close(per_objective, by_hand)
        torch.testing.assert_close(per_objective.sum(), w.mean())
        torch.testing.assert_close(found.effective[:3], found.effective[:1].expand(3))
        moved |= bool((w[0] - w[1]).abs() > 0.01)
    assert moved


@pytest.mark.parametrize("name", ["gradnorm", "dwa"])
def test_equal_weights_are_the_plain_mean_over_the_tasks(name: str) -> None:
    first = made(name, balance=SHARE)(batch(0)).effective
    torch.testing.assert_close(first, torch.full((4,), 0.25, dtype=torch.float64))
    # without a balance it is the mean over objectives
    assert made(name)(batch(0)).effective.tolist() == pytest.approx([1 / 6] * 3 + [0.5])


def test_those_that_are_present_share_what_there_is() -> None:
    rule = make_rule("dwa", objectives=3, balance=(6, 1, 2))
    assert rule(batch(0, (3, 1))).effective.tolist() == pytest.approx([2 / 7] * 3 + [1 / 7])
    assert rule(batch(0, (4,))).effective.tolist() == pytest.approx([0.25] * 4)


def test_a_balance_that_does_not_fit() -> None:
    for balance in ((1,), (1, 0), (1, float("nan"))):
        with pytest.raises(InputError, match="balance: expected 2 numbers above 0"):
            made("dwa", balance=balance)
