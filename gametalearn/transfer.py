"""Testing a run on other data than it was trained on, or with other ways, shots or queries."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gametalearn import registry
from gametalearn.adaptation import Learner, makes_heads
from gametalearn.build import build_source
from gametalearn.config import TrainConfig
from gametalearn.data.identity import FolderIdentity
from gametalearn.episodes import EpisodeSampler, Source, input_shape_of
from gametalearn.errors import InputError
from gametalearn.mixture import MixedSource
from gametalearn.places import absolute, folder_of, folders, names_in, placeless, shown
from gametalearn.provenance import recorded
from gametalearn.settings import read_toml
from gametalearn.words import counted

__all__ = [
    "described",
    "different",
    "episodes_for",
    "file_name",
    "is_other",
    "require_other",
    "settings_for",
    "usual_classes",
]

SIZES = ("ways", "shots", "queries")
"""The episode settings that a test may change."""


def is_other(run: Path, dataset: str) -> bool:
    """Whether a data set differs from a run's own, rather than being the same in a new place.

    Folders of images are compared by their classes: other data have no class name in common with the
    run's. A folder that shares some has changed, or its classes may have been trained on.

    Args:
        run: the run's folder.
        dataset: as ``--dataset`` takes it.
    """
    file = run / "config.toml"
    if not file.exists():  # loading the run reports this
        return False
    return _differs(str(read_toml(file).get("dataset")), _classes_of(run), dataset)


def require_other(config: TrainConfig, run: Path | None, dataset: str) -> None:
    """Refuse a data set that is the run's own, or that contains data which may have been trained on.

    Args:
        config: the run's settings.
        run: its folder, if there is one.
        dataset: of the test.

    Raises:
        InputError: it is the run's own; a folder has a class with the same name as one of the run's; or
            a data set is one of the run's, whose classes were split differently.
    """
    known = _classes_of(run)
    if not _differs(config.dataset, known, dataset):
        raise InputError(
            f"`dataset` {dataset}: this is what the run was trained on ({shown(config.dataset)}), or has classes of "
            "the same names; leave it out to test on the run's own test classes"
        )
    for place in folders(dataset) if known else ():
        if os.path.isdir(place) and (shared := known & FolderIdentity.of(place).classes.keys()):
            raise InputError(
                f"`dataset` {dataset}: {place} has a class {min(shared)!r}, and so do the run's own data, so "
                "it may have been trained on; leave it out"
            )
    if config.split and (own := set(names_in(dataset)) & set(config.datasets)):
        raise InputError(
            f"`dataset` {dataset}: the run was trained on {min(own)} with `split` {config.split}, and here "
            f"its classes are split differently; leave {min(own)} out"
        )


def _classes_of(run: Path | None) -> set[str]:
    """The names of the classes of a run's folders of images."""
    found = None if run is None else recorded(run)
    return {name for folder in found or () for name in folder.classes}


def _differs(own: str, known: set[str], dataset: str) -> bool:
    if placeless(absolute(dataset)) != placeless(absolute(own)):
        return True
    places = [place for place in folders(dataset) if os.path.isdir(place)]
    if not known or not places:
        return False
    try:
        return not any(known & FolderIdentity.of(place).classes.keys() for place in places)
    except InputError:  # reported where the folder is read
        return False


def usual_classes(dataset: str | None) -> str:
    """The classes that a test uses by default: all of them for other folders, else the test classes."""
    if dataset is None:
        return "test"
    return "all" if all(folder_of(name) is not None for name in names_in(dataset)) else "test"


def settings_for(
    config: TrainConfig,
    learner: Learner,
    input_shape: tuple[int, ...],
    *,
    dataset: str | None = None,
    ways: int | None = None,
    shots: int | None = None,
    queries: int | None = None,
) -> TrainConfig:
    """A run's settings for a test, without those that concern only training (`train_shots`, `disagree`).

    Args:
        config, learner, input_shape: the run's.
        dataset: other data, whose images are converted to the shape of the run's own.
        ways, shots, queries: of the test's episodes; None keeps the run's.

    Raises:
        InputError: no such data set, one that does not suit the run's model, or a number of ways
            that its model has no outputs for.
    """
    if ways is not None and ways != config.ways:
        _require_ways(config, learner, ways)
    given = dict(zip(SIZES, (ways, shots, queries), strict=True))
    changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    if dataset is not None:
        for name in names_in(dataset):
            if folder_of(name) is None:
                registry.require_known("dataset", name)
        changes |= {"dataset": dataset, "split": "", "objectives": "dataset", "rotations": False}
        if len(input_shape) == 3:
            changes |= {"channels": input_shape[0], "image_size": input_shape[2]}
    return dataclasses.replace(config, train_shots=0, disagree=0.0, **changes)


