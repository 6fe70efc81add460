"""A record that a person prints is one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gametalearn import (
    MAML,
    ClassImages,
    Comparison,
    EpisodeSampler,
    TaskBatch,
    TaskGradients,
    TrainConfig,
    Uniform,
    diagnose,
    evaluate,
    meta_gradients,
    train,
)
from gametalearn.results import Result


def sampler() -> EpisodeSampler:
    images = torch.arange(60 * 16, dtype=torch.int64).remainder(256).to(torch.uint8)
    return EpisodeSampler(
        ClassImages.from_tensors(images.view(60, 1, 4, 4), torch.arange(60) // 6), 3, 1, 2
    )


def records() -> dict[str, object]:
    source = sampler()
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    batch = source.sample(4)
    gradients = meta_gradients(model, batch, MAML(0.1, 1))
    weights = Uniform()(gradients)
    found = evaluate(model, source, MAML(0.1, 1), episodes=40)
    config = TrainConfig.of("glyphs")
    results = {"uniform": [Result(found, 1.0, 10)]}
    run = train(
        TrainConfig.of("sinusoid", iterations=1, meta_batch=2, hidden=4, validation_episodes=2),
        progress=False,
    )
    return {
        "batch": batch, "gradients": gradients, "weights": weights, "images": source.dataset,
        "evaluation": found, "diagnostics": diagnose(gradients, weights), "run": run,
        "result": results["uniform"][0],
        "comparison": Comparison(config, (0,), 40, ("glyphs",), results),
    }  # fmt: skip


def test_every_record_is_one_short_line() -> None:
    for name, record in records().items():
        text = repr(record)
        assert "\n" not in text, name
        assert len(text) < 500, (name, text)
        assert text.startswith(f"{type(record).__name__}("), name


def test_a_batch_tells_its_shapes() -> None:
    assert repr(sampler().sample(4)) == (
        "TaskBatch(support_x=float32 (4, 3, 1, 4, 4), support_y=int64 (4, 3), "
        "query_x=float32 (4, 6, 1, 4, 4), query_y=int64 (4, 6), group=int64 (4,), classes=int64 (4, 3))"
    )


def test_what_is_not_there_is_left_out() -> None:
    gradients = object.__new__(TaskGradients)
    object.__setattr__(gradients, "rows", np.zeros((2, 3)))
    assert repr(gradients) == "TaskGradients(rows=float64 (2, 3))"


@pytest.mark.parametrize("tasks", [1, 3])
def test_a_batch_without_classes(tasks: int) -> None:
    x = torch.zeros(tasks, 2, 1)
    text = repr(TaskBatch(x, x, x, x, torch.zeros(tasks, dtype=torch.int64)))
    assert text.endswith("classes=None)")
