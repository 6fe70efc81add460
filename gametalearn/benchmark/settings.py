"""What is measured: a batch, an inner loop and a network. The published settings have names."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gametalearn.adaptation import MAML
from gametalearn.environment import unusable
from gametalearn.episodes import TaskBatch
from gametalearn.errors import InputError
from gametalearn.models import Conv4

__all__ = ["CONFIGS", "REPEATS", "Setting", "check_device", "digest"]


@dataclass(frozen=True)
class Setting:
    """What is measured; the published ones stand in `CONFIGS`.

    Attributes:
        tasks, ways, shots, queries: the batch; shots and queries are those of one class.
        steps, inner_lr: the inner loop; the rate multiplies a mean loss.
        channels, image_size, hidden, pool: the images and the Conv4.
        first_order: FOMAML on both sides.
        constant_memory: gametalearn's option of that name.
    """

    tasks: int = 16
    ways: int = 5
    shots: int = 1
    queries: int = 1
    steps: int = 1
    inner_lr: float = 0.4
    channels: int = 1
    image_size: int = 28
    hidden: int = 64
    pool: Literal["stride", "max"] = "stride"
    first_order: bool = False
    constant_memory: bool = False

    def model(self) -> Conv4:
        """The network, from a fixed seed."""
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return Conv4(self.ways, self.channels, self.image_size, self.hidden, self.pool)

    def batch(self, seed: int = 0) -> TaskBatch:
        """Random images of the right shapes: speed does not depend on what they show."""
        g = torch.Generator().manual_seed(seed)
        shape = (self.channels, self.image_size, self.image_size)

        def part(each: int) -> tuple[Tensor, Tensor]:
            y = torch.arange(self.ways).repeat(self.tasks, each)
            return torch.rand(*y.shape, *shape, generator=g), y

        support, query = part(self.shots), part(self.queries)
        return TaskBatch(*support, *query, torch.zeros(self.tasks, dtype=torch.int64))

    def learner(self) -> MAML:
        """MAML with these steps."""
        return MAML(self.inner_lr, self.steps, self.first_order)


CONFIGS = {
    "omniglot-5w1s": Setting(),
    "omniglot-5w1s-q15": Setting(queries=15),
    "mini-imagenet-5w1s": Setting(
        tasks=4,
        queries=15,
        steps=5,
        inner_lr=0.05,
        channels=3,
        image_size=84,
        hidden=32,
        pool="max",
    ),
}
REPEATS = {"omniglot-5w1s": 15, "omniglot-5w1s-q15": 9, "mini-imagenet-5w1s": 5}
"""How many timings one process takes."""
ERROR_BATCHES = {"omniglot-5w1s": 8, "omniglot-5w1s-q15": 4, "mini-imagenet-5w1s": 2}
"""How many batches the errors are taken over; the first is the one that is timed."""
USUAL_S = {"omniglot-5w1s": 12, "omniglot-5w1s-q15": 15, "mini-imagenet-5w1s": 25}
"""What a process takes, in seconds, before any has been seen: enough to say "about 5 minutes"."""


def check_device(device: str) -> None:
    """Raise an `InputError` unless sides can be timed on a device of this machine."""
    if re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
        raise InputError(f"bench: `device` must be cpu or cuda; got '{device}'")
    if (why := unusable(device)) is not None:
        raise InputError(f"bench: `device` {device}: {why}; try cpu")


def digest(model: nn.Module, batch: TaskBatch) -> str:
    """A short text that two processes share only if their weights and their batch are the same."""
    found = hashlib.sha256()
    tensors = (batch.support_x, batch.support_y, batch.query_x, batch.query_y)
    for tensor in (*model.state_dict().values(), *tensors):
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:16]
