"""Data sets by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gametalearn import registry
from gametalearn.classes import Classes
from gametalearn.data.folder import deal_classes, load_folder
from gametalearn.data.mini_imagenet import prepare_mini_imagenet
from gametalearn.data.omniglot import prepare_omniglot
from gametalearn.data.packed import data_root
from gametalearn.data.sinusoid import Sinusoid
from gametalearn.errors import InputError
from gametalearn.examples import labelled
from gametalearn.images import ClassImages
from gametalearn.places import folder_of

__all__ = [
    "Sinusoid",
    "data_root",
    "load_dataset",
    "load_part",
    "prepare_mini_imagenet",
    "prepare_omniglot",
]

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
            ``folder:PATH`` or a path for a tree of class folders, cached on first use; or a name
            that a package registered, or ``module:attribute``, such as
            ``torchvision.datasets:CIFAR100`` (downloaded below ``root/torchvision``): a data set, or
            what returns one. Where that does not take ``split``, and for torchvision's, whose splits
            divide examples and not classes, 64 / 16 / 20% of the classes are dealt by their names.
            (Sinusoids are no images: see `gametalearn.data.Sinusoid`.)
        split: ``train``, ``val`` or ``test``; no class is in two of them. Of a folder also ``all``.
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
    data = load_part(
        name, split, root=root, class_split=class_split, rotations=rotations,
        image_size=image_size, channels=channels,
    )  # fmt: skip
    if not isinstance(data, ClassImages):
        raise InputError(
            f"load_dataset: data set {name!r} provides episodes, not 8-bit images; sample from "
            "load_run(RUN).source instead"
        )
    return data


def load_part(name: str, split: str, *, rotations: bool = False, **given: Any) -> Any:
    """What a data set's name stands for: what `EpisodeSampler` draws from, or a source of episodes.

    Args:
        name, split, rotations: as in `load_dataset`.
        given: its other options, and what else a data set may name (`gametalearn.registry.OFFERED`);
            None is not given.
    """
    offered = {"root": data_root(), **{k: v for k, v in given.items() if v is not None}}
    folder = folder_of(name)
    if split not in SPLITS and not (split == "all" and folder is not None):
        raise InputError(
            f"load_dataset: split {split!r} is unknown; use one of {', '.join(SPLITS)}"
        )
    part, fixed = (load_folder, {}) if folder is not None else registry.resolve("dataset", name)
    if "class_split" in offered and not registry.takes(part, "class_split"):
        raise InputError(
            f"load_dataset: data set '{name}' has only one class split, "
            f"got {offered['class_split']!r}; leave it out"
        )
    if folder is not None:  # packed at the size asked for, not resized twice
        fixed = {"folder": Path(folder)}
    offered["split"] = split
    # torchvision's `split` and `train` divide the examples of each class, and are left alone
    theirs = getattr(part, "__module__", "").startswith("torchvision.datasets")
    if theirs:
        offered = {"root": offered["root"] / "torchvision", "download": True}
    data = registry.call("dataset", name, part, offered, fixed)
    if hasattr(data, "sample"):
        if isinstance(part, registry.Itself):
            raise InputError(
                f"data set '{name}' draws its own episodes ({type(data).__name__}), the same for training "
                "and test; name a function of `split` that returns one, or a data set"
            )
        return data
    data = labelled(data, name)
    if theirs or not registry.takes(part, "split"):
        data = _dealt(data, split)
    if isinstance(data, ClassImages):
        data = data.rotated() if rotations else data
        return data.converted(given.get("image_size"), given.get("channels"))
    wanted = [given.get("channels"), given.get("image_size"), given.get("image_size")]
    have = data.shape if len(data.shape) == 3 else (None, None, None)
    if rotations or any(w not in (None, h) for w, h in zip(wanted, have, strict=True)):
        raise InputError(
            f"'{name}' gives inputs of shape {data.shape} that are not 8-bit images, so they are not "
            "resized, converted or rotated; let the data set do it"
        )
    return data


def _dealt(data: Classes, split: str) -> Classes:
    """One split's classes, by `deal_classes`: what gives the same for every split would leak them."""
    chosen = set(deal_classes(data.classes, data.name)[split])
    return data.subset([i for i, name in enumerate(data.classes) if name in chosen], split)
