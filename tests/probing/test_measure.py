"""Gains on a quadratic problem against their closed form, and what a probe leaves as it was."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gametalearn
from gametalearn import (
    MAML,
    MLP,
    Disagreement,
    InputError,
    MixedSource,
    Sinusoid,
    TaskBatch,
    TaskGradients,
    Uniform,
    Weights,
    make_rule,
    probe,
)
from gametalearn.probing import through
from gametalearn.probing.measure import Update

SIZE, SUPPORT, QUERY, RATE = 6, 4, 5, 0.1


class Lines:
    """Linear regression, each task with slopes and a scale of its own; keeps what it drew."""

    def __init__(self, seed=0, log=None):
        self.seed, self.log = seed, [] if log is None else log
        self.random = torch.Generator().manual_seed(seed)

    def sample(self, num_tasks):
        def draw(*shape):
            return torch.randn(num_tasks, *shape, generator=self.random, dtype=torch.float64)

        x = draw(SUPPORT + QUERY, SIZE)
        y = x @ (draw(SIZE, 1) + 1) * (1 + draw(1, 1).abs()) + 0.3 * draw(SUPPORT + QUERY, 1)
        group = torch.zeros(num_tasks, dtype=torch.int64)
        s = slice(0, SUPPORT), slice(SUPPORT, None)
        batch = TaskBatch(x[:, s[0]], y[:, s[0]], x[:, s[1]], y[:, s[1]], group)
        self.log.append((self.seed, batch))
        return batch

    def with_seed(self, seed):
        return Lines(seed, self.log)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def closed_form(theta, batch):
    """Losses ``(T,)`` after one inner step and their exact gradients ``(T, P)``, by numpy alone."""
    losses, rows = [], []
    fields = ("support_x", "support_y", "query_x", "query_y")
    for xs, ys, xq, yq in zip(*(getattr(batch, f).numpy() for f in fields), strict=True):
        adapted = theta - RATE * 2 / SUPPORT * xs.T @ (xs @ theta - ys[:, 0])
        rest = xq @ adapted - yq[:, 0]
        losses.append((rest**2).mean())
        rows.append((np.eye(SIZE) - RATE * 2 / SUPPORT * xs.T @ xs) @ xq.T @ rest * 2 / QUERY)
    return np.array(losses), np.array(rows)


def direction(rule, rows):
    """The update of a rule, by its formula."""
    lengths = np.linalg.norm(rows, axis=1)
    if rule == "agreement":
        s = rows @ rows.sum(0)
        return s / np.abs(s).sum() @ rows
    if rule == "normalized-mean":
        return (rows / lengths[:, None]).mean(0) * lengths.mean()
    return rows.mean(0)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def adam_step(theta, update, moments, lr):
    """Adam's second step from the moments of a first one (Kingma & Ba 2015, algorithm 1)."""
    first, second = moments
    first, second = 0.9 * first + 0.1 * update, 0.999 * second + 0.001 * update**2
    return theta - lr * first / (1 - 0.9**2) / (np.sqrt(second / (1 - 0.999**2)) + 1e-8)


RULES = ["agreement", "normalized-mean", "uniform"]


def test_gains_on_a_quadratic_problem_equal_the_closed_form():
    torch.manual_seed(0)
    model, source, tasks, batches = nn.Linear(SIZE, 1, bias=False).double(), Lines(), 5, 4
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    first = torch.randn(1, SIZE, dtype=torch.float64)
    start = model.weight.detach().clone()
    model.weight.grad = first
    optimizer.step()
    with torch.no_grad():
        model.weight.copy_(start)
    found = probe(
        model, source, MAML(RATE, 1), RULES, meta_batch=tasks, meta_batches=batches,
        reference=3 * tasks, length=0.4, optimizer=through(optimizer),
    )  # fmt: skip
    theta = start.numpy()[0]
    moments = 0.1 * first.numpy()[0], 0.001 * first.numpy()[0] ** 2
    drawn = [batch for _, batch in source.log]
    others = [closed_form(theta, batch)[1] for batch in drawn[:3]]
    true = np.concatenate(others).mean(0)
    rate = 0.4 / np.mean([np.linalg.norm(rows.mean(0)) for rows in others])
    assert found.rate == pytest.approx(rate)
    assert found.reference == 15
    assert len(drawn) == 3 + 2 * batches
    assert len({seed for seed, _ in source.log}) == 3
    for b in range(batches):
        rows = closed_form(theta, drawn[3 + 2 * b])[1]
        pair = {"same": drawn[3 + 2 * b][:4], "fresh": drawn[4 + 2 * b]}
        for r, rule in enumerate(RULES):
            update = direction(rule, rows)
            points = {
                "length": theta - 0.4 * update / np.linalg.norm(update),
                "plain": theta - rate * update,
                "optimizer": adam_step(theta, update, moments, 0.02),
            }
            for step, point in points.items():
                for of, batch in pair.items():
                    before = closed_form(theta, batch)[0].mean()
                    gain = before - closed_form(point, batch)[0].mean()
                    assert found.before[of][b] == pytest.approx(before, rel=1e-12)
                    assert found.gains[step][of][r, b] == pytest.approx(gain, abs=1e-12)
            assert found.size[r, b] == pytest.approx(np.linalg.norm(update))
            assert found.cosine_uniform[r, b] == pytest.approx(cosine(update, rows.mean(0)))
            assert found.cosine_true[r, b] == pytest.approx(cosine(update, true))
    assert found.effective_tasks[2] == pytest.approx(tasks)
    assert torch.equal(model.weight, start)


