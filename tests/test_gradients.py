"""Rows of `meta_gradients` against plain autograd, closed forms and learn2learn; every method."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from gametalearn import ANIL, MAML, InputError, MetaSGD, Reptile, TaskBatch, meta_gradients
from gametalearn.adaptation import LSLR, Learner, model_parameters
from gametalearn.gradients import adapt_and_score
from gametalearn.losses import default_loss
from gametalearn.models import MLP, Conv4

CPU_DTYPES = {torch.float64: 1e-9, torch.float32: 1e-4}


class SmoothConv(nn.Module):
    """A convolutional network without kinks, of layers as a user would write them."""

    def __init__(self, ways: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6, track_running_stats=False),
            nn.Softplus(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 4, 3, stride=2, groups=2, bias=False),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(16, ways),
        )

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.net(x)
        return output


class SmoothMLP(nn.Module):
    def __init__(self, ways: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(100, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, ways)
        )

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.net(x)
        return output


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "conv": SmoothConv,
    "mlp": SmoothMLP,
    "relu": lambda ways: MLP(100, ways, (7,)),
}


def episodes(
    tasks: int, ways: int, shots: int, queries: int, shape: tuple[int, ...], seed: int = 0
) -> TaskBatch:
    g = torch.Generator().manual_seed(seed)

    def part(n: int) -> tuple[Tensor, Tensor]:
        y = torch.stack(
            [torch.arange(ways).repeat(n)[torch.randperm(n * ways, generator=g)]] * tasks
        )
        return torch.rand(tasks, n * ways, *shape, generator=g, dtype=torch.float64), y

    (sx, sy), (qx, qy) = part(shots), part(queries)
    return TaskBatch(sx, sy, qx, qy, torch.arange(tasks) % 3)


def oracle(
    model: nn.Module, batch: TaskBatch, lr: float, steps: int, first_order: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, updates and losses by the definition: a loop of autograd in float64."""
    model = model.double()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    rows, updates, losses = [], [], []
    for i in range(len(batch)):
        theta = [model.get_parameter(n).detach().clone().requires_grad_() for n in names]

        def predict(params: list[Tensor], x: Tensor) -> Tensor:
            state = {**{n: b.clone() for n, b in model.named_buffers()}}
            output: Tensor = functional_call(
                model, {**dict(zip(names, params, strict=True)), **state}, x
            )
            return output

        phi = theta
        for _ in range(steps):
            loss = F.cross_entropy(
                predict(phi, batch.support_x[i].to(torch.float64)), batch.support_y[i]
            )
            grads = torch.autograd.grad(loss, phi, create_graph=True)
            if first_order:
                grads = tuple(g.detach() for g in grads)
            phi = [p - lr * g for p, g in zip(phi, grads, strict=True)]
        loss = F.cross_entropy(predict(phi, batch.query_x[i].to(torch.float64)), batch.query_y[i])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, theta)]))
        updates.append(
            torch.cat([(p - q).flatten() for p, q in zip(theta, phi, strict=True)]).detach()
        )
        losses.append(loss.detach())
    return torch.stack(rows), torch.stack(updates), torch.stack(losses)


def distance(got: Tensor, expected: Tensor) -> float:
    """The largest relative error of a task's vector."""
    got, expected = got.cpu().double(), expected.cpu().double()
    scale = expected.norm(dim=-1) if expected.ndim > 1 else expected.abs()
    error = (got - expected).norm(dim=-1) if expected.ndim > 1 else (got - expected).abs()
    return (error / scale.clamp_min(1e-12)).max().item()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(sorted(MODELS)),
    tasks=st.integers(1, 4),
    ways=st.integers(2, 4),
    shots=st.integers(1, 3),
    queries=st.integers(1, 3),
    steps=st.integers(0, 3),
    first_order=st.booleans(),
    chunk=st.integers(1, 3),
    threads=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_rows_equal_plain_autograd(
    kind: str,
    tasks: int,
    ways: int,
    shots: int,
    queries: int,
    steps: int,
    first_order: bool,
    chunk: int,
    threads: int,
    seed: int,
    device: str,
) -> None:
    torch.manual_seed(seed)
    model = MODELS[kind](ways)
    batch = episodes(tasks, ways, shots, queries, (1, 10, 10), seed)
    learner = MAML(0.3, steps, first_order)
    rows, updates, losses = oracle(model, batch, 0.3, steps, first_order)
    for dtype, bound in CPU_DTYPES.items():
        if dtype == torch.float32 and kind == "relu":
            continue  # a kink: no bound in float32
        model, cast = model.to(device, dtype), batch.to(device, dtype)
        for options in ({"method": "loop"}, {"chunk": chunk, "threads": threads}):
            got = meta_gradients(model, cast, learner, **options)
            assert got.rows.dtype == dtype
            assert distance(got.rows, rows) < bound
            assert distance(got.updates, updates) < bound
            assert distance(got.loss, losses) < bound
            assert got.rows.device == cast.query_x.device
            assert torch.equal(got.group.cpu(), batch.group)
        model = model.cpu()


