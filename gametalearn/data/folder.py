"""Any tree of class folders: ``root/class/*.png|jpg|...`` or ``root/{train,val,test}/class/...``.

A file ``splits.csv`` in the folder says otherwise (`gametalearn.data.splits`).
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gametalearn.data.archives import FolderFiles, is_image_name
from gametalearn.data.decode import DECODER, brightest, decode, is_lost, resized
from gametalearn.data.duplicates import Place, refuse_links, warn_of_copies
from gametalearn.data.left_out import (
    warn_of_groups,
    warn_of_left_out,
    warn_of_similar,
    warn_of_unlisted,
)
from gametalearn.data.packed import PackedWriter, read_or_build
from gametalearn.data.splits import CALLED, FILE, MEANT, SPLITS, read_splits
from gametalearn.errors import InputError
from gametalearn.images import ClassImages
from gametalearn.pixels import LOST
from gametalearn.terminal import on_terminal
from gametalearn.words import counted

__all__ = ["class_folders", "deal_classes", "existing", "load_folder", "status"]

DARK = 16
"""Of 255: what 12 bits in a file of 16 bits stay below."""


def class_folders(files: FolderFiles) -> dict[str, dict[str, list[str]]]:
    """The image files of each class of each split, ``{split: {class: [name, ...]}}``.

    A class is a folder; its files may lie deeper. ``splits.csv`` says which is of which split, where it
    is there (`read_splits`). Otherwise folders called like splits (`CALLED`) do, and where there are
    none, classes are dealt to splits by `deal_classes`. Warns of folders and images that are left out,
    and of classes that may be groups of classes.

    Raises:
        InputError: no class folders, a split that is missing or there twice, or a class in two splits;
            or as `read_splits`.
    """
    visible = files.visible()
    names = [name.split("/") for name in visible if is_image_name(name)]
    if FILE in visible:
        return _listed(files, visible, _by_folder(names))
    warn_of_similar(files.where, visible)
    given = {p[0] for p in names if len(p) >= 3 and p[0].lower() in CALLED}
    if len({CALLED[folder.lower()] for folder in given}) < 2:
        # a single folder `test` that holds images, not folders only, is a class
        given -= {p[0] for p in names if len(p) == 2}
    if given:
        found = _splits(given, {p[0] for p in names}, files.where)
        tree: dict[str, dict[str, list[str]]] = {split: defaultdict(list) for split in SPLITS}
        for p in names:
            if len(p) >= 3 and p[0] in found:
                tree[found[p[0]]][p[1]].append("/".join(p))
        check_disjoint(tree, files.where)
        warn_of_groups(files.where, (m for classes in tree.values() for m in classes.values()), 2)
        warn_of_left_out(files.where, visible, found)
        return tree
    classes = _by_folder(names)
    warn_of_groups(files.where, classes.values(), 1)
    dealt = deal_classes(classes, files.where)
    warn_of_left_out(files.where, visible, {})
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
    warn_of_unlisted(files.where, visible, listed)
    return tree


def _splits(given: Iterable[str], folders: Iterable[str], where: str) -> dict[str, str]:
    """The split of each folder that is called like one, ``given`` of all folders."""
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
        meant = [f for f in sorted(folders) if MEANT.get(f.lower()) == missing[0]]
        hint = f"rename {meant[0]}/ to {missing[0]}/, or " if meant else ""
        raise InputError(
            f"{where}: has class folders in {min(given)}/ but none in {missing[0]}/; {hint}give "
            f"all of {', '.join(SPLITS)}, or class folders only"
        )
    return found


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
        InputError: no such folder, no classes in it, unreadable images, or one file in two splits.
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
        _pack(out, files, tree, image_size, channels)

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


def _pack(
    out: PackedWriter,
    files: FolderFiles,
    tree: Mapping[str, Mapping[str, list[str]]],
    image_size: int,
    channels: int,
) -> None:
    """Write all classes; refuse or warn of images that cannot be right.

    Raises:
        InputError: one file in two splits, or files that cannot be read, of which all are counted.
    """
    folder, unreadable = files.folder, dict[str, InputError]()
    dark, lost = 0, list[str]()
    refuse_links(folder, tree)
    copies: dict[bytes, list[Place]] = defaultdict(list)
    count = sum(len(names) for classes in tree.values() for names in classes.values())
    with tqdm(total=count, unit="image", desc=folder.name, disable=not on_terminal()) as progress:
        for split, classes in tree.items():
            for name, members in classes.items():
                images = []
                for member in members:
                    try:
                        content = files.read(member)
                        image = decode(content, str(folder / member))
                    except InputError as error:
                        unreadable[member] = error
                    else:
                        copies[hashlib.sha256(content).digest()].append((split, name, member))
                        dark += brightest(image) < DARK
                        lost += [member] * is_lost(image, content)
                        images.append(resized(image, image_size, channels))
                    progress.update()
                if not unreadable:
                    out.add(name, folder.name, np.stack(images), split)
    if unreadable:
        raise _refused(folder, unreadable, count)
    warn_of_copies(files.where, copies.values())
    if lost:
        warnings.warn(
            f"{folder}: {len(lost)} of {counted(count, 'image')} became white {LOST} (the first: {lost[0]})",
            stacklevel=2,
        )
    if 2 * dark > count:
        warnings.warn(
            f"{folder}: {dark} of {counted(count, 'image')} are almost black (no value above {DARK - 1} of "
            "255); scale their values to the full range of their files: 12 bits in 16, for example, by 16",
            stacklevel=2,
        )


def _refused(folder: Path, unreadable: Mapping[str, InputError], count: int) -> InputError:
    """The error about all files that cannot be read."""
    listed = ", and of splits.csv if it lists it" if (folder / FILE).is_file() else ""
    first, error = next(iter(unreadable.items()))
    if len(unreadable) == 1:
        return InputError(f"{error}; repair the file, or take it out of the folder{listed}")
    more = f" and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
    reason = str(error).removeprefix(f"{folder / first}: ")
    return InputError(
        f"{folder}: {len(unreadable)} of {counted(count, 'image')} cannot be read: "
        f"{', '.join(list(unreadable)[:3])}{more} (the first: {reason}); repair the files, or take them "
        f"out of the folder{listed.replace('it lists it', 'it lists them')}"
    )


def _listing(folder: Path, tree: Mapping[str, Mapping[str, list[str]]]) -> str:
    """A digest of the files' classes, places, sizes and times.

    Of the times, that of the contents can be set, and is the same for files that an archive unpacked; that of
    the entry, which a file that takes another's place has of its own, cannot.
    """
    digest = hashlib.sha256()
    for split, classes in tree.items():
        for name, members in classes.items():
            for member in members:
                now = status(folder, member)
                line = f"{split}\0{name}\0{member}\0{now.st_size}\0{now.st_mtime_ns}"
                line += f"\0{now.st_ctime_ns}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def status(folder: Path, member: str) -> os.stat_result:
    """The size and time of a file, links followed; `InputError` names it if it cannot be read."""
    try:
        return (folder / member).stat()
    except OSError as error:
        raise InputError(f"{folder / member}: cannot be read: {error.strerror}") from error
