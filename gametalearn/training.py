"""The outer loop: sample, adapt, weight, update; validate, log and checkpoint. Top to bottom."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gametalearn.adaptation import Learner
from gametalearn.build import build_source, objective_names, stream_seed
from gametalearn.config import TrainConfig
from gametalearn.diagnostics import diagnose
from gametalearn.distributed import ALONE, Tasks, Team, describe_team, weighted_update
from gametalearn.episodes import EpisodeSampler, Source, TaskBatch, draw
from gametalearn.errors import InputError, SharedError
from gametalearn.evaluation import Evaluation, evaluate, placed
from gametalearn.gradients import TaskGradients, meta_gradients
from gametalearn.losses import Loss, default_loss
from gametalearn.metrics import Metrics
from gametalearn.progress import brought_to, interruptible, shown
from gametalearn.provenance import verified
from gametalearn.randomness import seeded
from gametalearn.run import Outer, Parts, Run, Watch, outer_of, start
from gametalearn.runfolder import claim, is_kept, restore, save, save_best
from gametalearn.scores import ScoreLike, default_score
from gametalearn.terminal import tell
from gametalearn.update import apply_update, clip
from gametalearn.weighting import Rule, Weights

__all__ = ["train", "train_parts", "using_threads"]


def train(
    config: TrainConfig,
    out: Path | str | None = None,
    *,
    model: nn.Module | Callable[..., nn.Module] | None = None,
    source: Source | None = None,
    validation: Source | None = None,
    learner: Learner | None = None,
    rule: Rule | None = None,
    loss: Loss = default_loss,
    score: ScoreLike = default_score,
    optimizer: Callable[..., Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    label: str = "train",
    team: Team = ALONE,
    moved: bool = False,
    watch: Watch | None = None,
) -> Run:
    """Meta-train a model; continue where an interrupted run of the same settings stopped.

    A finished run continues if ``config`` has more iterations, ``dataclasses.replace(run.config,
    iterations=2000)``. Under a constant outer rate that gives, bit for bit, the weights of as many
    iterations from the start; along a schedule it is refused. The settings of
    `gametalearn.config.RESUMABLE` may change whenever a run continues; a change of
    threads or device brings a warning, and numbers then agree up to rounding.

    Args:
        config: the settings; see `TrainConfig.of`. What is handed in below takes their place, and
            is recorded in the run's files by name; to continue the run, hand it in again.
        out: folder for ``config.toml``, ``metrics.jsonl``, ``checkpoint.pt``, ``best.pt``, the
            checkpoints that ``keep_every`` keeps (``checkpoint-100.pt``) and, for folders of images,
            ``data.json``; None writes nothing.
        model: a module, whose weights are the initial ones and which is trained in place; or a class
            or function that gives one, called under the run's seed with those of the arguments
            ``ways``, ``input_shape`` and so on that it names (`gametalearn.registry.OFFERED`).
        source: training episodes (`gametalearn.episodes.Source`); then ``validation``, those of
            classes or tasks that training does not see, is needed too.
        learner: the inner loop (`gametalearn.adaptation.Learner`).
        rule: the weighting rule: `TaskGradients` in, `Weights` out. What it learns is saved if it
            has ``state_dict``.
        loss: ``loss(prediction, target)``, a mean, in the inner loop and for the queries.
        score: what is validated and reported: a name of `gametalearn.SCORES`, a `Score` (which tells
            which way is better), or a function. Where none is given and none goes with the loss,
            training does not start.
        optimizer: ``optimizer(named_parameters)`` gives the outer optimiser, or it and a scheduler
            that is stepped after each meta-update. The settings' rate and schedule have no part in
            it.
        overwrite: start over, whatever run ``out`` holds.
        progress: show progress on stderr.
        label: what the progress bar says.
        team: processes that all call this and split the tasks of each meta-batch among them (see
            `gametalearn.distributed.joined`). The first one's ``config`` and ``out`` count; a run
            may continue with another number of them.
        moved: the folders of images of the run in ``out`` have moved to where ``config`` says. They
            must hold what they held; the run remembers their new place.
        watch: ``watch(run, record)`` is called with each line of ``metrics.jsonl``, a dictionary of
            plain values, as soon as it is written: for TensorBoard
            (`gametalearn.tensorboard.TensorBoard`) or a tracker of your own. It must not change
            either.

    Returns:
        The finished `Run`, its model with the latest weights; `Run.load_best` takes the weights
        that were best on validation.

    Raises:
        InputError: settings, parts or data do not fit, ``out`` holds another run, or the run's
            images are not those that it began with.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the checkpoint was written.
    """
    parts = Parts(model, source, validation, learner, rule, loss, score, optimizer)
    return train_parts(
        config, parts, out, overwrite=overwrite, progress=progress, label=label, team=team,
        moved=moved, watch=watch,
    )  # fmt: skip


def train_parts(
    config: TrainConfig,
    parts: Parts,
    out: Path | str | None = None,
    *,
    overwrite: bool = False,
    progress: bool = True,
    label: str = "train",
    team: Team = ALONE,
    moved: bool = False,
    watch: Watch | None = None,
    exact: bool = False,
    outlook: Callable[[float, float], str] | None = None,
) -> Run:
    """`train`, with what is handed in as one object.

    With ``exact``, no setting may have changed; for ``outlook`` see `gametalearn.progress.Progress`.
    """
    began = time.perf_counter()
    config = team.on_first(lambda: parts.named(config))
    folder = None if out is None or not team.first else Path(out)
    with contextlib.ExitStack() as stack:
        # settings and data that do not fit are found before the folder is touched
        data = team.on_first(lambda: verified(folder, config, overwrite, moved) if folder else None)
        stack.enter_context(using_threads(config.threads if team.size == 1 else 0))
        run = team.everywhere(lambda: start(config, parts, folder, team))
        run.outer = outer = team.everywhere(lambda: outer_of(run, parts))
        validation = team.everywhere(lambda: _validation(config, parts))
        team.on_first(lambda: warn_of_same(run.source, validation, "validation"))
        team.on_first(lambda: _testable(config, parts, folder))
        # the first process reads the files, the others are told
        saved = team.on_first(
            lambda: claim(folder, config, overwrite, moved, data, stack, exact) if folder else None
        )
        if saved:
            team.everywhere(lambda: restore(run, outer, saved))
        if run.iteration < config.iterations:
            metrics = stack.enter_context(Metrics(run, watch))
            interrupted = stack.enter_context(interruptible())
            if progress and team.first and outlook is None and (text := brought_to(config)):
                tell(f"{label}: {text} (settings image_size and channels)")
            if progress and team.size > 1 and team.first:
                tell(f"{label}: {describe_team(outer.rule, team, config.meta_batch)}")
            bar = stack.enter_context(shown(run, progress and team.first, label, outlook))
            _loop(run, outer, validation, metrics, interrupted, bar, began - run.elapsed)
    return run


def _loop(
    run: Run,
    outer: Outer,
    validation: Source,
    metrics: Metrics,
    interrupted: Callable[[], bool],
    bar: Any,
    began: float,
) -> None:
    """Meta-iterations until the run is done, or interrupted; ``began`` is when, had it never been."""
    config, team, source = run.config, run.team, run.source
    parameters, own = list(run.meta.values()), team.share(config.meta_batch)
    resumed, clock = run.seconds, time.perf_counter()
    while run.iteration < config.iterations:
        batch = placed(run.model, draw(source, config.meta_batch, own))
        sampled = time.perf_counter()
        gradients = _gradients(run, batch)
        tasks = team.tasks(gradients, config.meta_batch, stop=interrupted())
        gradients, tasks, kept = _finite(run, batch, gradients, tasks)
        differentiated = time.perf_counter()
        weights, update = weighted_update(outer.rule, gradients, tasks, team)
        _check_weights(config, weights)
        update = clip(update, config.clip_value or None, config.clip_norm or None)
        apply_update(outer.optimizer, parameters, update, run.meta_lr_now)
        if outer.scheduler is not None:
            outer.scheduler.step()
        run.iteration += 1
        updated = time.perf_counter()
        run.seconds = resumed + updated - clock

        last = run.iteration == config.iterations
        validate = last or run.iteration % config.validate_every == 0
        if validate or run.iteration == 1 or run.iteration % config.log_every == 0:
            record: dict[str, Any] = {
                "iteration": run.iteration,
                "loss": float(tasks.loss.double().mean()),
                run.score.name: _finite_or_none(float(tasks.score.double().mean())),
                "losses": tasks.loss.tolist(),
                "scores": _finite_or_none(tasks.score.tolist()),
                "group": tasks.group.tolist(),
                "objectives": _by_objective(run, tasks, weights),
                "raw": _finite_or_none(weights.raw.tolist()),
                "effective": weights.effective.tolist(),
                "diagnostics": diagnose(team.whole(gradients, tasks), weights).as_record(
                    matrices=config.log_matrices
                ),
                "skipped": run.skipped,
                "seconds": {
                    "total": run.seconds,
                    "gradients": differentiated - sampled,
                    "update": updated - differentiated,
                },
                **_of_rule(run, outer.rule),
                **{
                    k: _finite_or_none(v[kept.cpu()].tolist())
                    for k, v in getattr(source, "facts", {}).items()
                },
            }
            if validate:
                with bar.validating() as tick:
                    record["validation"] = _validate(run, validation, tick)
            run.elapsed = record["seconds"]["elapsed"] = time.perf_counter() - began
            metrics.write(record)
            bar.show(record)
        bar.advance()
        due = run.iteration % config.checkpoint_every == 0 or is_kept(run)
        if tasks.stop or last or due:
            run.elapsed = time.perf_counter() - began
            save(run, outer, metrics)
        # a signal during the last iteration, its validation included, is for whoever called
        late = last and float(team.total(torch.tensor(float(interrupted())))) > 0
        if late or (tasks.stop and not last):
            raise KeyboardInterrupt
        resumed, clock = run.seconds, time.perf_counter()


@contextlib.contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Within, PyTorch uses this many threads, as the command line does; 0 leaves their number."""
    before = torch.get_num_threads()
    if count and count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def _validation(config: TrainConfig, parts: Parts) -> Source:
    if parts.validation is not None:
        return parts.validation
    if parts.source is not None:
        raise InputError(
            "train: a source was handed in; pass validation= too, episodes that training does not "
            "see, or the best weights would be chosen on the training classes"
        )
    return build_source(config, "val")


