"""Prototypical networks and Proto-MAML against float64 autograd written by hand, and learn2learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gametalearn import InputError, TaskBatch, TrainConfig, adapt, meta_gradients, train
from gametalearn.adaptation import MAML
from gametalearn.data.sinusoid import Sinusoid
from gametalearn.evaluation import evaluate
from gametalearn.models import MLP, Conv4
from gametalearn.prototypes import ProtoMAML, ProtoNet, prototypes
from gametalearn.runfolder import load_run
from tests.support.commands import run

RATE = 0.1


def batch_of(tasks: int, ways: int, shots: int = 2, queries: int = 3) -> TaskBatch:
    """Labels in a random order, so that no prototype can come of positions."""
    g = torch.Generator().manual_seed(tasks)

    def part(each: int) -> tuple[Tensor, Tensor]:
        y = torch.stack([
            torch.arange(ways).repeat(each)[torch.randperm(ways * each, generator=g)]
            for _ in range(tasks)
        ])  # fmt: skip
        return torch.randn(*y.shape, 6, generator=g, dtype=torch.float64), y

    return TaskBatch(*part(shots), *part(queries), torch.zeros(tasks, dtype=torch.int64))


def embedding() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).double()


def by_hand(
    model: nn.Module, batch: TaskBatch, steps: int, first_order: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, query losses and accuracies, by distances, class by class; nothing of the package."""
    found = []
    for x, y, query_x, query_y in zip(
        batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True
    ):
        theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        features = functional_call(model, theta, (x,))
        centres = torch.stack([features[y == k].mean(0) for k in range(int(y.max()) + 1)])
        if not steps:
            distances = torch.cdist(functional_call(model, theta, (query_x,)), centres) ** 2
            logits = -distances
        else:
            weight, bias = 2 * centres, -(centres**2).sum(1)
            phi = {n: p * 1 for n, p in theta.items()}
            for _ in range(steps):
                parts = [p * 1 for p in (*phi.values(), weight, bias)]
                own = dict(zip(phi, parts, strict=False))
                loss = F.cross_entropy(
                    functional_call(model, own, (x,)) @ parts[-2].T + parts[-1], y
                )
                grads = torch.autograd.grad(loss, parts, create_graph=not first_order)
                phi = {n: p - RATE * g for (n, p), g in zip(phi.items(), grads, strict=False)}
                weight, bias = weight - RATE * grads[-2], bias - RATE * grads[-1]
            logits = functional_call(model, phi, (query_x,)) @ weight.T + bias
        loss = F.cross_entropy(logits, query_y)
        row = torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
        flat = [
            (torch.zeros_like(p) if g is None else g).flatten()
            for g, p in zip(row, theta.values(), strict=True)
        ]
        accuracy = (logits.argmax(1) == query_y).double().mean()
        found.append((torch.cat(flat), loss.detach(), accuracy))
    rows, losses, scores = zip(*found, strict=True)
    return torch.stack(rows), torch.stack(losses), torch.stack(scores)


@pytest.mark.parametrize("method", ["loop", "replay"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_proto_maml_equals_autograd_by_hand(steps: int, first_order: bool, method: Any) -> None:
    model = embedding()
    for tasks, ways in ((3, 4), (1, 2)):
        batch = batch_of(tasks, ways)
        got = meta_gradients(model, batch, ProtoMAML(RATE, steps, first_order), method=method)
        rows, losses, scores = by_hand(model, batch, steps, first_order)
        torch.testing.assert_close(got.rows, rows, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(got.loss, losses, rtol=1e-10, atol=0)
        torch.testing.assert_close(got.score.double(), scores)


@pytest.mark.parametrize("method", ["loop", "replay"])
def test_protonet_equals_distances_by_hand_and_learn2learn(method: Any) -> None:
    classifier = pytest.importorskip("learn2learn").nn.PrototypicalClassifier
    model, batch = embedding(), batch_of(3, 5)
    got = meta_gradients(model, batch, ProtoNet(), method=method)
    rows, losses, scores = by_hand(model, batch, 0, True)
    torch.testing.assert_close(got.rows, rows, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.loss, losses, rtol=1e-10, atol=0)
    torch.testing.assert_close(got.score.double(), scores)
    assert not got.updates.any()
    for task in range(3):
        theirs = classifier(
            support=model(batch.support_x[task]), labels=batch.support_y[task], distance="euclidean"
        )
        loss = F.cross_entropy(theirs(model(batch.query_x[task])), batch.query_y[task])
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        row = torch.cat([
            (torch.zeros_like(p) if g is None else g).flatten()
            for g, p in zip(grads, model.parameters(), strict=True)
        ])  # fmt: skip
        torch.testing.assert_close(got.loss[task], loss.detach(), rtol=1e-9, atol=0)
        torch.testing.assert_close(got.rows[task], row, rtol=1e-8, atol=1e-11)


def test_constant_memory_and_multi_step_loss_know_heads() -> None:
    model, batch = embedding(), batch_of(2, 3)
    plain = meta_gradients(model, batch, ProtoMAML(RATE, 2))
    kept = meta_gradients(model, batch, ProtoMAML(RATE, 2), constant_memory=True)
    torch.testing.assert_close(kept.rows, plain.rows, rtol=1e-9, atol=1e-12)
    steps = [meta_gradients(model, batch, ProtoMAML(RATE, n)).rows for n in (1, 2)]
    several = meta_gradients(model, batch, ProtoMAML(RATE, 2, step_weights=(0.25, 0.75)))
    torch.testing.assert_close(several.rows, 0.25 * steps[0] + 0.75 * steps[1])


def test_prototypes_are_means_and_none_is_made_up() -> None:
    features, labels = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]]), torch.tensor([1, 0, 1])
    found = prototypes(features, labels, 3)
    assert found[:2].tolist() == [[3.0, 4.0], [3.0, 5.5]]
    assert torch.isnan(found[2]).all()


