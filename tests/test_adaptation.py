"""Every learner against a float64 loop written by hand, closed relations, and learn2learn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gametalearn import ANIL, MAML, InputError, MetaSGD, Reptile, TaskBatch, TrainConfig
from gametalearn.adaptation import LSLR, Learner, model_parameters
from gametalearn.gradients import TaskGradients, adapt_and_score, meta_gradients
from gametalearn.run import Parts
from gametalearn.run import start as started
from gametalearn.training import train


class Net(nn.Module):
    """tanh(x A' + a) B' + b, smooth, with a head that ANIL finds."""

    def __init__(self, inputs: int, ways: int, hidden: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(inputs, hidden), nn.Linear(hidden, ways)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(self.body(x)))
        return output


def by_hand(theta: Sequence[Tensor], x: Tensor) -> Tensor:
    """`Net` of its four parameters."""
    return torch.tanh(x @ theta[0].T + theta[1]) @ theta[2].T + theta[3]


Step = Callable[[int, list[Tensor], tuple[Tensor, ...], list[Tensor]], list[Tensor]]
"""The next parameters from the step's number, the parameters, gradients and learned rates."""

Task = tuple[Tensor, Tensor, Tensor, Tensor]


def loop_by_hand(
    leaves: list[Tensor],
    task: Task,
    steps: int,
    step: Step,
    *,
    first_order: bool = False,
    weights: tuple[float, ...] = (),
    mini_batch: Callable[[int], list[int]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One task's row, update and query loss; the first four ``leaves`` are the model's."""
    support_x, support_y, query_x, query_y = task
    phi, total, loss = leaves[:4], torch.zeros((), dtype=torch.float64), torch.zeros(())
    for j in range(steps):
        chosen = list(range(len(support_y))) if mini_batch is None else mini_batch(j)
        support_loss = F.cross_entropy(by_hand(phi, support_x[chosen]), support_y[chosen])
        grads = torch.autograd.grad(support_loss, phi, create_graph=True)
        if first_order:
            grads = tuple(g.detach() for g in grads)
        phi = step(j, phi, grads, leaves[4:])
        loss = F.cross_entropy(by_hand(phi, query_x), query_y)
        total = total + (weights[j] if weights else float(j == steps - 1)) * loss
    if steps == 0:
        total = loss = F.cross_entropy(by_hand(phi, query_x), query_y)
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    row = torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(leaves, grads, strict=True)
        ]
    )
    moved = [p - q for p, q in zip(leaves, phi, strict=False)]
    moved += [torch.zeros_like(p) for p in leaves[4:]]
    return row, torch.cat([m.flatten() for m in moved]).detach(), loss.detach()


class Problem:
    """A `Net`, three episodes, and the loops over them."""

    def __init__(self, seed: int, ways: int = 3, shots: int = 2, queries: int = 2) -> None:
        g = torch.Generator().manual_seed(seed)

        def points(count: int) -> Tensor:
            return torch.randn(3, count * ways, 4, generator=g, dtype=torch.float64)

        def labels(count: int) -> Tensor:
            each = torch.arange(ways).repeat(count)
            return torch.stack([each[torch.randperm(len(each), generator=g)] for _ in range(3)])

        self.batch = TaskBatch(
            points(shots), labels(shots), points(queries), labels(queries), torch.arange(3)
        )
        self.model = Net(4, ways, 5).double()
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(0.5 * torch.randn(p.shape, generator=g, dtype=torch.float64))
        self.generator = g

    def check(self, learner: Learner, step: Step, meta: Any = None, **options: Any) -> None:
        got = meta_gradients(self.model, self.batch, learner, meta=meta, method="loop")
        leaves = [p.detach() for p in (meta or model_parameters(self.model)).values()]
        b = self.batch
        for i, task in enumerate(zip(b.support_x, b.support_y, b.query_x, b.query_y, strict=True)):
            own = [p.clone().requires_grad_() for p in leaves]
            row, update, loss = loop_by_hand(own, task, learner.steps, step, **options)
            assert_close(got.updates[i], update)
            assert_close(got.rows[i], update if learner.update_is_row else row)
            assert_close(got.loss[i], loss)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def some(problem: Problem, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rates that differ everywhere."""
    return {
        n: 0.1 + 0.3 * torch.rand(r.shape, generator=problem.generator, dtype=torch.float64)
        for n, r in like.items()
        if n.startswith("inner_lr.")
    }


SHAPES = st.tuples(st.integers(0, 99), st.integers(2, 4), st.integers(1, 3), st.integers(1, 3))
drawn = settings(max_examples=12, deadline=None, derandomize=True)


def descend(j: int, phi: list[Tensor], g: tuple[Tensor, ...], _: list[Tensor]) -> list[Tensor]:
    return [p - 0.3 * d for p, d in zip(phi, g, strict=True)]


@drawn
@given(shape=SHAPES, steps=st.integers(0, 3), first_order=st.booleans())
def test_maml(shape: Any, steps: int, first_order: bool) -> None:
    Problem(*shape).check(MAML(0.3, steps, first_order), descend, first_order=first_order)


@drawn
@given(shape=SHAPES, steps=st.integers(1, 4), first_order=st.booleans())
def test_multi_step_loss(shape: Any, steps: int, first_order: bool) -> None:
    weights = tuple((j + 1) / 10 for j in range(steps))
    learner = MAML(0.3, steps, first_order, step_weights=weights)
    Problem(*shape).check(learner, descend, first_order=first_order, weights=weights)


@drawn
@given(shape=SHAPES, steps=st.integers(0, 3), first_order=st.booleans())
def test_anil_moves_the_last_layer_alone(shape: Any, steps: int, first_order: bool) -> None:
    Problem(*shape).check(
        ANIL(0.3, steps, first_order),
        lambda j, phi, g, _: [*phi[:2], phi[2] - 0.3 * g[2], phi[3] - 0.3 * g[3]],
        first_order=first_order,
    )


def with_rates(problem: Problem, learner: MAML) -> dict[str, Tensor]:
    """The learner's meta-parameters, with rates that all differ."""
    meta = learner.meta_parameters(model_parameters(problem.model))
    names = [n for n in meta if n.startswith("inner_lr.")]
    assert names == [f"inner_lr.{n}" for n in model_parameters(problem.model)]
    assert all((meta[n] == learner.inner_lr).all() for n in names)
    drawn = {n: torch.rand(meta[n].shape, generator=problem.generator) for n in names}
    return {**meta, **{n: 0.1 + 0.3 * r.double() for n, r in drawn.items()}}


@drawn
@given(shape=SHAPES, steps=st.integers(0, 3), first_order=st.booleans())
def test_metasgd_and_the_rows_of_its_rates(shape: Any, steps: int, first_order: bool) -> None:
    problem, learner = Problem(*shape), MetaSGD(0.3, steps, first_order)
    problem.check(
        learner,
        lambda j, phi, g, rates: [p - r * d for p, r, d in zip(phi, rates, g, strict=True)],
        with_rates(problem, learner),
        first_order=first_order,
    )


@drawn
@given(shape=SHAPES, steps=st.integers(0, 3), more=st.integers(0, 2), first_order=st.booleans())
def test_layerwise_rates_of_each_step(shape: Any, steps: int, more: int, first_order: bool) -> None:
    problem, learner = Problem(*shape), LSLR(0.3, steps, first_order)
    meta = with_rates(problem, learner)
    assert meta["inner_lr.body.weight"].shape == (max(1, steps),)
    problem.check(
        LSLR(0.3, steps + more, first_order),  # beyond those learned, the last one's rate
        lambda j, phi, g, rates: [
            p - r[min(j, len(r) - 1)] * d for p, r, d in zip(phi, rates, g, strict=True)
        ],
        meta,
        first_order=first_order,
    )


@drawn
@given(shape=SHAPES, steps=st.integers(0, 4), batch=st.integers(0, 9))
def test_reptile_with_sgd_on_mini_batches(shape: Any, steps: int, batch: int) -> None:
    problem = Problem(*shape)
    size = problem.batch.support_x.shape[1]

    def mini_batch(j: int) -> list[int]:
        if batch == 0 or batch >= size:
            return list(range(size))
        return [(j * batch + k) % size for k in range(batch)]

    learner = Reptile(0.3, steps, batch=batch)
    problem.check(learner, descend, first_order=True, mini_batch=mini_batch)


@drawn
@given(shape=SHAPES, steps=st.integers(1, 6), batch=st.integers(0, 3))
def test_reptile_with_adam_is_torchs_adam(shape: Any, steps: int, batch: int) -> None:
    problem = Problem(*shape)
    learner = Reptile(1e-2, steps, "adam", batch=batch)
    got = meta_gradients(problem.model, problem.batch, learner, method="loop")
    for i in range(3):
        theta = [p.detach().clone().requires_grad_() for p in problem.model.parameters()]
        start = [p.detach().clone() for p in theta]
        adam = torch.optim.Adam(theta, lr=1e-2, betas=(0.0, 0.999))
        x, y = problem.batch.support_x[i], problem.batch.support_y[i]
        for j in range(steps):
            chosen = torch.arange(j * batch, (j + 1) * batch) % len(y) if batch else slice(None)
            chosen = slice(None) if batch >= len(y) else chosen
            adam.zero_grad()
            F.cross_entropy(by_hand(theta, x[chosen]), y[chosen]).backward()
            adam.step()
        moved = [(a - b).flatten() for a, b in zip(start, theta, strict=True)]
        assert_close(got.rows[i], torch.cat(moved).detach())


def test_reptile_with_one_step_is_the_joint_gradient() -> None:
    problem = Problem(0)
    got = meta_gradients(problem.model, problem.batch, Reptile(0.3, 1))
    theta = list(problem.model.parameters())
    x, y = problem.batch.support_x.flatten(0, 1), problem.batch.support_y.flatten()
    joint = torch.autograd.grad(F.cross_entropy(by_hand(theta, x), y), theta)
    assert_close(got.rows.mean(0), 0.3 * torch.cat([g.flatten() for g in joint]))


@pytest.mark.parametrize("rule", ["uniform", "agreement", "agreement-update"])
def test_reptiles_outer_step_is_the_papers(rule: str) -> None:
    """theta + eps * sum_i w_i (theta_i - theta)."""
    config = TrainConfig.of(
        "sinusoid", learner="reptile", rule=rule, iterations=1, meta_batch=4, hidden=8,
        inner_lr=0.01, inner_steps=4, meta_optimizer="sgd", meta_lr=0.7, validation_episodes=2,
    )  # fmt: skip
    start = started(config, Parts())
    batch = start.source.sample(4)
    theta = torch.cat([p.detach().flatten() for p in start.model.parameters()])
    theta_i = theta - meta_gradients(start.model, batch, start.learner).updates
    gap = theta_i - theta
    s = (gap.double() @ gap.double().T).sum(1)
    weights = s / s.abs().sum() if rule.startswith("agreement") else torch.full((4,), 0.25)
    wanted = theta + 0.7 * weights.to(theta.dtype) @ gap
    run = train(config, progress=False)
    found = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def learn2learn() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("learn2learn")


def l2l_rows(problem: Problem, clone: Callable[[], Any], parameters: list[Tensor]) -> Tensor:
    rows = []
    for i in range(3):
        task = clone()
        for _ in range(2):
            adapted = F.cross_entropy(task(problem.batch.support_x[i]), problem.batch.support_y[i])
            task.adapt(adapted)
        loss = F.cross_entropy(task(problem.batch.query_x[i]), problem.batch.query_y[i])
        grads = torch.autograd.grad(loss, parameters)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("first_order", [False, True])
def test_learn2learn_metasgd_gives_the_same_rows(first_order: bool) -> None:
    l2l = learn2learn()
    problem, learner = Problem(5), MetaSGD(0.3, 2, first_order)
    meta = with_rates(problem, learner)
    theirs = l2l.algorithms.MetaSGD(problem.model, lr=0.3, first_order=first_order)
    for own, rate in zip(list(meta.values())[4:], theirs.lrs, strict=True):
        rate.data.copy_(own)
    parameters = [*theirs.module.parameters(), *theirs.lrs.parameters()]
    wanted = l2l_rows(problem, theirs.clone, parameters)
    assert_close(meta_gradients(problem.model, problem.batch, learner, meta=meta).rows, wanted)


@pytest.mark.parametrize("first_order", [False, True])
def test_learn2learn_anil_gives_the_same_rows(first_order: bool) -> None:
    l2l = learn2learn()
    problem = Problem(6)
    body = nn.Sequential(problem.model.body, nn.Tanh())
    head = l2l.algorithms.MAML(problem.model.head, lr=0.3, first_order=first_order)

    class Task:
        def __init__(self) -> None:
            self.head = head.clone()

        def __call__(self, x: Tensor) -> Tensor:
            output: Tensor = self.head(body(x))
            return output

        def adapt(self, loss: Tensor) -> None:
            self.head.adapt(loss)

    wanted = l2l_rows(problem, Task, [*body.parameters(), *head.parameters()])
    learner = ANIL(0.3, 2, first_order)
    assert_close(meta_gradients(problem.model, problem.batch, learner).rows, wanted)


def test_scores_are_those_after_the_last_step_whatever_the_rows_differentiate() -> None:
    problem = Problem(7)
    plain = meta_gradients(problem.model, problem.batch, MAML(0.3, 2))
    weighted = MAML(0.3, 2, step_weights=(0.5, 0.5))
    got: TaskGradients = meta_gradients(problem.model, problem.batch, weighted)
    assert not torch.equal(got.rows, plain.rows)
    assert_close(got.loss, plain.loss)
    assert_close(got.score, plain.score)
    assert_close(adapt_and_score(problem.model, problem.batch, weighted)[0], plain.loss)
    assert weighted.for_test(3) == MAML(0.3, 3, first_order=True)


def test_bad_settings_are_named() -> None:
    with pytest.raises(InputError, match="one weight for each of 3 steps, got 2"):
        MAML(0.1, 3, step_weights=(0.5, 0.5))
    with pytest.raises(InputError, match="ANIL: inner_lr must be positive, got 0"):
        ANIL(0)
    with pytest.raises(InputError, match="optimizer must be 'sgd' or 'adam', got 'sdg'"):
        Reptile(0.1, optimizer="sdg")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batch must be at least 0, got -1"):
        Reptile(0.1, batch=-1)
    problem = Problem(0)
    meta = model_parameters(problem.model)
    for learner in (MetaSGD(), LSLR()):
        with pytest.raises(InputError, match="no learned rates among the meta-parameters"):
            meta_gradients(problem.model, problem.batch, learner, meta=meta, method="loop")
    with pytest.raises(InputError, match="no parameter's name starts with head="):
        meta_gradients(problem.model, problem.batch, ANIL(head="last."), method="loop")
