"""mini-ImageNet (Vinyals et al. 2016; splits of Ravi and Larochelle 2017): 100 classes of 600 images."""

from __future__ import annotations

import csv
import io
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tqdm import tqdm

from gametalearn.data.archives import FolderFiles, SourceFiles, ZipFiles, read_file
from gametalearn.data.decode import decode, resized
from gametalearn.data.folder import check_disjoint, class_folders
from gametalearn.data.packed import Array, is_packed, packing, read_packed
from gametalearn.data.pickles import load_arrays
from gametalearn.data.splits import SPLITS
from gametalearn.errors import InputError, summary
from gametalearn.images import ClassImages
from gametalearn.terminal import on_terminal, tell
from gametalearn.words import counted

__all__ = ["load_mini_imagenet", "prepare_mini_imagenet"]

SIZE = 84
PREPARE = "gametalearn data prepare mini-imagenet --source PATH"
LAYOUTS = (
    "train.csv, val.csv and test.csv with images/ or images.zip; or train/, val/ and test/ with "
    "class folders; or mini-imagenet-cache-{train,val,test}.pkl"
)

# (split, class, its images), one class in memory at a time
Classes = Iterator[tuple[str, str, Array]]


def prepare_mini_imagenet(root: Path, source: Path | None = None, skip_bad: bool = False) -> Path:
    """Pack mini-ImageNet, or some of its classes, as 3 x 84 x 84 uint8; return the packed folder.

    Images of another size are resized to the square with a Lanczos filter (MAML's code does the
    same), grayscale and CMYK images become RGB.

    Args:
        root: the data root; files are written to ``root/mini-imagenet``.
        source: a folder with ``train.csv``, ``val.csv``, ``test.csv`` (``filename,label``) and
            ``images/`` or ``images.zip``; or with ``train/``, ``val/``, ``test/`` of class folders;
            or with ``mini-imagenet-cache-{train,val,test}.pkl``. ImageNet's terms allow no
            download; None leaves what is prepared as it is.
        skip_bad: leave out unreadable images, naming each on stderr, instead of stopping at the
            first.

    Raises:
        InputError: the source is not as described, a class is in two splits, a file that a CSV
            names is missing, or an image is unreadable.
    """
    target = root / "mini-imagenet"
    if source is None and is_packed(target, "mini-imagenet"):
        return target
    if source is None:
        raise InputError(
            "mini-imagenet: ImageNet's terms allow no download; give `source`, a folder with "
            + LAYOUTS
        )
    if not source.is_dir():
        raise InputError(
            f"mini-imagenet: `source` {source} is not a folder; give one with {LAYOUTS}"
        )
    bad: list[str] = []

    def unreadable(error: InputError) -> None:
        if not skip_bad:
            raise InputError(f"{error}; repair it, or leave it out with `skip_bad`") from error
        bad.append(str(error))
        if sys.stderr is not None:
            tqdm.write(f"skipped: {error}", file=sys.stderr)

    with (
        packing(target, (3, SIZE, SIZE), source=source.name) as out,
        tqdm(unit="image", disable=not on_terminal()) as progress,
    ):
        splits: dict[str, list[str]] = {split: [] for split in SPLITS}
        for split, name, images in _read(source, unreadable):
            if not len(images):
                raise InputError(f"mini-imagenet: no image of class {name[:200]!r} is readable")
            splits[split].append(name)
            out.add(name, "mini-imagenet", images, split)
            progress.update(len(images))
        check_disjoint(splits, f"mini-imagenet: {source}")
        if empty := [split for split, names in splits.items() if not names]:
            raise InputError(f"mini-imagenet: {source}: split {empty[0]!r} has no classes")
    if bad:
        tell(f"mini-imagenet: left out {counted(len(bad), 'unreadable image')}")
    return target


def _read(source: Path, unreadable: Callable[[InputError], None]) -> Classes:
    pickles = {split: source / f"mini-imagenet-cache-{split}.pkl" for split in SPLITS}
    tables = {split: source / f"{split}.csv" for split in SPLITS}
    for files in (pickles, tables):
        found = [file for file in files.values() if file.is_file()]
        if found and len(found) < len(SPLITS):
            missing = next(file for file in files.values() if file not in found)
            raise InputError(f"mini-imagenet: {source} has {found[0].name} but no {missing.name}")
        if found and files is pickles:
            return _read_pickles(pickles)
        if found:
            return _read_tables(source, tables, unreadable)
    if all((source / split).is_dir() for split in SPLITS):
        folder = FolderFiles(source)
        return _decoded(folder, class_folders(folder), unreadable)
    raise InputError(f"mini-imagenet: {source} has no known layout; it needs {LAYOUTS}")


def _decoded(
    files: SourceFiles,
    tree: Mapping[str, Mapping[str, list[str]]],
    unreadable: Callable[[InputError], None],
) -> Classes:
    for split, classes in tree.items():
        for name in sorted(classes):
            images = []
            for member in classes[name]:
                try:
                    image = decode(files.read(member), f"{files.where}: {member}")
                except InputError as error:
                    unreadable(error)
                else:
                    images.append(resized(image, SIZE, channels=3))
            yield (
                split,
                name,
                np.stack(images) if images else np.empty((0, 3, SIZE, SIZE), np.uint8),
            )


