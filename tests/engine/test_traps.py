"""What a trace could take down wrongly, or keep for too long: replay and loop agree all the same."""

from __future__ import annotations

import copy
import random
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gametalearn import MAML, TaskBatch, meta_gradients

pytestmark = pytest.mark.filterwarnings("ignore:gametalearn:UserWarning")

Body = Callable[["Model", Tensor], Tensor]


class Model(nn.Module):
    """Two layers, and whatever ``body`` does with them."""

    k: Any = 1.0

    def __init__(self, body: Body, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)
        self.body = body
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def episodes(dtype: torch.dtype = torch.float64) -> TaskBatch:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(3).repeat(3, 1)
    x, z = torch.randn(2, 3, 3, 6, generator=g, dtype=torch.float64).to(dtype).unbind()
    return TaskBatch(x, y, z, y, torch.zeros(3, dtype=torch.int64))


def agree(
    model: nn.Module,
    bound: float = 1e-12,
    batch: TaskBatch | None = None,
    chunks: tuple[int, ...] = (2,),
    **options: Any,
) -> None:
    batch = episodes() if batch is None else batch
    for learner in [MAML(0.3, 1), MAML(0.3, 1, first_order=True)][: len(chunks)]:
        loop = meta_gradients(model, batch, learner, method="loop", **options)
        for chunk in chunks:
            got = meta_gradients(model, batch, learner, method="replay", chunk=chunk, **options)
            for name in ("rows", "updates", "loss"):
                torch.testing.assert_close(
                    getattr(got, name), getattr(loop, name), rtol=bound, atol=bound
                )


def written_after_negation(m: Model, x: Tensor) -> Tensor:
    h = m.first(x)
    y = -h
    h[:, 0] = 2.0
    return m.second(h + y * 3.0)  # type: ignore[no-any-return]


def written_after_scaling(m: Model, x: Tensor) -> Tensor:
    h = m.first(x)
    y = h * 0.5
    h.sigmoid_()
    return m.second(h + y)  # type: ignore[no-any-return]


def data(m: Model, x: Tensor) -> Tensor:
    h = m.first(x)
    return m.second(h * h.data.tanh())  # type: ignore[no-any-return]


def hook(m: Model, x: Tensor) -> Tensor:
    h = m.first(x).tanh()
    h.register_hook(lambda g: g * 2)
    return m.second(h)  # type: ignore[no-any-return]


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecated, and in use

    @torch.jit.script
    def scripted(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w.t()
        return torch.sigmoid(y) * y


@pytest.mark.parametrize(
    "body",
    [
        written_after_negation,
        written_after_scaling,
        data,
        hook,
        lambda m, x: m.second(scripted(x, m.first.weight)),
    ],
    ids=["negation", "scaling", "data", "hook", "scripted"],
)
def test_forwards_that_a_trace_could_get_wrong(body: Body) -> None:
    agree(Model(body), chunks=(1, 2))


def test_a_scripted_module_is_looped() -> None:
    model = Model(lambda m, x: m.second(torch.tanh(m.first(x))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted_layer: Any = torch.jit.script(nn.Sequential(model.first, nn.Sigmoid()))
    model.first = scripted_layer
    agree(model)


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_random_numbers_of_others_are_drawn_in_each_call(draw: Callable[[], float]) -> None:
    model = Model(lambda m, x: m.second(m.first(x)) * (1.0 + draw()))
    losses = [meta_gradients(model, episodes(), MAML(), method="replay").loss for _ in range(2)]
    assert not torch.equal(*losses)


def test_writing_into_a_parameter_stays_without_effect_outside() -> None:
    def clamping(m: Model, x: Tensor) -> Tensor:
        with torch.no_grad():
            m.first.weight.clamp_(-0.1, 0.1)
        return m.second(m.first(x))  # type: ignore[no-any-return]

    model = Model(clamping)
    before = copy.deepcopy(model.state_dict())
    agree(model, chunks=(1, 2))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def scaled(m: Model, x: Tensor) -> Tensor:
    return m.second(m.first(x)) * (m.k["a"] if isinstance(m.k, dict) else m.k)  # type: ignore[no-any-return]


def test_settings_that_change_are_seen() -> None:
    model = Model(scaled)
    settings: list[Any] = [{"a": 1.0}, {"a": 2.0}, 3, np.arange(1.0, 4.0), np.arange(2.0, 5.0)]
    for model.k in settings:
        if isinstance(model.k, np.ndarray):
            model.k = torch.from_numpy(model.k)
        agree(model)
    model.k.mul_(0.5)  # in place
    agree(model)
    model.k = {"a": 1.0}
    agree(model)
    model.k["a"] = 3.0
    agree(model)
    for factor in (1.0, 2.0, 3.0, 4.0):  # functions that may come to lie at one address
        model.body = lambda m, x, f=factor: m.second(m.first(x)) * f  # type: ignore[misc]
        agree(model)
    config = types.SimpleNamespace(factor=1.0)
    model.body = lambda m, x: m.second(m.first(x)) * config.factor
    agree(model)
    config.factor = 2.0
    agree(model)


def test_settings_of_a_class_and_hooks_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(scaled)
    agree(model)
    monkeypatch.setattr(Model, "k", 2.0)
    agree(model)
    for factor in (2.0, 3.0):
        model.first.register_forward_hook(lambda m, i, o, f=factor: o * f)
        agree(model)


class Typed(nn.Linear):
    """Its programs are shared by all that have equal settings: it has no function of its own."""

    def __init__(self, k: float) -> None:
        super().__init__(6, 3)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (3.0 if type(self.k) is int else 1.0)


def test_equal_numbers_of_other_types_are_others() -> None:
    for k in (2, 2.0, True, 1):
        agree(Typed(k).double())


def test_a_loss_that_belongs_to_an_object_may_change() -> None:
    class Trainer:
        factor = 1.0

        def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
            return self.factor * F.cross_entropy(prediction, target)

    trainer, model = Trainer(), Model(scaled)
    agree(model, loss=trainer.loss)
    trainer.factor = 2.0
    agree(model, loss=trainer.loss)


def test_what_was_traced_under_autocast_stays_there() -> None:
    model, batch = Model(scaled, torch.float32), episodes(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        meta_gradients(model, batch, MAML(0.3, 1), method="replay", chunk=2)
    agree(model, 1e-5, batch)


def test_parameters_of_two_precisions() -> None:
    def mixed(m: Model, x: Tensor) -> Tensor:
        return m.second(m.first(x.float()).double())  # type: ignore[no-any-return]

    model = Model(mixed)
    model.first.float()
    agree(model, 1e-6)


def test_within_inference_mode() -> None:
    model = Model(lambda m, x: m.second(torch.tanh(m.first(x))))
    with torch.inference_mode():  # in which these tensors are made
        agree(model, batch=episodes().to(dtype=torch.float32).to(dtype=torch.float64))


def test_first_calls_from_two_threads() -> None:
    model = Model(lambda m, x: m.second(torch.tanh(m.first(x))))
    batch, rows = episodes(), {}

    def work(name: int) -> None:
        for k in range(5):
            learner = MAML(0.1 + k / 100 + name, 2)
            rows[name, k] = meta_gradients(model, batch, learner, method="replay").rows

    threads = [threading.Thread(target=work, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rows) == 10
    for (name, k), got in rows.items():
        learner = MAML(0.1 + k / 100 + name, 2)
        loop = meta_gradients(model, batch, learner, method="loop")
        torch.testing.assert_close(got, loop.rows, rtol=1e-12, atol=1e-12)
