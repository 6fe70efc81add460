"""Which images a run was trained on: ``data.json`` in its folder, compared before they are used again.

It names the folders of images of the run's data set, the split of their classes, and digests of
their files (`FolderIdentity`). Runs without folders of images have no such file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gametalearn import registry
from gametalearn.config import RESUMABLE, TrainConfig
from gametalearn.data.identity import FolderIdentity, differences
from gametalearn.errors import InputError, summary
from gametalearn.files import replacing
from gametalearn.places import absolute, folder_of, folders, joined, names_in, placeless, shown
from gametalearn.settings import read_toml, settings_of, unmet

__all__ = [
    "RECORD",
    "Record",
    "checked",
    "keep",
    "other_settings",
    "recorded",
    "relocated",
    "same_run",
    "verified",
]

RECORD = "data.json"
SCHEMA = "gametalearn.data/1"

Record = tuple[FolderIdentity, ...]
"""A `FolderIdentity` for each folder of images in a data set's name, in their order."""


def verified(run: Path, config: TrainConfig, overwrite: bool, moved: bool) -> Record | None:
    """What the folders of images hold now; if this very run is in ``run``, what it began with.

    A run that ended before its first checkpoint begins anew, so that its images may have changed.

    Args:
        run: the run's folder, which need not exist.
        config: the settings that it shall have.
        overwrite, moved: as in `gametalearn.training.train`.

    Returns:
        As `checked`.

    Raises:
        InputError: as `checked`; a folder of a new run is missing or holds no classes; or ``moved``
            of no run.
    """
    file = run / "config.toml"
    if moved and not os.path.exists(file):
        raise InputError(f"{run}: no run there whose images could have moved")
    begun = any(os.path.exists(run / name) for name in ("checkpoint.pt", "best.pt"))
    if os.path.exists(file) and (begun or moved) and not overwrite:
        there = read_toml(file)
        if same_run(there, config, moved):
            return checked(run, config)
    return tuple(FolderIdentity.of(place) for place in folders(config.dataset))


def checked(run: Path, config: TrainConfig) -> Record | None:
    """What the folders of a run's images hold now, which is what they held when it began.

    Args:
        run: the run's folder.
        config: its settings, which may name another place than its record: only content counts.

    Returns:
        The record with the folders' present places; None where an older version made the run, which
        kept no record: then a warning says that nothing could be verified.

    Raises:
        InputError: a folder is missing or holds something else, or the record is damaged. The
            message names both.
    """
    stored, places = recorded(run), folders(config.dataset)
    if stored is None and not places:
        return None
    given = str(read_toml(run / "config.toml").get("dataset"))  # perhaps a relative path
    if absolute(given) != config.dataset:
        given = config.dataset
    if stored is None:
        for place in places:
            if not os.path.isdir(place):
                raise InputError(
                    f"{run}: its images were in {given!r}{_seen_from(given)}, and {place} is no "
                    f"folder; {_anew(config, place)}"
                )
        if places:
            warnings.warn(
                f"{run}: its images could not be verified, since it has no {RECORD} (older versions "
                f"wrote none); it goes on with {' and '.join(places)}{_seen_from(given)}",
                stacklevel=2,
            )
        return None
    if len(stored) != len(places):
        raise InputError(
            f"{run / RECORD} has {len(stored)} of a data set's folders, config.toml {len(places)} "
            f"({shown(config.dataset)}); put the file back that belongs there, or `overwrite` the run"
        )
    return tuple(
        _same(run, config, before, place) for before, place in zip(stored, places, strict=True)
    )


def _same(run: Path, config: TrainConfig, before: FolderIdentity, place: str) -> FolderIdentity:
    if not os.path.isdir(place):
        gone = "it is no longer there" if place == before.path else f"there is no folder {place}"
        raise InputError(f"{run}: trained on {before}, but {gone}; {_anew(config, place)}")
    try:
        now = FolderIdentity.of(place)
    except InputError as error:
        raise InputError(f"{run}: trained on {before}; {error}; {_anew(config, place)}") from error
    if differ := differences(before, now):
        more = ", ..." if len(differ) > 3 else ""
        classes = "1 class" if len(differ) == 1 else f"{len(differ)} classes"
        raise InputError(
            f"{run}: trained on {before}, but {now} differs in {classes}: "
            f"{', '.join(differ[:3])}{more}; put back what was there, train anew, or "
            f"{_anew(config, place)}"
        )
    return now


def _seen_from(given: str) -> str:
    """Whence a relative path was looked up."""
    paths = [path for name in names_in(given) if (path := folder_of(name)) is not None]
    if all(os.path.isabs(os.path.expanduser(path)) for path in paths):
        return ""
    return f" (a relative path, seen from {os.getcwd()})"


