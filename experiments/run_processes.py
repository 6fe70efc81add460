"""Throughput of N processes of one thread beside one process of N threads, on this machine's CPU.

Trains the same run both ways, in turn, and prints the meta-iterations per second of each training and
the ratio of the medians: above 1, processes are faster. The first tenth of a run is not timed
(tracing, warm caches), nor are validation, logging and checkpoints. Flags that are not listed go to
``gametalearn train``. Needs an otherwise idle machine with N cores.

example:
  python experiments/run_processes.py --out runs/processes
  python experiments/run_processes.py --out runs/processes --rule torchjd:UPGrad --repeats 1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CONFIG = Path(__file__).parent / "configs" / "omniglot-5w1s.toml"


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="runs and result")
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="TOML",
                        help="settings of the run (default: omniglot-5w1s)")  # fmt: skip
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="default %(default)s")
    parser.add_argument("--iterations", type=int, default=200, help="a run (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs a way (default %(default)s)")
    args, flags = parser.parse_known_args(argv)
    if args.processes < 2 or args.iterations < 10 or args.repeats < 1:
        parser.error("at least --processes 2, --iterations 10 and --repeats 1 are needed")
    return args, flags if "--rule" in flags else ["--rule", "agreement", *flags]


def throughput(folder: Path) -> float:
    """Meta-iterations per second between the first tenth of a run and its end."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[1], lines[-1]  # the line before is that of the first iteration
    seconds = last["seconds"]["total"] - first["seconds"]["total"]
    return float((last["iteration"] - first["iteration"]) / seconds)


def main(argv: Sequence[str] | None = None) -> int:
    args, flags = parse(argv)
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    ways = {
        "processes": ([*several, "-m", "gametalearn"], 1),
        "threads": (["gametalearn"], args.processes),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(args.repeats):
        for way, (module, threads) in ways.items():
            folder = args.out / f"{way}{repeat}"
            command = [sys.executable, "-m", *module, "train", "--config", str(args.config)]
            command += ["--out", str(folder), "--overwrite", "--quiet", "--threads", str(threads)]
            command += ["--iterations", str(args.iterations), *flags]
            command += ["--log-every", str(args.iterations // 10), "--validation-episodes", "2"]
            for name in ("validate", "checkpoint"):
                command += [f"--{name}-every", str(args.iterations)]
            env = os.environ | {"OMP_NUM_THREADS": str(threads)}  # torchrun remarks on its absence
            done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL)
            if done.returncode:  # its own message stands above
                return done.returncode
            found[way].append(throughput(folder))
    ratio = statistics.median(found["processes"]) / statistics.median(found["threads"])
    names = (f"{args.processes} processes of 1 thread", f"1 process of {args.processes} threads")
    for name, rates in zip(names, found.values(), strict=True):
        print(f"{name}: {', '.join(f'{rate:.2f}' for rate in rates)} iterations/s")
    print(f"processes / threads: {ratio:.2f}")
    (args.out / "processes.json").write_text(json.dumps({**found, "ratio": ratio}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
