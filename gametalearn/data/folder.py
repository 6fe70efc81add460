"""Any tree of class folders: ``root/class/*.png|jpg|...`` or ``root/{train,val,test}/class/...``.

A file ``splits.csv`` in the folder says otherwise (`gametalearn.data.splits`).
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from gametalearn.data.archives import OTHER_IMAGES, FolderFiles, is_image_name
from gametalearn.data.decode import DECODER, decode, resized
from gametalearn.data.packed import PackedWriter, read_or_build
from gametalearn.data.splits import CALLED, FILE, SPLITS, read_splits
from gametalearn.errors import InputError
from gametalearn.images import ClassImages
from gametalearn.terminal import on_terminal
from gametalearn.words import counted

__all__ = ["class_folders", "deal_classes", "existing", "load_folder", "status"]


def class_folders(files: FolderFiles) -> dict[str, dict[str, list[str]]]:
    """The image files of each class of each split, ``{split: {class: [name, ...]}}``.

    A class is a folder; its files may lie deeper. ``splits.csv`` says which is of which split, where it
    is there (`read_splits`). Otherwise folders called like splits (`CALLED`) do, and where there are
    none, classes are dealt to splits by `deal_classes`. Warns of folders and images that are left out.

    Raises:
        InputError: no class folders, a split that is missing or there twice, or a class in two splits;
            or as `read_splits`.
    """
    visible = files.visible()
    names = [name.split("/") for name in visible if is_image_name(name)]
    if FILE in visible:
        return _listed(files, visible, _by_folder(names))
    # a folder `test` that holds images, not folders, is a class
    given = {p[0] for p in names if len(p) >= 3 and p[0].lower() in CALLED}
    given -= {p[0] for p in names if len(p) == 2}
    if given:
        found = _splits(given, files.where)
        tree: dict[str, dict[str, list[str]]] = {split: defaultdict(list) for split in SPLITS}
        for p in names:
            if len(p) >= 3 and p[0] in found:
                tree[found[p[0]]][p[1]].append("/".join(p))
        check_disjoint(tree, files.where)
        _warn_of_others(files.where, visible, found)
        return tree
    classes = _by_folder(names)
    dealt = deal_classes(classes, files.where)
    _warn_of_others(files.where, visible, {})
    return {split: {c: classes[c] for c in sorted(dealt[split])} for split in SPLITS}


def _by_folder(names: Iterable[list[str]]) -> dict[str, list[str]]:
    """The images below each folder; their names are given in parts."""
    found: dict[str, list[str]] = defaultdict(list)
    for parts in names:
        if len(parts) >= 2:
            found[parts[0]].append("/".join(parts))
    return dict(found)


def _listed(
    files: FolderFiles, visible: list[str], folders: dict[str, list[str]]
) -> dict[str, dict[str, list[str]]]:
    """The classes of each split by ``splits.csv``; warns of images that it does not list."""
    tree = read_splits(files.read(FILE), f"{files.where}/{FILE}", folders, visible)
    listed = {name for classes in tree.values() for members in classes.values() for name in members}
    if left := [name for name in visible if is_image_name(name) and name not in listed]:
        what = f"{counted(len(left), 'image')} that {FILE} does not list, {left[0]} first"
        warnings.warn(f"{files.where}: left out {what}", stacklevel=3)
    return tree


def _splits(given: Iterable[str], where: str) -> dict[str, str]:
    """The split of each folder that is called like one."""
    found: dict[str, str] = {}
    for folder in sorted(given):
        split = CALLED[folder.lower()]
        if split in found.values():
            first = next(f for f, s in found.items() if s == split)
            raise InputError(
                f"{where}: {first}/ and {folder}/ are both names for the {split} classes; merge "
                "them, or rename one"
            )
        found[folder] = split
    if missing := [split for split in SPLITS if split not in found.values()]:
        raise InputError(
            f"{where}: has class folders in {min(given)}/ but none in {missing[0]}/; give "
            f"all of {', '.join(SPLITS)}, or class folders only"
        )
    return found


def _warn_of_others(where: str, visible: Iterable[str], splits: Mapping[str, str]) -> None:
    """Say what is left out: folders without an image, folders beside the splits, unread formats."""
    depth = 2 if splits else 1  # of a class's folder
    files: dict[str, list[str]] = defaultdict(list)
    for name in visible:
        parts = name.split("/")
        if len(parts) > depth and (not splits or parts[0] in splits):
            files["/".join(parts[:depth])].append(name)
        elif is_image_name(name):
            files["" if len(parts) == 1 else parts[0]].append(name)
    told, others = [], Counter[str]()
    for folder, members in sorted(files.items()):
        if not any(map(is_image_name, members)):
            told.append(f"{folder}/ ({counted(len(members), 'file')}, none named like an image)")
        elif folder.count("/") < depth - 1 or not folder:
            told.append(f"{counted(len(members), 'image')} in {folder or 'no folder'}")
        else:
            others.update(kind for m in members if (kind := _suffix(m)) in OTHER_IMAGES)
    told += [counted(count, f"{kind} file") for kind, count in sorted(others.items())]
    if told:
        more = f" and {len(told) - 5} more" if len(told) > 5 else ""
        warnings.warn(f"{where}: left out {', '.join(told[:5])}{more}", stacklevel=2)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def check_disjoint(tree: Mapping[str, Iterable[str]], where: str) -> None:
    """Raise an `InputError` that names a class of two splits, whose test would not be of new classes."""
    seen: dict[str, str] = {}
    for split, classes in tree.items():
        for name in classes:
            if name in seen:
                raise InputError(
                    f"{where}: class {name[:200]!r} is in {seen[name]} and in {split}; few-shot splits "
                    "must not share classes"
                )
            seen[name] = split


def deal_classes(names: Iterable[str], where: str) -> dict[str, list[str]]:
    """Deal classes to splits, 64 / 16 / 20 %, in the order of a hash of their names.

    Validation and test get at least five classes each where there are fifteen, and a third of all
    where there are fewer. A class seldom changes its split when others come or go.

    >>> {split: len(c) for split, c in deal_classes(map(str, range(100)), "").items()}
    {'train': 64, 'val': 16, 'test': 20}
    """
    ranked = sorted(
        names, key=lambda n: hashlib.sha256(n.encode("utf-8", "surrogateescape")).digest()
    )
    total = len(ranked)
    if total < 3:
        raise InputError(
            f"{where}: {counted(total, 'class folder')} with images, but at least 3 are needed (one per split); "
            "images lie in FOLDER/CLASS/*.png or FOLDER/{train,val,test}/CLASS/*.png"
        )
    least = min(5, total // 3)
    val, test = max(round(0.16 * total), least), max(round(0.2 * total), least)
    train = total - val - test
    return {"train": ranked[:train], "val": ranked[train:-test], "test": ranked[-test:]}


def existing(folder: Path) -> Path:
    """The absolute path of a folder.

    Raises:
        InputError: no such folder.
    """
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise InputError(f"folder: {folder} is not a folder; give folder:PATH of class folders")
    return folder


def load_folder(
    folder: Path, split: str, root: Path, *, image_size: int = 84, channels: int = 3
) -> ClassImages:
    """One split of a tree of class folders, ``(N, channels, image_size, image_size)``.

    Images are resized to a square with a Lanczos filter; the aspect ratio is not kept and nothing
    is cropped. They are packed once, below ``root/folders``, and again when a file comes, goes or
    changes.

    Args:
        folder: holds ``CLASS/*`` or ``{train,val,test}/CLASS/*``, and perhaps ``splits.csv``; see
            `class_folders`.
        split: ``train``, ``val`` or ``test``; or ``all``, the classes of the three.
        root: the data root.
        image_size, channels: of the packed images; channels 1 or 3.

    Raises:
        InputError: no such folder, no classes in it, or an unreadable image.
    """
    folder = existing(folder)
    if image_size < 1 or channels not in (1, 3):
        raise InputError(
            f"folder: images of {image_size} pixels and {channels} channels requested; sizes are at "
            "least 1, channels 1 or 3"
        )
    files = FolderFiles(folder)
    tree = class_folders(files)

    def build(out: PackedWriter) -> None:
        count = sum(len(names) for classes in tree.values() for names in classes.values())
        with tqdm(
            total=count, unit="image", desc=folder.name, disable=not on_terminal()
        ) as progress:
            for part, classes in tree.items():
                for name, members in classes.items():
                    images = []
                    for member in members:
                        try:
                            image = decode(files.read(member), str(folder / member))
                        except InputError as error:
                            raise InputError(
                                f"{error}; repair the file, or take it out of the folder"
                            ) from error
                        images.append(resized(image, image_size, channels))
                        progress.update()
                    out.add(name, folder.name, np.stack(images), part)

    key = hashlib.sha256(f"{folder}\0{image_size}\0{channels}".encode("utf-8", "surrogateescape"))
    images, records = read_or_build(
        root / "folders" / f"{folder.name}-{key.hexdigest()[:12]}",
        folder.name,
        (channels, image_size, image_size),
        build,
        source=str(folder),
        listing=_listing(folder, tree),
        decoder=DECODER,
    )
    return images.subset([i for i, r in enumerate(records) if split in (r.split, "all")], split)


def _listing(folder: Path, tree: Mapping[str, Mapping[str, list[str]]]) -> str:
    """A digest of the files' classes, places, sizes and times of change."""
    digest = hashlib.sha256()
    for split, classes in tree.items():
        for name, members in classes.items():
            for member in members:
                now = status(folder, member)
                line = f"{split}\0{name}\0{member}\0{now.st_size}\0{now.st_mtime_ns}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def status(folder: Path, member: str) -> os.stat_result:
    """The size and time of a file, links followed; `InputError` names it if it cannot be read."""
    try:
        return (folder / member).stat()
    except OSError as error:
        raise InputError(f"{folder / member}: cannot be read: {error.strerror}") from error
