"""Parts by name: built in, registered by an installed package, or ``package.module:attribute``.

A part is a class or function that is called with those of the offered arguments that it names, all
by keyword: ``def net(ways, input_shape)`` and ``class Net(nn.Module)`` without arguments are both
models. See `OFFERED` for what is offered to each kind.

Packages register models, datasets, learners and rules by entry points::

    [project.entry-points."gametalearn.rules"]
    my-rule = "my_package.rules:MyRule"

Nothing is imported before it is used, so a package that fails to import stops only what uses it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import os
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from gametalearn.errors import InputError, summary
from gametalearn.words import did_you_mean

__all__ = [
    "BUILT_IN",
    "HANDED_IN",
    "KINDS",
    "OFFERED",
    "Itself",
    "Part",
    "alike",
    "built_in",
    "call",
    "from_outside",
    "handed_in",
    "handed_in_with",
    "is_handed_in",
    "known",
    "name_of",
    "names",
    "refuse_untrusted",
    "require_known",
    "resolve",
    "takes",
]

KINDS = ("model", "dataset", "learner", "rule", "loss", "score", "meta_optimizer")

REGISTERED = ("model", "dataset", "learner", "rule")
"""The kinds that packages may register, in the entry-point groups ``gametalearn.models`` and so on."""


OFFERED: dict[str, str] = {
    "model": "ways (None for a learner that makes heads), input_shape, channels, image_size, hidden, pool, norm, config",
    "dataset": "split, seed, ways, shots, queries, class_split, image_size, channels, root, config",
    "learner": "inner_lr, steps, optimizer, batch, config",
    "rule": "objectives, within, balance, columns, seed, config, and the rule's own options",
    "loss": "prediction, target",
    "score": "prediction, target",
    "meta_optimizer": "named_parameters, lr, weight_decay",
}
"""The arguments that a part of each kind may name; a loss and a score are functions of both of theirs."""


@dataclass(frozen=True)
class Part:
    """Where a built-in part is, and the arguments that its name stands for."""

    target: str
    fixed: Mapping[str, Any]


@dataclass(frozen=True)
class Itself:
    """A data set that was named as an object: called without arguments, it gives the object."""

    value: Any

    def __call__(self) -> Any:
        return self.value


def _part(target: str, **fixed: Any) -> Part:
    return Part(f"gametalearn.{target}", fixed)


BUILT_IN: dict[str, dict[str, Part]] = {
    "model": {
        "conv4": _part("models:Conv4"),
        "resnet12": _part("models:ResNet12"),
        "mlp": _part("build:mlp"),
    },
    "dataset": {
        "glyphs": _part("data.glyphs:load_glyphs", seed=0),
        "omniglot": _part("data.omniglot:load_omniglot"),
        "mini-imagenet": _part("data.mini_imagenet:load_mini_imagenet"),
        "sinusoid": _part("data.sinusoid:Sinusoid"),
    },
    "learner": {
        "maml": _part("adaptation:MAML"),
        "fomaml": _part("adaptation:MAML", first_order=True),
        "anil": _part("adaptation:ANIL"),
        "metasgd": _part("adaptation:MetaSGD"),
        "reptile": _part("adaptation:Reptile"),
        "protonet": _part("prototypes:ProtoNet"),
        "proto-maml": _part("prototypes:ProtoMAML"),
    },
    "rule": {
        "uniform": _part("weighting:Uniform"),
        "agreement": _part("weighting:GradientAgreement"),
        "agreement-update": _part("weighting:GradientAgreement", signal="update"),
        "agreement-cosine": _part("weighting:GradientAgreement", normalize=True),
        "norm-control": _part("weighting:NormControl"),
        "normalized-mean": _part("weighting:NormalizedMean"),
        "geometric-median": _part("weighting:GeometricMedian"),
        "screened-mean": _part("weighting:ScreenedMean"),
        "gradnorm": _part("weighting:GradNorm"),
        "uncertainty": _part("weighting:UncertaintyWeighting"),
        "uncertainty-positive": _part("weighting:UncertaintyWeighting", form="positive"),
        "dwa": _part("weighting:DynamicWeightAverage"),
        "dtp": _part("weighting:DynamicTaskPrioritization"),
    },
    "loss": {"default": _part("losses:default_loss")},
    "score": {
        "default": _part("scores:default_score"),
        "accuracy": _part("scores:as_score", score="accuracy"),
        "binary-accuracy": _part("scores:as_score", score="binary-accuracy"),
        "multilabel-accuracy": _part("scores:as_score", score="multilabel-accuracy"),
        "mse": _part("scores:as_score", score="mse"),
        "mae": _part("scores:as_score", score="mae"),
    },
    "meta_optimizer": {
        "adam": _part("update:adam"),
        "adamw": _part("update:adamw"),
        "sgd": _part("update:sgd"),
    },
}
"""One line per part."""

TORCHJD = "torchjd:"
TORCHJD_PACKAGE = "torchjd[quadprog-projector]>=0.18"
"""What pip installs for it, wherever this package came from; pyproject.toml's extra is the same."""
PREFIXES: dict[str, str] = {"rule": TORCHJD, "dataset": "folder:"}
"""What is never read as ``module:attribute``."""

