"""GradNorm against an independent implementation of the paper's algorithm, and what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gametalearn import GradNorm, InputError, TaskGradients, shared_columns
from gametalearn.models import MLP, Conv4, ResNet12
from gametalearn.weighting.gradnorm import weight_gradient
from tests.support.records import record

F64 = torch.float64


class Toy(nn.Module):
    """Regressions of one tanh layer's features, one head each; the losses are scaled (paper, 4)."""

    def __init__(self, scales: list[float], seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, std: float) -> Tensor:
            return std * torch.randn(*shape, generator=generator, dtype=F64)

        self.shared = nn.Parameter(normal(8, 6, std=0.3))
        self.heads = nn.ParameterList(normal(3, 8, std=0.3) for _ in scales)
        self.scales = scales
        common = normal(3, 6, std=1)
        self.targets = [common + normal(3, 6, std=0.5) for _ in scales]
        self.x = normal(64, 6, std=1)

    def losses(self) -> list[Tensor]:
        features = torch.tanh(self.x @ self.shared.T)
        return [
            scale * (features @ head.T - torch.tanh(self.x @ target.T)).square().mean()
            for scale, head, target in zip(self.scales, self.heads, self.targets, strict=True)
        ]

    def columns(self) -> slice | Tensor:
        return shared_columns({n: p.shape for n, p in self.named_parameters()}, "shared")

    def record(self) -> TaskGradients:
        """One task an objective."""
        losses, parameters = self.losses(), list(self.parameters())
        grads = [
            torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
            for loss in losses
        ]
        rows = torch.stack([torch.cat([g.flatten() for g in task]) for task in grads])
        loss = torch.stack(losses).detach()
        group = torch.arange(len(losses))
        return TaskGradients(rows, rows, loss, torch.zeros_like(loss), group)

    @torch.no_grad()
    def descend(self, update: Tensor, lr: float) -> None:
        start = 0
        for p in self.parameters():
            p.sub_(lr * update[start : start + p.numel()].view_as(p))
            start += p.numel()


def papers_algorithm(
    scales: list[float], steps: int, alpha: float, lr: float, model_lr: float, floor: float
) -> Tensor:
    """Algorithm 1 with autograd for everything, the meta-update included; weights ``(steps, K)``."""
    toy = Toy(scales)
    w = torch.ones(len(scales), dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=lr)
    initial: list[Tensor] = []
    history = []
    for _ in range(steps):
        losses = toy.losses()
        initial = initial or [loss.detach() for loss in losses]
        history.append(w.detach().clone())
        norms = []
        for i, loss in enumerate(losses):
            (gradient,) = torch.autograd.grad(w[i] * loss, toy.shared, create_graph=True)
            norms.append(gradient.norm())
        g = torch.stack(norms)
        progress = torch.stack([a.detach() / b for a, b in zip(losses, initial, strict=True)])
        target = (g.mean() * (progress / progress.mean()) ** alpha).detach()
        optimizer.zero_grad()
        (w.grad,) = torch.autograd.grad((g - target).abs().sum(), w, retain_graph=True)
        total = sum((w[i].detach() * loss for i, loss in enumerate(losses)), torch.zeros(()))
        grads = torch.autograd.grad(total / len(losses), list(toy.parameters()))
        toy.descend(torch.cat([x.flatten() for x in grads]), model_lr)
        optimizer.step()
        with torch.no_grad():
            w.clamp_(min=floor)
            w *= len(scales) / w.sum()
    return torch.stack(history)


@pytest.mark.parametrize("alpha", [0.0, 0.12, 1.5])
@pytest.mark.parametrize("scales", [[1.0, 1.0], [1.0, 5.0, 0.2], [3.0, 1e-3]])
def test_equals_an_independent_implementation(scales: list[float], alpha: float) -> None:
    steps, model_lr, floor = 50, 0.05, 1e-3
    expected = papers_algorithm(scales, steps, alpha, 0.025, model_lr, floor)
    toy = Toy(scales)
    rule = GradNorm(len(scales), alpha=alpha, lr=0.025, floor=floor, columns=toy.columns())
    for step in range(steps):
        gradients = toy.record()
        weights = rule(gradients)
        torch.testing.assert_close(weights.raw, expected[step], rtol=0, atol=1e-5)
        toy.descend(weights.effective @ gradients.rows, model_lr)
    assert (expected - 1).abs().max() > 0.02  # the weights have gone somewhere


