"""What each command of the command line does with its arguments."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gametalearn import places, registry
from gametalearn.config import TrainConfig
from gametalearn.distributed import joined, use_machine
from gametalearn.errors import InputError
from gametalearn.flags import given_by
from gametalearn.terminal import tell
from gametalearn.words import counted

if TYPE_CHECKING:
    from gametalearn.run import Watch

__all__ = ["bench", "compare", "data", "episodes", "evaluate", "probe", "report", "train"]


def config_of(args: argparse.Namespace, **more: Any) -> TrainConfig:
    """The settings that flags and a configuration file give, and the defaults of the others."""
    config = TrainConfig.of(**{**given_by(args), **more})
    return (
        config if config.threads else dataclasses.replace(config, threads=torch.get_num_threads())
    )


def data(args: argparse.Namespace) -> None:
    """Prepare data sets, or list what is there."""
    from gametalearn.data.catalog import clean, describe, prepare
    from gametalearn.data.packed import data_root

    root = data_root()
    if args.skip_bad and args.name != "mini-imagenet":
        raise InputError("--skip-bad is an option of data prepare mini-imagenet; leave it out")
    if args.source is not None and args.name == "glyphs":
        raise InputError(
            "--source does not apply to glyphs, which are drawn and not read; leave it out"
        )
    if args.action == "list":
        if args.name or args.source:
            raise InputError(f"data list takes no name or source, got '{args.name or args.source}'")
        print(f"data sets in {root}")
        for name, state in describe(root):
            print(f"{name:14} {state}")
        return
    if args.action == "clean":
        print("\n".join(clean(root, args.name) or [f"no packed copies of folders in {root}"]))
        return
    if not args.name:
        raise InputError(
            "data prepare: name one of the data sets omniglot, mini-imagenet or glyphs"
        )
    print(prepare(args.name, root, args.source, skip_bad=args.skip_bad))


def episodes(args: argparse.Namespace) -> None:
    """Sample episodes, and draw them."""
    from gametalearn.build import build_source
    from gametalearn.episodes import EpisodeSampler
    from gametalearn.sheet import ROWS, contact_sheet, drawn_of
    from gametalearn.tables import subject

    config = config_of(args)
    if args.episodes < 1:
        raise InputError(f"`episodes` must be at least 1, got {args.episodes}")
    source = build_source(config, args.on)
    batch = source.sample(args.episodes)
    print(
        f"{counted(len(batch), 'episode')} of {places.shown(config.dataset)} ({args.on}), seed {config.seed}: "
        f"support {tuple(batch.support_x.shape[1:])}, query {tuple(batch.query_x.shape[1:])}"
    )
    if not isinstance(source, EpisodeSampler) or batch.classes is None:
        if config.regression:
            raise InputError(f"episodes draws images; {places.shown(config.dataset)} has none")
        raise InputError("episodes draws one data set at a time; name one with `dataset`")
    data, names = source.dataset, []
    for i, classes in enumerate(batch.classes.tolist()):
        names.append([data.classes[c] for c in classes])
        groups = sorted({data.groups[int(data.class_group[c])] for c in classes})
        print(f"  {i + 1}: {_listed(names[-1], ROWS)}  [{_listed(groups, ROWS)}]")
    title = f"{subject(config.as_dict())} ({args.on}), seed {config.seed}"
    shown = drawn_of(batch, config.ways)
    file = contact_sheet(batch, args.out, config.ways, names, title)
    print(f"wrote {file}{f', with {shown}' if shown else ''}")


def _listed(names: list[str], most: int) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def train(args: argparse.Namespace) -> None:
    """Meta-train one model."""
    from gametalearn.training import train

    with joined() as team:
        config, out = team.on_first(lambda: _run_of(args))
        use_machine(config, team)
        moved = args.resume is not None and args.dataset is not None
        run = train(
            config, out, overwrite=args.overwrite, progress=not args.quiet, team=team, moved=moved,
            watch=_watch(args),
        )  # fmt: skip
        value = run.best["value"] * (1 if run.score.higher_is_better else -1)
        if team.first:
            print(
                f"{counted(run.iteration, 'iteration')} in {run.elapsed:.0f} s (training alone: "
                f"{run.seconds:.0f} s); best validation "
                f"{run.score.name} {run.score.show(value)} at iteration {run.best['iteration']}; next: "
                f"gametalearn evaluate {out}"
            )


def _watch(args: argparse.Namespace) -> Watch | None:
    """What logs for ``--tensorboard``."""
    if not args.tensorboard:
        return None
    from gametalearn.tensorboard import TensorBoard

    return TensorBoard()


def _run_of(args: argparse.Namespace) -> tuple[TrainConfig, Path]:
    """The settings of a run, given by flags or by the run that goes on, and its folder."""
    from gametalearn.resuming import as_before, with_changes
    from gametalearn.runfolder import config_in, settings_in

    if args.resume is None:
        if args.trust:
            raise InputError("--trust needs --resume RUN: it imports what the run's files name")
        if args.out is None:
            raise InputError(
                "train: give --out RUN, the folder that keeps the model, or --resume RUN"
            )
        # without a rule its options would pass, as in a comparison of several
        rule = args.rule or TrainConfig.rule
        config = config_of(args, rule=rule)
        if (args.out / "config.toml").exists() and not args.overwrite:
            config = as_before(config, settings_in(args.out), given_by(args))
        return config, args.out
    if args.overwrite:
        raise InputError(
            "--resume continues a run and --overwrite starts over; give only one of them"
        )
    if args.out is not None and args.out != args.resume:
        raise InputError(
            f"--resume {args.resume} writes to that folder; leave out --out {args.out}"
        )
    given = given_by(args)
    named = {kind: given[kind] for kind in registry.KINDS if kind in given}
    config = with_changes(config_in(args.resume, named, trust=args.trust), given, args.resume)
    if args.dataset is not None and args.dataset != config.dataset:
        from gametalearn.provenance import relocated

        config = relocated(config, args.dataset)
    return config, args.resume


def evaluate(args: argparse.Namespace) -> None:
    """Test trained runs, each beside the first."""
    from gametalearn.evaluating import run

    run(args)


def compare(args: argparse.Namespace) -> None:
    """Train several rules, and compare them."""
    from gametalearn.cautions import at_once
    from gametalearn.comparison import compare
    from gametalearn.jobs import Terms, begun, commands_of, runs_of
    from gametalearn.progress import duration
    from gametalearn.report import plot_comparison, write_report
    from gametalearn.singles import asked, single_runs
    from gametalearn.tables import WIDTH

    began = time.monotonic()
    with joined() as team:
        config = team.on_first(lambda: config_of(args))
        use_machine(config, team)
        rules, primary = (
            [name.strip() for name in names.split(",") if name.strip()]
            for names in (args.rules, args.primary)
        )
        try:
            seeds = [int(s) for s in args.seeds.rstrip(",").split(",")]
        except ValueError:
            raise InputError(
                f"--seeds takes a number, or a list such as 0,1,2 or 7, (the seed 7); got '{args.seeds}'"
            ) from None
        if seeds[0] < 1 and "," not in args.seeds:
            raise InputError(
                f"--seeds must be at least 1, got {seeds[0]}; the seed {seeds[0]} is {seeds[0]},"
            )
        numbers = seeds if "," in args.seeds else range(seeds[0])
        if args.plan:
            if team.first:
                terms = Terms({rule: rule for rule in rules}, episodes=args.episodes)
                runs = runs_of(config, terms.rules, numbers, args.out)
                begun(runs, terms)  # what does not fit is found here, not in a cluster's queue
                runs += single_runs(config, asked(args.single), numbers, args.out, terms)
                _print_plan(commands_of(runs, args.overwrite))
                if args.overwrite:
                    tell(
                        "gametalearn: collect the runs by the same command without --plan and --overwrite"
                    )
            return
        comparison = compare(
            config, rules, numbers, args.episodes, args.out, primary=primary,
            single=asked(args.single), overwrite=args.overwrite, progress=not args.quiet,
            jobs=args.jobs, team=team, command=args.command_line, watch=_watch(args),
        )  # fmt: skip
        if team.first:
            print(comparison.table(), flush=True)
            for caution in at_once(args.out, comparison.as_dict()):
                print(textwrap.fill(caution, WIDTH), flush=True)
            print(
                f"\nThis took {duration(time.monotonic() - began)}, with validation and tests; training "
                f"alone, summed over the runs, took {duration(comparison.seconds)}."
            )
            files = [args.out / "results.json", *plot_comparison(comparison, args.out)]
            print(f"\nwrote {', '.join(map(str, [*files, write_report(args.out)]))}")


def _print_plan(lines: list[str]) -> None:
    print("\n".join(lines))
    if any(set(line) & set("'\"\\") for line in lines):
        tell("gametalearn: xargs removes quotes; write | tr '\\n' '\\0' | xargs -0 -n 1 sh -c")


def probe(args: argparse.Namespace) -> None:
    """Measure weighting rules one step ahead."""
    from gametalearn.probing.command import run

    run(args)


def report(args: argparse.Namespace) -> None:
    """Write the report of a finished comparison."""
    from gametalearn.report import write_report

    print(f"wrote {write_report(args.folder)}")


def bench(args: argparse.Namespace) -> None:
    """Time a meta-gradient beside learn2learn's."""
    from gametalearn.benchmark.command import run

    run(args)
