"""No program is used on trust: a wrong one is found, thrown away and told; a right one is not."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gametalearn import MAML, Conv4, TaskBatch, clear_programs, meta_gradients
from gametalearn.engine import passes, replay
from gametalearn.gradients import adapt_and_score

aten = torch.ops.aten
THROWN_AWAY = "results of its replay were discarded"


def episodes(dtype: torch.dtype = torch.float64, tasks: int = 3) -> TaskBatch:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(3).repeat(tasks, 2)
    x, z = torch.randn(2, tasks, 6, 5, generator=g, dtype=torch.float64).to(dtype).unbind()
    return TaskBatch(x, y, z, y, torch.zeros(tasks, dtype=torch.int64))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.second(torch.tanh(self.first(x)))
        return output


def assert_same(got: Any, expected: Any, bound: float = 1e-12) -> None:
    for name in ("rows", "updates", "loss", "score"):
        torch.testing.assert_close(
            getattr(got, name), getattr(expected, name), rtol=bound, atol=bound
        )


@pytest.fixture(autouse=True)
def no_programs() -> Iterator[None]:
    """Equal models share their programs, and so their counts of calls."""
    clear_programs()
    yield
    clear_programs()


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs in which every tanh is a sigmoid."""
    tidy = passes.tidy

    def spoil(module: Any) -> bool:
        for node in module.graph.nodes:
            if node.target == aten.tanh.default:
                node.target = aten.sigmoid.default
        return tidy(module)

    monkeypatch.setattr("gametalearn.engine.program.tidy", spoil)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_wrong_program_is_thrown_away(faulty: None, dtype: torch.dtype) -> None:
    model, batch, learner = Net().to(dtype), episodes(dtype), MAML(0.3, 2)
    loop = meta_gradients(model, batch, learner, method="loop")
    with pytest.warns(UserWarning, match=f"Net.*{THROWN_AWAY}: rows.*at call 1.*report it"):
        got = meta_gradients(model, batch, learner)
    assert torch.equal(got.rows, loop.rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert torch.equal(meta_gradients(model, batch, learner).rows, loop.rows)
    clear_programs()
    with pytest.warns(UserWarning, match=f"{THROWN_AWAY}: loss"):
        value, score = adapt_and_score(model, batch, learner, chunk=2)
    torch.testing.assert_close(value, loop.loss)
    assert torch.equal(score, loop.score)


class Environment(Net):
    """Its forward depends on what cannot be seen."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(os.environ["GAMETALEARN_FACTOR"])


@pytest.mark.parametrize("call", [2, 10])
def test_a_change_that_cannot_be_seen_is_found_by_the_next_check(
    call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch, learner = Environment().double(), episodes(), MAML(0.3, 1)
    monkeypatch.setenv("GAMETALEARN_FACTOR", "1.0")
    for _ in range(call - 1):
        meta_gradients(model, batch, learner)
    monkeypatch.setenv("GAMETALEARN_FACTOR", "3.0")
    loop = meta_gradients(model, batch, learner, method="loop")
    with pytest.warns(UserWarning, match=f"at call {call}. Either something changed"):
        got = meta_gradients(model, batch, learner)
    assert_same(got, loop)


def test_verify_compares_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, learner = Environment().double(), episodes(), MAML(0.3, 1)
    monkeypatch.setenv("GAMETALEARN_FACTOR", "1.0")
    for _ in range(4):
        assert_same(
            meta_gradients(model, batch, learner, method="verify", chunk=2),
            meta_gradients(model, batch, learner, method="loop"),
        )
    monkeypatch.setenv("GAMETALEARN_FACTOR", "3.0")
    loop = meta_gradients(model, batch, learner, method="loop")
    with pytest.warns(UserWarning, match="at call 5"):
        assert_same(meta_gradients(model, batch, learner, method="verify", chunk=2), loop)


def test_clear_programs_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, learner = Environment().double(), episodes(), MAML(0.3, 1)
    monkeypatch.setenv("GAMETALEARN_FACTOR", "1.0")
    for _ in range(3):
        before = meta_gradients(model, batch, learner)
    monkeypatch.setenv("GAMETALEARN_FACTOR", "3.0")
    assert_same(meta_gradients(model, batch, learner), before)  # as the engine's README says
    clear_programs()
    assert_same(
        meta_gradients(model, batch, learner), meta_gradients(model, batch, learner, method="loop")
    )


class Casting(Net):
    """Computes a part in float32 whatever it is given, so that float64 cannot tell its rounding."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)).float()
        return self.second(h.to(x.dtype)).to(x.dtype)  # type: ignore[no-any-return]


class Strict(Net):
    """Takes float32 alone."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return super().forward(x)


class Deep(Net):
    """With kinks."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = F.relu(self.first(x))[:, :5] - 0.1
        return self.second(F.relu(self.first(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [Net, Casting, Strict, Deep])
@pytest.mark.parametrize(
    "learner",
    [MAML(0.3, 2), pytest.param(MAML(30.0, 6), marks=pytest.mark.slow), MAML(1e6, 10)],
    ids=str,
)
def test_a_right_program_is_not_suspected(make: type[Net], learner: MAML) -> None:
    """Not where the forward casts, nor where the inner loop magnifies rounding, or diverges."""
    model, batch = make(), episodes(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            meta_gradients(model, batch, learner, method="verify")
            adapt_and_score(model, batch, learner, method="verify", chunk=2)


@pytest.mark.parametrize("seed", range(8))
def test_a_score_that_jumps_is_not_suspected(seed: int) -> None:
    """In half precision logits tie, and a share of few queries jumps by much of its size."""
    g, dtype = torch.Generator().manual_seed(seed), torch.bfloat16
    x, q = torch.rand(16, 6, 256, generator=g), torch.rand(16, 15, 256, generator=g)
    y, z = (torch.arange(3).repeat(16, n) for n in (2, 5))
    batch = TaskBatch(x.to(dtype), y, q.to(dtype), z, torch.zeros(16, dtype=torch.int64))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(256, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt_and_score(model, batch, MAML(0.5, 3), method="verify", chunk=16)


def test_a_check_costs_no_random_numbers() -> None:
    model, batch = Conv4(3, image_size=16, hidden=4), None
    x, y = torch.rand(2, 3, 1, 16, 16), torch.arange(3).repeat(2, 1)
    batch = TaskBatch(x, y, x, y, torch.zeros(2, dtype=torch.int64))
    states = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    meta_gradients(model, batch, MAML(0.1, 1), method="verify")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert repr(np.random.get_state()) == states[2]  # noqa: NPY002


def test_the_calls_that_are_checked() -> None:
    assert sorted(replay.CHECKED)[:5] == [1, 2, 10, 100, 1000]
