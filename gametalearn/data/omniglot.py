"""Omniglot (Lake, Salakhutdinov, Tenenbaum 2015): 1623 characters of 50 alphabets, 20 drawings each."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gametalearn.data.archives import FolderFiles, SourceFiles, ZipFiles
from gametalearn.data.decode import decode, resized
from gametalearn.data.packed import PackedClass, PackedWriter, is_packed, packing, read_packed
from gametalearn.errors import InputError, summary
from gametalearn.images import ClassImages
from gametalearn.terminal import on_terminal

__all__ = ["CLASS_SPLITS", "load_omniglot", "prepare_omniglot"]

CLASS_SPLITS = ("lake", "maml")
SIZE = 28
DRAWINGS = 20
PREPARE = "gametalearn data prepare omniglot [--source PATH]"

# The number of characters of each alphabet, by part.
ALPHABETS: Mapping[str, Mapping[str, int]] = {
    "background": {
        "Alphabet_of_the_Magi": 20,
        "Anglo-Saxon_Futhorc": 29,
        "Arcadian": 26,
        "Armenian": 41,
        "Asomtavruli_(Georgian)": 40,
        "Balinese": 24,
        "Bengali": 46,
        "Blackfoot_(Canadian_Aboriginal_Syllabics)": 14,
        "Braille": 26,
        "Burmese_(Myanmar)": 34,
        "Cyrillic": 33,
        "Early_Aramaic": 22,
        "Futurama": 26,
        "Grantha": 43,
        "Greek": 24,
        "Gujarati": 48,
        "Hebrew": 22,
        "Inuktitut_(Canadian_Aboriginal_Syllabics)": 16,
        "Japanese_(hiragana)": 52,
        "Japanese_(katakana)": 47,
        "Korean": 40,
        "Latin": 26,
        "Malay_(Jawi_-_Arabic)": 40,
        "Mkhedruli_(Georgian)": 41,
        "N_Ko": 33,
        "Ojibwe_(Canadian_Aboriginal_Syllabics)": 14,
        "Sanskrit": 42,
        "Syriac_(Estrangelo)": 23,
        "Tagalog": 17,
        "Tifinagh": 55,
    },
    "evaluation": {
        "Angelic": 20,
        "Atemayar_Qelisayer": 26,
        "Atlantean": 26,
        "Aurek-Besh": 26,
        "Avesta": 26,
        "Ge_ez": 26,
        "Glagolitic": 45,
        "Gurmukhi": 45,
        "Kannada": 41,
        "Keble": 26,
        "Malayalam": 47,
        "Manipuri": 40,
        "Mongolian": 30,
        "Old_Church_Slavonic_(Cyrillic)": 45,
        "Oriya": 46,
        "Sylheti": 28,
        "Syriac_(Serto)": 23,
        "Tengwar": 25,
        "Tibetan": 42,
        "ULOG": 26,
    },
}

# Validation alphabets of split `lake`: as in Meta-Dataset (Triantafillou et al. 2020), the five
# background alphabets with the fewest characters, so that most remain for training.
_SMALLEST = sorted(ALPHABETS["background"].items(), key=lambda item: item[1])[:5]
VALIDATION_ALPHABETS = frozenset(name for name, _ in _SMALLEST)


def prepare_omniglot(root: Path, source: Path | None = None) -> Path:
    """Pack all 1623 characters as 1 x 28 x 28 uint8 with high ink; return the packed folder.

    The drawings, 105 x 105 with black ink, are made grayscale, reduced with a Lanczos filter as
    MAML's code does, and inverted.

    Args:
        root: the data root; files are written to ``root/omniglot``.
        source: a folder with ``images_background.zip`` and ``images_evaluation.zip``, or with the
            folders ``images_background/`` and ``images_evaluation/``, each
            ``ALPHABET/characterNN/NNNN_MM.png``. None leaves what is prepared as it is; if nothing
            is, it downloads the archives with torchvision, which verifies their published checksums.

    Raises:
        InputError: the source is not as described, or incomplete, or an image is unreadable.
    """
    target = root / "omniglot"
    if source is None and is_packed(target, "omniglot"):
        return target
    if source is None:
        with tempfile.TemporaryDirectory() as folder:
            return prepare_omniglot(root, _download(Path(folder)))
    # both parts are found, and checked to be complete, before anything is written
    with _open(source, "background") as background, _open(source, "evaluation") as evaluation:
        parts = {"background": background, "evaluation": evaluation}
        drawings = {part: _index(files, part) for part, files in parts.items()}
        with (
            packing(target, (1, SIZE, SIZE), source=source.name) as out,
            tqdm(total=1623, unit="character", disable=not on_terminal()) as progress,
        ):
            for part, files in parts.items():
                for (alphabet, character), names in sorted(drawings[part].items()):
                    _add(out, files, names, alphabet, character, part)
                    progress.update()
    return target


def _download(folder: Path) -> Path:
    try:
        from torchvision.datasets import Omniglot
    except ModuleNotFoundError as error:
        raise InputError(
            "omniglot: torchvision, which downloads it, is not installed; pip install torchvision, or "
            "fetch images_background.zip and images_evaluation.zip otherwise and run "
            "`gametalearn data prepare omniglot --source FOLDER`"
        ) from error
    try:
        for background in (True, False):
            Omniglot(str(folder), background=background, download=True)
            # the zip stays, and is all that is read
            part = "background" if background else "evaluation"
            shutil.rmtree(folder / "omniglot-py" / f"images_{part}", ignore_errors=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"omniglot: the download failed ({summary(error)}); fetch images_background.zip and "
            "images_evaluation.zip in another way and run "
            "`gametalearn data prepare omniglot --source FOLDER`"
        ) from error
    return folder / "omniglot-py"


def _open(source: Path, part: str) -> SourceFiles:
    folder, archive = source / f"images_{part}", source / f"images_{part}.zip"
    if folder.is_dir():
        return FolderFiles(folder)
    if archive.is_file():
        return ZipFiles(archive)
    raise InputError(
        f"omniglot: {source} has neither {archive.name} nor a folder {folder.name}/; give the "
        "folder that holds both parts as `source`"
    )


def _index(files: SourceFiles, part: str) -> dict[tuple[str, str], list[str]]:
    """The drawings of each (alphabet, character); complete, or an `InputError` says what is not."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in files.names():
        parts = name.split("/")
        if len(parts) >= 3:
            found[parts[-3], parts[-2]].append(name)
    for alphabet, characters in ALPHABETS[part].items():
        have = sum(a == alphabet for a, _ in found)
        if have != characters:
            raise InputError(
                f"omniglot: {files.where} has {have} of the {characters} characters of alphabet "
                f"{alphabet}; give the complete archive as `source`"
            )
    for (alphabet, character), names in found.items():
        if alphabet not in ALPHABETS[part]:
            raise InputError(
                f"omniglot: {files.where} has an alphabet {alphabet!r} that images_{part} does not have; "
                "give the original archive as `source`"
            )
        if len(names) != DRAWINGS:
            raise InputError(
                f"omniglot: {files.where} has {len(names)} of the {DRAWINGS} drawings of "
                f"{alphabet}/{character}; give the complete archive as `source`"
            )
    return found


