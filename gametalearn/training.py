"""The outer loop: sample, adapt, weight, update; validate, log and checkpoint. Top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import tomli_w
import torch
from torch import nn
from tqdm import tqdm

from gametalearn.adaptation import Learner, Params, model_parameters
from gametalearn.build import (
    build_learner,
    build_model,
    build_rule,
    build_source,
    objective_names,
    stream_seed,
)
from gametalearn.checkpoint import alone_in, load_checkpoint, replacing, save_checkpoint
from gametalearn.config import TrainConfig, read_toml
from gametalearn.diagnostics import diagnose
from gametalearn.disagreement import Disagreement
from gametalearn.distributed import ALONE, Tasks, Team, told, weigh
from gametalearn.episodes import Source, TaskBatch
from gametalearn.errors import InputError, SharedError, summary
from gametalearn.evaluation import Evaluation, evaluate
from gametalearn.gradients import TaskGradients, meta_gradients
from gametalearn.losses import Loss, default_loss, name_of
from gametalearn.peek import score_for
from gametalearn.provenance import (
    RECORD,
    Record,
    checked,
    keep,
    other_settings,
    relocated,
    same_run,
    verified,
)  # fmt: skip
from gametalearn.schedules import learner_at
from gametalearn.scores import SCORES, Score, ScoreLike, as_score, default_score
from gametalearn.update import apply_update, clip, make_optimizer, meta_rate
from gametalearn.weighting import Rule, shared_columns

__all__ = ["Run", "interruptible", "load_run", "score_of", "train"]


@dataclass
class Run:
    """A training run and its state.

    Attributes:
        config: its settings.
        model: the model; after `train`, with its latest weights.
        meta: the meta-parameters by name: the model's own, then learned inner rates.
        learner: the inner loop of training.
        rule, optimizer, source: the parts with state that a checkpoint restores.
        objectives: what the numbers in ``group`` stand for.
        loss: what the inner loop and the meta-gradients differentiate.
        score: by which weights are validated, and which metrics report; settled where it was left
            to the loss.
        iteration: meta-updates done.
        seconds: time spent training, over all sessions.
        skipped: tasks left out as not finite.
        best: ``iteration`` and ``value`` of the best validation (a score of which less is better with
            its sign turned), and its ``meta`` tensors.
        parts: the names of the loss and the score, if they were handed in.
        out: the folder with metrics and checkpoints, or None (on all processes but the first, too).
        team: the processes that train together.
    """

    config: TrainConfig
    model: nn.Module
    meta: Params
    learner: Learner
    rule: Rule
    optimizer: torch.optim.Optimizer
    source: Source
    objectives: tuple[str, ...]
    loss: Loss = default_loss
    score: Score = SCORES["accuracy"]
    iteration: int = 0
    seconds: float = 0.0
    skipped: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    out: Path | None = None
    team: Team = ALONE

    @property
    def test_learner(self) -> Learner:
        """The inner loop of validation and test."""
        return self.learner.for_test(self.config.test_steps)

    @property
    def learner_now(self) -> Learner:
        """The inner loop of the next meta-iteration: `learner` under its annealings."""
        return learner_at(
            self.learner,
            self.iteration,
            first_order_until=self.config.first_order_until,
            multi_step_loss=self.config.multi_step_loss,
        )

    @property
    def meta_lr_now(self) -> float:
        """The meta rate of the next meta-iteration."""
        c = self.config
        return meta_rate(c.meta_lr, c.meta_schedule, self.iteration, c.iterations, c.meta_lr_final)

    def load_best(self) -> None:
        """Put the best validated meta-parameters into ``meta`` and the model."""
        _copy_into(self.meta, self.best.get("meta", {}))


def _copy_into(meta: Params, values: Params) -> None:
    with torch.no_grad():
        for name, value in values.items():
            meta[name].copy_(value)


RESERVED = {
    *("best_iteration", "ci95", "ci95_episodes", "diagnostics", "effective", "episodes", "group"),
    *("inner_steps", "iteration", "loss", "losses", "metric", "objectives", "protocol"),
    *("protocols", "raw", "schema", "scores", "seconds", "seed", "seeds", "skipped", "spoiled"),
    *("validation", "values"),
}
"""What files call something else; a score needs another name."""


def _start(
    config: TrainConfig,
    out: Path | None = None,
    team: Team = ALONE,
    loss: Loss = default_loss,
    score: ScoreLike = default_score,
) -> Run:
    """A run before its first iteration.

    Raises:
        InputError: settings, data, loss and score do not fit.
    """
    source = build_source(config, "train")
    model = build_model(config, source)
    learner = build_learner(config)
    own = model_parameters(model)
    meta = {
        name: own[name] if name in own else nn.Parameter(value.detach().clone())
        for name, value in learner.meta_parameters(own).items()
    }
    objectives = objective_names(config)
    chosen = _score(config, loss, score, model, meta, source)
    shapes = {name: p.shape for name, p in meta.items()}
    rule = build_rule(config, len(objectives), shared_columns(shapes, config.shared or None))
    optimizer = make_optimizer(config.meta_optimizer, list(meta.values()), config.meta_lr)
    return Run(
        config, model, meta, learner, rule, optimizer, source, objectives, loss, chosen,
        out=out, team=team,
    )  # fmt: skip


def score_of(config: TrainConfig, loss: Loss, score: ScoreLike) -> Score:
    """The score that a run of these settings would go by; nothing is trained or written.

    Raises:
        InputError: as in `train`.
    """
    return _start(config, loss=loss, score=score).score


def _score(
    config: TrainConfig,
    loss: Loss,
    score: ScoreLike,
    model: nn.Module,
    meta: Params,
    source: Source,
) -> Score:
    """The score that a run goes by; where it is left to an unknown loss, a task of its own tells."""
    if loss is default_loss and score is default_score:
        return dataclasses.replace(SCORES[config.metric], function=default_score)
    found = as_score(score)
    if found is None:
        task = source.with_seed(0).sample(1).to(config.device)
        found = score_for(score, loss, model, meta, task)
    if found.name in RESERVED:
        raise InputError(
            f"score '{found.name}': files call something else so; give it another name, such as "
            f"Score('my-{found.name}', function)"
        )
    if config.rule == "dtp" and not found.higher_is_better:
        raise InputError(
            f"rule 'dtp' weighs objectives by their accuracy, and the score '{found.name}' is an "
            "error; use gradnorm, uncertainty, uncertainty-positive or dwa"
        )
    return found


def _parts(loss: Loss, score: ScoreLike) -> dict[str, str]:
    """What was handed in, by name, as checkpoints tell it; nothing if nothing was."""
    found = as_score(score)
    if loss is default_loss and found is None:
        return {}
    return {"loss": name_of(loss), "score": "default" if found is None else found.name}


def _check_parts(content: dict[str, Any], parts: dict[str, str], where: Path) -> None:
    """A run goes on, and is tested, with the loss and the score that it began with."""
    before = content.get("parts", {})
    for name in ("loss", "score"):
        there, here = (known.get(name, _parts_default(name)) for known in (before, parts))
        if there != here:
            raise InputError(
                f"{where}: this run has {name}={there}, not {here}; pass {name}= as it was given "
                "then, or --overwrite the run"
            )


def _parts_default(name: str) -> str:
    return name_of(default_loss) if name == "loss" else "default"


def train(
    config: TrainConfig,
    out: Path | str | None = None,
    *,
    loss: Loss = default_loss,
    score: ScoreLike = default_score,
    overwrite: bool = False,
    progress: bool = True,
    label: str = "train",
    team: Team = ALONE,
    moved: bool = False,
) -> Run:
    """Meta-train a model; continue where an interrupted run of the same settings stopped.

    Args:
        config: the settings; see `TrainConfig.of`.
        out: folder for ``config.toml``, ``metrics.jsonl``, ``checkpoint.pt``, ``best.pt`` and, for
            folders of images, ``data.json``; None writes nothing.
        loss: ``loss(prediction, target)``, a mean, in the inner loop and for the queries.
        score: what is validated and reported: a name of `gametalearn.SCORES`, a `Score` (which tells
            which way is better), or a function. Where none is given and none goes with the loss,
            training does not start. Checkpoints tell the two by name: going on or loading a run
            needs them again.
        overwrite: start anew, whatever run ``out`` holds.
        progress: show progress on stderr.
        label: what the progress bar says.
        team: processes that all call this and share the tasks of each meta-batch out (see
            `gametalearn.distributed.joined`). The first one's ``config`` and ``out`` count; a run
            may go on with another number of them.
        moved: the folders of images of the run in ``out`` have moved to where ``config`` says. They
            must hold what they held; the run remembers their new place.

    Returns:
        The finished `Run`, its model with the latest weights; `Run.load_best` takes the weights
        that were best on validation.

    Raises:
        InputError: settings or data do not fit, ``out`` holds another run, or the run's images are
            not those that it began with.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the checkpoint was written.
    """
    config = team.on_first(lambda: config)
    folder = None if out is None or not team.first else Path(out)
    with contextlib.ExitStack() as stack:
        # settings and data that do not fit are found before the folder is touched
        data = team.on_first(lambda: verified(folder, config, overwrite, moved) if folder else None)
        run = team.everywhere(lambda: _start(config, folder, team, loss, score))
        run.parts = _parts(loss, score)
        validation = team.everywhere(lambda: build_source(config, "val"))
        # the first process reads the files, the others are told
        saved = team.on_first(
            lambda: _claim(folder, config, overwrite, moved, data, stack) if folder else None
        )
        if saved:
            team.everywhere(lambda: _check_parts(saved, run.parts, Path(str(out))))
            team.everywhere(lambda: _restore(run, saved))
        if run.iteration >= config.iterations:
            return run
        names = team.everywhere(lambda: objective_names(config, "val"))
        metrics = stack.enter_context(_Metrics(run))
        if progress and team.size > 1 and team.first:
            print(f"{label}: {told(run.rule, team, config.meta_batch)}", file=sys.stderr)
        interrupted = stack.enter_context(interruptible())
        bar = stack.enter_context(_bar(run, progress and team.first, label))
        parameters, own = list(run.meta.values()), team.share(config.meta_batch)
        resumed, clock = run.seconds, time.perf_counter()
        while run.iteration < config.iterations:
            batch = run.source.sample(config.meta_batch, own).to(config.device)
            sampled = time.perf_counter()
            gradients = _gradients(run, batch)
            tasks = team.tasks(gradients, config.meta_batch, stop=interrupted())
            gradients, tasks = _finite(run, batch, gradients, tasks)
            differentiated = time.perf_counter()
            weights, update = weigh(run.rule, gradients, tasks, team)
            update = clip(update, config.clip_value or None, config.clip_norm or None)
            apply_update(run.optimizer, parameters, update, run.meta_lr_now)
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
                    "scores": [_finite_or_none(value) for value in tasks.score.tolist()],
                    "group": tasks.group.tolist(),
                    "objectives": _by_objective(run, tasks),
                    "raw": weights.raw.tolist(),
                    "effective": weights.effective.tolist(),
                    "diagnostics": diagnose(team.whole(gradients, tasks), weights).as_record(),
                    "skipped": run.skipped,
                    "seconds": {
                        "total": run.seconds,
                        "gradients": differentiated - sampled,
                        "update": updated - differentiated,
                    },
                }
                if isinstance(run.source, Disagreement):
                    record["spoiled"] = run.source.spoiled.tolist()
                if validate:
                    result = _validate(run, validation)
                    found = {result.metric: result.mean, "ci95": result.ci95}
                    finite = math.isfinite(sum(found.values()))
                    record["validation"] = found if finite else dict.fromkeys(found)
                    if finite and len(names) > 1:
                        means = {names[g]: float(v.mean()) for g, v in result.by_group().items()}
                        record["validation"]["objectives"] = means
                metrics.write(record)
                bar.show(record)
            bar.advance()
            if tasks.stop or last or run.iteration % config.checkpoint_every == 0:
                _save(run, metrics)
            if tasks.stop and not last:
                raise KeyboardInterrupt
            resumed, clock = run.seconds, time.perf_counter()
    return run


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _by_objective(run: Run, tasks: Tasks) -> dict[str, dict[str, float | None]]:
    """The mean query loss and score of each objective that has a task in the meta-batch."""
    found = {}
    for number, name in enumerate(run.objectives):
        own = tasks.group == number
        if bool(own.any()):
            values = {"loss": tasks.loss[own], run.score.name: tasks.score[own]}
            found[name] = {k: _finite_or_none(float(v.double().mean())) for k, v in values.items()}
    return found


def _gradients(run: Run, batch: TaskBatch) -> TaskGradients:
    """Of this process's tasks; none where there are more processes than tasks."""
    return meta_gradients(
        run.model,
        batch,
        run.learner_now,
        meta=run.meta,
        loss=run.loss,
        score=run.score,
        constant_memory=run.config.constant_memory,
    )


