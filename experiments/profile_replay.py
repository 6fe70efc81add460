"""Where the time of a replay goes: each step of the program timed, and summed by kind.

    python experiments/profile_replay.py --config omniglot-5w1s --repeats 20

One thread, one chunk of tasks, in Python rather than TorchScript: the sums are a few per cent above
what a replay takes, and their shares are what counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Interpreter, Node

from gametalearn.benchmark.floor import HEAVY
from gametalearn.benchmark.settings import CONFIGS
from gametalearn.engine.allocator import keep_memory
from gametalearn.engine.kernels import PLAIN
from gametalearn.engine.making import program_for
from gametalearn.engine.plan import choose
from gametalearn.engine.quantities import GRADIENTS
from gametalearn.engine.replay import chunks_of, program_inputs
from gametalearn.engine.task import Recipe, data_of
from gametalearn.gradients import meta_of
from gametalearn.losses import default_loss
from gametalearn.scores import default_score

NAMES = {function: operator.name().split("::")[1] for operator, function in PLAIN.items()}  # type: ignore[attr-defined]
COPIES = ("clone", "copy_", "_to_copy", "contiguous", "cat", "stack")
VIEWS = ("as_strided", "view", "permute", "transpose", "expand", "unsqueeze", "squeeze", "getitem")


class Timed(Interpreter):
    """Runs a program, and keeps the seconds of each step by its kind."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def run_node(self, n: Node) -> Any:
        """Run a step."""
        begun = time.perf_counter()
        result = super().run_node(n)
        self.seconds[kind_of(n)] += time.perf_counter() - begun
        return result


def kind_of(node: Node) -> str:
    """What the table calls a step."""
    if node.op != "call_function":
        return "views and arguments"
    target: Any = node.target
    name = NAMES.get(target) or getattr(target, "__name__", str(target)).split(".")[0]
    if target in HEAVY:
        return "convolutions and products"
    if name.startswith("norm_pool"):
        return "batch norm with ReLU and max-pooling"
    if name.startswith("norm"):
        return "batch norm with ReLU"
    if name in ("gather", "scatter", "max_pool"):
        return "max-pooling"
    if name in COPIES:
        return "copies"
    if name in VIEWS:
        return "views and arguments"
    if name in ("sum", "mean", "amax"):
        return "sums"
    return "elementwise and small steps"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="omniglot-5w1s", choices=CONFIGS)
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="runs (default 20)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_memory()
    setting = CONFIGS[args.config]
    model, batch, learner = setting.model(), setting.batch(), setting.learner()
    meta, data = meta_of(model, learner, None), data_of(batch)
    plan = choose(meta, data, learner, threads=1)
    chunks = chunks_of(data, plan.chunk)
    entry = program_for(
        GRADIENTS, Recipe(model, learner, default_loss, default_score), meta, chunks[0]
    )
    assert entry.program is not None, entry.reason
    inputs, runs = (*program_inputs(model, meta), *chunks[0]), list[dict[str, float]]()
    with torch.inference_mode():
        for _ in range(args.repeats + 2):
            timed = Timed(entry.program.module)
            timed.run(*inputs)
            runs.append(timed.seconds)
    medians = {k: statistics.median(run[k] for run in runs[2:]) for k in runs[0]}
    whole = sum(medians.values())
    print(
        f"{args.config}: {len(chunks)} chunks of {plan.chunk} tasks, {1e3 * whole:.1f} ms a chunk"
    )
    for kind, seconds in sorted(medians.items(), key=lambda item: -item[1]):
        print(f"| {kind} | {1e3 * seconds:.1f} ms | {100 * seconds / whole:.0f}% |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
