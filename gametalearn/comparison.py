"""The honest comparison: every rule from the same weights, on the same episodes, over seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gametalearn.adaptation import Learner
from gametalearn.build import build_source, objective_names, stream_seed
from gametalearn.config import TrainConfig
from gametalearn.distributed import ALONE, Team
from gametalearn.engine.allocator import keep_memory
from gametalearn.episodes import Source
from gametalearn.errors import InputError, summary
from gametalearn.evaluation import Evaluation, ci95, evaluate, protocol_of
from gametalearn.files import write_json
from gametalearn.losses import Loss, default_loss
from gametalearn.places import folders
from gametalearn.progress import interruptible
from gametalearn.registry import BUILT_IN, handed_in
from gametalearn.run import Parts, Run, outer_of, start
from gametalearn.scores import SCORES, Score, ScoreLike, default_score
from gametalearn.training import train_parts

__all__ = ["Comparison", "compare", "paired_difference"]

SCHEMA = "gametalearn.compare/1"


@dataclass(frozen=True)
class Result:
    """One rule on one seed: its test, and the seconds that its training took."""

    evaluation: Evaluation
    seconds: float
    iteration: int


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: for each rule, one `Result` a seed, in the order of ``seeds``.

    ``given`` is the score, if it or a loss was handed in; `score` is the one that was compared.
    """

    config: TrainConfig
    seeds: tuple[int, ...]
    episodes: int
    objectives: tuple[str, ...]
    results: dict[str, list[Result]]
    given: Score | None = None

    @property
    def score(self) -> Score:
        """What the values are."""
        if self.given is not None:
            return self.given
        return SCORES["mse" if self.config.regression else "accuracy"]

    @property
    def baseline(self) -> str:
        """The rule that the others are paired with: ``uniform``, or the first."""
        return "uniform" if "uniform" in self.results else next(iter(self.results))

    def pooled(self, rule: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The per-episode values of a rule, seed after seed."""
        return np.concatenate([r.evaluation.values for r in self.results[rule]])

    def mean(self, rule: str) -> float:
        """The mean over seeds of a rule's mean over episodes."""
        return float(np.mean([r.evaluation.mean for r in self.results[rule]]))

    def over_seeds(self, rule: str) -> float | None:
        """Half width of the 95% t interval over seeds, the unit of replication of training."""
        from scipy import stats

        means = np.array([r.evaluation.mean for r in self.results[rule]])
        if len(means) < 3:
            return None
        quantile = float(stats.t.ppf(0.975, len(means) - 1))
        return float(quantile * means.std(ddof=1) / len(means) ** 0.5)

    def by_objective(self, rule: str) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
        """The per-episode values of each objective, pooled over seeds."""
        groups = np.concatenate([r.evaluation.group for r in self.results[rule]])
        values = self.pooled(rule)
        return {
            name: values[groups == i]
            for i, name in enumerate(self.objectives)
            if (groups == i).any()
        }

    def as_dict(self) -> dict[str, Any]:
        """The content of ``results.json``, schema ``gametalearn.compare/1``."""
        metric, config = self.score.name, self.config
        rules = {}
        for rule, results in self.results.items():
            entry: dict[str, Any] = {
                metric: self.mean(rule),
                "ci95": ci95(self.pooled(rule)),
                "seeds": [
                    {
                        "seed": seed,
                        metric: r.evaluation.mean,
                        "ci95": r.evaluation.ci95,
                        "seconds": round(r.seconds, 3),
                        "best_iteration": r.iteration,
                    }
                    for seed, r in zip(self.seeds, results, strict=True)
                ],
            }
            if (over := self.over_seeds(rule)) is not None:
                entry["ci95_over_seeds"] = over
            if len(self.objectives) > 1:
                entry["objectives"] = {
                    name: {metric: float(v.mean()), "ci95": ci95(v)}
                    for name, v in self.by_objective(rule).items()
                }
            rules[rule] = entry
        return {
            "schema": SCHEMA,
            "dataset": config.dataset,
            "ways": None if config.regression else config.ways,
            "shots": config.shots,
            "queries": config.queries,
            "learner": config.learner,
            "iterations": config.iterations,
            "meta_batch": config.meta_batch,
            "episodes": self.episodes,
            "protocol": self.results[self.baseline][0].evaluation.protocol,
            **self._told(),
            "rules": rules,
            "paired": [
                {"rule": rule, "baseline": self.baseline, **paired_difference(mine, theirs)}
                for rule in self.results
                if rule != self.baseline
                for mine, theirs in [(self.pooled(rule), self.pooled(self.baseline))]
            ],
            "config": {k: v for k, v in config.as_dict().items() if k not in ("rule", "seed")},
        }

    def _told(self) -> dict[str, Any]:
        """A score that was handed in; which way the usual ones are better, readers know."""
        if self.given is None:
            return {}
        names = ("name", "higher_is_better", "format")
        return {"metric": {name: getattr(self.given, name) for name in names}}

    def table(self) -> str:
        """The final table: a line a rule, aligned, in percent for accuracies."""
        percent = self.score.format == "percent"
        scale, unit = (100.0, " %") if percent else (1.0, "")
        digits = 2 if percent else 4

        def show(value: float) -> str:
            return f"{value * scale:.{digits}f}"

        header = ["rule", f"test {self.score.name}{unit}"]
        several = len(self.objectives) > 1 and self.config.objectives == "dataset"
        header += list(self.objectives) if several else []
        seeds = self.over_seeds(self.baseline) is not None
        header += ["over seeds"] if seeds else []
        header += [f"minus {self.baseline} [95% interval]", "p", "s / run"]
        lines = []
        for rule, results in self.results.items():
            line = [rule, f"{show(self.mean(rule))} ± {show(ci95(self.pooled(rule)))}"]
            if several:
                line += [
                    f"{show(float(v.mean()))} ± {show(ci95(v))}"
                    for v in self.by_objective(rule).values()
                ]
            if seeds:
                line.append(f"± {show(self.over_seeds(rule) or 0.0)}")
            if rule == self.baseline:
                line += ["", ""]
            else:
                paired = paired_difference(self.pooled(rule), self.pooled(self.baseline))
                low, high = paired["ci95"]
                sign = f"{paired['difference'] * scale:+.{digits}f}"
                line += [f"{sign} [{low * scale:+.{digits}f}, {high * scale:+.{digits}f}]"]
                line += [f"{paired['p_value']:.2g}"]
            line.append(f"{np.mean([r.seconds for r in results]):.0f}")
            lines.append(line)
        widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
        text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
                for line in [header, *lines]]  # fmt: skip
        config, first = self.config, self.results[self.baseline][0].evaluation
        what = "regression" if config.regression else f"{config.ways}-way"
        title = (
            f"{config.dataset}, {what} {config.shots}-shot, {config.learner}, "
            f"{config.iterations} iterations, {len(self.seeds)} seeds x {self.episodes} test "
            f"episodes, {first.protocol}; ± is a 95% interval over episodes"
        )
        return "\n".join([title, "", text[0], "-" * len(text[0]), *text[1:]])


