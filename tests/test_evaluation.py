import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from gametalearn.adaptation import ANIL, MAML, Learner, MetaSGD, Reptile
from gametalearn.config import TrainConfig
from gametalearn.data.sinusoid import Sinusoid
from gametalearn.episodes import EpisodeSampler
from gametalearn.errors import InputError
from gametalearn.evaluation import Evaluation, adapt, ci95, evaluate, protocol_of
from gametalearn.images import ClassImages
from gametalearn.models import MLP, Conv4
from gametalearn.runfolder import load_run
from gametalearn.training import train


@pytest.fixture
def source():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 1, 16, 16), dtype=torch.uint8, generator=generator)
    data = ClassImages.from_tensors(images, torch.arange(60) // 6)
    return EpisodeSampler(data, ways=3, shots=2, queries=3, seed=1)


def adapted_accuracy(model, batch, task, lr, steps):
    """An oracle with nothing shared: copy the model, plain SGD on the support set, accuracy."""
    own = copy.deepcopy(model)
    optimizer = torch.optim.SGD(own.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(own(batch.support_x[task]), batch.support_y[task])
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return (own(batch.query_x[task]).argmax(1) == batch.query_y[task]).float().mean().item()


def test_equals_fine_tuning_a_copy_of_the_model(source):
    torch.manual_seed(0)
    model = Conv4(3, image_size=16, hidden=8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = evaluate(model, source, MAML(0.1, 2), episodes=7, seed=5, tasks_at_once=3)
    batch = source.with_seed(5).sample(7)
    wanted = [adapted_accuracy(model, batch, t, 0.1, 2) for t in range(7)]
    np.testing.assert_allclose(result.values, wanted, atol=1e-6)
    assert result.ci95 == pytest.approx(1.96 * np.std(wanted, ddof=1) / 7**0.5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_same_seed_same_values_and_the_source_is_not_advanced(source):
    model = Conv4(3, image_size=16, hidden=8)
    before = source.state_dict()["generator"]
    a, b = (evaluate(model, source, MAML(0.1), 5, seed=3) for _ in range(2))
    assert a.values.tolist() == b.values.tolist()
    assert torch.equal(before, source.state_dict()["generator"])


@pytest.mark.parametrize("tasks_at_once", [1, 5, 20, 32, 100])
def test_how_many_at_once_does_not_change_the_episodes(source, tasks_at_once):
    model = Conv4(3, image_size=16, hidden=4)
    wanted = evaluate(model, source, MAML(0.1), 37, seed=3)
    found = evaluate(model, source, MAML(0.1), 37, seed=3, tasks_at_once=tasks_at_once)
    np.testing.assert_allclose(found.values, wanted.values, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "must"),
    [("episodes", 2.5, "be an integer"), ("tasks_at_once", 0, "be at least 1")],
)
def test_counts_are_counts(source, name, value, must):
    with pytest.raises(InputError, match=f"{name} must {must}, got {value}"):
        evaluate(Conv4(3, image_size=16, hidden=4), source, MAML(0.1), **{name: value})


def test_one_episode_has_no_interval(source):
    text = str(evaluate(Conv4(3, image_size=16, hidden=4), source, MAML(0.1), 1))
    assert "+/-" not in text
    assert "(1 episode, transductive)" in text


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(256, 3)

    def forward(self, x):
        return self.head(nn.functional.dropout(x.flatten(1), 0.9))


def test_dropout_is_off_in_tests(source, recwarn):
    torch.manual_seed(0)
    layers = [
        nn.Flatten(),
        nn.Linear(256, 16),
        nn.BatchNorm1d(16),
        nn.Dropout(0.9),
        nn.Linear(16, 3),
    ]
    model = nn.Sequential(*layers)
    plain = nn.Sequential(*(nn.Identity() if isinstance(m, nn.Dropout) else m for m in layers))
    found = [evaluate(model, source, MAML(0.1), 20) for _ in range(2)]
    wanted = evaluate(plain, source, MAML(0.1), 20)
    assert found[0].values.tolist() == found[1].values.tolist() == wanted.values.tolist()
    assert model.training
    assert model[3].training
    assert model[2].num_batches_tracked == 0
    assert not recwarn.list
    batch = source.sample(1)
    x, y, query = batch.support_x[0], batch.support_y[0], batch.query_x[0]
    copies = [adapt(m, x, y, MAML(0.1)) for m in (model, plain)]
    torch.testing.assert_close(copies[0](query), copies[1](query))


def test_other_chance_is_told(source):
    with pytest.warns(UserWarning, match="Functional draws random numbers while it is tested"):
        evaluate(Functional(), source, MAML(0.1), 4)


def test_protocols_of_one_model(source):
    model = Conv4(3, image_size=16, hidden=8)
    assert protocol_of(model) == "transductive"
    transductive = evaluate(model, source, MAML(0.1), 20)
    inductive = evaluate(model, source, MAML(0.1), 20, protocol="inductive")
    assert (transductive.protocol, inductive.protocol) == ("transductive", "inductive")
    assert transductive.values.tolist() != inductive.values.tolist()
    assert model.norm == "batch"
    with pytest.raises(InputError, match="supports only 'inductive'"):
        evaluate(
            Conv4(3, image_size=16, norm="group"), source, MAML(0.1), 2, protocol="transductive"
        )


def test_regression_reports_the_squared_error():
    model, batch = MLP(), Sinusoid().with_seed(0).sample(4)
    result = evaluate(model, Sinusoid(), MAML(0.01, 3), episodes=4)
    assert result.metric == "mse"
    for task, value in enumerate(result.values):
        x, y = batch.support_x[task], batch.support_y[task]
        own, z = copy.deepcopy(model), batch.query_x[task]
        optimizer = torch.optim.SGD(own.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            (own(x) - y).square().mean().backward()
            optimizer.step()
        error = (own(z) - batch.query_y[task]).square().mean().item()
        assert value == pytest.approx(error, rel=1e-5)


def test_an_interval_of_one_value_is_zero():
    assert ci95(np.array([0.5])) == 0.0


def test_with_several_objectives_the_interval_is_stratified():
    generator = np.random.default_rng(0)
    easy, hard = generator.normal(0.8, 0.05, 40), generator.normal(0.3, 0.1, 10)
    values, group = np.concatenate([easy, hard]), np.repeat([0, 1], [40, 10])
    found = Evaluation(values, group, "accuracy", "transductive", 0)
    error = np.sqrt(easy.var(ddof=1) / 40 + hard.var(ddof=1) / 10) / 2
    assert found.mean == pytest.approx((easy.mean() + hard.mean()) / 2)
    assert found.ci95 == pytest.approx(1.96 * error)
    assert found.of_group(1).ci95 == pytest.approx(1.96 * hard.std(ddof=1) / 10**0.5)
    assert f"+/- {100 * found.ci95:.2g}% (50 episodes" in str(found)


class PlainConv(torch.nn.Module):
    """A user's own module, with running statistics."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3, stride=4), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
            torch.nn.Flatten(), torch.nn.Linear(4 * 16, 3),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)


def one_at_a_time(model, batch, task, lr, steps):
    """`adapted_accuracy`, but each query in a batch of the support set and itself."""
    own = copy.deepcopy(model)
    optimizer = torch.optim.SGD(own.parameters(), lr=lr)
    support = batch.support_x[task]
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(own(support), batch.support_y[task]).backward()
        optimizer.step()
    right = 0
    with torch.no_grad():
        for x, y in zip(batch.query_x[task], batch.query_y[task], strict=True):
            if getattr(model, "uses_support", False):
                prediction = own(x[None], support)[0]
            else:
                prediction = own(torch.cat([support, x[None]]))[-1]
            right += int(prediction.argmax() == y)
    return right / len(batch.query_y[task])


@pytest.mark.parametrize("kind", ["batch", "support", "group", "none", "own", "own-eval"])
def test_query_at_a_time_is_what_it_says(source, kind):
    torch.manual_seed(1)
    own = PlainConv()
    own(torch.rand(8, 1, 16, 16))  # running statistics that were estimated
    own.train(kind != "own-eval")
    model = own if kind.startswith("own") else Conv4(3, image_size=16, hidden=8, norm=kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = evaluate(
        model, source, MAML(0.1, 2), 12, 4, protocol="query-at-a-time", tasks_at_once=6
    )
    batch = source.with_seed(4).sample(12)
    wanted = [one_at_a_time(model, batch, t, 0.1, 2) for t in range(12)]
    np.testing.assert_allclose(result.values, wanted, atol=1e-6)
    assert result.protocol == "query-at-a-time"
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    if kind in ("support", "group", "none", "own-eval"):
        plain = evaluate(model, source, MAML(0.1, 2), 12, 4, tasks_at_once=6)
        assert plain.values.tolist() == result.values.tolist()


def test_query_at_a_time_with_learned_rates_and_a_head_by_name(source):
    torch.manual_seed(2)
    model = Conv4(3, image_size=16, hidden=8)
    learners: list[Learner] = [MetaSGD(0.1, 2), ANIL(0.1, 2), Reptile(0.1, 2)]
    for learner in learners:
        meta = learner.meta_parameters(dict(model.named_parameters()))
        result = evaluate(model, source, learner, 6, meta=meta, protocol="query-at-a-time")
        assert result.values.shape == (6,)


def test_adapt_gives_a_module_that_needs_no_gametalearn(source, tmp_path):
    torch.manual_seed(3)
    model = PlainConv().eval()
    batch = source.sample(1)
    x, y = batch.support_x[0], batch.support_y[0]
    adapted = adapt(model, x, y, MAML(0.1, 3))
    assert type(adapted) is PlainConv
    own = PlainConv().eval()
    own.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(own(x), y).backward()
        optimizer.step()
    for name, value in own.state_dict().items():
        torch.testing.assert_close(adapted.state_dict()[name], value)
    torch.save(adapted.state_dict(), tmp_path / "w.pt")
    torch.save((batch.query_x[0], adapted(batch.query_x[0]).detach()), tmp_path / "io.pt")
    program = """
import sys
sys.modules["gametalearn"] = None  # its import fails
import torch
state = torch.load("w.pt", weights_only=True)
model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, stride=4), torch.nn.BatchNorm2d(4),
    torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
model.load_state_dict({k.removeprefix("net."): v for k, v in state.items()})
x, wanted = torch.load("io.pt", weights_only=True)
assert torch.allclose(model(x), wanted, atol=1e-6)
"""
    subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, check=True)


@pytest.mark.parametrize("learner", ["maml", "metasgd", "reptile"])
def test_a_saved_run_is_evaluated_adapted_and_saved_in_three_lines(tmp_path, learner):
    config = TrainConfig.of(
        "sinusoid", learner=learner, iterations=3, meta_batch=2, hidden=8, validation_episodes=2
    )
    train(config, tmp_path / "a", progress=False)
    source = Sinusoid(seed=9)
    batch = source.with_seed(0).sample(1)
    x, y = batch.support_x[0], batch.support_y[0]

    run = load_run(tmp_path / "a")
    result = evaluate(run.model, source, run.test_learner, 1, seed=0, meta=run.meta)
    torch.save(adapt(run.model, x, y, run.test_learner, meta=run.meta).state_dict(), tmp_path / "w")

    again = MLP(hidden=(8, 8))
    again.load_state_dict(torch.load(tmp_path / "w", weights_only=True))
    mse = torch.nn.functional.mse_loss(again(batch.query_x[0]).detach(), batch.query_y[0])
    assert float(mse) == pytest.approx(result.mean, rel=1e-4)
