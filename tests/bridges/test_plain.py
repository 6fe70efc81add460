"""`GradientCollector` in ordinary loops, against weights and sums computed by hand."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gametalearn import (
    DynamicTaskPrioritization,
    DynamicWeightAverage,
    GradientAgreement,
    GradNorm,
    InputError,
    NormControl,
    ScreenedMean,
    TaskGradients,
    UncertaintyWeighting,
    Uniform,
    Weights,
    agreement_weights,
)
from gametalearn.bridges import GradientCollector
from gametalearn.weighting.gradnorm import shared_columns

TASKS = 4


def make_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def make_tasks(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TASKS, 6, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(TASKS, 6, 2, generator=generator, dtype=torch.float64)
    return list(zip(x.to(dtype), y.to(dtype), strict=True))


def rows_of(model: nn.Module, tasks: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The oracle's rows: one `autograd.grad` a task."""
    params = [p for p in model.parameters() if p.requires_grad]
    grads = [
        torch.autograd.grad(nn.functional.mse_loss(model(x), y), params, allow_unused=True)
        for x, y in tasks
    ]
    return torch.stack(
        [
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(params, task, strict=True)
                ]
            )
            for task in grads
        ]
    )


def flat_grad(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def collect_all(
    collect: GradientCollector, model: nn.Module, tasks: list[tuple[Tensor, Tensor]]
) -> None:
    for x, y in tasks:
        nn.functional.mse_loss(model(x), y).backward()
        collect.add()


def test_agreement_is_the_default():
    model, tasks = make_model(), make_tasks()
    rows = rows_of(model, tasks)
    collect = GradientCollector(model.parameters())
    collect_all(collect, model, tasks)
    assert len(collect) == TASKS
    assert all(p.grad is None for p in model.parameters())
    weights = collect.combine()
    assert len(collect) == 0
    torch.testing.assert_close(weights.effective, agreement_weights(rows))
    torch.testing.assert_close(flat_grad(model), agreement_weights(rows) @ rows)


@pytest.mark.parametrize(
    "rule",
    [
        Uniform(),
        NormControl(),
        GradientAgreement(normalize=True),
        agreement_weights,
        lambda rows: torch.arange(float(len(rows))),
    ],
    ids=["uniform", "norm-control", "cosine", "function", "lambda"],
)
def test_any_rule_or_function(rule: Callable[..., Weights]):
    model, tasks = make_model(), make_tasks()
    rows = rows_of(model, tasks)
    collect = GradientCollector(model.parameters(), rule)
    collect_all(collect, model, tasks)
    weights = collect.combine()
    torch.testing.assert_close(flat_grad(model), weights.effective.double() @ rows)
    if isinstance(rule, Uniform):
        torch.testing.assert_close(flat_grad(model), rows.mean(0))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
    ],
    ids=["sgd", "adam", "adamw", "rmsprop"],
)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_training_equals_gradients_written_by_hand(make, set_to_none):
    """Several steps, with clipping: the same parameters as with `.grad` set from the oracle."""
    model, tasks = make_model(), make_tasks()
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = make(model.parameters()), make(twin.parameters())
    collect = GradientCollector(model.parameters())
    for _ in range(3):
        for x, y in tasks:
            optimizer.zero_grad(set_to_none=set_to_none)
            nn.functional.mse_loss(model(x), y).backward()
            collect.add()
        collect.combine()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)

        rows = rows_of(twin, tasks)
        vector = agreement_weights(rows) @ rows
        vector = vector * min(1.0, 0.05 / (float(vector.norm()) + 1e-6))
        for p, part in zip(
            twin.parameters(),
            vector.split([p.numel() for p in twin.parameters()]),
            strict=True,
        ):
            p.grad = part.view_as(p)
        twin_optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_several_backward_calls_are_one_task():
    model, tasks = make_model(), make_tasks()
    halves = [((x[:3], y[:3]), (x[3:], y[3:])) for x, y in tasks]
    rows = torch.stack([rows_of(model, list(pair)).sum(0) for pair in halves])
    collect = GradientCollector(model.parameters())
    for pair in halves:
        for x, y in pair:
            nn.functional.mse_loss(model(x), y).backward()
        collect.add()
    collect.combine()
    torch.testing.assert_close(flat_grad(model), agreement_weights(rows) @ rows)


