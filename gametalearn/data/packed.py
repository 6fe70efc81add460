"""The on-disk format: one memory-mapped uint8 array and one JSON index a data set.

``ROOT/NAME/images-<checksum>.npy`` holds all images ``(N, C, H, W)`` with each class contiguous;
``ROOT/NAME/index.json`` names the classes, their ranges, groups and splits, and carries the array's
file name and SHA-256. The index is renamed into place after the array, so a reader sees either a
complete data set or none, and two processes that prepare the same data at once cannot mix theirs.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gametalearn.errors import InputError
from gametalearn.images import ClassImages

__all__ = ["PackedClass", "data_root", "read_packed", "write_packed"]

FORMAT = "gametalearn.packed/1"


@dataclass(frozen=True)
class PackedClass:
    """One class of a packed data set: its name, group and number of consecutive images.

    ``split`` is the class's place in a split that the data set itself defines, or None.
    """

    name: str
    group: str
    count: int
    split: str | None = None


def data_root() -> Path:
    """``$GAMETALEARN_DATA``, or ``gametalearn`` in the user's cache folder."""
    given = os.environ.get("GAMETALEARN_DATA")
    if given:
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "gametalearn"


def write_packed(
    folder: Path,
    images: np.ndarray[Any, np.dtype[np.uint8]],
    classes: Sequence[PackedClass],
    **info: Any,
) -> None:
    """Write ``images (N, C, H, W)`` and their classes, atomically.

    Args:
        folder: the data set's folder; made if absent.
        images: uint8, class after class in the order of ``classes``.
        classes: their counts sum to N.
        info: further JSON values for the index (source, seed, ...).
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"images must be (N, C, H, W) uint8, got {images.shape} {images.dtype}")
    total = sum(c.count for c in classes)
    if total != len(images):
        raise ValueError(f"the classes count {total} images, the array has {len(images)}")
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
    file = f"images-{digest[:16]}.npy"
    with _replacing(folder / file) as temporary, temporary.open("wb") as stream:
        np.save(stream, images, allow_pickle=False)
        stream.flush()
        os.fsync(stream.fileno())
    index = {"format": FORMAT, "images": file, "sha256": digest, **info}
    index["classes"] = [asdict(c) for c in classes]
    with _replacing(folder / "index.json") as temporary:
        temporary.write_text(json.dumps(index, ensure_ascii=False, indent=0), encoding="utf-8")
    for old in folder.glob("images-*.npy"):
        if old.name != file:
            old.unlink(missing_ok=True)


class _replacing:
    """A temporary file beside ``target`` that takes its place on success and goes on failure."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> Path:
        handle, name = tempfile.mkstemp(dir=self.target.parent, prefix=f".{self.target.name}.")
        os.close(handle)
        self.temporary = Path(name)
        return self.temporary

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.temporary.chmod(0o644)
            os.replace(self.temporary, self.target)
        else:
            self.temporary.unlink(missing_ok=True)


def read_packed(
    folder: Path, name: str, *, verify: bool = True
) -> tuple[ClassImages, list[PackedClass]]:
    """Memory-map a packed data set; all its classes as one `ClassImages`, and their records.

    Raises:
        FileNotFoundError: nothing has been prepared in ``folder``.
        InputError: the files are of another format, or the checksum does not match.
    """
    remedy = f"delete {folder} and prepare '{name}' again"
    text = (folder / "index.json").read_text(encoding="utf-8")
    try:
        index = json.loads(text)
        if index["format"] != FORMAT:
            raise InputError(
                f"{folder}: format {index['format']!r}, this version reads {FORMAT}; {remedy}"
            )
        classes = [PackedClass(**record) for record in index["classes"]]
        array = np.load(folder / Path(index["images"]).name, mmap_mode="c", allow_pickle=False)
        count = torch.tensor([c.count for c in classes], dtype=torch.int64)
        if array.ndim != 4 or int(count.sum()) != len(array):
            raise ValueError(f"{int(count.sum())} images indexed, array is {array.shape}")
        if verify and hashlib.sha256(array.data).hexdigest() != index["sha256"]:
            raise ValueError("the checksum of the images does not match")
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{folder}: the packed data set is damaged ({error}); {remedy}") from error
    groups = tuple(dict.fromkeys(c.group for c in classes))
    number = {g: i for i, g in enumerate(groups)}
    images = ClassImages(
        name=name,
        split="all",
        images=torch.from_numpy(array),
        first=count.cumsum(0) - count,
        count=count,
        classes=tuple(c.name for c in classes),
        class_group=torch.tensor([number[c.group] for c in classes]),
        groups=groups,
    )
    return images, classes
