"""What a setting is: a dataclass field that carries its description, bounds and default in words.

Flags, ``--help``, checks, TOML files and the table in ``docs/settings.md`` are made of it.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gametalearn import registry
from gametalearn.errors import InputError, summary
from gametalearn.places import names_in

__all__ = [
    "check",
    "is_part",
    "parse_rule_options",
    "read_toml",
    "refuse_other_options",
    "refuse_unused",
    "sentences_of",
    "setting",
    "settings_of",
    "text_of",
    "unmet",
]

Field = dataclasses.Field[Any]
KINDS: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}
KIND_NAMES = {"int": "an integer", "float": "a number", "str": "text", "bool": "true or false"}

Need = tuple[str, ...] | float
"""What another setting must be: one of these, or more than a number (of data sets, their number)."""


def setting(
    default: Any,
    text: str,
    group: str,
    *,
    choices: tuple[str, ...] = (),
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = 10**9,
    learners: tuple[str, ...] = (),
    needs: Mapping[str, Need] | None = None,
    resumable: bool = False,
    shown: str = "",
    before: Any = None,
) -> Any:
    """A field of a dataclass of settings.

    Args:
        default: its value where neither the user nor the data set says another.
        text: what it is, with its unit and what 0 stands for. ``{names}`` stands for the parts of
            this kind that there are (see `gametalearn.registry`), and makes it the name of one.
        group: of flags in ``--help``.
        choices: of a text.
        least, above, most: bounds of a number; ``above`` is excluded.
        learners: the built-in learners that it is for; with another one it must be left out.
        needs: what other settings must be for it to have an effect, by their names. A part that is
            not built in may read any setting.
        resumable: whether it may change when a run goes on.
        shown: the default in words, where the value says too little.
        before: what a run did before the setting existed, if that is not the default. A setting that
            is missing in a run's files has this value.
    """
    meta = {
        "text": text, "group": group, "choices": choices, "least": least, "above": above,
        "most": most, "needs": {**({"learner": learners} if learners else {}), **(needs or {})},
        "resumable": resumable, "shown": shown,
        "before": default if before is None else before,
    }  # fmt: skip
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


def settings_of(config: Any) -> dict[str, Field]:
    """The settings of a dataclass or one of its instances, by name."""
    return {field.name: field for field in dataclasses.fields(config)}


def is_part(field: Field) -> bool:
    """Whether a setting is the name of a part."""
    return "{names}" in field.metadata["text"]


def text_of(field: Field) -> str:
    """What a setting is, with the names of the parts that there are."""
    text = str(field.metadata["text"])
    if is_part(field):
        text = text.replace("{names}", ", ".join(registry.names(field.name)))
    return text


def sentences_of(field: Field, more: str = "") -> str:
    """What a setting is, ``more`` of it in the same sentence, and then what it has an effect for."""
    text = text_of(field)
    needs = " and ".join(
        f"{'for' if other in registry.KINDS else 'with'} {_in_words(other, need, '`')}"
        for other, need in field.metadata["needs"].items()
    )
    return f"{text[0].upper()}{text[1:]}{more}.{f' Only {needs}.' if needs else ''}"


def unmet(field: Field, values: Mapping[str, Any], among: Sequence[str] = ()) -> str | None:
    """The other setting because of which one has no effect; None where it has one.

    Args:
        field: the setting.
        values: of all settings; they may come from a file and be of any type.
        among: the other settings that are looked at; by default all.
    """
    for other, need in field.metadata["needs"].items():
        if (not among or other in among) and not _met(other, values.get(other), need):
            return str(other)
    return None


def _met(other: str, value: Any, need: Need) -> bool:
    several = names_in(str(value)) if other == "dataset" else [str(value)]
    if not isinstance(need, tuple):
        number = len(several) if other == "dataset" else value
        return not isinstance(number, int | float) or number > need
    if other not in registry.KINDS:
        return value in need
    built_in = [registry.built_in(other, name) for name in several]
    return any(name in need for name in built_in) or (
        None in built_in and "config" in registry.OFFERED[other]
    )


def refuse_unused(field: Field, other: str, got: str) -> NoReturn:
    """Raise the `InputError` for a setting that has no effect, since another one is what was ``got``."""
    meant = _in_words(other, field.metadata["needs"][other], "`")
    raise InputError(f"`{field.name}` applies to {meant}, not to {got}; leave it out")


def _in_words(other: str, need: Need, quote: str = "") -> str:
    if other == "dataset" and not isinstance(need, tuple):
        return "several data sets"
    words = ", ".join(need) if isinstance(need, tuple) else f"above {need:g}"
    return words if other in registry.KINDS else f"{quote}{other}{quote} {words}"


def check(field: Field, value: Any) -> None:
    """Is a value of its setting's type, in its range, and fit to be written to a file?

    Raises:
        InputError: it is not.
    """
    name, meta = field.name, field.metadata
    if field.default_factory is dict:
        _check_options(name, value)
        return
    _check_kind(name, str(field.type), value)
    if meta["choices"] and value not in meta["choices"]:
        raise InputError(f"`{name}` must be one of {', '.join(meta['choices'])}; got '{value}'")
    if isinstance(value, bool | str):
        return
    if not value > meta["above"]:
        raise InputError(f"`{name}` must be positive, got {value}")
    if not meta["least"] <= value <= meta["most"]:
        bound = f"at least {meta['least']}" if value < meta["least"] else f"at most {meta['most']}"
        raise InputError(f"`{name}` must be {bound}, got {value}")


def _check_kind(name: str, kind: str, value: Any, of: str = "") -> None:
    number = kind == "float" and isinstance(value, int)
    if not (isinstance(value, KINDS[kind]) or number) or isinstance(value, bool) != (
        kind == "bool"
    ):
        raise InputError(f"`{name}`{of} must be {KIND_NAMES[kind]}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"`{name}`{of} must be a number, got {value}")
    if isinstance(value, str) and not (
        value.isprintable() and value == value.encode(errors="replace").decode()
    ):
        raise InputError(f"`{name}`{of} must be printable text in UTF-8, got {value!r}")


def _check_options(name: str, options: Any) -> None:
    """Is this a table of tables of plain values? What a rule takes, `make_rule` knows."""
    if not isinstance(options, dict) or not all(isinstance(o, dict) for o in options.values()):
        raise InputError(f"`{name}` must be a table of options for each rule, got {options!r}")
    for rule, own in options.items():
        for option, value in own.items():
            for text in (rule, option):
                _check_kind(name, "str", text)
            for one in value if isinstance(value, list) else [value]:
                if type(one) not in KINDS.values():
                    raise InputError(
                        f"`{name}` {rule}.{option} must be a number, text, true or false, or a list "
                        f"of them; got {value!r}"
                    )
                _check_kind(name, type(one).__name__, one, f" {rule}.{option}")


def parse_rule_options(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``RULE.OPTION=VALUE`` each, the value as in TOML or a bare word; the last one of several wins.

    >>> parse_rule_options(["dwa.period=10", "gradnorm.optimizer=sgd", "dtp.gamma=[1, 2.5]"])
    {'dwa': {'period': 10}, 'gradnorm': {'optimizer': 'sgd'}, 'dtp': {'gamma': [1, 2.5]}}
    """
    options: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        rule, _, option = name.rpartition(".")
        if not (rule and option and equals):
            raise InputError(
                f"`rule_options` takes RULE.OPTION=VALUE, such as dwa.period=10; got '{text[:60]}'"
            )
        try:
            plain = tomllib.loads(f"value = {value}")["value"]
        except (ValueError, RecursionError):
            plain = value
        options.setdefault(rule, {})[option] = plain
    return options


def refuse_other_options(
    options: Mapping[str, Any], rules: Collection[str], shown: Iterable[str]
) -> None:
    """Raise an `InputError` for options of a rule that is not among the rules, which are named."""
    if others := options.keys() - set(rules):
        raise InputError(
            f"`rule_options`: given for '{min(others)}', which is not among the rules {', '.join(shown)}"
        )


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's table.

    Raises:
        InputError: no such file, or not TOML; the message names the file and the line.
    """
    try:
        with path.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:  # tomllib's own errors are ValueErrors
        raise InputError(f"{path}: not a TOML file ({summary(error)})") from error


def table(config: Any, default_text: Mapping[str, str]) -> str:
    """The table of ``docs/settings.md``, in Markdown."""
    lines = ["| Setting | Default | What it is |", "|---|---|---|"]
    for name, field in settings_of(config).items():
        choices = field.metadata["choices"]
        choices = f"; one of {', '.join(choices)}" if choices else ""
        lines.append(f"| `{name}` | {default_text[name]} | {sentences_of(field, choices)} |")
    return "\n".join(lines) + "\n"
