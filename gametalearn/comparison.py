"""The honest comparison: every rule from the same weights, on the same episodes, over seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import nn

from gametalearn.adaptation import Learner
from gametalearn.build import objective_names
from gametalearn.config import TrainConfig
from gametalearn.distributed import ALONE, Team
from gametalearn.episodes import Source
from gametalearn.errors import InputError, require_whole
from gametalearn.jobs import Planned, Terms, begun, runs_of, train_and_test
from gametalearn.live import Standing
from gametalearn.losses import Loss, default_loss
from gametalearn.progress import brought_to
from gametalearn.provenance import other_settings, same_run
from gametalearn.results import Comparison, Result, write_results
from gametalearn.run import Watch
from gametalearn.runfolder import settings_in, start_over
from gametalearn.scores import ScoreLike, default_score
from gametalearn.singles import Asked, check_given, collected, single_runs
from gametalearn.terminal import tell
from gametalearn.training import warn_of_same
from gametalearn.workers import check_sendable, in_processes

__all__ = ["Comparison", "compare"]


def compare(
    config: TrainConfig,
    rules: Sequence[str] | Mapping[str, str | Callable[..., Any]],
    seeds: int | Sequence[int] = 5,
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
    primary: Sequence[str] = (),
    single: Asked = False,
    overwrite: bool = False,
    progress: bool = True,
    jobs: int = 1,
    team: Team = ALONE,
    command: str | None = None,
    watch: Watch | None = None,
) -> Comparison:
    """Train every rule on every seed and test each run's best validated weights, once.

    For a seed, every rule starts from the same initial weights and sees the same training,
    validation and test episodes; the rules differ in nothing else.

    Args:
        config: the settings; ``rule`` and ``seed`` are replaced.
        rules: names, such as ``["uniform", "agreement", "norm-control"]``; or a dictionary from
            the names to report to rules, each the name of a rule, or a class or function that makes one
            for each seed, such as ``{"uniform": "uniform", "mine": MyRule}``. It is called with those of
            ``objectives``, ``within``, ``columns`` and ``seed`` that it names.
        seeds: their numbers; an int N means 0 to N - 1. With fewer than 3 there is no interval and
            no test; if seeds are added later, only they are trained.
        episodes: test episodes for each seed, at least 2.
        out: folder for ``results.json``, plots and ``RULE/seedN`` runs; what is finished there is
            not trained again, and what was interrupted continues. None keeps all in memory.
        model, source, validation, test: functions of a seed that give a model (called under that
            seed) and the episodes of training, validation and test; see `gametalearn.train`.
        learner, loss, score, optimizer: as in `gametalearn.train`, for every run; tests and their
            tables go by the same score.
        primary: rules whose differences count most, named before anything is seen: their p-values
            are adjusted among themselves, those of the others among the others.
        single: of several data sets, also train a model of each one alone, on as many of its tasks as
            the rules see, for the relative changes Delta_m (`gametalearn.tradeoffs`). A mapping names
            for some of them folders whose ``seedN`` are runs that are there; they are tested, and the
            other objectives' trained.
        overwrite: train everything again. What was there is deleted before the first training, so that
            the same call without it continues if this one is interrupted.
        progress: show progress on stderr.
        jobs: runs trained at once, each by a worker process with ``config.threads`` threads;
            above 1 it needs ``out``, and what is handed in must pickle. The results do not depend on
            it.
        team: as in `train`; the first process alone writes files. Not together with ``jobs``.
        command: the command line, which ``results.json`` keeps.
        watch: as in `gametalearn.train`, called for every run.

    Raises:
        InputError: unknown or repeated rules, settings or parts that do not fit, or a folder that
            holds runs of other settings.
    """
    named, numbers = _rules(rules), _seeds(seeds)
    folder = None if out is None else Path(out)
    require_whole("`episodes`", episodes, 2)
    require_whole("`jobs`", jobs, 1)
    if source is not None and test is None:
        raise InputError("compare: a source was handed in; pass test= too, the test episodes")
    if jobs > 1 and (folder is None or team.size > 1):
        raise InputError(
            f"`jobs` {jobs} needs a folder for its runs; give `out`"
            if team.size == 1
            else f"`jobs` {jobs} starts processes of its own; leave out either torchrun or `jobs`"
        )
    baseline = "uniform" if "uniform" in named else next(iter(named))
    for rule in primary:
        if rule not in named or rule == baseline:
            raise InputError(
                f"`primary`: '{rule}' is not compared with '{baseline}'; name some of "
                f"{', '.join(named)} other than that"
            )
    terms = Terms(
        named, model, source, validation, test, learner, loss, score, optimizer, episodes,
        overwrite, progress, watch,
    )  # fmt: skip
    runs = runs_of(config, named, numbers, folder)
    alone = single_runs(config, single, numbers, folder, terms)
    runs = sorted([*runs, *alone], key=lambda run: numbers.index(run.config.seed))
    first = team.everywhere(lambda: begun(runs, terms))
    team.on_first(lambda: check_given(config, single, numbers, first.input_shape, terms))
    tested = team.everywhere(lambda: terms.tests(first.config))
    team.on_first(lambda: warn_of_same(first.source, tested, "test"))
    if progress and team.first and (text := brought_to(config)):
        tell(f"compare: {text} (settings image_size and channels)")
    if jobs > 1:
        check_sendable(jobs, terms)
    if not overwrite:
        team.on_first(lambda: _free(runs, first.config))
    else:
        team.on_first(lambda: _start_over(runs, folder))
    there = [run for run in runs if not overwrite and run.tested and run.tested.exists()]
    standing = Standing(
        [*named, *dict.fromkeys(run.rule for run in alone)], numbers, baseline,
        alone={run.rule for run in alone}, there=[(r.rule, r.config.seed) for r in there],
        jobs=jobs, show=progress and team.first,
    )  # fmt: skip
    failed: dict[str, str] = {}
    if jobs > 1:
        failed = in_processes([run for run in runs if run not in there], terms, jobs, standing)
        terms = dataclasses.replace(terms, overwrite=False)  # what follows reads the finished runs
    results: dict[str, list[Result]] = {run.rule: [] for run in runs}
    for run in [] if failed else runs:
        outlook = standing.begin(run.rule, run.config.seed)
        try:
            result = train_and_test(run, terms, team, outlook)
        except InputError as error:
            if folder is None or team.size > 1:
                raise
            failed[run.label] = str(error)  # the others go on: what they find is kept
            continue
        standing.end(run.rule, run.config.seed, result.evaluation)
        results[run.rule].append(result)
    if failed:
        raise InputError(_told(failed, runs))
    shared = dataclasses.replace(
        first.config, rule=config.rule, seed=config.seed, rule_options=config.rule_options
    )
    singles = collected(shared, results, single, numbers, terms, team)
    comparison = Comparison(
        shared, numbers, episodes, objective_names(shared, tested),
        {rule: results[rule] for rule in named}, first.score, tuple(primary), command, singles,
    )  # fmt: skip
    if folder is not None and team.first:
        write_results(folder, comparison)
    return comparison


def _rules(rules: Any) -> dict[str, str | Callable[..., Any]]:
    """The rules by their names; a rule that is given by its name has that."""
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        raise InputError(f"`rules` must be a list of names, such as ['uniform']; got {rules!r}")
    given = list(rules.items() if isinstance(rules, Mapping) else ((rule, rule) for rule in rules))
    for name, rule in given:
        if not isinstance(name, str):
            raise InputError(f"`rules`: {name!r} needs a name, as in {{'mine': MyRule}}")
        if not isinstance(rule, str) and not callable(rule):
            raise InputError(
                f"`rules` '{name}': {rule!r} is neither a rule's name nor a class or function that makes one"
            )
    if not given or len(dict(given)) < len(given):
        raise InputError(
            f"`rules` must name at least one rule, and each rule once; got {[n for n, _ in given]}"
        )
    return dict(given)


def _seeds(seeds: Any) -> tuple[int, ...]:
    """The numbers of the seeds, which `runs_of` checks; N stands for 0 to N - 1."""
    if isinstance(seeds, bool | str) or not isinstance(seeds, Integral | Iterable):
        raise InputError(f"`seeds` must be a number of seeds or a list of them, got {seeds!r}")
    numbers = range(int(seeds)) if isinstance(seeds, Integral) else seeds
    return tuple(
        n if isinstance(n, bool) or not isinstance(n, Integral) else int(n) for n in numbers
    )


def _start_over(runs: Sequence[Planned], folder: Path | None) -> None:
    """Keep nothing that was there: if this one is interrupted, what goes on must not take it for its own."""
    if folder is not None:
        (folder / "results.json").unlink(missing_ok=True)
    for run in runs:
        if run.place is not None:
            start_over(run.place)


def _free(runs: Sequence[Planned], first: TrainConfig) -> None:
    """Refuse a folder with a run of other settings, before anything is trained.

    Args:
        runs: all of them.
        first: the settings of the first, with the names of what was handed in to all.

    Raises:
        InputError: as training would, later.
    """
    own = vars(runs[0].config)
    named = {k: v for k, v in vars(first).items() if v != own[k] and not k.startswith("rule")}
    for run in runs:
        if run.place is not None and (run.place / "checkpoint.pt").exists():
            there, config = settings_in(run.place), dataclasses.replace(run.config, **named)
            if not same_run(there, config, exact=True):
                raise InputError(other_settings(run.place, there, config, exact=True))


def _told(failed: Mapping[str, str], runs: Sequence[Planned]) -> str:
    """Why there are no results: the runs that failed, by their labels."""
    first, *others = [run.label for run in runs if run.label in failed]
    also = f"; failed as well: {'; '.join(others)}" if others else ""
    kept = "; the other runs are finished and kept: the same command without the rule reports them"
    return f"{first}: {failed[first]}{also}{kept if len(failed) < len(runs) else ''}"