def warn_of_same(training: Source, other: Source, what: str) -> None:
    """Say so if two samplers draw from the same examples, as from one data set under two names."""
    if not (isinstance(training, EpisodeSampler) and isinstance(other, EpisodeSampler)):
        return
    one, two = (source.with_seed(0).sample(1).support_x for source in (training, other))
    if one.shape == two.shape and torch.equal(one, two):
        warnings.warn(
            f"training and {what} draw the same examples of the same classes, so that the {what} says "
            "nothing about new classes; a data set must give other classes for each split",
            stacklevel=2,
        )


def _testable(config: TrainConfig, parts: Parts, folder: Path | None) -> None:
    """Refuse a new run whose test classes have too few images: better now than after the training.

    Data sets of your own need nothing for this that training does not need.
    """
    begun = folder is not None and (folder / "checkpoint.pt").exists()
    if parts.source is None and config.of_images and not begun:
        build_source(config, "test")


def _finite_or_none(value: Any) -> Any:
    """A number, or a list of lists of them, with None for what JSON has no word for."""
    if isinstance(value, list):
        return [_finite_or_none(one) for one in value]
    return value if math.isfinite(value) else None


def _of_rule(run: Run, rule: Rule) -> dict[str, dict[str, dict[str, float]]]:
    """What a rule tells of the objectives of the meta-batch (`gametalearn.weighting.weights.Rule`)."""
    told = {
        fact: {
            name: value
            for name, value in zip(run.objectives, values.tolist(), strict=True)
            if math.isfinite(value)
        }
        for fact, values in getattr(rule, "facts", {}).items()
    }
    return {"rule": told} if told else {}