def paired_difference(
    values: np.ndarray[Any, np.dtype[np.float64]], baseline: np.ndarray[Any, np.dtype[np.float64]]
) -> dict[str, Any]:
    """Mean difference of paired values, its 95% t interval and two-sided p-value.

    Equal values give 0, [0, 0] and 1; a constant difference has a p-value of 0; never NaN.
    """
    from scipy import stats

    difference = values - baseline
    mean, n = float(difference.mean()), len(difference)
    spread = float(difference.std(ddof=1)) if n > 1 else 0.0
    if spread == 0.0:
        return {"difference": mean, "ci95": [mean, mean], "p_value": float(mean == 0.0)}
    error = spread / n**0.5
    half = float(stats.t.ppf(0.975, n - 1)) * error
    p_value = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    return {"difference": mean, "ci95": [mean - half, mean + half], "p_value": p_value}


@dataclass(frozen=True)
class Recipe:
    """What the runs of a comparison are made of, by seed; see `compare`."""

    rules: Mapping[str, Any]
    model: Callable[[int], nn.Module] | None = None
    source: Callable[[int], Source] | None = None
    validation: Callable[[int], Source] | None = None
    test: Callable[[int], Source] | None = None
    learner: Learner | None = None
    loss: Loss = default_loss
    score: ScoreLike = default_score
    optimizer: Callable[..., Any] | None = None

    def parts(self, label: str, seed: int) -> Parts:
        """The parts of one run."""
        model = None
        if self.model is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = self.model(seed)
        source, validation = (
            None if factory is None else factory(seed) for factory in (self.source, self.validation)
        )
        rule = self.rules[label]
        return Parts(
            model, source, validation, self.learner, None, self.loss, self.score, self.optimizer,
            None if isinstance(rule, str) else rule,
        )  # fmt: skip

    def tested(self, config: TrainConfig) -> Source:
        """The test episodes of a run."""
        return build_source(config, "test") if self.test is None else self.test(config.seed)


