"""The command line: ``gametalearn data | episodes | train | evaluate | compare | report | bench``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gametalearn import registry
from gametalearn.config import EPISODES, MACHINE, MODEL, OUTER, TrainConfig, default_text
from gametalearn.engine.allocator import keep_memory
from gametalearn.errors import InputError, SharedError, summary
from gametalearn.settings import read_toml, settings_of, text_of

__all__ = ["add_settings", "main"]


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
    parser = _parser(words)
    try:
        args = parser.parse_args(_with_config(parser, words))
        with _ended_by_ctrl_c():
            from gametalearn import commands  # imports torch
        keep_memory()
        args.command_line = shlex.join(["gametalearn", *words])
        with _warnings_in_one_line():
            getattr(commands, args.command)(args)
    except InputError as error:
        if "--debug" in words:
            traceback.print_exc()
        _say(_with_flags(parser, str(error)), shared=isinstance(error, SharedError))
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


def _with_flags(parser: argparse.ArgumentParser, message: str) -> str:
    """A message of the library, which speaks of arguments in backquotes, in terms of flags."""
    flags = {
        action.dest: max(action.option_strings, key=len)
        for command in _commands(parser).values()
        for action in command._actions
        if action.option_strings
    }
    return re.sub(r"`(\w+)`", lambda found: flags.get(found[1], found[0]), message)


def _with_config(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """Make the values of a ``--config`` file the command's defaults; flags win over them."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    file = finder.parse_known_args(words)[0].config
    command = _commands(parser).get(words[0]) if words else None
    if file is None or command is None or words[0] == "bench":  # bench's --config is a name
        return words
    options = {a.dest: a for a in command._actions if a.option_strings}
    for name in ("help", "config", "debug"):
        options.pop(name, None)
    for key, value in read_toml(file).items():
        action = options.get(key.replace("-", "_"))
        if action is None:
            known = ", ".join(sorted(name.replace("_", "-") for name in options))
            raise InputError(f"{file}: '{key[:60]}' is no option of {words[0]}; options: {known}")
        if action.dest == "rule_options":
            before = command.get_default("rule_options_of_file") or {}
            joined = {**before, **value} if isinstance(value, dict) else value
            command.set_defaults(rule_options_of_file=joined)
        else:
            command.set_defaults(**{action.dest: _value(file, key, value, action)})
            action.required = False
    return words


