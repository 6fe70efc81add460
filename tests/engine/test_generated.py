"""Forwards that nobody would think of: replay equals loop, and the model is as it was.

A forward is a list of steps over a list of tensors ``(B, 4, 6, 6)``: layers (shared among steps),
writes in place, views and slices that are written to, ``no_grad`` and ``detach``, tensors used again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gametalearn import MAML, TaskBatch, meta_gradients
from gametalearn.gradients import adapt_and_score
from tests.support.device import DEVICE

CHANNELS = 4
Step = Callable[["Generated", list[Tensor], int, int], None]


def new(function: Callable[[Generated, Tensor, Tensor], Tensor]) -> Step:
    """A step that adds a tensor, made of two."""

    def step(m: Generated, values: list[Tensor], i: int, j: int) -> None:
        values.append(function(m, values[i], values[j]))

    return step


def write(function: Callable[[Generated, Tensor, Tensor], Any]) -> Step:
    """A step that writes into a tensor."""

    def step(m: Generated, values: list[Tensor], i: int, j: int) -> None:
        function(m, values[i], values[j])

    return step


def augmented_sum(m: Generated, values: list[Tensor], i: int, j: int) -> None:
    values[i] += values[j]


def augmented_product(m: Generated, values: list[Tensor], i: int, j: int) -> None:
    values[i] *= values[j].tanh()


def exchanged(m: Generated, values: list[Tensor], i: int, j: int) -> None:
    values[i], values[j] = values[j], values[i]


def slice_written(m: Generated, x: Tensor, y: Tensor) -> None:
    x[:, 1:3] = y[:, :2] * 0.5


def rows_written(m: Generated, x: Tensor, y: Tensor) -> None:
    x[:, :, 0] = 0.25


def scaled_without_gradient(m: Generated, x: Tensor, y: Tensor) -> None:
    with torch.no_grad():
        x.mul_(0.8)


def made_without_gradient(m: Generated, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        z = x * 0.5 + y
    return z + x


def two_layers_in_place(m: Generated, x: Tensor, y: Tensor) -> Tensor:
    z = m.norms[0](m.convolutions[0](x))
    z += y
    return F.relu(z, inplace=True)


def buffer_written(m: Generated, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        m.running.mul_(0.9).add_(x.mean((0, 2, 3)).detach(), alpha=0.1)
    return x - m.running.view(-1, 1, 1)


STEPS: dict[str, Step] = {
    "convolution 0": new(lambda m, x, y: m.convolutions[0](x)),
    "convolution 1": new(lambda m, x, y: m.convolutions[1](x)),
    "norm 0": new(lambda m, x, y: m.norms[0](x)),
    "norm 1": new(lambda m, x, y: m.norms[1](x)),
    "convolution and norm": new(lambda m, x, y: m.norms[0](m.convolutions[0](x))),
    "activation": new(lambda m, x, y: m.activation(x)),  # one instance, however often
    "relu": new(lambda m, x, y: F.relu(x)),
    "relu in place": new(lambda m, x, y: F.relu(x, inplace=True)),
    "relu_": write(lambda m, x, y: x.relu_()),
    "relu of a view": write(lambda m, x, y: torch.relu_(x[:, :2])),
    "leaky relu in place": new(lambda m, x, y: F.leaky_relu(x, 0.1, inplace=True)),
    "pool": new(lambda m, x, y: F.max_pool2d(x, 3, 1, 1)),
    "tanh": new(lambda m, x, y: torch.tanh(x)),
    "sum": new(lambda m, x, y: x + y),
    "product with a parameter": new(lambda m, x, y: x * m.scale),
    "joined": new(lambda m, x, y: torch.cat([x[:, :2], y[:, 2:]], 1)),
    "view": new(lambda m, x, y: x.flatten(2).unflatten(2, (6, 6))),
    "turned": new(lambda m, x, y: x.transpose(2, 3)),
    "detached": new(lambda m, x, y: x.detach()),
    "copied": new(lambda m, x, y: x.clone()),
    "same": new(lambda m, x, y: x),
    "without gradient": new(made_without_gradient),
    "residual in place": new(two_layers_in_place),
    "buffer": new(buffer_written),
    "+=": augmented_sum,
    "*=": augmented_product,
    "exchange": exchanged,
    "add_": write(lambda m, x, y: x.add_(y, alpha=0.3)),
    "mul_": write(lambda m, x, y: x.mul_(1.1)),
    "clamp_": write(lambda m, x, y: x.clamp_(-2.0, 2.0)),
    "sigmoid_": write(lambda m, x, y: x.sigmoid_()),
    "slice": write(slice_written),
    "rows": write(rows_written),
    "view's mul_": write(lambda m, x, y: x.view(len(x), -1).mul_(0.9)),
    "half's add_": write(lambda m, x, y: x.chunk(2, 1)[0].add_(0.1)),
    "copy_": write(lambda m, x, y: x.copy_(y * 0.5)),
    "zero_": write(lambda m, x, y: x[:, :1].zero_()),
    "no gradient, mul_": write(scaled_without_gradient),
    "detached, mul_": write(lambda m, x, y: x.detach().mul_(0.9)),
}


class Generated(nn.Module):
    """A forward made of steps ``(name, i, j)``; the indices count tensors in a circle."""

    running: Tensor
    convolutions: nn.ModuleList
    norms: nn.ModuleList
    activation: nn.PReLU
    scale: nn.Parameter

    def __init__(self, steps: tuple[tuple[str, int, int], ...], shared: bool) -> None:
        super().__init__()
        self.steps = steps
        first = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=2, bias=False)
        self.convolutions = nn.ModuleList([first, first if shared else second])
        norm = nn.BatchNorm2d(CHANNELS)
        self.norms = nn.ModuleList(
            [norm, norm if shared else nn.BatchNorm2d(CHANNELS, affine=False)]
        )
        self.activation = nn.PReLU()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, CHANNELS).view(-1, 1, 1))
        self.register_buffer("running", torch.zeros(CHANNELS))
        self.head = nn.Linear(CHANNELS, 3)
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(-1.0, 1.5, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        values = [x * self.scale, x]
        for name, i, j in self.steps:
            STEPS[name](self, values, i % len(values), j % len(values))
        output: Tensor = self.head(sum(v.mean((2, 3)) for v in values[-2:]))
        return output


def episodes() -> TaskBatch:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(3).repeat(2, 1)
    x, z = torch.randn(2, 2, 3, CHANNELS, 6, 6, generator=g, dtype=torch.float64).unbind()
    return TaskBatch(x, y, z, y, torch.zeros(2, dtype=torch.int64)).to(DEVICE)


all_steps = st.lists(
    st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 5), st.integers(0, 5)),
    min_size=1,
    max_size=9,
)


REFUSED = "in-?place|view size is not compatible|refer to a single memory location"
"""What PyTorch says of a forward that no one can differentiate."""


def check(chosen: list[tuple[str, int, int]], shared: bool, first_order: bool, chunk: int) -> None:
    torch.manual_seed(0)
    model, batch = Generated(tuple(chosen), shared).to(DEVICE, torch.float64), episodes()
    learner = MAML(0.1, 1, first_order)
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    try:
        loop = meta_gradients(model, batch, learner, method="loop")
    except RuntimeError:  # what autograd needs was overwritten, or there is no such view
        for method in ("loop", "replay"):
            with pytest.raises(RuntimeError, match=REFUSED):
                meta_gradients(model, batch, learner, method=method, chunk=chunk)
    else:
        got = meta_gradients(model, batch, learner, method="replay", chunk=chunk)
        for name in ("rows", "updates", "loss", "score"):
            expected = getattr(loop, name)
            scale = expected.abs().max().clamp_min(1e-6)
            assert ((getattr(got, name) - expected).abs().max() / scale).item() < 1e-9, name
        value, score = adapt_and_score(model, batch, learner, method="replay", chunk=chunk)
        torch.testing.assert_close(value, loop.loss, rtol=1e-9, atol=1e-12)
        assert torch.equal(score, loop.score)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


looped = "ignore:gametalearn. Generated is computed task by task .* cannot be replayed:UserWarning"
slowly = "ignore:There is a performance drop:UserWarning"
cases = given(all_steps, st.booleans(), st.booleans(), st.sampled_from([1, 2]))
health = list(HealthCheck)


@pytest.mark.filterwarnings("error", looped, slowly)
@cases
@settings(max_examples=60, deadline=None, suppress_health_check=health, derandomize=True)
def test_sixty_forwards(
    chosen: list[tuple[str, int, int]], shared: bool, first_order: bool, chunk: int
) -> None:
    check(chosen, shared, first_order, chunk)


@pytest.mark.slow
@pytest.mark.filterwarnings("error", looped, slowly)
@cases
@settings(max_examples=500, deadline=None, suppress_health_check=health)
def test_five_hundred_forwards(
    chosen: list[tuple[str, int, int]], shared: bool, first_order: bool, chunk: int
) -> None:
    check(chosen, shared, first_order, chunk)
