"""`adapt` and `evaluate` take the modules that `meta_gradients` takes, from wherever they are called."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gametalearn import (
    LSLR,
    MAML,
    ClassImages,
    Conv4,
    EpisodeSampler,
    InputError,
    MetaSGD,
    Reptile,
    TaskBatch,
    adapt,
    evaluate,
    meta_gradients,
)
from gametalearn.copies import copied
from gametalearn.gradients import adapt_and_score

X = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(5).repeat(2)


class Keeps(nn.Module):
    """A forward that keeps what it computed, in places of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 5)
        self.features: Tensor | None = None
        self.kept: dict[str, Any] = {"list": [], "object": Box()}
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.features = torch.tanh(self.a(x))
        self.kept["list"].append((self.features * 2, "text"))
        self.kept["object"].inside = self.features + 1
        self.calls += 1
        output: Tensor = self.b(self.features)
        return output


class Box:
    inside: Any = None


def old_style(*names: str) -> Any:
    def make() -> nn.Module:
        first, last = nn.Linear(8, 16), nn.Linear(16, 5)
        for name in names:
            getattr(nn.utils, name)(first)
        return nn.Sequential(first, nn.Tanh(), last)

    return make


def new_style(name: str) -> Any:
    def make() -> nn.Module:
        layer = getattr(nn.utils.parametrizations, name)(nn.Linear(8, 16))
        return nn.Sequential(layer, nn.Tanh(), nn.Linear(16, 5))

    return make