def _read_tables(
    source: Path, tables: Mapping[str, Path], unreadable: Callable[[InputError], None]
) -> Classes:
    with ExitStack() as stack:
        files: SourceFiles
        if (source / "images").is_dir():
            files = FolderFiles(source / "images")
        elif (source / "images.zip").is_file():
            files = stack.enter_context(ZipFiles(source / "images.zip"))
        else:
            raise InputError(f"mini-imagenet: {source} has CSV files but no images/ or images.zip")
        members: dict[str, list[str]] = defaultdict(list)
        for member in files.names():
            members[PurePosixPath(member).name].append(member)
        used: set[str] = set()
        tree = {split: _read_table(table, members, used) for split, table in tables.items()}
        check_disjoint(tree, f"mini-imagenet: {source}")
        yield from _decoded(files, tree, unreadable)


def _read_table(
    table: Path, members: Mapping[str, list[str]], used: set[str]
) -> dict[str, list[str]]:
    """The members of each class that a CSV file lists; adds them to ``used``."""
    classes: dict[str, list[str]] = defaultdict(list)
    try:
        rows = csv.DictReader(io.StringIO(read_file(table).decode("utf-8-sig")), strict=True)
        if not {"filename", "label"} <= set(rows.fieldnames or ()):
            raise InputError(f"{table}: the first line must be `filename,label`")
        for row in rows:
            line, name, label = f"{table} line {rows.line_num}", row["filename"], row["label"]
            if not name or not label:
                raise InputError(f"{line}: a file name and a label are needed")
            found = members.get(name, [])
            if len(found) != 1:
                raise InputError(
                    f"{line}: names {name[:200]!r}, of which there are {len(found)} images; "
                    "complete the images, or correct the line"
                )
            if name in used:
                raise InputError(f"{line}: names {name[:200]!r} a second time")
            used.add(name)
            classes[label].append(found[0])
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{table}: not a readable CSV file: {summary(error)}") from error
    return classes


def _read_pickles(files: Mapping[str, Path]) -> Classes:
    for split, file in files.items():
        images, classes = _pickled(file, load_arrays(file), split)
        for name, index in classes.items():
            yield split, name, _to_packed(images[index])


def _to_packed(images: Array) -> Array:
    """(n, H, W, 3) or (n, 3, H, W) to (n, 3, 84, 84)."""
    from PIL import Image

    if images.shape[-1] != 3:
        images = images.transpose(0, 2, 3, 1)
    if images.shape[1:3] != (SIZE, SIZE):
        return np.stack([resized(Image.fromarray(image), SIZE, channels=3) for image in images])
    return images.transpose(0, 3, 1, 2)


def _pickled(file: Path, content: Any, split: str) -> tuple[Array, dict[str, list[int]]]:
    """The images of a cache file and the numbers of each class's, checked to be what they should."""
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a dictionary, got {type(content).__name__}")
    images = content.get("image_data", content.get("data"))
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.ndim != 4
        or 3 not in (images.shape[-1], images.shape[1])
        or 0 in images.shape
    ):
        raise InputError(
            f"{file}: 'image_data' (or 'data') must be (N, H, W, 3) uint8, got "
            f"{getattr(images, 'shape', type(images).__name__)} {getattr(images, 'dtype', '')}"
        )
    classes: dict[str, list[int]] = defaultdict(list)
    try:
        if isinstance(content.get("class_dict"), dict):
            for label, numbers in content["class_dict"].items():
                classes[_class_name(label, split)] += map(int, numbers)
        else:
            for number, label in enumerate(content["labels"]):
                classes[_class_name(label, split)].append(number)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{file}: 'class_dict' {{label: [numbers]}} or 'labels' [label, ...] is expected: {summary(error)}"
        ) from error
    numbers = sorted(number for index in classes.values() for number in index)
    if len(set(numbers)) < len(numbers) or not set(numbers) <= set(range(len(images))):
        raise InputError(
            f"{file}: the classes must list each of the images 0 to {len(images) - 1} at most "
            f"once, got {len(numbers)} numbers from {numbers[0]} to {numbers[-1]}, "
            f"{len(set(numbers))} of them different"
        )
    return images, dict(sorted(classes.items()))


def _class_name(label: object, split: str) -> str:
    if isinstance(label, bytes):
        label = label.decode("latin1")
    if isinstance(label, str):
        return label
    # numbers start at 0 in every file
    return f"{split}-{int(label)}"  # type: ignore[call-overload]


def load_mini_imagenet(split: str, root: Path) -> ClassImages:
    """The classes of one split that `prepare_mini_imagenet` found, ``(N, 3, 84, 84)``.

    All 64 / 16 / 20 classes, or as many as the source had; of one group, ``mini-imagenet``.

    Raises:
        InputError: not prepared, or damaged.
    """
    folder = root / "mini-imagenet"
    try:
        images, records = read_packed(folder, "mini-imagenet", remedy=f"run `{PREPARE}`")
    except FileNotFoundError as error:
        raise InputError(
            f"mini-imagenet: not prepared (looked in {folder}); run `{PREPARE}`"
        ) from error
    return images.subset([i for i, r in enumerate(records) if r.split == split], split)