def sinusoid(seed=0, rules=RULES, source=None, **more):
    torch.manual_seed(1)
    settings = {"meta_batch": 6, "meta_batches": 25, "reference": 60, "seed": seed} | more
    model = MLP(1, 1, (16,))
    return probe(model, Sinusoid() if source is None else source, MAML(0.01), rules, **settings)


def test_another_seed_is_another_sample_of_the_same_gains():
    one, other = sinusoid(0), sinusoid(1)
    for step in ("length", "plain"):
        for tasks in ("same", "fresh"):
            for rule in RULES:
                a, b = one.gain(rule, step, tasks), other.gain(rule, step, tasks)
                assert 0 < abs(a.mean - b.mean) < a.half + b.half
    again = sinusoid(0)
    assert np.array_equal(one.gains["length"]["fresh"], again.gains["length"]["fresh"])


def test_pairs_are_more_precise_than_their_parts():
    found = sinusoid()
    for rule in ("agreement", "normalized-mean"):
        assert found.difference(rule).half < 0.7 * found.gain(rule).half
        own, base = found.gain(rule).mean, found.gain("uniform").mean
        assert found.difference(rule).mean == pytest.approx(own - base)
    assert found.p_holm().keys() == {"agreement", "normalized-mean"}


def test_at_one_length_the_norm_control_is_uniform():
    """To the bit: a difference of roundings is none, however it is tested."""
    found = sinusoid(rules=["norm-control", "agreement", "uniform"])
    for tasks in ("same", "fresh"):
        assert np.array_equal(*found.gains["length"][tasks][[0, 2]])
    assert found.difference("norm-control").p_value == 1
    assert found.p_holm()["norm-control"] == 1
    assert (found.gains["length"]["fresh"][1] != found.gains["length"]["fresh"][2]).all()
    one, other = found.gains["plain"]["fresh"][[0, 2]]
    assert not np.allclose(one, other, rtol=0.01)
    assert found.cosine_uniform[0] == pytest.approx(1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tasks=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    common=st.sampled_from([0.0, 0.1, 10.0]),
    seed=st.integers(0, 99),
)
def test_updates_are_the_same_up_to_rounding_and_no_further(tasks, dtype, common, seed):
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(tasks, 200, generator=random, dtype=dtype)
    rows = (rows + common) * 10 ** torch.randn(tasks, 1, generator=random, dtype=dtype)
    norms, weights = rows.double().norm(dim=1), rows.new_full((tasks,), 1 / tasks)
    one = Update.of(weights @ rows, weights, norms)
    longer = Update.of((1.7 * weights) @ rows, 1.7 * weights, norms)
    order = torch.randperm(tasks, generator=random)
    summed = Update.of((rows[order] / tasks).sum(0), weights, norms[order])
    assert summed.same(one, "plain")
    assert summed.same(one, "length")
    assert one.same(longer, "length")
    assert not one.same(longer, "plain")
    eps = torch.finfo(dtype).eps
    turned = one.vector + 100 * eps * norms.mean() * torch.randn(200, generator=random, dtype=dtype)
    assert not Update.of(turned, weights, norms).same(one, "length")


def test_disturbed_tasks_are_measured_undisturbed_too():
    none = sinusoid(source=Disagreement(Sinusoid(), 0.0), meta_batches=4)
    assert none.aim == "clean"
    for step in ("length", "plain"):
        assert np.array_equal(none.gains[step]["clean"], none.gains[step]["fresh"])
    some = sinusoid(source=Disagreement(Sinusoid(), 0.5, "permuted"), meta_batches=4)
    assert np.array_equal(some.before["clean"], none.before["clean"])  # the very same tasks
    assert (some.before["fresh"] != some.before["clean"]).all()
    assert not np.array_equal(some.before["same"], none.before["same"])
    assert sinusoid(meta_batches=4).aim == "fresh"


