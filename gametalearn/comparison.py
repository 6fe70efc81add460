"""The honest comparison: every rule from the same weights, on the same episodes, over seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from gametalearn.build import objective_names
from gametalearn.config import TrainConfig
from gametalearn.distributed import ALONE, Team
from gametalearn.errors import InputError
from gametalearn.jobs import Terms, check_sendable, in_processes, runs_of, train_and_test
from gametalearn.live import Standing
from gametalearn.losses import Loss, default_loss
from gametalearn.results import Comparison, Result, write_results
from gametalearn.scores import ScoreLike, default_score
from gametalearn.training import score_of

__all__ = ["Comparison", "compare"]


def compare(
    config: TrainConfig,
    rules: Sequence[str],
    seeds: int | Sequence[int] = 5,
    episodes: int = 600,
    out: Path | str | None = None,
    *,
    loss: Loss = default_loss,
    score: ScoreLike = default_score,
    primary: Sequence[str] = (),
    overwrite: bool = False,
    progress: bool = True,
    jobs: int = 1,
    team: Team = ALONE,
    command: str | None = None,
) -> Comparison:
    """Train every rule on every seed and test each run's best validated weights, once.

    For a seed, every rule starts from the same initial weights and sees the same training,
    validation and test episodes; the rules differ in nothing else.

    Args:
        config: the settings; ``rule`` and ``seed`` are replaced.
        rules: names, such as ``["uniform", "agreement", "norm-control"]``.
        seeds: their numbers; an int N means 0 to N - 1. With fewer than 3 there is no interval and
            no test; those that are added later are trained alone.
        episodes: test episodes for each seed, at least 2.
        out: folder for ``results.json``, plots and ``RULE/seedN`` runs; what is finished there is
            not trained again, what was interrupted goes on. None keeps all in memory.
        loss, score: as in `train`, for every run; tests and their tables go by the same score.
        primary: rules whose differences count most, named before anything is seen: their p-values
            are adjusted among themselves, those of the others among the others.
        overwrite: train everything anew.
        progress: show progress on stderr.
        jobs: runs trained at once, each in a process of its own with ``config.threads`` threads;
            above 1 it needs ``out``. The results do not depend on it.
        team: as in `train`; the first process alone writes files. Not together with ``jobs``.
        command: the command line, which ``results.json`` keeps.

    Raises:
        InputError: unknown or repeated rules, settings that do not fit, or a folder that holds
            runs of other settings.
    """
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    folder = None if out is None else Path(out)
    if episodes < 2:
        raise InputError(f"--episodes must be at least 2, got {episodes}")
    if jobs > 1 and (folder is None or team.size > 1):
        raise InputError(
            f"--jobs {jobs} keeps its runs in files: give an output folder"
            if team.size == 1
            else f"--jobs {jobs} makes processes of its own: leave torchrun or --jobs out"
        )
    runs = team.everywhere(lambda: runs_of(config, rules, numbers, folder))
    baseline = "uniform" if "uniform" in rules else rules[0]
    for rule in primary:
        if rule not in rules or rule == baseline:
            raise InputError(
                f"--primary: '{rule}' is not compared with '{baseline}'; name some of --rules "
                f"{','.join(rules)} other than that"
            )
    given = None
    if loss is not default_loss or score is not default_score:
        given = team.everywhere(lambda: score_of(runs[0].config, loss, score))
    terms = Terms(loss, score, episodes, overwrite, progress)
    if jobs > 1:
        check_sendable(jobs, terms)
    there = [run for run in runs if not overwrite and run.tested and run.tested.exists()]
    standing = Standing(
        rules, numbers, baseline, there=[(r.config.rule, r.config.seed) for r in there],
        jobs=jobs, show=progress and team.first,
    )  # fmt: skip
    if jobs > 1:
        in_processes([run for run in runs if run not in there], terms, jobs, standing)
        terms = dataclasses.replace(terms, overwrite=False)  # what follows reads the finished runs
    results: dict[str, list[Result]] = {rule: [] for rule in rules}
    for run in runs:
        standing.begin(run.config.rule, run.config.seed)
        result = train_and_test(run, terms, team)
        standing.end(run.config.rule, run.config.seed, result.evaluation)
        results[run.config.rule].append(result)
    comparison = Comparison(
        config, numbers, episodes, objective_names(config, "test"), results, given,
        tuple(primary), command,
    )  # fmt: skip
    if folder is not None and team.first:
        write_results(folder, comparison, overwrite)
    return comparison
