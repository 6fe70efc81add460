"""Where the time of a meta-iteration goes, and what an evaluated episode costs.

Trains a run, and prints the median milliseconds of a whole iteration, of its meta-gradients, and the
share of everything else (sampling, weighting, the optimiser's step, logging); tracing, validation
and checkpoints are not counted. Then the milliseconds per episode of ``evaluate`` beside those of its
own inner part, sampling and `adapt_and_score` on as many tasks as a meta-batch has, with the same
inner steps. That part is training without its backward pass, operator by operator (there is a test of
that), so the two figures tell what evaluation adds to it. Flags that are not listed go to
``gametalearn train``. Needs an otherwise idle machine.

example:
  python experiments/run_iteration.py --threads 2 --rule agreement
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from gametalearn import cli, evaluate, load_run, training
from gametalearn.gradients import adapt_and_score, meta_gradients

CONFIG = Path(__file__).parent / "configs" / "omniglot-5w1s.toml"


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="TOML",
                        help="settings of the run (default: omniglot-5w1s)")  # fmt: skip
    parser.add_argument("--iterations", type=int, default=200, help="default %(default)s")
    parser.add_argument("--episodes", type=int, default=320, help="default %(default)s")
    args, flags = parser.parse_known_args(argv)
    if args.iterations < 20 or args.episodes < 1:
        parser.error("at least --iterations 20 and --episodes 1 are needed")
    return args, flags


def best_ms(work: Callable[[], object], repeats: int = 5) -> float:
    """The fastest of some calls, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main(argv: Sequence[str] | None = None) -> int:
    args, flags = parse(argv)
    begun: list[float] = []
    spent: list[float] = []

    def timed(*given: Any, **named: Any) -> Any:
        begun.append(time.perf_counter())
        result = meta_gradients(*given, **named)
        spent.append(time.perf_counter() - begun[-1])
        return result

    with tempfile.TemporaryDirectory() as folder:
        command = ["train", "--config", str(args.config), "--out", folder, "--quiet"]
        command += ["--iterations", str(args.iterations), "--validation-episodes", "2"]
        for name in ("validate", "checkpoint"):
            command += [f"--{name}-every", str(args.iterations)]
        with mock.patch.object(training, "meta_gradients", timed):
            code = cli.main([*command, *flags])
        if code:
            return code
        run = load_run(folder, "latest")
    skipped = args.iterations // 10
    whole = [b - a for a, b in itertools.pairwise(begun)][skipped:]
    gradients = 1000 * statistics.median(spent[skipped:-1])
    # The sum, lest what happens in few iterations, such as logging, is lost.
    others = 1 - sum(spent[skipped:-1]) / sum(whole)
    print(
        f"iteration: {1000 * statistics.median(whole):.1f} ms, its meta-gradients "
        f"{gradients:.1f} ms, everything else {100 * others:.1f}%"
    )
    learner = run.learner.for_test(run.config.inner_steps)
    tasks = run.config.meta_batch
    tested = best_ms(lambda: evaluate(run.model, run.source, learner, args.episodes, meta=run.meta))
    inner = best_ms(
        lambda: adapt_and_score(run.model, run.source.sample(tasks), run.learner, meta=run.meta)
    )
    print(
        f"evaluate: {tested / args.episodes:.2f} ms per episode; training without its backward pass: "
        f"{inner / tasks:.2f} ms per task"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
