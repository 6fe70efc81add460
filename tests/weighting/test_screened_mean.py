"""The screened mean: the split against brute force, and what is left out, and when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gametalearn import InputError, ScreenedMean, TaskGradients, Uniform
from gametalearn.weighting import ShardedGradients
from gametalearn.weighting.screened_mean import FEWEST, RECENT, two_kinds

PARAMETERS = 40
TASKS = 16


def brute(values: Sequence[float]) -> float:
    """The least variance within both parts, over all splits."""
    v = torch.tensor(sorted(values), dtype=torch.float64)
    return min(
        float(v[:k].var(correction=0) * k + v[k:].var(correction=0) * (len(v) - k))
        for k in range(1, len(v))
    )


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30))
def test_no_split_has_less_variance_within_its_parts(values: list[float]) -> None:
    v = torch.tensor(values, dtype=torch.float64)
    threshold, apart, share = two_kinds(v)
    low, high = v[v <= threshold], v[v > threshold]
    assert share == pytest.approx(len(high) / len(v))
    if not len(high):
        assert apart == 0
        assert v.std() < 1e-6
        return
    within = sum(float(p.var(correction=0)) * len(p) for p in (low, high))
    assert within == pytest.approx(brute(values), rel=1e-6, abs=1e-9)
    spread = math.sqrt(sum(float(p.var(correction=0)) for p in (low, high)))
    if spread > 1e-5:
        wanted = math.sqrt(2) * float(high.mean() - low.mean()) / spread
        assert apart == pytest.approx(wanted, rel=1e-3)


def test_two_constants_are_infinitely_far_apart() -> None:
    threshold, apart, share = two_kinds(torch.tensor([1.0, 3.0, 1.0, 1.0]))
    assert 1 < threshold < 3
    assert apart == math.inf
    assert share == 0.25


def test_one_normal_distribution_is_not_two_kinds() -> None:
    generator = torch.Generator().manual_seed(0)
    found = [two_kinds(torch.randn(256, generator=generator))[1] for _ in range(400)]
    assert torch.tensor(found).mean() == pytest.approx(2.7, abs=0.05)
    assert max(found) < 3.5


def test_nor_is_an_exponential_one_but_for_few_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    found = [two_kinds(torch.empty(256).exponential_(generator=generator)) for _ in range(1000)]
    assert sum(apart > 3.5 and share <= 0.5 for _, apart, share in found) < 20


class Stream:
    """Meta-batches of one common direction plus noise, of which a share is corrupted.

    Args:
        share: of corrupted tasks.
        aim: their common direction, as a multiple of the others'.
        loss: how many times theirs the corrupted tasks' loss is.
        group: of all tasks, or of each.
    """

    def __init__(
        self, share: float, aim: float = -1.0, loss: float = 6.0, group: Sequence[int] = ()
    ) -> None:
        self.share, self.aim, self.loss = share, aim, loss
        self.group = torch.tensor(group or [0] * TASKS)
        self.generator = torch.Generator().manual_seed(1)
        self.bad = torch.zeros(TASKS, dtype=torch.bool)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def __call__(self) -> TaskGradients:
        self.bad = torch.rand(TASKS, generator=self.generator) < self.share
        aim = torch.where(self.bad, self.aim, 1.0).double().unsqueeze(1)
        rows = aim + 2 * self.draw(TASKS, PARAMETERS)
        loss = (0.3 * self.draw(TASKS)).exp() * torch.where(self.bad, self.loss, 1.0)
        return TaskGradients(rows, rows, loss, torch.rand(TASKS), self.group)


def left_out(rule: ScreenedMean, stream: Stream, steps: int = 60) -> tuple[float, float]:
    """The share of good and of bad tasks without weight in the last 20 meta-batches."""
    zero: dict[bool, list[Tensor]] = {False: [], True: []}
    for step in range(steps):
        weights = rule(stream()).effective
        assert float(weights.sum()) == pytest.approx(1)
        if step >= steps - 20:
            for kind in zero:
                zero[kind].append(weights[stream.bad == kind] == 0)
    good, bad = (float(torch.cat(zero[b]).double().mean()) for b in (False, True))
    return good, bad


def test_tasks_that_fail_and_oppose_are_left_out() -> None:
    rule = ScreenedMean()
    good, bad = left_out(rule, Stream(0.4))
    assert good < 0.02
    assert bad > 0.98
    assert float(rule.facts["apart"]) > 3.5
    assert float(rule.facts["opposed"]) < -0.3
    weights = rule(stream := Stream(0.4)()).effective
    kept = weights > 0
    wanted = torch.full_like(weights[kept], 1 / int(kept.sum()))  # not rounded to float32
    torch.testing.assert_close(weights[kept], wanted, rtol=1e-15, atol=0)
    assert float(rule.facts["left_out"]) == len(stream) - kept.sum()


def test_nothing_is_left_out_before_there_is_evidence() -> None:
    rule, stream = ScreenedMean(), Stream(0.4)
    for step in range(FEWEST // TASKS + RECENT // 2 - 2):
        assert torch.equal(rule(stream()).effective, torch.full((TASKS,), 1 / TASKS).double()), step
    rule(stream())
    assert (rule(stream()).effective == 0).any()


@pytest.mark.parametrize(
    "stream",
    [
        Stream(0.0),
        Stream(0.4, aim=1.0),  # hard tasks with the same aim
        Stream(0.4, aim=0.0),  # noise that opposes nothing
        Stream(0.4, loss=1.0),  # opposed, but no loss tells which
        Stream(0.7),  # the corrupted ones are the majority
        Stream(1.0),
    ],
)
def test_otherwise_the_weights_are_those_of_the_plain_mean_to_the_bit(stream: Stream) -> None:
    rule, plain = ScreenedMean(), Uniform()
    for _ in range(60):
        gradients = stream()
        assert torch.equal(rule(gradients).effective, plain(gradients).effective)


def test_each_objective_is_screened_by_itself() -> None:
    """A hard objective is no corrupted one, and keeps its share of the update."""
    group = [0] * 10 + [7] * 6
    rule, stream = ScreenedMean([0, 7]), Stream(0.4, group=group)
    hard, wrong = stream.group == 7, 0
    for step in range(80):
        gradients = stream()
        gradients.loss[hard] *= 100
        weights = rule(gradients).effective
        shares = [float(weights[own].sum()) for own in (~hard, hard)]
        assert shares == pytest.approx([10 / 16, 6 / 16])
        if step >= 60:
            wrong += int(((weights == 0) != stream.bad).sum())
    assert wrong < 0.02 * 20 * TASKS
    corrupted = Stream(0.4, group=group)
    rule = ScreenedMean([0, 7])
    for _ in range(80):
        gradients = corrupted()
        gradients.loss[hard] = 1.0
        weights = rule(gradients).effective
        assert (weights[hard] == 1 / TASKS).all()
    assert (weights[~hard][corrupted.bad[~hard]] == 0).all()


def test_eval_screens_with_what_is_known() -> None:
    rule, stream = ScreenedMean(), Stream(0.4)
    left_out(rule, stream)
    rule.eval()
    before = {name: value.clone() for name, value in rule.state_dict().items()}
    good, bad = left_out(rule, stream)
    assert (good < 0.02, bad > 0.98) == (True, True)
    assert all(torch.equal(value, before[name]) for name, value in rule.state_dict().items())


def test_state_moves_to_another_rule() -> None:
    one, two, stream = ScreenedMean(), ScreenedMean(), Stream(0.4)
    left_out(one, stream, steps=25)
    two.load_state_dict(one.state_dict())
    for _ in range(5):
        gradients = stream()
        assert torch.equal(one(gradients).effective, two(gradients).effective)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float16, 1.0), (torch.bfloat16, 1e30), (torch.float32, 1e-30), (torch.float64, 1e300)],
)
def test_the_scale_of_the_rows_does_not_matter(dtype: torch.dtype, scale: float) -> None:
    rule, stream = ScreenedMean(), Stream(0.4)
    for _ in range(40):
        g = stream()
        rows = (g.rows * scale).to(dtype)
        weights = rule(TaskGradients(rows, rows, g.loss, g.score, g.group)).effective
    assert torch.equal(weights == 0, stream.bad)
    assert weights.dtype == dtype


class OneProcess:
    """All rows are here."""

    def total(self, values: Tensor) -> Tensor:
        return values

    def largest(self, values: Tensor) -> Tensor:
        return values

    def assembled(self, own: Tensor, where: slice, count: int) -> Tensor:
        return own


def test_rows_in_several_processes_give_the_same_weights() -> None:
    one, two, stream = ScreenedMean(), ScreenedMean(), Stream(0.4)
    for _ in range(40):
        g = stream()
        weights = one(g).effective
        split = ShardedGradients(
            g.rows, g.updates, g.loss, g.score, g.group, slice(0, TASKS), OneProcess()
        )
        others, update = two.over_processes(split)
        assert torch.equal(others.effective, weights)
        torch.testing.assert_close(update, weights @ g.rows)
    assert (weights == 0).any()


def test_a_meta_batch_of_corrupted_tasks_alone_keeps_its_weights() -> None:
    rule = ScreenedMean()
    left_out(rule, Stream(0.4))
    assert (rule(Stream(1.0)()).effective == 1 / TASKS).all()


def test_losses_of_zero_and_gradients_of_zero() -> None:
    rule, stream = ScreenedMean(), Stream(0.4)
    for _ in range(60):
        g = stream()
        g.loss[~stream.bad] = 0
        g.rows[stream.bad] = 0
        weights = rule(g).effective
        assert (weights == 1 / TASKS).all()  # zero rows oppose nothing


@pytest.mark.parametrize("tasks", [1, 2, 1000])
def test_any_number_of_tasks(tasks: int) -> None:
    rule = ScreenedMean(window=FEWEST)
    for _ in range(20):
        rows = torch.randn(tasks, 5)
        gradients = TaskGradients(
            rows, rows, torch.rand(tasks), torch.rand(tasks), torch.zeros(tasks).long()
        )
        weights = rule(gradients).effective
        assert float(weights.sum()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 63}, "window must be at least 64, got 63"),
        ({"apart": 0.0}, "apart must be positive, got 0.0"),
        ({"sigma": -1.0}, "sigma must be positive, got -1.0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ScreenedMean(**options)


def test_a_negative_loss_is_refused() -> None:
    rows = torch.ones(2, 3)
    loss = torch.tensor([1.0, -0.5])
    with pytest.raises(
        InputError, match=r"loss of task 1 .* is negative .*loss that is at least 0"
    ):
        ScreenedMean()(TaskGradients(rows, rows, loss, loss, torch.zeros(2).long()))
