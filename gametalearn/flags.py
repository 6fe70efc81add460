"""Flags made of the settings' descriptions, and their defaults out of a TOML file."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gametalearn.config import TrainConfig, default_text
from gametalearn.errors import InputError
from gametalearn.settings import (
    check,
    is_part,
    parse_rule_options,
    read_toml,
    sentences_of,
    settings_of,
)
from gametalearn.words import did_you_mean

__all__ = [
    "add_settings",
    "given_by",
    "in_flags",
    "merged",
    "parsed",
    "read_config",
    "subcommands",
]


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
    text = _with_flags(f"{sentences_of(field)} Default: {default or default_text(field)}.")
    more: dict[str, Any] = {"help": text.replace("%", "%%")}
    if field.type == "bool":
        more["action"] = argparse.BooleanOptionalAction
    elif field.name == "rule_options":
        more |= {"nargs": "+", "action": "extend", "metavar": "RULE.OPTION=VALUE"}
    elif field.metadata["choices"]:
        more["choices"] = field.metadata["choices"]
    else:
        kind: Any = {"int": int, "float": float}.get(str(field.type), str)
        name = "NAME" if is_part(field) else field.name.upper()
        more |= {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, name)}
    group.add_argument(f"--{field.name.replace('_', '-')}", **more)


def _with_flags(text: str) -> str:
    """Settings in backquotes as flags.

    >>> _with_flags("Only with `meta_schedule` linear.")
    'Only with --meta-schedule linear.'
    """
    names = settings_of(TrainConfig)
    return re.sub(
        r"`(\w+)`",
        lambda found: f"--{found[1].replace('_', '-')}" if found[1] in names else found[0],
        text,
    )


def in_flags(parser: argparse.ArgumentParser, message: str) -> str:
    """A message of the library, which speaks of arguments in backquotes, in terms of flags."""
    flags = {
        action.dest: next(flag for flag in action.option_strings if flag.startswith("--"))
        for command in subcommands(parser).values()
        for action in command._actions
        if action.option_strings
    }
    return re.sub(r"`(\w+)`", lambda found: flags.get(found[1], found[0]), message)


def parsed(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """What the words say; flags that a command does not have end it with the one that was meant."""
    found, left = parser.parse_known_args(words)
    if left:
        commands = subcommands(parser)
        flag, own = left[0].partition("=")[0], commands[found.command]
        others = [name for name, one in commands.items() if flag in one._option_string_actions]
        elsewhere = f"that is a flag of {', '.join(others)}" if others else ""
        near, like = (did_you_mean(flag, own._option_string_actions, c).strip() for c in (0.8, 0.6))
        hint = near or elsewhere or like
        own.error(f"unrecognized arguments: {' '.join(left)}{'; ' * bool(hint)}{hint}")
    return found


def read_config(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """Make the values of a ``--config`` file the command's defaults; flags win over them."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    file = finder.parse_known_args(words)[0].config
    command = subcommands(parser).get(words[0]) if words else None
    if file is None or command is None or words[0] == "bench":  # bench's --config is a name
        return words
    options = {a.dest: a for a in command._actions if a.option_strings}
    for name in ("help", "config", "debug"):
        options.pop(name, None)
    written: dict[str, str] = {}
    for key, value in read_toml(file).items():
        name = key.replace("-", "_")
        first = written.setdefault(name, key)
        if first != key and name != "rule_options":  # tables, which are joined
            raise InputError(f"{file}: both '{first}' and '{key}' are there; keep one of them")
        action = options.get(name)
        if action is None:
            known = sorted(name.replace("_", "-") for name in options)
            raise InputError(
                f"{file}: '{key[:60]}' is not an option of {words[0]}; {did_you_mean(key, known)}options: "
                f"{', '.join(known)}"
            )
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
        value += "," * (key == "seeds")  # [3] is the seed 3, and 3 how many there are
    if isinstance(value, dict) and action.dest in ("share", "single"):
        value = ",".join(f"{name}={part}" for name, part in value.items())
    if isinstance(value, bool) and action.nargs == "?":  # a flag that may stand without a value
        return action.const if value else action.default
    field = settings_of(TrainConfig).get(action.dest)
    # evaluate's --protocol has more choices than a run's
    if field is not None and (action.choices or ()) == field.metadata["choices"]:
        try:
            check(field, value)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
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
        words = {bool: "true or false", int: "an integer", float: "a number"}
        wanted = (
            f"one of {', '.join(action.choices)}" if action.choices else words.get(kind, "text")
        )
        raise InputError(f"{file}: {key} must be {wanted}, got {str(value)[:60]!r}")
    return kind(value)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def given_by(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that flags and a configuration file give, and no others."""
    given = {k: v for k, v in vars(args).items() if k in settings_of(TrainConfig) and v is not None}
    options = getattr(args, "rule_options_of_file", None)
    if options is not None or "rule_options" in given:
        given["rule_options"] = merged(options, parse_rule_options(given.get("rule_options", ())))
    return given


def merged(of_file: Any, of_flags: dict[str, dict[str, Any]]) -> Any:
    """Options of rules; those of flags win. What is no table of tables, the settings refuse."""
    if not isinstance(of_file, dict) or not all(isinstance(o, dict) for o in of_file.values()):
        return of_flags if of_file is None else of_file
    rules = [*of_file, *(rule for rule in of_flags if rule not in of_file)]
    return {rule: {**of_file.get(rule, {}), **of_flags.get(rule, {})} for rule in rules}
