"""What `adapt` returns does not look at what else is in the call, and goes where gametalearn is not."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gametalearn import (
    ANIL,
    MAML,
    MLP,
    ClassImages,
    Conv4,
    EpisodeSampler,
    InputError,
    MetaSGD,
    Reptile,
    ResNet12,
    adapt,
    evaluate,
    meta_gradients,
)
from gametalearn.evaluation import protocol_of
from gametalearn.models import TaskNorm
from tests.support.modules import Function

LEARNER = MAML(0.3, 2)
WAYS = 3


@pytest.fixture
def source() -> EpisodeSampler:
    return sampler()


def sampler(size: int = 16) -> EpisodeSampler:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 1, size, size), dtype=torch.uint8, generator=generator)
    return EpisodeSampler(ClassImages.from_tensors(images, torch.arange(60) // 6), WAYS, 2, 3, 1)


def task_of(size: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = sampler(size).sample(1).to(dtype=torch.float64)
    return batch.support_x[0], batch.support_y[0], batch.query_x[0], batch.query_y[0]


def one_by_one(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x[i : i + 1]) for i in range(len(x))])


def check_alone(model: nn.Module, x: Tensor, wanted: Tensor) -> None:
    """One by one, all at once, some: in the mode that it came in, in training and in eval mode."""
    modes = [m.training for m in model.modules()]
    for change in (lambda: model, model.train, model.eval):
        change()
        torch.testing.assert_close(one_by_one(model, x), wanted, rtol=0, atol=1e-10)
        torch.testing.assert_close(model(x).detach(), wanted, rtol=0, atol=1e-10)
        torch.testing.assert_close(model(x[1:3]).detach(), wanted[1:3], rtol=0, atol=1e-10)
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training


# ---------------------------------------------------------------------------------------------
# against oracles


class Stack(nn.Module):
    """Mixing of features, a norm and a sigmoid, a few times, and a head on their mean."""

    KINDS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

    def __init__(self, widths: list[int], dims: int, **options: Any) -> None:
        super().__init__()
        self.mixing = nn.ParameterList(
            torch.randn(b, a) / a**0.5 for a, b in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(self.KINDS[dims](n, **options) for n in widths[1:])
        self.head = nn.Linear(widths[-1], WAYS)
        for norm in self.norms:
            if norm.weight is not None:
                nn.init.normal_(norm.weight)  # type: ignore[arg-type]
                nn.init.normal_(norm.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        for mixing, norm in zip(self.mixing, self.norms, strict=True):
            x = torch.sigmoid(norm(torch.einsum("oi,bi...->bo...", mixing, x)))
        output: Tensor = self.head(x.flatten(2).mean(2) if x.ndim > 2 else x)
        return output


def by_hand(model: Stack, x: Tensor, y: Tensor, query: Tensor, steps: int) -> tuple[Tensor, Any]:
    """Descent and normalisation written out in numbers; the predictions and each norm's statistics."""

    def forward(p: dict[str, Tensor], x: Tensor, of: Tensor) -> tuple[Tensor, Any]:
        """Outputs for ``x``, normalised by what ``of`` has, and the statistics."""
        found = []
        for layer, norm in enumerate(model.norms):
            mixing = p[f"mixing.{layer}"]
            x, of = (torch.einsum("oi,bi...->bo...", mixing, t) for t in (x, of))
            flat = of.transpose(0, 1).flatten(1)
            mean = flat.sum(1) / flat.shape[1]
            var = ((flat - mean[:, None]) ** 2).sum(1) / flat.shape[1]
            found.append((mean.detach(), var.detach()))
            shape = (1, -1, *[1] * (x.ndim - 2))
            weight = p.get(f"norms.{layer}.weight", torch.ones_like(mean)).view(shape)
            bias = p.get(f"norms.{layer}.bias", torch.zeros_like(mean)).view(shape)
            scale: Any = (var + norm.eps) ** 0.5  # type: ignore[operator]
            x, of = (
                1 / (1 + torch.exp(-((t - mean.view(shape)) / scale.view(shape) * weight + bias)))
                for t in (x, of)
            )
        x = x.flatten(2).mean(2) if x.ndim > 2 else x
        return x @ p["head.weight"].T + p["head.bias"], found

    params: dict[str, Tensor] = {
        n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()
    }
    for _ in range(steps):
        logits, _ = forward(params, x, x)
        loss = (logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]).mean()
        grads = torch.autograd.grad(loss, list(params.values()))
        params = {
            n: (p - 0.3 * g).detach().requires_grad_()
            for (n, p), g in zip(params.items(), grads, strict=True)
        }
    with torch.no_grad():
        return forward(params, query, x)


