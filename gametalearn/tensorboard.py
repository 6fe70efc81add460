"""``--tensorboard``: what `gametalearn.train` logs, as TensorBoard shows it.

Needs the extra ``tensorboard``. Nothing is imported before the first line is logged.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gametalearn.episodes import EpisodeSampler, draw
from gametalearn.errors import InputError
from gametalearn.metrics import scalars
from gametalearn.run import Run
from gametalearn.sheet import contact_sheet

__all__ = ["TensorBoard"]

SHEET = 4
"""Tasks of the first meta-batch that are drawn."""


class TensorBoard:
    """Writes each line of ``metrics.jsonl`` to ``RUN/tensorboard``; hand it in as ``train(watch=)``.

    Scalars of loss, score, validation, objectives and diagnostics; the tasks' raw and effective
    weights as histograms; and, once, the first tasks of the first meta-batch as images. A run that
    goes on replaces what it had logged since its checkpoint.

    Raises:
        InputError: TensorBoard is not installed, or the run has no folder.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise InputError(
                "`tensorboard`: TensorBoard is not installed; pip install tensorboard, or leave it out"
            )
        self._writers: dict[Path, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_writers": {}}  # each process of `compare --jobs` opens its own files

    def __call__(self, run: Run, record: Mapping[str, Any]) -> None:
        """Log one line of ``metrics.jsonl``."""
        step = int(record["iteration"])
        writer = self._writer(run, step)
        for name, value in scalars(record):
            if name != "iteration":
                writer.add_scalar(name, value, step)
        for kind in ("raw", "effective"):
            if known := [weight for weight in record[kind] if weight is not None]:
                writer.add_histogram(f"weights/{kind}", np.asarray(known), step)
        writer.flush()

    def _writer(self, run: Run, step: int) -> Any:
        if run.out is None:
            raise InputError("tensorboard: its files are written to the run's folder; give `out`")
        folder = run.out / "tensorboard"
        if folder not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            for writer in self._writers.values():  # a comparison trains one run after another
                writer.close()
            _let_a_second_pass(folder)
            self._writers = {folder: SummaryWriter(folder, purge_step=step)}
            if step == 1 and (sheet := _sheet(run)) is not None:
                self._writers[folder].add_image("first meta-batch", sheet, 1, dataformats="HWC")
        return self._writers[folder]


def _let_a_second_pass(folder: Path) -> None:
    """TensorBoard reads files by name, which begins with the second: within it, the process's number decides."""
    now = time.time()
    if any(folder.glob(f"events.out.tfevents.{int(now):010d}.*")):
        time.sleep(int(now) + 1 - now)


def _sheet(run: Run) -> np.ndarray[Any, Any] | None:
    """The first tasks of the first meta-batch, ``(H, W, C)``; None where they are no images."""
    from gametalearn.build import stream_seed

    source = run.source.with_seed(stream_seed(run.config.seed, "train"))
    batch = draw(source, run.config.meta_batch, slice(0, SHEET))
    if batch.support_x.dim() != 5 or batch.support_x.shape[2] not in (1, 3):
        return None
    names = None
    if isinstance(source, EpisodeSampler) and batch.classes is not None:
        names = [[source.dataset.classes[c] for c in task] for task in batch.classes.tolist()]
    with tempfile.TemporaryDirectory() as folder:
        file = contact_sheet(batch, Path(folder) / "sheet.png", run.config.ways, names)
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
