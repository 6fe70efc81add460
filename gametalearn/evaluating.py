"""``gametalearn evaluate``: trained runs, each compared with the first on the same episodes."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gametalearn import registry
from gametalearn.adaptation import Learner
from gametalearn.build import objective_names, stream_seed
from gametalearn.config import TrainConfig
from gametalearn.data.lake import WAYS, load_lake
from gametalearn.distributed import Team, joined, use_machine
from gametalearn.episodes import Source
from gametalearn.errors import InputError
from gametalearn.normalisation import Protocol, protocol_of
from gametalearn.progress import counting
from gametalearn.protocols import (
    Evaluations,
    check_lake,
    compared,
    evaluate_all,
    evaluate_lake,
    write_evaluations,
    write_lake,
)
from gametalearn.provenance import checked
from gametalearn.run import Run
from gametalearn.runfolder import load_run
from gametalearn.transfer import (
    SIZES,
    described,
    different,
    episodes_for,
    file_name,
    is_other,
    require_other,
    settings_for,
    usual_classes,
)
from gametalearn.words import counted

__all__ = ["Trial", "require_pair", "run"]

PARTS = ("model", "learner", "loss", "score")


@dataclass(frozen=True)
class Trial:
    """One run's test, planned but not yet run.

    Attributes:
        run: the trained run.
        config: the settings of the episodes and the machine.
        on: the classes that they are drawn from.
        told: what is `different` from the run's own test.
        apart: what else is, in words.
        learner: the inner loop.
        own: the run's protocol.
        protocols: the test's.
        title: which weights of which run, for display.
        folder: the run's.
    """

    run: Run
    config: TrainConfig
    on: str
    told: dict[str, str | int]
    apart: tuple[str, ...]
    learner: Learner
    own: Protocol
    protocols: tuple[Protocol, ...]
    title: str
    folder: Path

    def decides(self, lake: bool) -> dict[str, object]:
        """What determines the episodes and what is measured on them, by name."""
        config, found = self.config, dict[str, object]()
        if not lake:
            names = ("seed", "dataset", *SIZES, "split", "objectives")
            found = {f"`{name}`": getattr(config, name) for name in names}
            if len(config.datasets) > 1:
                found["`share`"] = config.share
            if self.on == "train":
                found["`rotations`"] = config.rotations
            # shuffling consumes random numbers, which changes later episodes
            order = "random" if config.inner_batch > 0 else "by class"
            found["order of support examples"] = order
            found["score"] = self.run.score.name
        return found | {"`protocol`": " and ".join(self.protocols)}


def run(args: argparse.Namespace) -> None:
    """Test as the arguments say."""
    _check_flags(args)
    with joined() as team:
        _together(args, team)


def _together(args: argparse.Namespace, team: Team) -> None:
    given = args.dataset
    others = team.on_first(lambda: [bool(given) and is_other(f, given) for f in args.folders])
    if given is not None and len(others) > 1 and len(set(others)) > 1:
        raise InputError(
            f"--dataset {given} is new data for some of these runs, but others were trained on it; test "
            "one RUN at a time"
        )
    trials, lake = list[Trial](), args.protocol == "lake"
    for folder, other in zip(args.folders, others, strict=True):
        trials.append(_planned(args, folder, team, other))
        if args.seed is None and not lake:  # all are tested on the same episodes
            args.seed = trials[0].config.seed
        team.everywhere(lambda: require_pair(trials[0], trials[-1], lake))
    found = dict[str, Evaluations]()
    for trial in trials:
        use_machine(trial.config, team)
        found[str(trial.folder)] = _lake(args, trial, team) if lake else _tested(args, trial, team)
    if team.first and len(trials) > 1:
        print(f"\n{_heading(args, trials[0])}\n\n{compared(found)}")


def _check_flags(args: argparse.Namespace) -> None:
    if len(set(args.folders)) < len(args.folders):
        raise InputError("evaluate: a RUN is given twice; name each RUN once")
    if (args.protocol == "lake") != (args.source is not None):
        raise InputError(
            "--protocol lake needs --source PATH, the folder or archive of its runs, and no other "
            "protocol takes it"
        )
    for name in ("on", "episodes", "dataset", "seed", *SIZES):
        if args.protocol == "lake" and (value := getattr(args, name)) is not None:
            raise InputError(f"--protocol lake has its own tasks; leave out --{name} {value}")
    if args.query_at_a_time and args.protocol in ("transductive", "inductive"):
        raise InputError(
            f"--query-at-a-time is its own protocol, not {args.protocol}; give it alone, or "
            "with --protocol both or lake"
        )


def _planned(args: argparse.Namespace, folder: Path, team: Team, other: bool) -> Trial:
    """A run as it is to be tested; nothing but its own files is read."""
    if args.on == "all" and not other:
        raise InputError(
            "--on all works only on data that the run was not trained on; give --dataset"
        )
    trained = load_run(
        folder, args.checkpoint, args.device, dataset=None if other else args.dataset,
        trust=args.trust, team=team, **{k: v for k in PARTS if (v := getattr(args, k))},
    )  # fmt: skip
    changes = {k: v for k in ("threads", "seed") if (v := getattr(args, k)) is not None}
    usual = trained.config
    trained.config = config = dataclasses.replace(trained.config, **changes)
    learner = trained.test_learner
    if args.inner_steps is not None:
        learner = trained.learner.for_test(args.inner_steps)
    own: Any = protocol_of(trained.model) if config.protocol == "auto" else config.protocol
    wanted = own if args.protocol in (None, "auto") else args.protocol
    protocols: Any = ["transductive", "inductive"] if wanted in ("both", "lake") else [wanted]
    if args.query_at_a_time:
        protocols = [*(protocols if len(protocols) > 1 else []), "query-at-a-time"]
    dataset = args.dataset if other else None
    if dataset is not None:
        team.on_first(lambda: require_other(config, folder, dataset))

    def settings() -> TrainConfig:
        shape = trained.input_shape
        try:
            return settings_for(config, learner, shape, dataset=dataset, **_sizes(args))
        except InputError as error:  # which of several runs is it?
            if len(args.folders) == 1:
                raise
            raise InputError(f"{folder}: {error}") from error

    tested = team.everywhere(settings)
    if wanted == "lake":
        team.everywhere(lambda: check_lake(config))
    on = args.on or usual_classes(dataset)
    title = f"{folder} ({args.checkpoint}, iteration {trained.iteration})"
    told = different(config, tested, on, other=other)
    apart = {
        counted(learner.steps, "inner step"): learner.steps != trained.test_learner.steps,
        f"seed {config.seed}": config.seed != usual.seed,
    }
    names = tuple(name for name, differs in apart.items() if differs)
    return Trial(trained, tested, on, told, names, learner, own, tuple(protocols), title, folder)


def require_pair(first: Trial, other: Trial, lake: bool = False) -> None:
    """Refuse two runs whose per-episode values do not measure the same thing.

    Raises:
        InputError: the tests differ in their episodes, their score or their protocol.
    """
    ours = first.decides(lake)
    for name, value in other.decides(lake).items():
        if value != ours.get(name):
            may = name.strip("`") in ("dataset", "protocol", *SIZES)
            remedy = f"set {name} for both, or test them one by one"
            raise InputError(
                f"{other.folder} cannot be paired with {first.folder}: {name} is {value}, not "
                f"{ours.get(name)}; {remedy if may else 'test them one by one'}"
            )


def _tested(args: argparse.Namespace, trial: Trial, team: Team) -> Evaluations:
    """Test a run under each protocol; print the result and write it to the run's folder."""
    config, trained, other = trial.config, trial.run, "dataset" in trial.told
    if not other and not args.trust:
        repeated = {} if args.dataset is None else {"dataset": args.dataset}
        registry.refuse_untrusted(config.as_dict(), ("dataset",), repeated, trial.folder)

    def source_of() -> Source:
        if not other and trained.out is not None:
            checked(trained.out, trained.config)
        return episodes_for(config, trained.input_shape, trial.on, _sizes(args))

    source, episodes = team.everywhere(source_of), _count(args)
    show = team.first and not args.quiet
    with counting(f"evaluate {trial.folder}", episodes * len(trial.protocols), show) as tick:
        found = evaluate_all(
            trained.model, source, trial.learner, episodes, stream_seed(config.seed, trial.on),
            trial.protocols, meta=trained.meta, loss=trained.loss, score=trained.score,
            progress=tick, team=team,
        )  # fmt: skip
    if team.first:
        names = objective_names(config, source)
        what = ", ".join(filter(None, [described(trial.told), *trial.apart]))
        joint = " on " if "on" in trial.told else ", " if what else ""
        for result in found.values():
            print(f"{trial.title}{joint}{what}: {result}")
            if len(names) > 1:
                for group in result.by_group():
                    print(f"  {names[group]}: {result.of_group(group)}")
        place = trial.folder / file_name(trial.told)
        write_evaluations(
            place, found, trial.own, trained.iteration, trial.learner.steps, **trial.told
        )
    return found


