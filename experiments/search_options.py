"""Try values of rules' options on a seed that no comparison uses: one training each, judged by validation.

Each objective's validated score at the end is compared with the plain mean's; the mean over objectives of the
relative change says which values are used in the comparison. What is finished below --out is not run again, and
stays in search.json, from which tables.py makes a table.

example:
  python experiments/search_options.py --config experiments/configs/two-objectives.toml --jobs 2 --out runs/search \\
      --try gradnorm.alpha=0.5 --try gradnorm.alpha=3 --try dtp.gamma=0.5,dtp.indicator=likelihood
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from gametalearn import InputError, TrainConfig, read_metrics, train
from gametalearn.environment import environment
from gametalearn.errors import require_whole, summary
from gametalearn.files import make_folder, write_json
from gametalearn.settings import parse_rule_options, read_toml
from gametalearn.tradeoffs import relative_change

BASELINE = "uniform"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, help="settings that all trainings share")
    add("--try", dest="tried", action="append", required=True, metavar="RULE[.OPTION=VALUE,...]",
        help="a rule with its defaults, or with options; repeat it")  # fmt: skip
    add("--out", type=Path, required=True, help="folder of all runs and search.json")
    add("--seed", type=int, default=90, help="of all trainings (default 90)")
    add("--iterations", type=int, help="meta-updates (default: the configuration's)")
    add("--jobs", type=int, default=1, help="trainings at once (default 1)")
    return parser.parse_args(argv)


def planned(args: argparse.Namespace) -> dict[str, TrainConfig]:
    """The settings of each training, by what was asked for; that of the plain mean comes first.

    Raises:
        InputError: a rule or an option that is not there, or a damaged search.json of an earlier call.
    """
    given = {name.replace("-", "_"): value for name, value in read_toml(args.config).items()}
    given["seed"] = args.seed
    if args.iterations is not None:
        given["iterations"] = args.iterations
    configs = {}
    for text in dict.fromkeys([BASELINE, *earlier(args.out / "search.json"), *args.tried]):
        options = parse_rule_options(text.split(",")) if "=" in text else {text: {}}
        if len(options) > 1:
            raise InputError(
                f"--try {text}: has options of {' and '.join(options)}; try one rule at a time"
            )
        ((rule, values),) = options.items()
        configs[text] = TrainConfig.of(
            **{**given, "rule": rule, "rule_options": {rule: values} if values else {}}
        )
    return configs


def earlier(file: Path) -> list[str]:
    """What was tried by earlier calls, if there were any."""
    try:
        return [
            str(cell["tried"]) for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{file}: damaged ({summary(error)}); remove it") from error


def trained(config: TrainConfig, folder: Path, label: str) -> dict[str, float]:
    """Train one, and read each objective's validated score at its end."""
    train(config, folder, label=label)
    prefix = "validation/objectives/"
    columns = read_metrics(folder).items()
    last = {
        name: values[np.isfinite(values)][-1] for name, values in columns if name.startswith(prefix)
    }
    return {name.removeprefix(prefix): float(value) for name, value in last.items()}


def searched(args: argparse.Namespace) -> dict[str, Any]:
    """Train what is not trained yet, and compare each with the plain mean.

    Raises:
        InputError: as `planned`; or the data have one objective only, or no training can run at a time.
    """
    require_whole("--jobs", args.jobs, 1)
    make_folder(args.out)
    configs = planned(args)
    if len((first := configs[BASELINE]).datasets) < 2:
        raise InputError(
            f"{args.config}: `dataset` {first.dataset} is one objective; join several by +"
        )
    work = [
        (config, args.out / text.replace(",", "+"), f"{text} ({number} of {len(configs)})")
        for number, (text, config) in enumerate(configs.items(), 1)
    ]
    if args.jobs == 1:
        found = [trained(*one) for one in work]
    else:
        with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
            found = list(pool.map(trained, *zip(*work, strict=True)))
    values = np.array([list(one.values()) for one in found])
    changes = relative_change(values, np.broadcast_to(values[0], values.shape))
    if changes is None:
        raise InputError(f"{BASELINE} scores 0 on an objective, and no change is relative to that")
    return {
        "schema": "gametalearn.search/1",
        "seed": first.seed,
        "iterations": first.iterations,
        "cells": [
            {"tried": text, "validation": one, "change": change}
            for text, one, change in zip(configs, found, changes, strict=True)
        ],
        "environment": environment(first),
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        found = searched(args)
        write_json(args.out / "search.json", found)
    except InputError as error:
        print(f"search_options: {error}", file=sys.stderr)
        return 2
    for cell in found["cells"]:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in cell["validation"].items())
        print(f"{cell['tried']}: {scores}; mean relative change {100 * cell['change']:+.2f}%")
    return 0


if __name__ == "__main__":
    sys.exit(main())