@settings(max_examples=40, deadline=None)
@given(
    dims=st.integers(0, 3),
    widths=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    support=st.integers(2, 6),
    queries=st.integers(3, 5),
    size=st.integers(1, 3),
    steps=st.integers(0, 2),
    affine=st.booleans(),
    track=st.booleans(),
    momentum=st.sampled_from([0.1, 0.9, None]),
    eps=st.sampled_from([1e-5, 0.1]),
    seed=st.integers(0, 99),
)
def test_any_stack_is_what_it_is_by_hand(
    dims: int,
    widths: list[int],
    support: int,
    queries: int,
    size: int,
    steps: int,
    affine: bool,
    track: bool,
    momentum: float | None,
    eps: float,
    seed: int,
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options: Any = {"affine": affine, "track_running_stats": track, "momentum": momentum}
        model = Stack(widths, dims, eps=eps, **options).double()
        shape = [widths[0], *[size] * dims]
        x, query = (torch.randn(n, *shape, dtype=torch.float64) for n in (support, queries))
        y = torch.randint(WAYS, (support,))
    state = copy.deepcopy(model.state_dict())
    wanted, statistics = by_hand(model, x, y, query, steps)
    adapted: Any = adapt(model, x, y, MAML(0.3, steps))
    check_alone(adapted, query, wanted)
    for norm, (mean, var) in zip(adapted.norms, statistics, strict=True):
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, var)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(type(norm) in Stack.KINDS and norm.training for norm in model.norms)


OURS: list[Any] = [
    ("stride", 16, lambda: Conv4(WAYS, image_size=16, hidden=4)),
    ("support", 16, lambda: Conv4(WAYS, image_size=16, hidden=4, norm="support")),
    ("max", 16, lambda: Conv4(WAYS, image_size=16, hidden=4, pool="max", mean=(0.4,), std=(0.3,))),
    ("resnet", 16, lambda: ResNet12(WAYS, 1, (3, 4))),
    ("group", 16, lambda: Conv4(WAYS, image_size=16, hidden=4, norm="group")),
    ("none", 16, lambda: ResNet12(WAYS, 1, (3,), norm="none")),
    ("mlp", 16, lambda: MLP(256, WAYS)),
]
IDS = [name for name, *_ in OURS]


def ours(name: str) -> Any:
    torch.manual_seed(0)
    return next(make for known, _, make in OURS if known == name)().double()


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize(
    "learner",
    [LEARNER, ANIL(0.3, 2), Reptile(0.1, 3), MetaSGD(0.2, 2)],
    ids=["maml", "anil", "reptile", "metasgd"],
)
def test_one_image_at_a_time_is_the_inductive_protocol(
    name: str, learner: Any, source: EpisodeSampler
) -> None:
    model = ours(name)
    meta = learner.meta_parameters(dict(model.named_parameters()))

    def scores(score: Any) -> Any:
        return evaluate(
            model,
            source,
            learner,
            4,
            7,
            meta=meta,
            protocol="inductive",
            score=score,
            tasks_at_once=4,
        ).values

    batch = source.with_seed(7).sample(4).to(dtype=torch.float64)
    losses, right = [], []
    for x, y, q, t in zip(
        batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True
    ):
        adapted = adapt(model, x, y, learner, meta=meta)
        logits = one_by_one(adapted, q)
        check_alone(adapted, q, logits)
        losses.append(float(F.cross_entropy(logits, t)))
        right.append(float((logits.argmax(1) == t).double().mean()))
    np.testing.assert_allclose(scores(lambda p, t: F.cross_entropy(p, t)), losses, rtol=1e-9)
    np.testing.assert_allclose(scores("accuracy"), right, atol=1e-6)
    assert type(adapted) is type(model)
    assert protocol_of(adapted) == "inductive"


