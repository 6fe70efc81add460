"""``gametalearn probe``: probes a run's checkpoints, and writes tables, ``probe.json`` and plots."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from gametalearn import registry
from gametalearn.build import build_optimizer, build_rule
from gametalearn.canvas import drawing
from gametalearn.checkpoint import file_of, kept_in, load_checkpoint
from gametalearn.config import TrainConfig
from gametalearn.environment import environment
from gametalearn.errors import InputError
from gametalearn.files import make_folder, replacing, write_json
from gametalearn.flags import given_by, merged
from gametalearn.probing.found import Probe
from gametalearn.probing.measure import probe
from gametalearn.probing.shown import gains_figure, table
from gametalearn.probing.steps import Step, through
from gametalearn.progress import counting
from gametalearn.run import Run
from gametalearn.runfolder import load_run
from gametalearn.settings import check, refuse_other_options, refuse_unused, settings_of, unmet
from gametalearn.weighting import Rule, shared_columns

__all__ = ["SCHEMA", "run"]

SCHEMA = "gametalearn.probe/1"

PARTS = ("model", "learner", "loss", "score")

RUN_S_OWN = {"dataset", "seed", "device", "threads", *PARTS}
"""Flags of `probe` that are named like settings, but do not change the run's."""


def run(args: argparse.Namespace) -> None:
    """Probe as the arguments say."""
    out: Path = args.folder if args.out is None else args.out
    if isinstance(args.rules, str):
        for name in _named(args.rules):
            registry.require_known("rule", name)
    found: list[dict[str, Any]] = []
    written = [out / "probe.json"]
    for checkpoint in _checkpoints(args):
        trained = load_run(
            args.folder, checkpoint, args.device, dataset=args.dataset, trust=args.trust,
            **{kind: value for kind in PARTS if (value := getattr(args, kind))},
        )  # fmt: skip
        make_folder(out)
        rules = _rules(args, trained, told=bool(found))
        trained.config = config = _settings(args, trained.config, rules)
        result = _probe(args, trained, rules, file_of(args.folder, checkpoint))
        named = "" if checkpoint.isdecimal() else f"{checkpoint}, "
        title = f"{args.folder} ({named}iteration {trained.iteration})"
        print(table(result, title), end="\n\n", flush=True)
        found.append({
            "checkpoint": checkpoint, "iteration": trained.iteration, "config": config.as_dict(),
            **result.as_dict(),
        })  # fmt: skip
        about = environment(config, args.command_line)
        content = {"schema": SCHEMA, "run": str(args.folder), "environment": about}
        write_json(written[0], {**content, "checkpoints": found})
        written.append(out / f"probe-{checkpoint}.png")
        picture = gains_figure(result, title)
        with drawing(), replacing(written[-1]) as stream:
            picture.savefig(stream, dpi=150, format="png")
    print(f"wrote {', '.join(map(str, written))}")


def _named(rules: str) -> list[str]:
    return [name.strip() for name in rules.split(",") if name.strip()]


def _rules(args: argparse.Namespace, trained: Run, told: bool) -> list[str]:
    """The names of the rules: those that were asked for, or the usual ones that suit the learner."""
    if isinstance(args.rules, str):
        return _named(args.rules)
    rules = list(args.rules)
    if trained.learner_now.steps == 0 and "agreement-update" in rules:
        rules.remove("agreement-update")
        if not told:
            print("gametalearn: agreement-update is left out: it compares inner updates, and with 0 inner "
                  "steps there are none", file=sys.stderr)  # fmt: skip
    return rules


def _checkpoints(args: argparse.Namespace) -> list[str]:
    """The requested checkpoints; ``all`` means those that were kept, and the latest."""
    found: list[str] = []
    for name in filter(None, (name.strip() for name in args.checkpoint.split(","))):
        found += _every(args.folder) if name == "all" else [name]
    for name in found:
        file_of(args.folder, name)  # reports an unknown name before anything is measured
    if not found:
        raise InputError("`checkpoint`: name one or more, such as latest")
    return list(dict.fromkeys(found))


