"""`evaluate`, `train` and `compare` by a loss and a score that were handed in."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gametalearn import (
    MAML,
    ClassImages,
    Conv4,
    EpisodeSampler,
    InputError,
    Score,
    Sinusoid,
    TaskBatch,
    TrainConfig,
    compare,
    evaluate,
    load_run,
    train,
)
from gametalearn.cli import main
from gametalearn.evaluation import Evaluation
from gametalearn.protocols import evaluate_all, write_evaluations
from gametalearn.report import plot_comparison
from gametalearn.scores import default_score
from tests.support import runs
from tests.support.runs import lines, untimed

# forwards that draw random numbers are looped over
pytestmark = pytest.mark.filterwarnings("ignore:.*computed task by task")


class YesNo:
    """Episodes of 4 yes/no questions: the signs of a linear map of 8 inputs."""

    def __init__(self, seed: int = 0, target: Any = lambda z: (z > 0).float()) -> None:
        self.target, self.generator = target, torch.Generator().manual_seed(seed)
        self.drawn = 0

    def sample(self, num_tasks: int, part: slice = slice(None)) -> TaskBatch:
        self.drawn += num_tasks
        w = torch.randn(num_tasks, 8, 4, generator=self.generator)
        x = torch.randn(num_tasks, 20, 8, generator=self.generator)
        y, group = self.target(x @ w), torch.zeros(num_tasks, dtype=torch.int64)
        return TaskBatch(x[:, :10], y[:, :10], x[:, 10:], y[:, 10:], group)[part]

    def with_seed(self, seed: int) -> YesNo:
        return YesNo(seed, self.target)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def tuned(model: nn.Linear, batch: TaskBatch, loss: Any, lr: float, steps: int) -> list[Tensor]:
    """An oracle with nothing shared: each task's query predictions after plain descent."""
    predictions = []
    for task in range(len(batch)):
        own = nn.Linear(8, 4)
        own.load_state_dict(model.state_dict())
        optimizer = torch.optim.SGD(own.parameters(), lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(own(batch.support_x[task]), batch.support_y[task]).backward()
            optimizer.step()
        predictions.append(own(batch.query_x[task]).detach())
    return predictions


def test_evaluate_adapts_by_the_loss_and_reports_its_score() -> None:
    torch.manual_seed(0)
    model, bce = nn.Linear(8, 4), F.binary_cross_entropy_with_logits
    found = evaluate(model, YesNo(), MAML(1.0, 20), episodes=16, loss=bce)
    batch = YesNo(0).sample(16)
    wanted = [
        float(((p > 0) == (y == 1)).float().mean())
        for p, y in zip(tuned(model, batch, bce, 1.0, 20), batch.query_y, strict=True)
    ]
    np.testing.assert_allclose(found.values, wanted, atol=1e-6)
    assert found.metric == "multilabel-accuracy"
    assert 0.6 < found.mean < 1
    assert str(found).startswith(f"multilabel-accuracy {100 * found.mean:.4g}% +/- ")
    absolute = evaluate(model, YesNo(), MAML(0.1, 5), 16, loss=F.l1_loss)
    wanted = [
        float((p - y).abs().mean())
        for p, y in zip(tuned(model, batch, F.l1_loss, 0.1, 5), batch.query_y, strict=True)
    ]
    np.testing.assert_allclose(absolute.values, wanted, rtol=1e-4)
    assert str(absolute).startswith(f"mae {absolute.mean:.4g} +/- ")
    named = evaluate(model, YesNo(), MAML(0.1, 5), 20, loss=F.l1_loss, score="mse")
    assert named.metric == "mse"
    squares = Score("root", lambda p, t: F.mse_loss(p, t).sqrt(), False, "percent")
    root = evaluate(model, YesNo(), MAML(0.1, 5), 20, loss=F.l1_loss, score=squares)
    np.testing.assert_allclose(root.values**2, named.values, rtol=1e-5)
    assert str(root).startswith(f"root {100 * root.mean:.4g}% +/- ")


class Dict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.own(x), "noise": torch.rand(2)}


