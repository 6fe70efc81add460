"""How much is computed, the outcome of a point, and how numbers are compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gametalearn import ANIL, MAML, MetaSGD, Reptile
from gametalearn.adaptation import Learner
from gametalearn.benchmark import CONFIGS, Setting

__all__ = ["CARD", "EXACT", "SMALL", "Outcome", "Point", "Sizes", "error_of", "outcome", "tf32"]

EXACT = 1e-9
"""Relative error in float64."""


@dataclass(frozen=True)
class Sizes:
    """How much is computed.

    Attributes:
        settings: by the benchmark's names.
        learners: the inner loops that are compared.
        image_size, hidden: for the learners' networks.
        iterations: of the timed training run; the first third is not timed.
        training: settings of that training.
        rounds, repeats: of the benchmark.
        tests: files of the suite that are run on the device.
    """

    settings: dict[str, Setting]
    learners: tuple[Learner, ...]
    image_size: int
    hidden: int
    iterations: int
    training: dict[str, Any]
    rounds: int
    repeats: int
    tests: tuple[str, ...]


CARD = Sizes(
    settings=CONFIGS,
    learners=(
        MAML(0.2, 2, first_order=True),
        MAML(0.2, 2, step_weights=(0.3, 0.7)),
        ANIL(0.2, 2),
        MetaSGD(0.2, 2),
        Reptile(0.2, 2),
        Reptile(0.01, 2, optimizer="adam"),
    ),
    image_size=28,
    hidden=16,
    iterations=60,
    training={},
    rounds=1,
    repeats=5,
    tests=("tests/test_gradients.py", "tests/engine/test_modules.py", "tests/weighting"),
)
SMALL = Sizes(
    settings={"omniglot-5w1s": Setting(tasks=2, ways=3, queries=2, image_size=16, hidden=4)},
    learners=(ANIL(0.2, 1, first_order=True), Reptile(0.2, 1)),
    image_size=16,
    hidden=4,
    iterations=6,
    training={"hidden": 4, "inner_steps": 1, "queries": 2, "ways": 3},
    rounds=1,
    repeats=1,
    tests=("tests/weighting/test_dtp.py",),
)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a point.

    Attributes:
        verdict: ``"PASS"``, ``"FAIL"`` or ``"SKIP"``.
        said: why, in a line.
        figures: what was measured.
    """

    verdict: Literal["PASS", "FAIL", "SKIP"]
    said: str
    figures: dict[str, Any] = field(default_factory=dict)


Point = Callable[[str, Sizes], Outcome]


def outcome(passed: bool, said: str, **figures: Any) -> Outcome:
    return Outcome("PASS" if passed else "FAIL", said, figures)


def error_of(got: Tensor, expected: Tensor) -> float:
    """The norm of the difference relative to that of the expected value, over all rows at once."""
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    return float((got - expected).norm() / expected.norm())


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let a GPU compute float32 convolutions and products in TF32, or not."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = allowed
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before