def test_the_model_is_not_touched() -> None:
    x, y, *_ = task_of()
    for name in IDS:
        model = ours(name)
        types, norm = [type(m) for m in model.modules()], getattr(model, "norm", None)
        state = copy.deepcopy(model.state_dict())
        adapt(model, x, y, LEARNER)
        assert [type(m) for m in model.modules()] == types
        assert getattr(model, "norm", None) == norm
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["stride", "support"])
def test_the_transductive_way_is_asked_for(name: str) -> None:
    x, y, q, _ = task_of()
    model = ours(name)
    adapted = adapt(model, x, y, LEARNER, protocol="transductive")
    assert [type(m) for m in adapted.modules()] == [type(m) for m in model.modules()]
    assert adapted.state_dict().keys() == model.state_dict().keys()
    fresh = ours(name)
    fresh.load_state_dict(adapted.state_dict())
    torch.testing.assert_close(adapted(q), fresh(q))
    assert not torch.allclose(adapted(q[:4]), adapted(q)[:4], atol=1e-3)
    if name == "support":
        torch.testing.assert_close(adapted(q, x), fresh(q, x))
        torch.testing.assert_close(adapted(q, x), adapt(model, x, y, LEARNER)(q))
    with pytest.raises(InputError, match="must be 'inductive' or 'transductive', got 'query-at"):
        adapt(model, x, y, LEARNER, protocol="query-at-a-time")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------
# modules of one's own


def own(*between: nn.Module) -> nn.Sequential:
    """Convolution, ``between`` and a linear head."""
    torch.manual_seed(0)
    conv, head = nn.Conv2d(1, 4, 3, stride=4), nn.Linear(64, WAYS)
    return nn.Sequential(conv, *between, nn.Flatten(), head).double()


def test_what_has_running_statistics_keeps_them() -> None:
    x, y, q, _ = task_of()
    model = own(nn.BatchNorm2d(4), nn.Tanh())
    for _ in range(5):
        model(torch.rand(20, 1, 16, 16, dtype=torch.float64))
    model.eval()
    wanted = adapt(model, x, y, LEARNER, protocol="transductive")
    adapted = adapt(model, x, y, LEARNER)
    check_alone(adapted, q, wanted(q).detach())
    state = model.state_dict()
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(adapted.state_dict()[name], state[name])
    # one that is in training mode beside it does not
    both = own(nn.BatchNorm2d(4), nn.Tanh(), nn.BatchNorm2d(4))
    both[1].load_state_dict(model[1].state_dict())
    both[1].eval()
    mixed = adapt(both, x, y, LEARNER)
    assert torch.equal(mixed.state_dict()["1.running_mean"], state["1.running_mean"])
    assert not torch.equal(
        mixed.state_dict()["3.running_mean"], both.state_dict()["3.running_mean"]
    )
    check_alone(mixed, q, one_by_one(mixed, q))


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.LayerNorm([4, 4, 4]),
        nn.Dropout2d(0),
    ],
)
def test_other_layers_are_what_they_were(layer: nn.Module) -> None:
    x, y, q, _ = task_of()
    model = own(copy.deepcopy(layer), nn.Tanh())
    adapted, same = (
        adapt(model, x, y, LEARNER, protocol=how) for how in ("inductive", "transductive")
    )
    assert [type(m) for m in adapted.modules()] == [type(m) for m in model.modules()]
    assert adapted.state_dict().keys() == same.state_dict().keys()
    assert torch.equal(adapted(q), same(q))
    check_alone(adapted, q, same(q).detach())


