"""A training run and its parts: built from the settings, or handed in."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gametalearn import registry
from gametalearn.adaptation import Learner, Params, makes_heads, model_parameters
from gametalearn.build import (
    build_learner,
    build_loss,
    build_model,
    build_optimizer,
    build_rule,
    build_score,
    build_source,
    make_model,
    objective_names,
)
from gametalearn.config import TrainConfig, usual_test_steps
from gametalearn.disagreement import Disagreement
from gametalearn.distributed import ALONE, Team
from gametalearn.episodes import Source, TaskBatch, draw, input_shape_of
from gametalearn.errors import InputError
from gametalearn.evaluation import placed
from gametalearn.gradients import meta_of
from gametalearn.losses import Loss, default_loss
from gametalearn.mixture import MixedSource
from gametalearn.normalisation import check_protocol
from gametalearn.peek import score_for, written_buffers
from gametalearn.provenance import checked
from gametalearn.records import one_line
from gametalearn.schedules import learner_at
from gametalearn.scores import RESERVED, SCORES, Score, ScoreLike, as_score, default_score
from gametalearn.transfer import episodes_for, require_other, settings_for
from gametalearn.update import meta_rate
from gametalearn.weighting import Rule, shared_columns
from gametalearn.weighting.agreement import require_updates
from gametalearn.weighting.weights import require_rule

__all__ = ["Outer", "Parts", "Run", "Watch", "outer_of", "precision_of", "start"]

Scheduler = Any
"""Anything with ``step()`` and ``state_dict()``; torch has no common class of all its schedulers."""


@dataclass(frozen=True)
class Parts:
    """What is handed in to a run; what is None, or a default, is built from the settings.

    Attributes:
        model: a module, whose weights are the initial ones and which is trained in place; or a class
            or function that gives one (`gametalearn.registry.OFFERED`).
        source, validation: episodes of training and validation classes; see
            `gametalearn.episodes.Source`.
        learner: the inner loop.
        rule: the weighting rule; its state is saved if it has ``state_dict``.
        loss, score: as in `gametalearn.training.train`.
        optimizer: ``optimizer(named_parameters)`` gives the outer optimiser, or it and a scheduler.
        rule_factory: a class or function that makes the rule, where ``rule`` is None.
    """

    model: nn.Module | Callable[..., nn.Module] | None = None
    source: Source | None = None
    validation: Source | None = None
    learner: Learner | None = None
    rule: Rule | None = None
    loss: Loss = default_loss
    score: ScoreLike = default_score
    optimizer: Callable[..., Any] | None = None
    rule_factory: Callable[..., Rule] | None = None

    def __post_init__(self) -> None:
        for name in ("learner", "loss"):
            if isinstance(given := getattr(self, name), type):
                raise InputError(
                    f"{name} {given.__name__} is a class; pass an instance, such as {given.__name__}()"
                )
        settings = {"source": "dataset", "validation": "dataset", "optimizer": "meta_optimizer"}
        for name in ("model", "source", "validation", "learner", "rule", "loss", "optimizer"):
            if isinstance(given := getattr(self, name), str):
                raise InputError(
                    f"{name}='{given}' is a name, but this argument takes the part itself; names are "
                    f"settings: TrainConfig.of(..., {settings.get(name, name)}='{given}')"
                )

    def named(self, config: TrainConfig) -> TrainConfig:
        """The settings, in which what was handed in stands by its name, and its episodes by their size.

        Raises:
            InputError: no settings, or validation episodes have other ways than those of training.
        """
        if not isinstance(config, TrainConfig):
            raise InputError(
                f"the settings are a TrainConfig, such as TrainConfig.of('glyphs'); got {config!r}"
            )
        handed = {
            "model": self.model, "dataset": self.source, "learner": self.learner,
            "rule": self.rule or self.rule_factory, "meta_optimizer": self.optimizer,
            "loss": None if self.loss is default_loss else self.loss,
        }  # fmt: skip
        changes: dict[str, Any] = {
            k: registry.handed_in(part) for k, part in handed.items() if part is not None
        }
        if self.learner is not None:  # one of the library's may have any settings
            changes["learner"] = registry.handed_in_with(self.learner)
            steps = getattr(self.learner, "steps", None)
            if config.test_steps == usual_test_steps(config.dataset) and isinstance(steps, int):
                changes["test_steps"] = steps  # the default goes with the data set's own learner
        changes |= self._sizes(config)
        score = as_score(self.score)
        if score is not None:
            known = SCORES.get(score.name) == score
            changes["score"] = score.name if known else f"{registry.HANDED_IN}{score.name}"
        if changes.get("rule"):
            changes["rule_options"] = {}
        return dataclasses.replace(config, **changes)

    def _heads(self, config: TrainConfig) -> bool:
        """Whether the learner makes a head for each task."""
        if self.learner is not None or registry.is_handed_in(config.learner):
            return self.learner is not None and makes_heads(self.learner)
        return makes_heads(registry.resolve("learner", config.learner)[0])

    def _sizes(self, config: TrainConfig) -> dict[str, int]:
        """Ways, shots and queries of the episodes that were handed in, as far as they tell."""
        train, validation = sizes_of(self.source), told_by(self.validation)
        ways = train.get("ways"), validation.get("ways")
        if None not in ways and ways[0] != ways[1] and not self._heads(config):
            raise InputError(
                f"train: the validation episodes are {validation['ways']}-way, and those of training "
                f"{train['ways']}-way; a model has an output for each class, so give both the same ways"
            )
        if train and config.train_shots:  # then the others are those of the tests
            train["shots"] = config.shots
        return train


def sizes_of(source: Source | None) -> dict[str, int]:
    """Ways, shots and queries of a source: those that it tells, as an `EpisodeSampler`, others as an episode shows.

    Ways are 1 for regression. An episode shows nothing unless its labels are 0 to ways - 1, each as often as the others.
    """
    told = told_by(source)
    if source is None or len(told) == 3:
        return told
    shown: dict[str, int] = {}
    with contextlib.suppress(Exception):  # what is wrong with it is said where it is drawn from
        shown = _shown_by(draw(source.with_seed(0), 1))
    if any(shown.get(name, value) != value for name, value in told.items()):
        return told
    return shown | told


def told_by(source: object) -> dict[str, int]:
    """Those of ways, shots and queries that a source has as attributes."""
    found = {name: getattr(source, name, None) for name in ("ways", "shots", "queries")}
    return {name: value for name, value in found.items() if isinstance(value, int)}


def _shown_by(task: TaskBatch) -> dict[str, int]:
    if task.support_y.is_floating_point():
        return {"ways": 1, "shots": task.support_x.shape[1], "queries": task.query_x.shape[1]}
    if task.support_y.ndim != 2:
        return {}
    if min(int(y.min()) for y in (task.support_y, task.query_y)) < 0:
        return {}
    support, query = (y.flatten().bincount().tolist() for y in (task.support_y, task.query_y))
    ways = len(support)
    if ways < 2 or ways != len(query) or len(set(support)) > 1 or len(set(query)) > 1:
        return {}
    return {"ways": ways, "shots": support[0], "queries": query[0]}


@dataclass
class Run:
    """A training run and its state.

    Attributes:
        config: its settings.
        model: the model; after `train`, with its latest weights.
        meta: the meta-parameters by name: the model's own, then learned inner rates.
        learner: the inner loop of training.
        objectives: what the numbers in ``group`` stand for.
        grouped: whether a task had a number beyond them: a source need not name its groups.
        loss: what the inner loop and the meta-gradients differentiate.
        score: by which weights are validated, and which metrics report; settled where it was left
            to the loss.
        input_shape: of one input.
        iteration: meta-updates done.
        seconds: time spent training, over all sessions, without what follows.
        elapsed: all time spent, with validation, logging and checkpoints; known up to the last
            checkpoint of an earlier session.
        skipped: tasks left out as not finite.
        best: ``iteration`` and ``value`` of the best validation (a score of which less is better with
            its sign turned), and its ``meta`` tensors.
        out: the folder with metrics and checkpoints, or None (on all processes but the first, too).
        team: the processes that train together.
        drawn: the training episodes; None in a run that was loaded.
        outer: the rule and the outer optimiser; None in a run that was loaded.
    """

    config: TrainConfig
    model: nn.Module
    meta: Params
    learner: Learner
    objectives: tuple[str, ...]
    loss: Loss = default_loss
    score: Score = SCORES["accuracy"]
    input_shape: tuple[int, ...] = ()
    iteration: int = 0
    seconds: float = 0.0
    elapsed: float = 0.0
    skipped: int = 0
    grouped: bool = False
    best: dict[str, Any] = field(default_factory=dict)
    out: Path | None = None
    team: Team = ALONE
    drawn: Source | None = None
    outer: Outer | None = None

    __repr__ = one_line

    @property
    def source(self) -> Source:
        """The training episodes; of a run that was loaded, from their beginning."""
        if self.drawn is None:
            self.drawn = self.episodes("train")
        return self.drawn

    def episodes(
        self,
        split: str,
        *,
        dataset: str | None = None,
        ways: int | None = None,
        shots: int | None = None,
        queries: int | None = None,
    ) -> Source:
        """The episodes of ``train``, ``val`` or ``test``, from their beginning; or others to test it on.

            source = run.episodes("all", dataset="folder:characters", shots=5)
            result = evaluate(run.model, source, run.test_learner, meta=run.meta, loss=run.loss)

        Args:
            split: the classes; of a folder of other images also ``all``.
            dataset: other data by name; images get the size and the channels of the run's.
            ways, shots, queries: per episode, and per class. Other ways than the run's are for learners
                that make a head for each task (`gametalearn.prototypes`). With any of them or other
                data, ``train`` has the shots of the test, too, and no spoiled targets.

        Raises:
            InputError: its data are not there; its folders of images do not hold what they held when
                the run in ``out`` began; or it cannot be tested so.
        """
        sizes = {"ways": ways, "shots": shots, "queries": queries}
        if dataset is not None:
            require_other(self.config, self.out, dataset)
        elif self.out is not None:
            checked(self.out, self.config)
        if dataset is None and set(sizes.values()) == {None}:
            return build_source(self.config, split)
        tested = settings_for(self.config, self.learner, self.input_shape, dataset=dataset, **sizes)
        return episodes_for(tested, self.input_shape, split, sizes)

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
    def meta_lr_now(self) -> float | None:
        """The outer rate of the next meta-iteration; None where the optimiser keeps its own."""
        c = self.config
        if c.meta_optimizer not in registry.BUILT_IN["meta_optimizer"]:
            return None
        return meta_rate(c.meta_lr, c.meta_schedule, self.iteration, c.iterations, c.meta_lr_final)

    def load_best(self) -> None:
        """Put the best validated meta-parameters into ``meta`` and the model.

        Raises:
            InputError: nothing was validated yet.
        """
        if "meta" not in self.best:
            raise InputError(
                f"load_best: nothing was validated in {self.iteration} iterations, so there is no best yet"
            )
        self.put(self.best["meta"])

    def put(self, values: Params) -> None:
        """Copy values into the meta-parameters of the same names."""
        with torch.no_grad():
            for name, value in values.items():
                self.meta[name].copy_(value)


Watch = Callable[[Run, dict[str, Any]], None]
"""Called with each line of ``metrics.jsonl``, after it is written."""


@dataclass
class Outer:
    """What only training needs: the weighting rule, the outer optimiser, perhaps its scheduler."""

    rule: Rule
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None = None

    def state_dict(self) -> dict[str, Any]:
        """The states of all that have one."""
        parts: dict[str, Any] = {
            "optimizer": self.optimizer, "rule": self.rule, "scheduler": self.scheduler
        }  # fmt: skip
        return {
            name: part.state_dict() if hasattr(part, "state_dict") else {}
            for name, part in parts.items()
        }

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; runs of older versions have no scheduler."""
        self.optimizer.load_state_dict(content["optimizer"])
        for name, part in (("rule", self.rule), ("scheduler", self.scheduler)):
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(content[name])  # type: ignore[union-attr]