def test_rules_of_ones_own_and_an_update_of_zero():
    class Nothing(nn.Module):
        def forward(self, gradients: TaskGradients) -> Weights:
            none = torch.zeros(len(gradients))
            return Weights(none, none)

    found = sinusoid(rules={"mine": Uniform(), "nothing": Nothing()}, meta_batches=3)
    assert found.baseline == "mine"
    assert (found.gains["length"]["same"][1] == 0).all()
    assert (found.cosine_uniform[1] == 0).all()
    assert found.gains["length"]["same"][0].mean() > 0


def test_nothing_is_changed():
    torch.manual_seed(0)
    model = MLP(1, 1, (8,))
    optimizer = torch.optim.Adam(model.parameters())
    torch.stack([p.sum() for p in model.parameters()]).sum().backward()
    optimizer.step()
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    source = Sinusoid()
    state = source.state_dict()["generator"].clone()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    step = through(optimizer, clip_norm=0.1, lr=9.0)
    probe(model, source, MAML(0.01), ["uniform", "agreement"], optimizer=step,
          meta_batch=2, meta_batches=3, reference=2)  # fmt: skip
    assert torch.equal(torch.rand(3), wanted)
    assert torch.equal(source.state_dict()["generator"], state)
    after = [model.state_dict(), optimizer.state_dict()]
    assert str(after) == str(before)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_the_step_is_the_one_that_the_optimiser_takes():
    for make in (
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.AdamW([{"params": p[:1]}, {"params": p[1:], "lr": 0.3}]),
    ):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4))]
        optimizer = make(weights)
        for _ in range(3):
            for w in weights:
                w.grad = torch.randn_like(w)
            optimizer.step()
        update = torch.randn(10)
        found = through(optimizer)(dict(zip("ab", weights, strict=True)), update)
        assert all(not p.requires_grad for p in found.values())
        weights[0].grad, weights[1].grad = update[:6].view(2, 3), update[6:]
        optimizer.step()
        assert torch.equal(found["a"], weights[0])
        assert torch.equal(found["b"], weights[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"meta_batches": 0}, "`meta_batches` must be at least 1, got 0"),
        ({"reference": 0}, "`reference` must be at least 1, got 0"),
        ({"length": 0.0}, "`length` must be a positive, finite number, got 0.0"),
        ({"rules": []}, "`rules`: name one or more"),
        ({"rules": "uniform"}, "a list of names, such as"),
        ({"rules": ["unifrom"]}, "unknown rule 'unifrom'; did you mean 'uniform'"),
        (
            {"length": 1e30},
            r"rule 'agreement' \(all updates at one length\) .* 25 of 25 .*`length`",
        ),
    ],
)
def test_what_cannot_be_probed_is_said(settings, message):
    with pytest.raises(InputError, match=message):
        sinusoid(**settings)


def test_an_optimiser_of_other_tensors_is_refused():
    other = torch.optim.SGD(MLP(1, 1, (16,)).parameters(), lr=0.1)
    with pytest.raises(InputError, match="holds other tensors than the meta-parameters"):
        sinusoid(optimizer=through(other))


def test_a_model_that_is_not_finite_is_no_rules_fault():
    model = MLP(1, 1, (4,))
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(InputError, match="not finite"):
        probe(model, Sinusoid(), MAML(0.01), ["uniform"], meta_batch=2, meta_batches=2, reference=2)


def test_it_is_public():
    assert gametalearn.probe is probe


def test_a_rule_of_ones_own_keeps_its_state():
    """Probes that follow each other start alike."""
    own: Any = {"uniform": Uniform(), "dwa": make_rule("dwa", objectives=1)}
    before = copy.deepcopy(own["dwa"].state_dict())
    first, again = (sinusoid(rules=own, meta_batches=3) for _ in range(2))
    assert str(own["dwa"].state_dict()) == str(before)
    assert np.array_equal(first.gains["plain"]["fresh"], again.gains["plain"]["fresh"])


