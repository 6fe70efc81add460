"""The process's allocator is set up by the command line and by `keep_memory`, and by nothing else."""

from __future__ import annotations

import ctypes
import platform
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gametalearn import MAML, TaskBatch, TrainConfig, jobs, keep_memory, meta_gradients, workers
from gametalearn.cli import main
from gametalearn.engine.allocator import SETTINGS
from gametalearn.gradients import adapt_and_score

Calls = list[tuple[int, int]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What ``mallopt`` is called with, on a system with glibc; nothing is really set."""
    found: Calls = []

    def mallopt(option: int, value: int) -> int:
        found.append((option, value))
        return 1

    cdll: Any = ctypes.CDLL

    def library(name: Any, *more: Any, **options: Any) -> Any:
        own = SimpleNamespace(mallopt=mallopt)
        return own if name is None else cdll(name, *more, **options)

    monkeypatch.setattr(ctypes, "CDLL", library)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.delenv("GAMETALEARN_MALLOC", raising=False)
    return found


def test_an_explicit_call_makes_all_settings(calls: Calls) -> None:
    assert keep_memory()
    assert calls == list(SETTINGS)


def test_it_can_be_prevented(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAMETALEARN_MALLOC", "0")
    assert not keep_memory()
    assert not calls


def test_without_glibc_it_does_nothing(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_memory()
    assert not calls


def test_a_first_gradient_leaves_it_alone(calls: Calls) -> None:
    x, y = torch.randn(2, 6, 7), torch.arange(3).repeat(2, 2)
    batch = TaskBatch(x, y, x, y, torch.zeros(2, dtype=torch.int64))
    model = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 3))
    meta_gradients(model, batch, MAML(0.1, 1), method="replay")
    adapt_and_score(model, batch, MAML(0.1, 1), method="replay")
    assert not calls


def test_the_command_line_sets_it(calls: Calls) -> None:
    assert main(["data", "list"]) == 0
    assert calls == list(SETTINGS)


def test_each_process_of_a_comparison_sets_it(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "train_and_test", lambda *job, **more: None)
    planned = jobs.Planned("uniform", TrainConfig.of("sinusoid"), None)
    workers.work(planned, jobs.Terms({"uniform": "uniform"}))
    assert calls == list(SETTINGS)
