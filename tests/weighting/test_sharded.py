"""Rules over rows that stay where they are, in threads that play the processes of a run."""

import functools
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gametalearn import (
    RULES,
    GradientAgreement,
    InputError,
    TaskGradients,
    Uniform,
    Weights,
    make_rule,
)
from gametalearn.distributed import ALONE, Team, describe_team, weighted_update
from gametalearn.weighting import Rule, ShardedGradients

F64 = torch.float64
Found = tuple[Weights, Tensor]


@dataclass(frozen=True)
class Member(Team):
    """A thread that plays one of the processes; ``sent`` is what it handed to each collective."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    box: list[Any] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)

    def exchanged(self, values: Tensor) -> Tensor:
        self.sent.append(values.numel())
        self.box[self.rank] = values.clone()
        self.barrier.wait(60)
        every = torch.stack(self.box)
        self.barrier.wait(60)
        return every

    def total(self, values: Tensor) -> Tensor:
        return values.copy_(self.exchanged(values).sum(0))

    def largest(self, values: Tensor) -> Tensor:
        return values.copy_(self.exchanged(values).amax(0))


def record(rows: Tensor, updates: Tensor | None = None) -> TaskGradients:
    count = len(rows)
    return TaskGradients(
        rows=rows,
        updates=rows.flip(1) + 0.1 * rows if updates is None else updates,
        loss=torch.linspace(0.5, 2, count, dtype=rows.dtype),
        score=torch.linspace(0, 1, count, dtype=rows.dtype),
        group=torch.arange(count) % 3,
    )


def of_team(
    size: int, make: Callable[[], Rule], whole: TaskGradients
) -> tuple[list[Found], list[int]]:
    """What every process finds for its share of the tasks, and what each sent for the rule.

    An error is raised if it is the same on all; one that fails alone leaves the others waiting.
    """
    barrier, box, count = threading.Barrier(size), [None] * size, len(whole)

    def work(rank: int) -> tuple[Found, list[int]] | InputError:
        team = Member(rank, size, barrier, box)
        own = team.share(count)
        part = TaskGradients(*(getattr(whole, name)[own] for name in FIELDS))
        try:
            tasks = team.tasks(part, count, stop=False)
            team.sent.clear()
            return weighted_update(make(), part, tasks, team), team.sent
        except InputError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(work, range(size)))
    every = [one for one in found if not isinstance(one, InputError)]
    if errors := [one for one in found if isinstance(one, InputError)]:
        assert not every
        assert len(set(map(str, errors))) == 1
        raise errors[0]
    for (weights, update), sent in every[1:]:  # the same to the bit
        assert sent == every[0][1]
        assert torch.equal(update, every[0][0][1])
        assert torch.equal(weights.raw, every[0][0][0].raw)
        assert torch.equal(weights.effective, every[0][0][0].effective)
    return [found for found, _ in every], every[0][1]


FIELDS = ("rows", "updates", "loss", "score", "group")


# ---------------------------------------------------------------------------------------------
# the built-in rules


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def agreement_oracle(vectors: Tensor, normalize: bool) -> list[float]:
    """The formula as it is printed, one product at a time, in Python's floats; and its fallback."""
    eps = torch.finfo(vectors.dtype).eps
    top = float(vectors.abs().max()) or 1.0
    rows = [[x / top for x in row] for row in vectors.tolist()]
    if normalize:
        tops = [max(map(abs, row)) or 1.0 for row in vectors.tolist()]
        rows = [[x / t for x in row] for row, t in zip(vectors.tolist(), tops, strict=True)]
        lengths = [math.sqrt(dot(row, row)) or 1.0 for row in rows]
        rows = [[x / length for x in row] for row, length in zip(rows, lengths, strict=True)]
    s = [math.fsum(dot(a, b) for b in rows) for a in rows]
    size, bound = math.fsum(map(abs, s)), math.fsum(math.sqrt(dot(row, row)) for row in rows) ** 2
    if len(s) == 1 or size <= 4 * eps * bound:
        return [1 / len(s)] * len(s)
    return [x / size for x in s]