def _value(file: Path, key: str, value: Any, action: argparse.Action) -> Any:
    """A value of a TOML file as the option has it; settings check theirs themselves."""
    if isinstance(value, list) and action.type in (None, str):
        value = ("+" if key == "dataset" else ",").join(map(str, value))
    if action.dest in settings_of(TrainConfig):
        return value
    kind: Any = bool if action.nargs == 0 else action.type or str
    try:
        fits = isinstance(value, str) if kind is Path else kind(str(value)) == value
    except ValueError:
        fits = False
    if kind is bool or isinstance(value, bool):
        fits = kind is bool and isinstance(value, bool)
    if kind is str and isinstance(value, int):  # seeds = 3
        value, fits = str(value), True
    if not fits or (action.choices is not None and value not in action.choices):
        wanted = f"one of {', '.join(action.choices)}" if action.choices else kind.__name__
        raise InputError(f"{file}: {key} must be {wanted}, got {str(value)[:60]!r}")
    return kind(value)


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
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

    def command(name: str, does: str, example: str) -> Callable[..., Any]:
        sub = commands.add_parser(
            name, help=does, description=f"{does[0].upper()}{does[1:]}.", formatter_class=_Help,
            epilog=f"example:\n  gametalearn {example}", allow_abbrev=False,
        )  # fmt: skip
        sub.add_argument("--debug", action="store_true", help="Show a traceback for bad input.")
        if name != "bench":
            sub.add_argument("--config", type=Path, metavar="FILE",
                             help="TOML file of options; flags win over it.")  # fmt: skip
        return sub.add_argument

    add = command("data", "prepare data sets, or list what is there",
                  "data prepare omniglot --source ~/omniglot")  # fmt: skip
    add("action", choices=("prepare", "list"), help="What to do.")
    add("name", nargs="?", help="omniglot, mini-imagenet or glyphs.")
    add("--source", type=Path, metavar="PATH",
        help="Folder or archives to read; without it, download where that exists.")  # fmt: skip
    add("--skip-bad", action="store_true", help="Leave out unreadable images.")

    add = command("episodes", "sample episodes, and draw them as a PNG",
                  "episodes --dataset glyphs --ways 5 --shots 2 --out episodes.png")  # fmt: skip
    add_settings(commands.choices["episodes"], (EPISODES,), also=("seed",))
    add("--episodes", type=int, default=4, metavar="N", help="How many. Default: 4.")
    add("--on", choices=SPLITS, default="train", help="Classes to draw from. Default: train.")
    add("--out", type=Path, default=Path("episodes.png"), metavar="PNG",
        help="The sheet. Default: episodes.png.")  # fmt: skip

    add = command("train", "meta-train one model",
                  "train --dataset omniglot --rule agreement --iterations 2000 --out runs/a")  # fmt: skip
    add_settings(commands.choices["train"], (EPISODES, MODEL, OUTER, MACHINE))
    add("--quiet", action="store_true", help="Show no progress on stderr.")
    add("--out", type=Path, metavar="RUN", help="Folder of the run.")
    add("--resume", type=Path, metavar="RUN",
        help="Go on with RUN; needs no other flag, but --dataset folder:PATH where its folder of "
        "images has moved, and the names of parts that are not built in or installed.")  # fmt: skip
    add("--trust", action="store_true",
        help="With --resume: import the parts that the run's files name as module:attribute.")  # fmt: skip
    add("--overwrite", action="store_true", help="Start anew if RUN exists.")

    add = command("evaluate", "test a trained run on unseen classes",
                  "evaluate runs/a --episodes 1000 --protocol both")  # fmt: skip
    add("folder", type=Path, metavar="RUN", help="What train --out wrote.")
    add("--episodes", type=int, metavar="N", help="Test episodes. Default: 1000.")
    add("--protocol", choices=("auto", "transductive", "inductive", "both", "lake"),
        help="How queries are normalised; lake: the 20 runs of Lake's one-shot task, both ways. "
        "Default: as in training.")  # fmt: skip
    add("--query-at-a-time", action="store_true",
        help="Predict each query from the support set and itself alone, the strictest way; with "
        "--protocol both or lake, beside the others.")  # fmt: skip
    add("--source", type=Path, metavar="PATH",
        help="Of --protocol lake: all_runs.zip, or the folder with run01 to run20.")  # fmt: skip
    add("--checkpoint", choices=("best", "latest"), default="best",
        help="The weights that were best on validation, or the latest. Default: best.")  # fmt: skip
    add("--on", choices=SPLITS, help="Classes to test on. Default: test.")
    add("--inner-steps", type=int, metavar="N", help="Inner steps. Default: the run's.")
    add("--seed", type=int, metavar="N", help="Seed of the episodes. Default: the run's.")
    add("--dataset", metavar="NAME", help="Where the run's folder of images lies now, as "
        "folder:PATH, if it has moved.")  # fmt: skip
    for name in ("model", "learner", "loss", "score"):
        add(f"--{name}", metavar="NAME",
            help=f"The run's {name}, repeated, where it is a module:attribute.")  # fmt: skip
    add("--trust", action="store_true",
        help="Import the parts that the run's files name as module:attribute.")  # fmt: skip
    add_settings(commands.choices["evaluate"], (MACHINE,), default="the run's")
    add("--quiet", action="store_true", help="Show no progress on stderr.")

    add = command("compare", "train several rules on the same episodes, and compare them",
                  "compare --dataset omniglot --rules uniform,agreement,norm-control --seeds 3 "
                  "--out runs/cmp")  # fmt: skip
    add_settings(
        commands.choices["compare"], (EPISODES, MODEL, OUTER, MACHINE), skip=("rule", "seed")
    )
    rules = "uniform,agreement,norm-control"
    add("--rules", default=rules, metavar="A,B,...",
        help=f"Weighting rules: {', '.join(registry.names('rule'))}, torchjd:NAME, "
        f"module:attribute. Default: {rules}.")  # fmt: skip
    add("--seeds", default="5", metavar="N|A,B,...",
        help="N: the seeds 0 to N-1; or a list, one seed as 7,. Seeds that are added later are "
        "trained alone; below 3 there is no interval. Default: 5.")  # fmt: skip
    add("--primary", default="", metavar="A,B,...",
        help="Rules whose difference from uniform is what the comparison is for: their p-values are "
        "adjusted among themselves alone.")  # fmt: skip
    add("--episodes", type=int, default=600, metavar="N",
        help="Test episodes per seed. Default: 600.")  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR",
        help="Folder for results.json, plots and runs; finished runs are kept.")  # fmt: skip
    add("--jobs", type=int, default=1, metavar="N",
        help="Runs trained at once, each with --threads threads. Default: 1.")  # fmt: skip
    add("--quiet", action="store_true", help="Show no progress on stderr.")
    add("--overwrite", action="store_true", help="Train everything anew.")
    add("--plan", action="store_true",
        help="Train nothing: print a `gametalearn train` for each run, for xargs, GNU parallel or a "
        "cluster; the same compare without --plan collects them.")  # fmt: skip

    add = command("report", "write report.html of a finished comparison", "report runs/cmp")
    add("folder", type=Path, metavar="DIR", help="What compare --out wrote.")

    command("bench", "time a meta-gradient beside learn2learn's, and compare both with float64",
            "bench --config omniglot-5w1s --threads 2 --json bench.json")  # fmt: skip
    if "bench" in words:
        with _ended_by_ctrl_c():
            from gametalearn.benchmark.command import add_options  # imports torch
        add_options(commands.choices["bench"])
    return parser


SPLITS = ("train", "val", "test")


def add_settings(
    parser: argparse.ArgumentParser,
    groups: Sequence[str],
    *,
    also: Sequence[str] = (),
    skip: Sequence[str] = (),
    default: str = "",
    config: type[TrainConfig] = TrainConfig,
) -> None:
    """A flag for each setting of some groups, and for those in ``also``, from its description."""
    into = {group: parser.add_argument_group(group) for group in groups}
    for field in settings_of(config).values():
        where: Any = into.get(field.metadata["group"], parser if field.name in also else None)
        if where is not None and field.name not in skip:
            _add_setting(where, field, default)


def _add_setting(
    group: argparse._ActionsContainer, field: dataclasses.Field[Any], default: str
) -> None:
    text = text_of(field)
    more: dict[str, Any] = {
        "help": f"{text[0].upper()}{text[1:]}. Default: {default or default_text(field)}.".replace(
            "%", "%%"
        )
    }
    if field.type == "bool":
        more["action"] = argparse.BooleanOptionalAction
    elif field.name == "rule_options":
        more |= {"nargs": "+", "action": "extend", "metavar": "RULE.OPTION=VALUE"}
    elif field.metadata["choices"]:
        more["choices"] = field.metadata["choices"]
    else:
        kind: Any = {"int": int, "float": float}.get(str(field.type), str)
        more |= {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "NAME")}
    group.add_argument(f"--{field.name.replace('_', '-')}", **more)


if __name__ == "__main__":
    sys.exit(main())
