"""Plans: those of a CPU as they always were, those of a card from given numbers, none by timing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from gametalearn import MAML, InputError, MetaSGD, Reptile, TaskBatch
from gametalearn.adaptation import Learner, model_parameters
from gametalearn.benchmark import CONFIGS
from gametalearn.engine import plan as plan_module
from gametalearn.engine.plan import (
    CHUNK_TASKS,
    Machine,
    Plan,
    Work,
    choose,
    planned,
    reckoned,
    work_of,
)
from gametalearn.engine.program import trace_gradients, trace_scores
from gametalearn.engine.replay import chunks_of, program_inputs
from gametalearn.engine.task import Recipe, data_of, fixed_tensors
from gametalearn.gradients import meta_of
from gametalearn.losses import default_loss
from gametalearn.models import MLP, Conv4, ResNet12
from gametalearn.scores import default_score

GIB = 2**30


def work(tasks: int = 4, inputs: int = 1000, parameters: int = 1000, held: int = 10**6) -> Work:
    return Work(tasks, inputs, parameters, held)


def of_config(name: str, **changes: Any) -> Work:
    """What is computed in one of the benchmark's settings."""
    setting = dataclasses.replace(CONFIGS[name], **changes)
    batch = setting.batch()
    return work_of(
        tuple(p.shape for p in setting.model().parameters()),
        batch.support_x.shape[1:],
        batch.query_x.shape[1:],
        tasks=setting.tasks,
        steps=setting.steps,
        second_order=not setting.first_order,
    )


@pytest.mark.parametrize(
    ("name", "threads", "expected"),
    [
        ("omniglot-5w1s", 1, Plan("replay", 16, 1)),
        ("omniglot-5w1s", 2, Plan("replay", 8, 2)),
        ("omniglot-5w1s", 8, Plan("replay", 16, 1)),  # too little for eight
        ("omniglot-5w1s-q15", 1, Plan("replay", 8, 1)),
        ("omniglot-5w1s-q15", 2, Plan("replay", 8, 2)),
        ("omniglot-5w1s-q15", 4, Plan("replay", 4, 4)),
        ("mini-imagenet-5w1s", 1, Plan("replay", 1, 1)),
        ("mini-imagenet-5w1s", 2, Plan("replay", 1, 2)),
        ("mini-imagenet-5w1s", 8, Plan("replay", 1, 4)),
    ],
)
def test_the_plans_of_a_cpu_are_those_that_were_measured(
    name: str, threads: int, expected: Plan
) -> None:
    assert planned(of_config(name), Machine("cpu", threads)) == expected
    setting = CONFIGS[name]
    meta, batch = model_parameters(setting.model()), setting.batch()
    assert choose(meta, data_of(batch), setting.learner(), threads=threads) == expected


@pytest.mark.parametrize(
    ("tasks", "threads", "expected"),
    [(600, 1, Plan("replay", 8, 1)), (600, 2, Plan("replay", 8, 2)), (3, 4, Plan("replay", 4, 1))],
)
def test_evaluation_has_chunks_that_do_not_depend_on_the_number_of_tasks(
    tasks: int, threads: int, expected: Plan
) -> None:
    own = dataclasses.replace(of_config("omniglot-5w1s-q15"), tasks=tasks)
    assert planned(own, Machine("cpu", threads), scores=True) == expected
    card = Machine("cuda", free=80 * GIB)
    assert planned(own, card, scores=True).chunk == 16


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("free", [16 * GIB, 80 * GIB])
def test_all_tasks_of_a_meta_batch_are_in_flight_on_a_card(name: str, free: int) -> None:
    own = of_config(name)
    assert planned(own, Machine("cuda", threads=8, free=free)) == Plan("replay", own.tasks, 1)


def test_a_small_or_busy_card_gets_fewer_tasks_at_once() -> None:
    own = of_config("mini-imagenet-5w1s")
    chunks = [planned(own, Machine("cuda", free=n * GIB)).chunk for n in (0, 1, 2, 5, 9, 80)]
    assert chunks == [1, 1, 1, 2, 4, 4]
    # 5-shot holds more for each step; all chunks are alike
    five_shot = of_config("mini-imagenet-5w1s", shots=5, tasks=6)
    assert planned(five_shot, Machine("cuda", free=40 * GIB)).chunk == 6
    assert planned(five_shot, Machine("cuda", free=24 * GIB)).chunk == 3
    # where a card does not tell, the bounds of a CPU hold
    assert planned(own, Machine("cuda")) == Plan("replay", 1, 1)


