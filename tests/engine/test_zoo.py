"""Architectures that people meta-train: replay or loop, the numbers are the loop's.

Each is computed in float64 by ``method="auto"``, by the plain loop, and by a few lines of autograd
and `torch.func.functional_call` that know nothing of this package; and the model is afterwards what
it was. Real models of torchvision are marked ``slow``; the others are small ones of their kind.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from gametalearn import MAML, TaskBatch, meta_gradients
from gametalearn.engine.making import clear_programs
from gametalearn.errors import InputError
from gametalearn.gradients import TaskGradients
from tests.support.device import DEVICE

BOUND = 1e-9
WAYS = 3
RATE = 0.05


def batch_of(shape: tuple[int, ...], whole: bool = False, each: int = 1) -> TaskBatch:
    """Two tasks of three ways; ``whole`` for inputs that are integers below 10."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(WAYS).repeat(2, each)
    sizes = (2, 2, WAYS * each, *shape)
    if whole:
        x, z = torch.randint(0, 10, sizes, generator=g).unbind()
    else:
        x, z = torch.randn(sizes, generator=g, dtype=torch.float64).unbind()
    return TaskBatch(x, y, z, y, torch.zeros(2, dtype=torch.int64)).to(DEVICE)


def independent_rows(model: nn.Module, batch: TaskBatch, first_order: bool = False) -> Tensor:
    """MAML's rows, without this package."""

    own = [(m, dict(m._parameters)) for m in model.modules()]

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        buffers = {n: t.clone() for n, t in model.named_buffers()}
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            output = functional_call(model, {**buffers, **params}, (x,))
        for module, parameters in own:  # which it loses where a module is registered twice
            module._parameters.update(parameters)
        return F.cross_entropy(output, y)

    def derivative(value: Tensor, params: dict[str, Tensor], graph: bool) -> list[Tensor]:
        grads = torch.autograd.grad(
            value, list(params.values()), create_graph=graph, allow_unused=True
        )
        return [
            torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
            for p, g in zip(params.values(), grads, strict=True)
        ]

    rows = []
    for x, y, query_x, query_y in zip(
        batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True
    ):
        meta = {
            n: p.detach().clone().requires_grad_()
            for n, p in model.named_parameters()
            if p.requires_grad
        }
        grads = derivative(loss(meta, x, y), meta, not first_order)
        adapted = {n: p - RATE * g for (n, p), g in zip(meta.items(), grads, strict=True)}
        row = derivative(loss(adapted, query_x, query_y), meta, False)
        rows.append(torch.cat([r.flatten() for r in row]))
    return torch.stack(rows)


def distance(got: TaskGradients, expected: TaskGradients) -> float:
    """The largest difference in relation to the largest value, over all results."""
    pairs = [(getattr(got, n), getattr(expected, n)) for n in ("rows", "updates", "loss", "score")]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in pairs)


def bits(tensor: Tensor) -> str:
    """A digest of a tensor's numbers, NaN by NaN; lists of 25 million floats take minutes."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.cpu().numpy().tobytes()).hexdigest()


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """Everything about a model that a computation must leave as it was, tensors by their bits."""
    modules = list(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        [(n, id(p), p.requires_grad, p.grad, bits(p)) for n, p in model.named_parameters()],
        [(n, bits(b)) for n, b in model.named_buffers()],
        [(n, type(m), m.training, sorted(vars(m))) for n, m in modules],
        [[list(vars(m).get(h) or ()) for h in hooks] for _, m in modules],
        [{n: id(c) for n, c in m.named_children()} for _, m in modules],
    )


def random_states() -> tuple[Any, ...]:
    return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002


def ghosts(model: nn.Module) -> list[str]:
    """Tensors that have a meaning within a trace alone, wherever a module may have kept them."""
    found = []
    for name, module in model.named_modules():
        held = {**vars(module), **module._parameters, **module._buffers}
        for key, value in held.items():
            for t in value if isinstance(value, list | tuple) else [value]:
                if isinstance(t, Tensor) and (
                    isinstance(t, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(t)
                ):
                    found.append(f"{name}.{key}")
    return found


@contextmanager
def left_alone(model: nn.Module, draws: bool = False) -> Iterator[None]:
    """Fails if the model, or a random state, is not left as it was."""
    before, numbers = state_of(model), random_states()
    yield
    for part, now in zip(before, state_of(model), strict=True):
        assert now == part
    if not draws:
        assert random_states() == numbers
    assert not ghosts(model)


# Models.


class UNet(nn.Module):
    """Activations in place, and concatenations."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, last: nn.Module) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), last
            )

        self.down = block(1, 3, nn.ReLU(inplace=True))
        self.middle = block(3, 4, nn.LeakyReLU(0.1, inplace=True))
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.last = block(6, 3, nn.ReLU(inplace=True))
        self.head = nn.Conv2d(3, WAYS, 1)

    def forward(self, x: Tensor) -> Tensor:
        down = self.down(x)
        up = self.up(self.middle(F.max_pool2d(down, 2)))
        output: Tensor = self.head(self.last(torch.cat([up, down], 1))).mean((2, 3))
        return output


