"""What stands on a figure, and whether all of it is seen."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

__all__ = ["assert_all_seen", "labels_of", "said", "texts"]


def texts(figure: Figure) -> list[Any]:
    """Its visible texts."""
    import matplotlib.text

    found = figure.findobj(matplotlib.text.Text)
    return [t for t in found if t.get_text().strip() and t.get_visible()]


def said(figure: Figure) -> str:
    """All that it says, in one line."""
    return " ".join(" ".join(t.get_text() for t in texts(figure)).split())


def labels_of(figure: Figure) -> list[str]:
    """What its legend says."""
    (legend,) = figure.legends
    return [t.get_text() for t in legend.get_texts()]


def assert_all_seen(figure: Figure, name: str) -> None:
    """Every text but the ticks lies within the figure."""
    figure.canvas.draw()
    whole = figure.bbox
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    ticks = [t for axes in figure.axes for t in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    for text in texts(figure):
        if text in ticks:  # those beyond the axes are not drawn
            continue
        box = text.get_window_extent(renderer)
        inside = box.x0 >= whole.x0 - 1 and box.x1 <= whole.x1 + 1
        inside &= box.y0 >= whole.y0 - 1 and box.y1 <= whole.y1 + 1
        assert inside, f"{name}: {text.get_text()!r} at {box} of {whole}"