def start(
    config: TrainConfig,
    parts: Parts,
    out: Path | None = None,
    team: Team = ALONE,
    *,
    known: dict[str, Any] | None = None,
) -> Run:
    """A run before its first iteration.

    Args:
        config: the settings, with the names of what was handed in (`Parts.named`).
        parts: what was.
        out, team: as in `Run`.
        known: what a checkpoint tells of the data: then none are read, unless it is of a version
            that told nothing.

    Raises:
        InputError: settings, data, loss and score do not fit.
    """
    for kind in ("learner", "rule", "model", "loss", "score", "meta_optimizer"):
        if known is None:  # a name that is mistyped is found before data are read
            registry.require_known(kind, getattr(config, kind))
    loaded = known is not None and "input_shape" in known
    source = None
    if not loaded:
        source = build_source(config, "train") if parts.source is None else parts.source
        _check_shares(source, config)
    shape = tuple(known["input_shape"]) if loaded and known else input_shape_of(source)  # type: ignore[arg-type]
    learner = build_learner(config) if parts.learner is None else parts.learner
    model = _model(config, parts, shape, learner)
    if known is not None and (dtype := PRECISIONS.get(str(known.get("dtype")))):
        model.to(dtype)
    own = model_parameters(model)
    meta = {
        name: own[name] if name in own else nn.Parameter(value.detach().clone())
        for name, value in learner.meta_parameters(own).items()
    }
    meta_of(model, learner, meta)  # says if there is nothing to adapt
    if config.protocol != "auto":
        check_protocol(model, config.protocol)  # type: ignore[arg-type]
    loss = build_loss(config) if parts.loss is default_loss else parts.loss
    if known is None:
        _warn_of_parameters(loss, model)
        _warn_of_buffers(model, meta, source)
    score = build_score(config) if parts.score is default_score else parts.score
    if source is None:
        objectives = tuple(known["objectives"])  # type: ignore[index]
        settled = _score_again(score, known["score"])  # type: ignore[index]
    else:
        objectives = objective_names(config, source)
        settled = _score(config, loss, score, model, learner, meta, source)
    return Run(config, model, meta, learner, objectives, loss, settled, shape, out=out, team=team,
               drawn=source)  # fmt: skip


