"""Which protocol a result has: told by types and by predictions, never by an attribute's name."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gametalearn import MAML, ClassImages, Conv4, EpisodeSampler, InputError, evaluate
from gametalearn.evaluation import protocol_of
from gametalearn.models import TaskNorm
from gametalearn.protocols import evaluate_all
from tests.support.modules import Function

LEARNER = MAML(0.3, 2)


@pytest.fixture
def source() -> EpisodeSampler:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 1, 16, 16), dtype=torch.uint8, generator=generator)
    return EpisodeSampler(ClassImages.from_tensors(images, torch.arange(60) // 6), 3, 2, 3, 1)


class Own(nn.Module):
    """A user's module: features, something in between, and a head."""

    def __init__(self, between: nn.Module | None = None, **attributes: Any) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(256, 8))
        self.between = nn.Identity() if between is None else between
        self.head = nn.Linear(8, 3)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.tanh(self.between(self.features(x))))


class Attention(nn.Module):
    """Attention over the queries, through a gate."""

    def __init__(self, gate: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gate = nn.Parameter(torch.tensor(gate))

    def forward(self, x: Tensor) -> Tensor:
        z = x[None]
        output: Tensor = x + self.gate * self.attention(z, z, z, need_weights=False)[0][0]
        return output


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.std(0) + 1e-5)


def by_batch(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def centred(x: Tensor) -> Tensor:
    return x - 0.01 * x.mean(0)


def beside_the_first(x: Tensor) -> Tensor:
    return x - x[:1]


class Both(Own):
    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return {"logits": logits, "relative": logits - logits.mean(0)}


TRANSDUCTIVE: list[tuple[str, Any]] = [
    ("batch norm", lambda: Own(nn.BatchNorm1d(8))),
    ("norm='group'", lambda: Own(nn.BatchNorm1d(8), norm="group")),
    ("norm='support'", lambda: Own(nn.BatchNorm1d(8), norm="support")),
    ("no running statistics", lambda: Own(nn.BatchNorm1d(8, track_running_stats=False)).eval()),
    ("F.batch_norm", lambda: Own(Function(by_batch))),
    ("F.batch_norm in eval", lambda: Own(Function(by_batch)).eval()),
    ("attention", lambda: Own(Attention(1.0))),
    ("a gate that starts at zero", lambda: Own(Attention(0.0))),
    ("standardised", lambda: Own(Function(standardised), norm="none")),
    ("slightly centred", lambda: Own(Function(centred))),
    ("beside the first query", lambda: Own(Function(beside_the_first))),
    ("one part of a dict", lambda: Both()),
    ("ours within another", lambda: nn.Sequential(Conv4(3, image_size=16, hidden=4, norm="support"))),
    ("our norm within another", lambda: Own(nn.Sequential(nn.Unflatten(1, (8, 1, 1)), TaskNorm(8), nn.Flatten()))),
    ("a head of one's own", lambda: headed("group")),
]  # fmt: skip


def headed(norm: Any) -> Conv4:
    model = Conv4(3, image_size=16, hidden=8, norm=norm)
    model.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))
    return model


