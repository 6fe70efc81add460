"""Folders of images of noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["pictures"]


def pictures(root: Path, name: str, classes: int, side: int = 16, each: int = 4) -> Path:
    """Write ``each`` images of every class into ``root/NAMEi``; give ``root``."""
    generator = np.random.default_rng(classes)
    for c in range(classes):
        (root / f"{name}{c}").mkdir(parents=True)
        for i in range(each):
            pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"{name}{c}" / f"{i}.png")
    return root
