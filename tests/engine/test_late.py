"""What runs in the backward pass: blocks that are computed again, and hooks on gradients.

The inner loop's parameters are in the model's place while it predicts, and no longer when a gradient is
computed. The oracle never puts tensors anywhere: it changes parameters in place, or has a network of the same
numbers that computes everything once.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from gametalearn import (
    ANIL,
    MAML,
    EpisodeSampler,
    InputError,
    Reptile,
    adapt,
    clear_programs,
    evaluate,
    meta_gradients,
)
from gametalearn.engine.swap import kept_activations
from gametalearn.gradients import adapt_and_score

METHODS = ("auto", "loop", "verify")
LEARNERS = (
    MAML(0.5, 1),
    MAML(0.5, 3),
    MAML(0.5, 3, first_order=True),
    ANIL(0.5, 2),
    Reptile(0.5, 3),
)


def episodes() -> EpisodeSampler:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 6, dtype=torch.float64, generator=generator)
    return EpisodeSampler((inputs, torch.arange(60) // 10), ways=3, shots=2, queries=4)


class Blocks(nn.Module):
    """A network of two blocks, which are checkpointed in one of several ways, or not."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how = how
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "block":
            x = checkpoint(lambda x: self.second(self.first(x)), x, use_reentrant=False)
        elif self.how == "nested":

            def inner(x: Tensor) -> Any:
                return checkpoint(self.second, x, use_reentrant=False)

            x = checkpoint(lambda x: inner(self.first(x)), x, use_reentrant=False)
        elif self.how == "sequential":
            both = nn.Sequential(*self.first, *self.second)
            x = checkpoint_sequential(both, 3, x, use_reentrant=False)
        else:
            x = self.second(self.first(x))
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("how", ["block", "nested", "sequential"])
@pytest.mark.parametrize("learner", LEARNERS, ids=lambda one: f"{type(one).__name__}-{one.steps}")
def test_checkpointed_blocks_have_the_gradients_of_plain_ones(how: str, learner: Any) -> None:
    clear_programs()
    batch, plain, model = episodes().sample(3), Blocks(), Blocks(how)
    wanted = meta_gradients(plain, batch, learner, method="loop")
    for method in METHODS:
        found = meta_gradients(model, batch, learner, method=method)  # type: ignore[arg-type]
        torch.testing.assert_close(found.rows, wanted.rows, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.loss, wanted.loss)
    if learner.update_is_row:
        return
    found = meta_gradients(model, batch, learner, constant_memory=True)
    torch.testing.assert_close(found.rows, wanted.rows, rtol=1e-10, atol=1e-12)