def test_one_support_example() -> None:
    x, y, q, _ = task_of()
    model = own(nn.BatchNorm2d(4), nn.Tanh())
    adapted = adapt(model, x[:1], y[:1], LEARNER)  # 16 positions of one image
    check_alone(adapted, q, one_by_one(adapted, q))
    features = adapted[0](x[:1])  # type: ignore[index]
    torch.testing.assert_close(adapted.state_dict()["1.running_mean"], features.mean((0, 2, 3)))
    # one value a feature: its variance is zero, and its own prediction the norm's bias
    flat = nn.Sequential(nn.Flatten(), nn.Linear(256, 4), nn.BatchNorm1d(4), nn.Linear(4, WAYS))
    flat = flat.double()
    single = adapt(flat, x[:1], y[:1], MAML(0.3, 0))
    state = single.state_dict()
    assert torch.equal(state["2.running_var"], torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(single(x[:1])[0], state["3.bias"])
    with pytest.raises(InputError, match="the support set is empty"):
        adapt(model, x[:0], y[:0], MAML(0.3, 0))
    # nor is a dependence overlooked where there is one example to measure it on
    with pytest.raises(InputError, match="depend on the inputs beside them"):
        adapt(own(Function(centred)), x[:1], y[:1], LEARNER)


def test_frozen_parameters() -> None:
    x, y, q, _ = task_of()
    model = own(nn.BatchNorm2d(4), nn.Tanh())
    nn.init.normal_(model[1].weight)  # type: ignore[arg-type]
    model[1].requires_grad_(False)
    adapted = adapt(model, x, y, LEARNER)
    state = adapted.state_dict()
    assert torch.equal(state["1.weight"], model[1].weight)  # type: ignore[arg-type]
    assert not torch.equal(state["0.weight"], model[0].weight)  # type: ignore[arg-type]
    assert not adapted[1].weight.requires_grad  # type: ignore[index]
    features = F.conv2d(x, state["0.weight"], state["0.bias"], stride=4)
    torch.testing.assert_close(state["1.running_mean"], features.mean((0, 2, 3)))
    torch.testing.assert_close(state["1.running_var"], features.var((0, 2, 3), correction=0))
    check_alone(adapted, q, one_by_one(adapted, q))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    x, y, q, _ = task_of()
    model = own(nn.BatchNorm2d(4), nn.Tanh())
    wanted = adapt(model, x, y, MAML(0.3, 0)).state_dict()["1.running_var"]
    adapted = adapt(model.to(dtype), x, y, MAML(0.3, 0))
    assert all(t.dtype == dtype for t in adapted.state_dict().values() if t.is_floating_point())
    torch.testing.assert_close(
        adapted.state_dict()["1.running_var"].double(), wanted, rtol=0.1, atol=0
    )
    torch.testing.assert_close(one_by_one(adapted, q.to(dtype)), adapted(q.to(dtype)).detach())


class WithAct(nn.BatchNorm2d):
    """A layer with a forward of its own, and modules within it."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.drop, self.act = nn.Dropout(0.5), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.act(super().forward(x) * 2)
        return self.drop(output) if self.drop.p == 0 else output


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self, runs: int) -> None:
        super().__init__()
        self.first = self.second = nn.BatchNorm2d(4)
        self.runs = runs

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(x)
        output: Tensor = self.first(torch.tanh(x)) if self.runs == 2 else x
        return output


class Aside(nn.Module):
    """Norms that no forward runs."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.BatchNorm2d(4)
        self.aside = nn.BatchNorm2d(4)
        self.bare = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.used(x)
        return output


def hooked() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 3 + 1,))
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


