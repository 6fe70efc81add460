"""Contact sheets: episodes as pictures, a block for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gametalearn.canvas import drawing, figure, saved, shortened
from gametalearn.episodes import TaskBatch
from gametalearn.errors import InputError

__all__ = ["contact_sheet", "drawn_of"]

EPISODES, ROWS, COLUMNS = 12, 20, 8
"""How many episodes, classes in each, and images of a class on each side are drawn at the most."""

TILE, NAME, HEAD, SPACE = 0.55, 0.068, 0.55, 0.2
"""Inches: an image, a letter of a name, what stands over a block, what is free beside it."""

GAP = 0.4
"""Between support and queries, in images."""

Array = np.ndarray[Any, np.dtype[np.float32]]


def drawn_of(batch: TaskBatch, ways: int) -> str:
    """How much `contact_sheet` draws of a batch that is too large for it; "" if it draws all of it."""
    shots, queries = (t.shape[1] // ways for t in (batch.support_x, batch.query_x))
    counts = (
        (EPISODES, len(batch), "episodes"), (ROWS, ways, "classes"), (COLUMNS, shots, "shots"),
        (COLUMNS, queries, "queries"),
    )  # fmt: skip
    return ", ".join(f"{most} of {count} {what}" for most, count, what in counts if count > most)


@drawing()
def contact_sheet(
    batch: TaskBatch,
    file: Path,
    ways: int,
    names: Sequence[Sequence[str]] | None = None,
    title: str = "",
) -> Path:
    """Draw episodes as a PNG: a block for each, a row per class, support left and queries right.

    All images have one size. At most `EPISODES` episodes, `ROWS` classes and `COLUMNS` images of a
    class on each side are drawn, so that a sheet is made in seconds, whatever is asked for.

    Args:
        batch: image episodes, support and queries ordered by label.
        file: the PNG to write.
        ways: classes in each episode.
        names: the classes' names, by episode and label.
        title: what stands over all of it.

    Raises:
        InputError: the inputs are no images, or the file cannot be written.
    """
    if batch.support_x.dim() != 5:
        raise InputError(
            "episodes draws images (channels, height, width); these inputs have the shape "
            f"{tuple(batch.support_x.shape[2:])}"
        )
    tasks, rows = min(len(batch), EPISODES), min(ways, ROWS)
    left, right = (
        min(t.shape[1] // ways, COLUMNS) for t in (batch.support_x, batch.query_x)
    )  # fmt: skip
    labels = [[shortened(name, 26) for name in own[:rows]] for own in (names or [])[:tasks]]
    margin = 0.1 + NAME * max((len(name) for own in labels for name in own), default=0)
    across = 1 if tasks == 1 or margin + (left + right) * TILE > 6 else 2
    shape = batch.support_x.shape[-2:]
    wide = margin + (left + right + GAP) * TILE
    high = rows * TILE * min(max(shape[0] / shape[1], 0.25), 4.0)
    over = 0.5 if title else 0.1
    width = max(across * (wide + SPACE) + SPACE, 0.085 * len(title))
    height = over + -(-tasks // across) * (high + HEAD + SPACE)
    sheet = figure(width, height, layout="none")
    if title:
        sheet.text(0.5, 1 - 0.25 / height, title, fontsize=10, ha="center", va="center")
    for task in range(tasks):
        row, column = divmod(task, across)
        x = SPACE + column * (wide + SPACE) + margin
        y = over + row * (high + HEAD + SPACE) + HEAD + high
        place = (x / width, 1 - y / height, (wide - margin) / width, high / height)
        sides = [
            _tiles(images[task], ways, rows, count)
            for images, count in ((batch.support_x, left), (batch.query_x, right))
        ]
        axes = sheet.add_axes(place)
        _block(axes, f"episode {task + 1}", sides, round(GAP * sides[0].shape[1] / left))
        for number, name in enumerate(labels[task] if labels else ()):
            axes.annotate(
                name, (0, 1 - (number + 0.5) / rows), (-5, 0), xycoords="axes fraction",
                textcoords="offset points", ha="right", va="center", fontsize=7,
            )  # fmt: skip
    return saved(sheet, file, 130)


def _block(axes: Any, title: str, sides: Sequence[Array], gap: int) -> None:
    """One episode: its support images, a gap of this many pixels, its queries."""
    (height, first), second = sides[0].shape[:2], sides[1].shape[1]
    picture = np.ones((height, first + gap + second, 3), dtype=np.float32)
    picture[:, :first], picture[:, first + gap :] = sides
    axes.set_axis_off()
    axes.imshow(picture, aspect="auto")
    for place, text in ((first / 2, "support"), (first + gap + second / 2, "queries")):
        axes.annotate(text, (place, 0), (0, 5), textcoords="offset points", ha="center", fontsize=8)
    axes.annotate(title, (0, 0), (0, 19), textcoords="offset points", fontsize=9, weight="bold")


def _tiles(images: Tensor, ways: int, rows: int, columns: int) -> Array:
    """The first images of the first classes as a picture ``(rows * h, columns * w, 3)``."""
    shown = images.view(ways, -1, *images.shape[1:])[:rows, :columns].float().cpu()
    if shown.shape[2] not in (1, 3):  # another number of channels is shown by their mean
        shown = shown.mean(2, keepdim=True)
    array: Array = shown.expand(-1, -1, 3, -1, -1).clamp(0, 1).numpy()
    gap = max(1, array.shape[-1] // 14)
    framed = np.pad(array, [(0, 0)] * 3 + [(0, gap), (0, gap)], constant_values=1)
    r, c, channels, h, w = framed.shape
    return framed.transpose(0, 3, 1, 4, 2).reshape(r * h, c * w, channels)
