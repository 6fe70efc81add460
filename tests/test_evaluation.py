import numpy as np
import pytest
import torch

from gametalearn.adaptation import MAML
from gametalearn.data.sinusoid import Sinusoid
from gametalearn.episodes import EpisodeSampler
from gametalearn.errors import InputError
from gametalearn.evaluation import ci95, evaluate, protocol_of
from gametalearn.images import ClassImages
from gametalearn.models import MLP, Conv4


@pytest.fixture
def source():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 1, 16, 16), dtype=torch.uint8, generator=generator)
    data = ClassImages.from_tensors(images, torch.arange(60) // 6)
    return EpisodeSampler(data, ways=3, shots=2, queries=3, seed=1)


def adapted_accuracy(model, batch, task, lr, steps):
    """An oracle with nothing shared: copy the model, plain SGD on the support set, accuracy."""
    import copy

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
    batch = source.with_seed(5)
    wanted = [adapted_accuracy(model, batch.sample(1), 0, 0.1, 2) for _ in range(7)]
    stream = source.with_seed(5)
    batches = [stream.sample(3), stream.sample(3), stream.sample(1)]
    wanted = [adapted_accuracy(model, b, t, 0.1, 2) for b in batches for t in range(len(b))]
    np.testing.assert_allclose(result.values, wanted, atol=1e-6)
    assert result.ci95 == pytest.approx(1.96 * np.std(wanted, ddof=1) / 7**0.5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_same_seed_same_values_and_the_source_is_not_advanced(source):
    model = Conv4(3, image_size=16, hidden=8)
    before = source.state_dict()["generator"]
    a, b = (evaluate(model, source, MAML(0.1), 5, seed=3) for _ in range(2))
    assert a.values.tolist() == b.values.tolist()
    assert torch.equal(before, source.state_dict()["generator"])


def test_protocols_of_one_model(source):
    model = Conv4(3, image_size=16, hidden=8)
    assert protocol_of(model) == "transductive"
    transductive = evaluate(model, source, MAML(0.1), 20)
    inductive = evaluate(model, source, MAML(0.1), 20, protocol="inductive")
    assert (transductive.protocol, inductive.protocol) == ("transductive", "inductive")
    assert transductive.values.tolist() != inductive.values.tolist()
    assert model.norm == "batch"
    with pytest.raises(InputError, match="knows only 'inductive'"):
        evaluate(
            Conv4(3, image_size=16, norm="group"), source, MAML(0.1), 2, protocol="transductive"
        )


def test_regression_reports_the_squared_error():
    result = evaluate(MLP(), Sinusoid(), MAML(0.01, 3), episodes=4)
    assert result.metric == "mse"
    assert (result.values > 0).all()


def test_an_interval_of_one_value_is_zero():
    assert ci95(np.array([0.5])) == 0.0