def parametrized(kind: Any) -> nn.Module:
    class Positive(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight**2

    layer = kind(4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Positive())
    return layer  # type: ignore[no-any-return]


FREEZABLE: list[Any] = [
    ("plain", lambda: nn.BatchNorm2d(4)),
    ("no running statistics", lambda: nn.BatchNorm2d(4, track_running_stats=False)),
    ("synchronised", lambda: nn.SyncBatchNorm(4)),
    ("a forward of its own", lambda: WithAct(4)),
    ("hooks", hooked),
    ("parametrized", lambda: parametrized(nn.BatchNorm2d)),
    ("two names", lambda: Twice(1)),
    ("not run", Aside),
    ("ours", lambda: TaskNorm(4)),
    ("lazy", lambda: nn.LazyBatchNorm2d()),
]


@pytest.mark.parametrize("make", [m for _, m in FREEZABLE], ids=[n for n, _ in FREEZABLE])
def test_any_batch_norm_layer(make: Any) -> None:
    x, y, q, _ = task_of()
    model = own(make(), nn.Tanh())
    model(x)  # lazy ones are made
    model = model.double()
    with_batch: Any = adapt(model, x, y, LEARNER, protocol="transductive")
    adapted: Any = adapt(model, x, y, LEARNER)
    for name, p in with_batch.named_parameters():
        assert torch.equal(p, adapted.get_parameter(name))
    # the support set, as one batch, is what it was normalised by
    torch.testing.assert_close(adapted(x), with_batch(x), rtol=1e-9, atol=1e-12)
    check_alone(adapted, q, one_by_one(adapted, q))
    assert isinstance(adapted[1], nn.BatchNorm2d | nn.SyncBatchNorm | Twice | Aside)
    # copies of it too, one that is adapted further, and one that is saved with its class
    for again in (copy.deepcopy(adapted), copy.copy(adapted), adapt(adapted, x, y, MAML(0.3, 0))):
        check_alone(again, q, one_by_one(adapted, q))
    layer = copy.copy(adapted[1])
    assert layer.train().training == (type(layer) in (Twice, Aside))


@pytest.mark.filterwarnings("ignore:.*computed task by task")
def test_it_can_be_tested_and_trained_on(source: EpisodeSampler) -> None:
    x, y, *_ = task_of()
    for model in (ours("stride"), own(nn.BatchNorm2d(4), nn.Tanh())):
        adapted = adapt(model, x, y, LEARNER)
        assert evaluate(adapted, source, LEARNER, 3).protocol == "inductive"
    batch = source.sample(2).to(dtype=torch.float64)
    methods: list[Any] = ["verify", "loop"]
    rows = [meta_gradients(adapted, batch, LEARNER, method=how).rows for how in methods]
    torch.testing.assert_close(*rows, rtol=1e-8, atol=1e-12)


def test_a_forward_writes_nothing_into_the_copy() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.calls = nn.BatchNorm2d(4), 0
            self.kept: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.kept.append(x)
            output: Tensor = self.norm(x)
            return output

    x, y, q, _ = task_of()
    adapted: Any = adapt(own(Keeps(), nn.Tanh()), x, y, LEARNER)
    assert (adapted[1].calls, adapted[1].kept) == (0, [])
    assert not adapted[1].norm._forward_pre_hooks
    check_alone(adapted, q, one_by_one(adapted, q))


def test_no_random_number_is_drawn_for_it() -> None:
    x, y, *_ = task_of()
    model = own(nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.5), nn.BatchNorm2d(4))
    states = []
    for how in ("inductive", "transductive"):
        torch.manual_seed(3)
        adapted = adapt(model, x, y, LEARNER, protocol=how)
        states.append((torch.get_rng_state(), adapted.get_parameter("0.weight")))
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])