def _check_shares(source: Source, config: TrainConfig) -> None:
    """Refuse a mixture of which one source would never be learned from."""
    mixed = source.source if isinstance(source, Disagreement) else source
    if not isinstance(mixed, MixedSource) or not (counts := mixed.divided(config.meta_batch)):
        return
    if without := [number for number, count in enumerate(counts) if not count]:
        names = objective_names(config, source)
        named = names[without[0]] if without[0] < len(names) else f"source {without[0]}"
        raise InputError(
            f"`meta_batch` {config.meta_batch} has no task of {named}, which would never be learned from; raise it, to "
            f"{mixed.period} for the exact shares"
        )


def _warn_of_parameters(loss: Loss, model: nn.Module) -> None:
    """Say so if a loss has parameters that look as if they were to be learned."""
    own = {id(p) for p in model.parameters()}
    named = loss.named_parameters() if isinstance(loss, nn.Module) else ()
    if left := [name for name, p in named if p.requires_grad and id(p) not in own]:
        warnings.warn(
            f"the loss {type(loss).__name__} has parameters that require gradients ({', '.join(left)}), and "
            "training leaves them as they are; make them parts of the model, or freeze them with "
            "requires_grad_(False)",
            stacklevel=2,
        )


def _warn_of_buffers(model: nn.Module, meta: Params, source: Source | None) -> None:
    """Say so if a forward maintains buffers, such as the vectors of a spectral norm."""
    if source is None or not any(True for _ in model.buffers()):
        return
    if names := written_buffers(model, meta, placed(model, source.with_seed(0).sample(1))):
        warnings.warn(
            f"the forward of {type(model).__name__} writes into its buffers ({', '.join(names[:3])}), and "
            "training drops that, since every task starts from the same model: a spectral norm, an average "
            "or a codebook that is kept there stays as it was at the start",
            stacklevel=2,
        )