@given(
    tasks=st.integers(1, 200),
    held=st.integers(1, 10**11),
    free=st.integers(0, 10**11),
    kind=st.sampled_from(["cpu", "cuda"]),
    threads=st.integers(1, 64),
    scores=st.booleans(),
)
def test_a_plan_holds_every_task_and_no_more_than_fits(
    tasks: int, held: int, free: int, kind: str, threads: int, scores: bool
) -> None:
    found = planned(
        work(tasks, held=held), Machine(kind, threads, free if kind == "cuda" else None),
        scores=scores,
    )  # fmt: skip
    assert 1 <= found.chunk <= CHUNK_TASKS
    assert 1 <= found.workers <= (threads if kind == "cpu" else 1)
    assert found.workers <= -(-tasks // found.chunk)
    if kind == "cuda" and found.chunk > 1:
        assert found.chunk * held <= free / 2
    if not scores:  # no chunk more than needed, and none that is mostly copies
        assert (-(-tasks // found.chunk) - 1) * found.chunk < tasks


def test_methods_by_device() -> None:
    for kind in ("mps", "xpu", "meta"):
        assert planned(work(), Machine(kind)) == Plan("loop")
    assert planned(work(), Machine("cuda", autocast=True)) == Plan("loop")
    assert planned(work(), Machine("cuda"), method="loop") == Plan("loop")
    assert planned(work(), Machine("mps", threads=8), method="replay") == Plan("replay", 4, 1)
    assert planned(work(), Machine("cuda"), method="verify", chunk=3) == Plan("replay", 3, 1, True)


def test_what_the_plan_of_a_batch_is_read_from(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def remember(work: Work, machine: Machine, **options: Any) -> Plan:
        seen.append((work, machine, options))
        return Plan("loop")

    monkeypatch.setattr(plan_module, "planned", remember)
    model, batch = Conv4(3, image_size=16, hidden=4).double(), batch_of(3, 3, 1, 2, (1, 16, 16))
    meta, data = model_parameters(model), data_of(batch.to(dtype=torch.float64))
    choose(meta, data, MAML(0.1, 4), threads=5, chunk=2)
    choose(meta, data, MAML(0.1, 4, first_order=True), threads=5, method="replay")
    choose(meta, data, MAML(0.1, 2, step_weights=(0.5, 0.5)))
    choose(meta, data, MAML(0.1, 4), scores=True)
    shapes = tuple(p.shape for p in model.parameters())
    sets, common = (torch.Size((3, 1, 16, 16)), torch.Size((6, 1, 16, 16))), {"tasks": 3, "item": 8}
    second, first = ({"second_order": flag, **common} for flag in (True, False))
    assert [s[0] for s in seen] == [
        work_of(shapes, *sets, steps=4, **second),
        work_of(shapes, *sets, steps=4, **first),
        work_of(shapes, *sets, steps=2, queries_held=2, **second),
        work_of(shapes, *sets, steps=4, **first),
    ]
    assert seen[0][1:] == (Machine("cpu", 5), {"method": "auto", "chunk": 2, "scores": False})
    assert seen[2][1] == Machine("cpu", torch.get_num_threads())
    with torch.autocast("cpu"):
        choose(meta, data, MAML())
    assert seen[-1][1].autocast


def test_bad_arguments_are_named() -> None:
    data = data_of(batch_of(1, 2, 1, 1, (4,)))
    bad: list[tuple[dict[str, Any], str]] = [
        ({"method": "fast"}, "method must be one of auto, loop, replay, verify; got 'fast'"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ]
    for arguments, message in bad:
        with pytest.raises(InputError, match=message):
            choose({"w": torch.zeros(2, 4)}, data, MAML(), **arguments)


def test_the_memory_of_a_card_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter([(10, 100), (5, 100)])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: next(left))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4)
    plan_module.free_memory.cache_clear()
    try:
        asked = [plan_module.free_memory(torch.device("cuda", 0)) for _ in range(3)]
        assert asked == [10 + 7 - 4] * 3
        assert plan_module.free_memory(torch.device("cpu")) is None
    finally:
        plan_module.free_memory.cache_clear()


# How much a task holds: reckoned from shapes, against what programs do hold.


class Plain(nn.Module):
    """Convolutions that keep the images' size, the worst case of what is reckoned."""

    def __init__(self, channels: int = 4, ways: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1), nn.Softplus(),
            nn.Conv2d(channels, channels, 3, padding=1), nn.Softplus(),
            nn.Flatten(), nn.Linear(channels * 144, ways),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.net(x)
        return output


class Attention(nn.Module):
    """Sequences ``(B, L, 16)``, longer than wide at most by a little."""

    def __init__(self, ways: int = 3) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, ways)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.layer(x).mean(1))
        return output


class Peak(Interpreter):
    """The most bytes that a program holds in tensors at once, each memory counted once."""

    bytes = 0

    def run_node(self, n: Node) -> Any:
        result, alive = super().run_node(n), {}
        for value in (*self.env.values(), result):
            for t in value if isinstance(value, list | tuple) else (value,):
                if isinstance(t, Tensor):
                    memory = t.untyped_storage()
                    alive[memory.data_ptr()] = memory.nbytes()
        self.bytes = max(self.bytes, sum(alive.values()))
        return result


def batch_of(tasks: int, ways: int, shots: int, queries: int, shape: Sequence[int]) -> TaskBatch:
    g = torch.Generator().manual_seed(0)

    def part(each: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(ways).repeat(tasks, each)
        return torch.rand(*y.shape, *shape, generator=g), y

    return TaskBatch(*part(shots), *part(queries), torch.zeros(tasks, dtype=torch.int64))


def mlp(hidden: int, layers: int = 1) -> Callable[[], nn.Module]:
    return lambda: MLP(100, 3, (hidden,) * layers)


IMAGES, POINTS = (1, 12, 12), (100,)
Case = tuple[Callable[[], nn.Module], Sequence[int], Learner, dict[str, Any]]
HOLDING: dict[str, Case] = {
    "no steps": (Plain, IMAGES, MAML(0.1, 0), {}),
    "two steps": (Plain, IMAGES, MAML(0.1, 2), {}),
    "five shots": (Plain, IMAGES, MAML(0.1, 1), {"shots": 5}),
    "three tasks": (Plain, IMAGES, MAML(0.1, 1), {"tasks": 3}),
    "first order": (Plain, IMAGES, MAML(0.1, 2, first_order=True), {"queries": 8}),
    "a loss for each step": (
        Plain, IMAGES, MAML(0.1, 2, True, step_weights=(0.5, 0.5)), {"queries": 8},
    ),
    "scores": (Plain, IMAGES, MAML(0.1, 2), {"scores": True}),
    "max-pools": (lambda: Conv4(3, 1, 16, 6, "max"), (1, 16, 16), MAML(0.1, 1), {}),
    "learned rates": (
        lambda: Conv4(3, 1, 16, 6, norm="support"), (1, 16, 16), MetaSGD(0.1, 1, True), {},
    ),
    "resnet": (lambda: ResNet12(3, 1, (4, 6)), (1, 16, 16), MAML(0.1, 1, True), {}),
    "many parameters": (mlp(256, 2), POINTS, MAML(0.1, 1), {}),
    "many parameters, three steps": (mlp(256, 1), POINTS, MAML(0.1, 3), {}),
    "adam": (mlp(256, 2), POINTS, Reptile(0.1, 4, optimizer="adam"), {}),
    "many examples": (mlp(8), POINTS, MAML(0.1, 2), {"shots": 20, "queries": 40}),
    "attention": (Attention, (18, 16), MAML(0.1, 1), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", HOLDING)
def test_what_is_reckoned_bounds_what_a_program_holds(name: str) -> None:
    make, shape, learner, more = HOLDING[name]
    model = make()
    tasks, scores = more.get("tasks", 1), more.get("scores", False)
    batch = batch_of(tasks, 3, more.get("shots", 1), more.get("queries", 2), shape)
    meta, data = meta_of(model, learner, None), data_of(batch)
    (chunk,) = chunks_of(data, tasks)
    trace = trace_scores if scores else trace_gradients
    recipe = Recipe(model, learner, default_loss, default_score)
    peak = Peak(trace(recipe, meta, fixed_tensors(model, meta), chunk).module)
    with torch.inference_mode():
        peak.run(*program_inputs(model, meta), *chunk)
    held = reckoned(meta, data, learner, scores).held
    assert peak.bytes / tasks <= held <= 25 * peak.bytes / tasks