def _finite(
    run: Run, batch: TaskBatch, gradients: TaskGradients, tasks: Tasks
) -> tuple[TaskGradients, Tasks]:
    """All tasks if they are finite; otherwise an error, or those that are."""
    good = tasks.finite
    if bool(good.all()):
        return gradients, tasks
    bad = (~good).nonzero().flatten().tolist()
    if run.config.nonfinite == "error" or len(bad) == len(good):
        place, named = bad[0] - tasks.own.start, ""
        if 0 <= place < len(batch) and batch.classes is not None:
            named = f", classes {batch.classes[place].tolist()}"
        alternative = "leave such tasks out with --nonfinite skip"
        if run.config.nonfinite == "skip":
            alternative = "raise --meta-batch: every task of this one is such"
        raise SharedError(
            f"iteration {run.iteration + 1}: loss or gradient of task {bad[0]} is not finite "
            f"(loss {float(tasks.loss[bad[0]]):g}{max(run.team.objects(named), key=len)}); lower "
            f"--inner-lr or --meta-lr, clip with --clip-value, or {alternative}"
        )
    run.skipped += len(bad)
    if isinstance(run.source, Disagreement):  # it goes on telling of the tasks that are left
        run.source.spoiled = run.source.spoiled[good.cpu()]
    kept = good[tasks.own]
    gradients = TaskGradients(
        *(t[kept] for t in (gradients.rows, gradients.updates, gradients.loss)),
        *(t[kept] for t in (gradients.score, gradients.group)),
    )
    return gradients, tasks.only(good)


