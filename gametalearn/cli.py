"""The command line: ``gametalearn data | episodes | train | evaluate | compare | report | bench``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gametalearn.config import CHOICES, DEFAULTS, TrainConfig, parse_rule_options, read_toml
from gametalearn.errors import InputError, SharedError, summary

if TYPE_CHECKING:
    from gametalearn.distributed import Team
    from gametalearn.jobs import Planned

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """One line on stderr for bad usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 2 for bad usage or input, 130 on Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with _ended_by_ctrl_c():
            parser = _parser()  # imports torch
        args = parser.parse_args(_with_config(parser, words))
        args.command_line = shlex.join(["gametalearn", *words])
        with _warnings_in_one_line():
            args.run(args)
    except InputError as error:
        if "--debug" in words:
            traceback.print_exc()
        _say(" ".join(str(error).split()), shared=isinstance(error, SharedError))
        return 2
    except KeyboardInterrupt as stop:
        _say(str(stop) or "interrupted; what was done is saved", shared=True)
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as in `gametalearn ... | head`
        sys.stderr.close()
        return 0
    except (OSError, MemoryError, RuntimeError) as error:
        if not (reason := _of_the_machine(error)) or "--debug" in words:
            raise
        _say(reason, shared=False)
        return 2
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    return 0


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Ctrl-C ends the process at once: within an import its exception may get lost, or be shown."""

    def leave(_number: int, _frame: object) -> None:
        _say("interrupted", shared=True)
        os._exit(130)

    if threading.current_thread() is not threading.main_thread():
        yield  # where no handler can be set
        return
    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """A warning of this package reads like its other messages, without its place in the code."""
    before, own = warnings.formatwarning, Path(__file__).parent

    def shown(message: Any, category: Any, filename: str, *rest: Any, **more: Any) -> str:
        if Path(filename).is_relative_to(own):
            return f"gametalearn: {message}\n"
        return before(message, category, filename, *rest, **more)

    warnings.formatwarning = shown
    try:
        yield
    finally:
        warnings.formatwarning = before


def _of_the_machine(error: Exception) -> str:
    """What a file system or a lack of memory made impossible; "" for any other error."""
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or summary(error)}"
    text = str(error).lower()
    signs = ("out of memory", "not enough memory", "can't allocate", "storage size", "numel: ")
    if isinstance(error, MemoryError) or any(sign in text for sign in signs):
        return f"not enough memory ({summary(error)}); lower --meta-batch, --hidden or the shots"
    return ""


def _say(message: str, shared: bool) -> None:
    """A line on stderr; of several processes with the same to say, the first one says it."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or not shared:
        who = "" if rank == "0" else f" (process {rank})"
        print(f"gametalearn{who}: {message}", file=sys.stderr)


