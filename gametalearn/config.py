"""The settings of a training run: one frozen dataclass, with each data set's defaults."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from gametalearn.errors import InputError, summary
from gametalearn.places import absolute

__all__ = ["DEFAULTS", "LEARNERS", "TrainConfig", "parse_rule_options", "read_toml"]

LEARNERS = ("maml", "fomaml", "anil", "metasgd", "reptile")
MODELS = ("conv4", "resnet12", "mlp")

_SMALL = {
    "model": "conv4", "hidden": 64, "pool": "stride",
    "ways": 5, "shots": 1, "queries": 5,
    "inner_lr": 1.0, "inner_steps": 1, "test_steps": 3,
    "meta_lr": 3e-3, "meta_schedule": "cosine", "meta_optimizer": "adam", "meta_batch": 16,
}  # fmt: skip
_LARGE = {
    "model": "conv4", "hidden": 32, "pool": "max",
    "ways": 5, "shots": 1, "queries": 15,
    "inner_lr": 0.05, "inner_steps": 5, "test_steps": 10,
    "meta_lr": 1e-3, "meta_schedule": "constant", "meta_optimizer": "adam", "meta_batch": 4,
}  # fmt: skip
_SINUSOID = {
    "model": "mlp", "hidden": 40, "pool": "stride",
    "ways": 1, "shots": 10, "queries": 10,
    "inner_lr": 0.01, "inner_steps": 1, "test_steps": 10,
    "meta_lr": 1e-3, "meta_schedule": "constant", "meta_optimizer": "adam", "meta_batch": 25,
}  # fmt: skip

DEFAULTS: dict[str, dict[str, Any]] = {
    "glyphs": {**_SMALL, "iterations": 1000},
    "omniglot": {**_SMALL, "iterations": 5000, "rotations": True},
    "mini-imagenet": {**_LARGE, "iterations": 5000},
    "folder": {**_LARGE, "iterations": 5000},
    "sinusoid": {**_SINUSOID, "iterations": 20000},
}
"""What a setting is where it is not given, by data set (for several, by the first)."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run's result depends on; `TrainConfig.of` fills in a data set's defaults.

    Attributes:
        dataset: ``glyphs``, ``omniglot``, ``mini-imagenet``, ``sinusoid``, ``folder:PATH`` (made
            absolute, as seen from the working directory), or several joined by ``+``, each an
            objective.
        ways, shots, queries: classes an episode, support and query examples a class.
        split: how classes are split: ``lake`` or ``maml`` for Omniglot.
        rotations: omniglot: add each training class turned by 90, 180 and 270 degrees.
        image_size, channels: resize to a square of this side, convert to 1 (grayscale) or 3 (RGB)
            channels; 0 is the data set's own: 28 and 1 for glyphs, omniglot and several data sets,
            84 and 3 for mini-imagenet and folders, whose images may be of any size.
        objectives: ``dataset``: each data set is one objective; ``group``: each alphabet or script
            is one, and an episode's classes come from one of them.
        share: tasks of several data sets: ``fixed``, or ``proportional`` to their classes.
        disagree, disagree_kind: the share of each training meta-batch's tasks whose query targets
            are wrong, and how: ``shuffled``, ``permuted`` or ``contradictory``; see
            `gametalearn.disagreement.Disagreement`.
        learner: ``maml``, ``fomaml``, ``anil``, ``metasgd`` or ``reptile``.
        rule: the weighting rule's name; see `gametalearn.weighting.RULES`.
        rule_options: of rules, by the rule's name, such as ``{"dwa": {"period": 10}}``; see
            `gametalearn.weighting.rule_options`. In a comparison each rule takes its own.
        within: how a loss-based rule combines an objective's tasks: ``uniform`` or ``agreement``.
        shared: GradNorm's shared weights W, the name of a parameter or module; "" is the last
            shared layer.
        model: ``conv4``, ``resnet12`` or ``mlp``.
        hidden: filters (conv4) or units (mlp) a layer.
        pool: conv4's ``stride`` or ``max``.
        norm: ``batch``, ``support``, ``group`` or ``none``; see `gametalearn.models`.
        protocol: how queries are normalised in validation and test: ``transductive``,
            ``inductive``, or ``auto``, what the model's norm says.
        inner_lr: multiplies the mean support loss.
        inner_steps, test_steps: inner steps in training; in validation and test.
        inner_optimizer: ``sgd``, or for reptile ``adam`` (beta1 = 0).
        inner_batch: reptile's support examples a step, in random order; 0 is all of them.
        train_shots: support examples a class in training, where it is not ``shots``; 0 is.
        learned_rates: maml and fomaml learn an inner rate for each layer and step (MAML++).
        multi_step_loss: iterations over which the query losses of all inner steps count, and the
            last one's more and more (MAML++); 0 is none.
        first_order_until: iterations that ignore second derivatives (MAML++); 0 is none.
        constant_memory: memory that does not grow with the inner steps, for two to three times the time.
        iterations, meta_batch: meta-updates, and tasks in each.
        meta_lr, meta_optimizer: the outer rate; ``adam`` or ``sgd``.
        meta_schedule: of the outer rate: ``constant``, or ``linear`` or ``cosine`` to
            ``meta_lr_final``.
        clip_value, clip_norm: bounds on the meta-gradient's entries and on its length; 0 is none.
        nonfinite: a task whose loss or gradient is NaN or inf: ``error``, or ``skip`` and count it.
        seed: of initial weights, episodes and evaluation.
        log_every, validate_every, checkpoint_every: in iterations.
        validation_episodes: episodes of one validation.
        device: ``cpu``, ``cuda``, ...
        threads: CPU threads; results are bit-identical only for equal numbers. 0: PyTorch's choice.
    """

    dataset: str = "glyphs"
    ways: int = 5
    shots: int = 1
    queries: int = 5
    split: str = ""
    rotations: bool = False
    image_size: int = 0
    channels: int = 0
    objectives: str = "dataset"
    share: str = "fixed"
    disagree: float = 0.0
    disagree_kind: str = "shuffled"
    learner: str = "maml"
    rule: str = "uniform"
    rule_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    within: str = "uniform"
    shared: str = ""
    model: str = "conv4"
    hidden: int = 64
    pool: str = "stride"
    norm: str = "batch"
    protocol: str = "auto"
    inner_lr: float = 1.0
    inner_steps: int = 1
    test_steps: int = 3
    inner_optimizer: str = "sgd"
    inner_batch: int = 0
    train_shots: int = 0
    learned_rates: bool = False
    multi_step_loss: int = 0
    first_order_until: int = 0
    constant_memory: bool = False
    iterations: int = 1000
    meta_batch: int = 16
    meta_lr: float = 3e-3
    meta_optimizer: str = "adam"
    meta_schedule: str = "cosine"
    meta_lr_final: float = 0.0
    clip_value: float = 0.0
    clip_norm: float = 0.0
    nonfinite: str = "error"
    seed: int = 0
    log_every: int = 10
    validate_every: int = 100
    validation_episodes: int = 200
    checkpoint_every: int = 100
    device: str = "cpu"
    threads: int = 0

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            if setting.name != "rule_options":
                _check(setting.name, str(setting.type), getattr(self, setting.name))
        object.__setattr__(self, "dataset", absolute(self.dataset))  # it is frozen
        _check("dataset", "str", self.dataset)
        _check_rule_options(self.rule_options)
        for name in ("inner_lr", "meta_lr"):
            if not getattr(self, name) > 0:
                raise InputError(f"{_flag(name)} must be positive, got {getattr(self, name)}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{_flag(name)} must be one of {', '.join(choices)}; got '{getattr(self, name)}'"
                )
        if not 0 <= self.disagree <= 1:
            raise InputError(f"--disagree must be in [0, 1], a share; got {self.disagree}")
        for name, learners in _LEARNERS_OF.items():
            default = type(self).__dataclass_fields__[name].default
            if self.learner not in learners and getattr(self, name) != default:
                raise InputError(
                    f"{_flag(name)} is an option of {', '.join(learners)}; got it with --learner "
                    f"{self.learner}, leave it out"
                )
        if self.meta_schedule == "constant" and self.meta_lr_final:
            raise InputError(
                f"--meta-lr-final {self.meta_lr_final} is what a schedule leads to; give "
                "--meta-schedule linear or cosine, or leave it out"
            )
        if self.regression != (self.model == "mlp" and self.ways == 1):
            wanted = "model='mlp', ways=1" if self.regression else "another model or ways >= 2"
            raise InputError(
                f"TrainConfig: dataset '{self.dataset}' needs {wanted}; got model='{self.model}', "
                f"ways={self.ways} (TrainConfig.of('{self.dataset}') fills in its defaults)"
            )

    @classmethod
    def of(cls, dataset: str = "glyphs", **given: Any) -> Self:
        """A configuration with the data set's defaults (`DEFAULTS`) where ``given`` has no value."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := given.keys() - known:
            raise InputError(f"TrainConfig: unknown settings {', '.join(sorted(unknown))}")
        defaults = DEFAULTS.get(dataset.split("+")[0].split(":")[0], DEFAULTS["folder"])
        values = {**defaults, **{k: v for k, v in given.items() if v is not None}}
        values.setdefault("validate_every", max(1, min(500, values["iterations"] // 10)))
        return cls(dataset=dataset, **values)

    @property
    def datasets(self) -> list[str]:
        """The names joined by ``+``."""
        return self.dataset.split("+")

    @property
    def regression(self) -> bool:
        """Whether targets are real numbers: sinusoid."""
        return "sinusoid" in self.datasets

    @property
    def metric(self) -> str:
        """``accuracy``, or ``mse`` for regression."""
        return "mse" if self.regression else "accuracy"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for TOML and checkpoints; ``rule_options`` where there are any."""
        values = dataclasses.asdict(self)
        if not self.rule_options:
            del values["rule_options"]
        return values

    def of_rule(self, rule: str, seed: int) -> Self:
        """The settings of one run of a comparison, with the options of its own rule alone."""
        own = {rule: self.rule_options[rule]} if rule in self.rule_options else {}
        return dataclasses.replace(self, rule=rule, seed=seed, rule_options=own)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> Self:
        """What `as_dict` gave; ``where`` names its file in errors."""
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"{where}: settings of another version ({error})") from error


def _check(name: str, kind: str, value: Any) -> None:
    """Is a setting of its type, in its range, and fit to be written to a file?"""
    if not isinstance(value, _KINDS[kind]) or isinstance(value, bool) != (kind == "bool"):
        raise InputError(f"{_flag(name)} must be {_KIND_NAMES[kind]}, got {value!r}")
    if isinstance(value, str):
        if not (value.isprintable() and value == value.encode(errors="replace").decode()):
            raise InputError(f"{_flag(name)} must be printable text in UTF-8, got {value!r}")
    elif name == "seed":
        if abs(value) > 2**60:
            raise InputError(f"--seed must be between -2**60 and 2**60, got {value}")
    elif not isinstance(value, bool):
        if not value >= (least := _LEAST.get(name, -math.inf)):
            raise InputError(f"{_flag(name)} must be at least {least}, got {value}")
        if not value <= _MOST:
            raise InputError(f"{_flag(name)} must be at most {_MOST}, got {value}")


def _check_rule_options(options: Any) -> None:
    """Are they a table of tables of plain values? What a rule takes, `make_rule` knows."""
    if not isinstance(options, dict) or not all(isinstance(o, dict) for o in options.values()):
        raise InputError(
            f"--rule-options must be a table of options for each rule, got {options!r}"
        )
    for rule, own in options.items():
        _check("rule_options", "str", rule)
        for option, value in own.items():
            _check("rule_options", "str", option)
            for one in value if isinstance(value, list) else [value]:
                kind = type(one).__name__
                if kind not in _KINDS or (kind == "float" and not math.isfinite(one)):
                    raise InputError(
                        f"--rule-options {rule}.{option} must be a number, text, true or false, or "
                        f"a list of them; got {value!r}"
                    )
                _check(f"rule_options {rule}.{option}", kind, one)


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
                f"--rule-options takes RULE.OPTION=VALUE, such as dwa.period=10; got '{text[:60]}'"
            )
        try:
            plain = tomllib.loads(f"value = {value}")["value"]
        except (ValueError, RecursionError):
            plain = value
        options.setdefault(rule, {})[option] = plain
    return options


_KINDS: dict[str, Any] = {
    "int": (int,), "float": (int, float), "str": (str,), "bool": (bool,),
}  # fmt: skip
_KIND_NAMES = {"int": "an integer", "float": "a number", "str": "text", "bool": "true or false"}
_MOST = 10**9
_LEAST: dict[str, int] = {
    "ways": 1, "shots": 1, "queries": 1, "hidden": 1, "inner_steps": 0, "test_steps": 0,
    "iterations": 1, "meta_batch": 1, "clip_value": 0, "clip_norm": 0, "log_every": 1,
    "image_size": 0, "channels": 0, "validate_every": 1, "validation_episodes": 2,
    "checkpoint_every": 1, "threads": 0, "inner_batch": 0, "train_shots": 0, "multi_step_loss": 0,
    "first_order_until": 0, "meta_lr_final": 0, "inner_lr": 0, "meta_lr": 0,
}  # fmt: skip

_LEARNERS_OF = {
    "inner_optimizer": ("reptile",),
    "inner_batch": ("reptile",),
    "learned_rates": ("maml", "fomaml"),
    "multi_step_loss": ("maml", "fomaml", "anil", "metasgd"),
    "first_order_until": ("maml", "anil", "metasgd"),
    "constant_memory": ("maml", "anil", "metasgd"),
}
"""The learners that an option is for."""

CHOICES: dict[str, tuple[str, ...]] = {
    "objectives": ("dataset", "group"),
    "share": ("fixed", "proportional"),
    "disagree_kind": ("shuffled", "permuted", "contradictory"),
    "learner": LEARNERS,
    "within": ("uniform", "agreement"),
    "model": MODELS,
    "pool": ("stride", "max"),
    "norm": ("batch", "support", "group", "none"),
    "protocol": ("auto", "transductive", "inductive"),
    "inner_optimizer": ("sgd", "adam"),
    "meta_optimizer": ("adam", "sgd"),
    "meta_schedule": ("constant", "linear", "cosine"),
    "nonfinite": ("error", "skip"),
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


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
