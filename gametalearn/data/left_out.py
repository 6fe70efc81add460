"""What is said of a folder of images that may be meant otherwise: what is left out, and odd layouts."""

from __future__ import annotations

import difflib
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Set
from pathlib import PurePosixPath

from gametalearn.data.archives import OTHER_IMAGES, is_image_name
from gametalearn.data.splits import FILE
from gametalearn.words import counted

__all__ = ["warn_of_groups", "warn_of_left_out", "warn_of_similar", "warn_of_unlisted"]


def warn_of_left_out(where: str, visible: Iterable[str], splits: Mapping[str, str]) -> None:
    """Say what is left out: folders without an image, images outside class folders, unread formats.

    Args:
        where: the folder.
        visible: its files, hidden ones left out.
        splits: the split of each folder that is one; empty if the folder has class folders only.
    """
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
            beside = "beside the class folders" if folder in splits or not folder else ""
            place = " ".join(filter(None, [f"in {folder}/" if folder else "", beside]))
            told.append(f"{counted(len(members), 'image')} {place} ({_named(members)})")
        else:
            others.update(_unread(members))
    told += [counted(count, f"{kind} file") for kind, count in sorted(others.items())]
    _say(where, told)


def warn_of_unlisted(where: str, visible: Iterable[str], listed: Set[str]) -> None:
    """Say which images ``splits.csv`` does not list, and which are of formats that are not read."""
    rest = [name for name in visible if name not in listed]
    told = []
    if left := [name for name in rest if is_image_name(name)]:
        told.append(f"{counted(len(left), 'image')} that {FILE} does not list ({_named(left)})")
    told += [counted(count, f"{kind} file") for kind, count in sorted(_unread(rest).items())]
    _say(where, told)


def warn_of_similar(where: str, visible: Iterable[str]) -> None:
    """Say that a file is not read whose name is almost ``splits.csv``."""
    for name in visible:
        if "/" not in name and difflib.get_close_matches(name.lower(), [FILE], cutoff=0.85):
            warnings.warn(
                f"{where}: {name} is not read; if it says which class is in which split, rename it to "
                f"{FILE}",
                stacklevel=2,
            )


def warn_of_groups(where: str, classes: Iterable[Iterable[str]], depth: int) -> None:
    """Warn where class folders look like groups of classes, as Omniglot's alphabets are.

    They do if most of them hold no image themselves, and several subfolders with images.

    Args:
        where: the folder.
        classes: the files of each class.
        depth: the number of folders in a path down to a class's own.
    """
    below = [[name.split("/")[: depth + 2] for name in names] for names in classes]
    groups = [
        (paths[0], subfolders)
        for paths in below
        if min(map(len, paths)) == depth + 2
        and len(subfolders := {path[depth] for path in paths}) >= 2
    ]
    if not groups or 2 * len(groups) < len(below):
        return
    path, subfolders = groups[0]
    folder, keep = "/".join(path[:depth]), f"; a {FILE} of class,split keeps these classes"
    warnings.warn(
        f"{where}: {len(groups)} of {counted(len(below), 'class folder')} hold no images, only "
        f"subfolders of images ({folder}/ has {len(subfolders)}, such as {'/'.join(path[: depth + 1])}/), "
        "and all that is in a class folder is one class. If the subfolders are the classes, move each of "
        f"them up one level, or list the files in {FILE} (file,class,split){keep if depth == 1 else ''}",
        stacklevel=2,
    )


def _named(names: list[str]) -> str:
    """The file that is meant; the first of several."""
    return names[0] if len(names) == 1 else f"{names[0]} first"


def _unread(names: Iterable[str]) -> Counter[str]:
    """The number of files of each image format that is not read."""
    suffixes = (PurePosixPath(name).suffix.lower() for name in names)
    return Counter(suffix for suffix in suffixes if suffix in OTHER_IMAGES)


def _say(where: str, told: list[str]) -> None:
    if told:
        more = f" and {len(told) - 5} more" if len(told) > 5 else ""
        warnings.warn(f"{where}: left out {', '.join(told[:5])}{more}", stacklevel=3)