def test_alpha_zero_drives_gradient_norms_to_equality() -> None:
    toy = Toy([1.0, 100.0])
    columns = toy.columns()
    rule = GradNorm(2, alpha=0.0, lr=1e-3, columns=columns)
    history = []
    for _ in range(3000):
        gradients = toy.record()
        weights = rule(gradients)
        history.append((weights.raw * gradients.rows[:, columns].norm(dim=1)).detach())
        toy.descend(weights.effective @ gradients.rows, 0.003)
    assert history[0][1] / history[0][0] > 50
    for lengths in history[-200:]:
        assert float(lengths[1] / lengths[0]) == pytest.approx(1, abs=0.02)


def test_alpha_zero_inverts_constant_gradient_norms() -> None:
    """The same where the model does not move: w = (200, 2) / 101."""
    rule = GradNorm(2, alpha=0.0, lr=1e-3)
    gradients = record(torch.tensor([[1.0, 0.0], [0.0, 100.0]]), loss=[1.0, 100.0], group=[0, 1])
    for _ in range(3000):
        raw = rule(gradients).raw
    torch.testing.assert_close(raw, torch.tensor([200 / 101, 2 / 101]), rtol=0.02, atol=0)


def test_values_to_check_by_hand() -> None:
    # Norms 1 and 3, equal progress: the lengths 1, 3 have the mean 2, so 1 rises and 3 falls.
    ones, norms = torch.ones(2, dtype=F64), torch.tensor([1.0, 3.0], dtype=F64)
    assert weight_gradient(ones, norms, ones, 1.0).tolist() == [-1.0, 3.0]
    # Progress 0.2 and 0.6 (the second trains slower): targets 2 * 0.5 and 2 * 1.5 are the lengths.
    progress = torch.tensor([0.2, 0.6], dtype=F64)
    close = weight_gradient(ones, norms + torch.tensor([0.01, -0.01]), progress, 1.0)
    assert close.sign().tolist() == [1.0, -1.0]


def test_the_training_rates_are_told() -> None:
    """r_i = Ltilde_i / mean(Ltilde) over those present: 0.5 and 0.1 against their mean 0.3."""
    rule = GradNorm(3)
    rule(record(torch.ones(3, 2), loss=[2.0, 1.0, 4.0], group=[0, 1, 2]))
    assert rule.facts["r"].tolist() == [1, 1, 1]
    rule(record(torch.ones(2, 2), loss=[1.0, 0.1], group=[0, 1]))
    assert rule.facts["r"][:2].tolist() == pytest.approx([0.5 / 0.3, 0.1 / 0.3])
    assert rule.facts["r"][2].isnan()


def test_the_norm_is_that_of_the_mean_over_an_objectives_tasks() -> None:
    """Two tasks of one objective that cancel have a gradient of length 0."""
    rule = GradNorm(2, alpha=0.0, lr=0.1)
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    for _ in range(3):
        weights = rule(record(rows, loss=[1.0, 1.0, 1.0], group=[0, 0, 1]))
    # n = (0, 1): the first weight has no effect, the second is pulled down to the mean.
    assert weights.raw[0] > 1 > weights.raw[1]


def test_only_the_shared_columns_count() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 20, generator=generator)
    index = torch.tensor([1, 4, 7])
    slices: list[tuple[slice | Tensor, Tensor]] = [
        (slice(3, 9), rows[:, 3:9]),
        (index, rows[:, index]),
    ]
    for columns, part in slices:
        rule, other = GradNorm(2, columns=columns), GradNorm(2)
        for step in range(5):
            loss = [1.0, 1.0 / (step + 1)]
            weights = rule(record(rows, loss=loss, group=[0, 1]))
            assert torch.equal(weights.raw, other(record(part, loss=loss, group=[0, 1])).raw)
    assert "columns" not in rule.state_dict()


