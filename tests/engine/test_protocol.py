"""The protocol is an argument of prediction: of rows too, by both methods, and no state of a model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gametalearn import (
    MAML,
    ClassImages,
    Conv4,
    EpisodeSampler,
    InputError,
    ResNet12,
    TaskBatch,
    clear_programs,
    evaluate,
    meta_gradients,
)
from gametalearn.engine.swap import swapping
from gametalearn.gradients import adapt_and_score, predict

LEARNER = MAML(0.3, 1)
METHODS: list[Any] = ["loop", "verify"]
PROTOCOLS: list[Any] = [None, "transductive", "inductive", "query-at-a-time"]
IGNORED = pytest.mark.filterwarnings("ignore:.*computed task by task")


def source() -> EpisodeSampler:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 1, 16, 16), dtype=torch.uint8, generator=generator)
    return EpisodeSampler(ClassImages.from_tensors(images, torch.arange(60) // 6), 3, 2, 1, 1)


def batch_of(tasks: int = 3) -> TaskBatch:
    return source().sample(tasks).to(dtype=torch.float64)


def conv(norm: Any = "batch", **more: Any) -> Conv4:
    torch.manual_seed(0)
    return Conv4(3, image_size=16, hidden=4, norm=norm, **more).double()


class Own(nn.Module):
    """A user's network, normalised by the batch; weights that are computed, and hooks."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3, stride=4))
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(64, 3)
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.conv(x)))
        if self.reads and y.sum().item() == 1:  # what reads numbers is looped over
            return y
        output: Tensor = self.head(y.flatten(1))
        return output


def own(reads: bool = False) -> Own:
    torch.manual_seed(0)
    return Own(reads).double()


def queries_of(model: nn.Module, params: Any, x: Tensor, support_x: Tensor, how: Any) -> Tensor:
    """An oracle: the model called by hand as a protocol says, `functional_call` apart."""
    buffers = dict(model.named_buffers())

    def call(*args: Tensor) -> Tensor:
        output: Tensor = functional_call(model, ({**buffers, **params},), args)
        return output

    if how == "query-at-a-time":
        if getattr(model, "uses_support", False):
            return torch.cat([call(query[None], support_x) for query in x])
        return torch.cat([call(torch.cat([support_x, query[None]]))[-1:] for query in x])
    by_itself = "inductive" if getattr(model, "uses_support", False) else "transductive"
    return call(x, support_x) if (how or by_itself) == "inductive" else call(x)


def rows_by_hand(model: nn.Module, batch: TaskBatch, how: Any) -> tuple[Tensor, Tensor]:
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows, losses = [], []
    for x, y, q, t in zip(
        batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True
    ):
        phi: dict[str, Tensor] = dict(params)
        for _ in range(LEARNER.steps):
            loss = F.cross_entropy(functional_call(model, (phi,), (x,)), y)
            grads = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            phi = {
                n: p - LEARNER.inner_lr * g for (n, p), g in zip(phi.items(), grads, strict=True)
            }
        loss = F.cross_entropy(queries_of(model, phi, q, x, how), t)
        found = torch.autograd.grad(loss, list(params.values()))
        rows.append(torch.cat([g.flatten() for g in found]))
        losses.append(loss.detach())
    return torch.stack(rows), torch.stack(losses)


CASES: list[Any] = [
    *((lambda n=norm: conv(n), how) for norm in ("batch", "support") for how in PROTOCOLS),
    (lambda: conv(pool="max"), "inductive"),
    (lambda: conv("group"), "query-at-a-time"),
    (
        lambda: ResNet12(3, 1, (3, 4)).double(),
        "inductive",
    ),
    *((own, how) for how in (None, "transductive", "query-at-a-time")),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("make", "how"), CASES)
def test_rows_by_a_protocol_are_those_by_hand(
    make: Callable[[], Any], how: Any, method: Any
) -> None:
    model, batch = make(), batch_of()
    rows, losses = rows_by_hand(model, batch, how)
    found = meta_gradients(model, batch, LEARNER, protocol=how, method=method)
    torch.testing.assert_close(found.rows, rows, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.loss, losses, rtol=1e-9, atol=1e-12)
    scored, _ = adapt_and_score(model, batch, LEARNER, protocol=how, method=method, chunk=2)
    torch.testing.assert_close(scored, losses, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_one_network_by_the_argument_is_the_other_by_its_norm(method: Any) -> None:
    batch, by_batch, by_support = batch_of(), conv("batch"), conv("support")

    def rows(model: nn.Module, how: Any = None) -> Tensor:
        return meta_gradients(model, batch, LEARNER, protocol=how, method=method).rows

    assert torch.equal(rows(by_batch, "inductive"), rows(by_support))
    assert torch.equal(rows(by_support, "transductive"), rows(by_batch))
    assert not torch.equal(rows(by_batch), rows(by_support))


def test_a_program_is_kept_for_its_way_alone() -> None:
    """In turn, and with a norm that its owner changes in between: never another one's numbers."""
    batch, model = batch_of(), conv()
    wanted = {how: rows_by_hand(model, batch, how)[0] for how in PROTOCOLS}
    for norm in ("batch", "support", "batch"):
        model.norm = norm
        for how in (*PROTOCOLS, *PROTOCOLS[::-1]):
            found = meta_gradients(model, batch, LEARNER, protocol=how, method="replay").rows
            by_itself = "inductive" if norm == "support" else "transductive"
            if how == "query-at-a-time" and norm == "support":
                how = "inductive"  # which other queries have no part in
            right = wanted[how or by_itself]
            torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-10)


