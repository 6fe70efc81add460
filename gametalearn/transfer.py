"""A run tested on other data than its own: what other data are, and their episodes at its input shape."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from gametalearn import registry
from gametalearn.build import build_source
from gametalearn.config import TrainConfig
from gametalearn.data.identity import FolderIdentity
from gametalearn.episodes import Source, input_shape_of
from gametalearn.errors import InputError
from gametalearn.places import absolute, folder_of, folders, names_in, placeless
from gametalearn.provenance import recorded
from gametalearn.run import Run
from gametalearn.settings import read_toml

__all__ = ["episodes_of", "file_name", "is_other", "settings_for", "usual_classes"]


def is_other(run: Path, dataset: str) -> bool:
    """Whether a data set is another one than a run's, and not its own in a new place.

    Two folders of images are told apart by their classes: other data have none that is called like one
    of the run's. What shares some has changed, or its classes may have been trained on.

    Args:
        run: the run's folder.
        dataset: as ``--dataset`` takes it.
    """
    file = run / "config.toml"
    if not file.exists():  # which loading it tells
        return False
    if placeless(absolute(dataset)) != placeless(absolute(str(read_toml(file).get("dataset")))):
        return True
    known = {name for folder in recorded(run) or () for name in folder.classes}
    places = [place for place in folders(dataset) if os.path.isdir(place)]
    if not known or not places:
        return False
    try:
        return not any(known & FolderIdentity.of(place).classes.keys() for place in places)
    except InputError:  # as it is told where it is looked for
        return False


def usual_classes(dataset: str) -> str:
    """The classes that other data are tested on: all of folders of images, else those of the test."""
    return "all" if all(folder_of(name) is not None for name in names_in(dataset)) else "test"


def settings_for(run: Run, dataset: str) -> TrainConfig:
    """A run's settings with other data, whose images shall have the shape of its own.

    Raises:
        InputError: no such data set, or one that the run's model cannot be meant for.
    """
    for name in names_in(dataset):
        if folder_of(name) is None:
            registry.require_known("dataset", name)
    size: dict[str, Any] = {}
    if len(run.input_shape) == 3:
        size = {"channels": run.input_shape[0], "image_size": run.input_shape[2]}
    return dataclasses.replace(run.config, dataset=dataset, split="", objectives="dataset", **size)


def episodes_of(run: Run, config: TrainConfig, on: str) -> Source:
    """Episodes of other data, by `settings_for`; ``on`` is ``train``, ``val``, ``test`` or ``all``.

    Raises:
        InputError: their inputs have another shape than the run's.
    """
    source = build_source(config, on)
    if (shape := input_shape_of(source)) != run.input_shape:
        raise InputError(
            f"`dataset` {config.dataset}: its inputs have the shape {shape}, and the run was trained on "
            f"{run.input_shape}"
        )
    return source


def file_name(dataset: str) -> str:
    """Of the file in a run's folder that keeps its test on other data.

    >>> file_name("folder:/data/my birds"), file_name("glyphs+omniglot")
    ('evaluation-my-birds.json', 'evaluation-glyphs-omniglot.json')
    """
    names = [folder_of(name) or name for name in names_in(dataset)]
    short = "-".join(os.path.basename(name.rstrip("/")) for name in names)
    safe = re.sub(r"[^\w.]+", "-", short)
    return f"evaluation-{safe}.json"