def test_weights_stay_positive_at_any_rate() -> None:
    rule = GradNorm(2, alpha=0.0, lr=5.0, floor=0.01, optimizer="sgd")
    rows = torch.tensor([[1.0], [1000.0]])
    for _ in range(20):
        raw = rule(record(rows, loss=[1.0, 1.0], group=[0, 1])).raw
        assert (raw > 0).all()
        assert float(raw.sum()) == pytest.approx(2)


def test_losses_and_gradients_that_vanish() -> None:
    rule = GradNorm(2, alpha=1.5)
    for loss in ([0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]):
        for rows in (torch.zeros(2, 3), torch.ones(2, 3)):
            weights = rule(record(rows, loss=loss, group=[0, 1]))
            assert torch.isfinite(weights.raw).all()
            assert float(weights.raw.sum()) == pytest.approx(2)


def test_negative_losses_are_refused() -> None:
    with pytest.raises(InputError, match=r"loss of task 1 \(objective 1\) is negative"):
        GradNorm(2)(record(torch.ones(2, 3), loss=[1.0, -1.0], group=[0, 1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha must not be negative, got -1"),
        ({"floor": 0.0}, "floor must be between 0 and 1, got 0"),
        ({"lr": 0.0}, "learning rate must be positive, got 0"),
        ({"optimizer": "lion"}, "must be 'adam' or 'sgd', got 'lion'"),
        ({"within": "median"}, "within must be 'uniform' or 'agreement', got 'median'"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GradNorm(2, **options)  # type: ignore[arg-type]


# The columns of W.


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {n: p.shape for n, p in model.named_parameters()}


def names_in(model: nn.Module, columns: slice | Tensor) -> set[str]:
    """The parameters that the columns cover, each wholly."""
    marks = torch.zeros(sum(p.numel() for p in model.parameters()))
    marks[columns] = 1
    parts = torch.split(marks, [p.numel() for p in model.parameters()])
    covered = {n: part for (n, _), part in zip(model.named_parameters(), parts, strict=True)}
    assert all(part.min() == part.max() for part in covered.values())
    return {n for n, part in covered.items() if part.any()}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Conv4(), {"blocks.3.conv.weight"}),
        (Conv4(norm="none"), {"blocks.3.conv.weight", "blocks.3.conv.bias"}),
        (MLP(), {"layers.1.weight", "layers.1.bias"}),
        (MLP(hidden=()), {"head.weight", "head.bias"}),
        (ResNet12(widths=(4, 8)), {"blocks.1.shortcut.weight"}),
        (nn.Linear(3, 2), {"weight", "bias"}),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), {"0.weight", "0.bias"}),
    ],
)
def test_the_last_shared_layer_is_the_default(model: nn.Module, expected: set[str]) -> None:
    assert names_in(model, shared_columns(shapes(model))) == expected


def test_shared_columns_by_name() -> None:
    model = Conv4(norm="none")
    for name, count in (("blocks.1.conv.weight", 1), ("blocks.1", 2), ("blocks", 8), ("head", 2)):
        covered = names_in(model, shared_columns(shapes(model), name))
        assert len(covered) == count
        assert all(n == name or n.startswith(name + ".") for n in covered)
    # What is not contiguous comes as indices.
    mixed = {"a.x": (2, 2), "b": (3,), "a.y": (1,)}
    columns = shared_columns(mixed, "a")
    assert isinstance(columns, Tensor)
    assert columns.tolist() == [0, 1, 2, 3, 7]


def test_learned_rates_are_no_shared_weights() -> None:
    own = shapes(MLP())
    rated = {**own, **{f"inner_lr.{n}": shape for n, shape in own.items()}}
    assert shared_columns(rated) == shared_columns(own)


def test_an_unknown_name_of_shared_weights_is_refused() -> None:
    with pytest.raises(InputError, match=r"no parameter or module 'layer.1'; there are layers.1"):
        shared_columns(shapes(MLP()), "layer.1")