def test_checkpointed_blocks_adapt_like_plain_ones() -> None:
    plain, model, learner = Blocks(), Blocks("block"), MAML(0.5, 3)
    batch = episodes().sample(1)
    adapted, wanted = (
        adapt(m, batch.support_x[0], batch.support_y[0], learner) for m in (model, plain)
    )
    for one, other in zip(adapted.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(one, other)
    mine, theirs = (adapt_and_score(m, batch, learner) for m in (model, plain))
    torch.testing.assert_close(mine, theirs)
    found, should = (evaluate(m, episodes(), learner, 20, seed=1) for m in (model, plain))
    assert found.values.tolist() == should.values.tolist()


def test_checkpoints_outside_of_the_engine_still_compute_again() -> None:
    meta_gradients(Blocks("block"), episodes().sample(2), MAML(0.5, 1))
    calls = []

    def block(x: Tensor) -> Tensor:
        calls.append(0)
        return x.sin().cos()

    x = torch.ones(3, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert len(calls) == 2


class Again(torch.autograd.Function):
    """A block of which nothing is kept, as in reversible networks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module, *parameters: Tensor) -> Any:
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> Any:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            parameters = list(ctx.block.parameters())
            found = torch.autograd.grad(ctx.block(x), [x, *parameters], given)
        return found[0], None, *found[1:]


class Recomputing(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        block = nn.Sequential(self.first, self.second)
        out: Tensor = self.head(Again.apply(x, block, *block.parameters()))
        return out


class Gated(Blocks):
    """A gate on the gradient, which is learned with the rest: read late, or held by the hook."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.gate, self.late = nn.Parameter(torch.tensor(1.0, dtype=torch.float64)), late

    def forward(self, x: Tensor) -> Tensor:
        z = self.second(self.first(x)) * self.gate
        held = self.gate.detach()
        if z.requires_grad:
            z.register_hook(lambda g: g * (1 + (self.gate.detach() if self.late else held)))
        out: Tensor = self.head(z)
        return out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first_order", [True, False])
def test_a_backward_pass_that_reads_parameters_anew_is_refused(
    method: Any, first_order: bool
) -> None:
    clear_programs()
    batch = episodes().sample(2)
    for model in (Gated(late=True), *([Recomputing()] if first_order else [])):
        with pytest.raises(InputError, match="reads its parameters anew, in a gradient hook or in"):
            meta_gradients(model, batch, MAML(0.5, 2, first_order=first_order), method=method)


class Zero(Recomputing):
    """With a head of zeros, as many begin, the first inner step moves nothing below it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.bias.zero_()


@pytest.mark.parametrize("model", [Zero(), Recomputing()], ids=["zero", "plain"])
@pytest.mark.parametrize("learner", [MAML(1e-6, 1), ANIL(0.5, 1), MAML(0.5, 0)])
def test_it_is_refused_at_once_whatever_the_inner_loop_moves(model: Any, learner: Any) -> None:
    with pytest.raises(InputError, match="reads its parameters anew"):
        meta_gradients(model, episodes().sample(2), learner, method="loop")


def test_so_it_is_where_only_the_adapted_model_matters() -> None:
    batch, learner = episodes().sample(2), MAML(0.5, 3)
    for model in (Gated(late=True), Recomputing()):
        with pytest.raises(InputError, match="reads its parameters anew"):
            evaluate(model, episodes(), learner, 4, seed=1)
        with pytest.raises(InputError, match="reads its parameters anew"):
            adapt_and_score(model, batch, learner, method="loop")
        with pytest.raises(InputError, match="reads its parameters anew"):
            adapt(model, batch.support_x[0], batch.support_y[0], learner)


def in_place(model: nn.Module, batch: Any, rate: float, steps: int) -> tuple[Tensor, Tensor]:
    """First order, by parameters that are really changed."""
    rows, losses = [], []
    for task in range(len(batch)):
        own = copy.deepcopy(model)
        for _ in range(steps):
            value = F.cross_entropy(own(batch.support_x[task]), batch.support_y[task])
            found = torch.autograd.grad(value, list(own.parameters()))
            with torch.no_grad():
                for p, g in zip(own.parameters(), found, strict=True):
                    p.sub_(rate * g)
        value = F.cross_entropy(own(batch.query_x[task]), batch.query_y[task])
        losses.append(value.detach())
        rows.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(value, list(own.parameters()))])
        )
    return torch.stack(rows), torch.stack(losses)


@pytest.mark.filterwarnings("ignore:gametalearn. Gated is computed task by task")
@pytest.mark.parametrize("method", METHODS)
def test_a_hook_that_holds_what_it_needs_is_right(method: Any) -> None:
    clear_programs()
    batch, model = episodes().sample(3), Gated(late=False)
    found = meta_gradients(model, batch, MAML(0.5, 3, first_order=True), method=method)
    rows, loss = in_place(model, batch, 0.5, 3)
    torch.testing.assert_close(found.rows, rows)
    torch.testing.assert_close(found.loss, loss)


class Once(torch.autograd.Function):
    """Frees what it kept when it runs backward, and cannot do so again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x.cos()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> Tensor:
        kept: Tensor = ctx.kept
        del ctx.kept
        return given[0] * kept


class Strange(Blocks):
    """Things that cannot be compared, or look as if something was read late, and are right."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.kind, self.calls = how, 0
        self.table = nn.Parameter(torch.randn(10, 8, dtype=torch.float64))
        self.own = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        z = self.second(self.first(x))
        if self.kind == "once":
            z = Once.apply(z)
        elif self.kind == "sparse":
            z = z + F.embedding(torch.arange(len(x)) % 10, self.table, sparse=True)
        elif self.kind == "generator" and z.requires_grad:
            z.register_hook(lambda g: g + 0.01 * torch.randn(g.shape, generator=self.own).to(g))
        elif self.kind == "counter" and z.requires_grad:
            z.register_hook(self.scheduled)
        out: Tensor = self.head(z)
        return out

    def scheduled(self, gradient: Tensor) -> Tensor:
        self.calls += 1
        return gradient * (1 + 0.01 * self.calls)


@pytest.mark.parametrize("how", ["once", "sparse", "generator", "counter"])
def test_what_cannot_be_compared_is_let_pass(how: str) -> None:
    batch, learner = episodes().sample(2), MAML(0.5, 2, first_order=True)
    found = meta_gradients(Strange(how), batch, learner, method="loop")
    assert torch.isfinite(found.rows).all()
    adapt_and_score(Strange(how), batch, learner, method="loop")


class Counting(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        z = self.second(self.first(x))
        if z.requires_grad:
            z.register_hook(self.seen)
        out: Tensor = self.head(z)
        return out

    def seen(self, gradient: Tensor) -> None:
        self.calls += 1


def test_it_is_looked_at_once_for_a_model_and_a_loss() -> None:
    model, calls = Counting(), []
    for _ in range(3):
        before = model.calls
        meta_gradients(model, episodes().sample(4), MAML(0.5, 1, first_order=True), method="loop")
        calls.append(model.calls - before)
    assert calls == [8 + 3, 8, 8]  # of each task a support and a query gradient; three to compare


def test_only_the_thread_that_is_in_the_engine_keeps_activations() -> None:
    """Others' checkpoints compute again, as they are meant to."""
    counts: list[int] = []

    def block(x: Tensor) -> Tensor:
        counts.append(0)
        return x.sin().cos()

    def elsewhere() -> None:
        checkpoint(block, torch.ones(3, requires_grad=True), use_reentrant=False).sum().backward()

    with kept_activations():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(elsewhere).result()
        assert len(counts) == 2
        elsewhere()
        assert len(counts) == 3
    elsewhere()
    assert len(counts) == 5


def test_a_backward_pass_in_another_thread_is_not_waited_for() -> None:
    """On a GPU autograd computes blocks again in a thread of its own, which must find nothing locked."""
    real = torch.autograd.grad

    def in_a_thread(*args: Any, **more: Any) -> Any:
        return pool.submit(real, *args, **more).result(timeout=60)

    batch, model = episodes().sample(2), Blocks()
    wanted = meta_gradients(model, batch, MAML(0.5, 2), method="loop")
    with ThreadPoolExecutor(8) as pool, mock.patch("torch.autograd.grad", in_a_thread):
        found = meta_gradients(Blocks(), batch, MAML(0.5, 2), constant_memory=True)
    torch.testing.assert_close(found.rows, wanted.rows)


class Noisy(Blocks):
    """A hook that draws: the same gradient twice is the same for equal random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.second(self.first(x))
        if z.requires_grad:
            z.register_hook(lambda g: g + 0.1 * torch.randn_like(g))
        out: Tensor = self.head(z)
        return out


def test_hooks_that_draw_are_not_mistaken_and_draw_as_before() -> None:
    """The look takes none of the numbers that are drawn."""
    batch, model = episodes().sample(2), Noisy()
    torch.manual_seed(3)
    first = meta_gradients(model, batch, MAML(0.5, 2, first_order=True), method="loop")
    torch.manual_seed(3)
    again = meta_gradients(model, batch, MAML(0.5, 2, first_order=True), method="loop")
    assert torch.equal(first.rows, again.rows)


# ---------------------------------------------------------------------------------------------
# hooks on parameters, which autograd calls with their own gradients


def with_hook(hook: Any, later: bool = False) -> nn.Module:
    model = Blocks()
    weight: Any = model.first[0].weight
    (weight.register_post_accumulate_grad_hook if later else weight.register_hook)(hook)
    return model


def halve(gradient: Tensor) -> None:
    gradient.mul_(0.5)


@pytest.mark.parametrize("hook", [lambda g: g * 0.5, halve], ids=["returned", "in place"])
def test_hooks_that_change_a_parameters_gradient_are_refused(hook: Any) -> None:
    batch, learner = episodes().sample(2), MAML(0.5, 1)
    model = with_hook(hook)
    for method in METHODS:
        with pytest.raises(InputError, match=r"'first\.0\.weight' of Blocks has a gradient hook"):
            meta_gradients(model, batch, learner, method=method)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has a gradient hook"):
        evaluate(model, episodes(), learner, 4)
    # of a parameter that is no meta-parameter nothing is computed
    head: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if n.startswith("head.")}
    meta_gradients(model, batch, learner, meta=head)


def test_hooks_that_act_on_accumulated_gradients_are_refused() -> None:
    model = with_hook(lambda p: p.grad.mul_(0.5), later=True)
    with pytest.raises(InputError, match="register_post_accumulate_grad_hook"):
        meta_gradients(model, episodes().sample(2), MAML(0.5, 1))


class Seen:
    """A logger, whose hooks return nothing or what they were given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, gradient: Tensor) -> None:
        self.count += 1

    def given_back(self, gradient: Tensor) -> Tensor:
        self.count += 1
        return gradient


@pytest.mark.parametrize("back", [False, True])
def test_a_hook_that_only_looks_on_changes_nothing(back: bool) -> None:
    seen, batch = Seen(), episodes().sample(2)
    model = with_hook(seen.given_back if back else seen)
    for _ in range(3):
        found = meta_gradients(model, batch, MAML(0.5, 1))
        torch.testing.assert_close(found.rows, meta_gradients(Blocks(), batch, MAML(0.5, 1)).rows)
    assert seen.count == 1  # when it was looked at


def test_hooks_that_clamp_or_fail_are_refused_in_a_line() -> None:
    batch = episodes().sample(2)
    for hook in (lambda g: g.clamp(-1, 1), lambda g: g.nope):
        with pytest.raises(InputError, match="has a gradient hook"):
            meta_gradients(with_hook(hook), batch, MAML(0.5, 1))


def test_what_acts_on_accumulated_gradients_does_not_matter_in_a_test() -> None:
    model = with_hook(lambda p: None, later=True)
    assert 0 <= evaluate(model, episodes(), MAML(0.5, 1), 4).mean <= 1