PRECISIONS = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def precision_of(model: nn.Module) -> str:
    """The one precision of a model's parameters, a name of `PRECISIONS`; "" if there are several."""
    found = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    return found.pop() if len(found) == 1 else ""


def _model(
    config: TrainConfig, parts: Parts, shape: tuple[int, ...], learner: Learner
) -> nn.Module:
    if isinstance(parts.model, nn.Module):
        return parts.model.to(config.device)
    if parts.model is not None:
        return make_model(config, parts.model, shape, {}, learner)
    return build_model(config, shape, learner)


def outer_of(run: Run, parts: Parts) -> Outer:
    """The rule and the outer optimiser of a run.

    Raises:
        InputError: the rule does not suit the run's score or objectives.
    """
    config = run.config
    if config.rule == "dtp" and not run.score.higher_is_better:
        raise InputError(
            f"rule 'dtp' weighs objectives by their accuracy, and the score '{run.score.name}' is an "
            "error; use gradnorm, uncertainty, uncertainty-positive or dwa"
        )
    rule = parts.rule
    if rule is None:
        shapes = {name: p.shape for name, p in run.meta.items()}
        columns = shared_columns(shapes, config.shared or None)
        if parts.rule_factory is None:
            rule = build_rule(config, len(run.objectives), columns)
        else:
            offered = {"objectives": len(run.objectives), "within": config.within,
                       "balance": config.balance, "columns": columns, "seed": config.seed, "config": config}  # fmt: skip
            rule = registry.call("rule", config.rule, parts.rule_factory, offered)
    require_rule(rule, "`rule`")
    require_updates(config.rule, rule, run.learner.steps)
    named = list(run.meta.items())
    made = build_optimizer(config, named) if parts.optimizer is None else parts.optimizer(named)
    optimizer, scheduler = made if isinstance(made, tuple) else (made, None)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"the outer optimiser must be a torch.optim.Optimizer, perhaps in a tuple with a "
            f"scheduler; got a {type(optimizer).__name__}"
        )
    return Outer(rule, optimizer, scheduler)


def _score(
    config: TrainConfig,
    loss: Loss,
    score: ScoreLike,
    model: nn.Module,
    learner: Learner,
    meta: Params,
    source: Source,
) -> Score:
    """The score that a run goes by; where it is left to an unknown loss, a task of its own tells."""
    built_in = all(name in registry.BUILT_IN["dataset"] for name in config.datasets)
    if loss is default_loss and score is default_score and built_in:
        named = SCORES["mse" if config.regression else "accuracy"]
        return dataclasses.replace(named, function=default_score)
    found = as_score(score)
    if found is None:
        task = placed(model, source.with_seed(0).sample(1))
        found = score_for(score, loss, model, learner, meta, task)
    if found.name in RESERVED:
        raise InputError(
            f"score '{found.name}': that name is reserved in the run's files; give it another, such as "
            f"Score('my-{found.name}', function)"
        )
    return found


def _score_again(score: ScoreLike, told: dict[str, Any]) -> Score:
    """The score that a checkpoint tells of, with the function that was handed in or built."""
    found = as_score(score)
    return Score(**told, function=default_score) if found is None else found