def _anew(config: TrainConfig, place: str) -> str:
    """What to do about a folder that is elsewhere now."""
    names = ["folder:PATH" if folders(joined([n])) == [place] else n for n in config.datasets]
    return f"if the folder has moved, give its place by `dataset` {joined(names)}"


def relocated(config: TrainConfig, dataset: str) -> TrainConfig:
    """The settings of a run whose folders of images have moved to where ``dataset`` says.

    Raises:
        InputError: it is another data set, not the same one in another place.
    """
    if placeless(absolute(dataset)) != placeless(config.dataset):
        raise InputError(
            f"`dataset` {dataset}: the run was trained on {shown(config.dataset)}; it can only be replaced by "
            "the new place of a folder that has moved, as folder:PATH"
        )
    return dataclasses.replace(config, dataset=dataset)


def same_run(there: Any, config: TrainConfig, moved: bool = False, *, exact: bool = False) -> bool:
    """Whether ``there``, read from a file, are settings of the same run.

    What may change when a run goes on (`gametalearn.resuming`) may differ, unless ``exact``.
    A relative path, as older versions wrote it, is seen from the working directory. With ``moved``
    it does not matter where folders of images lie. A setting that has no effect with the others may
    differ: older versions took it without a word.
    """
    form = placeless if moved else absolute
    before, now = _settings(there, form, exact), _settings(config.as_dict(), form, exact)
    for kind in before.keys() & now.keys() & {*registry.KINDS}:
        if registry.alike(str(before[kind]), str(now[kind])):
            before[kind] = now[kind]
    for kind, told in OF_PARTS.items():  # which older versions did not ask
        if registry.is_handed_in(str(before.get(kind))) and registry.is_handed_in(
            str(now.get(kind))
        ):
            before.update({name: now[name] for name in told if name in before and name in now})
    return before == now


OF_PARTS = {"dataset": ("ways", "shots", "queries"), "learner": ("test_steps",)}
"""Settings that parts tell if they are handed in."""


def _settings(values: Any, form: Callable[[str], str], exact: bool) -> dict[str, Any]:
    """The settings by which runs are told apart."""
    if not isinstance(values, Mapping):
        return {}
    found = TrainConfig.completed(values)
    for name, field in settings_of(TrainConfig).items():
        if unmet(field, found) or (name in RESUMABLE and not exact):
            del found[name]
    if isinstance(found["dataset"], str):
        found["dataset"] = form(found["dataset"])
    return found


def other_settings(
    run: Path, there: dict[str, Any], config: TrainConfig, *, exact: bool = False
) -> str:
    """Why ``config`` cannot go on with the run of the settings ``there``, and what to do."""
    other = _settings(there, absolute, exact)
    for kind in registry.KINDS:
        before, now = str(other.get(kind)), str(getattr(config, kind))
        if not registry.alike(before, now) and (
            registry.is_handed_in(before) or registry.is_handed_in(now)
        ):
            word = {"dataset": "source", "meta_optimizer": "optimizer"}.get(kind, kind)
            before, now = (name.removeprefix(registry.HANDED_IN) for name in (before, now))
            return (
                f"{run}: this run has {word}={before}, not {now}; pass {word}= as it was given then, "
                "or `overwrite` the run"
            )
    own = _settings(config.as_dict(), absolute, exact)
    # what only one of them has is without effect in the other, for a setting that differs, too
    differ = [name for name in own if name in other and other[name] != own[name]]
    told = {name: shown if name == "dataset" else str for name in differ}
    named = [f"{n} {told[n](other[n])}, not {told[n](own[n])}" for n in differ[:4]]
    remedy = "choose another `out`, or `overwrite` it"
    if same_run(there, config, moved=True, exact=exact):
        remedy += f"; if the folder has moved, train --resume {run} --dataset {config.dataset}"
    return f"{run} holds a run with other settings ({', '.join(named)}); {remedy}"


def keep(run: Path, record: Record | None) -> None:
    """Write the record of a run that has one, unless it is there already."""
    if not record:
        return
    content = {"schema": SCHEMA, "folders": [folder.as_dict() for folder in record]}
    text = json.dumps(content, indent=1).encode() + b"\n"
    file = run / RECORD
    if not (file.is_file() and file.read_bytes() == text):
        with replacing(file) as stream:
            stream.write(text)


def recorded(run: Path) -> Record | None:
    """The record of a run; None where it has none.

    Raises:
        InputError: a file that is damaged, or of another version.
    """
    file = run / RECORD
    try:
        values = json.loads(file.read_bytes())
        if values["schema"] != SCHEMA:
            raise ValueError(f"schema {values['schema']!r}; this version reads {SCHEMA!r}")
        return tuple(map(FolderIdentity.from_dict, values["folders"]))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as e:
        raise InputError(
            f"{file}: damaged ({summary(e)}); put back what was there, or delete the file to go on "
            "without verifying the images"
        ) from e