class WideBlock(nn.Module):
    """Pre-activation, and a shortcut that is added in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.one = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.two = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.one(F.relu(self.first(x), inplace=True))
        out = self.two(F.relu_(self.second(out)))
        out += x
        return cast(Tensor, out)


class WideResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(1, 4, 3, padding=1), WideBlock(4)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.block(self.stem(x))), inplace=True)
        output: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return output


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], width: int = 4, **options: Any) -> None:
        super().__init__()
        self.layer, self.head = kind(5, 4, batch_first=True, **options), nn.Linear(width, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.layer(x)[0][:, -1])
        return output


class Encoder(nn.Module):
    """A transformer over a sequence."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.encoder(x).mean(1))
        return output


class DeepSets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(5, 6), nn.ELU(inplace=True))
        self.head = nn.Linear(12, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.each(x)
        output: Tensor = self.head(torch.cat([x.sum(1), x.amax(1)], -1))
        return output


class LowRank(nn.Module):
    """A frozen linear layer and what is learned besides it."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(5, WAYS).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(WAYS, 2))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.frozen(x) + x @ self.down.T @ self.up.T
        return output


class TiedAutoencoder(nn.Module):
    """The decoder's weight is the encoder's, transposed; another layer has it under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(5, 4), nn.Linear(4, 5)
        self.again = nn.Linear(5, 4)
        self.again.weight = self.encode.weight
        self.head = nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(torch.tanh(self.encode(x)), self.encode.weight.T, self.decode.bias)
        output: Tensor = self.head(torch.tanh(self.again(x)))
        return output


class Thrice(nn.Module):
    """One layer that is registered three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5)] * 3)
        self.head = nn.Linear(5, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        output: Tensor = self.head(x)
        return output


class Words(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 4, **options), nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.table(x).mean(1))
        return output


class Square(torch.autograd.Function):
    """The old form: one method for the result and what is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * grads[0]


class NewSquare(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * grads[0]


class BatchedSquare(NewSquare):
    generate_vmap_rule = False

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return BatchedSquare.apply(x), in_dims[0]


class Squared(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.first, self.head = function, nn.Linear(5, 4), nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.function.apply(self.first(x)))
        return output


def linear(first: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.Tanh(), nn.Linear(4, WAYS))


def images(*layers: nn.Module) -> nn.Module:
    """A convolution, some layers, and a pooling."""
    conv = nn.Conv2d(1, 4, 3)
    return nn.Sequential(conv, *layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, WAYS))


def deprecated(change: Callable[[nn.Module], nn.Module], layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in use
        return change(layer)


def activated_twice() -> nn.Module:
    act = nn.PReLU()
    return nn.Sequential(nn.Linear(5, 4), act, nn.Linear(4, 4), act, nn.Linear(4, WAYS))


@dataclass(frozen=True)
class Member:
    """Of the zoo.

    Attributes:
        make: the model.
        shape: of an input.
        whole: whether inputs are integers.
        train, eval: why it is looped in that mode (a pattern); empty if it is replayed; None if the
            mode is left out.
        draws: whether it draws random numbers in train mode.
        each: examples of a class.
        first_order: whether an operation of it has no second derivative.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    train: str | None = ""
    eval: str | None = ""
    whole: bool = False
    draws: bool = False
    each: int = 1
    first_order: bool = False


IMAGE = (1, 6, 6)
NO_RULE = "doesn't match the broadcast shape"
IN_PLACE = "out= or view ops"
SMALL = {
    "LSTM": Member(lambda: Recurrent(nn.LSTM), (3, 5), NO_RULE, None),
    "LSTM of two layers": Member(
        lambda: Recurrent(nn.LSTM, 8, num_layers=2, bidirectional=True), (3, 5), NO_RULE, None
    ),
    "GRU": Member(lambda: Recurrent(nn.GRU), (3, 5), NO_RULE, None),
    "transformer": Member(lambda: Encoder(dropout=0.0), (4, 8), None, ""),
    "transformer with dropout": Member(lambda: Encoder(dropout=0.3), (4, 8), "random", None, draws=True),
    "DeepSets": Member(DeepSets, (4, 5), "", None),
    "low rank": Member(LowRank, (5,), "", None),
    "tied autoencoder": Member(TiedAutoencoder, (5,), "", None),
    # defect (the three of weight_norm): torch's warning of a missing batching rule gets out
    "weight_norm": Member(
        lambda: linear(deprecated(weight_norm, nn.Linear(5, 4))), (5,), "", None
    ),
    "weight_norm of a subclass": Member(
        lambda: linear(deprecated(weight_norm, OwnLinear(5, 4))), (5,), "", None
    ),
    "weight_norm, parametrized": Member(
        lambda: linear(parametrizations.weight_norm(nn.Linear(5, 4))), (5,), "", None
    ),
    "spectral_norm": Member(
        lambda: linear(deprecated(spectral_norm, nn.Linear(5, 4))), (5,), IN_PLACE, ""
    ),
    "spectral_norm, parametrized": Member(
        lambda: linear(parametrizations.spectral_norm(nn.Linear(5, 4))), (5,), IN_PLACE, ""
    ),
    "PReLU used twice": Member(activated_twice, (5,), "", None),
    "layer used thrice": Member(Thrice, (5,), "", None),
    "sparse embedding": Member(lambda: Words(sparse=True), (5,), "", None, whole=True),
    "embedding with padding": Member(lambda: Words(padding_idx=0), (5,), "", None, whole=True),
    "InstanceNorm": Member(lambda: images(nn.InstanceNorm2d(4, affine=True), nn.ReLU()), IMAGE, "", None),
    "InstanceNorm, tracking": Member(
        lambda: images(nn.InstanceNorm2d(4, track_running_stats=True)), IMAGE, "updated in place", ""
    ),
    "GroupNorm": Member(lambda: images(nn.GroupNorm(2, 4), nn.ReLU(inplace=True)), IMAGE, "", None),
    "BatchNorm": Member(lambda: images(nn.BatchNorm2d(4), nn.ReLU(inplace=True)), IMAGE, "", ""),
    "BatchNorm, cumulative": Member(
        lambda: images(nn.BatchNorm2d(4, momentum=None)), IMAGE, "reads a tensor's numbers", None
    ),
    "Dropout": Member(lambda: images(nn.Dropout(0.3)), IMAGE, "random", "", draws=True),
    "AlphaDropout": Member(lambda: images(nn.AlphaDropout(0.3)), IMAGE, "random", None, draws=True),
    "compiled": Member(
        lambda: cast(nn.Module, torch.compile(linear(nn.Linear(5, 4)), backend="eager")), (5,), "dynamo", None
    ),
    "autograd function": Member(lambda: Squared(Square), (5,), "setup_context", None),
    "autograd function with a context": Member(lambda: Squared(NewSquare), (5,), "", None),
    "autograd function with vmap": Member(lambda: Squared(BatchedSquare), (5,), "", None),
}  # fmt: skip
"""Small models of their kind."""

# defect (WideResNet): torch's warning of a missing batching rule for as_strided_ gets out
LARGE = {"U-Net": Member(UNet, (1, 8, 8)), "WideResNet": Member(WideResNet, (1, 6, 6))}
"""Small ones too, that take long to trace."""


def torchvision() -> Any:
    """Its models; not every environment has it."""
    return pytest.importorskip("torchvision").models


TORCHVISION = {
    "resnet18": Member(lambda: torchvision().resnet18(num_classes=WAYS), (3, 32, 32), each=2),
    # With fewer images, resnet50's last norms divide by the spread of a few numbers: 2e-9 instead of 1e-9.
    "resnet50": Member(lambda: torchvision().resnet50(num_classes=WAYS), (3, 32, 32), each=4),
    "densenet121": Member(lambda: torchvision().densenet121(num_classes=WAYS), (3, 32, 32), each=2),
    "mobilenet_v3_small": Member(
        lambda: torchvision().mobilenet_v3_small(num_classes=WAYS), (3, 32, 32), "random", "", draws=True,
        first_order=True,  # torch has no second derivative of hardsigmoid
    ),
    "efficientnet_b0": Member(
        lambda: torchvision().efficientnet_b0(num_classes=WAYS), (3, 32, 32), "random", "", draws=True
    ),
    "convnext_tiny": Member(
        lambda: torchvision().convnext_tiny(num_classes=WAYS), (3, 32, 32), "random", "", draws=True
    ),
    "vit, small": Member(
        lambda: torchvision().VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=WAYS), (3, 32, 32)
    ),
    "googlenet": Member(
        lambda: torchvision().googlenet(num_classes=WAYS, aux_logits=False, init_weights=False),
        (3, 32, 32), "random", "", draws=True,
    ),
}  # fmt: skip
"""Torchvision's own, whole but for the number of classes; the small vit is its class."""


class OwnLinear(nn.Linear):
    pass


def made(member: Member, mode: str) -> nn.Module:
    """A model in a mode, with running statistics that have moved by one forward in train mode."""
    torch.manual_seed(0)
    model = member.make().to(DEVICE, torch.float64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(batch_of(member.shape, member.whole, member.each).support_x[0])
    return model.train(mode == "train")


def compare(member: Member, mode: str, oracle: bool = True) -> None:
    """Loop, auto and the rows made without this package agree; the model is left alone."""
    model, batch = made(member, mode), batch_of(member.shape, member.whole, member.each)
    looped = cast(str, getattr(member, mode))
    draws = member.draws and mode == "train"
    learner = MAML(RATE, 1, member.first_order)

    def results(method: str) -> TaskGradients:
        torch.manual_seed(1)
        with left_alone(model, draws):
            return meta_gradients(model, batch, learner, method=method)  # type: ignore[arg-type]

    loop = results("loop")
    after = torch.get_rng_state()
    assert loop.rows.norm() > 1e-6, "nothing is compared"
    if looped:
        with pytest.warns(UserWarning, match=f"computed task by task.*{re.escape(looped)}"):
            first = results("auto")
    else:
        first = results("auto")
    if draws:
        assert torch.equal(torch.get_rng_state(), after)
    again = results("auto")
    assert distance(first, loop) <= BOUND
    assert distance(again, loop) <= BOUND
    if oracle and not draws:
        expected = independent_rows(model, batch, member.first_order)
        assert (loop.rows - expected).abs().max() <= BOUND * expected.abs().max()


def modes_of(members: dict[str, Member]) -> list[Any]:
    return [
        pytest.param(member, mode, id=f"{name}, {mode}")
        for name, member in members.items()
        for mode in ("train", "eval")
        if getattr(member, mode) is not None
    ]


@pytest.mark.parametrize(("member", "mode"), modes_of(SMALL))
def test_small_models(member: Member, mode: str) -> None:
    compare(member, mode)


@pytest.mark.slow
@pytest.mark.parametrize(("member", "mode"), modes_of(LARGE))
def test_models_that_take_long_to_trace(member: Member, mode: str) -> None:
    compare(member, mode)


@pytest.mark.slow
@pytest.mark.parametrize(("member", "mode"), modes_of(TORCHVISION))
def test_models_of_torchvision(member: Member, mode: str) -> None:
    compare(member, mode)


@pytest.mark.parametrize("method", ["auto", "loop", "replay"])
def test_without_a_second_derivative_it_says_so(method: Any) -> None:
    model, batch = images(nn.Hardsigmoid()).to(DEVICE, torch.float64), batch_of(IMAGE)
    with left_alone(model), pytest.raises(InputError, match="no second derivative of hardsigmoid"):
        meta_gradients(model, batch, MAML(RATE, 1), method=method)
    got = meta_gradients(model, batch, MAML(RATE, 1, first_order=True), method=method)
    expected = independent_rows(model, batch, first_order=True)
    assert (got.rows - expected).abs().max() <= BOUND * expected.abs().max()


def test_a_norm_whose_weight_becomes_zero_before_a_pooling() -> None:

    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    model = images(norm, nn.ReLU()).to(DEVICE, torch.float64)
    batch, learner = batch_of(IMAGE), MAML(RATE, 1)
    for _ in range(3):
        meta_gradients(model, batch, learner)
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.fill_(0.5)
    loop = meta_gradients(model, batch, learner, method="loop")
    assert distance(meta_gradients(model, batch, learner), loop) <= BOUND


def test_a_computed_weight_of_a_subclass_stays_what_it_was() -> None:

    member = SMALL["weight_norm of a subclass"]
    model = made(member, "eval")
    weight = cast(Any, model)[0].weight
    before = weight.detach().clone()
    meta_gradients(model, batch_of(member.shape), MAML(RATE, 1), method="loop")
    assert torch.equal(cast(Any, model)[0].weight.detach(), before)


# Calls that end in an error.


class Failing(nn.Module):
    """Raises at one of its calls; keeps its last features, and counts if it is to raise."""

    def __init__(self, at: int = 0, error: BaseException | None = None) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, WAYS)
        self.calls = [0]
        self.at, self.error = at, error

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            self.calls[0] += 1
            if self.calls[0] == self.at:
                raise self.error
        output: Tensor = self.head(torch.relu_(self.norm(self.first(x))))
        return output


def failing_at_queries(prediction: Tensor, target: Tensor) -> Tensor:
    if len(prediction) != WAYS:
        raise RuntimeError("no loss for queries")
    return F.cross_entropy(prediction, target)


def uneven(batch: TaskBatch) -> TaskBatch:
    """The same with every query twice."""
    x, y = batch.query_x.repeat(1, 2, 1), batch.query_y.repeat(1, 2)
    return TaskBatch(batch.support_x, batch.support_y, x, y, batch.group)


METHODS = pytest.mark.parametrize("method", ["loop", "auto"])


@METHODS
def test_a_loss_that_fails_at_the_queries_leaves_the_model_alone(method: Any) -> None:
    model, batch = made(Member(Failing, (5,)), "train"), uneven(batch_of((5,)))
    with left_alone(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "gametalearn: Failing is computed task by task")
        with pytest.raises(RuntimeError, match="no loss for queries"):
            meta_gradients(model, batch, MAML(RATE, 1), loss=failing_at_queries, method=method)


@METHODS
@pytest.mark.parametrize("known", [False, True], ids=["at first", "after a call"])
def test_a_label_out_of_range_leaves_the_model_alone(method: Any, known: bool) -> None:

    clear_programs()
    model, batch = made(Member(Failing, (5,)), "train"), batch_of((5,))
    learner = MAML(RATE, 1)
    loop = meta_gradients(model, batch, learner, method="loop")
    if known:
        meta_gradients(model, batch, learner, method=method)
    wrong = batch.query_y.clone()
    wrong[1, 0] = WAYS
    bad = TaskBatch(batch.support_x, batch.support_y, batch.query_x, wrong, batch.group)
    with left_alone(model), pytest.raises(InputError, match="label 3"):
        meta_gradients(model, bad, learner, method=method)
    with left_alone(model):  # and it goes on
        assert distance(meta_gradients(model, batch, learner, method=method), loop) <= BOUND


@METHODS
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
def test_an_interrupt_leaves_the_model_alone(
    method: Any, at: int, error: type[BaseException]
) -> None:
    """While it is traced, or looped; after that it is computed as if nothing had been."""
    model = made(Member(functools.partial(Failing, at), (5,)), "train")
    batch, learner = batch_of((5,)), MAML(RATE, 1)
    cast(Any, model).calls[0], cast(Any, model).error = 0, error()
    with left_alone(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "gametalearn: Failing is computed task by task")
        with pytest.raises(error):
            meta_gradients(model, batch, learner, method=method)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    cast(Any, model).error = None
    model = made(Member(Failing, (5,)), "train")
    loop = meta_gradients(model, batch, learner, method="loop")
    assert distance(meta_gradients(model, batch, learner), loop) <= BOUND
    assert (loop.rows - independent_rows(model, batch)).abs().max() <= BOUND