def _validate(run: Run, source: Source) -> Evaluation:
    """Validate the latest weights, and keep them if no earlier ones were better."""
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
        team=run.team,
    )
    value = result.mean if run.score.higher_is_better else -result.mean
    value = -math.inf if math.isnan(value) else value
    if not run.best or value > run.best["value"]:
        meta = {name: p.detach().clone() for name, p in run.meta.items()}
        run.best = {"iteration": run.iteration, "value": value, "meta": meta}
        if run.out is not None:
            save_checkpoint(
                run.out / "best.pt",
                {
                    "config": config.as_dict(),
                    "model": run.model.state_dict(),
                    **run.best,
                    **_told(run),
                },
            )
    return result


def _told(run: Run) -> dict[str, Any]:
    """Of the parts that were handed in, for a checkpoint."""
    return {"parts": run.parts} if run.parts else {}


def _save(run: Run, metrics: _Metrics) -> None:
    if run.out is None:
        return
    content = {
        "config": run.config.as_dict(),
        "iteration": run.iteration,
        "model": run.model.state_dict(),
        "meta": {name: p.detach() for name, p in run.meta.items()},
        "optimizer": run.optimizer.state_dict(),
        "rule": run.rule.state_dict() if isinstance(run.rule, nn.Module) else {},
        "source": run.source.state_dict(),
        "best": run.best,
        "seconds": run.seconds,
        "skipped": run.skipped,
        "metrics_bytes": metrics.sync(),
        **_told(run),
    }
    save_checkpoint(run.out / "checkpoint.pt", content)


