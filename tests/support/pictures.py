"""Folders of images of noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["divided_pictures", "pictures"]


def pictures(root: Path, name: str, classes: int, side: int = 16, each: int = 4) -> Path:
    """Write ``each`` images of every class into ``root/NAMEi``; give ``root``."""
    generator = np.random.default_rng(classes)
    for c in range(classes):
        (root / f"{name}{c}").mkdir(parents=True)
        for i in range(each):
            pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"{name}{c}" / f"{i}.png")
    return root


def divided_pictures(root: Path, classes: int = 5, seed: int = 0) -> Path:
    """Classes of four random images each for training, validation and test; their folder."""
    generator = np.random.default_rng(seed)
    for split in ("train", "val", "test"):
        for number in range(classes):
            place = root / split / f"{split}{number}"
            place.mkdir(parents=True)
            for i in range(4):
                pixels = generator.integers(0, 256, (20, 20), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return root