def compare(
    config: TrainConfig,
    rules: Sequence[str] | Mapping[str, str | Callable[..., Any]],
    seeds: int | Sequence[int] = 2,
    episodes: int = 600,
    out: Path | str | None = None,
    *,
    model: Callable[[int], nn.Module] | None = None,
    source: Callable[[int], Source] | None = None,
    validation: Callable[[int], Source] | None = None,
    test: Callable[[int], Source] | None = None,
    learner: Learner | None = None,
    loss: Loss = default_loss,
    score: ScoreLike = default_score,
    optimizer: Callable[..., Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    jobs: int = 1,
    team: Team = ALONE,
) -> Comparison:
    """Train every rule on every seed and test each run's best validated weights, once.

    For a seed, every rule starts from the same initial weights and sees the same training,
    validation and test episodes; the rules differ in nothing else.

    Args:
        config: the settings; ``rule`` and ``seed`` are replaced.
        rules: names, such as ``["uniform", "agreement", "norm-control"]``; or by the names that they
            shall go by, each a name of a rule or a class or function that makes one anew for each
            seed, such as ``{"uniform": "uniform", "mine": MyRule}``. It is called with those of
            ``objectives``, ``within``, ``columns`` and ``seed`` that it names.
        seeds: their numbers; an int N means 0 to N - 1.
        episodes: test episodes a seed, at least 2.
        out: folder for ``results.json``, plots and ``RULE/seedN`` runs; what is finished there is
            not trained again, what was interrupted goes on. None keeps all in memory.
        model, source, validation, test: functions of a seed that give a model (called under that
            seed) and the episodes of training, validation and test; see `gametalearn.training.train`.
        learner, loss, score, optimizer: as in `gametalearn.training.train`, for every run; tests and
            their tables go by the same score.
        overwrite: train everything anew.
        progress: show progress on stderr.
        jobs: runs trained at once, each in a process of its own with ``config.threads`` threads;
            above 1 it needs ``out``, and what is handed in must pickle. The results do not depend on
            it.
        team: as in `train`; the first process alone writes files. Not together with ``jobs``.

    Raises:
        InputError: unknown or repeated rules, settings or parts that do not fit, or a folder that
            holds runs of other settings.
    """
    named = rules if isinstance(rules, Mapping) else {name: name for name in rules}
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not named or len(named) < len(rules):
        raise InputError(f"`rules`: one or more different rules are needed, got {list(rules)}")
    if not numbers or len(set(numbers)) < len(numbers):
        raise InputError(f"`seeds`: one or more different seeds are needed, got {list(numbers)}")
    if episodes < 2:
        raise InputError(f"`episodes` must be at least 2, got {episodes}")
    if source is not None and test is None:
        raise InputError("compare: a source was handed in; pass test= too, the test episodes")
    folder = None if out is None else Path(out)
    if jobs > 1 and (folder is None or team.size > 1):
        raise InputError(
            f"`jobs` {jobs} keeps its runs in files: give an output folder"
            if team.size == 1
            else f"`jobs` {jobs} makes processes of its own: leave torchrun or `jobs` out"
        )
    recipe = Recipe(
        named, model, source, validation, test, learner, loss, score, optimizer
    )  # fmt: skip
    chosen = {rule for rule in named.values() if isinstance(rule, str)}
    if others := config.rule_options.keys() - chosen:
        raise InputError(
            f"`rule_options`: given for '{min(others)}', which is not among the rules "
            f"{', '.join(named)}"
        )
    first = team.everywhere(lambda: _checked(config, recipe, numbers[0]))
    tested = team.everywhere(lambda: recipe.tested(first.config))
    config = dataclasses.replace(
        first.config, rule=config.rule, seed=config.seed, rule_options=config.rule_options
    )
    given = None if _is_default(first.config) else first.score
    if jobs > 1:
        _check_sendable(jobs, recipe)
    plan = [
        (
            _of_label(config, recipe, label, seed),
            None if folder is None else folder / label.replace(":", "-") / f"seed{seed}",
            label,
            f"{label}, seed {seed}",
        )
        for seed in numbers
        for label in named
    ]
    if jobs > 1:
        _in_processes([(*run, recipe, episodes, overwrite, progress) for run in plan], jobs)
        overwrite = False  # what follows reads the finished runs
    results: dict[str, list[Result]] = {label: [] for label in named}
    for run in plan:
        results[run[2]].append(_run(*run, recipe, episodes, overwrite, progress, team))
    objectives = objective_names(config, tested)
    comparison = Comparison(config, numbers, episodes, objectives, results, given)
    if folder is not None and team.first:
        write_json(folder / "results.json", comparison.as_dict(), indent=2)
    return comparison


def _of_label(config: TrainConfig, recipe: Recipe, label: str, seed: int) -> TrainConfig:
    rule = recipe.rules[label]
    return config.of_rule(rule if isinstance(rule, str) else handed_in(rule), seed)


def _checked(config: TrainConfig, recipe: Recipe, seed: int) -> Run:
    """The first run before its first iteration, after every rule was built once for it."""
    run = None
    for label in recipe.rules:
        parts = recipe.parts(label, seed)
        own = parts.named(_of_label(config, recipe, label, seed))
        run = start(own, parts) if run is None else dataclasses.replace(run, config=own)
        outer_of(run, parts)
    assert run is not None
    return run


def _is_default(config: TrainConfig) -> bool:
    built_in = all(name in BUILT_IN["dataset"] for name in config.datasets) or folders(
        config.dataset
    )
    return config.loss == config.score == "default" and bool(built_in)


def _check_sendable(jobs: int, recipe: Recipe) -> None:
    for field in dataclasses.fields(recipe):
        try:
            pickle.dumps(getattr(recipe, field.name))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(
                f"jobs={jobs}: the {field.name} cannot be sent to other processes "
                f"({summary(error)}); define it at the top level of a module, or take jobs=1"
            ) from error


def _in_processes(plan: list[tuple[Any, ...]], jobs: int) -> None:
    """Carry out `_run` for each entry, ``jobs`` at a time.

    On Ctrl-C and SIGTERM all stop after a checkpoint; then this raises KeyboardInterrupt.
    """
    context = multiprocessing.get_context("spawn")
    waiting, running = list(plan), list[Any]()
    try:
        with interruptible() as interrupted:
            while waiting or running:
                while waiting and len(running) < jobs:
                    process = context.Process(target=_run_quietly, args=waiting.pop(0))
                    with _deaf_to_ctrl_c():
                        process.start()
                    running.append(process)
                multiprocessing.connection.wait([p.sentinel for p in running], timeout=0.2)
                if interrupted():
                    raise KeyboardInterrupt
                for process in [p for p in running if not p.is_alive()]:
                    running.remove(process)
                    if process.exitcode:
                        raise InputError(
                            "a run failed; its message stands above. What was done is kept"
                        )
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join()


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started meanwhile do not see a terminal's Ctrl-C; their parent ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_quietly(config: TrainConfig, *rest: Any) -> None:
    """`_run` in a process of its own: one line for an error, the threads that it may use."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        _run(config, *rest)
    except KeyboardInterrupt:
        sys.exit(130)
    except InputError as error:
        print(f"gametalearn: {rest[2]}: {error}", file=sys.stderr)
        sys.exit(2)


def _end_with_parent() -> None:
    """Where the parent is killed, its child must not train on beside the parent's successor."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(
    config: TrainConfig,
    place: Path | None,
    label: str,
    title: str,
    recipe: Recipe,
    episodes: int,
    overwrite: bool,
    progress: bool,
    team: Team = ALONE,
) -> Result:
    """Train one rule on one seed, and test it unless this very test was done."""
    run = train_parts(
        config, recipe.parts(label, config.seed), place,
        overwrite=overwrite, progress=progress, label=title, team=team,
    )  # fmt: skip
    file = None if place is None else place / "evaluation.json"
    iteration = int(run.best["iteration"])
    stored = team.on_first(lambda: None if file is None else _stored(file, run, episodes))
    if stored is not None:
        return Result(stored, run.seconds, iteration)
    evaluation = run_test(run, episodes, recipe.tested(config))
    if file is not None and team.first:
        write_evaluation(file, evaluation, iteration, config.test_steps)
    return Result(evaluation, run.seconds, iteration)


