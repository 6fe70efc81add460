from typing import Any

import pytest
import torch

from gametalearn import TrainConfig
from gametalearn.adaptation import ANIL, MAML, Reptile
from gametalearn.config import BESIDE, DEFAULTS
from gametalearn.errors import InputError
from gametalearn.gradients import meta_gradients
from gametalearn.schedules import PHASES, learner_at, step_weights
from gametalearn.training import train
from gametalearn.update import meta_rate
from tests.support import runs


def test_rates_that_do_not_end_at_zero() -> None:
    assert meta_rate(1.0, "linear", 5, 10, 0.2) == pytest.approx(0.6)
    assert meta_rate(1.0, "cosine", 0, 10, 0.2) == pytest.approx(1.0)
    assert meta_rate(1.0, "cosine", 5, 10, 0.2) == pytest.approx(0.6)
    assert meta_rate(1.0, "cosine", 10, 10, 0.2) == pytest.approx(0.2)
    assert meta_rate(0.5, "constant", 7, 10, 0.1) == 0.5


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_weights_of_steps_are_those_of_the_published_code(steps: int) -> None:
    """Its epochs are our phases."""
    for iteration in range(0, 1000, 37):
        epoch = iteration * PHASES // 1000
        weights = [1 / steps] * steps
        decay, least = 1 / steps / PHASES, 0.03 / steps
        for j in range(steps - 1):
            weights[j] = max(weights[j] - epoch * decay, least)
        weights[-1] = min(weights[-1] + epoch * (steps - 1) * decay, 1 - (steps - 1) * least)
        got = step_weights(steps, iteration, 1000)
        assert got == pytest.approx(weights)
        assert sum(got) == pytest.approx(1)
    assert step_weights(steps, 1000, 1000) == ()
    assert len({step_weights(steps, t, 1000) for t in range(1000)}) == PHASES


def test_the_learner_of_an_iteration() -> None:
    learner = MAML(0.1, 2)
    assert learner_at(learner, 0) is learner
    first = learner_at(learner, 0, first_order_until=3, multi_step_loss=5)
    assert first == MAML(0.1, 2, first_order=True, step_weights=(0.5, 0.5))
    assert learner_at(learner, 3, first_order_until=3) == learner
    assert learner_at(ANIL(0.1, 1), 0, multi_step_loss=5) == ANIL(0.1, 1)  # one step has one loss
    fomaml = MAML(0.1, 2, first_order=True)
    assert learner_at(fomaml, 9, first_order_until=3) == fomaml
    reptile = Reptile()
    assert learner_at(reptile, 0, first_order_until=3) is reptile


def tiny(**given: Any) -> TrainConfig:
    return runs.tiny(
        **{"meta_batch": 2, "hidden": 6, "inner_steps": 2, "validate_every": 6, **given}
    )


PLUS = {
    "learned_rates": True,
    "multi_step_loss": 4,
    "first_order_until": 3,
    "meta_schedule": "cosine",
    "meta_lr_final": 1e-5,
}


def test_training_follows_the_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(model: Any, batch: Any, learner: Any, **options: Any) -> Any:
        seen.append(learner)
        return meta_gradients(model, batch, learner, **options)

    monkeypatch.setattr("gametalearn.training.meta_gradients", spy)
    run = train(tiny(**PLUS), progress=False)
    assert [learner.first_order for learner in seen] == [True] * 3 + [False] * 3
    assert [learner.step_weights for learner in seen] == [
        step_weights(2, iteration, 4) for iteration in range(6)
    ]
    assert run.outer is not None
    assert run.outer.optimizer.param_groups[0]["lr"] == meta_rate(1e-3, "cosine", 5, 6, 1e-5)
    rates = [p for name, p in run.meta.items() if name.startswith("inner_lr.")]
    assert all(r.shape == (2,) for r in rates)
    assert any((r != 0.01).any() for r in rates)
    assert run.test_learner.steps == 10  # more than were learned
    assert torch.isfinite(torch.tensor(run.best["value"]))


def test_a_scheduled_run_goes_on_bit_for_bit(tmp_path: Any, monkeypatch: Any) -> None:
    config = tiny(**PLUS)
    whole = train(config, progress=False)
    calls: list[int] = []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return meta_gradients(*args, **options)

    monkeypatch.setattr("gametalearn.training.meta_gradients", failing)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "a", progress=False)
    again = train(config, tmp_path / "a", progress=False)
    assert all(torch.equal(p, again.meta[name]) for name, p in whole.meta.items())


def test_reptiles_options_reach_its_inner_loop() -> None:
    config = tiny(
        learner="reptile", inner_optimizer="adam", inner_batch=4, train_shots=15, shots=5,
        inner_lr=1e-3, meta_optimizer="sgd", meta_lr=1.0, meta_schedule="linear",
    )  # fmt: skip
    run = train(config, progress=False)
    assert run.learner == Reptile(1e-3, 2, "adam", batch=4)
    assert run.source.sample(1).support_x.shape == (1, 15, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inner_batch": 5}, "`inner_batch` applies to reptile, not to `learner` maml"),
        ({"inner_optimizer": "adam"}, "`inner_optimizer` applies to reptile"),
        (
            {"learner": "anil", "learned_rates": True},
            "`learned_rates` applies to maml, fomaml",
        ),
        ({"learner": "fomaml", "first_order_until": 3}, "`first_order_until` applies to maml"),
        ({"learner": "reptile", "multi_step_loss": 3}, "`multi_step_loss` applies to maml"),
        ({"learner": "fomaml", "constant_memory": True}, "`constant_memory` applies to maml"),
        (
            {"meta_lr_final": 0.1},
            "`meta_lr_final` applies to `meta_schedule` linear, cosine, not to "
            "`meta_schedule` constant; leave it out",
        ),
        ({"meta_schedule": "square"}, "`meta_schedule` must be one of constant, linear, cosine"),
        ({"meta_lr_final": -1.0}, "`meta_lr_final` must be at least 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny(**given)


@pytest.mark.parametrize("dataset", sorted({*DEFAULTS} - {BESIDE}))
def test_annealings_are_off_by_default(dataset: str) -> None:
    config = TrainConfig.of(dataset)
    for name in ("learned_rates", "multi_step_loss", "first_order_until", "meta_lr_final"):
        assert not getattr(config, name)
