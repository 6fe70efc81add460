"""Pictures in files: a comparison's plots, and sheets of episodes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gametalearn.checkpoint import replacing
from gametalearn.episodes import TaskBatch
from gametalearn.errors import InputError
from gametalearn.figures import (
    Records,
    accuracy,
    differences,
    drawing,
    figure,
    learning_curves,
    records_of,
    vary,
    weights,
)
from gametalearn.results import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["contact_sheet", "plot_comparison", "plot_results"]


def plot_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """`plot_results` of a comparison whose runs lie below ``folder``."""
    results = comparison.as_dict()
    return plot_results(results, records_of(folder, results), folder)


def plot_results(results: dict[str, Any], records: Records, folder: Path) -> list[Path]:
    """Draw a comparison; the files written.

    ``learning_curves.png`` (validation, the mean over seeds and their range), ``accuracy.png`` (or
    ``mse.png``, by the score's name: test, intervals over seeds, and every seed), ``differences.png``
    from the baseline, and for each rule whose weights vary over tasks ``weights-RULE.png``.

    Args:
        results: the content of ``results.json``.
        records: what the runs logged, by `gametalearn.figures.records_of`.
        folder: where they are to lie.
    """
    with drawing():
        drawn = {
            "learning_curves": learning_curves(results, records),
            _file_name(results["metric"]["name"]): accuracy(results),
        }
        if results["paired"]:
            drawn["differences"] = differences(results)
        for rule, runs in records.items():
            if vary(runs):
                drawn[f"weights-{rule.replace(':', '-')}"] = weights(rule, runs)
        return [_saved(one, folder / f"{name}.png", 140) for name, one in drawn.items()]


def _file_name(name: str) -> str:
    """A score's name without what a file system may object to, and other than other plots'."""
    plain = re.sub(r"[^\w.+-]+", "-", name).strip(".-") or "score"
    return f"test-{plain}" if plain in ("learning_curves", "differences") else plain


def _saved(figure: Figure, file: Path, dpi: int) -> Path:
    """Write a figure in the format of the file's suffix, or not at all."""
    kinds = figure.canvas.get_supported_filetypes()
    if (kind := file.suffix.lower().lstrip(".")) not in kinds:
        raise InputError(f"{file}: pictures are {', '.join(sorted(kinds))}; end its name on one")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{file.parent}: cannot be made ({error.strerror})") from error
    with replacing(file) as stream:
        figure.savefig(stream, dpi=dpi, format=kind)
    return file


@drawing()
def contact_sheet(
    batch: TaskBatch, file: Path, ways: int, names: list[list[str]] | None = None, most: int = 8
) -> Path:
    """Draw episodes as a PNG: a block for each, a row per class, support left and queries right.

    Args:
        batch: image episodes, support and queries ordered by label.
        file: the PNG to write.
        ways: classes in each episode.
        names: the classes' names, by episode and label.
        most: query columns at the most.
    """
    shots, queries = batch.support_x.shape[1] // ways, batch.query_x.shape[1] // ways
    shown = min(queries, most)
    tasks = len(batch)
    across = min(tasks, 2)
    down = -(-tasks // across)
    sheet = figure(across * (1.5 + 0.55 * (shots + shown)), down * (0.6 + 0.55 * ways))
    for task, place in enumerate(sheet.subfigures(down, across, squeeze=False).flat):
        if task >= tasks:
            break
        place.suptitle(f"episode {task + 1}: support | queries", fontsize=9)
        grid = place.subplots(
            ways, shots + shown + 1, squeeze=False, width_ratios=[1] * shots + [0.3] + [1] * shown
        )
        for label in range(ways):
            support = batch.support_x[task, label * shots : (label + 1) * shots]
            query = batch.query_x[task, label * queries : label * queries + shown]
            for column, axes in enumerate(grid[label]):
                axes.set_axis_off()
                if column == shots:
                    continue
                image = support[column] if column < shots else query[column - shots - 1]
                axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            if names is not None:
                grid[label][0].text(
                    -0.1, 0.5, names[task][label], fontsize=6, ha="right", va="center",
                    transform=grid[label][0].transAxes,
                )  # fmt: skip
    return _saved(sheet, file, 130)
