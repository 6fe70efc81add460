"""Two constructed pairs of objectives: on each, every rule moves its weights as its paper says.

The first pair differs in the length of its gradients, by 100 times, and in nothing else that a rule may
look at. In the second the difficulty changes midway: what was learned is hard again.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchjd.linalg import QuadprogProjector

from gametalearn import TaskGradients, make_rule
from gametalearn.bridges.torchjd import TorchJDRule

F64 = torch.float64
STEPS = 400

OVER_OBJECTIVES = ("gradnorm", "uncertainty", "uncertainty-positive", "dwa", "dtp")
OVER_TASKS = (
    "uniform", "agreement", "agreement-cosine", "norm-control", "normalized-mean", "torchjd:UPGrad"
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "gradnorm": {"alpha": 0.0},
    "dwa": {"period": 50},
    "uncertainty": {"lr": 0.05},
    "uncertainty-positive": {"lr": 0.05},
}


def record(rows: Tensor, loss: list[float], score: list[float]) -> TaskGradients:
    """Two tasks of each objective."""
    group = torch.tensor([0, 0, 1, 1])
    at = torch.tensor(loss, dtype=F64)[group], torch.tensor(score, dtype=F64)[group]
    return TaskGradients(rows, rows, *at, group)


def unequal(factor: float = 100.0) -> TaskGradients:
    """Equal losses and accuracies; objective 1's gradients are longer, and orthogonal to 0's."""
    short = torch.tensor([[1.0, 0.1, 0, 0], [1.0, -0.1, 0, 0]], dtype=F64)
    long = factor * torch.tensor([[0, 0, 1.0, 0.1], [0, 0, 1.0, -0.1]], dtype=F64)
    return record(torch.cat([short, long]), [1.0, 1.0], [0.5, 0.5])


def shares(effective: Tensor) -> list[float]:
    """What of the weight is each objective's."""
    sums = torch.stack([effective[:2].sum(), effective[2:].sum()])
    found: list[float] = (sums / sums.sum()).tolist()
    return found


def after(name: str, batches: list[TaskGradients]) -> list[Any]:
    rule = make_rule(name, objectives=2, **OPTIONS.get(name, {}))
    return [rule(batch) for batch in batches]


def lengths(weights: Any, batch: TaskGradients) -> list[float]:
    """What each objective adds to the update."""
    parts = weights.effective[:, None] * batch.rows
    return [float(parts[:2].sum(0).norm()), float(parts[2:].sum(0).norm())]


def test_gradnorm_makes_up_for_the_length() -> None:
    """Chen et al. 2018, alpha 0: equal norms of the weighted gradients, w = (200, 2) / 101."""
    batch = unequal()
    rule = make_rule("gradnorm", objectives=2, alpha=0.0, lr=2e-3)
    first = rule(batch)
    assert lengths(first, batch)[1] == pytest.approx(100 * lengths(first, batch)[0])
    for _ in range(700):
        last = rule(batch)
    assert lengths(last, batch)[1] == pytest.approx(lengths(last, batch)[0], rel=0.25)
    assert float(last.raw[0]) == pytest.approx(200 / 101, rel=0.01)


@pytest.mark.parametrize("name", ["uncertainty", "uncertainty-positive", "dwa", "dtp"])
def test_what_goes_by_losses_and_accuracies_does_not_see_the_length(name: str) -> None:
    one, other = (after(name, [unequal(factor)] * STEPS) for factor in (1.0, 100.0))
    assert torch.equal(one[-1].raw, other[-1].raw)
    assert shares(other[-1].effective) == pytest.approx([0.5, 0.5])
    assert lengths(other[-1], unequal())[1] == pytest.approx(100 * lengths(other[-1], unequal())[0])


def test_agreement_gives_the_long_one_nearly_everything() -> None:
    """s_i = <g_i, sum_j g_j> grows with the square of the own length (Eshratifar et al. 2018)."""
    share = shares(after("agreement", [unequal()])[0].effective)
    assert share[1] == pytest.approx(100**2 / (100**2 + 1), rel=1e-6)


@pytest.mark.parametrize("name", ["agreement-cosine", "uniform", "torchjd:UPGrad"])
def test_directions_alone_weigh_both_alike(name: str) -> None:
    assert shares(after(name, [unequal()])[0].effective) == pytest.approx([0.5, 0.5])


def test_normalized_mean_evens_out_what_each_adds() -> None:
    (weights,) = after("normalized-mean", [unequal()])
    one, other = lengths(weights, unequal())
    assert one == pytest.approx(other)
    control, agreement = (after(name, [unequal()])[0] for name in ("norm-control", "agreement"))
    assert shares(control.effective) == pytest.approx([0.5, 0.5])
    update = agreement.effective @ unequal().rows
    assert float((control.effective @ unequal().rows).norm()) == pytest.approx(float(update.norm()))


