"""Lake's one-shot classification task: 20 fixed runs of 20-way 1-shot within one alphabet each.

Lake, Salakhutdinov, Tenenbaum 2015 (Science 350); the files are ``one-shot-classification`` of the
Omniglot repository.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gametalearn.data.archives import FolderFiles, SourceFiles, ZipFiles
from gametalearn.data.decode import decode, resized
from gametalearn.data.omniglot import SIZE
from gametalearn.episodes import TaskBatch
from gametalearn.errors import InputError
from gametalearn.words import counted

__all__ = ["FixedTasks", "load_lake"]

RUNS = 20
WAYS = 20
EXPECTED = (
    "expected the published one-shot runs: all_runs.zip, or a folder with "
    "run01/class_labels.txt, run01/training/class01.png, run01/test/item01.png, ..."
)


def load_lake(source: Path) -> TaskBatch:
    """Read the 20 runs as 20 tasks, drawings prepared as by `prepare_omniglot`.

    Args:
        source: ``all_runs.zip``, the folder that holds it, or a folder with ``run01`` to ``run20``
            (as they are or in ``all_runs/``), each with ``class_labels.txt``, whose lines are
            ``run01/test/item01.png run01/training/class08.png``.

    Returns:
        A `TaskBatch` of T = 20 tasks, ``support_x`` and ``query_x`` ``(20, 20, 1, 28, 28)``: label
        k - 1 is ``class<k>.png``, query k - 1 is ``item<k>.png``; ``group`` is the run's number
        counted from 0.

    Raises:
        InputError: the layout is another one or incomplete, or an image is unreadable.
    """
    with _open(source) as files:
        folders = _runs(files)
        tasks = [_run(files, name, folder) for name, folder in sorted(folders.items())]
    support_x, query_x, query_y = (torch.stack(parts) for parts in zip(*tasks, strict=True))
    return TaskBatch(
        support_x=support_x,
        support_y=torch.arange(WAYS).expand(RUNS, -1).contiguous(),
        query_x=query_x,
        query_y=query_y,
        group=torch.arange(RUNS),
    )


@contextmanager
def _open(source: Path) -> Iterator[SourceFiles]:
    if source.is_dir() and (source / "all_runs.zip").is_file():
        source = source / "all_runs.zip"
    if source.is_dir():
        yield FolderFiles(source)
    elif source.is_file():
        with ZipFiles(source) as files:
            yield files
    else:
        raise InputError(f"`source` {source}: no such file or folder; {EXPECTED}")


def _runs(files: SourceFiles) -> dict[str, str]:
    """The folder of each run within the source, by its name."""
    folders: dict[str, str] = {}
    for name in files.names():
        match = re.fullmatch(r"((?:[^/]+/)*?)(run\d\d)/(?:test|training)/[^/]+\.png", name)
        if match:
            folder = match[1] + match[2]
            if folders.setdefault(match[2], folder) != folder:
                raise InputError(f"{files.where}: {match[2]} appears twice; {EXPECTED}")
    wanted = {f"run{i:02}" for i in range(1, RUNS + 1)}
    if folders.keys() != wanted:
        missing = sorted(wanted - folders.keys()) or sorted(folders.keys() - wanted)
        raise InputError(
            f"{files.where}: {counted(len(folders), 'run')} found, not the {RUNS} of the task "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); {EXPECTED}"
        )
    return folders


def _run(files: SourceFiles, name: str, folder: str) -> tuple[Tensor, Tensor, Tensor]:
    """Support images, query images and query labels of one run."""
    labels = f"{folder}/class_labels.txt"
    where = f"{files.where}: {labels}"
    # zip errors and missing files come as an InputError that names the file
    lines = files.read(labels).decode("utf-8-sig", "replace").split("\n")
    truth: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = re.fullmatch(
            rf"{name}/test/(item\d\d)\.png\s+{name}/training/(class\d\d)\.png\s*", line
        )
        if match is None or match[1] in truth:
            raise InputError(
                f"{where}, line {number}: expected '{name}/test/itemNN.png "
                f"{name}/training/classNN.png', each item once; got '{line.strip()[:80]}'"
            )
        truth[match[1]] = match[2]
    items = [f"item{i:02}" for i in range(1, WAYS + 1)]
    classes = [f"class{i:02}" for i in range(1, WAYS + 1)]
    for what, found, wanted in (("an item", truth, items), ("a class", truth.values(), classes)):
        if others := sorted(set(found) - set(wanted)):
            raise InputError(f"{where}: '{others[0]}', but {what} is {wanted[0]} to {wanted[-1]}")
    if missing := sorted(set(items) - set(truth)):
        raise InputError(
            f"{where}: no line for {', '.join(missing[:3])}; each item needs its class"
        )
    support = _images(files, [f"{folder}/training/{c}.png" for c in classes])
    query = _images(files, [f"{folder}/test/{i}.png" for i in items])
    return support, query, torch.tensor([classes.index(truth[i]) for i in items])


def _images(files: SourceFiles, names: list[str]) -> Tensor:
    ink_low = [
        resized(decode(files.read(name), f"{files.where}: {name}"), SIZE, channels=1)
        for name in names
    ]
    ink_high = 255 - np.stack(ink_low)
    return torch.from_numpy(ink_high).to(torch.float32).div_(255)


class FixedTasks:
    """A `gametalearn.episodes.Source` of given tasks, in their order and from the start again.

    Args:
        tasks: what `sample` hands out.
    """

    def __init__(self, tasks: TaskBatch) -> None:
        self.tasks, self._next = tasks, 0

    def sample(self, num_tasks: int, part: slice = slice(None)) -> TaskBatch:
        """The next ``num_tasks`` tasks; those of them in ``part``."""
        order = (self._next + torch.arange(num_tasks)) % len(self.tasks)
        self._next += num_tasks
        return self.tasks[order[part]]

    def with_seed(self, seed: int) -> FixedTasks:
        """The same tasks from the first on; there is no chance in them."""
        return FixedTasks(self.tasks)

    def state_dict(self) -> dict[str, Any]:
        """How many tasks were handed out."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._next = int(state["next"])
