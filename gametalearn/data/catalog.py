"""What ``gametalearn data`` does: prepare a data set by name, and say which are there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from gametalearn.data.packed import is_packed, read_packed
from gametalearn.errors import InputError
from gametalearn.files import locked
from gametalearn.words import counted, did_you_mean

__all__ = ["clean", "describe", "prepare"]

PREPARED = ("omniglot", "mini-imagenet", "glyphs")


def prepare(name: str, root: Path, source: Path | None = None, *, skip_bad: bool = False) -> str:
    """Write a packed data set below ``root``; a line that says what is there now.

    What was prepared before stays as it is where no source is given: then it needs no network.

    Raises:
        InputError: an unknown name, or a source that is missing or damaged.
    """
    read = name in ("omniglot", "mini-imagenet")
    before = read and source is None and is_packed(root / name, name)
    if name == "omniglot":
        from gametalearn.data.omniglot import prepare_omniglot

        prepare_omniglot(root, source)
    elif name == "mini-imagenet":
        from gametalearn.data.mini_imagenet import prepare_mini_imagenet

        prepare_mini_imagenet(root, source, skip_bad=skip_bad)
    elif name == "glyphs":
        from gametalearn.data.glyphs import load_glyphs

        load_glyphs("all", root=root)
    else:
        raise InputError(
            f"data prepare: '{name}' is unknown; {did_you_mean(name, PREPARED)}use one of "
            f"{', '.join(PREPARED)} (folder:PATH and sinusoid need no preparation)"
        )
    kept = (
        "; already prepared, and left as it is (to prepare it again, delete that folder)" * before
    )
    return f"{name}: {_state(root, name)}{kept}"


def describe(root: Path) -> list[tuple[str, str]]:
    """Each data set's name and state."""
    ready = [(name, _state(root, name)) for name in PREPARED]
    return [
        *ready,
        ("sinusoid", "generated; nothing to prepare"),
        ("folder:PATH", "your own images, PATH/CLASS/*.png; packed on first use"),
        *((f"  {copy.name}", f"{_megabytes(copy)} of {_source(copy)}") for copy in _copies(root)),
    ]


def clean(root: Path, name: str | None = None) -> list[str]:
    """Remove packed copies of folders of images, which are made again when they are needed.

    Args:
        root: the data root.
        name: of one copy, as `describe` tells it; None removes all of them.

    Returns:
        A line for each copy that was removed.

    Raises:
        InputError: there is no copy of this name.
    """
    chosen = [copy for copy in _copies(root) if name in (None, copy.name)]
    for failed in filter(_is_empty, _folders(root) if name is None else []):
        shutil.rmtree(failed)
    if name is not None and not chosen:
        raise InputError(
            f"data clean: there is no packed copy '{name}'; `gametalearn data list` names them "
            "(prepared data sets stay: remove their folders yourself)"
        )
    said = []
    for copy in chosen:
        said.append(f"removed {copy} ({_megabytes(copy)} of {_source(copy)})")
        with locked(copy):
            (copy / "index.json").unlink(missing_ok=True)  # from now on it is no data set
        shutil.rmtree(copy)
    return said


def _copies(root: Path) -> list[Path]:
    return [folder for folder in _folders(root) if not _is_empty(folder)]


def _is_empty(copy: Path) -> bool:
    """Whether there is nothing in it but its lock: images that could not be packed leave that."""
    return all(file.name == ".lock" for file in copy.iterdir())


def _folders(root: Path) -> list[Path]:
    folder = root / "folders"
    return sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def _megabytes(copy: Path) -> str:
    return f"{sum(file.stat().st_size for file in copy.iterdir()) / 1e6:.1f} MB"


def _source(copy: Path) -> str:
    try:
        return str(json.loads((copy / "index.json").read_text())["info"]["source"])
    except FileNotFoundError:
        return "a packing that was interrupted"
    except (OSError, ValueError, LookupError, TypeError):
        return "an unknown folder"


def _state(root: Path, name: str) -> str:
    folder = root / name
    try:
        images, _ = read_packed(folder, name)
    except FileNotFoundError:
        if name == "glyphs":
            return "embedded; built on first use"
        return f"not prepared; run `gametalearn data prepare {name}`"
    except InputError as error:
        return f"damaged: {error}"
    channels, height, width = images.shape
    return (
        f"{counted(images.num_classes, 'class', 'classes')}, "
        f"{counted(int(images.count.sum()), 'image')} of "
        f"{channels} x {height} x {width}, in {folder}"
    )