@pytest.mark.parametrize("learner", [ProtoNet(), ProtoMAML(0.05, 2)])
def test_an_adapted_model_predicts_what_evaluate_tests(learner: ProtoMAML) -> None:
    g = torch.Generator().manual_seed(0)
    images = torch.rand(1, 8, 1, 16, 16, generator=g)
    y = torch.arange(4).repeat(1, 2)
    batch = TaskBatch(images, y, torch.rand(1, 8, 1, 16, 16, generator=g), y, torch.zeros(1).long())
    torch.manual_seed(0)
    model = Conv4(None, image_size=16, hidden=8)

    class One:
        def sample(self, tasks: int) -> TaskBatch:
            return batch

        def with_seed(self, seed: int) -> One:
            return self

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    fitted = adapt(model, batch.support_x[0], batch.support_y[0], learner)
    one_by_one = torch.cat([fitted(x[None]) for x in batch.query_x[0]])
    share = (one_by_one.argmax(1) == y[0]).float().mean().item()
    tested = evaluate(model, One(), learner, 1, None, protocol="inductive")
    assert share == pytest.approx(tested.mean)
    plain = nn.Linear(8, 4)
    plain.load_state_dict({k[5:]: v for k, v in fitted.state_dict().items() if k[:5] == "head."})
    features = cast(nn.Module, fitted.embedding)(batch.query_x[0])
    torch.testing.assert_close(plain(features), fitted(batch.query_x[0]))


def test_a_run_is_tested_with_more_ways_than_it_was_trained_with(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for learner in ("protonet", "proto-maml"):
        folder = tmp_path / learner
        words = f"train --learner {learner} --iterations 3 --meta-batch 2 --hidden 4 --quiet"
        code, *_ = run(capsys, f"{words} --validation-episodes 2 --threads 1 --out", folder)
        assert code == 0
        loaded = load_run(folder)
        assert not any(name.startswith("head") for name in loaded.meta)
        wide = TrainConfig.of("glyphs", ways=12)
        from gametalearn.build import build_source

        tested = evaluate(loaded.model, build_source(wide, "test"), loaded.test_learner, 4)
        assert (tested.values > 1 / 12).all()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = TrainConfig.of("glyphs", learner="protonet", rule="agreement-update", iterations=2)
    with pytest.raises(InputError, match="0 inner steps there are none"):
        train(config, tmp_path / "a", progress=False)
    with pytest.raises(InputError, match="these targets are not labels"):
        meta_gradients(MLP(), Sinusoid().sample(2), ProtoNet())
    assert MAML(0.1).for_test(2) == MAML(0.1, 2, first_order=True)


@pytest.mark.parametrize("labels", [[0, 2, 4], [-1, 0, 1], [0, 2, 2], [1, 1, 1]])
@pytest.mark.parametrize("learner", [ProtoNet(), ProtoMAML(0.1, 1)])
def test_labels_that_are_not_numbered_are_refused(learner: ProtoMAML, labels: list[int]) -> None:
    """A class without a support example had a prototype of NaN, which argmax takes for the largest."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(
        InputError, match=f"got the labels {min(labels)}.*number the classes 0, 1, 2"
    ):
        adapt(model, torch.randn(3, 4), torch.tensor(labels), learner)


class Features(nn.Module):
    """Features in the form that ``put`` gives them."""

    def __init__(self, put: Any) -> None:
        super().__init__()
        self.layer, self.put = nn.Linear(6, 1).double(), put

    def forward(self, x: Tensor) -> Any:
        return self.put(self.layer(x))


@pytest.mark.parametrize("learner", [ProtoNet(), ProtoMAML(0.1, 1)])
@pytest.mark.parametrize(
    ("put", "got"), [(lambda x: {"logits": x}, "a dict"), (lambda x: x[:, 0], r"shape \(6,\)")]
)
def test_what_are_no_features_is_named(learner: ProtoMAML, put: Any, got: str) -> None:
    model, batch = Features(put), batch_of(2, 3)
    with pytest.raises(InputError, match=f"a tensor of examples x features; got {got}; let the"):
        meta_gradients(model, batch, learner)
    with pytest.raises(InputError, match=f"got {got}; let the"):
        adapt(model, batch.support_x[0], batch.support_y[0], learner)