def _require_ways(config: TrainConfig, learner: Learner, ways: int) -> None:
    """Only learners that make a head for each task can be tested with other ways than in training."""
    if config.regression:
        raise InputError(
            f"`ways` {ways}: {shown(config.dataset)} is regression, without classes; leave it out"
        )
    if not makes_heads(learner):
        raise InputError(
            f"`ways` {ways}: this run's model has an output for each of {config.ways} classes (`learner` "
            f"{config.learner}, trained with `ways` {config.ways}); leave it out, train with `ways` {ways}, "
            "or use a learner that makes a head for each task, such as proto-maml or protonet"
        )


def episodes_for(
    config: TrainConfig, input_shape: tuple[int, ...], on: str, sizes: Mapping[str, int | None]
) -> Source:
    """Episodes under `settings_for`; ``on`` is ``train``, ``val``, ``test`` or, for a folder, ``all``.

    Args:
        config: the settings.
        input_shape: that of the run's inputs.
        on: the classes.
        sizes: values requested in place of the run's, which must have an effect.

    Raises:
        InputError: the inputs differ in shape from the run's; or the user's own data set does
            not accept the requested values.
    """
    source = build_source(config, on)
    if (shape := input_shape_of(source)) != input_shape:
        raise InputError(
            f"`dataset` {shown(config.dataset)}: its inputs have the shape {shape}, and the run was trained on "
            f"{input_shape}"
        )
    several = len(config.datasets) > 1 and isinstance(source, MixedSource)
    parts = source.sources if several else [source]  # type: ignore[attr-defined]
    for name, part in zip(config.datasets, parts, strict=True):
        if isinstance(part, EpisodeSampler):
            continue
        factory, _ = registry.resolve("dataset", name)
        for size, number in sizes.items():
            if number is not None and not (
                registry.takes(factory, size) or registry.takes(factory, "config")
            ):
                raise InputError(
                    f"`{size}`: the data set {name} draws its own episodes and takes no argument {size}; "
                    "leave it out"
                )
    return source


def different(
    config: TrainConfig, tested: TrainConfig, on: str, *, other: bool
) -> dict[str, str | int]:
    """How a test differs from the run's own test; empty for that one itself.

    Args:
        config: the run's settings.
        tested: the test's.
        on: its classes.
        other: whether it is on other data.

    Returns:
        ``dataset`` and ``on`` for other data, ``on`` for other classes of the run's own; ``ways`` (if
        there are classes), ``shots`` and ``queries`` if one of them differs.
    """
    found: dict[str, str | int] = {"dataset": tested.dataset} if other else {}
    if other or on != "test":
        found["on"] = on
    if any(getattr(config, name) != getattr(tested, name) for name in SIZES):
        found |= {k: getattr(tested, k) for k in SIZES[1 if tested.regression else 0 :]}
    return found


def described(found: Mapping[str, str | int]) -> str:
    """What is `different`, in words.

    >>> described({"dataset": "glyphs", "on": "val", "ways": 10, "shots": 5, "queries": 1})
    'glyphs, val, 10-way 5-shot, 1 query per class'
    >>> described({"shots": 5, "queries": 10}), described({"on": "val"})
    ('5-shot, 10 queries', 'val')
    """
    words = [shown(str(found["dataset"]))] if "dataset" in found else []
    words += [str(found["on"])] if "on" in found else []
    if "shots" in found:
        per = "" if "ways" not in found else " per class"
        ways = f"{found['ways']}-way " if "ways" in found else ""
        words += [f"{ways}{found['shots']}-shot"]
        words += [f"{counted(int(found['queries']), 'query', 'queries')}{per}"]
    return ", ".join(words)


def file_name(found: Mapping[str, str | int]) -> str:
    """The name of the file in a run's folder that holds a test, distinct for what is `different`.

    ``evaluation.json`` is reserved for tests on the run's own episodes: `compare` looks there for its own.

    >>> file_name({}), file_name({"dataset": "folder:/data/my birds", "on": "all"})
    ('evaluation.json', 'evaluation-my-birds.json')
    >>> file_name({"dataset": "glyphs+omniglot", "on": "val", "ways": 10, "shots": 5, "queries": 15})
    'evaluation-glyphs-omniglot-val-10-way-5-shot-15-queries.json'
    """
    words, dataset = ["evaluation"], found.get("dataset")
    for name in names_in(str(dataset)) if dataset is not None else ():
        words.append(os.path.basename((folder_of(name) or name).rstrip("/")))
    if "on" in found and found["on"] != usual_classes(None if dataset is None else str(dataset)):
        words.append(str(found["on"]))
    words += [
        f"{found[k]}-{w}"
        for k, w in zip(SIZES, ("way", "shot", "queries"), strict=True)
        if k in found
    ]
    return "-".join(re.sub(r"[^\w.]+", "-", word) for word in words) + ".json"