def _by_objective(run: Run, tasks: Tasks, weights: Weights) -> dict[str, dict[str, float | None]]:
    """Of each objective that has a task in the meta-batch the mean query loss and score.

    And ``effective``, the sum of its tasks' effective weights.
    """
    found = {}
    numbers = sorted(set(tasks.group.tolist()))
    run.grouped |= max(numbers, default=0) >= len(run.objectives)
    for number in numbers:
        own = tasks.group == number
        values = {"loss": tasks.loss[own], run.score.name: tasks.score[own]}
        name = f"group {number}" if run.grouped else run.objectives[number]
        found[name] = {k: _finite_or_none(float(v.double().mean())) for k, v in values.items()}
        found[name]["effective"] = float(weights.effective.to(own.device)[own].double().sum())
    return found


def _gradients(run: Run, batch: TaskBatch) -> TaskGradients:
    """Of this process's tasks; none where there are more processes than tasks.

    What a model draws (dropout, say) follows from the run's seed, the iteration and the process, so that a
    run can be repeated and resumed, and all rules of a comparison see the same.
    """
    told = f"{run.config.seed} {run.iteration} {run.team.rank}"
    with seeded(zlib.crc32(told.encode()), next(iter(run.meta.values())).device):
        return meta_gradients(
            run.model,
            batch,
            run.learner_now,
            meta=run.meta,
            loss=run.loss,
            score=run.score,
            constant_memory=run.config.constant_memory,
        )


