"""The documentation's changes to other people's loops, applied and run: before and after each."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gametalearn import MAML, TaskBatch, agreement_weights, meta_gradients
from gametalearn.bridges import GradientCollector
from tests.support.pages import DOCS, blocks, run_python

TASKS, RATE = 4, 0.1


def changes(name: str) -> list[str]:
    """The changes of loops on a page of the tutorials."""
    return [block.code for block in blocks(DOCS / "tutorials" / name, "diff")]


def program(diff: str, keep: str) -> str:
    """The lines of a diff that are not marked, or marked with ``keep``."""
    lines = diff.splitlines()
    assert all(line[:1] in ("", " ", "+", "-") for line in lines)
    assert 0 < sum(line[:1] in ("+", "-") for line in lines) <= 10  # a few lines
    return "\n".join(line[1:] for line in lines if line[:1] in ("", " ", keep))


PLAIN, TORCHJD = changes("plain-loop.md")
(LEARN2LEARN,) = changes("learn2learn.md")


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def make_batches() -> list[list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, TASKS, 5, 2, generator=generator, dtype=torch.float64)
    y = torch.randn(2, TASKS, 5, 1, generator=generator, dtype=torch.float64)
    return [list(zip(*tasks, strict=True)) for tasks in zip(x, y, strict=True)]


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def step_by_hand(model: nn.Module, rows: Tensor, agreement: bool) -> None:
    update = agreement_weights(rows) @ rows if agreement else rows.mean(0)
    nn.utils.vector_to_parameters(parameters(model) - RATE * update, model.parameters())


def rows_of(model: nn.Module, batch: list[tuple[Tensor, Tensor]]) -> Tensor:
    params = list(model.parameters())
    grads = [torch.autograd.grad(nn.functional.mse_loss(model(x), y), params) for x, y in batch]
    return torch.stack([torch.cat([g.flatten() for g in task]) for task in grads])


@pytest.mark.parametrize("diff", [PLAIN, TORCHJD], ids=["plain", "torchjd"])
@pytest.mark.parametrize("keep", ["-", "+"], ids=["before", "after"])
def test_loops_over_batches(diff, keep):
    model = make_model()
    by_hand = copy.deepcopy(model)
    scope: dict[str, Any] = {
        "model": model,
        "batches": make_batches(),
        "loss_fn": nn.functional.mse_loss,
        "optimizer": torch.optim.SGD(model.parameters(), lr=RATE),
    }
    exec(program(diff, keep), scope)
    for batch in make_batches():
        step_by_hand(by_hand, rows_of(by_hand, batch), agreement=keep == "+")
    torch.testing.assert_close(parameters(model), parameters(by_hand))


@pytest.mark.parametrize("keep", ["-", "+"], ids=["before", "after"])
def test_learn2learn(keep, monkeypatch):
    model = make_model()
    by_hand = copy.deepcopy(model)
    support, query = make_batches()
    tasks = [(*s, *q) for s, q in zip(support, query, strict=True)]
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr: torch.optim.SGD(p, lr=RATE))
    scope: dict[str, Any] = {
        "model": model,
        "torch": torch,
        "l2l": pytest.importorskip("learn2learn"),
        "loss_fn": nn.functional.mse_loss,
        "sample_tasks": lambda: tasks,
        "iterations": 2,
        "meta_batch": TASKS,
        "GradientCollector": GradientCollector,  # imported in the text below it
    }
    exec(program(LEARN2LEARN, keep), scope)
    x, y, query_x, query_y = (torch.stack(field) for field in zip(*tasks, strict=True))
    batch = TaskBatch(x, y, query_x, query_y, group=torch.zeros(TASKS, dtype=torch.int64))
    for _ in range(2):
        rows = meta_gradients(by_hand, batch, MAML(0.1, 1), method="loop").rows
        step_by_hand(by_hand, rows, agreement=keep == "+")
    torch.testing.assert_close(parameters(model), parameters(by_hand))


def test_streaming():
    model = make_model()
    by_hand = copy.deepcopy(model)
    batch = make_batches()[0]
    scope: dict[str, Any] = {
        "model": model,
        "torch": torch,
        "num_tasks": TASKS,
        "parameters": list(model.parameters()),  # from the block at the top of the page
        "task_loss": lambda i: nn.functional.mse_loss(model(batch[i][0]), batch[i][1]),
        "optimizer": torch.optim.SGD(model.parameters(), lr=RATE),
    }
    found = blocks(DOCS / "tutorials" / "plain-loop.md", "python")
    run_python([block for block in found if "stream_agreement" in block.code], scope)
    step_by_hand(by_hand, rows_of(by_hand, batch), agreement=True)
    torch.testing.assert_close(parameters(model), parameters(by_hand))