def _restore(run: Run, content: dict[str, Any]) -> None:
    """Put a checkpoint's content into a run that was just started."""
    try:
        _copy_into(run.meta, content["meta"])
        run.model.load_state_dict(content["model"])
        run.optimizer.load_state_dict(content["optimizer"])
        if isinstance(run.rule, nn.Module):
            run.rule.load_state_dict(content["rule"])
        run.source.load_state_dict(content["source"])
        run.iteration, run.seconds = int(content["iteration"]), float(content["seconds"])
        run.best, run.skipped = dict(content["best"]), int(content["skipped"])
    except MISFIT as error:
        raise _misfit(Path("checkpoint.pt"), error) from error


def _claim(
    folder: Path,
    config: TrainConfig,
    overwrite: bool,
    moved: bool,
    data: Record | None,
    stack: contextlib.ExitStack,
) -> dict[str, Any] | None:
    """Make ``folder`` this run's until ``stack`` ends; what its checkpoint holds, if it has one.

    A run of other settings that ended before its first checkpoint, and so keeps nothing, gives way.
    """
    file = folder / "config.toml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(alone_in(folder))
        if file.exists() and not overwrite:
            there = read_toml(file)
            if same_run(there, config, moved):
                saved = _saved(folder, config)
                if there != config.as_dict():  # a path that is now absolute, or a new place
                    _write_config(file, config)
                keep(folder, data)
                return saved
            begun = {p.name for p in folder.iterdir()} - {"config.toml", "metrics.jsonl", RECORD}
            if begun or there.keys() != config.as_dict().keys():
                raise InputError(other_settings(folder, there, config))
        elif any(folder.iterdir()) and not overwrite:
            raise InputError(f"{folder} is not empty and holds no run; choose another --out")
        for name in ("checkpoint.pt", "best.pt", "metrics.jsonl", "evaluation.json", "lake.json",
                     RECORD):  # fmt: skip
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror}); choose another --out"
        ) from error
    _write_config(file, config)
    keep(folder, data)
    return None