HANDED_IN = "handed-in:"
"""Prefix of a setting whose part was handed in as an object, followed by what it is called."""

_OUTSIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")


def name_of(part: object) -> str:
    """How a message or a file names a part: its function or class, with the module it comes from.

    >>> name_of(functools.partial(int, base=2))
    'partial of builtins.int (base=2)'
    """
    if isinstance(part, functools.partial):
        given = [*map(_brief, part.args), *(f"{k}={_brief(v)}" for k, v in part.keywords.items())]
        return f"partial of {name_of(part.func)}" + (f" ({', '.join(given)})" if given else "")
    named: Any = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}.{named.__qualname__}"


def _brief(value: object) -> str:
    """A plain value as it is written, and of anything else its type: others have addresses in their repr."""
    several = value if isinstance(value, tuple) else (value,)
    plain = all(isinstance(one, str | int | float | bool | None) for one in several)
    return repr(value)[:60] if plain else type(value).__name__


def handed_in(part: object) -> str:
    """The setting that stands for a part that was handed in: `HANDED_IN` and its name.

    Without the module: it is ``__main__`` in one program and another in the next.

    >>> handed_in(functools.partial(os.path.join))
    'handed-in:partial of join'
    """
    return HANDED_IN + short(name_of(part)) + _computed(part)


def _computed(part: object) -> str:
    """What tells a lambda from others: a digest of what it computes, and the Python whose code that is.

    Other functions go by their name.
    """
    code = getattr(part, "__code__", None)
    if code is None or code.co_name != "<lambda>":
        return ""
    cells = [
        cell.cell_contents for cell in getattr(part, "__closure__", None) or () if _filled(cell)
    ]
    told = (
        _content(code),
        list(map(_brief, [*(getattr(part, "__defaults__", None) or ()), *cells])),
    )
    version = ".".join(map(str, sys.version_info[:2]))
    return f" ({zlib.crc32(repr(told).encode()):08x}, Python {version})"


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # nothing was assigned to it yet
        return False


def _content(code: Any) -> tuple[Any, ...]:
    """A code object's instructions, names and constants, the same in every process."""
    constants = [
        _content(value) if hasattr(value, "co_code")
        else sorted(map(repr, value)) if isinstance(value, frozenset)
        else value
        for value in code.co_consts
    ]  # fmt: skip
    return code.co_code, constants, code.co_names


def alike(before: str, now: str) -> bool:
    """Whether two settings may stand for one part: as far as both tell what was handed in.

    Older versions told the name alone, and a lambda's digest holds for one version of Python.

    >>> alike("handed-in:MAML", "handed-in:MAML (steps=3)")
    True
    >>> alike("handed-in:MAML (steps=2)", "handed-in:MAML (steps=3)"), alike("maml", "fomaml")
    (False, False)
    >>> alike("handed-in:partial of huber", "handed-in:partial of huber (delta=2)")
    False
    """
    if before == now or not (is_handed_in(before) and is_handed_in(now)):
        return before == now
    if (HANDED_IN + "partial of ") in (before + now):  # these have always told their arguments
        return False
    (one, _, more), (other, _, too) = before.partition(" ("), now.partition(" (")
    versions = more.rpartition("Python ")[1:], too.rpartition("Python ")[1:]
    return one == other and (
        not more or not too or ("Python " in more and versions[0] != versions[1])
    )


