"""The settings of a training run: one frozen dataclass, with each data set's defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from gametalearn import registry
from gametalearn.errors import InputError
from gametalearn.places import absolute, folder_of, names_in, shown
from gametalearn.settings import check, refuse_unused, setting, settings_of, unmet
from gametalearn.shares import divided, numbers_in
from gametalearn.words import did_you_mean

__all__ = ["DEFAULTS", "RESUMABLE", "TrainConfig", "default_text", "usual_test_steps"]

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

_BESIDE = {
    "model": "conv4", "hidden": 32, "pool": "max", "image_size": 28, "channels": 3,
    "ways": 5, "shots": 1, "queries": 5,
    "inner_lr": 0.1, "inner_steps": 1, "test_steps": 1, "learned_rates": True,
    "meta_lr": 3e-3, "meta_schedule": "cosine", "meta_optimizer": "adam", "meta_batch": 8,
}  # fmt: skip

BESIDE = "several with photographs"
"""The name in `DEFAULTS` of several data sets of which one has photographs, or may have."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "glyphs": {**_SMALL, "iterations": 1000},
    "omniglot": {**_SMALL, "iterations": 5000, "rotations": True},
    "mini-imagenet": {**_LARGE, "iterations": 5000},
    "folder": {**_LARGE, "iterations": 5000},
    BESIDE: {**_BESIDE, "iterations": 5000},
    "sinusoid": {**_SINUSOID, "iterations": 20000},
}
"""The value of a setting that is not given, by data set (for several others than `BESIDE`, by the first)."""


TOGETHER = (28, 1)
"""Side and channels of the images of several data sets, where the settings have no other."""


EPISODES, MODEL, OUTER, MACHINE = "episodes", "model and inner loop", "outer loop", "machine"
"""Groups of flags."""

IMAGES = ("glyphs", "omniglot", "mini-imagenet", "folder")
"""Built-in data sets that `EpisodeSampler` draws from."""


def is_images(name: str) -> bool:
    """Whether one data set is built in, or a folder, of images."""
    return name in IMAGES or folder_of(name) is not None


OF_OBJECTIVES = ("gradnorm", "uncertainty", "uncertainty-positive", "dwa", "dtp")
"""Built-in rules that weight objectives; the others weight tasks."""

IMPOSSIBLE = ("learner", "meta_schedule")
"""Settings that no other may ever contradict. For the rest, a setting without effect is refused when a
user gives it, but may be present in the files of older runs."""