@pytest.mark.parametrize("pool", ["stride", "max"])
@pytest.mark.parametrize("norm", ["batch", pytest.param("group", marks=pytest.mark.slow)])
def test_conv4_equals_plain_autograd(pool: Any, norm: Any, device: str) -> None:
    torch.manual_seed(1)
    model = Conv4(3, image_size=16, hidden=5, pool=pool, norm=norm).double()
    batch = episodes(3, 3, 1, 2, (1, 16, 16))
    rows, updates, _ = oracle(model, batch, 0.3, 2, False)
    got = meta_gradients(model.to(device), batch.to(device), MAML(0.3, 2))
    assert distance(got.rows, rows) < 1e-9
    assert distance(got.updates, updates) < 1e-9


@pytest.mark.parametrize("method", ["loop", "replay"])
def test_quadratic_loss_has_the_closed_form(method: Any, device: str) -> None:
    """Support loss (theta - a)^2, query loss (theta - b)^2: each row is known by hand."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.7)
    one = torch.ones(2, 1, 1, dtype=torch.float64)
    a, b = torch.tensor([0.2, -1.0]).double(), torch.tensor([1.5, 3.0]).double()
    batch = TaskBatch(one, a.view(2, 1, 1), one, b.view(2, 1, 1), torch.zeros(2, dtype=torch.int64))
    model, batch = model.to(device), batch.to(device)
    lr, steps = 0.1, 3
    shrink = (1 - 2 * lr) ** steps
    adapted = a + shrink * (0.7 - a)
    for first_order in (False, True):
        got = meta_gradients(model, batch, MAML(lr, steps, first_order), method=method)
        expected = 2 * (adapted - b) * (1.0 if first_order else shrink)
        close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=0)
        close(got.rows[:, 0].cpu(), expected)
        close(got.updates[:, 0].cpu(), 0.7 - adapted)
        close(got.loss.cpu(), (adapted - b) ** 2)


LEARNERS: list[Learner] = [
    MAML(0.2, 2),
    MAML(0.2, 2, first_order=True),
    ANIL(0.2, 2),
    ANIL(0.2, 2, first_order=True),
    MetaSGD(0.2, 2),
    Reptile(0.2, 2),
    Reptile(0.01, 2, optimizer="adam"),
    Reptile(0.1, 3, batch=2),
    MAML(0.2, 2, step_weights=(0.3, 0.7)),
    LSLR(0.2, 2, first_order=True, step_weights=(0.5, 0.5)),
]


@pytest.mark.parametrize("learner", LEARNERS, ids=repr)
def test_every_learner_agrees_with_the_loop(learner: Learner, device: str) -> None:
    torch.manual_seed(2)
    model = Conv4(3, image_size=16, hidden=4, norm="support").double().to(device)
    batch = episodes(5, 3, 1, 2, (1, 16, 16)).to(device)
    loop = meta_gradients(model, batch, learner, method="loop")
    got = meta_gradients(model, batch, learner, chunk=2, threads=2)
    assert distance(got.rows, loop.rows) < 1e-9
    assert distance(got.updates, loop.updates) < 1e-9
    torch.testing.assert_close(got.loss, loop.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(got.score, loop.score)
    scored = adapt_and_score(model, batch, learner, chunk=2)
    torch.testing.assert_close(scored[0], loop.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(scored[1], loop.score)


@pytest.mark.parametrize("learner", [MAML(0.2, 3), ANIL(0.2, 3), MetaSGD(0.2, 3)], ids=repr)
def test_constant_memory_is_exact(learner: Learner, device: str) -> None:
    torch.manual_seed(2)
    model = Conv4(3, image_size=16, hidden=4).double().to(device)
    batch = episodes(2, 3, 1, 2, (1, 16, 16)).to(device)
    loop = meta_gradients(model, batch, learner, method="loop")
    got = meta_gradients(model, batch, learner, constant_memory=True)
    assert distance(got.rows, loop.rows) < 1e-12
    assert torch.equal(got.updates, loop.updates)
    with pytest.raises(InputError, match="constant_memory=True loops over tasks"):
        meta_gradients(model, batch, learner, constant_memory=True, method="replay")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_method_chunk_and_threads_do_not_matter(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(3)
    model = SmoothConv(3).to(device, dtype)
    batch = episodes(5, 3, 1, 2, (1, 10, 10)).to(device, dtype)
    bound = 1e-9 if dtype == torch.float64 else 1e-5
    loop = meta_gradients(model, batch, MAML(0.1, 2), method="loop")
    for chunk in (1, 2, 5):
        for threads in (1, 2):
            got = meta_gradients(model, batch, MAML(0.1, 2), chunk=chunk, threads=threads)
            again = meta_gradients(model, batch, MAML(0.1, 2), chunk=chunk, threads=threads)
            assert distance(got.rows, loop.rows) < bound
            assert distance(got.updates, loop.updates) < bound
            assert torch.equal(got.rows, again.rows)  # and one method repeats itself to the bit


def test_learned_rates_get_rows(device: str) -> None:
    model = MLP(4, 3, (5,)).double().to(device)
    batch = episodes(2, 3, 1, 2, (4,)).to(device)
    learner = MetaSGD(0.3, 1)
    meta = {
        n: p.detach() * 0.9 for n, p in learner.meta_parameters(model_parameters(model)).items()
    }
    got = meta_gradients(model, batch, learner, meta=meta)
    count = sum(p.numel() for p in model.parameters())
    assert got.rows.shape == (2, 2 * count)
    assert not got.updates[:, count:].any()
    # d loss / d rate_j by a central difference.
    for j in (0, 7, count - 1):
        values = []
        for step in (1e-5, -1e-5):
            flat = torch.cat([p.flatten() for p in meta.values()])
            flat[count + j] += step
            parts = flat.split([p.numel() for p in meta.values()])
            moved = {n: v.view_as(p) for (n, p), v in zip(meta.items(), parts, strict=True)}
            values.append(adapt_and_score(model, batch, learner, meta=moved)[0])
        numeric = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close(got.rows[:, count + j], numeric, rtol=1e-5, atol=1e-9)


def test_learn2learn_parity(device: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        l2l = pytest.importorskip("learn2learn")
    torch.manual_seed(3)
    model = Conv4(3, image_size=16, hidden=4).double().to(device)
    batch = episodes(2, 3, 1, 2, (1, 16, 16)).to(device)
    for first_order in (False, True):
        maml = l2l.algorithms.MAML(model, lr=0.3, first_order=first_order)
        rows = []
        for i in range(2):
            task = maml.clone()
            for _ in range(2):
                task.adapt(F.cross_entropy(task(batch.support_x[i]), batch.support_y[i]))
            loss = F.cross_entropy(task(batch.query_x[i]), batch.query_y[i])
            grads = torch.autograd.grad(loss, list(maml.parameters()))
            rows.append(torch.cat([g.flatten() for g in grads]))
        got = meta_gradients(model, batch, MAML(0.3, 2, first_order))
        assert distance(got.rows, torch.stack(rows)) < 1e-9


def test_the_model_is_left_alone(device: str) -> None:
    model = SmoothConv(3).to(device)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    batch = episodes(2, 3, 1, 1, (1, 10, 10)).to(device, torch.float32)
    meta_gradients(model, batch, MAML())
    meta_gradients(model, batch, MAML(), method="loop")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None for p in model.parameters())


def test_rows_can_be_used_in_autograd(device: str) -> None:
    model, batch = MLP(4, 3).to(device), episodes(2, 3, 1, 1, (4,)).to(device, torch.float32)
    got = meta_gradients(model, batch, MAML())
    weight = torch.ones(2, requires_grad=True, device=device)
    (weight @ got.rows).square().sum().backward()
    assert weight.grad is not None


def test_bad_arguments_are_named() -> None:
    model, batch = MLP(4, 3), episodes(1, 3, 1, 1, (4,)).to(dtype=torch.float32)
    with pytest.raises(
        InputError, match="method must be one of auto, loop, replay, verify; got 'fast'"
    ):
        meta_gradients(model, batch, MAML(), method="fast")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="chunk must be at least 1, got 0"):
        meta_gradients(model, batch, MAML(), chunk=0)
    with pytest.raises(InputError, match="no parameter of MLP requires gradients"):
        meta_gradients(model.requires_grad_(False), batch, MAML())


@pytest.mark.parametrize("method", ["auto", "loop", "replay"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.bool])
def test_labels_that_cross_entropy_does_not_take_are_named(method: Any, dtype: torch.dtype) -> None:
    model, batch = nn.Linear(4, 2), episodes(1, 2, 1, 1, (4,)).to(dtype=torch.float32)
    batch = TaskBatch(
        batch.support_x, batch.support_y.to(dtype), batch.query_x, batch.query_y.to(dtype)
    )
    kind = str(dtype).removeprefix("torch.")
    for loss in (default_loss, F.cross_entropy, nn.CrossEntropyLoss()):
        with pytest.raises(InputError, match=f"the labels are {kind}, .* int64 with labels.long"):
            meta_gradients(model, batch, MAML(), loss=loss, method=method)


def test_labels_of_8_bits_are_taken_as_cross_entropy_takes_them() -> None:
    model, batch = nn.Linear(4, 2), episodes(1, 2, 1, 1, (4,)).to(dtype=torch.float32)
    narrow = TaskBatch(batch.support_x, batch.support_y.byte(), batch.query_x, batch.query_y.byte())
    rows = [meta_gradients(model, b, MAML(), method="loop").rows for b in (batch, narrow)]
    assert torch.equal(*rows)


@pytest.mark.parametrize("measure", [meta_gradients, adapt_and_score])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.uint8])
@pytest.mark.parametrize(
    "model", [nn.Linear(4, 3), nn.Sequential(nn.Unflatten(1, (1, 2, 2)), Conv4(3))]
)
def test_inputs_of_another_type_are_named(
    measure: Any, dtype: torch.dtype, model: nn.Module
) -> None:
    batch = episodes(1, 3, 1, 1, (4,))
    batch = TaskBatch(
        batch.support_x.to(dtype), batch.support_y, batch.query_x.to(dtype), batch.query_y
    )
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(
        InputError, match=rf"the inputs are {kind}, and .* in float32 \(.*x.to\(torch.float32"
    ):
        measure(model, batch, MAML())


def test_what_fails_for_another_reason_says_so_itself() -> None:
    """Tokens and weights are of different types, as they should be."""

    class Tokens(nn.Module):
        def __init__(self, told: str = "") -> None:
            super().__init__()
            self.embedding, self.head, self.told = nn.Embedding(9, 2), nn.Linear(8, 3), told

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.told:
                raise RuntimeError(self.told)
            found: torch.Tensor = self.head(self.embedding(x).flatten(1))
            return found

    tokens, labels = torch.randint(9, (2, 3, 4)), torch.arange(3).expand(2, 3)
    batch = TaskBatch(tokens, labels, tokens, labels)
    with pytest.raises(RuntimeError, match=r"^no such type of token"):
        meta_gradients(Tokens("no such type of token"), batch, MAML())
    short = TaskBatch(tokens.short(), labels, tokens.short(), labels)
    with pytest.raises(
        InputError, match=r"the inputs are int16, .* embedding .* x.to\(torch.int64\)"
    ):
        meta_gradients(Tokens(), short, MAML())
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    numbers = torch.zeros(2, 3, 3, dtype=torch.int64)
    wrong = TaskBatch(tokens, numbers, tokens, numbers)
    with pytest.raises(RuntimeError) as found:
        meta_gradients(Tokens(), wrong, MAML(), loss=loss)
    assert "make them float32" not in str(found.value)


def test_integers_are_the_inputs_of_embeddings() -> None:
    model = nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(8, 3))
    tokens, labels = torch.randint(9, (2, 3, 4)), torch.arange(3).expand(2, 3)
    assert meta_gradients(model, TaskBatch(tokens, labels, tokens, labels), MAML()).rows.any()
