"""Meta-batches for loops of one's own."""

from itertools import islice
from typing import Any

import pytest
import torch

from gametalearn import EpisodeSampler, InputError, Sinusoid, TaskLoader
from tests.support.runs import assert_equal


def tensors(batches: Any) -> list[list[torch.Tensor]]:
    return [[tensor for _, tensor in batch._tensors()] for batch in batches]


def test_a_loader_gives_the_batches_of_its_source() -> None:
    own = Sinusoid(seed=3)
    expected = [own.sample(4) for _ in range(5)]
    loader = TaskLoader(Sinusoid(seed=3), 4, batches=3)
    assert len(loader) == 3
    first = list(loader)
    assert len(first) == 3
    # a second time goes on, and nothing has been drawn ahead
    assert_equal(tensors([*first, *islice(loader, 2)]), tensors(expected))
    assert torch.equal(loader.source.sample(1).query_x, own.sample(1).query_x)


def test_a_loader_without_end() -> None:
    loader = TaskLoader(Sinusoid(), 2)
    assert len(list(islice(loader, 7))) == 7
    with pytest.raises(TypeError, match="no length"):
        len(loader)


def test_a_loader_goes_on_from_a_state() -> None:
    table = (torch.randn(40, 3), torch.arange(40) // 8)
    source = EpisodeSampler(table, 3, 1, 2, transform=lambda x: x + torch.randn(3))
    for i, _ in enumerate(TaskLoader(source, 2)):
        if i == 2:
            state = source.state_dict()
        if i == 4:
            break
    expected = source.sample(2)
    again = EpisodeSampler(table, 3, 1, 2, 7, transform=lambda x: x + torch.randn(3))
    again.load_state_dict(state)
    *_, last = islice(TaskLoader(again, 2), 3)
    assert_equal(tensors([last]), tensors([expected]))


def test_tensors_are_moved_and_cast() -> None:
    (batch,) = TaskLoader(Sinusoid(), 2, 1, device="meta", dtype=torch.float64)
    assert batch.support_x.dtype == torch.float64
    assert batch.group.device.type == "meta"


@pytest.mark.parametrize("wrong", [{"num_tasks": 0}, {"batches": 0}, {"batches": -1}])
def test_nothing_to_load(wrong: dict[str, int]) -> None:
    options: Any = {"num_tasks": 2, "batches": 2, **wrong}
    with pytest.raises(InputError, match=f"TaskLoader: {next(iter(wrong))} must be at least 1"):
        TaskLoader(Sinusoid(), **options)
