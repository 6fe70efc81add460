"""From settings to parts: source, model, learner, rule, loss, score and outer optimiser by name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gametalearn import registry
from gametalearn.adaptation import LSLR, Learner, makes_heads
from gametalearn.config import TrainConfig
from gametalearn.data import load_part
from gametalearn.disagreement import Disagreement
from gametalearn.episodes import EpisodeSampler, Source
from gametalearn.errors import InputError
from gametalearn.losses import Loss
from gametalearn.mixture import MixedSource, seed_of
from gametalearn.models import MLP, Conv4, ResNet12
from gametalearn.places import folder_of, shown
from gametalearn.randomness import word
from gametalearn.scores import ScoreLike
from gametalearn.weighting import Rule, make_rule

__all__ = [
    "build_learner",
    "build_loss",
    "build_model",
    "build_optimizer",
    "build_rule",
    "build_score",
    "build_source",
    "objective_names",
    "stream_seed",
]

_STREAMS = {"train": 1, "val": 2, "test": 3, "all": 0}


def stream_seed(seed: int, split: str) -> int:
    """The seed of one split's episodes: streams of different seeds and splits never coincide."""
    return seed * 4 + _STREAMS[split]


def build_source(config: TrainConfig, split: str) -> Source:
    """The episodes of a split, seeded by the run's seed and the split.

    Args:
        config: the settings.
        split: ``train``, ``val`` or ``test``; of a folder also ``all``.
    """
    _refuse_handed_in(config, "dataset")
    seed = stream_seed(config.seed, split)
    names = config.datasets
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise InputError(f"`dataset` {shown(config.dataset)}: {twice[0]} appears twice")
    parts = [_source(config, name, split, seed_of(seed, i)) for i, name in enumerate(names)]
    source = parts[0]
    if len(parts) > 1:
        if split == "train":
            _warn_of_shared_classes(config, parts)
        if config.objectives == "group":
            raise InputError(
                "`objectives` group takes one data set; of several, each is an objective already"
            )
        share: Any = "fixed"
        if config.share == "proportional":
            share = [_classes(name, part) for name, part in zip(names, parts, strict=True)]
        # each objective is measured as well as the others, whatever its share of the training is
        counts = config.share_numbers if split == "train" else None
        source = MixedSource(parts, share=share, seed=seed, counts=counts)
    if split == "train" and config.disagree > 0:
        kind: Any = config.disagree_kind
        return Disagreement(source, config.disagree, kind, seed)
    return source


def _source(config: TrainConfig, name: str, split: str, seed: int) -> Source:
    """One data set's episodes; a data set of images is sampled from, at the settings' size."""
    size, channels = config.brought_to
    shots = config.train_shots if split == "train" and config.train_shots else config.shots
    data = load_part(
        name,
        split,
        class_split=config.split or None,
        rotations=config.rotations and split == "train" and name == "omniglot",
        image_size=size or None,
        channels=channels or None,
        seed=seed, ways=config.ways, shots=shots, queries=config.queries, config=config,
    )  # fmt: skip
    if hasattr(data, "sample"):
        return data  # type: ignore[no-any-return]
    return EpisodeSampler(
        data,
        config.ways,
        shots,
        config.queries,
        seed,
        within_group=config.objectives == "group",
        shuffle_support=config.inner_batch > 0,
    )


def _warn_of_shared_classes(config: TrainConfig, parts: Sequence[Source]) -> None:
    """Say so if a class of one folder's training has the name of one of another's validation or test."""
    folders = [name for name in config.datasets if folder_of(name) is not None]
    trained = {
        label: name
        for name, part in zip(config.datasets, parts, strict=True)
        if name in folders and isinstance(part, EpisodeSampler)
        for label in part.dataset.classes
    }
    for name in folders if len(folders) > 1 else ():
        for split in ("val", "test"):
            other = _source(config, name, split, 0)
            names = other.dataset.classes if isinstance(other, EpisodeSampler) else ()
            if shared := [label for label in names if trained.get(label, name) != name]:
                more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
                warnings.warn(
                    f"the class '{shared[0]}'{more} of the {split} classes of {shown(name)} is by its name among the "
                    f"training classes of {shown(trained[shared[0]])}: if they are the same, these classes are not "
                    "unseen; divide both folders alike, by train/, val/ and test/ or splits.csv",
                    stacklevel=2,
                )


def _classes(name: str, source: Source) -> int:
    if not isinstance(source, EpisodeSampler):
        raise InputError(f"`share` proportional needs numbers of classes, and '{name}' has none")
    return source.dataset.num_classes


def objective_names(config: TrainConfig, source: Source) -> tuple[str, ...]:
    """What the numbers in `TaskBatch.group` stand for."""
    own: Sequence[str] | None = getattr(source, "group_names", None)
    if own is not None and (config.objectives == "group" or registry.is_handed_in(config.dataset)):
        return tuple(own)
    return tuple(config.datasets)


