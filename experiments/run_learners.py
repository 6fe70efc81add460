"""Compare learners at one budget: each with every seed, on the same episodes, with the plain mean as rule.

Writes what `gametalearn compare` writes, with learners in the place of rules: ``results.json``, the table, and
differences from the first learner over seeds. What is finished below --out is not run again.

example:
  python experiments/run_learners.py --config experiments/configs/learners.toml --jobs 2 --out runs/learners
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from gametalearn import InputError, TrainConfig, keep_memory
from gametalearn.distributed import ALONE
from gametalearn.jobs import Planned, Terms, place_of, train_and_test
from gametalearn.live import Standing
from gametalearn.results import Comparison, Result, write_results
from gametalearn.settings import read_toml
from gametalearn.workers import in_processes

HERE = Path(__file__).parent


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, default=HERE / "configs" / "learners.toml",
        help="settings that all learners share (default %(default)s)")  # fmt: skip
    add("--learners", default="maml,proto-maml,protonet", help="by name (default %(default)s)")
    add("--out", type=Path, required=True, help="folder of all runs and results")
    add("--seeds", type=int, default=5, help="seeds 0 to N-1 (default 5)")
    add("--episodes", type=int, default=600, help="test episodes per seed (default 600)")
    add("--iterations", type=int, help="meta-updates (default: the configuration's)")
    add("--jobs", type=int, default=1, help="runs at once (default 1)")
    return parser.parse_args(argv)


def compared(args: argparse.Namespace) -> Comparison:
    """Train and test every learner with every seed, seed by seed."""
    given = {name.replace("-", "_"): value for name, value in read_toml(args.config).items()}
    if args.iterations is not None:
        given["iterations"] = args.iterations
    learners, seeds = args.learners.split(","), range(args.seeds)
    configs = {name: TrainConfig.of(**{**given, "learner": name}) for name in learners}
    runs = [
        Planned(name, configs[name].of_rule("uniform", seed), place_of(args.out, name, seed))
        for seed in seeds
        for name in learners
    ]
    terms = Terms(dict.fromkeys(learners, "uniform"), episodes=args.episodes)
    standing = Standing(learners, tuple(seeds), learners[0], jobs=args.jobs)
    if args.jobs > 1:
        in_processes(
            [r for r in runs if not (r.tested and r.tested.exists())], terms, args.jobs, standing
        )
    found: dict[str, list[Result]] = {name: [] for name in learners}
    for run in runs:
        outlook = None if args.jobs > 1 else standing.begin(run.rule, run.config.seed)
        found[run.rule].append(train_and_test(run, terms, ALONE, outlook))
    named = " and ".join(learners).replace(" and ", ", ", len(learners) - 2)
    shared = dataclasses.replace(configs[learners[0]], learner=named)
    return Comparison(shared, tuple(seeds), args.episodes, (shared.dataset,), found)


def main(argv: Sequence[str] | None = None) -> int:
    keep_memory()
    args = parse(argv)
    try:
        found = compared(args)
        write_results(args.out, found)
    except InputError as error:
        print(f"run_learners: {error}", file=sys.stderr)
        return 2
    print(found.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
