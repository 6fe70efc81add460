"""What every picture is drawn on and with: figures without a window, colours, titles, files."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gametalearn.errors import InputError
from gametalearn.files import make_folder, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "GREY",
    "drawing",
    "entitle",
    "figure",
    "legend_below",
    "saved",
    "shortened",
    "style",
    "tidy",
]

COLOURS = ("#4477AA", "#EE6677", "#228833", "#997700", "#009988", "#AA3377", "#777777", "#000000")
"""After Paul Tol's bright scheme, distinct for colour-blind readers; each has a contrast of 3 to 1
with white, for which two of his were darkened."""

GREY = "#999999"

STYLES = ("-", "--", "-.", ":")
"""Lines that differ without their colours."""

TITLE, SMALL = 10, 9
"""Points of a title, and of all other text."""


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """A name is drawn as it is, dollar signs too; an SVG holds its text as text, always the same."""
    import matplotlib

    settings: Any = {
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "gametalearn",
    }
    with matplotlib.rc_context(settings):
        yield


def figure(width: float, height: float, layout: Any = "constrained") -> Figure:
    """An empty figure that no window shows; its size is in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(found)
    return found


def saved(figure: Figure, file: Path, dpi: int) -> Path:
    """Write a figure in the format of the file's suffix, or not at all.

    Raises:
        InputError: no such format, or the file's folder cannot be made.
    """
    kinds = figure.canvas.get_supported_filetypes()
    if (kind := file.suffix.lower().lstrip(".")) not in kinds:
        raise InputError(f"{file}: a picture's name must end in one of {', '.join(sorted(kinds))}")
    make_folder(file.parent)
    with replacing(file) as stream:
        figure.savefig(stream, dpi=dpi, format=kind)
    return file


def style(number: int) -> dict[str, Any]:
    """The colour and the line of the curve of a number; 32 of them differ."""
    rounds, place = divmod(number, len(COLOURS))
    return {"color": COLOURS[place], "linestyle": STYLES[(place + rounds) % len(STYLES)]}


def entitle(figure: Figure, *lines: str) -> None:
    """Lines over a figure, broken where they would be wider than it."""
    width = int(figure.get_figwidth() * 13)
    text = "\n".join(part for line in lines for part in textwrap.wrap(line, width))
    figure.suptitle(text, fontsize=TITLE)


def legend_below(figure: Figure, handles: Sequence[Any]) -> None:
    """What the colours mean, below everything, where it hides nothing."""
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, int(figure.get_figwidth() * 12.5 / (longest + 7)))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(columns, len(handles)),
        frameon=False, fontsize=SMALL, markerscale=1.5,
    )  # fmt: skip


def tidy(axes: Any, grid: str) -> None:
    """Two spines and faint lines of one direction."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.25)


def shortened(name: str, most: int = 24) -> str:
    """A name cut to at most this many characters: the middle is dropped, since names differ at their ends.

    >>> shortened("Alphabet_of_the_Magi/character07", 20)
    'Alphabet_…aracter07'
    """
    if len(name) <= most:
        return name
    half = (most - 1) // 2
    return f"{name[:half]}…{name[len(name) - half :]}"