def test_an_optimiser_is_taken_as_it_is():
    made = []
    for wrapped in (lambda o: o, through):
        torch.manual_seed(0)
        model = MLP(1, 1, (8,))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        found = probe(model, Sinusoid(), MAML(0.01), ["uniform"], optimizer=wrapped(optimizer),
                      meta_batch=4, meta_batches=3, reference=4)  # fmt: skip
        made.append(found.gains["optimizer"]["fresh"])
    assert np.array_equal(made[0], made[1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rules": [Uniform()]}, "a list with a Uniform, and takes names; .* {'mine': rule}"),
        ({"rules": {"mine": "agreement"}}, "`rules` 'mine' must be a rule; got the name 'agreement'"),
        ({"rules": {"mine": Uniform}}, "got the class Uniform; make one: Uniform"),
        ({"rules": {"mine": lambda g: torch.ones(2)}}, r"rule mine: expected weights of .*\(6,\), got"),
        ({"rules": {"mine": lambda g: torch.full((6,), math.nan)}}, r"rule mine: its weights are not finite \(\["),
        ({"rules": 3}, "`rules` must be a list of names, .* got 3"),
        ({"length": "0.1"}, "`length` must be a positive, finite number, got '0.1'"),
        ({"length": math.nan}, "`length` must be a positive, finite number, got nan"),
        ({"seed": None}, "`seed` must be an integer, got None"),
        ({"source": [1]}, "`source` must be a source of episodes .* got a list"),
        ({"clean": 3}, "`clean` must be a source of episodes .* got a int"),
        ({"clean": Sinusoid(shots=3)}, r"'support_x' of a task is \(10, 1\) in batch 0 and \(3, 1\)"),
        ({"optimizer": torch.optim.Adam}, "`optimizer` must be an optimiser, .* got the class Adam"),
        ({"optimizer": "adam"}, "`optimizer` must be an optimiser, .* got a str"),
    ],
)  # fmt: skip
def test_what_is_given_for_something_else_is_said(given, message):
    with pytest.raises(InputError, match=message):
        sinusoid(**{"meta_batches": 3, **given})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("foo",), "no rule 'foo'; it has agreement, normalized-mean, uniform"),
        (("uniform", "optimizer"), "no step 'optimizer'; it has length, plain"),
        (("uniform", "plain", "clean"), "no tasks 'clean'; it has same, fresh"),
    ],
)
def test_what_a_probe_has_not_measured_is_said(asked, message):
    found = sinusoid(meta_batches=3)
    for method in (found.gain, found.difference):
        with pytest.raises(InputError, match=message):
            method(*asked)


def test_a_name_is_no_learner():
    with pytest.raises(InputError, match="a str is no learner; pass one"):
        probe(MLP(1, 1, (4,)), Sinusoid(), "maml", ["uniform"])  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["agreement-update", "mine"])
def test_without_inner_steps_there_are_no_inner_updates_to_compare(rule):
    """They were all zero, and the rule was uniform without a word."""
    rules = {rule: make_rule("agreement-update")}
    given: Any = {"meta_batch": 4, "meta_batches": 3, "reference": 4}
    with pytest.raises(InputError, match=f"rule '{rule}' compares inner updates, and with 0 inner"):
        probe(MLP(1, 1, (4,)), Sinusoid(), MAML(0.01, steps=0), rules, **given)


class Constant:
    """Tasks whose gradient is known: the model is one number, and its loss (theta - c)^2."""

    def __init__(self, centre, seed=0):
        self.centre, self.seed = centre, seed

    def sample(self, num_tasks):
        x = torch.ones(num_tasks, 1, 1, dtype=torch.float64)
        y = torch.full((num_tasks, 1, 1), self.centre, dtype=torch.float64)
        return TaskBatch(x, y, x, y, torch.zeros(num_tasks, dtype=torch.int64))

    def with_seed(self, seed):
        return Constant(self.centre, seed)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("centres", [(1.0, 3.0), (3.0, 1.0)])
@pytest.mark.parametrize("tasks", [4, 8, 16])
def test_own_tasks_are_of_all_objectives(centres, tasks):
    """The first ones of a meta-batch are of the first objective alone."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.zero_()
    source = MixedSource([Constant(c) for c in centres])
    found = probe(model, source, MAML(0.25, 1), ["uniform"], meta_batch=tasks, meta_batches=2,
                  reference=tasks, length=0.1)  # fmt: skip
    before, after = (1 + 9) / 8, (0.9**2 + 2.9**2) / 8  # an inner step halves the distance
    for kind in ("same", "fresh"):
        np.testing.assert_allclose(found.gains["length"][kind][0], before - after)


def test_parameters_of_zero_have_no_default_length():
    """Every step had the length zero, and every gain was zero without a word."""
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    given: Any = {"meta_batch": 4, "meta_batches": 3, "reference": 4}
    with pytest.raises(InputError, match=r"all parameters are zero, .* pass `length`"):
        probe(model, Sinusoid(), MAML(0.01, 1), ["uniform"], **given)
    found = probe(model, Sinusoid(), MAML(0.01, 1), ["uniform"], length=0.01, **given)
    assert found.gains["length"]["same"].all()
