"""Data sets by name."""

from __future__ import annotations

from pathlib import Path

from gametalearn.data.folder import load_folder
from gametalearn.data.mini_imagenet import load_mini_imagenet, prepare_mini_imagenet
from gametalearn.data.omniglot import load_omniglot, prepare_omniglot
from gametalearn.data.packed import data_root
from gametalearn.data.sinusoid import Sinusoid
from gametalearn.errors import InputError
from gametalearn.images import ClassImages

__all__ = [
    "NAMES",
    "Sinusoid",
    "data_root",
    "load_dataset",
    "prepare_mini_imagenet",
    "prepare_omniglot",
]

NAMES = ("glyphs", "omniglot", "mini-imagenet", "folder:PATH")
SPLITS = ("train", "val", "test")


def load_dataset(
    name: str,
    split: str,
    *,
    root: Path | None = None,
    class_split: str | None = None,
    rotations: bool = False,
    image_size: int | None = None,
    channels: int | None = None,
) -> ClassImages:
    """One split of a data set of images.

    Args:
        name: ``glyphs`` (embedded; built on first use), ``omniglot``, ``mini-imagenet``, or
            ``folder:PATH`` or a path for a tree of class folders, cached on first use. (Sinusoids
            are no images: see `gametalearn.data.Sinusoid`.)
        split: ``train``, ``val`` or ``test``; no class is in two of them.
        root: the data root; `data_root` by default.
        class_split: how classes are dealt to the splits, where a data set has more than one way:
            ``lake`` (default) or ``maml`` for omniglot.
        rotations: add every class turned by 90, 180 and 270 degrees as a further class.
        image_size: resize to a square of this side; None keeps the data set's own size, which is
            28 for glyphs and omniglot, 84 for mini-imagenet and folders.
        channels: 1 or 3; convert to grayscale or RGB. None keeps the data set's own, which is 1
            for glyphs and omniglot, 3 for mini-imagenet and folders.

    Raises:
        InputError: an unknown name or split, or a data set that is not prepared.
    """
    if split not in SPLITS:
        raise InputError(
            f"load_dataset: split {split!r} is unknown; use one of {', '.join(SPLITS)}"
        )
    root = data_root() if root is None else root
    if name == "omniglot":
        images = load_omniglot(split, root, class_split or "lake")
    elif class_split is not None:
        raise InputError(
            f"load_dataset: data set '{name}' has one way to split its classes, "
            f"got --split {class_split!r}; leave it out"
        )
    elif name == "glyphs":
        from gametalearn.data.glyphs import load_glyphs

        images = load_glyphs(split, root=root)
    elif name == "mini-imagenet":
        images = load_mini_imagenet(split, root)
    elif name.startswith("folder:") or Path(name).is_dir():
        folder = Path(name.removeprefix("folder:"))
        # packed at the size asked for, not resized twice
        images = load_folder(
            folder, split, root, image_size=image_size or 84, channels=channels or 3
        )
    else:
        raise InputError(
            f"load_dataset: data set {name!r} is unknown; use one of {', '.join(NAMES)}"
        )
    if rotations:
        images = images.rotated()
    return images.converted(image_size, channels)
