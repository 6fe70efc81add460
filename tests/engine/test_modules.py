"""Modules that users write: each computed exactly, by replay where that can be."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gametalearn import MAML, TaskBatch, meta_gradients
from gametalearn.gradients import adapt_and_score
from tests.support.device import DEVICE


def episodes(tasks: int = 3, inputs: tuple[int, ...] = (6, 8), seed: int = 0) -> TaskBatch:
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(3).repeat(tasks, 2)
    x = [torch.randn(tasks, 6, *inputs, generator=g, dtype=torch.float64) for _ in range(2)]
    return TaskBatch(x[0], y, x[1], y, torch.zeros(tasks, dtype=torch.int64)).to(DEVICE)


class Attention(nn.Module):
    """LayerNorm and attention over a sequence ``(B, 6, 8)``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        z = x + self.attention(z, z, z, need_weights=False)[0]
        output: Tensor = self.head(z.mean(1))
        return output


class Tied(nn.Module):
    """One weight matrix under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 48)
        self.second = nn.Linear(48, 48)
        self.second.weight = self.first.weight
        self.head = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.flatten(1)))
        output: Tensor = self.head(torch.tanh(self.second(x)))
        return output


class Frozen(nn.Module):
    """A frozen first layer, a parameter that nothing uses, and a buffer."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 10).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(4))
        self.register_buffer("scale", torch.full((10,), 1.5))
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(torch.sigmoid(self.first(x.flatten(1))) * self.scale)
        return output


class Branching(nn.Module):
    """What is computed depends on the numbers that come in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x.flatten(1))
        return torch.tanh(output) if output.mean() > 0 else output


class Images(nn.Module):
    """Layers in unusual order and form: each engine rule on its edge."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=(1, 0), dilation=(1, 2), padding_mode="zeros"),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, (3, 1), padding="same", groups=2, bias=False),
            nn.MaxPool2d(2, stride=1, padding=1),
            nn.BatchNorm2d(4, affine=False),
            nn.MaxPool2d((2, 1)),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Conv2d(4, 5, 1, stride=(2, 1)),
            nn.BatchNorm2d(5, eps=1e-3),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        with torch.no_grad():
            for m in self.body:
                if isinstance(m, nn.BatchNorm2d) and m.affine:
                    m.weight.copy_(torch.linspace(-1.5, 1.2, m.num_features))  # pooling of minima
                    m.bias.copy_(torch.linspace(0.3, -0.2, m.num_features))
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.body(x).flatten(1))
        return output


class Reread(nn.Module):
    """A convolution's result that is normalised, sliced, and read again after."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = F.max_pool2d(F.relu(self.norm(y)), 2).mean((2, 3))
        part = y[:, :1].square().mean((2, 3))
        output: Tensor = self.head(torch.cat([z, part], 1))
        return output


class Residual(nn.Module):
    """A ReLU in place whose input is read again, and a norm that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        a = F.relu(z, inplace=True)
        output: Tensor = self.head((z + a + F.max_pool2d(z, 3, 1, 1)).mean((2, 3)))
        return output


def same(model: nn.Module, batch: TaskBatch, bound: float = 1e-9, **options: Any) -> None:
    """Replay and loop agree, in every field, both orders, and for scores."""
    for first_order in (False, True):
        learner = MAML(0.3, 2, first_order)
        loop = meta_gradients(model, batch, learner, method="loop")
        got = meta_gradients(model, batch, learner, **options)
        for name in ("rows", "updates", "loss", "score"):
            expected = getattr(loop, name)
            scale = expected.abs().max().clamp_min(1e-12)
            assert ((getattr(got, name) - expected).abs().max() / scale).item() < bound, name
    scored = adapt_and_score(model, batch, MAML(0.3, 2), chunk=2)
    torch.testing.assert_close(scored[0], loop.loss, rtol=bound, atol=bound)