def _write_config(file: Path, config: TrainConfig) -> None:
    with replacing(file) as stream:
        tomli_w.dump(config.as_dict(), stream)


def _saved(folder: Path, config: TrainConfig) -> dict[str, Any] | None:
    """The checkpoint's content; lines of metrics after it, which will come again, are cut off."""
    metrics, file, content, length = folder / "metrics.jsonl", folder / "checkpoint.pt", None, 0
    if file.exists():
        content = load_checkpoint(file)
        length = content.get("metrics_bytes", -1)
        # what its folders of images hold has been compared; where they lie may have changed
        if not same_run(content.get("config"), config, moved=True):
            raise InputError(f"{file}: of other settings than config.toml; --overwrite the run")
    if metrics.exists() and metrics.stat().st_size > length:
        os.truncate(metrics, length)
    return content


def load_run(
    folder: Path | str,
    which: str = "best",
    device: str | None = None,
    *,
    dataset: str | None = None,
    loss: Loss = default_loss,
    score: ScoreLike = default_score,
    team: Team = ALONE,
) -> Run:
    """A saved run, its model with the ``best`` validated or the ``latest`` weights.

    A run that was trained with a ``loss`` or a ``score`` of its own needs them again. Of a ``team``,
    only the first process reads files. To test it::

        run = load_run("runs/demo/uniform/seed0")
        result = evaluate(run.model, source, run.test_learner, meta=run.meta, loss=run.loss)

    Args:
        folder: what `train` wrote.
        which: ``best`` or ``latest``.
        device: instead of the run's own.
        dataset: where the run's folders of images lie now, as ``folder:PATH``, if they have moved.
        team: as in `train`.

    Raises:
        InputError: no run there, its checkpoint is damaged, its images are not those that it was
            trained on, or it has another loss or score.
    """
    folder = Path(folder)
    file = folder / ("best.pt" if which == "best" else "checkpoint.pt")

    def read() -> tuple[TrainConfig, dict[str, Any]]:
        values = read_toml(_config_file(folder))
        config = TrainConfig.from_dict(
            values if device is None else {**values, "device": device}, str(_config_file(folder))
        )
        if dataset is not None:
            config = relocated(config, dataset)
        if not file.exists():
            raise InputError(
                f"{file}: no checkpoint yet; run `gametalearn train --resume {folder}`"
            )
        checked(folder, config, str(values.get("dataset")) if dataset is None else config.dataset)
        return config, load_checkpoint(file)

    config, content = team.on_first(read)
    parts = _parts(loss, score)
    team.everywhere(lambda: _check_parts(content, parts, folder))
    run = team.everywhere(lambda: _start(config, folder if team.first else None, team, loss, score))
    run.parts = parts
    try:
        run.model.load_state_dict(content["model"])
        _copy_into(run.meta, content["meta"])
        run.iteration = int(content["iteration"])
    except MISFIT as error:
        raise _misfit(file, error) from error
    return run


