"""What a folder of images holds, in short: enough to tell another folder, or a changed one, apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from gametalearn.data.archives import FolderFiles
from gametalearn.data.folder import class_folders, existing, status
from gametalearn.words import counted

__all__ = ["ClassIdentity", "FolderIdentity", "differences"]

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ClassIdentity:
    """One class: its split, its number of files, and a digest of their names and sizes."""

    split: str
    files: int
    digest: str


@dataclass(frozen=True)
class FolderIdentity:
    """The classes of a folder of images, wherever it lies.

    Names, sizes and splits count; times do not, so that a copied or moved folder is the same.

    Attributes:
        path: where the folder lies (or lay), absolute; not part of what `differences` compares.
        classes: by name.
    """

    path: str
    classes: Mapping[str, ClassIdentity]

    @classmethod
    def of(cls, folder: Path | str) -> Self:
        """What lies in ``folder`` now.

        Raises:
            InputError: as `gametalearn.data.folder.load_folder`, but that no image is opened.
        """
        folder = existing(Path(folder))
        tree = class_folders(FolderFiles(folder))
        return cls(
            str(folder),
            {
                name: ClassIdentity(split, len(members), _digest(folder, members))
                for split, classes in tree.items()
                for name, members in classes.items()
            },
        )

    @property
    def files(self) -> int:
        """The number of images."""
        return sum(c.files for c in self.classes.values())

    @property
    def digest(self) -> str:
        """Of all classes; equal where nothing differs."""
        lines = (f"{n}\0{c.split}\0{c.files}\0{c.digest}" for n, c in sorted(self.classes.items()))
        return _sha256(lines)

    def __str__(self) -> str:
        classes = counted(len(self.classes), "class", "classes")
        return f"{self.path} ({classes}, {counted(self.files, 'file')})"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        splits: dict[str, dict[str, Any]] = {split: {} for split in SPLITS}
        for name, c in self.classes.items():
            splits[c.split][name] = {"files": c.files, "digest": c.digest}
        return {"path": self.path, "digest": self.digest, "splits": splits}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """What `as_dict` gave.

        Raises:
            ValueError, LookupError, TypeError, AttributeError: something else, or damaged.
        """
        found = cls(
            str(values["path"]),
            {
                name: ClassIdentity(split, int(c["files"]), str(c["digest"]))
                for split in SPLITS
                for name, c in values["splits"][split].items()
            },
        )
        if found.digest != values["digest"]:
            raise ValueError("the digest does not match the classes")
        return found


def _digest(folder: Path, members: Iterable[str]) -> str:
    return _sha256(f"{name}\0{status(folder, name).st_size}" for name in sorted(members))


def _sha256(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def differences(stored: FolderIdentity, found: FolderIdentity) -> list[str]:
    """A few words for each class that differs: what is gone or new first, then what has changed."""
    gone = [f"{_short(n)} is missing" for n in sorted(stored.classes.keys() - found.classes)]
    new = [f"{_short(n)} is new" for n in sorted(found.classes.keys() - stored.classes)]
    changed, moved = [], []
    for name, then in sorted(stored.classes.items()):
        now = found.classes.get(name, then)
        if now.split != then.split:
            moved.append(f"{_short(name)} was in {then.split} and is in {now.split}")
        elif now.files != then.files:
            changed.append(f"{_short(name)} had {counted(then.files, 'file')} and has {now.files}")
        elif now.digest != then.digest:
            changed.append(f"{_short(name)} has files of other names or sizes")
    return [*gone, *new, *changed, *moved]


def _short(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:57]}...")