def handed_in_with(part: object) -> str:
    """`handed_in`, and of a dataclass the fields that differ from their defaults.

    >>> from gametalearn import MAML
    >>> handed_in_with(MAML(0.1, steps=3))
    'handed-in:MAML (inner_lr=0.1, steps=3)'
    """
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return handed_in(part)
    pairs = ((f, _brief(getattr(part, f.name))) for f in dataclasses.fields(part) if f.init)
    told = [f"{f.name}={value}" for f, value in pairs if value != _brief(f.default)]
    return handed_in(part) + (f" ({', '.join(told)})" if told else "")


def short(name: str) -> str:
    """A name without its module."""
    return re.sub(r"(?<![\w.])(?:[A-Za-z_<][\w<>]*\.)+", "", name)


def is_handed_in(name: str) -> bool:
    """Whether a setting stands for a part that was handed in."""
    return name.startswith(HANDED_IN)


def from_outside(kind: str, name: str) -> bool:
    """Whether a name is ``package.module:attribute``, to be imported by what the name itself says.

    >>> from_outside("rule", "my.rules:Mine"), from_outside("rule", "torchjd:UPGrad")
    (True, False)
    """
    reserved = (PREFIXES.get(kind, HANDED_IN), HANDED_IN)
    return _OUTSIDE.fullmatch(name) is not None and not name.startswith(reserved)


def known(kind: str, name: str) -> bool:
    """Whether a name is built in or registered; nothing is imported."""
    return name in BUILT_IN[kind] or name in _entries(kind)


def built_in(kind: str, name: str) -> str | None:
    """The built-in name that a name goes by; None for a part of anyone else's.

    >>> built_in("model", "mlp"), built_in("rule", "torchjd:UPGrad"), built_in("model", "my:Net")
    ('mlp', 'torchjd', None)
    """
    prefix = PREFIXES.get(kind)
    if prefix is not None and name.startswith(prefix):
        return prefix.removesuffix(":")
    return name if name in BUILT_IN[kind] else None


def require_known(kind: str, name: str) -> None:
    """Raise an `InputError` for a name that nothing stands behind; nothing is imported."""
    prefix = PREFIXES.get(kind, HANDED_IN)
    if not (known(kind, name) or from_outside(kind, name) or name.startswith((prefix, HANDED_IN))):
        raise InputError(_unknown(kind, name))


def names(kind: str) -> list[str]:
    """The names that are built in, then those that installed packages registered."""
    return [*BUILT_IN[kind], *sorted(_entries(kind).keys() - BUILT_IN[kind].keys())]


def resolve(kind: str, name: str) -> tuple[Callable[..., Any], Mapping[str, Any]]:
    """The part of a name, and the arguments that the name stands for.

    Args:
        kind: one of `KINDS`.
        name: built in, registered, or ``package.module:attribute``, whose module is looked for in
            the working directory too. A data set may be an object, too (`Itself`).

    Raises:
        InputError: an unknown name, one that two packages registered, or one that fails to import.
    """
    if kind == "rule" and name.startswith(TORCHJD):
        part = _part("bridges.torchjd:TorchJDRule", name=name.removeprefix(TORCHJD))
        return _imported(kind, name, part.target), part.fixed
    registered = _entries(kind).get(name, [])
    if name in BUILT_IN[kind]:
        if registered:
            warnings.warn(
                f"{_word(kind)} '{name}' is built in; the one that {_owners(registered)} registered "
                "under this name is ignored",
                stacklevel=2,
            )
        part = BUILT_IN[kind][name]
        return _imported(kind, name, part.target), part.fixed
    if len(registered) > 1:
        raise InputError(
            f"{_word(kind)} '{name}' is registered by {_owners(registered)}; uninstall one, or name the "
            f"part itself, such as {registered[0].value}"
        )
    if registered:
        return _imported(kind, name, registered[0].value), {}
    if from_outside(kind, name):
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())
        return _imported(kind, name, name), {}
    raise InputError(_unknown(kind, name))