class Heads(nn.Module):
    """A trunk, one head a task, a frozen layer and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(3, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

    def forward(self, x: Tensor, task: int) -> Tensor:
        output: Tensor = self.heads[task](torch.tanh(self.frozen(self.trunk(x))))
        return output


def test_parameters_without_gradient():
    model = Heads().double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    stale = torch.ones_like(model.frozen.weight)
    model.frozen.weight.grad = stale
    before = copy.deepcopy(model.state_dict())
    params = [p for p in model.parameters() if p.requires_grad]
    rows = torch.stack(
        [
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(
                        params,
                        torch.autograd.grad(model(x[i], i).sum(), params, allow_unused=True),
                        strict=True,
                    )
                ]
            )
            for i in range(2)
        ]
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    collect = GradientCollector(model.parameters())
    for i in range(2):
        model(x[i], i).sum().backward()
        collect.add()
    weights = collect.combine()
    torch.testing.assert_close(weights.effective, agreement_weights(rows))
    # in some tasks: a zero in the others; in none: None; frozen: untouched
    assert model.heads[0].weight.grad is not None
    assert model.heads[1].weight.grad is not None
    assert model.heads[2].weight.grad is None
    assert model.unused.weight.grad is None
    assert model.frozen.weight.grad is stale
    model.frozen.weight.grad = None
    wanted = (weights.effective @ rows).split([p.numel() for p in params])
    for p, part in zip(params, wanted, strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, part.view_as(p))
    optimizer.step()
    after = model.state_dict()
    for name in after:
        still = name.startswith(("frozen", "unused", "heads.2"))
        assert torch.equal(before[name], after[name]) == still


def test_frozen_parameters_have_no_part_in_the_rows():
    """GradNorm's columns are those of the parameters that require gradients; int8 may be frozen."""
    model = Heads().double()
    packed = nn.Parameter(torch.ones(7, dtype=torch.int8), requires_grad=False)
    shapes = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    columns = shared_columns(shapes, "heads.0")
    seen: list[Tensor] = []

    def rule(rows: Tensor) -> Tensor:
        seen.append(rows)
        return rows.new_tensor([0.25, 0.75])

    collect = GradientCollector([packed, *model.parameters()], rule)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    wanted = []
    for i in range(2):
        model(x[i], 0).sum().backward()
        wanted.append(flat_grad(model.heads[0]))
        collect.add()
    collect.combine()
    assert seen[0].shape == (2, sum(shape.numel() for shape in shapes.values()))
    assert torch.equal(seen[0][:, columns], torch.stack(wanted))
    assert packed.grad is None


def test_parameters_may_be_unfrozen_between_meta_batches_only():
    model, tasks = make_model(), make_tasks()
    last = list(model.children())[2].requires_grad_(False)
    collect = GradientCollector(model.parameters())
    for unfrozen in (False, True):
        last.requires_grad_(unfrozen)
        rows = rows_of(model, tasks)
        collect_all(collect, model, tasks)
        torch.testing.assert_close(collect.combine().effective, agreement_weights(rows))
        torch.testing.assert_close(flat_grad(model), agreement_weights(rows) @ rows)
        model.zero_grad()
    collect_all(collect, model, tasks[:1])
    last.requires_grad_(False)
    nn.functional.mse_loss(model(tasks[1][0]), tasks[1][1]).backward()
    with pytest.raises(
        InputError, match=r"2 parameters require .* task 1, .* 4 .*; freeze and unf"
    ):
        collect.add()