def run_test(run: Run, episodes: int, source: Source | None = None) -> Evaluation:
    """Test a finished run's best validated weights on the test episodes of its seed."""
    run.load_best()
    protocol = run.config.protocol
    evaluation = evaluate(
        run.model,
        build_source(run.config, "test") if source is None else source,
        run.test_learner,
        episodes,
        stream_seed(run.config.seed, "test"),
        meta=run.meta,
        loss=run.loss,
        score=run.score,
        protocol=None if protocol == "auto" else protocol,  # type: ignore[arg-type]
        team=run.team,
    )
    require_finite(evaluation)
    return evaluation


def require_finite(evaluation: Evaluation) -> None:
    """Raise an `InputError` if an episode's value is NaN or infinite: there is no mean to report."""
    bad = int((~np.isfinite(evaluation.values)).sum())
    if bad:
        raise InputError(
            f"{bad} of {len(evaluation.values)} test episodes diverge ({evaluation.metric} is not "
            "finite); lower `inner_lr` or `test_steps`"
        )


def evaluation_record(evaluation: Evaluation, iteration: int, steps: int) -> dict[str, Any]:
    """The content of ``evaluation.json``, schema ``gametalearn.evaluation/1``."""
    return {
        "schema": "gametalearn.evaluation/1",
        "metric": evaluation.metric,
        evaluation.metric: evaluation.mean,
        "ci95": evaluation.ci95,
        "protocol": evaluation.protocol,
        "episodes": len(evaluation.values),
        "seed": evaluation.seed,
        "iteration": iteration,
        "inner_steps": steps,
        "values": evaluation.values.tolist(),
        "group": evaluation.group.tolist(),
    }


def write_evaluation(file: Path, evaluation: Evaluation, iteration: int, steps: int) -> None:
    """Write `evaluation_record` to a file."""
    write_json(file, evaluation_record(evaluation, iteration, steps))


def _stored(file: Path, run: Run, episodes: int) -> Evaluation | None:
    """This run's test, if it was done before; None if there is none, or a different one."""
    config = run.config
    wanted = {
        "schema": "gametalearn.evaluation/1",
        "metric": run.score.name,
        "protocol": protocol_of(run.model) if config.protocol == "auto" else config.protocol,
        "episodes": episodes,
        "seed": stream_seed(config.seed, "test"),
        "iteration": run.best["iteration"],
        "inner_steps": config.test_steps,
    }
    try:
        stored = json.loads(file.read_text())
        values = np.array(stored["values"], dtype=np.float64)
        group = np.array(stored["group"], dtype=np.int64)
        found = {name: stored[name] for name in wanted}
    except (OSError, LookupError, TypeError, ValueError, OverflowError):
        return None
    if found != wanted or values.shape != (episodes,) or group.shape != (episodes,):
        return None
    return Evaluation(
        values, group, stored["metric"], stored["protocol"], stored["seed"], run.score.format
    )