def _config_file(folder: Path) -> Path:
    file = folder / "config.toml"
    if not file.exists():
        raise InputError(
            f"{folder}: no run there ({file.name} is missing); give what train --out wrote"
        )
    return file


MISFIT = (LookupError, TypeError, ValueError, RuntimeError, AttributeError)
"""What comes of restoring something other than what was saved."""


def _misfit(file: Path, error: Exception) -> InputError:
    return InputError(f"{file}: does not fit its config.toml ({summary(error)}); --overwrite it")


class _Metrics:
    """``metrics.jsonl``, a line a log step; nothing without an output folder."""

    def __init__(self, run: Run) -> None:
        self._file = None if run.out is None else run.out / "metrics.jsonl"
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> _Metrics:
        if self._file is not None:
            with self._explained():
                self._stream = self._file.open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):  # what could not be written has been said
                self._stream.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self._file}: cannot be written ({error.strerror or error}); the last checkpoint "
                "is unchanged: make room, then go on with train --resume"
            ) from error

    def write(self, record: dict[str, Any]) -> None:
        if self._stream is not None:
            with self._explained():
                self._stream.write(json.dumps(record, allow_nan=False).encode() + b"\n")
                self._stream.flush()

    def sync(self) -> int:
        """Bring the lines to the disk; the file's length."""
        if self._stream is None:
            return 0
        with self._explained():
            os.fsync(self._stream.fileno())
            return self._stream.tell()


@contextlib.contextmanager
def interruptible() -> Iterator[Any]:
    """A function that says whether SIGINT or SIGTERM came; a later second one interrupts at once.

    Not a second one within a second: Ctrl-C reaches this process, and torchrun hands it on.
    """
    came: list[float] = []

    def note(_number: int, _frame: object) -> None:
        came.append(time.monotonic())
        if came[-1] - came[0] > 1:
            raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(n, note) for n in numbers]
    except ValueError:  # not the main thread
        yield lambda: False
        return
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class _Bar:
    """tqdm on a terminal; elsewhere a line every 10 seconds or at each validation."""

    def __init__(self, run: Run, label: str) -> None:
        self.run, self.label, self.metric = run, label, run.score.name
        # several processes would fight over one terminal line
        self.terminal = sys.stderr.isatty() and multiprocessing.parent_process() is None
        total, done = run.config.iterations, run.iteration
        self.bar = tqdm(
            total=total, initial=done, desc=label, disable=not self.terminal, leave=False
        )
        self.started, self.spoke, self.first = time.monotonic(), time.monotonic(), done
        self.validation = ""

    def advance(self) -> None:
        self.bar.update()

    def show(self, record: dict[str, Any]) -> None:
        if "validation" in record:
            value = record["validation"][self.metric]
            self.validation = "not finite" if value is None else f"{value:.3f}"
        value = record[self.metric]
        told = {self.metric: "not finite" if value is None else f"{value:.3f}"}
        if self.validation:
            told["validation"] = self.validation
        self.bar.set_postfix(told, refresh=False)
        now = time.monotonic()
        if not self.terminal and (
            now - self.spoke > 10 or record["iteration"] == self.run.config.iterations
        ):
            self.spoke = now
            rate = (record["iteration"] - self.first) / max(now - self.started, 1e-9)
            values = ", ".join(f"{k} {v}" for k, v in told.items())
            done = f"{record['iteration']}/{self.run.config.iterations}"
            print(f"{self.label}: {done}, {values}, {rate:.1f} it/s", file=sys.stderr, flush=True)


class _Silent:
    def advance(self) -> None: ...

    def show(self, record: dict[str, Any]) -> None: ...


@contextlib.contextmanager
def _bar(run: Run, progress: bool, label: str) -> Iterator[_Bar | _Silent]:
    if not progress:
        yield _Silent()
        return
    bar = _Bar(run, label)
    try:
        yield bar
    finally:
        bar.bar.close()