def test_an_update_may_count_all_parameters_or_those_that_require_gradients():
    frozen, p = torch.ones(3), nn.Parameter(torch.zeros(2))
    updates = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    for extra in ([], [None], [torch.ones(3)]):
        collect = GradientCollector([frozen, p], GradientAgreement(signal="update"))
        for update in updates:
            p.sum().backward()
            collect.add(update=[*extra, update])
        torch.testing.assert_close(collect.combine().effective, agreement_weights(updates))


def test_shared_parameters_count_once():
    model, tasks = make_model(), make_tasks()
    rows = rows_of(model, tasks)
    collect = GradientCollector([*model.parameters(), *model.parameters()])
    collect_all(collect, model, tasks)
    torch.testing.assert_close(collect.combine().effective, agreement_weights(rows))


def test_memory_format_and_mixed_dtypes():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
            self.head = nn.Linear(3, 1, dtype=torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.head(self.conv(x).mean((2, 3)).to(torch.bfloat16)).sum()
            return output

    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(3, 4, 2, 5, 5)
    weight, head = model.conv.weight, model.head.weight
    wanted = torch.autograd.grad(model(x[1]), [weight, head])
    collect = GradientCollector(model.parameters(), lambda rows: torch.tensor([0.0, 1.0, 0.0]))
    for i in range(3):
        model(x[i]).backward()
        collect.add()
    collect.combine()
    assert weight.grad is not None
    assert head.grad is not None
    assert weight.grad.is_contiguous(memory_format=torch.channels_last)
    assert head.grad.dtype == torch.bfloat16
    assert torch.equal(weight.grad, wanted[0])
    assert torch.equal(head.grad, wanted[1])
    torch.optim.Adam(model.parameters()).step()


# AMP


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**16])
def test_scaled_gradients_have_the_same_weights(factor):
    model, tasks = make_model(), make_tasks()
    rows = rows_of(model, tasks)
    collect = GradientCollector(model.parameters())
    for x, y in tasks:
        (factor * nn.functional.mse_loss(model(x), y)).backward()
        collect.add()
    weights = collect.combine().effective
    torch.testing.assert_close(weights, agreement_weights(rows))
    torch.testing.assert_close(flat_grad(model) / factor, weights @ rows)


def test_grad_scaler():
    """A finite step is unscaled and taken; one with an overflow is skipped, the scale halved."""
    model, tasks = make_model(torch.float32), make_tasks(torch.float32)
    rows = rows_of(model, tasks)
    wanted = torch.cat([p.detach().flatten() for p in model.parameters()])
    wanted = wanted - 0.1 * (agreement_weights(rows) @ rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    collect = GradientCollector(model.parameters())

    def step(bad: float | None = None) -> None:
        for i, (x, y) in enumerate(tasks):
            optimizer.zero_grad()
            with torch.autocast("cpu", enabled=False):
                loss = nn.functional.mse_loss(model(x), y)
            if bad is not None and i == 2:
                loss = loss * bad
            scaler.scale(loss).backward()
            collect.add()
        weights = collect.combine().effective
        assert torch.isfinite(weights).all()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()

    step()
    got = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(got, wanted)
    for i, bad in enumerate([float("inf"), float("nan")]):
        step(bad)
        assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), got)
        assert scaler.get_scale() == 1024 / 2 ** (i + 1)
    step()
    assert not torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), got)


class Counting(Uniform):
    calls = 0

    def forward(self, gradients: TaskGradients) -> Weights:
        self.calls += 1
        return super().forward(gradients)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_not_finite_passes_through_where_it_is(bad):
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    rule = Counting()
    collect = GradientCollector([p, q], rule)
    for value in (1.0, bad):
        (p.sum() * value + q.sum()).backward()
        collect.add()
    weights = collect.combine()
    assert rule.calls == 0
    assert weights.effective.tolist() == [0.5, 0.5]
    assert p.grad is not None
    assert q.grad is not None
    assert not torch.isfinite(p.grad).any()
    assert q.grad.tolist() == [1.0]