def call(
    kind: str,
    name: str,
    part: Callable[..., Any],
    offered: Mapping[str, Any],
    fixed: Mapping[str, Any] | None = None,
) -> Any:
    """Call a part with those of the offered arguments that it names, and with all of ``fixed``.

    Raises:
        InputError: it needs another argument, or is a model that was made already.
    """
    if hasattr(part, "named_parameters") and not isinstance(part, type):
        raise InputError(
            f"{_word(kind)} '{name}' is a {type(part).__name__} that was made already; name its class or a "
            "function that makes one, so that each seed has its own"
        )
    fixed = {} if fixed is None else fixed
    try:
        signature = inspect.signature(part)
    except (TypeError, ValueError):  # some classes of C extensions tell nothing
        return part(**fixed)
    kinds = inspect.Parameter
    taken = {
        p.name: offered[p.name]
        for p in signature.parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name in offered
        and p.name not in fixed
    }
    missing = [
        p.name
        for p in signature.parameters.values()
        if p.default is p.empty
        and p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
        and p.name not in {*taken, *fixed}
    ]
    if missing:
        raise InputError(
            f"{_word(kind)} '{name}' needs an argument '{missing[0]}', which is not offered to it; what makes "
            f"a {_word(kind)} may take {OFFERED[kind]}"
        )
    return part(**taken, **fixed)


def takes(part: Callable[..., Any], argument: str) -> bool:
    """Whether a part names an argument."""
    return argument in inspect.signature(part).parameters


def refuse_untrusted(
    settings: Mapping[str, Any], kinds: Iterable[str], given: Mapping[str, str], where: object
) -> None:
    """Raise an `InputError` for a ``module:attribute`` of a run's file that nobody asked for.

    Args:
        settings: what the file says.
        kinds: the kinds of parts that are about to be built.
        given: the names that the user repeated, by kind.
        where: the run's folder, for the message.
    """
    for kind in kinds:
        setting = str(settings.get(kind))
        for name in setting.split("+"):
            if from_outside(kind, name) and given.get(kind) != setting:
                raise InputError(
                    f"{where}: its {_word(kind)} is {name}, code that loading a run does not import "
                    f"unasked; repeat it (`{kind}` {setting}), or give `trust` if you trust the run"
                )


@functools.cache
def _entries(kind: str) -> dict[str, list[metadata.EntryPoint]]:
    found: dict[str, list[metadata.EntryPoint]] = {}
    if kind in REGISTERED:
        for entry in metadata.entry_points(group=f"gametalearn.{kind}s"):
            same = found.setdefault(entry.name, [])
            if entry.value not in {other.value for other in same}:  # installed twice is one
                same.append(entry)
    return found


def _word(kind: str) -> str:
    return {"dataset": "data set", "meta_optimizer": "outer optimiser"}.get(kind, kind)


def _owners(entries: list[metadata.EntryPoint]) -> str:
    return " and ".join(
        f"{entry.dist.name if entry.dist else 'an unknown package'} ({entry.value})"
        for entry in entries
    )


def _imported(kind: str, name: str, target: str) -> Callable[..., Any]:
    module, _, attribute = target.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for step in attribute.split("."):
            found = getattr(found, step)
    except ModuleNotFoundError as error:
        if name.startswith(TORCHJD):
            raise InputError(
                f"rule '{name}': {error.name} is not installed; pip install '{TORCHJD_PACKAGE}'"
            ) from error
        raise InputError(f"{_word(kind)} '{name}': no module {error.name}") from error
    except InputError as error:  # of a bridge to a package that is not there
        raise InputError(f"{_word(kind)} '{name}': {error}") from error
    except Exception as error:  # another package's code may raise anything
        reason = f"{type(error).__name__}: {summary(error)}"
        raise InputError(
            f"{_word(kind)} '{name}': {target} cannot be imported ({reason})"
        ) from error
    if kind == "dataset" and not callable(found):
        return Itself(found)
    if not callable(found) and kind != "score":  # which may be a `Score`
        raise InputError(
            f"{_word(kind)} '{name}': {target} is a {type(found).__name__}; name a class or a function"
        )
    return found  # type: ignore[no-any-return]


def _unknown(kind: str, name: str) -> str:
    choices = names(kind)
    hint = did_you_mean(name, choices)
    more = {"rule": ", torchjd:NAME", "dataset": ", folder:PATH"}.get(kind, "")
    return (
        f"unknown {_word(kind)} '{name}'; {hint}known: {', '.join(choices)}{more}, or "
        "package.module:attribute"
    )