def _add(
    out: PackedWriter, files: SourceFiles, names: list[str], alphabet: str, char: str, part: str
) -> None:
    images = [decode(files.read(name), f"{files.where}: {name}") for name in names]
    ink_low = np.stack([resized(image, SIZE, channels=1) for image in images])
    out.add(f"{alphabet}/{char}", alphabet, 255 - ink_low, part)


def load_omniglot(split: str, root: Path, class_split: str = "lake") -> ClassImages:
    """The characters of one split, ``(N, 1, 28, 28)``; the group of a class is its alphabet.

    Args:
        split: ``train``, ``val`` or ``test``.
        root: the data root that `prepare_omniglot` wrote to.
        class_split: ``lake``: 25 background alphabets (883 characters) for training, the 5 with the
            fewest characters (81) for validation, the 20 evaluation alphabets (659) for testing.
            ``maml``: 1100 / 100 / 423 characters of a seeded shuffle over all alphabets.

    Raises:
        InputError: not prepared, damaged, or an unknown split.
    """
    if class_split not in CLASS_SPLITS:
        raise InputError(
            f"omniglot: split {class_split!r} is unknown; use one of {', '.join(CLASS_SPLITS)}"
        )
    folder = root / "omniglot"
    try:
        images, records = read_packed(folder, "omniglot", remedy=f"run `{PREPARE}`")
    except FileNotFoundError as error:
        raise InputError(f"omniglot: not prepared (looked in {folder}); run `{PREPARE}`") from error
    if class_split == "lake":
        keep = [i for i, record in enumerate(records) if _lake(record) == split]
    else:
        keep = list(range(len(records)))
        random.Random(0).shuffle(keep)
        first, stop = {"train": (0, 1100), "val": (1100, 1200), "test": (1200, None)}[split]
        keep = sorted(keep[first:stop])
    return images.subset(keep, split)


def _lake(record: PackedClass) -> str:
    if record.split == "evaluation":
        return "test"
    return "val" if record.group in VALIDATION_ALPHABETS else "train"