def _with_config(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """Put the options of a ``--config`` file before those of the command line, which win."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    file = finder.parse_known_args(words)[0].config
    if file is None or not words or words[0].startswith("-") or words[0] == "bench":
        return words  # bench's --config is a name
    command = _subparsers(parser).get(words[0])
    if command is None:
        return words
    options = {s: a for a in command._actions for s in a.option_strings}
    given: list[str] = []
    for key, value in read_toml(file).items():
        flag = "--" + key.replace("_", "-")
        action = options.get(flag)
        if action is None or flag == "--config":
            known = ", ".join(sorted(s[2:] for s in options if s.startswith("--")))
            raise InputError(f"{file}: '{key[:60]}' is no option of {words[0]}; options: {known}")
        if isinstance(value, bool):
            if action.nargs != 0:
                raise InputError(f"{file}: {key} takes a value, got {str(value).lower()}")
            negative = f"--no-{flag[2:]}"
            given += [flag] if value else [negative] if negative in options else []
        elif isinstance(value, list):
            given.append(f"{flag}={('+' if key == 'dataset' else ',').join(map(str, value))}")
        elif isinstance(value, (str, int, float)):
            given.append(f"{flag}={value}")
        elif flag == "--rule-options" and all(
            isinstance(v, dict) for v in [value, *value.values()]
        ):
            given += [
                f"{flag}={rule}.{option}={json.dumps(one, ensure_ascii=False, default=str)}"
                for rule, own in value.items()
                for option, one in own.items()
            ]
        else:
            raise InputError(
                f"{file}: {key} must be a plain value or a list, got {str(value)[:60]}"
            )
    return [words[0], *given, *words[1:]]


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gametalearn",
        formatter_class=_Help,
        description="Few-shot meta-learning by gradients: MAML, gradient agreement and other ways "
        "to weight tasks.",
        epilog="examples:\n"
        "  gametalearn compare --rules uniform,agreement,norm-control --out runs/first\n"
        "  gametalearn data prepare omniglot\n"
        "  gametalearn train --dataset omniglot --rule agreement --out runs/omniglot\n"
        "  gametalearn evaluate runs/omniglot --episodes 1000",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], None], summary: str, example: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=summary, epilog=f"example:\n  gametalearn {example}",
            formatter_class=_Help, allow_abbrev=False,
        )  # fmt: skip
        sub.set_defaults(run=run)
        sub.add_argument(
            "--config", type=Path, metavar="FILE", help="TOML file of options; flags win"
        )
        sub.add_argument("--debug", action="store_true", help="show a traceback for bad input")
        return sub

    data = command("data", _data, "prepare data sets, or list what is there",
                   "data prepare omniglot --source ~/omniglot")  # fmt: skip
    data.add_argument("action", choices=("prepare", "list"), help="what to do")
    data.add_argument("name", nargs="?", help="omniglot, mini-imagenet or glyphs")
    data.add_argument("--source", type=Path, metavar="PATH",
                      help="folder or archives to read; without it, download where that exists")  # fmt: skip
    data.add_argument("--skip-bad", action="store_true", help="leave out unreadable images")

    episodes = command("episodes", _episodes, "sample episodes, and draw them as a PNG",
                       "episodes --dataset glyphs --ways 5 --shots 2 --out episodes.png")  # fmt: skip
    _add_data(episodes)
    episodes.add_argument(
        "--episodes", type=int, default=4, metavar="N", help="how many (default 4)"
    )
    episodes.add_argument("--on", choices=("train", "val", "test"), default="train",
                          help="classes to draw from (default train)")  # fmt: skip
    episodes.add_argument("--seed", type=int, help="of the stream of episodes (default 0)")
    episodes.add_argument("--out", type=Path, default=Path("episodes.png"), metavar="PNG",
                          help="the sheet (default episodes.png)")  # fmt: skip

    train = command("train", _train, "meta-train one model",
                    "train --dataset omniglot --rule agreement --iterations 2000 --out runs/a")  # fmt: skip
    _add_data(train)
    _add_training(train)
    train.add_argument(
        "--rule", metavar="NAME", help=f"weighting rule (default uniform): {_rules()}"
    )
    train.add_argument("--seed", type=int, help="of weights and episodes (default 0)")
    train.add_argument("--out", type=Path, metavar="RUN", help="folder of the run")
    train.add_argument("--resume", type=Path, metavar="RUN",
                       help="go on with RUN; needs no other flag, but --dataset folder:PATH where "
                       "its folder of images has moved")  # fmt: skip
    train.add_argument("--overwrite", action="store_true", help="start anew if RUN exists")

    evaluate = command("evaluate", _evaluate, "test a trained run on unseen classes",
                       "evaluate runs/a --episodes 1000 --protocol both")  # fmt: skip
    evaluate.add_argument("folder", type=Path, metavar="RUN", help="what train --out wrote")
    evaluate.add_argument("--episodes", type=int, metavar="N",
                          help="test episodes (default 1000)")  # fmt: skip
    evaluate.add_argument("--protocol",
                          choices=("auto", "transductive", "inductive", "both", "lake"),
                          help="how queries are normalised (default: as in training); lake: the 20 "
                          "runs of Lake's one-shot task, both ways")  # fmt: skip
    evaluate.add_argument("--query-at-a-time", action="store_true",
                          help="predict each query from the support set and itself alone, the "
                          "strictest way; with --protocol both or lake, beside the others")  # fmt: skip
    evaluate.add_argument("--source", type=Path, metavar="PATH",
                          help="of --protocol lake: all_runs.zip, or the folder with run01 to run20")  # fmt: skip
    evaluate.add_argument("--checkpoint", choices=("best", "latest"), default="best",
                          help="best on validation (default), or the latest")  # fmt: skip
    evaluate.add_argument("--on", choices=("test", "val", "train"),
                          help="classes to test on (default test)")  # fmt: skip
    evaluate.add_argument(
        "--inner-steps", type=int, metavar="N", help="inner steps (default: the run's)"
    )
    evaluate.add_argument("--seed", type=int, help="of the episodes (default: the run's)")
    evaluate.add_argument("--dataset", metavar="folder:PATH",
                          help="where the run's folder of images lies now, if it has moved")  # fmt: skip
    _add_machine(evaluate)

    compare = command("compare", _compare, "train several rules on the same episodes, and compare them",
                      "compare --dataset omniglot --rules uniform,agreement,norm-control "
                      "--out runs/cmp")  # fmt: skip
    _add_data(compare)
    _add_training(compare)
    compare.add_argument("--rules", default="uniform,agreement,norm-control", metavar="A,B,...",
                         help=f"weighting rules (default uniform,agreement,norm-control): {_rules()}")  # fmt: skip
    compare.add_argument("--seeds", default="5", metavar="N|A,B,...",
                         help="N: seeds 0 to N-1; or a list, one seed as 7, (default 5). Seeds that are added later "
                         "are trained alone; below 3 there is no interval")  # fmt: skip
    compare.add_argument("--primary", default="", metavar="A,B,...",
                         help="rules whose difference from uniform is what the comparison is for: "
                         "their p-values are adjusted among themselves alone")  # fmt: skip
    compare.add_argument("--episodes", type=int, default=600, metavar="N",
                         help="test episodes for each seed (default 600)")  # fmt: skip
    compare.add_argument("--out", type=Path, required=True, metavar="DIR",
                         help="folder for results.json, plots and runs; finished runs are kept")  # fmt: skip
    compare.add_argument("--jobs", type=int, default=1, metavar="N",
                         help="runs trained at once, each with --threads threads (default 1)")  # fmt: skip
    compare.add_argument("--overwrite", action="store_true", help="train everything anew")
    compare.add_argument("--plan", action="store_true",
                         help="train nothing: print a `gametalearn train` for each run, for xargs, "
                         "GNU parallel or a cluster; the same compare without --plan collects them")  # fmt: skip

    report = command("report", _report, "write report.html of a finished comparison",
                     "report runs/cmp")  # fmt: skip
    report.add_argument("folder", type=Path, metavar="DIR", help="what compare --out wrote")

    bench = commands.add_parser(
        "bench", help="time a meta-gradient beside learn2learn's",
        description="Time a meta-gradient beside learn2learn's, and compare both with float64.",
        formatter_class=_Help, allow_abbrev=False,
    )  # fmt: skip
    bench.set_defaults(run=_bench)
    _add_bench(bench)
    bench.add_argument("--debug", action="store_true", help="show a traceback for bad input")
    return parser


def _bench(args: argparse.Namespace) -> None:
    from gametalearn.benchmark.command import run

    run(args)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from gametalearn.benchmark.command import add_options

    add_options(parser)


def _rules() -> str:
    from gametalearn.weighting import RULES

    return f"{', '.join(RULES)}, or torchjd:NAME for TorchJD's UPGrad, MGDA, CAGrad, ..."


def _rule_options() -> str:
    from gametalearn.weighting import RULES, rule_options

    return ", ".join(
        f"{rule}.{option}={str(value).lower()}"
        for rule in RULES
        for option, value in rule_options(rule).items()
    )


def _default(name: str) -> str:
    """What an option is where it is not given, by data set."""
    by_value: dict[Any, list[str]] = {}
    for dataset, values in DEFAULTS.items():
        if name in values:
            by_value.setdefault(values[name], []).append(dataset)
    if not by_value:
        field = next(f for f in dataclasses.fields(TrainConfig) if f.name == name)
        return f"default {field.default}" if field.default != "" else "default: the data set's"
    if len(by_value) == 1 and sum(map(len, by_value.values())) == len(DEFAULTS):
        return f"default {next(iter(by_value))}"
    return "default " + "; ".join(
        f"{value} for {', '.join(names)}" for value, names in by_value.items()
    )


def _add(parser: argparse._ArgumentGroup, name: str, kind: type, text: str, **more: Any) -> None:
    choices = CHOICES.get(name)
    shown = (
        {"choices": choices} if choices else {"metavar": {int: "N", float: "X"}.get(kind, "NAME")}
    )
    flag = "--" + name.replace("_", "-")
    parser.add_argument(flag, type=kind, help=f"{text} ({_default(name)})", **{**shown, **more})


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("episodes")
    group.add_argument("--dataset", metavar="NAME",
                       help="glyphs (embedded, default), omniglot, mini-imagenet, sinusoid, "
                       "folder:PATH, or several joined by +")  # fmt: skip
    _add(group, "ways", int, "classes an episode")
    _add(group, "shots", int, "support examples a class")
    _add(group, "queries", int, "query examples a class")
    _add(group, "split", str, "how classes are split: lake or maml for omniglot")
    group.add_argument("--rotations", action=argparse.BooleanOptionalAction,
                       help="omniglot: add training classes turned by 90, 180, 270 degrees "
                       f"({_default('rotations')})")  # fmt: skip
    _add(group, "image_size", int, "side that images are resized to; 0 is the data set's own, "
         "28 for glyphs, omniglot and several data sets, 84 for mini-imagenet and folders")  # fmt: skip
    _add(group, "channels", int, "1 grayscale, 3 RGB; 0 is the data set's own, 1 for glyphs, omniglot "
         "and several data sets, 3 for mini-imagenet and folders")  # fmt: skip
    _add(group, "objectives", str, "one objective a data set, or one an alphabet or script")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and inner loop")
    _add(group, "model", str, "network")
    _add(group, "hidden", int, "filters or units a layer")
    _add(group, "pool", str, "conv4: strided, or max-pooled")
    _add(group, "norm", str, "how features are normalised: by the batch (transductive), by the "
         "support set, by groups of channels, not at all")  # fmt: skip
    _add(group, "protocol", str, "how queries are normalised in validation and test")
    _add(group, "learner", str, "inner loop")
    _add(group, "inner_lr", float, "inner rate; multiplies a mean loss")
    _add(group, "inner_steps", int, "inner steps in training")
    _add(group, "test_steps", int, "inner steps in validation and test")
    _add(group, "inner_optimizer", str, "of reptile; adam has beta1 = 0")
    _add(group, "inner_batch", int, "reptile: support examples a step; 0 is all")
    _add(group, "train_shots", int, "support examples a class in training; 0 is --shots")
    group.add_argument("--learned-rates", action="store_true", default=None,
                       help="maml, fomaml: learn a rate for each layer and step (MAML++)")  # fmt: skip
    _add(group, "multi_step_loss", int, "iterations over which the query losses of all inner steps "
         "count, the last one's more and more (MAML++), if there are 2 or more; 0 is none")  # fmt: skip
    _add(
        group, "first_order_until", int, "iterations without second derivatives (MAML++); 0 is none"
    )
    group.add_argument("--constant-memory", action="store_true", default=None,
                       help="for many inner steps: memory that does not grow with them, for "
                       "two to three times the time")  # fmt: skip
    group = parser.add_argument_group("outer loop")
    _add(group, "iterations", int, "meta-updates")
    _add(group, "meta_batch", int, "tasks in each")
    _add(group, "share", str, "tasks of several data sets: equal numbers, or by their classes")
    _add(group, "disagree", float, "share of the training tasks with wrong query targets")
    _add(group, "disagree_kind", str, "random ones, the same wrong ones in all of them, or opposed "
         "to those of another task")  # fmt: skip
    _add(group, "within", str, "how a loss-based rule combines an objective's tasks")
    group.add_argument("--rule-options", nargs="+", action="extend", metavar="RULE.OPTION=VALUE",
                       help="options of weighting rules; in TOML a table, [rule-options.RULE] "
                       f"(defaults: {_rule_options()})")  # fmt: skip
    group.add_argument("--shared", metavar="NAME", help="gradnorm's shared weights, a parameter or "
                       "module by name (default: the last shared layer)")  # fmt: skip
    _add(group, "meta_lr", float, "outer rate")
    _add(group, "meta_optimizer", str, "outer optimiser")
    _add(group, "meta_schedule", str, "of the outer rate, over the run")
    _add(group, "meta_lr_final", float, "what a schedule leads to")
    _add(group, "clip_value", float, "bound on the meta-gradient's entries; 0 is none")
    _add(group, "clip_norm", float, "bound on its length; 0 is none")
    _add(group, "nonfinite", str, "a task whose loss or gradient is NaN or inf")
    group.add_argument("--validate-every", type=int, metavar="N", help="iterations between "
                       "validations (default: a tenth of the run, at most 500)")  # fmt: skip
    _add(group, "validation_episodes", int, "episodes of a validation")
    _add(group, "checkpoint_every", int, "iterations between checkpoints")
    _add(group, "log_every", int, "iterations between lines of metrics.jsonl")
    _add_machine(parser)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    _add(group, "device", str, "cpu, cuda, mps")
    _add(group, "threads", int, "CPU threads; 0 is PyTorch's choice")
    group.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _config(args: argparse.Namespace, **more: Any) -> TrainConfig:
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    if "rule_options" in given:
        given["rule_options"] = parse_rule_options(given["rule_options"])
    config = TrainConfig.of(**{**given, **more})
    if config.threads == 0:
        import torch

        config = dataclasses.replace(config, threads=torch.get_num_threads())
    return config


def _use_machine(config: TrainConfig, team: Team) -> None:
    """The config's threads, but of several processes on one machine none more than its share."""
    import torch

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if team.size > 1 else 1
    if config.threads:
        share = max(1, (os.cpu_count() or 1) // local) if local > 1 else config.threads
        torch.set_num_threads(min(config.threads, share))
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device {config.device}: not usable here ({str(error).splitlines()[0]}); try cpu"
        ) from error
    if local > 1 and (
        config.device not in ("cpu", "cuda")
        or (config.device == "cuda" and local > torch.cuda.device_count())
    ):
        raise InputError(
            f"--device {config.device}: {local} processes on this machine work on cpu, or on cuda "
            "with a GPU each; lower --nproc-per-node"
        )


def _data(args: argparse.Namespace) -> None:
    from gametalearn.data.catalog import describe, prepare
    from gametalearn.data.packed import data_root

    root = data_root()
    if args.action == "list":
        if args.name:
            raise InputError(f"data list takes no name, got '{args.name}'")
        for name, state in describe(root):
            print(f"{name:14} {state}")
        return
    if not args.name:
        raise InputError("data prepare: name a data set: omniglot, mini-imagenet or glyphs")
    print(prepare(args.name, root, args.source, skip_bad=args.skip_bad))


def _episodes(args: argparse.Namespace) -> None:
    from gametalearn.build import build_source
    from gametalearn.episodes import EpisodeSampler
    from gametalearn.report import contact_sheet

    config = _config(args)
    if args.episodes < 1:
        raise InputError(f"--episodes must be at least 1, got {args.episodes}")
    source = build_source(config, args.on)
    batch = source.sample(args.episodes)
    print(
        f"{len(batch)} episodes of {config.dataset} ({args.on}), seed {config.seed}: "
        f"support {tuple(batch.support_x.shape[1:])}, query {tuple(batch.query_x.shape[1:])}"
    )
    if not isinstance(source, EpisodeSampler) or batch.classes is None:
        if config.regression:
            raise InputError(f"episodes draws images; {config.dataset} has none")
        raise InputError("episodes draws one data set at a time; name one with --dataset")
    data, names = source.dataset, []
    for i, classes in enumerate(batch.classes.tolist()):
        names.append([data.classes[c] for c in classes])
        groups = sorted({data.groups[int(data.class_group[c])] for c in classes})
        print(f"  {i + 1}: {', '.join(names[-1])}  [{', '.join(groups)}]")
    print(f"wrote {contact_sheet(batch, args.out, config.ways, names)}")


def _train(args: argparse.Namespace) -> None:
    from gametalearn.distributed import joined
    from gametalearn.training import train

    with joined() as team:
        config, out = team.on_first(lambda: _run_of(args))
        team.everywhere(lambda: _use_machine(config, team))
        moved = args.resume is not None and args.dataset is not None
        run = train(
            config, out, overwrite=args.overwrite, progress=not args.quiet, team=team, moved=moved
        )
        value = run.best["value"] * (1 if run.score.higher_is_better else -1)
        shown = f"{100 * value:.2f}%" if run.score.format == "percent" else f"{value:.4g}"
        shown = shown if math.isfinite(value) else "not finite"
        if team.first:
            print(
                f"{run.iteration} iterations in {run.seconds:.0f} s; best validation "
                f"{run.score.name} {shown} at iteration {run.best['iteration']}; next: "
                f"gametalearn evaluate {out}"
            )


def _run_of(args: argparse.Namespace) -> tuple[TrainConfig, Path]:
    """The settings of a run, given by flags or by the run that goes on, and its folder."""
    if args.resume is None:
        if args.out is None:
            raise InputError(
                "train: give --out RUN, the folder that keeps the model, or --resume RUN"
            )
        config, there = _config(args), args.out / "config.toml"
        if args.threads is None and there.exists():  # torchrun has another default
            config = dataclasses.replace(config, threads=read_toml(there).get("threads", 0))
        return config, args.out
    if args.out is not None and args.out != args.resume:
        raise InputError(f"--resume {args.resume} goes on there; drop --out {args.out}")
    file = args.resume / "config.toml"
    if not file.exists():
        raise InputError(f"--resume {args.resume}: no run there (config.toml is missing)")
    config = TrainConfig.from_dict(read_toml(file), str(file))
    if args.dataset is not None:
        from gametalearn.provenance import relocated

        config = relocated(config, args.dataset)
    return config, args.resume


def _evaluate(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from gametalearn.build import build_source, objective_names, stream_seed
    from gametalearn.distributed import joined
    from gametalearn.evaluation import protocol_of
    from gametalearn.protocols import evaluate_all, write_evaluations
    from gametalearn.training import load_run

    if (args.protocol == "lake") != (args.source is not None):
        raise InputError("--protocol lake and --source PATH, its runs, go together")
    for name in ("on", "episodes"):
        if args.protocol == "lake" and (value := getattr(args, name)) is not None:
            raise InputError(f"--protocol lake has tasks of its own; leave out --{name} {value}")
    on, episodes = args.on or "test", 1000 if args.episodes is None else args.episodes
    if args.query_at_a_time and args.protocol in ("transductive", "inductive"):
        raise InputError(
            f"--query-at-a-time is a protocol of its own, not {args.protocol}; give it alone, or "
            "with --protocol both or lake"
        )
    with joined() as team:
        run = load_run(args.folder, args.checkpoint, args.device, dataset=args.dataset, team=team)
        changes = {k: getattr(args, k) for k in ("threads", "seed") if getattr(args, k) is not None}
        config = dataclasses.replace(run.config, **changes)
        team.everywhere(lambda: _use_machine(config, team))
        learner = run.test_learner
        if args.inner_steps is not None:
            learner = run.learner.for_test(args.inner_steps)
        own: Any = protocol_of(run.model) if config.protocol == "auto" else config.protocol
        wanted = own if args.protocol in (None, "auto") else args.protocol
        protocols: Any = ["transductive", "inductive"] if wanted in ("both", "lake") else [wanted]
        if args.query_at_a_time:
            protocols = [*(protocols if len(protocols) > 1 else []), "query-at-a-time"]
        title = f"{args.folder} ({args.checkpoint}, iteration {run.iteration})"
        if wanted == "lake":
            if team.first:  # 20 tasks need no sharing
                _lake(args, run, learner, protocols, own, title)
            return
        source = team.everywhere(lambda: build_source(config, on))
        silent = args.quiet or not sys.stderr.isatty() or not team.first
        with tqdm(total=episodes * len(protocols), desc=f"evaluate {args.folder}",
                  leave=False, disable=silent) as bar:  # fmt: skip
            found = evaluate_all(
                run.model, source, learner, episodes, stream_seed(config.seed, on),
                protocols, meta=run.meta, loss=run.loss, score=run.score,
                progress=bar.update, team=team,
            )  # fmt: skip
        if team.first:
            names = objective_names(config, on)
            for result in found.values():
                print(f"{title}: {result}")
                if len(names) > 1:
                    for group in result.by_group():
                        print(f"  {names[group]}: {result.of_group(group)}")
            file = args.folder / "evaluation.json"
            write_evaluations(file, found, own, run.iteration, learner.steps)


def _lake(
    args: argparse.Namespace, run: Any, learner: Any, protocols: Any, own: Any, title: str
) -> None:
    from gametalearn.data.lake import load_lake
    from gametalearn.protocols import check_lake, evaluate_lake, write_lake

    check_lake(run.config)
    tasks = load_lake(args.source)
    found = evaluate_lake(run.model, tasks, learner, protocols, meta=run.meta, loss=run.loss)
    records = write_lake(args.folder / "lake.json", found, own, run.iteration, learner.steps)
    for protocol, record in records.items():
        print(
            f"{title}: Lake's one-shot task, error rate {100 * record['error_rate']:.2f}% +/- "
            f"{100 * record['ci95']:.2f}% (mean of {len(record['runs'])} runs, standard deviation "
            f"{100 * record['std']:.2f}%, {protocol})"
        )


def _compare(args: argparse.Namespace) -> None:
    from gametalearn.comparison import compare
    from gametalearn.distributed import joined
    from gametalearn.jobs import runs_of
    from gametalearn.report import plot_comparison, write_report

    with joined() as team:
        config = team.on_first(lambda: _config(args))
        team.everywhere(lambda: _use_machine(config, team))
        rules, primary = (
            [name.strip() for name in names.split(",") if name.strip()]
            for names in (args.rules, args.primary)
        )
        try:
            seeds = [int(s) for s in args.seeds.rstrip(",").split(",")]
        except ValueError:
            raise InputError(
                f"--seeds takes a number or a list such as 0,1,2; got '{args.seeds}'"
            ) from None
        numbers = seeds if "," in args.seeds else range(seeds[0])
        if args.plan:
            if team.first:
                _plan(runs_of(config, rules, numbers, args.out), args.overwrite)
            return
        comparison = compare(
            config,
            rules,
            numbers,
            args.episodes,
            args.out,
            primary=primary,
            overwrite=args.overwrite,
            progress=not args.quiet,
            jobs=args.jobs,
            team=team,
            command=args.command_line,
        )
        if team.first:
            print(comparison.table(), flush=True)
            files = [args.out / "results.json", *plot_comparison(comparison, args.out)]
            print(f"\nwrote {', '.join(map(str, [*files, write_report(args.out)]))}")


def _plan(runs: Sequence[Planned], overwrite: bool) -> None:
    from gametalearn.jobs import commands_of

    commands = commands_of(runs, overwrite)
    print("\n".join(commands))
    if any(set(line) & set("'\"\\") for line in commands):
        _say("xargs takes quotes away; write | tr '\\n' '\\0' | xargs -0 -n 1 sh -c", shared=True)


def _report(args: argparse.Namespace) -> None:
    from gametalearn.report import write_report

    print(f"wrote {write_report(args.folder)}")


if __name__ == "__main__":
    sys.exit(main())