# fmt: off
@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run's result depends on; `TrainConfig.of` fills in a data set's defaults.

    Each setting is described once, at its field: ``docs/settings.md`` and ``gametalearn train
    --help`` are generated from that.

    Raises:
        InputError: a value of the wrong type or out of range, or settings that do not fit together.
    """

    dataset: str = setting(
        "glyphs", "the data set: {names}, folder:PATH for class folders of images, or "
        "module:attribute; several can be joined by +, and each is then an objective", EPISODES)
    ways: int = setting(5, "number of classes per episode", EPISODES)
    shots: int = setting(1, "number of support examples per class", EPISODES, least=1)
    queries: int = setting(5, "number of query examples per class", EPISODES, least=1)
    split: str = setting(
        "", "how classes are divided into training, validation and test; for omniglot, lake or maml",
        EPISODES, shown="the data set's own")
    rotations: bool = setting(
        False, "add each training class, turned by 90, 180 and 270 degrees, as further classes",
        EPISODES, needs={"dataset": ("omniglot",)})
    image_size: int = setting(
        0, "resize images to squares of this side in pixels; 0 keeps the data set's own size, "
        "which is 28 for glyphs and omniglot, and 84 for mini-imagenet and folders; those of several "
        "data sets, which go through one model, are then all resized to 28", EPISODES, least=0, needs={"dataset": IMAGES})
    channels: int = setting(
        0, "convert images to 1 channel (grayscale) or 3 (RGB); 0 keeps the data set's own number, "
        "which is 1 for glyphs and omniglot, and 3 for mini-imagenet and folders; those of several "
        "data sets are then all converted to 1",
        EPISODES, needs={"dataset": IMAGES})
    objectives: str = setting(
        "dataset", "what counts as an objective: each data set, or each alphabet or script "
        "(group), in which case all classes of an episode come from one of them", EPISODES,
        choices=("dataset", "group"), needs={"dataset": IMAGES})
    share: str = setting(
        "fixed", "how the tasks of a meta-batch are divided among the data sets: in equal numbers "
        "(fixed), in proportion to their classes (proportional), or in numbers that add up to the "
        "meta-batch, such as omniglot=12,mini-imagenet=4, which set the starting balance of rules "
        "over objectives", OUTER, needs={"dataset": 1})
    disagree: float = setting(
        0.0, "the share of training tasks, in [0, 1], that get wrong queries", OUTER, least=0, most=1)
    disagree_kind: str = setting(
        "shuffled", "what is wrong with them: their targets are shuffled within each task, or permuted in "
        "the same way in all those tasks, or contradictory to those of another task of the meta-batch; or "
        "they are mismatched, another task's own", OUTER,
        choices=("shuffled", "permuted", "contradictory", "mismatched"), needs={"disagree": 0})
    learner: str = setting("maml", "the inner loop: {names}, or module:attribute", MODEL)
    rule: str = setting(
        "uniform", "the weighting rule: {names}, torchjd:NAME for UPGrad, MGDA, CAGrad and others "
        "of TorchJD, or module:attribute", OUTER)
    rule_options: dict[str, dict[str, Any]] = setting(
        {}, "set options of weighting rules, such as dwa.period=10, of which the documentation of "
        "each rule has a list; in TOML, use a table [rule-options.RULE]", OUTER,
        shown="none")
    within: str = setting(
        "uniform", "how a rule over objectives combines the tasks of one objective", OUTER,
        choices=("uniform", "agreement"), needs={"rule": OF_OBJECTIVES})
    shared: str = setting(
        "", "the weights that the objectives share, by the name of a parameter or module", OUTER,
        needs={"rule": ("gradnorm",)}, shown="the last shared layer")
    model: str = setting("conv4", "the network: {names}, or module:attribute", MODEL)
    hidden: int = setting(
        64, "number of filters or units per layer", MODEL, least=1,
        needs={"model": ("conv4", "mlp")})
    pool: str = setting(
        "stride", "how the resolution is reduced: by strided convolutions or by max-pooling", MODEL,
        choices=("stride", "max"), needs={"model": ("conv4",)})
    norm: str = setting(
        "batch", "how features are normalised: by the batch at hand (transductive), by the support "
        "set, by groups of channels, or not at all", MODEL,
        choices=("batch", "support", "group", "none"), needs={"model": ("conv4", "resnet12")})
    protocol: str = setting(
        "auto", "how queries are normalised in validation and test; auto leaves it to the model",
        MODEL, choices=("auto", "transductive", "inductive"))
    loss: str = setting(
        "default", "the loss of both loops: {names} (cross-entropy for labels, mean squared error "
        "for real targets), or module:attribute, a function of prediction and target", MODEL)
    score: str = setting(
        "default", "what is validated and reported: {names}, or module:attribute, a Score or a "
        "function of prediction and target", MODEL, shown="what goes with the loss")
    inner_lr: float = setting(
        1.0, "learning rate of the inner loop; it multiplies the gradient of a mean loss", MODEL,
        above=0)
    inner_steps: int = setting(1, "number of inner steps in training", MODEL, least=0)
    test_steps: int = setting(
        3, "number of inner steps in validation and test; a learner that is handed in keeps its own, unless this "
        "differs from the data set's default", MODEL, least=0)
    inner_optimizer: str = setting(
        "sgd", "optimiser of the inner loop; adam uses beta1 = 0, as Reptile's code does", MODEL,
        choices=("sgd", "adam"), learners=("reptile",))
    inner_batch: int = setting(
        0, "number of support examples per inner step, in random order; 0 uses all of them", MODEL,
        least=0, learners=("reptile",))
    train_shots: int = setting(
        0, "number of support examples per class in training; 0 uses as many as in validation and "
        "test", MODEL, least=0)
    learned_rates: bool = setting(
        False, "learn one inner rate per layer and step, as MAML++ does", MODEL,
        learners=("maml", "fomaml"))
    multi_step_loss: int = setting(
        0, "number of iterations at the start in which the query losses after all inner steps count, "
        "with growing weight on the last, as in MAML++; 0 counts only the last", MODEL, least=0,
        learners=("maml", "fomaml", "anil", "metasgd", "proto-maml"), needs={"inner_steps": 1})
    first_order_until: int = setting(
        0, "number of iterations at the start that ignore second derivatives, as in MAML++",
        MODEL, least=0, learners=("maml", "anil", "metasgd", "proto-maml"))
    constant_memory: bool = setting(
        False, "use memory that does not grow with the number of inner steps, at two to three "
        "times the computing time", MODEL, learners=("maml", "anil", "metasgd", "proto-maml"))
    iterations: int = setting(1000, "number of meta-updates", OUTER, least=1, resumable=True)
    meta_batch: int = setting(16, "number of tasks per meta-update", OUTER, least=1)
    meta_lr: float = setting(3e-3, "learning rate of the outer loop", OUTER, above=0)
    meta_optimizer: str = setting(
        "adam", "the outer optimiser: {names}, or module:attribute, a function of named parameters",
        OUTER)
    meta_schedule: str = setting(
        "cosine", "how the outer learning rate changes over the run", OUTER,
        choices=("constant", "linear", "cosine"), needs={"meta_optimizer": ("adam", "adamw", "sgd")})
    meta_lr_final: float = setting(
        0.0, "the outer learning rate at the end of a schedule", OUTER, least=0,
        needs={"meta_schedule": ("linear", "cosine")})
    weight_decay: float = setting(
        0.0, "weight decay of the meta-parameters: added to the gradient by adam and sgd, decoupled in adamw",
        OUTER, least=0)
    clip_value: float = setting(
        0.0, "clip the entries of the meta-gradient to this absolute value; 0 does not clip", OUTER,
        least=0)
    clip_norm: float = setting(
        0.0, "clip the length of the meta-gradient to this value; 0 does not clip", OUTER, least=0)
    nonfinite: str = setting(
        "error", "what to do about a task whose loss or gradient is NaN or infinite: stop with an "
        "error, or skip the task and count it", OUTER, choices=("error", "skip"))
    seed: int = setting(
        0, "seed of the initial weights and of all episodes", OUTER, least=-(2**60), most=2**60)
    log_every: int = setting(
        10, "number of iterations between lines of metrics.jsonl", OUTER, least=1,
        resumable=True)
    log_matrices: bool = setting(
        False, "also log the cosines between all tasks' gradients, T x T numbers per line", OUTER,
        resumable=True)
    validate_every: int = setting(
        100, "number of iterations between validations", OUTER, least=1, resumable=True,
        shown="a tenth of the run, at most 500")
    validation_episodes: int = setting(200, "number of episodes per validation", OUTER, least=2)
    checkpoint_every: int = setting(
        100, "number of iterations between checkpoints", OUTER, least=1, resumable=True)
    keep_every: int = setting(
        0, "number of iterations between checkpoints that are kept beside the latest and the best; "
        "0 keeps no others", OUTER, least=0, resumable=True)
    device: str = setting(
        "cpu", "the device to compute on: cpu, cuda or mps", MACHINE, resumable=True)
    threads: int = setting(
        0, "number of CPU threads; results are bit-identical only for equal numbers, and 0 leaves "
        "the choice to PyTorch", MACHINE, least=0, resumable=True)
    # fmt: on

    def __post_init__(self) -> None:
        fields = settings_of(self)
        for name, field in fields.items():
            check(field, getattr(self, name))
        object.__setattr__(self, "dataset", absolute(self.dataset))  # it is frozen
        check(fields["dataset"], self.dataset)
        for name, field in fields.items():
            other = unmet(field, vars(self), IMPOSSIBLE)
            if other and getattr(self, name) != field.default:
                refuse_unused(field, other, f"`{other}` {getattr(self, other)}")
        self._check_images()
        numbers = self.share_numbers
        if numbers is not None:  # one form, whatever the order
            shares = zip(self.datasets, numbers, strict=True)
            share = ",".join(f"{name}={number}" for name, number in shares)
            object.__setattr__(self, "share", share)
        if numbers is not None and sum(numbers) != self.meta_batch:
            raise InputError(
                f"`share` {self.share} adds up to {sum(numbers)} tasks, but `meta_batch` is "
                f"{self.meta_batch}; make them equal"
            )
        if self.disagree and self.disagree_kind == "mismatched" and self.meta_batch == 1:
            raise InputError(
                "`disagree_kind` mismatched: a corrupted task has another task's queries, and with `meta_batch` 1 "
                "there is no other; take 2 or more"
            )
        if self.regression and len(self.datasets) > 1:
            raise InputError(
                f"`dataset` {shown(self.dataset)}: sinusoid is regression and cannot be combined with other data "
                "sets; in Python, MixedSource joins several of it"
            )
        built_in = self.model in registry.BUILT_IN["model"]
        if self.regression and built_in and (self.model, self.ways) != ("mlp", 1):
            raise InputError(
                f"dataset '{self.dataset}' needs `model` mlp and `ways` 1, which are its defaults; got "
                f"model {self.model} and ways {self.ways}"
            )

    def _check_images(self) -> None:
        """Check what image data sets require, before they are read."""
        if self.ways < (least := 2 if self.of_images else 1):
            raise InputError(f"`ways` must be at least {least}, got {self.ways}")
        if self.channels < 0 or (self.of_images and self.channels not in (0, 1, 3)):
            raise InputError(
                f"`channels` must be 1, 3, or 0 for the data set's own; got {self.channels}"
            )

    @classmethod
    def of(cls, dataset: str = "glyphs", **given: Any) -> Self:
        """A configuration with the data set's defaults (`DEFAULTS`) where ``given`` has no value.

        Raises:
            InputError: as the class; an unknown name of a part; or a value other
                than the default for a setting that has no effect with the others. If no ``rule``
                is given, there may be several, and settings for some of them pass.
        """
        if unknown := given.keys() - settings_of(cls).keys():
            hint = did_you_mean(min(unknown), settings_of(cls))
            raise InputError(f"TrainConfig: unknown settings {', '.join(sorted(unknown))}; {hint}"
                             "docs/settings.md lists them")  # fmt: skip
        for kind in registry.KINDS:
            if kind in given and given[kind] is not None:
                registry.require_known(kind, str(given[kind]))
        for name, value in given.items():
            if value is not None:
                check(settings_of(cls)[name], value)
        defaults = _defaults(dataset, given)
        values = {**defaults, **{k: v for k, v in given.items() if v is not None}}
        if given.get("meta_batch") is None and isinstance(share := given.get("share"), str):
            names = names_in(absolute(dataset))
            numbers = numbers_in(share, names) if len(names) > 1 else None
            values["meta_batch"] = values["meta_batch"] if numbers is None else sum(numbers)
        values.setdefault("validate_every", max(1, min(500, values["iterations"] // 10)))
        config = cls(dataset=dataset, **values)
        for name, field in settings_of(cls).items():
            other = unmet(field, vars(config))
            usual = defaults.get(name, field.default)
            if other == "rule" and given.get("rule") is None:
                continue
            if other and values.get(name, usual) != usual:
                refuse_unused(field, other, f"`{other}` {getattr(config, other)}")
        return config

    @property
    def datasets(self) -> list[str]:
        """The names joined by ``+``; see `gametalearn.places.names_in`."""
        return names_in(self.dataset)

    @property
    def brought_to(self) -> tuple[int, int]:
        """The side in pixels and the channels that images are converted to; 0 leaves them as they are.

        Several data sets go through one model, so theirs are converted to one size, by default `TOGETHER`.
        """
        size, channels = TOGETHER if len(self.datasets) > 1 else (0, 0)
        return self.image_size or size, self.channels or channels

    @property
    def share_numbers(self) -> list[int] | None:
        """The number of tasks that ``share`` gives each data set; None if it gives none.

        Raises:
            InputError: as `gametalearn.shares.numbers_in`.
        """
        return numbers_in(self.share, self.datasets) if len(self.datasets) > 1 else None

    @property
    def divided_into(self) -> list[int] | None:
        """The number of tasks of every meta-batch from each of several data sets.

        None for one data set, and where the numbers vary (``share`` proportional).
        """
        names = self.datasets
        if len(names) < 2 or self.share == "proportional":
            return None
        return divided(self.meta_batch, self.share_numbers or [1] * len(names))

    @property
    def balance(self) -> list[int] | None:
        """The shares of the objectives at equal weights, for rules over objectives; None: equal ones."""
        counts = self.divided_into
        return counts if counts and all(counts) else None

    @property
    def regression(self) -> bool:
        """Whether a built-in data set has real targets: sinusoid."""
        return "sinusoid" in self.datasets

    @property
    def of_images(self) -> bool:
        """Whether all data sets are built in or folders of images, and none is regression."""
        return all(map(is_images, self.datasets))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for TOML and checkpoints; ``rule_options`` only if there are any."""
        values = dataclasses.asdict(self)
        if not self.rule_options:
            del values["rule_options"]
        return values

    def of_rule(self, rule: str, seed: int) -> Self:
        """The settings of one run of a comparison, with only its own rule's options."""
        own: dict[str, Any] = {}
        for name, field in settings_of(self).items():
            if unmet(field, {"rule": rule}, ("rule",)):
                own[name] = field.default
        options = {rule: self.rule_options[rule]} if rule in self.rule_options else {}
        return dataclasses.replace(self, rule=rule, seed=seed, rule_options=options, **own)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """The inverse of `as_dict`, perhaps of an older version's; ``where`` names the file in errors.

        Raises:
            InputError: a setting that this version does not know.
        """
        if unknown := values.keys() - settings_of(cls).keys():
            raise InputError(
                f"{where}: written by another version; this one has no setting '{min(unknown)}'"
            )
        return cls(**cls.completed(values))

    @classmethod
    def completed(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Settings from a file; those that did not exist when it was written keep the behaviour of then."""
        before = {name: field.metadata["before"] for name, field in settings_of(cls).items()}
        return {**before, **values}


def usual_test_steps(dataset: str) -> int:
    """The number of inner steps in tests that goes with a data set, or with one that was handed in."""
    if registry.is_handed_in(dataset):
        return TrainConfig.test_steps
    return int(_defaults(dataset, {}).get("test_steps", TrainConfig.test_steps))


def _defaults(dataset: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of `DEFAULTS`, without what a given learner rules out."""
    names = names_in(dataset)
    kinds = ["folder" if folder_of(name) is not None else name.split(":")[0] for name in names]
    photographs = {"mini-imagenet", "folder"}.intersection(kinds)
    if len(names) == 1 or not photographs or not set(kinds) <= set(IMAGES):
        return DEFAULTS.get(kinds[0], DEFAULTS["folder"])
    defaults = {**DEFAULTS[BESIDE], "rotations": "omniglot" in kinds}
    fields = settings_of(TrainConfig)
    values = {name: field.default for name, field in fields.items()}
    values.update({name: value for name, value in given.items() if value is not None})
    return {k: v for k, v in defaults.items() if not unmet(fields[k], values, IMPOSSIBLE)}


RESUMABLE = tuple(
    name for name, field in settings_of(TrainConfig).items() if field.metadata["resumable"]
)
"""The settings that may change when a run continues."""


def default_text(field: dataclasses.Field[Any]) -> str:
    """The value of a setting that is not given, by data set.

    >>> default_text(settings_of(TrainConfig)["hidden"])
    '32; 64 for glyphs, omniglot; 40 for sinusoid'
    """
    if field.metadata["shown"]:
        return str(field.metadata["shown"])
    datasets: dict[str, list[str]] = {}
    for dataset, values in DEFAULTS.items():
        value = values.get(field.name, field.default)
        datasets.setdefault(str(value).lower() if value is not None else "", []).append(dataset)
    most = max(datasets, key=lambda value: len(datasets[value]))
    others = [f"{v} for {', '.join(names)}" for v, names in datasets.items() if v != most]
    return "; ".join([most, *others])