@pytest.mark.parametrize("make", [Attention, Tied, Frozen], ids=lambda c: c.__name__)
def test_modules_of_users(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().to(DEVICE, torch.float64)
    before = copy.deepcopy(model.state_dict())
    same(model, episodes(), chunk=2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("make", [Images, Residual, Reread], ids=lambda c: c.__name__)
def test_layers_on_images(make: type[nn.Module]) -> None:
    torch.manual_seed(1)
    model = make().to(DEVICE, torch.float64)
    batch = episodes(inputs=(2, 9, 8))
    model(batch.support_x[0])  # sizes the lazy layer
    same(model, batch, chunk=2)


def test_parameters_are_counted_once_and_in_order() -> None:
    model, batch = Tied().to(DEVICE, torch.float64), episodes()
    rows = meta_gradients(model, batch, MAML(0.3, 1)).rows
    assert rows.shape[1] == sum(p.numel() for p in model.parameters())
    frozen = Frozen().to(DEVICE, torch.float64)
    rows = meta_gradients(frozen, batch, MAML(0.3, 1)).rows
    trained = [p for p in frozen.parameters() if p.requires_grad]
    assert rows.shape[1] == sum(p.numel() for p in trained)
    assert trained[0] is frozen.unused
    assert not rows[:, :4].any()
    assert rows[:, 4:].any()


def test_batch_norm_with_running_statistics() -> None:
    """Trained: by the batch, whatever was recorded. Evaluated: by what was recorded, as asked."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)
    ).to(DEVICE, torch.float64)
    batch = episodes(inputs=(2, 6, 5))
    model(batch.support_x[0])
    recorded = copy.deepcopy(model[1].state_dict())
    same(model, batch)
    same(model.eval(), batch)
    for name, value in model[1].state_dict().items():
        assert torch.equal(value, recorded[name])


def test_data_dependent_control_flow_is_looped_and_said_once() -> None:
    torch.manual_seed(0)
    model, batch = Branching().to(DEVICE, torch.float64), episodes()
    with pytest.warns(UserWarning, match="Branching is computed task by task"):
        got = meta_gradients(model, batch, MAML(0.3, 2))
    loop = meta_gradients(model, batch, MAML(0.3, 2), method="loop")
    assert torch.equal(got.rows, loop.rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(model, batch)


def test_dropout_draws_as_a_loop_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 20), nn.Dropout(0.4), nn.Linear(20, 3))
    model, batch = model.to(DEVICE, torch.float64), episodes()
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="Sequential is computed task by task.*random"):
        got = meta_gradients(model, batch, MAML(0.3, 2))
    torch.manual_seed(5)
    loop = meta_gradients(model, batch, MAML(0.3, 2), method="loop")
    assert torch.equal(got.rows, loop.rows)
    again = meta_gradients(model, batch, MAML(0.3, 2))
    assert not torch.equal(got.rows, again.rows)
    same(model.eval(), batch)  # no dropout: replayed


def test_a_faulty_module_raises_its_own_error() -> None:
    class Faulty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layer(x)
            return output

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        meta_gradients(Faulty().to(DEVICE, torch.float64), episodes(), MAML())


def test_changes_of_a_module_are_seen() -> None:
    """Parameters, buffers, modes and settings may change between calls."""
    torch.manual_seed(0)
    norm, act = nn.BatchNorm1d(4), nn.Softplus()
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), norm, act, nn.Linear(4, 3)).to(
        DEVICE, torch.float64
    )
    batch, learner = episodes(2, inputs=(6,)), MAML(0.3, 1)

    def check() -> None:
        loop = meta_gradients(model, batch, learner, method="loop")
        torch.testing.assert_close(meta_gradients(model, batch, learner).rows, loop.rows)

    check()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    check()
    norm.eps = 0.1
    check()
    act.beta = 2.0
    check()
    norm.eval()
    check()
    assert norm.running_mean is not None
    norm.running_mean.add_(0.5)
    check()
    model[1].requires_grad_(False)
    check()
    model[3] = nn.Tanh()
    check()