def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def by_batch(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def of_six(x: Tensor) -> Tensor:
    return x.view(6, -1, *x.shape[1:])[:, 0]


class Unhooked(nn.Module):
    """Calls a layer's forward, and not the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm.forward(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        z = x.mean((2, 3))[None]
        output: Tensor = x + self.attention(z, z, z, need_weights=False)[0][0][:, :, None, None]
        return output


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Function(centred), "something in its forward that is no batch norm layer"),
        (lambda: Function(by_batch), "something in its forward that is no batch norm layer"),
        (lambda: nn.Sequential(nn.BatchNorm2d(4), Function(centred)), "something in its forward"),
        (Attention, "something in its forward"),
        (lambda: nn.Sequential(nn.Dropout(0.5), Function(centred)), "something in its forward"),
        (lambda: Function(of_six), "something in its forward that is no batch norm layer"),
        (Unhooked, r"its BatchNorm2d '1\.norm'"),
        (lambda: parametrized(TaskNorm), r"its ParametrizedTaskNorm '1'"),
    ],
    ids=[
        "centred",
        "F.batch_norm",
        "beside a layer",
        "attention",
        "behind dropout",
        "six at a time",
        "unhooked",
        "ours, parametrized",
    ],
)
def test_what_cannot_be_frozen_is_said(make: Any, why: str) -> None:
    x, y, *_ = task_of()
    model = own(make(), nn.Tanh())
    with pytest.raises(
        InputError,
        match=f"adapt: predictions of Sequential depend on the inputs beside them, by {why}.*"
        "pass protocol='transductive'",
    ):
        adapt(model, x, y, LEARNER)
    adapted = adapt(model, x, y, LEARNER, protocol="transductive")
    assert [type(m) for m in adapted.modules()] == [type(m) for m in model.modules()]


def test_a_layer_that_runs_twice_has_room_for_one() -> None:
    x, y, *_ = task_of()
    with pytest.raises(
        InputError, match=r"BatchNorm2d '1\.first' runs several times in a forward of Sequential"
    ):
        adapt(own(Twice(2), nn.Tanh()), x, y, LEARNER)


class Beside(nn.Module):
    """A user's own model that is handed the support set."""

    uses_support = True

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, stride=4), nn.BatchNorm2d(4)
        self.head = nn.Linear(64, WAYS)

    def embed(self, x: Tensor) -> Tensor:
        output: Tensor = self.norm(self.conv(x)).flatten(1)
        return output

    def forward(self, x: Tensor, support_x: Tensor | None = None) -> Tensor:
        mean: Any = 0.0 if support_x is None else self.embed(support_x).mean(0)
        output: Tensor = self.head(self.embed(x) - mean)
        return output


def test_a_model_of_ones_own_that_is_handed_the_support_set() -> None:
    x, y, q, _ = task_of()
    torch.manual_seed(0)
    adapted = adapt(Beside().double(), x, y, LEARNER).train()
    alone = torch.cat([adapted(query[None], x) for query in q])
    torch.testing.assert_close(adapted(q, x), alone)


# ---------------------------------------------------------------------------------------------
# elsewhere

WITHOUT = """
import sys
sys.modules["gametalearn"] = None  # its import fails
import torch, torch.nn as nn, torch.nn.functional as F


def block(inputs, outputs, stride):
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.ModuleDict({"conv": conv, "norm": nn.BatchNorm2d(outputs)})


class Conv(nn.Module):
    def __init__(self, pool, mean):
        super().__init__()
        if mean:
            for name in ("mean", "std"):
                self.register_buffer(name, torch.zeros(1, 1, 1))
        self.pool = pool
        stride = 2 if pool == "stride" else 1
        self.blocks = nn.ModuleList(block(4 if i else 1, 4, stride) for i in range(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = (x - self.mean) / self.std if hasattr(self, "mean") else x
        for b in self.blocks:
            x = F.relu(b["norm"](b["conv"](x)))
            x = F.max_pool2d(x, 2) if self.pool == "max" else x
        return self.head(x.mean((2, 3)) if self.pool == "stride" else x.flatten(1))


class Residual(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        sizes = [inputs, outputs, outputs, outputs]
        self.blocks = nn.ModuleList(block(sizes[i], outputs, 1) for i in range(3))
        self.shortcut, self.norm = nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x):
        y = x
        for i, b in enumerate(self.blocks):
            y = b["norm"](b["conv"](y))
            y = F.leaky_relu(y, 0.1) if i < 2 else y
        return F.max_pool2d(F.leaky_relu(self.norm(self.shortcut(x)) + y, 0.1), 2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Residual(1, 3), Residual(3, 4)])
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        for b in self.blocks:
            x = b(x)
        return self.head(x.mean((2, 3)))


PLAIN = {"stride": lambda: Conv("stride", False), "support": lambda: Conv("stride", False),
         "max": lambda: Conv("max", True), "resnet": Net}
for name, make in PLAIN.items():
    x, wanted = torch.load(f"{name}-io.pt", weights_only=True)
    model = make().double()
    model.load_state_dict(torch.load(f"{name}.pt", weights_only=True))
    for predict in (model.eval(), torch.export.load(f"{name}.pt2").module()):
        one = torch.cat([predict(x[i : i + 1]) for i in range(len(x))])
        torch.testing.assert_close(one, wanted, rtol=0, atol=1e-10)
        torch.testing.assert_close(predict(x), wanted, rtol=0, atol=1e-10)
x, wanted = torch.load("own-io.pt", weights_only=True)
model = torch.load("own.pt", weights_only=False)
torch.testing.assert_close(torch.cat([model(q[None]) for q in x]), wanted, rtol=0, atol=1e-10)
print("all agree")
"""