def build_model(
    config: TrainConfig, input_shape: Sequence[int], learner: Learner | None = None
) -> nn.Module:
    """The model with initial weights drawn from the run's seed; the global state is untouched."""
    part, fixed = _resolved(config, "model")
    return make_model(config, part, input_shape, fixed, learner)


def make_model(
    config: TrainConfig,
    part: Any,
    input_shape: Sequence[int],
    fixed: Mapping[str, Any],
    learner: Learner | None = None,
) -> nn.Module:
    """What a class or function of models gives; see `build_model`.

    It is offered no ``ways`` (None) where the learner makes heads, and then gives an embedding.
    """
    shape = torch.Size(input_shape)
    offered = {
        "ways": None if makes_heads(learner) else config.ways, "input_shape": shape, "hidden": config.hidden, "pool": config.pool,
        "norm": config.norm, "config": config,
    }  # fmt: skip
    if len(shape) == 3:
        offered |= {"channels": shape[0], "image_size": min(shape[1:])}
    elif part in (Conv4, ResNet12):
        raise InputError(
            f"`model` {config.model} takes images (channels, height, width), and the inputs have the "
            f"shape {tuple(shape)}; take `model` mlp, or one of your own"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(word(config.seed))
        model = registry.call("model", config.model, part, offered, fixed)
    if not isinstance(model, nn.Module):
        raise InputError(f"`model` {config.model} gives a {type(model).__name__}, not an nn.Module")
    return model.to(config.device)


def mlp(input_shape: torch.Size, config: TrainConfig, ways: int | None) -> MLP:
    """The network of Finn et al. 2017 for sinusoids, or a classifier of flattened inputs."""
    outputs = 1 if config.regression else ways
    return MLP(input_shape.numel(), outputs, (config.hidden, config.hidden))


def build_learner(config: TrainConfig) -> Learner:
    """The inner loop of training; `Learner.for_test` gives that of evaluation."""
    part, fixed = _resolved(config, "learner")
    offered = {
        "inner_lr": config.inner_lr, "steps": config.inner_steps, "batch": config.inner_batch,
        "optimizer": config.inner_optimizer, "config": config,
    }  # fmt: skip
    if config.learned_rates:
        part = LSLR
    learner: Learner = registry.call("learner", config.learner, part, offered, fixed)
    return learner


def build_rule(config: TrainConfig, objectives: int, columns: slice | Tensor | None = None) -> Rule:
    """The weighting rule with its options; ``objectives`` and ``columns`` as in `make_rule`."""
    _refuse_handed_in(config, "rule")
    settings = {
        "objectives": objectives,
        "regression": config.regression,
        "within": config.within,
        "balance": config.balance,
        "columns": columns,
        "seed": config.seed,
    }
    if others := config.rule_options.keys() - {config.rule}:
        raise InputError(
            f"`rule_options`: given for '{min(others)}', but the rule is '{config.rule}'"
        )
    options = config.rule_options.get(config.rule, {})
    if taken := options.keys() & {"name", *settings}:
        raise InputError(
            f"rule '{config.rule}': '{min(taken)}' is a setting of the run, not an option of a rule"
        )
    return make_rule(config.rule, **settings, **options)  # type: ignore[arg-type]


def build_loss(config: TrainConfig) -> Loss:
    """The loss of both loops."""
    loss: Any = _resolved(config, "loss")[0]
    if isinstance(loss, type):  # such as torch.nn:L1Loss
        loss = registry.call("loss", config.loss, loss, {})
    return loss  # type: ignore[no-any-return]


def build_score(config: TrainConfig) -> ScoreLike:
    """What is validated; `gametalearn.default_score` where it is left to the loss."""
    part, fixed = _resolved(config, "score")
    score: ScoreLike = part(**fixed) if fixed else part
    return score


def build_optimizer(config: TrainConfig, named: list[tuple[str, Tensor]]) -> Any:
    """What the setting ``meta_optimizer`` gives: an optimiser, or it and a scheduler."""
    part, fixed = _resolved(config, "meta_optimizer")
    offered = {"lr": config.meta_lr, "weight_decay": config.weight_decay}
    return registry.call("meta_optimizer", config.meta_optimizer, part,
                         {"named_parameters": named, **offered}, fixed)  # fmt: skip


def _resolved(config: TrainConfig, kind: str) -> tuple[Any, Mapping[str, Any]]:
    _refuse_handed_in(config, kind)
    return registry.resolve(kind, getattr(config, kind))


def _refuse_handed_in(config: TrainConfig, kind: str) -> None:
    name = getattr(config, kind)
    if registry.is_handed_in(name):
        word = {"dataset": "source", "meta_optimizer": "optimizer"}.get(kind, kind)
        raise InputError(
            f"the {word} of this run was handed in ({name.removeprefix(registry.HANDED_IN)}); pass "
            f"{word}= again"
        )
