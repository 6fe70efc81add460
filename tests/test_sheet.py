"""Contact sheets: equal tiles, names that are read, and seconds whatever is asked for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gametalearn import ClassImages, EpisodeSampler, TaskBatch
from gametalearn.cli import main
from gametalearn.sheet import COLUMNS, EPISODES, ROWS, contact_sheet, drawn_of


def black(ways: int, shots: int, queries: int, tasks: int = 1, channels: int = 1) -> TaskBatch:
    """Episodes of black images, so that tiles stand out on the white sheet."""
    images = torch.zeros(ways * (shots + queries), channels, 8, 8, dtype=torch.uint8)
    labels = torch.arange(ways).repeat_interleave(shots + queries)
    data = ClassImages.from_tensors(images, labels)
    return EpisodeSampler(data, ways, shots, queries).sample(tasks)


def runs(dark: Any) -> list[tuple[int, int]]:
    """Where stretches of True begin, and how long they are."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], dark.astype(int), [0]])))
    return [(int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def tiles(file: Path) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The columns and the rows of tiles: stretches that are black for long."""
    with Image.open(file) as image:
        dark: Any = np.asarray(image.convert("L")) < 128
    high = [r for r in runs(dark.sum(1) > 0.2 * dark.shape[1]) if r[1] > 20]
    wide = [r for r in runs(dark[high[0][0] + 5 : high[0][0] + high[0][1] - 5].all(0)) if r[1] > 20]
    return wide, high


@pytest.mark.parametrize(
    "names",
    [None, ["a", "b", "c"], ["Alphabet_of_the_Magi/character07", "x" * 90, "c"]],
    ids=["no names", "short", "long"],
)
@pytest.mark.parametrize("tasks", [1, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_tiles_are_equal_whatever_the_names(
    tmp_path: Path, names: list[str] | None, tasks: int, channels: int
) -> None:
    batch = black(3, 2, 4, tasks, channels)
    file = contact_sheet(batch, tmp_path / "a.png", 3, None if names is None else [names] * tasks)
    wide, high = tiles(file)
    across = 1 if tasks == 1 or len(wide) == 6 else 2
    assert len(wide) == across * (2 + 4)
    assert len(high) == 3 * -(-tasks // across)
    lengths = [length for _, length in (*wide, *high)]
    assert max(lengths) - min(lengths) <= 2
    assert 55 < min(lengths) < 75  # 0.55 inches at 130 dots


def test_more_than_can_be_seen_is_not_drawn(tmp_path: Path) -> None:
    batch = black(2000, 1, 1, tasks=20)
    start = time.process_time()
    names = [[f"class {i}" for i in range(2000)]] * 20
    file = contact_sheet(batch, tmp_path / "a.png", 2000, names, "a title")
    assert time.process_time() - start < 30
    wide, high = tiles(file)
    assert len(high) == ROWS * EPISODES // (len(wide) // 2)
    with Image.open(file) as image:
        assert max(image.size) < 130 * 160
    assert drawn_of(batch, 2000) == "12 of 20 episodes, 20 of 2000 classes"
    many = black(2, 30, 40)
    assert drawn_of(many, 2) == "8 of 30 shots, 8 of 40 queries"
    wide, _ = tiles(contact_sheet(many, tmp_path / "b.png", 2))
    assert len(wide) == 2 * COLUMNS
    assert drawn_of(black(5, 1, 5), 5) == ""


def test_the_command_says_what_it_drew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ways", "30", "--queries", "9", "--episodes", "2", "--out", str(tmp_path / "a.png")]
    assert main(["episodes", *flags]) == 0
    said = capsys.readouterr().out
    assert f"wrote {tmp_path}/a.png, with 20 of 30 classes, 8 of 9 queries\n" in said
    assert " and 10 more  [" in said
    assert tiles(tmp_path / "a.png")
