"""The learn2learn bridge against the real library: its own loop, its clones, its task sets."""

import copy
import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from gametalearn import (
    ANIL,
    MAML,
    RULES,
    GradientAgreement,
    InputError,
    MetaSGD,
    MixedSource,
    TaskBatch,
    Uniform,
    agreement_weights,
    evaluate,
    make_rule,
    meta_gradients,
)
from gametalearn.adaptation import RATE
from gametalearn.bridges import GradientCollector
from gametalearn.bridges.learn2learn import TasksetSource, meta_step
from gametalearn.episodes import Source
from gametalearn.models import MLP, Conv4

l2l: Any = pytest.importorskip("learn2learn")

TASKS = 3


def images(channels: int = 1, ways: int = 3, seed: int = 0) -> TaskBatch:
    generator = torch.Generator().manual_seed(seed)
    size = (TASKS, ways * 2, channels, 16, 16)
    labels = torch.arange(ways).repeat(TASKS, 2)
    return TaskBatch(
        support_x=torch.rand(size, generator=generator, dtype=torch.float64),
        support_y=labels,
        query_x=torch.rand(size, generator=generator, dtype=torch.float64),
        query_y=labels,
        group=torch.tensor([0, 1, 0]),
    )


def curves(seed: int = 0) -> TaskBatch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, TASKS, 5, 1, generator=generator, dtype=torch.float64)
    amplitude = torch.tensor([1.0, 3.0, -2.0], dtype=torch.float64).view(TASKS, 1, 1)
    y = amplitude * x.sin()
    return TaskBatch(x[0], y[0], x[1], y[1], group=torch.zeros(TASKS, dtype=torch.int64))


def conv(norm: str = "batch") -> nn.Module:
    torch.manual_seed(0)
    return Conv4(3, image_size=16, hidden=4, norm=norm).double()  # type: ignore[arg-type]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return MLP(hidden=(8, 8)).double()


def assert_exact(got: Tensor | None, wanted: Tensor | None) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def loss_of(prediction: Tensor, y: Tensor) -> Tensor:
    function = nn.functional.mse_loss if y.is_floating_point() else nn.functional.cross_entropy
    return function(prediction, y)