def test_where_gametalearn_is_not_installed(tmp_path: Path) -> None:
    x, y, q, _ = task_of()
    for name in ("stride", "support", "max", "resnet"):
        adapted = adapt(ours(name), x, y, LEARNER)
        wanted = one_by_one(adapted, q)
        torch.save((q, wanted), tmp_path / f"{name}-io.pt")
        torch.save(adapted.state_dict(), tmp_path / f"{name}.pt")
        shapes = ({0: torch.export.Dim("images")},)
        exported = torch.export.export(adapted, (x,), dynamic_shapes=shapes)
        torch.export.save(exported, tmp_path / f"{name}.pt2")
        # as it came, in training mode, but the layers do not listen
        assert adapted.training
        check_alone(adapted, q, wanted)
    model = own(nn.BatchNorm2d(4), nn.Tanh(), nn.BatchNorm2d(4, track_running_stats=False))
    adapted = adapt(model, x, y, LEARNER)
    torch.save((q, one_by_one(adapted, q)), tmp_path / "own-io.pt")
    torch.save(adapted, tmp_path / "own.pt")
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", WITHOUT],
        cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "all agree" in done.stdout


def test_a_pickled_layer_is_one_of_pytorchs() -> None:
    x, y, *_ = task_of()
    adapted: Any = adapt(own(WithAct(4), nn.BatchNorm2d(4)), x, y, LEARNER)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(adapted, protocol))
        assert [type(layer) for layer in again[1:3]] == [WithAct, nn.BatchNorm2d]
        assert not any(layer.training for layer in again[1:3])
        assert torch.equal(again(x), adapted(x))


@pytest.mark.parametrize("name", ["stride", "max", "resnet"])
def test_its_state_loads_into_ours(name: str, source: EpisodeSampler) -> None:
    x, y, q, _ = task_of()
    adapted = adapt(ours(name), x, y, LEARNER)
    fresh: Any = {
        "stride": lambda: Conv4(WAYS, image_size=16, hidden=4, norm="frozen"),
        "max": lambda: Conv4(
            WAYS, image_size=16, hidden=4, pool="max", norm="frozen", mean=(0.0,), std=(1.0,)
        ),
        "resnet": lambda: ResNet12(WAYS, 1, (3, 4), norm="frozen"),
    }[name]().double()
    with pytest.raises(
        InputError, match=r"FrozenBatchNorm2d .* load the state_dict of a model that"
    ):
        evaluate(fresh, source, LEARNER, 2)
    fresh.load_state_dict(adapted.state_dict())
    check_alone(fresh, q, one_by_one(adapted, q))
    found = [evaluate(model, source, LEARNER, 3).values.tolist() for model in (fresh, adapted)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (
            [[1.0] * 4] * 2,
            torch.arange(2),
            "support_x must be a tensor, examples first, got a list",
        ),
        (
            np.ones((2, 4)),
            torch.arange(2),
            "support_x must be a tensor, examples first, got a ndarray",
        ),
        (torch.ones(2, 4), [0, 1], "support_y must be a tensor, examples first, got a list"),
        (torch.ones(2, 4), torch.arange(3), "2 inputs in support_x and 3 targets in support_y"),
        (
            torch.ones(2, 4).long(),
            torch.arange(2),
            "the inputs are int64, and Linear computes in float32",
        ),
    ],
)
def test_what_is_no_support_set_is_named(x: Any, y: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        adapt(nn.Linear(4, 3), x, y, MAML(0.1))