class Shared(nn.Module):
    """One computed tensor under two names, and a parameter in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 5)
        self.view = self.a.weight * 1
        self.again = [self.view, self.a.weight]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.a(x)
        return output


MODELS: list[Any] = [
    Keeps, old_style("weight_norm"), old_style("spectral_norm"), new_style("weight_norm"),
    new_style("orthogonal"), new_style("spectral_norm"), Shared,
]  # fmt: skip
NAMES = [
    "keeps",
    "weight_norm",
    "spectral_norm",
    "parametrized",
    "orthogonal",
    "spectral",
    "shared",
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("make", MODELS, ids=NAMES)
def test_adapt_takes_modules_that_keep_tensors(make: Any, used: bool) -> None:
    torch.manual_seed(0)
    model = make()
    model(X)
    model.eval()  # spectral norms iterate in training mode
    if used:
        model(X)
    state = copy.deepcopy(model.state_dict())
    kept = getattr(model, "features", None), getattr(model, "calls", None)
    adapted = adapt(model, X, Y, MAML(0.1, 3))
    own = make().eval()
    own.load_state_dict(state)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(own(X), Y).backward()
        optimizer.step()
    assert type(adapted) is type(model)
    torch.testing.assert_close(adapted(X), own(X))
    # the model is what it was, down to what it keeps
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert (getattr(model, "features", None), getattr(model, "calls", None)) == kept
    # the copy can be saved, adapted and trained on
    torch.testing.assert_close(adapt(adapted, X, Y, MAML(0.1, 0))(X), own(X))
    adapted(X).sum().backward()
    assert all(p.grad is not None for p in adapted.parameters())


def test_a_copy_shares_nothing_and_keeps_what_was_shared() -> None:
    model = Shared()
    own: Any = copied(model)
    assert own.view is own.again[0]
    assert own.a.weight is own.again[1]
    assert own.view is not model.view
    assert not own.view.requires_grad
    torch.testing.assert_close(own.view, model.view)
    copy.deepcopy(own)  # which the model itself refuses
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)


@pytest.mark.filterwarnings("ignore:.*computed task by task")
def test_adapt_after_a_trace_left_its_tensors_in_the_model() -> None:
    model = Keeps()
    batch = TaskBatch(X[None], Y[None], X[None], Y[None], torch.zeros(1, dtype=torch.int64))
    adapted = adapt(model, X, Y, MAML(0.1, 2))
    methods: list[Any] = ["replay", "loop"]
    for method in methods:
        meta_gradients(model, batch, MAML(0.1, 2), method=method)
        torch.testing.assert_close(adapt(model, X, Y, MAML(0.1, 2))(X), adapted(X))


@pytest.mark.parametrize("inside", [False, True], ids=["made outside", "made inside"])
def test_adapt_within_inference_mode(inside: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5))
    wanted = adapt(model, X, Y, MAML(0.1, 2))(X)
    with torch.inference_mode():
        own: nn.Module = model
        if inside:
            own = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5))
            own.load_state_dict(model.state_dict())
        found = adapt(own, X.clone(), Y.clone(), MAML(0.1, 2))
        torch.testing.assert_close(found(X), wanted)
    assert not any(t.is_inference() for t in (*found.parameters(), *found.buffers()))
    found(X).sum().backward()  # it can be trained on, outside
    assert all(p.grad is not None for p in found.parameters())


@pytest.mark.parametrize("learner", [MetaSGD(0.1, 2), LSLR(0.1, 2), Reptile(0.1, 2)])
def test_adapt_in_inference_mode_with_rates(learner: Any) -> None:
    model = nn.Linear(8, 5)
    meta = learner.meta_parameters(dict(model.named_parameters()))
    wanted = adapt(model, X, Y, learner, meta=meta)(X)
    with torch.inference_mode():
        torch.testing.assert_close(adapt(model, X, Y, learner, meta=meta)(X), wanted)


@pytest.fixture
def source() -> EpisodeSampler:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (80, 1, 16, 16), dtype=torch.uint8, generator=generator)
    return EpisodeSampler(ClassImages.from_tensors(images, torch.arange(80) // 8), 3, 2, 5, 1)


def own_model(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_evaluate_casts_episodes_to_the_models_precision(
    dtype: torch.dtype, source: EpisodeSampler
) -> None:
    model = own_model().to(dtype)
    found = evaluate(model, source, MAML(0.5, 3), 4, 7, tasks_at_once=4)
    batch, wanted = source.with_seed(7).sample(4), []
    for task in range(4):
        x, q = (t[task].to(dtype) for t in (batch.support_x, batch.query_x))
        own = own_model().to(dtype)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(own(x), batch.support_y[task]).backward()
            optimizer.step()
        wanted.append((own(q).argmax(1) == batch.query_y[task]).double().mean().item())
        with torch.no_grad():
            adapted = adapt(model, batch.support_x[task], batch.support_y[task], MAML(0.5, 3))
            torch.testing.assert_close(adapted(q), own(q))
    np.testing.assert_allclose(found.values, wanted, atol=1e-6)
    # many at once are replayed; a share of 15 is not rounded to half precision
    many = evaluate(model, source, MAML(0.5, 3), 16, 7)
    np.testing.assert_allclose(many.values * 15, np.rint(many.values * 15), atol=1e-4)


class Doubles:
    """Regression episodes in float64, as numpy makes them."""

    def sample(self, num_tasks: int, part: slice = slice(None)) -> TaskBatch:
        x = torch.linspace(-1, 1, 8, dtype=torch.float64).view(1, 8, 1).repeat(num_tasks, 1, 1)
        return TaskBatch(x, x**2, x, x**2, torch.zeros(num_tasks, dtype=torch.int64))[part]

    def with_seed(self, seed: int) -> Doubles:
        return self

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_float_targets_are_cast_too(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    found = evaluate(model, Doubles(), MAML(0.1, 2), 3)
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).view(8, 1)
    adapted = adapt(model, x, x**2, MAML(0.1, 2))
    wanted = F.mse_loss(adapted(x.to(dtype)), (x**2).to(dtype)).item()
    np.testing.assert_allclose(found.values, wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


class NoHalf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, _ = torch.linalg.qr(self.layer.weight.T)
        output: Tensor = x.flatten(1) @ q
        return output


def test_a_device_without_half_precision_is_named(source: EpisodeSampler) -> None:
    message = r"NoHalf is in float16, and cpu cannot compute with that .*; use model\.float\(\)"
    with pytest.raises(InputError, match=message):
        evaluate(NoHalf().half(), source, MAML(0.1), 2)
    batch = source.sample(1)
    with pytest.raises(InputError, match=message):
        adapt(NoHalf().half(), batch.support_x[0], batch.support_y[0], MAML(0.1))


def test_nothing_to_adapt_is_said(source: EpisodeSampler) -> None:
    batch = source.sample(2)
    x, y = batch.support_x[0], batch.support_y[0]
    for model, message in (
        (own_model().requires_grad_(False), "no parameter of Sequential requires gradients"),
        (Conv4(3, image_size=16, hidden=4).requires_grad_(False), "no parameter of Conv4 requires"),
        (nn.Flatten(), "Flatten has no parameters: there is nothing to adapt"),
    ):
        calls: list[Any] = [
            lambda model=model: evaluate(model, source, MAML(0.1), 2),
            lambda model=model: adapt(model, x, y, MAML(0.1)),
            lambda model=model: meta_gradients(model, batch, MetaSGD(0.1)),
            lambda model=model: adapt_and_score(model, batch, MAML(0.1)),
        ]
        for call in calls:
            with pytest.raises(InputError, match=message):
                call()


@pytest.mark.parametrize("learner", [MAML(0.1), MetaSGD(0.1), Reptile(0.1)])
@pytest.mark.parametrize("more", [{}, {"method": "loop"}, {"constant_memory": True}])
def test_no_tasks_give_empty_results(learner: Any, more: Any, source: EpisodeSampler) -> None:
    model = own_model().double()
    batch = source.sample(2).to(dtype=torch.float64)
    size = sum(p.numel() for p in learner.meta_parameters(dict(model.named_parameters())).values())
    found = meta_gradients(model, batch[:0], learner, **more)
    assert (found.rows.shape, found.updates.shape) == ((0, size), (0, size))
    assert (found.loss.shape, found.score.shape, found.group.shape) == ((0,), (0,), (0,))
    some = meta_gradients(model, batch, learner, **more)
    joined = type(found).cat([found, some])
    assert torch.equal(joined.rows, some.rows)
    assert joined.rows.dtype == torch.float64
    assert [t.shape for t in adapt_and_score(model, batch[:0], learner)] == [(0,), (0,)]
