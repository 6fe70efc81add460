"""What ``gametalearn data`` does: prepare a data set by name, and say which are there."""

from __future__ import annotations

from pathlib import Path

from gametalearn.data.packed import is_packed, read_packed
from gametalearn.errors import InputError
from gametalearn.words import counted, did_you_mean

__all__ = ["describe", "prepare"]

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
    kept = "; prepared before, and left as it is (to make it anew, delete that folder)" * before
    return f"{name}: {_state(root, name)}{kept}"


def describe(root: Path) -> list[tuple[str, str]]:
    """Each data set's name and state."""
    ready = [(name, _state(root, name)) for name in PREPARED]
    return [
        *ready,
        ("sinusoid", "generated; nothing to prepare"),
        ("folder:PATH", "your own images, PATH/CLASS/*.png; packed on first use"),
    ]


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