def flat(tensors: Iterator[Tensor] | list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def usual_loop(maml: Any, batch: TaskBatch, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """One iteration as in learn2learn's examples."""
    optimizer.zero_grad()
    for i in range(len(batch)):
        learner = maml.clone()
        for _ in range(steps):
            learner.adapt(loss_of(learner(batch.support_x[i]), batch.support_y[i]))
        loss_of(learner(batch.query_x[i]), batch.query_y[i]).backward()
    for p in maml.parameters():
        p.grad.data.mul_(1.0 / len(batch))
    optimizer.step()


SETTINGS = pytest.mark.parametrize(
    ("make", "batch"),
    [(mlp, curves()), (conv, images()), (lambda: conv("group"), images())],
    ids=["sinusoid", "conv4", "group-norm"],
)


@SETTINGS
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("algorithm", ["MAML", "MetaSGD"])
def test_uniform_is_the_usual_loop(make, batch, steps, first_order, algorithm):
    wrap = getattr(l2l.algorithms, algorithm)
    theirs = wrap(make(), lr=0.1, first_order=first_order)
    ours = copy.deepcopy(theirs)
    # Adam's usual eps of 1e-8 would make 1e-9 out of the rounding of gradients that are zero.
    their_optimizer = torch.optim.Adam(theirs.parameters(), lr=0.01, eps=1e-4)
    our_optimizer = torch.optim.Adam(ours.parameters(), lr=0.01, eps=1e-4)
    for _ in range(2):
        usual_loop(theirs, batch, their_optimizer, steps)
        meta_step(ours, batch, Uniform(), steps=steps)  # replaces .grad: no zero_grad
        our_optimizer.step()
    assert_exact(flat(ours.parameters()), flat(theirs.parameters()))


@SETTINGS
@pytest.mark.parametrize(
    ("steps", "first_order", "method"),
    # To trace takes seconds, and the engine's own tests compare its methods.
    [(1, False, "auto"), (3, False, "loop"), (1, True, "loop"), (3, True, "loop")],
)
def test_agreement_is_our_engine_on_maml(make, batch, steps, first_order, method):
    model = make()
    maml = l2l.algorithms.MAML(model, lr=0.1, first_order=first_order)
    weights, gradients = meta_step(maml, batch, steps=steps)
    wanted = meta_gradients(model, batch, MAML(0.1, steps, first_order), method=method)
    assert_exact(gradients.rows, wanted.rows)
    assert_exact(gradients.updates, wanted.updates)
    assert_exact(gradients.loss, wanted.loss)
    assert torch.equal(gradients.score, wanted.score) or batch.query_y.is_floating_point()
    assert torch.equal(gradients.group, batch.group)
    agreement = agreement_weights(wanted.rows)
    assert_exact(weights.effective, agreement)
    got = flat([p.grad for p in maml.parameters()])
    assert_exact(got, agreement @ wanted.rows)


@SETTINGS
def test_agreement_is_our_engine_on_meta_sgd(make, batch):
    model = make()
    maml = l2l.algorithms.MetaSGD(model, lr=0.1)
    generator = torch.Generator().manual_seed(3)
    for rate in maml.lrs:
        rate.data.mul_(torch.rand(rate.shape, generator=generator, dtype=rate.dtype) + 0.5)
    weights, gradients = meta_step(maml, batch, GradientAgreement(signal="update"), steps=2)
    names = [n for n, _ in model.named_parameters()]
    rates = {RATE + n: r for n, r in zip(names, maml.lrs, strict=True)}
    meta = {**dict(model.named_parameters()), **rates}
    wanted = meta_gradients(model, batch, MetaSGD(0.1, 2), meta=meta, method="loop")
    assert_exact(gradients.rows, wanted.rows)
    assert_exact(gradients.updates, wanted.updates)
    agreement = agreement_weights(wanted.updates)
    assert_exact(weights.effective, agreement)
    got = flat([p.grad for p in maml.parameters()])
    assert_exact(got, agreement @ wanted.rows)


class Body(nn.Module):
    """Conv4 up to its head."""

    def __init__(self, model: Conv4) -> None:
        super().__init__()
        self.blocks = model.blocks
        self.pool = "stride"

    def forward(self, x: Tensor) -> Tensor:
        return Conv4.features(self, x)  # type: ignore[arg-type]


def test_anil_with_a_head_is_our_engine():
    model = conv()
    assert isinstance(model, Conv4)
    body, head = Body(model), l2l.algorithms.MAML(model.head, lr=0.1)
    weights, gradients = meta_step(head, images(), steps=3, features=body)
    wanted = meta_gradients(model, images(), ANIL(0.1, 3), method="loop")
    assert_exact(gradients.rows, wanted.rows)
    assert_exact(gradients.updates, wanted.updates)
    got = flat([p.grad for p in model.parameters() if p.grad is not None])
    assert_exact(got, agreement_weights(wanted.rows) @ wanted.rows)
    assert weights.effective.shape == (TASKS,)


def test_anil_loop_with_the_collector():
    """learn2learn's ANIL example, in which body and head have one optimiser."""
    model, batch = conv("group"), images()
    assert isinstance(model, Conv4)
    body, head = Body(model), l2l.algorithms.MAML(model.head, lr=0.1)
    collect = GradientCollector([*body.parameters(), *head.parameters()])
    for i in range(TASKS):
        learner = head.clone()
        features = body(torch.cat([batch.support_x[i], batch.query_x[i]]))
        support, query = features.chunk(2)
        learner.adapt(loss_of(learner(support), batch.support_y[i]))
        loss_of(learner(query), batch.query_y[i]).backward()
        collect.add()
    weights = collect.combine()
    wanted = meta_gradients(model, batch, ANIL(0.1, 1), method="loop")
    assert_exact(weights.effective, agreement_weights(wanted.rows))
    got = flat([p.grad for p in model.parameters() if p.grad is not None])
    assert_exact(got, weights.effective @ wanted.rows)


@pytest.mark.parametrize("algorithm", ["MAML", "MetaSGD"])
def test_collector_in_the_usual_loop_is_meta_step(algorithm):
    batch, wrap = curves(), getattr(l2l.algorithms, algorithm)
    loop, step = wrap(mlp(), lr=0.1), wrap(mlp(), lr=0.1)
    collect = GradientCollector(loop.parameters())
    for i in range(TASKS):
        learner = loop.clone()
        learner.adapt(loss_of(learner(batch.support_x[i]), batch.support_y[i]))
        loss_of(learner(batch.query_x[i]), batch.query_y[i]).backward()
        collect.add()
    collect.combine()
    meta_step(step, batch)
    for p, q in zip(loop.parameters(), step.parameters(), strict=True):
        assert_exact(p.grad, q.grad)


def test_gbml():
    model = mlp()
    transform = l2l.optim.ModuleTransform(lambda inputs, outputs: l2l.nn.Scale(inputs))
    gbml = l2l.algorithms.GBML(model, transform, lr=0.1).double()
    weights, gradients = meta_step(gbml, curves(), steps=2)
    plain = sum(p.numel() for p in model.parameters())
    assert gradients.rows.shape == (TASKS, sum(p.numel() for p in gbml.parameters()))
    # the scales start at one
    wanted = meta_gradients(model, curves(), MAML(0.1, 2), method="loop")
    assert_exact(gradients.rows[:, :plain], wanted.rows)
    assert_exact(weights.effective, agreement_weights(gradients.rows))


def test_scores_follow_the_loss_as_in_our_engine():
    torch.manual_seed(0)
    batch = curves()
    maml = l2l.algorithms.MAML(MLP().double(), lr=0.01)
    more: Any = {"loss": torch.nn.functional.l1_loss}
    _, found = meta_step(maml, batch, **more)
    ours = meta_gradients(maml.module, batch, MAML(0.01, 1), **more, method="loop")
    torch.testing.assert_close(found.score, ours.score)
    torch.testing.assert_close(found.score, found.loss)  # the mean absolute error is both
    _, named = meta_step(maml, batch, **more, score="mse")
    assert (named.score != found.score).all()

    def own(p, t):
        return ((p - t) ** 2).mean()

    with pytest.warns(UserWarning, match="scores of MAML are NaN.*pass score="):
        assert torch.isnan(meta_step(maml, batch, loss=own)[1].score).all()
    with pytest.raises(InputError, match=r"shape \(5, 1\) and the target \(5,\)"):
        meta_step(maml, dataclasses.replace(batch, support_y=batch.support_y.squeeze(-1)))


def test_frozen_and_support_statistics():
    model, batch = conv("support"), images()
    assert isinstance(model, Conv4)
    model.blocks[0].requires_grad_(False)
    maml = l2l.algorithms.MAML(model, lr=0.1, allow_nograd=True)
    _, gradients = meta_step(maml, batch)
    wanted = meta_gradients(model, batch, MAML(0.1, 1), method="loop")
    assert_exact(gradients.rows, wanted.rows)
    assert all(p.grad is None for p in model.blocks[0].parameters())
    assert model.head.weight.grad is not None


@pytest.mark.parametrize("name", [*RULES, "torchjd:MGDA"])
def test_every_rule(name):
    """Three steps: the rule gets the engine's losses, accuracies, objectives and updates."""
    model, batch = conv("group"), images()
    maml = l2l.algorithms.MAML(model, lr=0.1)
    ours, wanted = (make_rule(name, objectives=2) for _ in range(2))
    optimizer = torch.optim.SGD(maml.parameters(), lr=0.1)
    for _ in range(3):
        gradients = meta_gradients(model, batch, MAML(0.1, 1), method="loop")
        weights = wanted(gradients)
        got, _ = meta_step(maml, batch, ours)
        assert_exact(got.raw.double(), weights.raw.double())
        assert_exact(got.effective.double(), weights.effective.double())
        assert_exact(flat([p.grad for p in maml.parameters()]), got.effective @ gradients.rows)
        optimizer.step()


@pytest.mark.parametrize("name", [*RULES, "torchjd:MGDA"])
def test_every_rule_through_the_collector(name):
    """In a loop of one's own, with what the rule needs passed to `add`."""
    model, batch = mlp(), curves()
    maml = l2l.algorithms.MAML(model, lr=0.1)
    group = [0, 1, 0]
    collect = GradientCollector(maml.parameters(), make_rule(name, objectives=2))
    for i in range(TASKS):
        learner = maml.clone()
        learner.adapt(loss_of(learner(batch.support_x[i]), batch.support_y[i]))
        loss = loss_of(learner(batch.query_x[i]), batch.query_y[i])
        loss.backward()
        update = [p - q for p, q in zip(maml.parameters(), learner.parameters(), strict=True)]
        collect.add(loss=loss, score=0.5, group=group[i], update=update)
    got = collect.combine()
    gradients = meta_gradients(model, batch, MAML(0.1, 1), method="loop")
    gradients = dataclasses.replace(
        gradients, score=torch.full((TASKS,), 0.5), group=torch.tensor(group)
    )
    weights = make_rule(name, objectives=2)(gradients)
    assert_exact(got.effective.double(), weights.effective.double())
    assert_exact(flat([p.grad for p in maml.parameters()]), got.effective @ gradients.rows)


def test_meta_step_bad_input():
    with pytest.raises(InputError, match=r"got a Linear; wrap it: l2l.algorithms.MAML"):
        meta_step(nn.Linear(1, 1), curves())
    maml = l2l.algorithms.MAML(mlp().requires_grad_(False), lr=0.1)
    for steps in (-1, 1.5):
        with pytest.raises(InputError, match=f"steps must be .*, got {steps}"):
            meta_step(maml, curves(), steps=steps)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no parameter requires gradients"):
        meta_step(maml, curves())
    batch = curves()
    batch.query_x[1, 0] = float("nan")
    with pytest.raises(InputError, match="gradient of task 1 is not finite"):
        meta_step(l2l.algorithms.MAML(mlp(), lr=0.1), batch)


# task sets


CLASSES, PER_CLASS = 8, 6


def make_taskset(
    ways: int = 3, k: int = 4, num_tasks: int = -1, remap: bool = True, shuffle: bool = False
) -> Any:
    """Example n is the number n, its label n // PER_CLASS; with ``shuffle`` classes interleave."""
    numbers = torch.arange(CLASSES * PER_CLASS)
    if shuffle:
        numbers = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))]
    data = TensorDataset(numbers.float().unsqueeze(1), numbers // PER_CLASS)
    dataset = l2l.data.MetaDataset(data)
    transforms = l2l.data.transforms
    steps = [
        transforms.NWays(dataset, ways),
        transforms.KShots(dataset, k),
        transforms.LoadData(dataset),
    ]
    if remap:
        steps.append(transforms.RemapLabels(dataset))
    return l2l.data.Taskset(dataset, steps, num_tasks=num_tasks)


@pytest.mark.parametrize("num_tasks", [-1, 5])
@pytest.mark.parametrize("shuffle", [False, True])
def test_episodes_are_split_by_class(num_tasks, shuffle):
    source = TasksetSource(make_taskset(num_tasks=num_tasks, shuffle=shuffle), ways=3, shots=1)
    assert isinstance(source, Source)
    batch = source.sample(6)
    assert batch.support_x.shape == (6, 3, 1)
    assert batch.query_x.shape == (6, 9, 1)
    assert batch.support_y.tolist() == [[0, 1, 2]] * 6
    assert batch.query_y.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2]] * 6
    assert batch.group.tolist() == [0] * 6
    for i in range(6):
        support, query = batch.support_x[i].flatten(), batch.query_x[i].flatten()
        assert not set(support.tolist()) & set(query.tolist())
        assert len(set(query.tolist())) == 9
        original = (support // PER_CLASS).tolist()
        assert len(set(original)) == 3
        for x, y in zip(query.tolist(), batch.query_y[i].tolist(), strict=True):
            assert x // PER_CLASS == original[y]


def test_interleaved_examples_split_like_partition_task():
    """Labels in an order in which every second example is of one class."""

    def interleave(description):
        half = len(description) // 2
        return [
            d for pair in zip(description[:half], description[half:], strict=True) for d in pair
        ]

    taskset = make_taskset(ways=2, k=4)
    taskset.task_transforms.append(interleave)
    batch = TasksetSource(taskset, ways=2, shots=2).sample(3)
    assert batch.support_y.tolist() == [[0, 0, 1, 1]] * 3
    x, y = taskset.sample()
    assert y.tolist() in ([0, 1] * 4, [1, 0] * 4)
    support, query = l2l.data.partition_task(x, y, shots=2)
    ours = TasksetSource(taskset, 2, 2)._split(x, y)
    for got, wanted in zip(ours, (*support, *query), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("num_tasks", [-1, 4])
def test_deterministic_resumable_and_apart_from_the_global_state(num_tasks):
    def source(seed: int) -> TasksetSource:
        return TasksetSource(make_taskset(num_tasks=num_tasks), 3, 2, seed=seed, group=7)

    random.seed(5)
    torch.manual_seed(5)
    states = random.getstate(), torch.get_rng_state()
    one, two = source(0), source(0)
    first = one.sample(3)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    random.seed(6)
    assert torch.equal(first.query_x, two.sample(3).query_x)
    assert first.group.tolist() == [7] * 3
    state = one.state_dict()
    following = one.sample(4)
    two.sample(1)
    two.load_state_dict(state)
    assert torch.equal(following.support_x, two.sample(4).support_x)
    other = one.with_seed(1)
    assert torch.equal(other.sample(5).query_x, source(1).sample(5).query_x)
    assert not torch.equal(one.with_seed(2).sample(5).query_x, source(1).sample(5).query_x)


def test_a_fixed_number_of_tasks_stays_fixed():
    """The tasks depend neither on the seed nor on who asked first."""
    taskset = make_taskset(num_tasks=3)
    tasks = {
        tuple(support.flatten().tolist())
        for seed in (0, 1, 2)
        for support in TasksetSource(taskset, 3, 1, seed=seed).sample(10).support_x
    }
    assert len(tasks) == 3
    again = TasksetSource(make_taskset(num_tasks=3), 3, 1, seed=9).sample(20).support_x
    assert {tuple(s.flatten().tolist()) for s in again} == tasks


def test_other_transforms_and_uint8():
    data = TensorDataset(
        torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1), torch.arange(60) // 10
    )
    dataset = l2l.data.MetaDataset(data)
    transforms = l2l.data.transforms
    fused = transforms.FusedNWaysKShots(dataset, n=5, k=3)
    steps = [fused, transforms.LoadData(dataset), transforms.RemapLabels(dataset)]
    batch = TasksetSource(l2l.data.Taskset(dataset, steps), ways=5, shots=1).sample(2)
    assert batch.support_x.shape == (2, 5, 1, 1, 1)
    assert batch.query_x.dtype == torch.float32
    assert batch.query_x.max() < 0.25


def test_a_step_from_a_taskset():
    source = TasksetSource(make_taskset(), ways=3, shots=1)
    maml = l2l.algorithms.MAML(MLP(1, 3), lr=0.01)
    weights, _ = meta_step(maml, source.sample(4), GradientAgreement(normalize=True))
    assert float(weights.effective.abs().sum()) == pytest.approx(1)


def test_evaluation_and_mixture_take_a_taskset():
    source = TasksetSource(make_taskset(), ways=3, shots=1)
    result = evaluate(MLP(1, 3), source, MAML(0.01, 1), episodes=20)
    assert 0 <= result.mean <= 1
    assert len(result.values) == 20
    batch = MixedSource([source, TasksetSource(make_taskset(num_tasks=4), 3, 1)]).sample(5)
    assert batch.group.tolist() == [0, 0, 0, 1, 1]


def test_taskset_bad_input():
    with pytest.raises(InputError, match=r"expected an l2l.data.Taskset, got a list"):
        TasksetSource([], 3, 1)
    with pytest.raises(InputError, match="ways must be at least 2, got 1"):
        TasksetSource(make_taskset(), 1, 1)
    with pytest.raises(InputError, match="shots must be at least 1, got 0"):
        TasksetSource(make_taskset(), 3, 0)
    with pytest.raises(InputError, match="num_tasks must be at least 1, got 0"):
        TasksetSource(make_taskset(), 3, 1).sample(0)
    with pytest.raises(
        InputError, match=r"5 ways requested, but a task has the labels \[0, 1, 2\]"
    ):
        TasksetSource(make_taskset(), 5, 1).sample(1)
    with pytest.raises(InputError, match=r"add l2l\.data\.transforms\.RemapLabels"):
        TasksetSource(make_taskset(remap=False), 3, 1, seed=1).sample(1)
    with pytest.raises(InputError, match=r"more than 4, .* has \[4, 4, 4\] per class"):
        TasksetSource(make_taskset(k=4), 3, 4).sample(1)

    dataset = make_taskset().dataset
    transforms = l2l.data.transforms
    twice = [
        transforms.NWays(dataset, 3),
        transforms.KShots(dataset, 20, replacement=True),
        transforms.LoadData(dataset),
        transforms.RemapLabels(dataset),
    ]
    with pytest.raises(InputError, match="contains an example twice"):
        TasksetSource(l2l.data.Taskset(dataset, twice), 3, 1).sample(1)


def test_more_episodes_than_a_task_set_has_are_told():
    """They repeat its tasks, and their interval says nothing about others."""
    model = nn.Linear(1, 3)
    source = TasksetSource(make_taskset(num_tasks=4), 3, 1)
    with pytest.warns(UserWarning, match="5 episodes of a source of 4 tasks, so that tasks repeat"):
        evaluate(model, source, MAML(1e-4), 5)
    evaluate(model, source, MAML(1e-4), 4)
    evaluate(model, TasksetSource(make_taskset(), 3, 1), MAML(1e-4), 5)


@pytest.mark.parametrize("lacks", ["allow_nograd", "allow_unused"])
def test_what_learn2learn_cannot_differentiate_is_told(lacks):
    model = mlp()
    if lacks == "allow_nograd":
        next(model.parameters()).requires_grad_(False)
    else:
        model.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    with pytest.raises(InputError, match=f"learn2learn could not differentiate .*{lacks}=True"):
        meta_step(l2l.algorithms.MAML(model, lr=0.1), curves())
    meta_step(l2l.algorithms.MAML(model, lr=0.1, **{lacks: True}), curves())
