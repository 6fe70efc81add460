"""The laws of weighting rules, each named once; every rule runs through those that it declares."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gametalearn import RULES, InputError, TaskGradients, Weights, agreement_weights, make_rule
from tests.support.device import DEVICE

STEPS = 7
PARAMETERS = 30


@dataclass(frozen=True)
class Case:
    """A rule and the laws that it declares.

    Attributes:
        name: of the rule.
        options: for `make_rule`.
        objectives: whether raw weights are those of objectives (K,), not of tasks (T,).
        per_objective: whether it sees objectives at all, so that errors name them.
        scale: gradients and losses may be scaled together.
        alone_uniform: with one objective the weights are uniform, whatever the losses.
        zero: zero rows give equal weights.
        frozen: eval() keeps all state.
        stateful: earlier meta-batches matter.
        signed: weights may be negative.
    """

    name: str
    options: dict[str, Any]
    objectives: bool = False
    per_objective: bool = False
    scale: bool = True
    alone_uniform: bool = False
    zero: bool = True
    frozen: bool = True
    stateful: bool = False
    signed: bool = False

    def make(self, objectives: int | Sequence[int] = 3) -> nn.Module:
        rule = make_rule(self.name, objectives=objectives, **self.options)
        assert isinstance(rule, nn.Module)
        return rule

    def __str__(self) -> str:
        return "-".join([self.name, *map(str, self.options.values())])


DWA = {"period": 2, "temperature": 0.5}
CASES = [
    Case("uniform", {}, alone_uniform=True),
    Case("agreement", {}, signed=True),
    Case("agreement-update", {}, signed=True),
    Case("agreement-cosine", {}, signed=True),
    Case("norm-control", {}),
    Case("normalized-mean", {}),
    Case("geometric-median", {}),
    Case("screened-mean", {}, per_objective=True),  # these meta-batches never give it evidence
    Case("gradnorm", {}, objectives=True, alone_uniform=True, stateful=True),
    Case("uncertainty", {}, objectives=True, scale=False, stateful=True),
    Case("uncertainty-positive", {}, objectives=True, scale=False, stateful=True),
    Case("dwa", DWA, objectives=True, alone_uniform=True, stateful=True),
    Case("dtp", {}, objectives=True, scale=False, stateful=True),
]
CASES += [
    replace(c, options={**c.options, "within": "agreement"}, alone_uniform=False, signed=True)
    for c in CASES
    if c.objectives
]
# TorchJD's own rules, through the bridge: they compare with absolute epsilons, give zero rows
# weights of their own, and move their random generator at every call.
CASES += [
    Case("torchjd:MGDA", {}, scale=False, zero=False, frozen=False),
    Case("torchjd:IMTL-G", {}, scale=False, zero=False, frozen=False, signed=True),
    Case("torchjd:AlignedMTL", {}, scale=False, zero=False, frozen=False, signed=True),
]

every = pytest.mark.parametrize("case", CASES, ids=str)


def declaring(law: Callable[[Case], bool]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [c for c in CASES if law(c)], ids=str)


def batch(
    seed: int,
    group: Sequence[int] = (0, 1, 2, 0, 1, 2, 0, 0),
    dtype: torch.dtype = torch.float64,
) -> TaskGradients:
    generator = torch.Generator().manual_seed(seed)
    tasks = len(group)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

    common = draw(1, PARAMETERS) - 0.3
    return TaskGradients(
        rows=(draw(tasks, PARAMETERS) - 0.5 + common).to(dtype),
        updates=(draw(tasks, PARAMETERS) - 0.5 + common).to(dtype),
        loss=(0.1 + draw(tasks) * torch.tensor([1.0 + g for g in group], device=DEVICE)).to(dtype),
        score=(0.2 + 0.6 * draw(tasks)).to(dtype),
        group=torch.tensor(group, device=DEVICE),
    )


def permuted(gradients: TaskGradients, order: Tensor) -> TaskGradients:
    return TaskGradients(**{name: value[order] for name, value in vars(gradients).items()})


def scaled(gradients: TaskGradients, factor: float) -> TaskGradients:
    return replace(
        gradients,
        rows=gradients.rows * factor,
        updates=gradients.updates * factor,
        loss=gradients.loss * factor,
    )


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal, to the bit."""
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def test_every_name_has_a_case() -> None:
    assert {c.name for c in CASES if not c.name.startswith("torchjd:")} == set(RULES)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_have_the_rows_dtype_and_device_and_no_graph(
    case: Case, dtype: torch.dtype
) -> None:
    rule = case.make()
    for step in range(STEPS):
        gradients = batch(step, dtype=dtype)
        before = {name: value.clone() for name, value in vars(gradients).items()}
        gradients.rows.requires_grad_()
        weights: Weights = rule(gradients)
        assert weights.effective.shape == (8,)
        assert weights.raw.shape == ((3,) if case.objectives else (8,))
        for tensor in (weights.raw, weights.effective):
            assert tensor.dtype == dtype
            assert tensor.device == gradients.rows.device
            assert not tensor.requires_grad
            assert torch.isfinite(tensor).all()
            assert case.signed or (tensor >= 0).all()
        for name, value in before.items():
            assert torch.equal(getattr(gradients, name), value)


