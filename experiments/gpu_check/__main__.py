"""Check the library on a GPU: PASS, FAIL or SKIP for each point, and one JSON file.

It needs one GPU, no data and no network: images are random. Rows are compared with a plain float64
loop on the CPU. What can be measured on the way is printed beside each verdict: speed beside
learn2learn, iterations per second of a whole training run, memory. `--device cpu` runs the same checks on
the CPU with small networks, which shows whether this program works, but nothing about a GPU.

examples:
  python -m experiments.gpu_check --json gpu.json
  python -m experiments.gpu_check --only rows,plan
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.gpu_check.calls import (
    check_learners,
    check_plan,
    check_rows,
    check_rules,
    check_smooth,
)
from experiments.gpu_check.outcomes import CARD, SMALL, Outcome, Point, Sizes, tf32
from experiments.gpu_check.runs import (
    check_bench,
    check_processes,
    check_resume,
    check_tests,
    check_training,
)
from gametalearn.benchmark.rounds import write_json
from gametalearn.environment import device_name, unusable, version

POINTS: dict[str, Point] = {
    "rows": check_rows,
    "smooth": check_smooth,
    "learners": check_learners,
    "rules": check_rules,
    "plan": check_plan,
    "training": check_training,
    "resume": check_resume,
    "bench": check_bench,
    "processes": check_processes,
    "tests": check_tests,
}


def tried(point: Point, device: str, sizes: Sizes) -> Outcome:
    """A point's outcome; FAIL if it raises, or if the library warned that it fell back to the loop."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = point(device, sizes)
        except (
            Exception
        ) as error:  # whatever goes wrong on a GPU: the other points are still checked
            return Outcome("FAIL", f"{type(error).__name__}: {str(error).strip()[:300]}",
                           {"traceback": traceback.format_exc()})  # fmt: skip
    said = [str(w.message) for w in caught if str(w.message).startswith("gametalearn")]
    if said:
        return Outcome("FAIL", said[0], {**found.figures, "warnings": said})
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help="cuda (the default), cuda:1, cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--only", metavar="POINTS", help=f"check only some of {','.join(POINTS)}")
    parser.add_argument("--minutes", type=float, default=8.0,
                        help="start no point after this many (default %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    args.points = list(POINTS) if args.only is None else args.only.split(",")
    for name in args.points:
        if name not in POINTS:
            parser.error(f"--only: unknown point '{name}'; choose from {', '.join(POINTS)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Check; 0 if no point failed, 1 if one did, 2 if there is no such device."""
    args = parse(argv)
    if (why := unusable(args.device)) is not None:
        print(f"gpu-check: --device {args.device}: {why}; nothing was checked", file=sys.stderr)
        return 2
    sizes = SMALL if args.device == "cpu" else CARD
    begun = time.perf_counter()
    print(f"gpu-check on {device_name(args.device)}, torch {torch.__version__}", flush=True)
    found: dict[str, dict[str, Any]] = {}
    for name in args.points:
        start = time.perf_counter()
        if start - begun > 60 * args.minutes:
            own = Outcome("SKIP", f"not started within {args.minutes:g} minutes")
        else:
            with tf32(False):
                own = tried(POINTS[name], args.device, sizes)
        seconds = time.perf_counter() - start
        found[name] = {"verdict": own.verdict, "said": own.said, "seconds": seconds, **own.figures}
        print(f"{own.verdict}  {name:10} {own.said} ({seconds:.0f} s)", flush=True)
    failed = [name for name, own in found.items() if own["verdict"] == "FAIL"]
    print(f"FAIL: {', '.join(failed)}" if failed else "PASS", flush=True)
    if args.json is not None:
        write_json(args.json, {
            "schema": "gametalearn.gpu-check/1", "device": device_name(args.device),
            "torch": torch.__version__, "cuda": torch.version.cuda, "gametalearn": version(),
            "seconds": time.perf_counter() - begun, "passed": not failed, "points": found,
        })  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