@IGNORED
@pytest.mark.parametrize("how", PROTOCOLS)
@pytest.mark.parametrize("method", ["loop", "replay"])
def test_hooks_are_called_with_the_model_itself(how: Any, method: Any) -> None:
    model, seen = conv(), []
    model.register_forward_pre_hook(lambda module, _: seen.append(module))
    model.register_forward_hook(lambda module, _, output: seen.append(module))
    meta_gradients(model, batch_of(2), LEARNER, protocol=how, method=method)
    assert seen
    assert all(module is model for module in seen)


def test_what_a_model_does_not_know_is_refused_by_its_types() -> None:
    batch = batch_of(2)
    calls: list[Any] = [meta_gradients, adapt_and_score]
    for call in calls:
        with pytest.raises(
            InputError, match=r"'inductive' requested, but Own.*\(BatchNorm2d 'norm'\)"
        ):
            call(own(), batch, LEARNER, protocol="inductive")
        with pytest.raises(InputError, match="'transductive' requested, but Conv4 supports only"):
            call(conv("group"), batch, LEARNER, protocol="transductive")
        with pytest.raises(InputError, match=r"protocol must be one of .*; got 'support'"):
            call(conv(), batch, LEARNER, protocol="support")
    with pytest.raises(InputError, match=r"protocol must be one of .*; got 'support'"):
        evaluate(conv(), source(), LEARNER, 2, protocol="support")  # type: ignore[arg-type]


class Writes(nn.Module):
    """A user's model that is handed the support set, and writes into all that it is given."""

    uses_support = True

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(256, 3)

    def forward(self, x: Tensor, support_x: Tensor | None = None) -> Tensor:
        if support_x is not None:
            x -= support_x.mean(0)
            support_x += 1
        output: Tensor = self.head(x.flatten(1))
        x.zero_()
        return output


def test_each_query_has_a_support_set_of_its_own() -> None:
    torch.manual_seed(0)
    model, batch = Writes().double(), batch_of(1)
    x, support_x = batch.query_x[0], batch.support_x[0]
    before = x.clone(), support_x.clone()
    params: dict[str, Tensor] = dict(model.named_parameters())
    found = predict(model, params, x, support_x, protocol="query-at-a-time")
    wanted = model.head((x - support_x.mean(0)).flatten(1))
    torch.testing.assert_close(found, wanted)
    assert torch.equal(x, before[0])
    assert torch.equal(support_x, before[1])


def nll(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction, target)


JOBS: list[Any] = [
    ("transductive", 1), ("inductive", 2), ("query-at-a-time", 3), ("transductive", 4),
]  # fmt: skip


def looked_at(model: nn.Module) -> Any:
    """All of a module but its tensors, which the engine may exchange while it holds the lock."""
    return [
        (
            type(module),
            {
                name: [*value.items()] if isinstance(value, dict) else value
                for name, value in vars(module).items()
                if name not in ("_parameters", "_buffers")
            },
            [*module._parameters],
            [*module._buffers],
            getattr(module, "uses_support", None),
        )
        for module in model.modules()
    ]


@IGNORED
@pytest.mark.parametrize("kind", ["replayed", "looped", "own", "own, looped"])
def test_threads_that_test_one_model_do_not_see_each_other(kind: str) -> None:
    model: Any = own(kind.endswith("looped")) if kind.startswith("own") else conv()
    if kind == "looped":
        model.register_forward_hook(lambda module, args, output: output + 0 * output.sum().item())
    jobs = [(how, seed) for how, seed in JOBS if how != "inductive" or kind[:3] != "own"]

    def test(job: Any) -> list[float]:
        how, seed = job
        found = evaluate(
            model, source(), LEARNER, 6, seed, protocol=how, score=nll, tasks_at_once=6
        )
        assert found.protocol == how
        values: list[float] = found.values.tolist()
        return values

    wanted = [test(job) for job in jobs]
    assert len({tuple(values) for values in wanted}) == len(jobs)
    attributes = looked_at(model)
    tensors = {n: (t, t.detach().clone()) for n, t in model.state_dict(keep_vars=True).items()}
    finished, seen = threading.Event(), []

    def watch() -> None:
        while not finished.is_set():
            if looked_at(model) != attributes:
                seen.append("attributes")
            with swapping:
                now = model.state_dict(keep_vars=True)
                for name, (tensor, numbers) in tensors.items():
                    if now[name] is not tensor or not torch.equal(tensor, numbers):
                        seen.append(name)

    clear_programs()  # so that they are made by several threads at once
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(2):
            barrier = threading.Barrier(len(jobs))

            def at_once(job: Any, barrier: threading.Barrier = barrier) -> list[float]:
                barrier.wait()
                return test(job)

            with ThreadPoolExecutor(len(jobs)) as pool:
                assert list(pool.map(at_once, jobs)) == wanted
    finally:
        finished.set()
        watcher.join()
    assert not seen