@every
def test_permutation_equivariance(case: Case) -> None:
    one, other = case.make(), case.make()
    for step in range(STEPS):
        gradients = batch(step)
        order = torch.randperm(8, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        weights, moved = one(gradients), other(permuted(gradients, order))
        torch.testing.assert_close(moved.effective, weights.effective[order])
        expected = weights.raw if case.objectives else weights.raw[order]
        torch.testing.assert_close(moved.raw, expected)


@declaring(lambda case: case.scale)
@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1e3, 1e30])
def test_scale_invariance(case: Case, factor: float) -> None:
    one, other = case.make(), case.make()
    for step in range(STEPS):
        gradients = batch(step, dtype=torch.float32)
        weights, same = one(gradients), other(scaled(gradients, factor))
        torch.testing.assert_close(same.effective, weights.effective, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(same.raw, weights.raw, rtol=1e-4, atol=1e-5)


@every
def test_one_task(case: Case) -> None:
    rule = case.make()
    for step in range(STEPS):
        gradients = batch(step, group=[1])
        weights = rule(gradients)
        expected = weights.raw[1:2] if case.objectives else gradients.rows.new_ones(1)
        torch.testing.assert_close(weights.effective, expected)


@declaring(lambda case: case.zero)
def test_zero_rows_give_equal_weights_to_the_tasks_of_an_objective(case: Case) -> None:
    rule = case.make()
    for step in range(STEPS):
        gradients = scaled(batch(step), 0)
        weights = rule(gradients)
        for group in range(3):
            of_group = weights.effective[gradients.group == group]
            torch.testing.assert_close(of_group, of_group[:1].expand_as(of_group))
        if not case.objectives:
            torch.testing.assert_close(weights.effective, torch.full_like(weights.effective, 1 / 8))


@every
def test_opposing_rows(case: Case) -> None:
    rule = case.make()
    for step in range(STEPS):
        half = batch(step, group=(0, 1, 2, 0))
        opposed = TaskGradients.cat([half, replace(half, rows=-half.rows, updates=-half.updates)])
        weights = rule(opposed)
        assert torch.isfinite(weights.effective).all()
        # They cancel in every objective, so every rule falls back to equal weights there.
        torch.testing.assert_close(weights.effective[:4], weights.effective[4:])


@every
def test_rows_of_rank_one(case: Case) -> None:
    rule = case.make()
    for step in range(STEPS):
        gradients = batch(step)
        gradients = replace(
            gradients, rows=torch.linspace(-1, 2, 8).to(gradients.rows).outer(gradients.rows[0])
        )
        assert torch.isfinite(rule(gradients).effective).all()


@every
def test_a_state_restored_mid_run_gives_the_same_next_weights(case: Case) -> None:
    rule = case.make()
    for step in range(STEPS):
        rule(batch(step))
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    restored = case.make()
    restored.load_state_dict(torch.load(file, weights_only=True))
    fresh, differs = case.make(), False
    for step in range(STEPS, 2 * STEPS):
        weights, same = rule(batch(step)), restored(batch(step))
        assert torch.equal(same.raw, weights.raw)
        assert torch.equal(same.effective, weights.effective)
        differs |= not torch.equal(fresh(batch(step)).raw, weights.raw)
    assert differs == case.stateful


@declaring(lambda case: case.frozen)
def test_eval_changes_no_state(case: Case) -> None:
    rule = case.make()
    for step in range(STEPS):
        rule(batch(step))
    rule.eval()
    before = deepcopy(rule.state_dict())
    first = rule(batch(50))
    for step in range(STEPS):
        rule(batch(step))
    again = rule(batch(50))
    assert torch.equal(first.effective, again.effective)
    assert same(rule.state_dict(), before)


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_refused_by_name(case: Case, bad: float) -> None:
    rule = case.make()
    rule(batch(0))
    state = deepcopy(rule.state_dict())
    gradients = batch(1)
    gradients.rows[5, 3] = bad
    names = case.objectives or case.per_objective
    named = r"gradient of task 5 \(objective 2\)" if names else "gradient of task 5"
    with pytest.raises(InputError, match=f"{named} is not finite"):
        rule(gradients)
    assert same(rule.state_dict(), state)


# Laws of the rules over objectives.

objectives = declaring(lambda case: case.objectives)


@objectives
def test_the_update_is_the_weighted_mean_of_the_objectives_gradients(case: Case) -> None:
    rule = case.make()
    for step in range(STEPS):
        gradients = batch(step)
        weights = rule(gradients)
        wanted = gradients.rows.new_zeros(PARAMETERS)
        for k in range(3):
            rows = gradients.rows[gradients.group == k]
            if case.options.get("within") == "agreement":
                wanted += weights.raw[k] / 3 * (agreement_weights(rows) @ rows)
            else:
                wanted += weights.raw[k] / 3 * rows.mean(0)
        torch.testing.assert_close(weights.effective @ gradients.rows, wanted)


@objectives
def test_an_absent_objective_keeps_its_weight_and_its_state(case: Case) -> None:
    rule = case.make()
    for step in range(8):  # whole epochs of dwa
        rule(batch(step))
    rule.eval()
    before = rule(batch(100, group=[0])).raw
    rule.train()
    for step in range(STEPS):
        weights = rule(batch(step, group=[0, 2, 0, 0]))
        assert weights.effective.abs().sum() > 0
    assert weights.raw[1] == before[1]
    assert weights.raw[0] != before[0]


@objectives
def test_those_present_are_averaged(case: Case) -> None:
    """With raw weights of 1 the update is the mean over the objectives that are there."""
    if case.name in ("gradnorm", "dwa"):
        weights = case.make()(batch(0, group=[0, 2]))
        assert weights.effective.tolist() == [0.5, 0.5]
    weights = case.make()(batch(0, group=[0, 2]))
    torch.testing.assert_close(weights.effective, weights.raw[[0, 2]] / 2)


@objectives
def test_identity_is_the_group_not_the_position(case: Case) -> None:
    one, other = case.make(3), case.make([70, -5, 12])
    names = torch.tensor([70, -5, 12], device=DEVICE)
    for step in range(STEPS):
        gradients = batch(step, group=[2, 1, 0, 2] if step % 2 else [0, 1])
        weights = one(gradients)
        named = other(replace(gradients, group=names[gradients.group]))
        assert torch.equal(weights.raw, named.raw)
        assert torch.equal(weights.effective, named.effective)


@objectives
def test_an_unknown_group_is_refused(case: Case) -> None:
    with pytest.raises(
        InputError, match=r"task 2 belongs to group 3, .* objectives are 0, 1, 2; m"
    ):
        case.make()(batch(0, group=[0, 1, 3]))


@objectives
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused_by_name(case: Case, bad: float) -> None:
    gradients = batch(1)
    gradients.loss[4] = bad
    with pytest.raises(InputError, match=r"loss of task 4 \(objective 1\) is not finite"):
        case.make()(gradients)


@declaring(lambda case: case.alone_uniform)
def test_one_objective_is_uniform(case: Case) -> None:
    rule = case.make(1)
    for step in range(STEPS):
        weights = rule(batch(step, group=[0] * 5))
        torch.testing.assert_close(weights.effective, torch.full_like(weights.effective, 0.2))
        if case.objectives:
            assert weights.raw.tolist() == [1.0]


@declaring(lambda case: case.objectives and case.alone_uniform)
def test_the_weights_sum_to_the_number_of_objectives(case: Case) -> None:
    rule = case.make()
    for step in range(20):
        groups = [(0, 1, 2), (0, 2, 2), (1, 1, 0), (1,)][step % 4]
        assert float(rule(batch(step, group=groups)).raw.sum()) == pytest.approx(3, abs=1e-12)


@declaring(lambda case: case.stateful)
def test_the_weights_leave_uniform(case: Case) -> None:
    rule = case.make()
    for step in range(STEPS):
        raw = rule(batch(step)).raw
    assert float(raw.max() - raw.min()) > 1e-3


@objectives
def test_tasks_of_a_single_objective_are_told(case: Case) -> None:
    """Those of a `TaskBatch` without groups belong to objective 0, and weights were uniform without a word."""
    one = batch(0, group=[1] * 16)
    told = "first 64 tasks belong to one objective, 1, of the 3 of this rule.*group="
    rule = case.make()
    for _ in range(3):
        rule(one)
    with pytest.warns(UserWarning, match=told):
        rule(one)
    rule(one)  # once is enough
    two = case.make()
    two(batch(0, group=[0, 1, 1, 1]))
    for _ in range(6):
        two(one)
