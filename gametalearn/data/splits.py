"""``splits.csv`` in a folder of images: which class, or which file, belongs to which split."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath

from gametalearn.data.archives import OTHER_IMAGES
from gametalearn.errors import InputError
from gametalearn.words import counted, did_you_mean

__all__ = ["CALLED", "FILE", "MEANT", "SPLITS", "read_splits"]

FILE = "splits.csv"

SPLITS = ("train", "val", "test")
CALLED = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""The splits by the names of their folders, and by their names in `FILE`, in upper or lower case."""

MEANT = {"dev": "val", "development": "val", "holdout": "test"}
"""Names of splits elsewhere that are not read here, for a hint."""

NEVER_IMAGES = OTHER_IMAGES | {
    ".txt", ".md", ".csv", ".tsv", ".json", ".xml", ".html", ".pdf", ".zip"
}  # fmt: skip
"""Suffixes of files that `FILE` may list by mistake."""

HEADERS = (("class", "split"), ("file", "class", "split"))


def read_splits(
    text: bytes, where: str, folders: Mapping[str, list[str]], files: Iterable[str]
) -> dict[str, dict[str, list[str]]]:
    """The image files of each class of each split, according to ``splits.csv``.

    If its first line is ``class,split``, every other line names the folder of a class. If it is
    ``file,class,split``, the files may be anywhere in the folder, whatever their classes
    are called. What it does not list is left out.

    Args:
        text: its content.
        where: its path, for messages.
        folders: the image files of each class folder.
        files: all files, by their paths as ``splits.csv`` gives them: relative to its folder, with ``/``.

    Returns:
        ``{split: {class: [file, ...]}}``, classes and files sorted by name.

    Raises:
        InputError: a wrong header; a line with an unknown class, split or file, with too few or too
            many values, or one that repeats or contradicts another; or a split without a class. The
            message names the line.
    """
    known, tree = set(files), {split: defaultdict[str, list[str]](list) for split in SPLITS}
    lines: dict[str, int] = {}  # where a class or a file first appeared
    split_of: dict[str, tuple[str, int]] = {}
    for line, row in _rows(text, where):
        at, name = f"{where}, line {line}", row["class"]
        split = CALLED.get(row["split"].lower())
        if split is None:
            meant = MEANT.get(row["split"].lower(), row["split"])
            hint = did_you_mean(meant, SPLITS)
            raise InputError(
                f"{at}: split {row['split'][:60]!r} is unknown; {hint}use one of {', '.join(SPLITS)}"
            )
        if "file" in row:
            entry = PurePosixPath(row["file"]).as_posix()  # without ./ and //
            if entry not in known:
                raise InputError(
                    f"{at}: there is no file {row['file'][:200]!r}; give paths relative to {FILE}"
                )
            if (kind := PurePosixPath(entry).suffix.lower()) in NEVER_IMAGES:
                raise InputError(
                    f"{at}: {kind} files are not read as images, got {row['file'][:200]!r}; remove the "
                    "line, or convert the file to PNG or JPEG"
                )
        elif (entry := name) not in folders:
            hint = did_you_mean(name, folders)
            raise InputError(
                f"{at}: there is no folder of images for class {name[:200]!r}; {hint}remove the line, or "
                "add the folder"
            )
        if entry in lines:
            raise InputError(
                f"{at}: {entry[:200]!r} is already in line {lines[entry]}; keep one of the two"
            )
        lines[entry] = line
        before, first = split_of.setdefault(name, (split, line))
        if before != split:
            raise InputError(
                f"{at}: class {name[:200]!r} is in {split}, but in {before} according to line {first}; "
                "few-shot splits must not share classes"
            )
        tree[split][name] += [entry] if "file" in row else folders[name]
    if missing := [split for split in SPLITS if not tree[split]]:
        raise InputError(f"{where}: no line has the split {missing[0]}; each split needs classes")
    return {s: {c: sorted(classes[c]) for c in sorted(classes)} for s, classes in tree.items()}


def _rows(text: bytes, where: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Each line's number and its values by the names in the header."""
    try:
        reader = csv.reader(io.StringIO(text.decode("utf-8-sig"), newline=""), strict=True)
        header = tuple(name.strip().lower() for name in next(reader, []))
        if tuple(sorted(header)) not in {tuple(sorted(names)) for names in HEADERS}:
            other = next((mark for mark in (";", "\t") if mark in "".join(header)), None)
            hint = "" if other is None else f"; separate the values by commas, not by {other!r}"
            raise InputError(
                f"{where}, line 1: the header must be class,split or file,class,split; got "
                f"{','.join(header)[:200]!r}{hint}"
            )
        for row in reader:
            values = [value.strip() for value in row]
            if not any(values):
                continue
            if len(values) != len(header) or not all(values):
                raise InputError(
                    f"{where}, line {reader.line_num}: expected {counted(len(header), 'value')} "
                    f"({','.join(header)}), got {','.join(row)[:200]!r}"
                )
            yield reader.line_num, dict(zip(header, values, strict=True))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except csv.Error as error:
        raise InputError(f"{where}, line {reader.line_num}: not CSV ({error})") from error
