"""Points that check the numbers of single calls."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from experiments.gpu_check.outcomes import EXACT, Outcome, Sizes, error_of, outcome, tf32
from gametalearn import (
    MAML,
    RULES,
    TaskGradients,
    make_rule,
    meta_gradients,
)
from gametalearn.adaptation import model_parameters
from gametalearn.benchmark import Setting
from gametalearn.engine.plan import choose, free_memory, reckoned
from gametalearn.engine.task import data_of
from gametalearn.gradients import adapt_and_score

__all__ = ["check_learners", "check_plan", "check_rows", "check_rules", "check_smooth"]

SMOOTH = 1e-4
"""Relative error in float32 of a network without kinks."""
FACTOR = 3.0
"""How many times the float32 loop's error on the same device the float32 rows' error may be."""


def check_rows(device: str, sizes: Sizes) -> Outcome:
    """Rows of the three settings: exact in float64, and in float32 about as close as the device's loop."""
    found, passed = {}, True
    for name, setting in sizes.settings.items():
        learner, batch = setting.learner(), setting.batch()
        double = batch.to(dtype=torch.float64)
        truth = meta_gradients(setting.model().double(), double, learner, method="loop").rows

        def rows(dtype: torch.dtype, method: Any, setting: Setting = setting) -> Tensor:
            model = setting.model().to(device, dtype)
            return meta_gradients(
                model, setting.batch().to(device, dtype), setting.learner(), method=method
            ).rows

        errors = {
            "float64": error_of(rows(torch.float64, "replay"), truth),
            "float32": error_of(rows(torch.float32, "replay"), truth),
            "float32_loop": error_of(rows(torch.float32, "loop"), truth),
        }
        if device != "cpu":
            with tf32(True):
                errors["tf32"] = error_of(rows(torch.float32, "replay"), truth)
        near = FACTOR * errors["float32_loop"] + 1e-6
        passed &= errors["float64"] <= EXACT and errors["float32"] <= near
        found[name] = errors
    worst = {key: max(e[key] for e in found.values()) for key in next(iter(found.values()))}
    told = ", ".join(f"{key} {value:.1e}" for key, value in worst.items())
    return outcome(passed, f"largest errors: {told}", errors=found)


def check_smooth(device: str, sizes: Sizes) -> Outcome:
    """A network without kinks, in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=False), nn.Softplus(),
        nn.AvgPool2d(2), nn.Conv2d(8, 8, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip
    batch = Setting(tasks=4, image_size=sizes.image_size).batch()
    model(batch.support_x[0])  # sizes the lazy layer
    learner, double = MAML(0.1, 1), batch.to(dtype=torch.float64)
    truth = meta_gradients(model.double(), double, learner, method="loop").rows
    rows = meta_gradients(model.to(device, torch.float32), batch.to(device), learner).rows
    error = error_of(rows, truth)
    return outcome(error <= SMOOTH, f"error {error:.1e}, at most {SMOOTH:.0e}", error=error)


def check_learners(device: str, sizes: Sizes) -> Outcome:
    """Every inner loop: rows, updates, losses and scores, and evaluation, in float64."""
    found = {}
    for learner in sizes.learners:
        setting = Setting(
            tasks=4, ways=3, queries=2, image_size=sizes.image_size, hidden=sizes.hidden
        )
        model, batch = setting.model().double(), setting.batch().to(dtype=torch.float64)
        truth = meta_gradients(model, batch, learner, method="loop")
        model, batch = model.to(device), batch.to(device)
        got = meta_gradients(model, batch, learner, method="replay")
        loss, score = adapt_and_score(model, batch, learner, method="replay", chunk=4)
        pairs = [(getattr(got, n), getattr(truth, n)) for n in ("rows", "updates", "loss")]
        same = torch.equal(got.score.cpu(), truth.score) and torch.equal(score.cpu(), truth.score)
        errors = [error_of(a, b) for a, b in [*pairs, (loss, truth.loss)]]
        found[str(learner)] = max(errors) if same else float("inf")
    worst = max(found, key=lambda name: found[name])
    return outcome(found[worst] <= EXACT, f"{found[worst]:.1e} for {worst}", errors=found)


def check_rules(device: str, sizes: Sizes) -> Outcome:
    """Every weighting rule gives the same weights on the device as on the CPU."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(5):
        rows, updates = torch.randn(2, 8, 4000, generator=generator, dtype=torch.float64) + 0.1
        loss, score = torch.rand(2, 8, generator=generator, dtype=torch.float64) * 0.6 + 0.2
        batches.append(TaskGradients(rows, updates, loss, score, torch.arange(8) % 3))
    found = {}
    for name in RULES:
        here, there = (make_rule(name, objectives=3) for _ in range(2))
        error = 0.0
        for batch in batches:
            moved = TaskGradients(**{n: t.to(device) for n, t in vars(batch).items()})
            error = max(error, error_of(there(moved).effective, here(batch).effective))
        found[name] = error
    worst = max(found, key=lambda name: found[name])
    return outcome(found[worst] <= EXACT, f"{found[worst]:.1e} for {worst}", errors=found)


def check_plan(device: str, sizes: Sizes) -> Outcome:
    """All tasks of a meta-batch are computed together, in no more memory than the plan estimates."""
    found, passed = {}, True
    place = torch.device(device)
    for name, setting in sizes.settings.items():
        model, batch = setting.model().to(device), setting.batch().to(device)
        learner, meta, data = setting.learner(), model_parameters(model), data_of(batch)
        plan, work = choose(meta, data, learner), reckoned(meta, data, learner)
        about = {**dataclasses.asdict(plan), "reckoned_mb": plan.chunk * work.held / 2**20}
        if place.type == "cuda":
            meta_gradients(model, batch, learner)  # traced, and compared with the loop
            meta_gradients(model, batch, learner)
            torch.cuda.synchronize(place)
            before = torch.cuda.memory_allocated(place)
            torch.cuda.reset_peak_memory_stats(place)
            meta_gradients(model, batch, learner)
            torch.cuda.synchronize(place)
            about["peak_mb"] = (torch.cuda.max_memory_allocated(place) - before) / 2**20
            about["free_mb"] = (free_memory(place) or 0) / 2**20
            passed &= plan.chunk == setting.tasks and about["peak_mb"] <= about["reckoned_mb"]
        passed &= plan.method == "replay"
        found[name] = about
    told = ", ".join(f"{name} {about['chunk']} at once" for name, about in found.items())
    return outcome(passed, told, plans=found)