def dict_loss(p: Any, t: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(p["logits"], t)


def soft(z: Tensor) -> Tensor:
    return z.sigmoid()


@pytest.mark.filterwarnings("ignore:Dict draws random numbers")
@pytest.mark.parametrize(
    ("model", "loss", "target"),
    [
        (nn.Linear(8, 4), lambda p, t: F.binary_cross_entropy_with_logits(p, t), None),
        (Dict(), dict_loss, None),
        (nn.Linear(8, 4), F.binary_cross_entropy_with_logits, soft),
        (nn.Linear(8, 4), nn.SmoothL1Loss(), None),
    ],
    ids=["lambda", "dict", "soft targets", "smooth l1"],
)
def test_evaluate_refuses_before_adapting_where_no_default_fits(
    monkeypatch: Any, model: nn.Module, loss: Any, target: Any
) -> None:
    source = YesNo() if target is None else YesNo(0, target)
    adapted = []
    monkeypatch.setattr("gametalearn.evaluation.adapt_and_score", lambda *a, **k: adapted.append(a))
    before = torch.get_rng_state()
    with pytest.raises(InputError, match=r"no default score fits.*pass score=.*SCORES"):
        evaluate(model, source, MAML(0.1), 5, loss=loss)
    assert not adapted
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.undo()
    found = evaluate(model, source, MAML(0.1), 5, loss=loss, score=by_logits)
    assert found.metric == "by_logits"
    assert np.isfinite(found.values).all()


def by_logits(p: Any, t: Tensor) -> Tensor:
    logits = p["logits"] if isinstance(p, dict) else p
    share: Tensor = ((logits > 0) == (t > 0.5)).float().mean()
    return share


def test_every_protocol_takes_the_loss_and_the_score(tmp_path: Path) -> None:
    model, names = nn.Linear(8, 4), ["transductive", "inductive", "query-at-a-time"]
    bce: Any = F.binary_cross_entropy_with_logits
    found = evaluate_all(model, YesNo(), MAML(1.0, 5), 8, 0, names, loss=bce)  # type: ignore[arg-type]
    assert {e.metric for e in found.values()} == {"multilabel-accuracy"}
    plain = evaluate(model, YesNo(), MAML(1.0, 5), 8, loss=bce)
    for result in found.values():
        np.testing.assert_allclose(result.values, plain.values, atol=1e-6)
    write_evaluations(tmp_path / "e.json", found, "inductive", 1, 5)
    stored = json.loads((tmp_path / "e.json").read_text())
    assert stored["metric"] == "multilabel-accuracy"
    assert stored["multilabel-accuracy"] == plain.mean
    other = evaluate_all(model, YesNo(), MAML(1.0, 5), 8, 0, ["inductive"], loss=bce, score="mae")
    assert other["inductive"].metric == "mae"


@pytest.fixture
def images() -> EpisodeSampler:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (60, 1, 16, 16), dtype=torch.uint8, generator=generator)
    data = ClassImages.from_tensors(pixels, torch.arange(60) // 6)
    return EpisodeSampler(data, ways=5, shots=1, queries=3, seed=1)


def test_episodes_that_diverged_are_said_to_have(images: EpisodeSampler) -> None:
    torch.manual_seed(0)
    model = Conv4(5, image_size=16, hidden=4, norm="none")
    found = evaluate(model, images, MAML(1e9, 10), episodes=8)
    assert np.isnan(found.values).all()
    assert str(found) == "accuracy nan: 8 of 8 episodes diverged (inductive)"
    assert math.isnan(found.mean)
    assert math.isnan(found.ci95)
    values = np.array([0.5, np.nan, 0.7, np.inf])
    some = Evaluation(values, np.zeros(4, dtype=np.int64), "mse", "transductive", 0)
    assert str(some) == "mse nan: 2 of 4 episodes diverged (transductive)"
    with pytest.raises(InputError, match="8 of 8 test episodes diverge"):
        evaluate_all(model, images, MAML(1e9, 10), 8, 0, ["inductive"])


def test_more_ways_than_outputs(images: EpisodeSampler) -> None:
    model = Conv4(3, image_size=16, hidden=4)
    with pytest.raises(InputError, match=r"label [34], but the model has 3 outputs.* of 3 ways"):
        evaluate(model, images, MAML(0.1), episodes=1)


def tiny(**given: Any) -> TrainConfig:
    return runs.tiny(**{"validate_every": 2, "checkpoint_every": 3, "threads": 1, **given})


def huber(p: Tensor, t: Tensor) -> Tensor:
    return F.huber_loss(p, t)


def near(p: Tensor, t: Tensor) -> Tensor:
    """The share of points within 0.5 of the curve."""
    return ((p - t).abs() < 0.5).float().mean()


def minus(p: Tensor, t: Tensor) -> Tensor:
    return -F.mse_loss(p, t)


def old_score(p: Tensor, t: Tensor) -> Tensor:
    """What scores were before they could be chosen."""
    if t.is_floating_point():
        return F.mse_loss(p, t)
    return (p.argmax(-1) == t).to(p.dtype).mean()


@pytest.mark.parametrize("dataset", ["sinusoid", "glyphs"])
def test_without_parts_nothing_changes(dataset: str, tmp_path: Path) -> None:
    """The default gives, to the last bit, the numbers of the score that there was before."""
    small: dict[str, Any] = {"iterations": 3, "meta_batch": 2, "hidden": 4, "threads": 1}
    small |= {"validation_episodes": 3, "log_every": 1, "validate_every": 1}
    config = TrainConfig.of(dataset, **small)
    name = "mse" if config.regression else "accuracy"
    before = Score(
        name, old_score, name == "accuracy", "percent" if name == "accuracy" else "number"
    )
    places: list[tuple[str, Any]] = [("a", {}), ("b", {"score": before})]
    for place, more in places:
        compare(config, ["uniform", "agreement"], 1, 6, tmp_path / place, progress=False, **more)
    a, b = untimed(tmp_path / "a"), untimed(tmp_path / "b")
    assert a["config"].pop("score") == "default"
    assert b["config"].pop("score") == f"handed-in:{name}"
    assert a == b
    assert a["metric"] == {
        "name": name, "higher_is_better": before.higher_is_better, "format": before.format
    }  # fmt: skip
    run = Path("agreement/seed0")
    assert lines(tmp_path / "a" / run) == lines(tmp_path / "b" / run)
    first, second = (tmp_path / place / run / "evaluation.json" for place in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_training_by_a_loss_is_descent_on_it() -> None:
    """One step of SGD against the meta-gradient by hand."""
    config = tiny(iterations=1, meta_optimizer="sgd", meta_lr=0.1, inner_lr=0.05, inner_steps=2)
    run = train(config, progress=False, loss=F.l1_loss)
    assert (run.score.name, run.score.higher_is_better) == ("mae", False)
    from gametalearn.build import build_model, build_source

    source = build_source(config, "train")
    model = build_model(config, (1,))
    batch = source.sample(4)
    rows = []
    for task in range(4):
        params: dict[str, Tensor] = dict(model.named_parameters())
        for _ in range(2):
            p = torch.func.functional_call(model, params, (batch.support_x[task],))
            loss = (p - batch.support_y[task]).abs().mean()
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {n: q - 0.05 * g for (n, q), g in zip(params.items(), grads, strict=True)}
        p = torch.func.functional_call(model, params, (batch.query_x[task],))
        loss = (p - batch.query_y[task]).abs().mean()
        rows.append(torch.autograd.grad(loss, list(model.parameters())))
    for i, (name, before) in enumerate(model.named_parameters()):
        step = sum(row[i] for row in rows) / 4
        torch.testing.assert_close(run.meta[name].detach(), before.detach() - 0.1 * step)


def test_the_best_validation_goes_by_the_scores_direction(tmp_path: Path) -> None:
    up = train(tiny(meta_lr=0.3), tmp_path / "up", progress=False, score=Score("near", near))
    values = [r["validation"]["near"] for r in lines(tmp_path / "up") if "validation" in r]
    assert up.best["value"] == max(values)
    down = train(tiny(meta_lr=0.3), tmp_path / "down", progress=False, loss=F.l1_loss)
    values = [r["validation"]["mae"] for r in lines(tmp_path / "down") if "validation" in r]
    assert down.best["value"] == -min(values)
    assert len(set(values)) == 3
    assert all(r["mae"] == pytest.approx(r["loss"]) for r in lines(tmp_path / "down"))
    assert all(r["objectives"]["sinusoid"]["mae"] == r["mae"] for r in lines(tmp_path / "down"))
    # the same errors with their sign turned: the same weights are the best
    turned = train(tiny(meta_lr=0.3), progress=False, score=Score("minus", minus))
    plain = train(tiny(meta_lr=0.3), progress=False)
    assert turned.best["iteration"] == plain.best["iteration"]
    assert turned.best["value"] == plain.best["value"] < 0


def untouched(work: Any) -> None:
    before = torch.get_rng_state()
    work()
    assert torch.equal(before, torch.get_rng_state())


def test_train_and_compare_refuse_before_the_first_iteration(
    tmp_path: Path, monkeypatch: Any
) -> None:
    trained = []
    monkeypatch.setattr("gametalearn.training.meta_gradients", lambda *a, **k: trained.append(a))
    calls: list[Any] = [
        lambda: train(tiny(), tmp_path / "a", progress=False, loss=huber),
        lambda: train(tiny(), tmp_path / "a", progress=False, loss=nn.HuberLoss()),
        lambda: compare(tiny(), ["uniform"], 1, 5, tmp_path / "a", progress=False, loss=huber),
    ]
    for call in calls:

        def refused(call: Any = call) -> None:
            with pytest.raises(InputError, match=r"no default score fits.*pass score="):
                call()

        untouched(refused)
    others: list[Any] = [
        ({"score": "mea"}, "unknown score 'mea'; did you mean"),
        ({"score": Score("loss", minus)}, "score 'loss': that name is reserved"),
        ({"score": Score("values", minus)}, "give it another, such as Score"),
    ]
    for more, message in others:
        with pytest.raises(InputError, match=message):
            train(tiny(), tmp_path / "a", progress=False, **more)
        with pytest.raises(InputError, match=message):
            compare(tiny(), ["uniform"], 1, 5, tmp_path / "a", progress=False, **more)
    with pytest.raises(InputError, match=r"rule 'dtp' .*the score 'mae' is an error"):
        train(TrainConfig.of("glyphs", rule="dtp", hidden=4), loss=F.cross_entropy, score="mae")
    assert not trained
    assert not (tmp_path / "a").exists()


def test_the_dry_look_changes_no_stream() -> None:
    """A run whose score is found by a look is the run whose score is told."""
    told = train(tiny(), progress=False, loss=F.l1_loss, score="mae")
    looked = train(tiny(), progress=False, loss=F.l1_loss)
    assert all(torch.equal(p, looked.meta[n]) for n, p in told.meta.items())
    assert told.best["value"] == looked.best["value"]


def test_a_run_with_parts_goes_on_and_loads_with_them_alone(tmp_path: Path) -> None:
    parts: Any = {"loss": huber, "score": Score("near", near)}
    whole = train(tiny(), tmp_path / "whole", progress=False, **parts)
    train(tiny(iterations=3), tmp_path / "half", progress=False, **parts)
    again = train(tiny(), tmp_path / "whole", progress=False, **parts)
    assert again.best["value"] == whole.best["value"]
    loaded = load_run(tmp_path / "half", **parts)
    assert loaded.loss is huber
    assert loaded.score.name == "near"
    for wrong, word in (
        ({}, "loss"),
        ({"loss": huber}, "score=near; pass score=|no default score fits"),
        ({"loss": F.l1_loss, "score": "mae"}, r"loss=huber, not l1_loss; pass loss="),
    ):
        more: Any = wrong
        with pytest.raises(InputError, match=word):
            train(tiny(), tmp_path / "whole", progress=False, **more)
        with pytest.raises(InputError, match=word):
            load_run(tmp_path / "whole", **more)
    train(tiny(), tmp_path / "plain", progress=False)
    with pytest.raises(InputError, match=r"has loss=default, not .*huber"):
        train(tiny(), tmp_path / "plain", progress=False, **parts)


def test_a_run_with_parts_is_not_tested_by_another_loss(tmp_path: Path, capsys: Any) -> None:
    train(tiny(), tmp_path / "a", progress=False, loss=F.l1_loss)
    assert main(["evaluate", str(tmp_path / "a"), "--episodes", "4", "--quiet"]) == 2
    assert "has loss=l1_loss" in capsys.readouterr().err


def test_compare_names_the_score_everywhere(tmp_path: Path) -> None:
    given = Score("near/0.5", near, True, "percent")
    found = compare(
        tiny(), ["uniform", "agreement"], 3, 5, tmp_path, progress=False, loss=huber, score=given
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["metric"] == {"name": "near/0.5", "higher_is_better": True, "format": "percent"}
    for rule in ("uniform", "agreement"):
        value = results["rules"][rule]["near/0.5"]
        assert value == pytest.approx(found.mean(rule))
        assert f"{100 * value:.2f} ± " in found.table()  # three seeds
        stored = json.loads((tmp_path / rule / "seed0" / "evaluation.json").read_text())
        assert stored["metric"] == "near/0.5"
        assert "near/0.5" in lines(tmp_path / rule / "seed0")[0]
    assert "test near/0.5 %" in found.table()
    assert {f.name for f in plot_comparison(found, tmp_path)} == {
        "learning_curves.png", "near-0.5.png", "differences.png", "weights-agreement.png"
    }  # fmt: skip
    # what is finished is not tested anew, and not by another score
    again = compare(
        tiny(), ["uniform", "agreement"], 3, 5, tmp_path, progress=False, loss=huber, score=given
    )
    assert again.as_dict() == found.as_dict()
    with pytest.raises(InputError, match=r"score=near/0\.5, not near; pass score="):
        compare(tiny(), ["uniform"], 3, 5, tmp_path, progress=False, loss=huber, score=near)


def test_compare_in_processes_takes_parts_that_can_be_sent(tmp_path: Path) -> None:
    config = tiny(iterations=2)
    parts: Any = {"loss": F.l1_loss, "progress": False}
    for name, jobs in (("a", 1), ("b", 2)):
        compare(config, ["uniform", "agreement"], 1, 4, tmp_path / name, jobs=jobs, **parts)
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")
    with pytest.raises(InputError, match="jobs=2: the loss cannot be sent"):
        compare(
            config, ["uniform"], 1, 4, tmp_path / "c", jobs=2, loss=lambda p, t: huber(p, t),
            score=near, progress=False,
        )  # fmt: skip
    assert not (tmp_path / "c").exists()


def test_a_score_that_is_nan_for_some_tasks_is_null_in_metrics(tmp_path: Path) -> None:
    def rarely(p: Tensor, t: Tensor) -> Tensor:
        return torch.where(t.mean() > 0, (p - t).abs().mean(), float("nan"))

    run = train(tiny(), tmp_path, progress=False, score=Score("rarely", rarely, False))
    records = lines(tmp_path)
    assert None in [v for r in records for v in r["scores"]]
    assert all(r["rarely"] is None for r in records if None in r["scores"])
    assert run.iteration == 6


def test_the_line_of_a_run_shows_its_best_validation(tmp_path: Path, capsys: Any) -> None:
    place = tmp_path / "a"
    flags = "--dataset sinusoid --iterations 2 --meta-batch 2 --hidden 8 --validation-episodes 2"
    assert main(["train", *flags.split(), "--quiet", "--out", str(place)]) == 0
    best = min(r["validation"]["mse"] for r in lines(place) if "validation" in r)
    assert f"best validation mse {best:.4g} at" in capsys.readouterr().out
    assert dataclasses.replace(load_run(place).score).function is default_score
    assert Sinusoid().sample(1).query_y.is_floating_point()
