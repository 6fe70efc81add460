"""From settings to parts: source, model, learner and rule of a `TrainConfig`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gametalearn.adaptation import ANIL, LSLR, MAML, Learner, MetaSGD, Reptile
from gametalearn.config import TrainConfig
from gametalearn.data import load_dataset
from gametalearn.data.sinusoid import Sinusoid
from gametalearn.disagreement import Disagreement
from gametalearn.episodes import EpisodeSampler, Source
from gametalearn.errors import InputError
from gametalearn.images import ClassImages
from gametalearn.mixture import MixedSource
from gametalearn.models import MLP, Conv4, ResNet12
from gametalearn.weighting import Rule, make_rule

__all__ = ["build_learner", "build_model", "build_rule", "build_source", "objective_names"]

_STREAMS = {"train": 1, "val": 2, "test": 3}


def stream_seed(seed: int, split: str) -> int:
    """The seed of one split's episodes: streams of different seeds and splits never coincide."""
    return seed * 4 + _STREAMS[split]


def load_images(config: TrainConfig, split: str) -> list[ClassImages]:
    """The data sets of a split, at one image size and channel count if there are several."""
    names = config.datasets
    rotations = config.rotations and split == "train"
    several = len(names) > 1
    return [
        load_dataset(
            name,
            split,
            class_split=config.split or None,
            rotations=rotations and name == "omniglot",
            image_size=config.image_size or (28 if several else None),
            channels=config.channels or (1 if several else None),
        )
        for name in names
    ]


def build_source(config: TrainConfig, split: str) -> Source:
    """The episodes of ``train``, ``val`` or ``test``, seeded by the run's seed and the split."""
    seed = stream_seed(config.seed, split)
    source = _source(config, split, seed)
    if split == "train" and config.disagree > 0:
        kind = config.disagree_kind
        return Disagreement(source, config.disagree, kind, seed)  # type: ignore[arg-type]
    return source


def _source(config: TrainConfig, split: str, seed: int) -> Source:
    shots = config.shots
    if split == "train" and config.train_shots:
        shots = config.train_shots
    if config.regression:
        if len(config.datasets) > 1:
            raise InputError(f"--dataset {config.dataset}: sinusoid cannot be joined with images")
        return Sinusoid(shots=shots, queries=config.queries, seed=seed)
    if twice := [name for i, name in enumerate(config.datasets) if name in config.datasets[:i]]:
        raise InputError(f"--dataset {config.dataset}: {twice[0]} stands there twice")
    images = load_images(config, split)
    samplers = [
        EpisodeSampler(
            data,
            config.ways,
            shots,
            config.queries,
            seed + 2**32 * i,
            within_group=config.objectives == "group",
            shuffle_support=config.inner_batch > 0,
        )
        for i, data in enumerate(images)
    ]
    if len(samplers) == 1:
        return samplers[0]
    if config.objectives == "group":
        raise InputError("--objectives group takes one data set; several are objectives already")
    if config.share == "fixed":
        return MixedSource(samplers, seed=seed)
    return MixedSource(samplers, share=[data.num_classes for data in images], seed=seed)


def objective_names(config: TrainConfig, split: str = "train") -> tuple[str, ...]:
    """What the numbers in `TaskBatch.group` stand for."""
    if config.objectives == "group" and not config.regression:
        return load_images(config, split)[0].groups
    return tuple(config.datasets)


def build_model(config: TrainConfig, source: Source) -> nn.Module:
    """The model with initial weights drawn from the run's seed; the global state is untouched."""
    shape = source.with_seed(0).sample(1).support_x.shape[2:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model: nn.Module
        if config.model == "mlp":
            outputs = 1 if config.regression else config.ways
            model = MLP(shape.numel(), outputs, (config.hidden, config.hidden))
        elif config.model == "resnet12":
            model = ResNet12(config.ways, shape[0], norm=config.norm)  # type: ignore[arg-type]
        else:
            model = Conv4(
                config.ways,
                channels=shape[0],
                image_size=min(shape[1:]),
                hidden=config.hidden,
                pool=config.pool,  # type: ignore[arg-type]
                norm=config.norm,  # type: ignore[arg-type]
            )
    return model.to(config.device)


def build_learner(config: TrainConfig) -> Learner:
    """The inner loop of training; `Learner.for_test` gives that of evaluation."""
    lr, steps = config.inner_lr, config.inner_steps
    if config.learner == "anil":
        return ANIL(lr, steps)
    if config.learner == "metasgd":
        return MetaSGD(lr, steps)
    if config.learner == "reptile":
        return Reptile(lr, steps, config.inner_optimizer, config.inner_batch)  # type: ignore[arg-type]
    if config.learned_rates:
        return LSLR(lr, steps, first_order=config.learner == "fomaml")
    return MAML(lr, steps, first_order=config.learner == "fomaml")


def build_rule(config: TrainConfig, objectives: int, columns: slice | Tensor | None = None) -> Rule:
    """The weighting rule with its options; ``objectives`` and ``columns`` as in `make_rule`."""
    settings = {
        "objectives": objectives,
        "regression": config.regression,
        "within": config.within,
        "columns": columns,
        "seed": config.seed,
    }
    if others := config.rule_options.keys() - {config.rule}:
        raise InputError(
            f"--rule-options: given for '{min(others)}', but the rule is '{config.rule}'"
        )
    options = config.rule_options.get(config.rule, {})
    if taken := options.keys() & {"name", *settings}:
        raise InputError(
            f"rule '{config.rule}': '{min(taken)}' is a setting of the run and no option of a rule"
        )
    return make_rule(config.rule, **settings, **options)  # type: ignore[arg-type]