def test_without_a_scaler_clipping_can_make_an_error_of_them():
    """As the documentation says."""
    model, tasks = make_model(), make_tasks()
    collect = GradientCollector(model.parameters())
    for i, (x, y) in enumerate(tasks):
        (nn.functional.mse_loss(model(x), y) * (float("nan") if i == 1 else 1)).backward()
        collect.add()
    collect.combine()
    with pytest.raises(RuntimeError, match="non-finite"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)


def test_an_optimiser_with_a_closure():
    """All tasks in each call; with uniform weights LBFGS is that on the mean loss."""
    losses = []
    for collects in (True, False):
        model = make_model()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
        collect = GradientCollector(model.parameters(), Uniform())

        def closure(
            model: nn.Module = model,
            optimizer: torch.optim.LBFGS = optimizer,
            collect: GradientCollector | None = collect if collects else None,
        ) -> float:
            optimizer.zero_grad()
            total = 0.0
            for x, y in make_tasks():
                loss = nn.functional.mse_loss(model(x), y)
                if collect is None:
                    (loss / TASKS).backward()
                else:
                    loss.backward()
                    collect.add()
                total += loss.item() / TASKS
            if collect is not None:
                collect.combine()
            return total

        for _ in range(3):
            optimizer.step(closure)
        losses.append(closure())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


# what rules need


class NeedsAll(nn.Module):
    """Remembers the record it was given."""

    seen: TaskGradients

    def forward(self, gradients: TaskGradients) -> Weights:
        self.seen = gradients
        weights = gradients.loss + gradients.score + gradients.group + gradients.updates.sum(1)
        return Weights(raw=weights, effective=weights)


def test_losses_scores_groups_and_updates_reach_the_rule():
    p = nn.Parameter(torch.zeros(2))
    rule = NeedsAll()
    collect = GradientCollector([p], rule)
    for i in range(3):
        loss = (p * (i + 1)).sum()
        loss.backward()
        collect.add(loss=loss + i, score=0.5, group=7, update=[torch.ones(2) * i])
    collect.combine()
    assert isinstance(rule.seen, TaskGradients)
    assert rule.seen.loss.tolist() == [0, 1, 2]
    assert not rule.seen.loss.requires_grad
    assert rule.seen.score.tolist() == [0.5] * 3
    assert rule.seen.group.tolist() == [7] * 3
    assert rule.seen.group.dtype == torch.int64
    assert rule.seen.updates.tolist() == [[0, 0], [1, 1], [2, 2]]


def test_update_signal():
    p = nn.Parameter(torch.zeros(2))
    collect = GradientCollector([p], GradientAgreement(signal="update"))
    updates = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    for update in updates:
        p.sum().backward()
        collect.add(update=[update])
    torch.testing.assert_close(collect.combine().effective, agreement_weights(updates))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_losses_and_scores_are_as_precise_as_float32_at_least(dtype):
    """1e5 is inf in float16, and 0.9993 is 1 in bfloat16."""
    p = nn.Parameter(torch.zeros(2, dtype=dtype))
    rule = NeedsAll()
    collect = GradientCollector([p], rule)
    for i in range(2):
        p.sum().backward()
        collect.add(loss=torch.tensor(1e5 + i), score=0.9993, update=[None])
    collect.combine()
    assert rule.seen.loss.tolist() == [1e5, 1e5 + 1]
    assert rule.seen.score.tolist() == pytest.approx([0.9993] * 2, rel=1e-7)
    assert (
        rule.seen.loss.dtype == rule.seen.score.dtype == torch.promote_types(dtype, torch.float32)
    )
    assert rule.seen.rows.dtype == rule.seen.updates.dtype == dtype