def _every(folder: Path) -> list[str]:
    """Those that were kept, and the latest, unless it is the last of them."""
    kept = list(map(str, kept_in(folder)))
    latest = str(load_checkpoint(file_of(folder, "latest"))["iteration"])
    return kept if latest in kept else [*kept, "latest"]


def _settings(args: argparse.Namespace, config: TrainConfig, rules: list[str]) -> TrainConfig:
    """The run's settings, overridden by those that were given; options of rules are added to its own."""
    given = {k: v for k, v in given_by(args).items() if k not in RUN_S_OWN}
    options: dict[str, dict[str, Any]] = given.pop("rule_options", {})
    check(settings_of(config)["rule_options"], options)
    refuse_other_options(options, rules, rules)
    given["rule_options"] = merged(config.rule_options, options)
    threads = args.threads or torch.get_num_threads()  # the run's own suit several runs at once
    found = dataclasses.replace(config, threads=threads, **given)
    for name in given:
        field = settings_of(found)[name]
        if other := unmet(field, vars(found)):
            refuse_unused(field, other, f"`{other}` {getattr(found, other)}")
    return found


def _probe(args: argparse.Namespace, trained: Run, rules: list[str], file: Path) -> Probe:
    config = trained.config
    torch.set_num_threads(config.threads)
    if not args.trust:
        given = {} if args.dataset is None else {"dataset": args.dataset}
        registry.refuse_untrusted(config.as_dict(), ("dataset",), given, args.folder)
    tasks = config.meta_batch
    reference = math.ceil(args.reference / tasks)
    with _counting(f"probe {file}", reference, args.meta_batches, not args.quiet) as tick:
        return probe(
            trained.model,
            trained.episodes("train"),
            trained.learner_now,
            {name: _rule(name, trained) for name in rules},
            meta=trained.meta,
            loss=trained.loss,
            score=trained.score,
            optimizer=_step(trained, file, args.trust),
            meta_batch=tasks,
            meta_batches=args.meta_batches,
            reference=args.reference,
            length=args.length,
            seed=args.seed,
            constant_memory=config.constant_memory,
            progress=tick,
        )


@contextmanager
def _counting(
    label: str, reference: int, meta_batches: int, show: bool
) -> Iterator[Callable[[int], None]]:
    """Two counts one after the other, as a meta-batch of the reference takes a small part of another's time."""
    with ExitStack() as stack:
        tick = stack.enter_context(counting(f"{label}: reference", reference, show, "meta-batches"))
        done = 0

        def advance(more: int) -> None:
            nonlocal tick, done
            tick(more)
            done += more
            if done == reference:
                stack.close()
                tick = stack.enter_context(counting(label, meta_batches, show, "meta-batches"))

        yield advance


def _rule(name: str, trained: Run) -> Rule:
    """A rule in its initial state, with its options: those that were given, or the run's."""
    config, shapes = trained.config, {part: p.shape for part, p in trained.meta.items()}
    columns = shared_columns(shapes, config.shared or None)
    return build_rule(config.of_rule(name, config.seed), len(trained.objectives), columns)


def _step(trained: Run, file: Path, trust: bool) -> Step | None:
    """The step of the run's optimiser, if it can be built and the file has its state.

    Schedules end at rates so small that next to nothing would change, so the run's first rate is used.
    """
    config, content = trained.config, load_checkpoint(file)
    name, lacks = config.meta_optimizer, ""
    if registry.is_handed_in(name):
        lacks = "the run's own was passed in"
    elif registry.from_outside("meta_optimizer", name) and not trust:
        lacks = f"the run's own is {name}, which is imported only with --trust"
    elif "optimizer" not in content:
        lacks = f"{file} does not contain its state"
    if lacks:
        print(f"gametalearn: the optimiser's steps are not measured: {lacks}", file=sys.stderr)
        return None
    made = build_optimizer(config, list(trained.meta.items()))
    optimizer: torch.optim.Optimizer = made[0] if isinstance(made, tuple) else made
    optimizer.load_state_dict(content["optimizer"])
    own = config.meta_optimizer not in registry.BUILT_IN["meta_optimizer"]
    return through(
        optimizer,
        lr=None if own else config.meta_lr,
        clip_value=config.clip_value or None,
        clip_norm=config.clip_norm or None,
    )