def _sizes(args: argparse.Namespace) -> dict[str, int | None]:
    """Ways, shots and queries; None where they were not given."""
    return {name: getattr(args, name) for name in SIZES}


def _count(args: argparse.Namespace) -> int:
    return 1000 if args.episodes is None else int(args.episodes)


def _heading(args: argparse.Namespace, trial: Trial) -> str:
    """What all runs of a table were tested on."""
    if args.protocol == "lake":
        return f"Lake's one-shot task, {WAYS} runs, the same for every model"
    config = trial.config
    sizes = SIZES[1 if config.regression else 0 :]
    what = {"dataset": config.dataset, "on": trial.on} | {k: getattr(config, k) for k in sizes}
    return f"{described(what)}: {counted(_count(args), 'episode')}, the same for every run"


def _lake(args: argparse.Namespace, trial: Trial, team: Team) -> Evaluations:
    """Lake's one-shot task; 20 tasks need not be split over processes."""
    if not team.first:
        return {}
    trained = trial.run
    found = evaluate_lake(
        trained.model, load_lake(args.source), trial.learner, trial.protocols, meta=trained.meta,
        loss=trained.loss,
    )  # fmt: skip
    records = write_lake(
        trial.folder / "lake.json", found, trial.own, trained.iteration, trial.learner.steps
    )
    for protocol, record in records.items():
        print(
            f"{trial.title}: Lake's one-shot task, error rate {100 * record['error_rate']:.2f}% +/- "
            f"{100 * record['ci95']:.2f}% (mean of {len(record['runs'])} runs, standard deviation "
            f"{100 * record['std']:.2f}%, {protocol})"
        )
    return found