@pytest.mark.parametrize(
    "rule",
    [
        UncertaintyWeighting(2),
        DynamicWeightAverage(2),
        GradNorm(2),
        ScreenedMean(2),
        DynamicTaskPrioritization(2, indicator="likelihood"),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_only_accuracies_need_a_score(rule):
    """Weights are those of the rule on a record that has scores."""
    p = nn.Parameter(torch.zeros(2))
    record_of = NeedsAll()
    for asked in (record_of, rule):
        collect = GradientCollector([p], asked)
        for i in range(4):
            (p * (i + 1)).sum().backward()
            score = 0.5 if asked is record_of else None
            collect.add(loss=1.0 + i, score=score, group=i % 2, update=[None])
        weights = collect.combine()
    fresh = type(rule)(2, **({"indicator": rule.indicator} if hasattr(rule, "indicator") else {}))
    assert torch.equal(weights.effective, fresh(record_of.seen).effective)


@pytest.mark.parametrize("rule", [UncertaintyWeighting(2), GradNorm([3, 5]), ScreenedMean(2)])
def test_rules_over_several_objectives_need_the_group(rule):
    """All tasks in group 0 would leave GradNorm and DWA at equal weights for ever."""
    p = nn.Parameter(torch.zeros(2))
    collect = GradientCollector([p], rule)
    for group in (3, None):
        (p * 2).sum().backward()
        collect.add(loss=1.0, group=group)
    with pytest.raises(InputError, match=r"needs the group of every task; pass it as add\(group="):
        collect.combine()
    one = GradientCollector([p], UncertaintyWeighting(1))
    (p * 2).sum().backward()
    one.add(loss=1.0)
    assert one.combine().effective.shape == (1,)


def task(p: nn.Parameter, x: list[float]) -> None:
    (p * torch.tensor(x)).sum().backward()


@pytest.mark.parametrize("other", [False, True])
def test_a_combination_left_in_grad_is_no_part_of_the_next_task(other):
    """With another parameter before it, which never has a gradient."""
    p = nn.Parameter(torch.zeros(2))
    collect = GradientCollector([nn.Parameter(torch.zeros(1)), p] if other else [p])
    for _ in range(2):
        for x in ([1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]):
            task(p, x)
            collect.add()
        assert collect.combine().effective.tolist() == [0.25, 0.5, -0.25]
        assert p.grad is not None
        assert p.grad.tolist() == [1.0, 0.5]
        p.grad = None
    task(p, [1.0, 0.0])
    collect.add()
    collect.combine()
    for _ in range(2):  # until it is cleared
        task(p, [1.0, 1.0])
        with pytest.raises(InputError, match=r"last combination .* optimizer.zero_grad\(\)"):
            collect.add()
    p.grad = None
    task(p, [1.0, 1.0])
    collect.add()
    assert collect.combine().effective.tolist() == [1.0]


def test_a_combination_left_where_the_next_task_has_no_gradient_is_none_of_its():
    head, body = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    collect = GradientCollector([head, body])
    (head + body).sum().backward()
    collect.add()
    collect.combine()
    body.grad = None
    body.sum().backward()
    with pytest.raises(InputError, match="last combination"):
        collect.add()
    head.grad = body.grad = None
    body.sum().backward()
    collect.add()
    collect.combine()
    assert head.grad is None


def test_grad_may_be_cleared_in_place_or_dropped_and_other_losses_may_come_between():
    p = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([p], lr=0.1)
    collect = GradientCollector([p])
    for to_none in (False, True, False, False):
        for x in ([1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]):
            task(p, x)
            collect.add()
        assert collect.combine().effective.tolist() == [0.25, 0.5, -0.25]
        torch.nn.utils.clip_grad_norm_([p], 0.1)
        assert torch.autograd.grad((p**2).sum(), p)[0].shape == (2,)  # leaves .grad alone
        optimizer.step()
        copy.deepcopy(collect)
        optimizer.zero_grad(set_to_none=to_none)


@pytest.mark.parametrize("to_none", [False, True])
def test_a_penalty_may_be_added_to_the_combination(to_none):
    """Its backward finds the combination in ``.grad``, where it belongs until it is cleared."""
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.1)
    collect = GradientCollector([p])
    for _ in range(3):
        for x in ([1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]):
            for part in (0.25, 0.75):  # in two parts each
                task(p, [part * value for value in x])
            collect.add()
        assert collect.combine().effective.tolist() == [0.25, 0.5, -0.25]
        (p**2).sum().backward()
        assert p.grad is not None
        assert torch.equal(p.grad, torch.tensor([1.0, 0.5]) + 2 * p.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
        p.sum().backward()  # something to look at
        optimizer.zero_grad(set_to_none=to_none)
    task(p, [1.0, 0.0])
    collect.add()
    collect.combine()
    (p**2).sum().backward()
    task(p, [1.0, 0.0])
    with pytest.raises(InputError, match="last combination"):
        collect.add()


def test_a_combination_of_zeros_may_stay():
    p = nn.Parameter(torch.zeros(1))
    collect = GradientCollector([p], lambda rows: rows.new_zeros(len(rows)))
    for _ in range(3):
        task(p, [1.0])
        collect.add()
        assert collect.combine().effective.tolist() == [0.0]


def test_a_module_of_rows_is_told_what_it_was_given():
    p = nn.Parameter(torch.zeros(2))
    collect = GradientCollector([p], nn.Softmax(0))
    task(p, [1.0, 2.0])
    collect.add()
    with pytest.raises(AttributeError, match=r"use \.rows, or pass a plain function of rows"):
        collect.combine()


def test_accuracies_need_a_score():
    p = nn.Parameter(torch.zeros(2))
    collect = GradientCollector([p], DynamicTaskPrioritization(1))
    p.sum().backward()
    collect.add(loss=1.0)
    with pytest.raises(InputError, match="needs the score of every task"):
        collect.combine()


@pytest.mark.parametrize("missing", ["loss", "score", "update"])
def test_missing_argument_is_named(missing):
    p = nn.Parameter(torch.zeros(2))
    collect = GradientCollector([p], NeedsAll())
    for i in range(2):
        given = {"loss": 1.0, "score": 1.0, "update": [None]}
        if i:
            del given[missing]
        p.sum().backward()
        collect.add(**given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=rf"needs the {missing} of every task; .*{missing}="):
        collect.combine()
    assert len(collect) == 0


# errors


def test_bad_input():
    model = make_model()
    with pytest.raises(InputError, match=r"got a Sequential; pass model.parameters\(\)"):
        GradientCollector(model)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="parameters is empty"):
        GradientCollector([])
    with pytest.raises(InputError, match="must be tensors, got a tuple"):
        GradientCollector(model.named_parameters())  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"got torch\.complex64"):
        GradientCollector([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])
    with pytest.raises(InputError, match=r"no parameter requires gradients; call requires_grad_\("):
        GradientCollector([torch.zeros(2)])
    with pytest.raises(InputError, match="computed from others"):
        GradientCollector([torch.zeros(2, requires_grad=True) * 2])
    with pytest.raises(InputError, match="one device, got cpu and meta"):
        GradientCollector(
            [torch.zeros(2, requires_grad=True), torch.zeros(2, device="meta", requires_grad=True)]
        )

    collect = GradientCollector(model.parameters())
    with pytest.raises(InputError, match=r"combine\(\) found no task; call add\(\)"):
        collect.combine()
    with pytest.raises(InputError, match=r"add\(\) found no gradient on any parameter"):
        collect.add()
    model(torch.randn(4, 3, dtype=torch.float64)).sum().backward()
    with pytest.raises(InputError, match="update has 1 tensors for 4 parameters"):
        collect.add(update=[None])
    with pytest.raises(InputError, match=r"update 0 is torch.strided \(1,\); expected .* \(5, 3\)"):
        collect.add(update=[torch.zeros(1), None, None, None])
    for update, kind in (dict(model.named_parameters()), "a dict"), (torch.zeros(4), "a Tensor"):
        with pytest.raises(InputError, match=f"update is {kind}; it must be a list with one"):
            collect.add(update=update)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="update 1 is a float; it must be a list with one tensor"):
        collect.add(update=[None, 1.0, None, None])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"loss must be one number per task, got \(2,\)"):
        collect.add(loss=torch.zeros(2))
    collect.add()  # what was refused took no gradient away