@pytest.mark.parametrize(("times", "reg_eps"), [(10, 1e-4), (100, 1e-9), (1000, 1e-11)])
def test_upgrad_lets_the_long_one_not_harm_the_short_one(times: float, reg_eps: float) -> None:
    """Quinton and Rey 2024: no update opposes an objective; with the plain mean, the long one wins.

    With TorchJD's own ``reg_eps`` of 1e-4 that holds at 10 times the length: it is added to the Gramian relative
    to its size, and at 100 times outweighs the short gradients (as docs/tutorials/plain-loop.md says).
    """
    turned = torch.tensor([[-0.5, 0.1, 0.9, 0], [-0.5, -0.1, 0.9, 0]], dtype=F64)
    batch = dataclasses.replace(unequal(), rows=torch.cat([unequal().rows[:2], times * turned]))
    mean = after("uniform", [batch])[0].effective @ batch.rows
    short = batch.rows[0]
    assert float(mean @ short) < -0.3 * float(mean.norm() * short.norm())
    projector = QuadprogProjector(reg_eps=reg_eps)
    upgrad = TorchJDRule("UPGrad", projector=projector)(batch).effective @ batch.rows
    for row in batch.rows:
        assert float(upgrad @ row) > -0.02 * float(upgrad.norm() * row.norm())
    plain = after("torchjd:UPGrad", [batch])[0].effective @ batch.rows
    opposes = float(plain @ short) < -0.1 * float(plain.norm() * short.norm())
    assert opposes == (times > 10)


# ---------------------------------------------------------------------------------------------
# the difficulty changes midway


def changing() -> list[TaskGradients]:
    """Both begin at a loss of 1.6 and an accuracy of 0.2; objective 0 learns, 1 hardly does.

    Halfway objective 0 becomes as hard as it was in the beginning and stays so, and 1 is learned.
    Gradients are as long as losses are large, as near a minimum of a quadratic.
    """
    batches = []
    for step in range(2 * STEPS):
        learning = math.exp(-(step % STEPS) / 60)
        low, high = 0.1 + 1.5 * learning, 1.6 - 0.1 * min(1.0, (step % STEPS) / STEPS)
        loss = [low, high] if step < STEPS else [high, low]
        score = [min(0.97, math.exp(-value)) for value in loss]
        rows = torch.tensor([[loss[0], 0.0]] * 2 + [[0.0, loss[1]]] * 2, dtype=F64)
        batches.append(record(rows, loss, score))
    return batches


@pytest.mark.parametrize(
    ("name", "favours_the_hard"),
    [
        # slowly falling losses get more weight: r_i above 1 (Chen et al., alpha > 0)
        ("gradnorm", True),
        # L_i(t-1) / L_i(t-2) is larger where the loss falls slowly (Liu et al. 2019)
        ("dwa", True),
        # -(1 - kappa)^gamma log kappa falls with the accuracy kappa (Guo et al. 2018)
        ("dtp", True),
        # 1 / (2 sigma^2) with sigma^2 going to the loss: the noisy one gets less (Kendall et al. 2018)
        ("uncertainty", False),
        ("uncertainty-positive", False),
    ],
)
def test_weights_follow_the_difficulty_and_turn_with_it(name: str, favours_the_hard: bool) -> None:
    rule = make_rule(
        name,
        objectives=2,
        **{**OPTIONS.get(name, {}), **({"alpha": 1.5} if name == "gradnorm" else {})},
    )
    found = [rule(batch).raw for batch in changing()]
    # of DWA the ratios count, which differ while a loss falls and not where it stands still
    before, then = (
        (found[100], found[STEPS + 100]) if name == "dwa" else (found[STEPS - 1], found[-1])
    )
    hard, easy = (1, 0) if favours_the_hard else (0, 1)
    assert before[hard] > 1.1 * before[easy]
    assert then[easy] > 1.1 * then[hard]


def test_values_that_the_weights_come_to() -> None:
    batches = changing()
    last = batches[STEPS - 1]
    loss, score = last.loss[[0, 2]], last.score[[0, 2]]
    kendall = after("uncertainty", [last] * 500)[-1].raw
    torch.testing.assert_close(kendall, 1 / (2 * loss), rtol=1e-2, atol=0)
    dtp = after("dtp", [last] * 200)[-1].raw
    torch.testing.assert_close(dtp, -(1 - score) * torch.log(score))
    rule = make_rule("dwa", objectives=2, period=10)
    dwa = [rule(batch).raw for batch in (*batches[:10], *batches[100:110], last)][-1]
    means = [
        torch.stack([b.loss[[0, 2]] for b in part]).mean(0)
        for part in (batches[:10], batches[100:110])
    ]
    torch.testing.assert_close(dwa, 2 * torch.softmax(means[1] / means[0] / 2, 0))


@pytest.mark.parametrize("name", OVER_TASKS)
def test_rules_over_tasks_have_no_memory(name: str) -> None:
    """They see the change in the batch in which it happens, and no later one differs from it."""
    batches = changing()
    found = after(name, batches)
    alone = after(name, [batches[STEPS]])[0]
    torch.testing.assert_close(found[STEPS].effective, alone.effective, rtol=0, atol=0)
    before, then = (shares(found[i].effective)[1] for i in (STEPS - 1, -1))
    if name == "agreement":  # the long gradient, that of the harder objective
        assert before > 0.95
        assert then < 0.05
    elif name == "normalized-mean":  # the other way round: equal parts of the update
        assert before < 0.2
        assert then > 0.8
    else:
        assert before == pytest.approx(0.5)
        assert then == pytest.approx(0.5)