def _check_weights(config: TrainConfig, weights: Weights) -> None:
    if not bool(torch.isfinite(weights.effective).all()):
        raise SharedError(
            f"rule '{config.rule}': its weights are not finite ({weights.effective.tolist()[:8]}), though all "
            "gradients and losses are; mend the rule"
        )


def _finite(
    run: Run, batch: TaskBatch, gradients: TaskGradients, tasks: Tasks
) -> tuple[TaskGradients, Tasks, Tensor]:
    """All tasks if they are finite; otherwise an error, or those that are; and which ``(T,)``."""
    good = tasks.finite
    if bool(good.all()):
        return gradients, tasks, good
    bad = (~good).nonzero().flatten().tolist()
    if run.config.nonfinite == "error" or len(bad) == len(good):
        place, named = bad[0] - tasks.own.start, ""
        if 0 <= place < len(batch) and batch.classes is not None:
            named = f", classes {batch.classes[place].tolist()}"
        alternative = "leave such tasks out with `nonfinite` skip"
        if run.config.nonfinite == "skip":
            alternative = "raise `meta_batch`: every task of this one is such"
        raise SharedError(
            f"iteration {run.iteration + 1}: loss or gradient of task {bad[0]} is not finite "
            f"(loss {float(tasks.loss[bad[0]]):g}{max(run.team.objects(named), key=len)}); lower "
            f"`inner_lr` or `meta_lr`, clip with `clip_value`, or {alternative}"
        )
    run.skipped += len(bad)
    kept = good[tasks.own]
    gradients = TaskGradients(
        *(t[kept] for t in (gradients.rows, gradients.updates, gradients.loss)),
        *(t[kept] for t in (gradients.score, gradients.group)),
    )
    return gradients, tasks.only(good), good


def _validate(run: Run, source: Source, tick: Callable[[int], None]) -> dict[str, Any]:
    """Validate the latest weights, and keep them if no earlier ones were better; what is logged."""
    config = run.config
    result = evaluate(
        run.model,
        source,
        run.test_learner,
        config.validation_episodes,
        stream_seed(config.seed, "val"),
        meta=run.meta,
        loss=run.loss,
        score=run.score,
        protocol=None if config.protocol == "auto" else config.protocol,  # type: ignore[arg-type]
        progress=tick,
        team=run.team,
    )
    value = result.mean if run.score.higher_is_better else -result.mean
    value = -math.inf if math.isnan(value) else value
    if not run.best or value > run.best["value"]:
        meta = {name: p.detach().clone() for name, p in run.meta.items()}
        run.best = {"iteration": run.iteration, "value": value, "meta": meta}
        save_best(run)
    return _as_record(result, objective_names(config, source))


def _as_record(result: Evaluation, names: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {result.metric: result.mean, "ci95": result.ci95}
    if not math.isfinite(sum(found.values())):
        return dict.fromkeys(found)
    if len(names) > 1:
        found["objectives"] = {names[g]: float(v.mean()) for g, v in result.by_group().items()}
    return found