def test_an_update_may_be_computed_on_the_way():
    model, tasks = make_model(), make_tasks()
    rows = rows_of(model, tasks)
    collect = GradientCollector(model.parameters(), GradientAgreement(signal="update"))
    for x, y in tasks:
        nn.functional.mse_loss(model(x), y).backward()
        collect.add(update=(p.grad for p in model.parameters()))
    assert torch.allclose(collect.combine().effective, agreement_weights(rows), rtol=1e-12)


def test_sparse_gradient_is_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match=r"gradient 0 is torch\.sparse_coo.*with sparse=False"):
        GradientCollector(embedding.parameters()).add()


@pytest.mark.parametrize(
    ("rule", "got"),
    [(lambda rows: rows[0], r"\(2,\)"), (lambda rows: None, "NoneType"), (nn.Identity(), "_Coll")],
)
def test_rule_that_gives_no_weights(rule, got):
    p = nn.Parameter(torch.zeros(2))
    collect = GradientCollector([p], rule)
    for _ in range(3):
        p.sum().backward()
        collect.add()
    with pytest.raises(InputError, match=rf"expected weights of shape \(3,\), got {got}"):
        collect.combine()


# what is handed in


def test_param_groups_are_parameters():
    model, tasks = make_model(), make_tasks()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.5}]  # type: ignore[index]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    collect = GradientCollector(optimizer.param_groups)
    rows = rows_of(model, tasks)
    for x, y in tasks:
        nn.functional.mse_loss(model(x), y).backward()
        collect.add()
    torch.testing.assert_close(collect.combine().effective, agreement_weights(rows))
    torch.testing.assert_close(flat_grad(model), agreement_weights(rows) @ rows)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), "got a SGD; pass model.param"),
        (None, "got a NoneType"),
        ([{"lr": 0.1}], "tensors, got a dict"),
        ([], "parameters is empty"),
        ([{"params": []}], "parameters is empty"),
    ],
)
def test_what_is_no_parameters(given, message):
    with pytest.raises(InputError, match=message):
        GradientCollector(given)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("gradnorm", r"got the name 'gradnorm'; make it: gametalearn.make_rule\('gradnorm'\)"),
        (Uniform, r"got the class Uniform; make one: Uniform\(...\)"),
        (torch.ones(4), "got a Tensor"),
    ],
)
def test_what_is_no_rule_is_refused_at_once(rule, message):
    with pytest.raises(InputError, match=f"`rule` must be a rule, or a function .*{message}"):
        GradientCollector(make_model().parameters(), rule)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_task(bad):
    """Of a function and of a rule; `.grad` stays as `add` left it."""

    def inverse_of_spread(rows: Tensor) -> Tensor:
        return torch.tensor([1.0, bad, 1.0])

    class Spread(nn.Module):
        def forward(self, gradients: TaskGradients) -> Weights:
            weights = inverse_of_spread(gradients.rows)
            return Weights(raw=weights, effective=weights)

    p = nn.Parameter(torch.zeros(2))
    for rule in (inverse_of_spread, Spread()):
        collect = GradientCollector([p], rule)
        for _ in range(3):
            p.sum().backward()
            collect.add()
        name = getattr(rule, "__name__", "Spread")
        with pytest.raises(InputError, match=f"rule {name}: the weight of task 1 is not finite"):
            collect.combine()
        assert p.grad is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": "a"}, "loss must be a number, got a str"),
        ({"score": [None]}, "score must be a number, got a list"),
        ({"group": "a"}, "group must be the number of the task's objective, got 'a'"),
        ({"group": 0.5}, "group must be the number of the task's objective, got 0.5"),
    ],
)
def test_what_is_no_number_is_refused(given, message):
    p = nn.Parameter(torch.zeros(2))
    collect = GradientCollector([p])
    p.sum().backward()
    with pytest.raises(InputError, match=message):
        collect.add(**given)
    assert p.grad is not None  # so that it can be added once more
    collect.add(loss=torch.tensor([1.0]), group=torch.tensor(3))  # type: ignore[arg-type]
    assert len(collect) == 1
