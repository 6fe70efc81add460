"""`probe`: every rule's update from the same meta-batches, tried on a copy of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gametalearn.adaptation import Learner, Params
from gametalearn.diagnostics import effective_tasks
from gametalearn.disagreement import Disagreement
from gametalearn.engine.plan import choose
from gametalearn.engine.task import data_of
from gametalearn.episodes import Source, TaskBatch
from gametalearn.errors import InputError, require_whole, summary
from gametalearn.evaluation import placed
from gametalearn.gradients import TaskGradients, adapt_and_score, meta_gradients, meta_of
from gametalearn.losses import Loss, default_loss
from gametalearn.probing.found import STEPS, Probe
from gametalearn.probing.steps import Step, along, through
from gametalearn.scores import ScoreLike, default_score
from gametalearn.update import combine
from gametalearn.weighting import Rule, make_rule
from gametalearn.weighting.agreement import require_updates
from gametalearn.weighting.weights import as_weights, require_rule

__all__ = ["probe"]

SHARE = 0.002
"""The default length of a step, as a share of the norm of the parameters: on the demo's run the gain on
fresh tasks stands out most from its noise around it. Shorter steps measure kinks of the network, longer
ones curvature."""

STREAMS = {"same": 0, "fresh": 1, "clean": 1, "reference": 2}
"""Clean tasks are the fresh ones, uncorrupted."""

ROUNDING = 4.0
"""c in: updates are equal up to rounding if they differ by at most c * eps * sum |e_i| norm(g_i); float32's
eps in half precision, too, whose own would take different rules for the same."""

FIRST_SEED = 10**9
"""Far from the seeds of training, whose tasks must not recur."""


def probe(
    model: nn.Module,
    source: Source,
    learner: Learner,
    rules: Sequence[str] | Mapping[str, Rule],
    *,
    clean: Source | None = None,
    meta: Params | None = None,
    loss: Loss = default_loss,
    score: ScoreLike = default_score,
    optimizer: torch.optim.Optimizer | Step | None = None,
    meta_batch: int = 16,
    meta_batches: int = 100,
    reference: int = 1024,
    length: float | None = None,
    seed: int = 0,
    constant_memory: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> Probe:
    """What each rule gains in one step from a model's current weights.

    For each of B meta-batches, each rule forms its update d from the same gradients. It is applied to a
    copy of the parameters theta, in up to three ways:

    - ``length``: theta - length * d / ||d||, which compares directions alone;
    - ``plain``: theta - rate * d, with one rate for all rules, at which the uniform updates of the
      reference tasks, which are not corrupted, have ``length`` on average;
    - ``optimizer``: the step of ``optimizer``, if one is given.

    The gain is the mean query loss after adaptation at theta minus that at the new point, on the
    meta-batch's own tasks (a quarter of them, at least four: their gains hardly vary) and on as many
    fresh ones as it has. All rules start from the same theta and are measured on the same tasks, so
    differences are paired by meta-batch and free of training noise. Updates that are equal up to
    rounding, or for ``length`` have one direction, are tried once, so that their gains are the same. The
    results hold at this theta, for one step.

    Args:
        model: any module; neither it nor ``meta`` is changed.
        source: episodes, as in training; independent streams of its data are used.
        learner: the inner loop, as in training.
        rules: names (`gametalearn.make_rule`), or rules by any name. Of these, copies are probed. A
            stateful rule sees the meta-batches in order, starting from its current state.
        clean: uncorrupted episodes; by default those of a `gametalearn.Disagreement`. The fresh
            tasks are then measured uncorrupted, too, and the true direction is estimated from them.
        meta: meta-parameters other than the model's own, such as a run's.
        loss, score: as in `meta_gradients`.
        optimizer: an optimiser with its state, which takes no step itself; or a function of ``(meta,
            update)`` that returns the new meta-parameters, such as `gametalearn.probing.through` makes.
        meta_batch: T, tasks in a meta-batch.
        meta_batches: B; intervals need at least 3.
        reference: tasks whose mean gradient stands for the true direction, rounded up to whole
            meta-batches.
        length: the length of the steps; by default 0.002 times the norm of theta.
        seed: the seed of all tasks; a different one gives an independent repetition.
        constant_memory: as in `meta_gradients`.
        progress: called with the meta-batches done since its last call, those of ``reference``
            included.

    Raises:
        InputError: a number out of range, an argument that is no source or rule, a rule that does not
            suit the learner, or a loss that is not finite.
    """
    numbers = {"meta_batch": meta_batch, "meta_batches": meta_batches, "reference": reference}
    for name, value in numbers.items():
        require_whole(f"`{name}`", value, 1)
    require_whole("`seed`", seed, 0)
    _check_length(length)
    for name, given in (("source", source), ("clean", clean)):
        if given is not None and not hasattr(given, "with_seed"):
            raise InputError(
                f"`{name}` must be a source of episodes with sample() and with_seed(); got a "
                f"{type(given).__name__}"
            )
    meta = meta_of(model, learner, meta)
    made = _made(rules)
    for name, rule in made.items():
        require_updates(name, rule, learner.steps)
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer = through(optimizer)
    if optimizer is not None and (not callable(optimizer) or isinstance(optimizer, type)):
        got = "the class" if isinstance(optimizer, type) else "a"
        name = getattr(optimizer, "__name__", type(optimizer).__name__)
        raise InputError(
            f"`optimizer` must be an optimiser, or a function of (meta, update); got {got} {name}"
        )
    if clean is None and isinstance(source, Disagreement):
        clean = source.source
    size = float(torch.stack([p.detach().double().norm() for p in meta.values()]).norm())
    if length is None and not size:
        raise InputError(
            "probe: all parameters are zero, so that a share of their norm is no length; pass `length`"
        )
    length = SHARE * size if length is None else length

    def stream(tasks: str) -> Callable[[], TaskBatch]:
        data = source if clean is None or tasks in ("same", "fresh") else clean
        drawn = data.with_seed(FIRST_SEED + len(STREAMS) * seed + STREAMS[tasks])
        return lambda: placed(model, drawn.sample(meta_batch))

    def gradients_of(batch: TaskBatch) -> TaskGradients:
        return meta_gradients(
            model, batch, learner, meta=meta, loss=loss, score=score,
            constant_memory=constant_memory,
        )  # fmt: skip

    tested, same = learner.for_test(learner.steps), min(meta_batch, max(4, meta_batch // 4))

    def losses(batch: TaskBatch, point: Params) -> list[float]:
        """The mean query loss on each kind of task, from a point."""
        found, _ = adapt_and_score(
            model,
            batch,
            tested,
            meta=point,
            loss=loss,
            score=score,
            chunk=_even(meta, batch, tested),
        )
        own, others = found.double()[:same], found.double()[same:]
        return [float(own.mean()), *others.view(-1, meta_batch).mean(1).tolist()]

    true, usual = _mean_gradient(stream("reference"), gradients_of, -(-reference // meta_batch),
                                 progress)  # fmt: skip
    rate = length / usual if usual > 0 else 1.0
    steps: dict[str, Step] = {
        "length": lambda meta, update: along(meta, update, _over(length, float(_length(update)))),
        "plain": partial(along, factor=rate),
    }
    if optimizer is not None:
        steps["optimizer"] = optimizer

    streams = {tasks: stream(tasks) for tasks in ("same", "fresh", *(["clean"] if clean else []))}
    before = np.empty((len(streams), meta_batches))
    after = np.empty((len(steps), len(made), len(streams), meta_batches))
    about = np.empty((4, len(made), meta_batches))
    for b in range(meta_batches):
        drawn = {tasks: draw() for tasks, draw in streams.items()}
        gradients = gradients_of(drawn["same"])
        # spread over the meta-batch, as tasks of several objectives come one objective after the other
        drawn["same"] = drawn["same"][torch.arange(same) * meta_batch // same]
        joined = TaskBatch.cat(list(drawn.values()))
        before[:, b] = losses(joined, meta)
        norms = torch.linalg.vector_norm(gradients.rows, dim=1, dtype=torch.float64)
        mean = combine(gradients.rows, gradients.rows.new_full((meta_batch,), 1 / meta_batch))
        updates: list[Update] = []
        for r, (name, rule) in enumerate(made.items()):
            weights = as_weights(rule(gradients), gradients, name).effective.to(mean)
            if not bool(torch.isfinite(weights).all()):
                raise InputError(
                    f"rule {name}: its weights are not finite ({weights.tolist()[:8]}), though all gradients and "
                    "losses are; mend the rule"
                )
            update = Update.of(combine(gradients.rows, weights), weights, norms)
            about[:, r, b] = (
                _cosine(update.vector, mean), _cosine(update.vector, true),
                effective_tasks(weights), update.size,
            )  # fmt: skip
            twins = {
                kind: next((q for q, u in enumerate(updates) if update.same(u, kind)), None)
                for kind in ("length", "plain")
            }
            for s, (kind, step) in enumerate(steps.items()):
                twin = twins["length" if kind == "length" else "plain"]
                after[s, r, :, b] = (
                    losses(joined, step(meta, update.vector))
                    if twin is None
                    else after[s, twin, :, b]
                )
            updates.append(update)
        progress(1)
    _check_finite(before, after, list(steps), list(made))
    gains = before - after
    return Probe(
        rules=tuple(made),
        tasks=meta_batch,
        before=dict(zip(streams, before, strict=True)),
        gains={
            step: {tasks: gains[s, :, k] for k, tasks in enumerate(streams)}
            for s, step in enumerate(steps)
        },
        cosine_uniform=about[0],
        cosine_true=about[1],
        effective_tasks=about[2],
        size=about[3],
        length=length,
        rate=rate,
        reference=-(-reference // meta_batch) * meta_batch,
        seed=seed,
    )


def _check_length(length: Any) -> None:
    if length is not None and not (isinstance(length, Real) and 0 < float(length) < math.inf):
        raise InputError(f"`length` must be a positive, finite number, got {length!r}")


def _made(rules: Any) -> dict[str, Rule]:
    """The rules by name; those that were handed in are copied, with their state.

    Raises:
        InputError: none, an unknown name, what is no rule, or one that cannot be copied.
    """
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        raise InputError(f"`rules` must be a list of names, such as ['uniform']; got {rules!r}")
    rules = rules if isinstance(rules, Mapping) else list(rules)
    if not rules:
        raise InputError("`rules`: name one or more, such as uniform,agreement")
    if not isinstance(rules, Mapping):
        for rule in rules:
            if not isinstance(rule, str):
                raise InputError(
                    f"`rules` is a list with a {type(rule).__name__}, and takes names; pass a rule of "
                    "your own by a name, as {'mine': rule}"
                )
        return {name: make_rule(name) for name in rules}
    made: dict[str, Rule] = {}
    for name, rule in rules.items():
        require_rule(rule, f"`rules` '{name}'")
        try:
            made[name] = copy.deepcopy(rule)
        except Exception as error:
            raise InputError(
                f"`rules` '{name}': the {type(rule).__name__} cannot be copied ({summary(error)})"
            ) from error
    return made


@dataclass(frozen=True)
class Update:
    """What a rule made of a meta-batch.

    Attributes:
        vector: ``(P,)``.
        size: its length.
        rounding: how far from the exact sum it may be, relative to its length.
    """

    vector: Tensor
    size: float
    rounding: float

    @classmethod
    def of(cls, vector: Tensor, weights: Tensor, norms: Tensor) -> Update:
        """With the error bound of a sum of rows of these lengths ``(T,)``."""
        size, terms = float(_length(vector)), float(weights.double().abs() @ norms)
        eps = min(torch.finfo(vector.dtype).eps, torch.finfo(torch.float32).eps)
        return cls(vector, size, ROUNDING * eps * terms / size if size > 0 else 0.0)

    def same(self, other: Update, step: str) -> bool:
        """Whether a step is the same for both up to rounding: at one length, if the directions are."""
        factor = self.size / other.size if step == "length" and self.size * other.size > 0 else 1.0
        apart = float(_length(self.vector.double() - factor * other.vector.double()))
        return apart <= max(self.rounding, other.rounding) * self.size


def _even(meta: Params, batch: TaskBatch, learner: Learner) -> int | None:
    """Tasks per replay, such that all threads have equally many; None if there is no replay."""
    plan = choose(meta, data_of(batch), learner, scores=True)
    if plan.method == "loop":
        return None
    rounds = -(-len(batch) // (plan.chunk * plan.workers))
    return -(-len(batch) // (rounds * plan.workers))


def _mean_gradient(
    draw: Callable[[], TaskBatch],
    gradients_of: Callable[[TaskBatch], TaskGradients],
    meta_batches: int,
    progress: Callable[[int], object],
) -> tuple[Tensor, float]:
    """The mean gradient ``(P,)`` over all tasks, and the mean length of the meta-batches' means."""
    total, lengths = torch.zeros((), dtype=torch.float64), 0.0
    for _ in range(meta_batches):
        rows = gradients_of(draw()).rows
        mean = combine(rows, rows.new_full((len(rows),), 1 / len(rows))).double()
        total, lengths = total.to(mean) + mean, lengths + float(_length(mean))
        progress(1)
    return total / meta_batches, lengths / meta_batches


def _length(vector: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vector, dtype=torch.float64)
    return length


def _over(wanted: float, length: float) -> float:
    """The factor that scales a vector to the wanted length; a zero vector stays."""
    return wanted / length if length > 0 else 0.0


def _cosine(one: Tensor, other: Tensor) -> float:
    """0 where either is zero."""
    scale = float(_length(one) * _length(other))
    return float(one.double() @ other.double()) / scale if scale > 0 else 0.0


def _check_finite(
    before: np.ndarray, after: np.ndarray, steps: list[str], rules: list[str]
) -> None:
    """Check that every loss is finite, before and after each step."""
    if count := int((~np.isfinite(before)).any(0).sum()):
        raise InputError(
            f"probe: the loss after adaptation is not finite in {count} of {before.shape[-1]} "
            "meta-batches, before any step; lower `inner_lr`"
        )
    for s, r in np.argwhere(~np.isfinite(after).all((2, 3)))[:1]:
        count = int((~np.isfinite(after[s, r]).all(0)).sum())
        raise InputError(
            f"probe: after the step of rule '{rules[r]}' ({STEPS[steps[s]]}) the loss is not finite "
            f"in {count} of {after.shape[-1]} meta-batches; lower `length`"
        )
