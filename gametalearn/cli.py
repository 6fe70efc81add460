"""The command line: ``gametalearn data | episodes | train | evaluate | compare | probe | report | bench``."""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gametalearn import __version__, registry
from gametalearn.config import EPISODES, MACHINE, MODEL, OUTER, RESUMABLE
from gametalearn.engine.allocator import keep_memory
from gametalearn.errors import InputError, SharedError
from gametalearn.flags import add_settings, in_flags, parsed, read_config
from gametalearn.terminal import (
    Help,
    Parser,
    ended_by_ctrl_c,
    of_the_machine,
    say,
    warnings_in_one_line,
)

__all__ = ["main", "parser_of"]

SPLITS = ("train", "val", "test")
TENSORBOARD = (
    "Also write what is logged to RUN/tensorboard; needs `pip install tensorboard`. Look at it with "
    "`tensorboard --logdir RUN`."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 2 for bad usage or input, 130 on Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = parser_of(words)
    try:
        args = parsed(parser, read_config(parser, words))
        with ended_by_ctrl_c():
            from gametalearn import commands  # imports torch
        keep_memory()
        args.command_line = shlex.join(["gametalearn", *words])
        with warnings_in_one_line():
            getattr(commands, args.command)(args)
    except InputError as error:
        if "--debug" in words:
            traceback.print_exc()
        say(in_flags(parser, str(error)), shared=isinstance(error, SharedError))
        return 2
    except KeyboardInterrupt as stop:
        say(str(stop) or "interrupted; what was done is saved", shared=True)
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as in `gametalearn ... | head`
        if sys.stderr is not None:
            sys.stderr.close()
        return 0
    except (OSError, MemoryError, RuntimeError) as error:
        if not (reason := of_the_machine(error)) or "--debug" in words:
            raise
        say(reason, shared=False)
        return 2
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    return 0


def parser_of(words: Sequence[str] = ()) -> Parser:
    """The parser of every command; that of `bench`, whose import is heavy, if ``words`` name it."""
    parser = Parser(
        prog="gametalearn",
        formatter_class=Help,
        description="Gradient-based few-shot meta-learning: MAML, gradient agreement and other "
        "weighting rules.",
        epilog="examples:\n"
        "  gametalearn compare --rules uniform,agreement,norm-control --out runs/first\n"
        "  gametalearn data prepare omniglot\n"
        "  gametalearn train --dataset omniglot --rule agreement --out runs/omniglot\n"
        "  gametalearn evaluate runs/omniglot --episodes 1000",
    )
    parser.add_argument("--version", action="version", version=f"gametalearn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, does: str, example: str) -> Callable[..., Any]:
        sub = commands.add_parser(
            name, help=does, description=f"{does[0].upper()}{does[1:]}.", formatter_class=Help,
            epilog=f"example:\n  gametalearn {example}", allow_abbrev=False,
        )  # fmt: skip
        sub.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
        if name != "bench":
            sub.add_argument("--config", type=Path, metavar="FILE",
                             help="Read options from a TOML file; flags win over it.")  # fmt: skip
        return sub.add_argument

    def parts_of_the_run(add: Callable[..., Any]) -> None:
        for name in ("model", "learner", "loss", "score"):
            add(f"--{name}", metavar="NAME",
                help=f"Repeat the run's {name} here if it is a module:attribute.")  # fmt: skip
        add("--trust", action="store_true",
            help="Import the parts that the run's files name as module:attribute.")  # fmt: skip

    add = command("data", "prepare data sets, list what is there, or clean up",
                  "data prepare omniglot --source ~/omniglot")  # fmt: skip
    add("action", choices=("prepare", "list", "clean"),
        help="prepare writes a data set; list shows what is there, with sizes; clean removes packed "
        "copies of folders. All lie below $GAMETALEARN_DATA, or ~/.cache/gametalearn.")  # fmt: skip
    add("name", nargs="?",
        help="The data set to prepare: omniglot, mini-imagenet or glyphs; with clean, one copy instead of "
        "all of them.")  # fmt: skip
    add("--source", type=Path, metavar="PATH",
        help="The folder or archives to read. Without it, the data set is downloaded if it can be.")  # fmt: skip
    add("--skip-bad", action="store_true", help="Leave out unreadable images instead of stopping.")

    add = command("episodes", "sample episodes and draw them as a PNG",
                  "episodes --dataset glyphs --ways 5 --shots 2 --out episodes.png")  # fmt: skip
    add_settings(commands.choices["episodes"], (EPISODES,), also=("seed",))
    add("--episodes", type=int, default=4, metavar="N", help="Number of episodes. Default: 4.")
    add("--on", choices=SPLITS, default="train",
        help="Draw from the classes of this split. Default: train.")  # fmt: skip
    add("--out", type=Path, default=Path("episodes.png"), metavar="PNG",
        help="Draw them into this file. Default: episodes.png.")  # fmt: skip

    add = command("train", "meta-train one model",
                  "train --dataset omniglot --rule agreement --iterations 2000 --out runs/a")  # fmt: skip
    add_settings(commands.choices["train"], (EPISODES, MODEL, OUTER, MACHINE))
    add("--quiet", action="store_true", help="Show no progress on stderr.")
    add("--out", type=Path, metavar="RUN",
        help="The run's folder. An interrupted run of the same settings continues there.")  # fmt: skip
    may = ", ".join("--" + name.replace("_", "-") for name in RESUMABLE)
    add("--resume", type=Path, metavar="RUN",
        help="Continue RUN. No other flag is needed, except --dataset folder:PATH if its folder of "
        "images has moved, and the names of parts that are neither built in nor installed. These may "
        f"change: {may}. More --iterations than RUN had make it longer, unless its outer rate "
        "follows a schedule.")  # fmt: skip
    add("--trust", action="store_true",
        help="With --resume, import the parts that the run's files name as module:attribute.")  # fmt: skip
    add("--overwrite", action="store_true", help="Start from the beginning, even if RUN exists.")
    add("--tensorboard", action="store_true", help=TENSORBOARD)

    add = command("evaluate", "test a trained run on unseen classes",
                  "evaluate runs/a runs/b --episodes 1000 --protocol both")  # fmt: skip
    add("folders", type=Path, nargs="+", metavar="RUN",
        help="The folder that train --out wrote. With several, a table compares each with the first, "
        "on the same episodes.")  # fmt: skip
    add("--episodes", type=int, metavar="N", help="Number of test episodes. Default: 1000.")
    add("--protocol", choices=("auto", "transductive", "inductive", "both", "lake"),
        help="How queries are normalised. With both, test transductively and inductively; with lake, "
        "test the 20 runs of Lake's one-shot task, both ways. Default: as in training.")  # fmt: skip
    add("--query-at-a-time", action="store_true",
        help="Predict each query from the support set and itself alone, which is the strictest way. "
        "With --protocol both or lake, report it beside the others.")  # fmt: skip
    add("--source", type=Path, metavar="PATH",
        help="For --protocol lake: all_runs.zip, or the folder that holds run01 to run20.")  # fmt: skip
    add("--checkpoint", default="best", metavar="NAME",
        help="best, the weights that were best on validation; latest; or the iteration of a "
        "checkpoint that train --keep-every kept. Default: best.")  # fmt: skip
    add("--ways", type=int, metavar="N",
        help="Number of classes per episode. Learners that make a head for each task (protonet, proto-maml) "
        "can be tested with any number; others only with that of their training. Default: the run's.")  # fmt: skip
    add("--shots", type=int, metavar="N",
        help="Number of support examples per class. Default: the run's.")  # fmt: skip
    add("--queries", type=int, metavar="N",
        help="Number of query examples per class. Default: the run's.")  # fmt: skip
    add("--on", choices=(*SPLITS, "all"),
        help="Draw from the classes of this split; all is only for data other than RUN's. Default: test, or "
        "all for a folder of other images.")  # fmt: skip
    add("--inner-steps", type=int, metavar="N", help="Number of inner steps. Default: the run's.")
    add("--seed", type=int, metavar="N",
        help="Seed of the episodes. Default: the run's, or the first run's.")  # fmt: skip
    add("--dataset", metavar="NAME",
        help="Test on other data, such as folder:PATH, whose images are resized to the run's size; or "
        "say where the run's own folder of images is now, if it has moved.")  # fmt: skip
    parts_of_the_run(add)
    add_settings(commands.choices["evaluate"], (MACHINE,), default="the run's")
    add("--quiet", action="store_true", help="Show no progress on stderr.")

    add = command("compare", "train several rules on the same episodes and compare them",
                  "compare --dataset omniglot --rules uniform,agreement,norm-control --seeds 3 "
                  "--out runs/cmp")  # fmt: skip
    add_settings(
        commands.choices["compare"], (EPISODES, MODEL, OUTER, MACHINE), skip=("rule", "seed")
    )
    rules = "uniform,agreement,norm-control"
    add("--rules", default=rules, metavar="A,B,...",
        help=f"The weighting rules to compare: {', '.join(registry.names('rule'))}, torchjd:NAME, "
        f"module:attribute. Default: {rules}.")  # fmt: skip
    add("--seeds", default="5", metavar="N|A,B,...",
        help="A number N for the seeds 0 to N-1, or a list; a single seed is written as 7, with a comma "
        "(in TOML [7]). When seeds are added later, only they are trained. With fewer than 3 there is no "
        "interval. Default: 5.")  # fmt: skip
    add("--primary", default="", metavar="A,B,...",
        help="The rules that the comparison is about. Their p-values are adjusted among themselves "
        "only.")  # fmt: skip
    add("--single", nargs="?", const="train", metavar="OBJECTIVE=FOLDER,...",
        help="Of several data sets, also train a model of each one alone, on as many of its tasks, and "
        "report each rule's mean relative change against them (Delta_m). Where runs of an objective are "
        "there already, name the folder that holds them as seed0, seed1 and so on.")  # fmt: skip
    add("--episodes", type=int, default=600, metavar="N",
        help="Number of test episodes per seed. Default: 600.")  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR",
        help="Folder for results.json, plots and runs. Finished runs in it are kept.")  # fmt: skip
    add("--jobs", type=int, default=1, metavar="N",
        help="Number of runs to train at once, each with --threads threads. Default: 1.")  # fmt: skip
    add("--quiet", action="store_true", help="Show no progress on stderr.")
    add("--overwrite", action="store_true",
        help="Train everything from the beginning. If that is interrupted, the same command without "
        "--overwrite continues.")  # fmt: skip
    add("--tensorboard", action="store_true", help=TENSORBOARD)
    add("--plan", action="store_true",
        help="Train nothing, and print one `gametalearn train` command per run, for xargs, GNU "
        "parallel or a cluster. The same compare without --plan collects the results.")  # fmt: skip

    add = command("probe", "measure what weighting rules gain in one step from a run's weights",
                  "probe runs/a --rules uniform,agreement,normalized-mean")  # fmt: skip
    add("folder", type=Path, metavar="RUN", help="The folder that train --out wrote.")
    usual = ("uniform", "agreement", "agreement-update", "normalized-mean", "geometric-median")
    add("--rules", default=usual, metavar="A,B,...",
        help=f"The weighting rules to probe, as in compare. Default: {','.join(usual)}; without "
        "agreement-update if the learner takes no inner steps.")  # fmt: skip
    add("--checkpoint", default="latest", metavar="A,B,...",
        help="The checkpoints to probe: latest, best, iterations that train --keep-every kept, or all "
        "for all of those and the latest. Default: latest.")  # fmt: skip
    add("--meta-batches", type=int, default=100, metavar="N",
        help="Number of meta-batches, each of which gives every rule a step. Default: 100.")  # fmt: skip
    add("--reference", type=int, default=1024, metavar="N",
        help="Number of tasks whose mean gradient serves as the true direction. Default: 1024.")  # fmt: skip
    add("--length", type=float, metavar="X",
        help="Length of each step. Default: 0.002 times the norm of the weights.")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="Seed of all tasks. Default: 0.")
    add(
        "--threads", type=int, metavar="N", help="Number of CPU threads. Default: PyTorch's choice."
    )
    add_settings(commands.choices["probe"], (MACHINE,), default="the run's", skip=("threads",),
                 also=("meta_batch", "disagree", "disagree_kind", "rule_options"))  # fmt: skip
    add("--dataset", metavar="NAME", help="Where the run's folder of images is now, as "
        "folder:PATH, if it has moved.")  # fmt: skip
    parts_of_the_run(add)
    add("--out", type=Path, metavar="DIR",
        help="Folder for probe.json and the plots. Default: RUN.")  # fmt: skip
    add("--quiet", action="store_true", help="Show no progress on stderr.")

    add = command("report", "write report.html of a finished comparison", "report runs/cmp")
    add("folder", type=Path, metavar="DIR", help="The folder that compare --out wrote.")

    command("bench", "time a meta-gradient beside learn2learn's and compare both with float64",
            "bench --config omniglot-5w1s --threads 2 --json bench.json")  # fmt: skip
    if "bench" in words:
        with ended_by_ctrl_c():
            from gametalearn.benchmark.command import add_options  # imports torch
        add_options(commands.choices["bench"])
    return parser


if __name__ == "__main__":
    sys.exit(main())
