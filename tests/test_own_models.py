"""Training of models, learners and losses that are not the library's: repeatable, and told apart."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gametalearn import (
    MAML,
    InputError,
    Score,
    Sinusoid,
    TaskBatch,
    TrainConfig,
    Weights,
    compare,
    evaluate,
    load_run,
    meta_gradients,
    train,
)
from gametalearn.checkpoint import load_checkpoint, save_checkpoint
from gametalearn.cli import main
from gametalearn.episodes import draw
from gametalearn.registry import alike, handed_in
from gametalearn.run import Parts, start
from gametalearn.settings import read_toml
from gametalearn.update import clip
from tests.support import runs
from tests.support.runs import lines


def tiny(**given: Any) -> TrainConfig:
    settings = {"iterations": 6, "meta_batch": 3, "validate_every": 3, "validation_episodes": 4}
    return runs.tiny(**{**settings, **given})


class Dropping(nn.Sequential):
    """Draws random numbers in training."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))


def weights(run: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in run.meta.values()])


LOOPED = pytest.mark.filterwarnings("ignore:gametalearn. Dropping is computed task by task")


@LOOPED
def test_a_model_that_draws_is_determined_by_the_seed_and_resumed_exactly(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = train(tiny(), model=Dropping, progress=False)
    torch.manual_seed(2)
    again = train(tiny(), tmp_path / "a", model=Dropping, progress=False)
    assert torch.equal(weights(whole), weights(again))
    train(tiny(iterations=3), tmp_path / "b", model=Dropping, progress=False)
    torch.manual_seed(3)
    longer = train(tiny(), tmp_path / "b", model=Dropping, progress=False)
    assert torch.equal(weights(whole), weights(longer))
    other = train(tiny(seed=1), model=Dropping, progress=False)
    assert not torch.equal(weights(whole), weights(other))


@LOOPED
def test_it_is_no_difference_between_rules() -> None:
    found = compare(
        tiny(), {"uniform": "uniform", "same": UniformAgain}, 2, 4,
        model=lambda seed: Dropping(), progress=False,
    )  # fmt: skip
    for one, other in zip(*found.results.values(), strict=True):
        assert (one.evaluation.values == other.evaluation.values).all()


class UniformAgain(nn.Module):
    def forward(self, gradients: Any) -> Weights:
        even = torch.full((len(gradients),), 1 / len(gradients))
        return Weights(even, even)


def test_a_learner_keeps_the_weights_of_its_steps(tmp_path: Path) -> None:
    learner = MAML(0.01, 2, step_weights=(0.3, 0.7))
    plain = train(tiny(), learner=MAML(0.01, 2), progress=False)
    weighted = train(tiny(), tmp_path / "a", learner=learner, progress=False)
    assert weighted.learner_now == learner
    assert not torch.equal(weights(plain), weights(weighted))
    assert getattr(weighted.test_learner, "step_weights", None) == ()


def test_learners_of_one_class_are_told_apart(tmp_path: Path) -> None:
    train(tiny(), tmp_path / "a", learner=MAML(0.01, 1), progress=False)
    assert read_toml(tmp_path / "a" / "config.toml")["learner"] == (
        "handed-in:MAML (inner_lr=0.01)"
    )
    with pytest.raises(InputError, match="learner"):
        train(tiny(iterations=9), tmp_path / "a", learner=MAML(0.05, 3), progress=False)
    with pytest.raises(InputError, match="learner"):
        load_run(tmp_path / "a", learner=MAML(0.05, 3))
    assert load_run(tmp_path / "a", learner=MAML(0.01, 1)).iteration


def test_lambdas_are_told_apart() -> None:
    first, second = lambda p, t: (p - t).pow(2).mean(), lambda p, t: (p - t).abs().mean()
    assert handed_in(first) != handed_in(second)
    assert handed_in(first) == handed_in(lambda p, t: (p - t).pow(2).mean())

    def power(exponent: int, more: float = 1.0) -> Any:
        return lambda p, t, scale=more: scale * (p - t).pow(exponent).mean()

    assert len({handed_in(f) for f in (power(2), power(4), power(2, 3.0), power(2))}) == 3
    told = handed_in(first)
    assert alike("handed-in:<lambda>", told)  # a run of an older version
    assert not alike(handed_in(second), told)
    assert alike(told.replace("Python 3", "Python 2"), told)  # other instructions for the same code


def test_a_run_whose_files_tell_the_name_alone_goes_on(tmp_path: Path) -> None:
    train(tiny(iterations=3), tmp_path / "a", learner=MAML(0.01, 1), progress=False)
    file = tmp_path / "a" / "config.toml"
    file.write_text(file.read_text().replace("handed-in:MAML (inner_lr=0.01)", "handed-in:MAML"))
    for name in ("checkpoint.pt", "best.pt"):
        content = load_checkpoint(tmp_path / "a" / name)
        content["config"]["learner"] = "handed-in:MAML"
        save_checkpoint(tmp_path / "a" / name, content)
    assert load_run(tmp_path / "a", learner=MAML(0.01, 1)).iteration
    assert train(tiny(), tmp_path / "a", learner=MAML(0.01, 1), progress=False).iteration == 6


def test_the_best_of_a_run_that_was_loaded_at_its_end(tmp_path: Path) -> None:
    config = tiny(iterations=12, validate_every=3, meta_lr=0.1)
    run = train(config, tmp_path / "a", progress=False)
    last = load_run(tmp_path / "a", "latest")
    assert torch.equal(weights(last), weights(run))
    last.load_best()
    assert torch.equal(weights(last), weights(load_run(tmp_path / "a")))
    assert last.best["iteration"] == run.best["iteration"]
    begun = train(tiny(iterations=1), tmp_path / "b", progress=False)
    begun.best = {}
    with pytest.raises(InputError, match="load_best: nothing was validated in 1 iterations"):
        begun.load_best()


class Two(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def maker(freeze: bool, still: bool) -> Any:
    """A function of one name that makes the model in several ways."""

    def made() -> Two:
        model = Two()
        model[0].requires_grad_(not freeze)
        model(torch.randn(30, 1))  # statistics
        model[1].train(not still)
        return model

    return made


def test_a_run_is_loaded_with_the_parameters_and_modes_that_it_was_trained_with(
    tmp_path: Path,
) -> None:
    train(tiny(), tmp_path / "a", model=maker(True, True), progress=False)
    with pytest.raises(InputError, match=r"^the run did not adapt '0\.\w+', and this model"):
        load_run(tmp_path / "a", model=maker(False, True))
    with pytest.raises(InputError, match=r"^the run did not adapt '0\.\w+', and this model"):
        train(tiny(iterations=9), tmp_path / "a", model=maker(False, True), progress=False)
    run = load_run(tmp_path / "a", model=maker(True, False))
    assert [module.training for module in run.model.modules()] == [True, True, False, True, True]
    assert evaluate(run.model, run.episodes("test"), run.test_learner, 4).protocol == "inductive"


class One:
    """Gives one task, whatever is asked for."""

    def __init__(self, tasks: int = 1) -> None:
        self.tasks = tasks

    def sample(self, num_tasks: int) -> TaskBatch:
        return Sinusoid(seed=0).sample(self.tasks)

    def with_seed(self, seed: int) -> One:
        return self

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("tasks", [1, 5])
def test_a_source_that_gives_another_number_of_tasks_is_refused(tasks: int) -> None:
    source: Any = One(tasks)
    with pytest.raises(InputError, match=rf"One.sample\(4\) gave {tasks} tasks; it must give 4"):
        draw(source, 4)
    with pytest.raises(InputError, match=r"One.sample\(16\) gave"):
        evaluate(Two(), source, MAML(0.01, 1), 16)
    with pytest.raises(InputError, match=r"One.sample\(3\) gave"):
        train(tiny(), source=source, validation=Sinusoid(), progress=False)


def test_threads_are_those_of_the_settings() -> None:
    before, seen = torch.get_num_threads(), set()

    def model() -> Two:
        seen.add(torch.get_num_threads())
        return Two()

    train(tiny(threads=before + 1), model=model, progress=False)
    compare(tiny(threads=before + 2), ["uniform"], 1, 4, model=lambda seed: model(), progress=False)
    assert seen >= {before + 1, before + 2}
    assert torch.get_num_threads() == before


class Tempered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return ((prediction - target) / self.temperature).pow(2).mean()


def test_parameters_of_a_loss_are_not_learned_and_that_is_said() -> None:
    score = Score("squared", lambda p, t: (p - t).pow(2).mean(), higher_is_better=False)
    with pytest.warns(UserWarning, match=r"the loss Tempered has parameters .*\(temperature\)"):
        train(tiny(iterations=1), loss=Tempered(), score=score, progress=False)


class Averaging(nn.Module):
    """Assigns to its buffer."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return self.layer(x)


@pytest.mark.filterwarnings("ignore:gametalearn. (Sequential|Averaging) is computed task by task")
def test_buffers_that_a_forward_maintains_are_not_and_that_is_said() -> None:
    def normed() -> nn.Module:
        layer = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        return nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), layer, nn.Linear(8, 1))

    with pytest.warns(UserWarning, match=r"writes into its buffers \(2\.parametrizations\.weight"):
        train(tiny(iterations=1), model=normed, progress=False)
    with pytest.warns(UserWarning, match=r"Averaging writes into its buffers \(mean\)"):
        train(tiny(iterations=1), model=Averaging, progress=False)
    with_graph = Two()
    with_graph.register_buffer("graph", torch.eye(3).to_sparse())
    before = [p.detach().clone() for p in with_graph.parameters()]
    begun = start(tiny(), Parts(model=with_graph))  # no warning: nothing is written
    assert all(torch.equal(p, q) for p, q in zip(begun.model.parameters(), before, strict=True))


def test_a_protocol_that_the_model_does_not_know_is_refused_before_it_is_trained(
    tmp_path: Path,
) -> None:
    config = TrainConfig.of(
        "glyphs", norm="group", protocol="transductive", iterations=3, meta_batch=1
    )
    with pytest.raises(InputError, match="supports only 'inductive'"):
        train(config, tmp_path / "a", progress=False)
    assert not (tmp_path / "a").exists()


class Signalling(Sinusoid):
    """As a person who presses Ctrl-C in the last validation."""

    def sample(self, num_tasks: int, part: slice = slice(None)) -> TaskBatch:
        os.kill(os.getpid(), signal.SIGINT)
        return super().sample(num_tasks, part)

    def with_seed(self, seed: int) -> Signalling:
        return Signalling(seed=seed)


def test_a_signal_in_the_last_validation_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tiny(validate_every=6), tmp_path / "a", source=Sinusoid(), validation=Signalling(),
              progress=False)  # fmt: skip
    assert [line["iteration"] for line in lines(tmp_path / "a")][-1] == 6
    done = train(tiny(validate_every=6), tmp_path / "a", source=Sinusoid(), validation=Signalling(),
                 progress=False)  # fmt: skip
    assert done.iteration == 6


class Broken(nn.Module):
    def forward(self, gradients: Any) -> Weights:
        nan = torch.full((len(gradients),), float("nan"))
        return Weights(nan, nan)


class HalfKnown(UniformAgain):
    def forward(self, gradients: Any) -> Weights:
        even = super().forward(gradients).effective
        return Weights(even.log() * float("inf"), even)


class Told(Sinusoid):
    @property
    def facts(self) -> dict[str, Tensor]:
        return {"noise": torch.tensor([0.1, float("nan"), 0.3])}


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rule 'handed-in:Broken': its weights are not finite"):
        train(tiny(), rule=Broken(), progress=False)
    train(tiny(), tmp_path / "a", rule=HalfKnown(), source=Told(), validation=Sinusoid(),
          progress=False)  # fmt: skip
    assert lines(tmp_path / "a")[-1]["raw"] == [None] * 3
    assert lines(tmp_path / "a")[-1]["noise"][1] is None


def test_clipping_of_gradients_whose_squares_overflow() -> None:
    for dtype, size in ((torch.float32, 1e20), (torch.float16, 300.0)):
        found = clip(torch.full((10_000,), size, dtype=dtype), norm=1.0)
        torch.testing.assert_close(found.double(), torch.full((10_000,), 0.01, dtype=torch.float64),
                                   rtol=2e-3, atol=0)  # fmt: skip


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("train --dataset sinusoid", "iterations = [1, 2]", "--iterations must be an integer"),
        ("train --dataset sinusoid", "iterations = 2024-01-01", "--iterations must be an integer"),
        ("train --dataset sinusoid", "meta_batch = 3\nmeta-batch = 4",
         "both 'meta_batch' and 'meta-batch' are there; keep one"),
        ("evaluate RUN", "dataset = 5", "--dataset must be text, got 5"),
        ("evaluate RUN", "protocol = 'both'", "no run there"),
        ("evaluate RUN", "protocol = 'all'", "protocol must be one of auto, transductive, inductive, both"),
    ],
)  # fmt: skip
def test_values_of_files_that_are_no_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, text: str, message: str
) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    words = command.replace("RUN", str(tmp_path)).split()
    out = ["--out", str(tmp_path / "a")] if words[0] == "train" else []
    assert main([*words, "--config", str(file), *out]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_class_of_losses_by_name(tmp_path: Path) -> None:
    words = "train --dataset sinusoid --iterations 2 --meta-batch 2 --hidden 4 --quiet --loss torch.nn:MSELoss"
    assert main([*words.split(), "--validation-episodes", "2", "--out", str(tmp_path / "a")]) == 0
    assert load_run(tmp_path / "a", loss=nn.MSELoss()).loss.__class__ is nn.MSELoss
    kind: Any = nn.MSELoss
    with pytest.raises(InputError, match="is a class; pass an instance"):
        train(tiny(), loss=kind, score="mse", progress=False)


def test_what_is_no_instance_or_has_nothing_to_adapt() -> None:
    given: Any = "sinusoid"
    kind: Any = MAML
    with pytest.raises(InputError, match=r"TrainConfig.of\('glyphs'\); got 'sinusoid'"):
        train(given, progress=False)
    with pytest.raises(
        InputError, match=r"learner MAML is a class; pass an instance, such as MAML\("
    ):
        meta_gradients(Two(), Sinusoid(seed=0).sample(1), kind)
    with pytest.raises(InputError, match=r"learner MAML is a class; pass an instance"):
        evaluate(Two(), Sinusoid(seed=0), kind, 4)
    with pytest.raises(InputError, match=r"learner MAML is a class; pass an instance"):
        train(tiny(), learner=kind, progress=False)
    with pytest.raises(InputError, match="Identity has no parameters: there is nothing to adapt"):
        train(tiny(), model=nn.Identity, progress=False)


def test_settings_that_are_given_in_python_are_checked_first() -> None:
    with pytest.raises(InputError, match="`iterations` must be an integer"):
        TrainConfig.of("sinusoid", iterations=[1])
    assert dataclasses.asdict(TrainConfig.of("sinusoid", iterations=None))["iterations"] == 20000
