"""What a forward or a loss reads of the model beside its registered meta-parameters."""

from __future__ import annotations

import functools
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from gametalearn import (
    MAML,
    EpisodeSampler,
    InputError,
    MetaSGD,
    ProtoMAML,
    Score,
    adapt,
    clear_programs,
    evaluate,
    meta_gradients,
)
from gametalearn.gradients import adapt_and_score

METHODS = ("loop", "replay", "verify")


def network(seed: int, inputs: int = 6, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Linear(inputs, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
    return nn.Sequential(*layers).double()


def episodes() -> EpisodeSampler:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 6, dtype=torch.float64, generator=generator)
    return EpisodeSampler((inputs, torch.arange(60) // 10), ways=3, shots=2, queries=4)


def head(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if name.startswith("3.")}


@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_are_no_meta_parameters_are_those_of_the_model_at_hand(method: Any) -> None:
    clear_programs()
    batch, learner = episodes().sample(3), MAML(0.1, 1)
    for seed in range(3):  # models of one class share a program
        model = network(seed)
        found = meta_gradients(model, batch, learner, meta=head(model), method=method)
        frozen = network(seed)
        for name, p in frozen.named_parameters():
            p.requires_grad_(name.startswith("3."))
        wanted = meta_gradients(frozen, batch, learner, method="loop")
        torch.testing.assert_close(found.rows, wanted.rows)
        torch.testing.assert_close(found.loss, wanted.loss)


def by_hand(model: nn.Module, batch, steps: int, rate: float, penalty: float):
    """Rows and losses of MAML on cross-entropy and an L2 penalty, with nothing of the library's."""
    names, rows, losses = [n for n, _ in model.named_parameters()], [], []

    def objective(params, x, y):
        squares = sum(p.pow(2).sum() for p in params.values())
        return F.cross_entropy(functional_call(model, params, (x,)), y) + penalty * squares

    for x, y, query_x, query_y in zip(
        batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True
    ):
        start = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        params = start
        for _ in range(steps):
            grads = torch.autograd.grad(
                objective(params, x, y), list(params.values()), create_graph=True
            )
            params = {n: params[n] - rate * g for n, g in zip(names, grads, strict=True)}
        value = objective(params, query_x, query_y)
        grads = torch.autograd.grad(value, list(start.values()))
        rows.append(torch.cat([g.flatten() for g in grads]))
        losses.append(value.detach())
    return torch.stack(rows), torch.stack(losses), params


@pytest.mark.parametrize("method", METHODS)
def test_a_penalty_on_the_weights_is_part_of_the_loss(method: Any) -> None:
    model, batch, learner = network(3), episodes().sample(3), MAML(0.1, 2)

    def penalised(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(prediction, target) + 0.5 * sum(
            p.pow(2).sum() for p in model.parameters()
        )

    rows, losses, params = by_hand(model, batch, 2, 0.1, 0.5)
    found = meta_gradients(model, batch, learner, loss=penalised, method=method)
    torch.testing.assert_close(found.rows, rows)
    torch.testing.assert_close(found.loss, losses)
    value, _ = adapt_and_score(model, batch, learner, loss=penalised, method=method)
    torch.testing.assert_close(value, losses)
    adapted = adapt(model, batch.support_x[-1], batch.support_y[-1], learner, loss=penalised)
    for name, p in adapted.named_parameters():
        torch.testing.assert_close(p, params[name].detach())


def test_a_score_may_read_the_weights_that_it_scores() -> None:
    model, batch = network(4), episodes().sample(2)

    def size(prediction: torch.Tensor, target: torch.Tensor) -> Any:
        return dict(model.named_parameters())["3.weight"].detach().norm()

    found = meta_gradients(model, batch, MAML(0.5, 1), score=size, method="loop")
    for i in range(2):
        fitted = adapt(model, batch.support_x[i], batch.support_y[i], MAML(0.5, 1))
        weight = dict(fitted.named_parameters())["3.weight"].detach()
        torch.testing.assert_close(found.score[i].double(), weight.norm())


class Leaky(nn.Module):
    """Reaches the weight of a layer through a partial."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.again = functools.partial(F.linear, weight=self.layer.weight)

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x) + self.again(x)


@pytest.mark.parametrize("method", ["loop", "auto"])
def test_a_parameter_that_is_read_past_its_place_is_refused(method: Any) -> None:
    batch = episodes().sample(2)
    leaky = Leaky().double()
    for _ in range(4):
        with pytest.raises(InputError, match=r"the parameter 'layer.weight' of Leaky elsewhere"):
            meta_gradients(leaky, batch, MAML(0.1, 1), method=method)
    model = network(5)
    meta_gradients(model, batch, MAML(0.1, 1), method=method)
    held = list(model.parameters())

    def penalised(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(prediction, target) + sum(p.pow(2).sum() for p in held)

    with pytest.raises(InputError, match=r"reads the parameter '\S+' of Sequential elsewhere"):
        meta_gradients(model, batch, MAML(0.1, 1), loss=penalised, method=method)


class WithAuxiliary(nn.Module):
    """Leaves a term of the loss on itself."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body, self.drop, self.top = nn.Linear(6, 8), nn.Dropout(dropout), nn.Linear(8, 3)
        self.auxiliary = torch.zeros(())

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.body(x).tanh()
        self.auxiliary = hidden.pow(2).mean()
        return self.top(self.drop(hidden))


def with_its_term(model: WithAuxiliary) -> Any:
    return lambda p, t: F.cross_entropy(p, t) + 5 * model.auxiliary


@pytest.mark.filterwarnings("ignore:gametalearn. WithAuxiliary is computed task by task")
def test_a_loss_may_read_what_the_forward_left_on_the_model() -> None:
    torch.manual_seed(6)
    model, batch, learner = WithAuxiliary().double(), episodes().sample(1), MAML(0.3, 3)
    loss = with_its_term(model)
    gradients = meta_gradients(model, batch, learner, loss=loss)
    fitted = adapt(model, batch.support_x[0], batch.support_y[0], learner, loss=loss)
    update = [
        p.detach() - q.detach()
        for p, q in zip(model.parameters(), fitted.parameters(), strict=True)
    ]
    torch.testing.assert_close(torch.cat([u.flatten() for u in update]), gradients.updates[0])


@pytest.mark.filterwarnings("ignore:gametalearn. WithAuxiliary is computed task by task")
def test_such_a_loss_is_tested_without_dropout_and_the_modes_come_back() -> None:
    torch.manual_seed(7)
    model = WithAuxiliary(dropout=0.6).double()
    loss = with_its_term(model)
    found = evaluate(model, episodes(), MAML(0.3, 3), 20, loss=loss, score="accuracy")
    assert model.drop.training
    batch = episodes().sample(1)
    first = adapt(model, batch.support_x[0], batch.support_y[0], MAML(0.3, 3), loss=loss)
    assert model.drop.training
    model.drop.eval()
    still = evaluate(model, episodes(), MAML(0.3, 3), 20, loss=loss, score="accuracy")
    modes: list[bool] = [module.training for module in model.modules()]
    assert modes == [True, True, False, True]
    assert (found.values == still.values).all()
    second = adapt(model, batch.support_x[0], batch.support_y[0], MAML(0.3, 3), loss=loss)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.filterwarnings("ignore:gametalearn. WithAuxiliary is computed task by task")
def test_the_term_may_be_a_buffer_and_several_threads_have_their_own() -> None:
    torch.manual_seed(11)
    model, batch, learner = WithAuxiliary().double(), episodes().sample(4), MAML(0.3, 2)
    loss = with_its_term(model)
    wanted, _ = adapt_and_score(model, batch, learner, loss=loss)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            runs = [
                pool.submit(adapt_and_score, model, batch, learner, loss=loss) for _ in range(8)
            ]
            for run in runs:
                torch.testing.assert_close(run.result()[0], wanted)
    finally:
        sys.setswitchinterval(before)
    del model.auxiliary
    model.register_buffer("auxiliary", torch.zeros((), dtype=torch.float64))
    found, _ = adapt_and_score(model, batch, learner, loss=loss)
    torch.testing.assert_close(found, wanted)


@pytest.mark.filterwarnings("ignore:gametalearn. WithAuxiliary is computed task by task")
def test_a_score_may_read_it_too() -> None:
    torch.manual_seed(13)
    model = WithAuxiliary(dropout=0.6).double()
    size = Score("size", lambda p, t: model.auxiliary.detach())
    found = evaluate(model, episodes(), MAML(0.3, 2), 8, score=size)
    still = evaluate(model.eval(), episodes(), MAML(0.3, 2), 8, score=size)
    assert (found.values == still.values).all()
    assert len(set(found.values.tolist())) == 8  # no constant of another forward


def test_a_loss_that_does_not_read_the_model_leaves_its_modes_alone() -> None:
    model, modes = network(12, dropout=0.5), set()
    loss: Any = lambda p, t: F.nll_loss(p.log_softmax(1), t)  # noqa: E731
    evaluate(model, episodes(), MAML(0.1, 1), 20, loss=loss, score="accuracy",
             progress=lambda _: modes.add(model[2].training))  # fmt: skip
    assert modes == {True}


def test_names_of_meta_parameters_and_of_heads() -> None:
    model, batch = network(8), episodes().sample(1)
    with pytest.raises(InputError, match="meta: Sequential has no parameter 'nope'"):
        meta_gradients(model, batch, MAML(0.1, 1), meta={"nope": torch.zeros(2)})

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.task_head = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return self.task_head(x)

    fitted = adapt(Named().double(), batch.support_x[0], batch.support_y[0], MAML(0.1, 2))
    assert isinstance(fitted, Named)
    with pytest.raises(InputError, match=r"Named has a parameter 'task_head\.\w+', and a learner"):
        meta_gradients(Named().double(), batch, ProtoMAML(0.1, 1))


def test_a_test_with_the_rates_of_the_start_is_warned_of() -> None:
    model, batch = network(9), episodes().sample(1)
    with pytest.warns(UserWarning, match="MetaSGD learns inner rates, and without meta="):
        evaluate(model, episodes(), MetaSGD(0.1, 1), 2)
    with pytest.warns(UserWarning, match="pass the trained ones, such as a run's meta"):
        adapt(model, batch.support_x[0], batch.support_y[0], MetaSGD(0.1, 1))


@pytest.mark.parametrize("method", ["loop", "auto"])
def test_a_loss_gives_a_scalar(method: Any) -> None:
    model, batch = network(10), episodes().sample(1)
    with pytest.raises(InputError, match=r"must give a scalar tensor .* take its mean"):
        meta_gradients(
            model, batch, MAML(0.1, 1), loss=nn.CrossEntropyLoss(reduction="none"), method=method
        )
    kind: Any = nn.CrossEntropyLoss
    with pytest.raises(InputError, match=r"CrossEntropyLoss is a class; pass an instance"):
        meta_gradients(model, batch, MAML(0.1, 1), loss=kind, method=method)