def constructed(kind: str, tasks: int, size: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # quarters, of which sums are exact: what cancels does so here and there
    rows = torch.randint(-8, 9, (tasks, size), generator=generator).double() / 4
    far = 1e150 if dtype == torch.float64 else 1e15
    if kind == "zero":
        rows = torch.zeros_like(rows)
    elif kind == "opposing":
        rows = torch.cat([rows, -rows])
    elif kind == "huge":
        rows = rows * far
    elif kind == "tiny":
        rows = rows / far
    elif kind == "one of many":
        rows[1:] = 0
    return rows.to(dtype)


@pytest.mark.parametrize("kind", ["random", "zero", "opposing", "huge", "tiny", "one of many"])
@given(
    tasks=st.integers(1, 7),
    size=st.integers(1, 12),
    members=st.integers(2, 4),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
@settings(max_examples=12, deadline=None)
def test_agreement_and_its_control_equal_an_oracle(kind, tasks, size, members, seed, dtype):
    rows = constructed(kind, tasks, size, seed, dtype)
    whole = record(rows)
    top = float(rows.abs().max())
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    exact = rows.double()
    for name in ("agreement", "agreement-update", "agreement-cosine", "norm-control"):
        vectors = whole.updates if name == "agreement-update" else rows
        wanted = torch.tensor(agreement_oracle(vectors, name == "agreement-cosine"), dtype=F64)
        if name == "norm-control":
            scaled = exact / (top or 1.0)
            length, own = (wanted @ scaled).norm(), scaled.mean(0).norm()
            uniform = torch.full_like(wanted, 1 / len(rows))
            wanted = uniform * (1.0 if torch.equal(wanted, uniform) else float(length / own))
        found, _ = of_team(members, functools.partial(make_rule, name), whole)
        weights, update = found[0]
        assert weights.effective.dtype == update.dtype == dtype
        largest = max(1.0, float(wanted.abs().max()))
        error = (weights.effective.double() - wanted).abs().max()
        assert error <= tolerance * largest, name
        error = (update.double() - wanted @ exact).abs().max()
        assert error <= tolerance * len(rows) * largest * top, name


@given(
    tasks=st.integers(3, 9),
    size=st.integers(1, 60),
    members=st.integers(2, 5),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=10, deadline=None)
def test_every_rule_finds_what_it_finds_of_all_rows(tasks, size, members, seed):
    generator = torch.Generator().manual_seed(seed)
    whole = record(torch.randn(tasks, size, generator=generator, dtype=torch.float64) + 0.3)
    for name in RULES:
        options: list[dict[str, Any]] = [{}, {"balance": (3, 1, 2)}, {"within": "agreement"}]
        for own in options:
            make = functools.partial(make_rule, name, objectives=3, **own)
            alone, wanted = weighted_update(make(), whole, ALONE.tasks(whole, tasks, stop=False))
            weights, update = of_team(members, make, whole)[0][0]
            torch.testing.assert_close(weights.raw, alone.raw, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(weights.effective, alone.effective, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(update, wanted, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("normalize", [False, True])
def test_many_tasks_and_columns_in_several_slices(normalize):
    rows = torch.randn(600, 1500, generator=torch.Generator().manual_seed(0)) + 0.05
    whole = record(rows, rows[:, :7])
    weights, update = of_team(2, lambda: GradientAgreement(normalize=normalize), whole)[0][0]
    exact = rows.double()
    unit = exact / exact.norm(dim=1, keepdim=True) if normalize else exact
    s = unit @ unit.sum(0)
    wanted = s / s.abs().sum()
    torch.testing.assert_close(weights.effective.double(), wanted, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(update.double(), wanted @ exact, rtol=1e-5, atol=1e-6)


def test_the_control_is_uniform_where_both_lengths_are_rounding_errors():
    for seed in range(5):
        rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed), dtype=F64)
        rows = torch.cat([rows, -rows.flip(0)])
        weights, update = of_team(3, lambda: make_rule("norm-control"), record(rows))[0][0]
        assert weights.effective.tolist() == [1 / 8] * 8
        assert update.abs().max() < 1e-15


def test_an_update_that_is_not_finite_is_the_same_error_on_all():
    whole = record(torch.ones(5, 3), torch.ones(5, 3))
    whole.updates[3, 1] = math.nan
    with pytest.raises(InputError, match="gradient of task 3 is not finite"):
        of_team(2, lambda: GradientAgreement("update"), whole)


# ---------------------------------------------------------------------------------------------
# rules of a user's own


class ByLoss(nn.Module):
    """Weights by the loss alone: no process needs another's rows."""

    def forward(self, gradients: TaskGradients) -> Weights:
        weights = torch.softmax(gradients.loss, 0)
        return Weights(raw=weights, effective=weights)

    def over_processes(self, gradients: ShardedGradients) -> tuple[Weights, Tensor]:
        weights = torch.softmax(gradients.loss, 0)
        return Weights(raw=weights, effective=weights), gradients.combined(weights)


class ByLength(nn.Module):
    """Short gradients count more; a number of each task is told to all."""

    def forward(self, gradients: TaskGradients) -> Weights:
        return self.weights(gradients.rows.norm(dim=1))

    def over_processes(self, gradients: ShardedGradients) -> tuple[Weights, Tensor]:
        weights = self.weights(gradients.assembled(gradients.rows.norm(dim=1)))
        return weights, gradients.combined(weights.effective)

    def weights(self, length: Tensor) -> Weights:
        weights = torch.softmax(-length, 0)
        return Weights(raw=weights, effective=weights)


class ByMedian(nn.Module):
    """Needs all rows at once, and says nothing of processes."""

    def forward(self, gradients: TaskGradients) -> Weights:
        weights = torch.softmax(gradients.rows @ gradients.rows.median(0).values, 0)
        return Weights(raw=weights, effective=weights)


class ByUpdates(nn.Module):
    """Needs all updates, too."""

    def forward(self, gradients: TaskGradients) -> Weights:
        weights = torch.softmax(gradients.updates.abs().amax(1), 0)
        return Weights(raw=weights, effective=weights)


class Doubled(GradientAgreement):
    """Another rule than its base, whose `over_processes` is not its own."""

    def forward(self, gradients: TaskGradients) -> Weights:
        weights = super().forward(gradients)
        return Weights(raw=weights.raw, effective=2 * weights.effective)


class Gathered(Uniform):
    """Uniform, without its method."""

    over_processes = None  # type: ignore[assignment]


class Plain:
    """No module at all."""

    def __call__(self, gradients: TaskGradients) -> Weights:
        return ByLoss()(gradients)  # type: ignore[no-any-return]


TASKS, SIZE = 7, 20


@pytest.mark.parametrize(
    ("rule", "sent"),
    [
        (ByLoss, [SIZE]),
        (ByLength, [TASKS, SIZE]),
        (ByMedian, [TASKS * SIZE]),
        (ByUpdates, [TASKS * SIZE] * 2),
        (Doubled, [TASKS * SIZE]),
        (Gathered, [TASKS * SIZE]),
        (Plain, [TASKS * SIZE]),
        (Uniform, [SIZE]),
        (GradientAgreement, [1, SIZE, 2 * TASKS, SIZE]),
    ],
)
@pytest.mark.parametrize("members", [2, 3])
def test_a_rule_gets_all_rows_unless_it_offers_to_do_without(rule, sent, members):
    rows = torch.randn(TASKS, SIZE, generator=torch.Generator().manual_seed(0)).double()
    whole = record(rows)
    alone, wanted = weighted_update(rule(), whole, ALONE.tasks(whole, TASKS, stop=False))
    found, numbers = of_team(members, rule, whole)
    assert numbers == sent
    for weights, update in found:
        torch.testing.assert_close(weights.effective, alone.effective)
        torch.testing.assert_close(update, wanted)
    line = describe_team(rule(), Team(0, members), TASKS)
    assert line.startswith(f"{members} processes, up to {-(-TASKS // members)} of 7 tasks each; ")
    assert ("gathers all rows" in line) == (TASKS * SIZE in sent)


def test_a_single_process_asks_the_rule_itself():
    class Refusing(ByLoss):
        def over_processes(self, gradients: ShardedGradients) -> tuple[Weights, Tensor]:
            raise AssertionError

    whole = record(torch.randn(4, 6))
    weights, update = weighted_update(Refusing(), whole, ALONE.tasks(whole, 4, stop=False))
    assert torch.equal(weights.effective, ByLoss()(whole).effective)
    assert torch.equal(update, weights.effective @ whole.rows)


def test_what_a_rule_is_given():
    """Shapes of shares, the sums of a process without tasks, K combinations at once."""
    rows = torch.arange(6.0).view(3, 2)
    whole = record(rows)

    class Looks(nn.Module):
        def over_processes(self, gradients: ShardedGradients) -> tuple[Weights, Tensor]:
            assert len(gradients) == 3
            assert torch.equal(gradients.rows, rows[gradients.own])
            assert torch.equal(gradients.updates, whole.updates[gradients.own])
            for name in ("loss", "score", "group"):
                assert torch.equal(getattr(gradients, name), getattr(whole, name))
            assert torch.equal(gradients.assembled(gradients.rows), rows)
            both = gradients.combined(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]))
            assert both.tolist() == [[0, 1], [6, 8]]
            assert both.dtype == torch.float64
            return Weights(gradients.loss, gradients.loss), both.sum(0)

    found, _ = of_team(4, Looks, whole)  # one process has none
    assert [update.tolist() for _, update in found] == [[6, 9]] * 4
    assert found[0][1].dtype == torch.float32
