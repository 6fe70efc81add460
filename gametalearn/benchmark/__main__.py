"""``python -m gametalearn.benchmark``: time one side in this process, and print one line of JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from gametalearn.benchmark.errors import COMPARED, compare_rows, write_rows
from gametalearn.benchmark.processes import end_with_parent
from gametalearn.benchmark.settings import CONFIGS, REPEATS, Setting, check_device
from gametalearn.benchmark.sides import SIDES, time_side
from gametalearn.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Time a side as the arguments say; the exit code, 2 for bad input."""
    args = _parse(argv)
    if args.attached:
        end_with_parent()
    setting = CONFIGS[args.config]
    if args.setting is not None:
        setting = Setting(**json.loads(args.setting))
    threads = torch.get_num_threads() if args.threads is None else args.threads
    repeats = REPEATS[args.config] if args.repeats is None else args.repeats
    try:
        check_device(args.device)
        if args.side == "reference":
            torch.set_num_threads(threads)
            print(json.dumps(compare_rows(args.rows, setting)))
            return 0
        record = time_side(args.side, setting, threads, repeats, device=args.device)
        if args.rows is not None:
            write_rows(args.rows, args.side, setting, args.batches, args.device)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps(dataclasses.asdict(record)))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gametalearn.benchmark",
        description="Time one side of `gametalearn bench` in this process, and print one line of "
        "JSON: median_ms is the median of the timings ms. Divide the median_ms of two such processes "
        "to check a ratio by hand.",
    )
    parser.add_argument("--side", required=True, choices=(*SIDES, "reference"),
                        help="what to time; reference compares the rows in --rows instead")  # fmt: skip
    parser.add_argument(
        "--config", choices=CONFIGS, default="omniglot-5w1s", help="what to measure"
    )
    parser.add_argument("--threads", type=int, help="PyTorch threads")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--repeats", type=int, help="timings to take, after the warm-up")
    parser.add_argument("--setting", metavar="JSON", help="a variation, in place of --config's")
    parser.add_argument("--rows", type=Path, metavar="FOLDER",
                        help=f"leave the rows here afterwards ({' and '.join(COMPARED)} only)")  # fmt: skip
    parser.add_argument("--batches", type=int, default=1, help="of how many batches (default 1)")
    parser.add_argument("--attached", action="store_true", help="end when standard input ends")
    args = parser.parse_args(argv)
    for name in ("threads", "repeats", "batches"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if args.side == "reference" and args.rows is None:
        parser.error("--side reference needs --rows")
    if args.rows is not None and args.side not in (*COMPARED, "reference"):
        parser.error(f"--rows is for {', '.join(COMPARED)} and reference, not for {args.side}")
    return args


if __name__ == "__main__":
    sys.exit(main())