class Deep(nn.Sequential):
    """Rounding adds up over layers, and cancels in a small difference of large numbers."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(256, 512)]
        for _ in range(20):
            layers += [nn.ReLU(), nn.Linear(512, 512)]
        super().__init__(*layers, nn.Linear(512, 3))


INDUCTIVE: list[tuple[str, Any]] = [
    ("nothing", lambda: Own()),
    ("norm='batch'", lambda: Own(norm="batch")),
    ("instance norm", lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4), nn.Flatten(), nn.Linear(4 * 14 * 14, 3))),
    ("layer norm", lambda: Own(nn.LayerNorm(8))),
    ("group norm", lambda: Own(nn.GroupNorm(2, 8))),
    ("dropout", lambda: Own(nn.Dropout(0.5))),
    ("deep", Deep),
    ("deep, single precision only", lambda: Own(Function(lambda x: x.float().mul(1e3).softmax(-1)))),
    ("estimated statistics", lambda: estimated()),
    ("ours", lambda: Conv4(3, image_size=16, hidden=4, norm="group")),
]  # fmt: skip


def estimated() -> Own:
    model = Own(nn.BatchNorm1d(8))
    model(torch.rand(30, 1, 16, 16))
    return model.eval()


def loss_of(p: Any, t: Tensor) -> Tensor:
    return F.cross_entropy(p["logits"] if isinstance(p, dict) else p, t)


def score_of(p: Any, t: Tensor) -> Tensor:
    share: Tensor = ((p["logits"] if isinstance(p, dict) else p).argmax(1) == t).float().mean()
    return share


PARTS: Any = {"loss": loss_of, "score": score_of}
IGNORED = pytest.mark.filterwarnings("ignore:.*computed task by task")


@IGNORED
@pytest.mark.parametrize("make", [m for _, m in TRANSDUCTIVE], ids=[n for n, _ in TRANSDUCTIVE])
def test_queries_that_look_at_one_another_are_transductive(
    make: Any, source: EpisodeSampler
) -> None:
    torch.manual_seed(0)
    model = make()
    found = evaluate(model, source, LEARNER, 3, **PARTS)
    assert found.protocol == "transductive"
    asked = evaluate(model, source, LEARNER, 3, protocol="transductive", **PARTS)
    assert asked.values.tolist() == found.values.tolist()
    kind = type(model).__name__
    with pytest.raises(
        InputError,
        match=f"'inductive' requested, but {kind} supports only 'transductive'.*'query-at-a-time'",
    ):
        evaluate(model, source, LEARNER, 3, protocol="inductive", **PARTS)
    with pytest.raises(InputError, match="supports only 'transductive'"):
        evaluate_all(model, source, LEARNER, 3, 0, ["transductive", "inductive"], **PARTS)
    alone = evaluate(model, source, LEARNER, 3, protocol="query-at-a-time", **PARTS)
    assert alone.protocol == "query-at-a-time"


@IGNORED
@pytest.mark.parametrize("make", [m for _, m in INDUCTIVE], ids=[n for n, _ in INDUCTIVE])
def test_queries_that_do_not_are_inductive(make: Any, source: EpisodeSampler) -> None:
    torch.manual_seed(0)
    model = make()
    found = evaluate(model, source, LEARNER, 3, **PARTS)
    assert found.protocol == "inductive"
    assert (
        evaluate(model, source, LEARNER, 3, protocol="inductive", **PARTS).protocol == "inductive"
    )
    with pytest.raises(InputError, match="supports only 'inductive'"):
        evaluate(model, source, LEARNER, 3, protocol="transductive", **PARTS)


def test_ours_with_a_head_that_normalises_by_batch_cannot_be_switched(
    source: EpisodeSampler,
) -> None:
    for norm in ("batch", "support"):
        with pytest.raises(
            InputError, match=r"supports only 'transductive' \(BatchNorm1d 'head\.0'\)"
        ):
            evaluate(headed(norm), source, LEARNER, 2, protocol="inductive")


def test_types_alone_tell_of_batch_statistics() -> None:
    assert protocol_of(nn.Sequential(nn.SyncBatchNorm(4))) == "transductive"
    assert protocol_of(nn.Sequential(nn.SyncBatchNorm(4)).eval()) == "inductive"
    assert protocol_of(Own(nn.LazyBatchNorm1d())) == "transductive"
    assert protocol_of(Own(norm="batch")) == "inductive"
    assert protocol_of(Conv4(norm="support")) == "inductive"
    assert protocol_of(nn.Sequential(Conv4(norm="support"))) == "transductive"


def test_measuring_draws_no_random_number_and_changes_nothing(source: EpisodeSampler) -> None:
    torch.manual_seed(0)
    model = Own(
        nn.Sequential(
            nn.Dropout(0.5),
            Function(lambda x: x + random.random() * 0),
            Function(lambda x: x + float(np.random.rand()) * 0),  # noqa: NPY002
        )
    )
    moving = Own(nn.BatchNorm1d(8))
    states = [copy.deepcopy(m.state_dict()) for m in (model, moving)]

    def states_of_chance() -> Any:
        numpy = np.random.get_state(legacy=False)  # noqa: NPY002
        return torch.get_rng_state().tolist(), repr(numpy), random.getstate()

    before = states_of_chance()
    from gametalearn.adaptation import default_loss, model_parameters
    from gametalearn.dependence import settled

    batch = source.sample(1)
    for m in (model, moving):
        settled(m, None, model_parameters(m), batch, LEARNER, default_loss)
    assert states_of_chance() == before
    for m, state in zip((model, moving), states, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())


def test_a_model_is_not_switched_while_it_is_evaluated(source: EpisodeSampler) -> None:
    model = Conv4(3, image_size=16, hidden=4, norm="batch")
    during = []

    def look(_: int) -> None:
        during.append((model.norm, model.uses_support))

    found = evaluate(model, source, LEARNER, 4, protocol="inductive", progress=look)
    assert during == [("batch", False)]
    support = Conv4(3, image_size=16, hidden=4, norm="support")
    support.load_state_dict(model.state_dict())
    assert found.values.tolist() == evaluate(support, source, LEARNER, 4).values.tolist()
    there = evaluate(support, source, LEARNER, 4, protocol="transductive")
    assert there.values.tolist() == evaluate(model, source, LEARNER, 4).values.tolist()
    assert (there.protocol, support.norm) == ("transductive", "support")


class Untracked(nn.BatchNorm1d):
    def __init__(self) -> None:
        super().__init__(8)
        self.num_batches_tracked = None


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(8), Untracked(), nn.InstanceNorm1d(8, track_running_stats=True)]
)
def test_running_statistics_that_never_moved_are_refused(norm: Any, source: EpisodeSampler) -> None:
    """After meta-training, which leaves them alone, `eval` is at chance."""
    between = norm
    if isinstance(norm, nn.InstanceNorm1d):
        between = nn.Sequential(nn.Unflatten(1, (8, 1)), norm, nn.Flatten())
    model = Own(between).eval()
    for protocol in (None, "inductive", "query-at-a-time"):
        with pytest.raises(
            InputError, match=rf"{type(norm).__name__} 'between.* of Own is in eval mode.*train\(\)"
        ):
            evaluate(model, source, LEARNER, 2, protocol=protocol)
    if isinstance(norm, nn.BatchNorm1d):
        model.train()
        assert evaluate(model, source, LEARNER, 2).protocol == "transductive"
        model(torch.rand(30, 1, 16, 16))
        assert evaluate(model.eval(), source, LEARNER, 2).protocol == "inductive"


def test_statistics_from_an_old_file_have_moved(source: EpisodeSampler) -> None:
    """Files of older versions of PyTorch do not tell how many batches there were."""
    model = Own(nn.BatchNorm1d(8)).eval()
    assert isinstance(model.between, nn.BatchNorm1d)
    assert model.between.running_mean is not None
    model.between.running_mean.add_(0.1)
    assert evaluate(model, source, LEARNER, 2).protocol == "inductive"


@dataclass
class Output:
    logits: Tensor
    scale: Tensor


class AsOutput(Own):
    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return Output(logits, logits.new_ones(()))


def hooked(kind: str) -> Any:
    """Modules whose weights are computed before each forward, at the root or below it."""
    norm = nn.BatchNorm1d(256)
    if kind == "parametrized":
        parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(256, 3))
        return nn.Sequential(nn.Flatten(), norm, parametrized)
    if kind == "orthogonal":
        layer = nn.utils.parametrizations.orthogonal(nn.Linear(256, 3))
        return nn.Sequential(nn.Flatten(), norm, layer)
    if kind == "root":
        return nn.utils.parametrizations.weight_norm(Root())
    if kind == "spectral":
        return nn.Sequential(nn.Flatten(), norm, nn.utils.spectral_norm(nn.Linear(256, 3)).eval())
    layer = Root() if kind == "old root" else nn.Linear(256, 3)
    nn.utils.weight_norm(layer)
    return layer if kind == "old root" else nn.Sequential(nn.Flatten(), norm, layer)


class Root(nn.Linear):
    """A linear layer of inputs that are centred over the batch."""

    def __init__(self) -> None:
        super().__init__(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return super().forward(x - x.mean(0))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@IGNORED
@pytest.mark.parametrize(
    "kind", ["parametrized", "orthogonal", "root", "old", "old root", "spectral"]
)
def test_query_at_a_time_of_weights_that_are_computed(kind: str, source: EpisodeSampler) -> None:
    torch.manual_seed(0)
    model = hooked(kind)
    state = copy.deepcopy(model.state_dict())
    found = evaluate(model, source, MAML(0.5, 3), 3, 4, protocol="query-at-a-time", tasks_at_once=3)
    batch, wanted = source.with_seed(4).sample(3), []
    for task in range(3):
        own = hooked(kind)
        own.load_state_dict(state)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(own(batch.support_x[task]), batch.support_y[task]).backward()
            optimizer.step()
        right = [
            own(torch.cat([batch.support_x[task], x[None]]))[-1].argmax() == y
            for x, y in zip(batch.query_x[task], batch.query_y[task], strict=True)
        ]
        wanted.append(torch.stack(right).float().mean().item())
    np.testing.assert_allclose(found.values, wanted, atol=1e-6)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", [Both, AsOutput])
def test_query_at_a_time_of_containers(kind: Any, source: EpisodeSampler) -> None:
    torch.manual_seed(0)
    model = kind(nn.BatchNorm1d(8))
    plain = Own(nn.BatchNorm1d(8))
    plain.load_state_dict(model.state_dict())

    def logits(p: Any) -> Tensor:
        tensor: Tensor = p["logits"] if isinstance(p, dict) else p.logits
        return tensor

    found = evaluate(
        model, source, LEARNER, 3, protocol="query-at-a-time",
        loss=lambda p, t: F.cross_entropy(logits(p), t), score=lambda p, t: score_of(logits(p), t),
    )  # fmt: skip
    wanted = evaluate(plain, source, LEARNER, 3, protocol="query-at-a-time")
    np.testing.assert_allclose(found.values, wanted.values, atol=1e-6)
