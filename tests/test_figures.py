"""Pictures at the size at which they are printed: what is said on them, and that all of it is seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from gametalearn import TrainConfig
from gametalearn.canvas import COLOURS, STYLES, drawing, style
from gametalearn.evaluation import Evaluation
from gametalearn.figures import accuracy, differences, learning_curves, weights
from gametalearn.logs import Record, Records
from gametalearn.results import Comparison, Result
from tests.support.drawn import assert_all_seen, labels_of, said

RULES = (
    "uniform",
    "agreement",
    "agreement-update",
    "norm-control",
    "gradnorm",
    "uncertainty-positive",
)
TASKS = 6


def compared(dataset: str = "glyphs", seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    found = {
        rule: [
            Result(
                Evaluation(
                    0.7 + 0.01 * generator.random(20), np.zeros(20, dtype=np.int64), "accuracy",
                    "transductive", seed,
                ),
                12.0, 40,
            )
            for seed in seeds
        ]
        for rule in RULES
    }  # fmt: skip
    return Comparison(TrainConfig.of(dataset), seeds, 20, ("glyphs",), found).as_dict()


def logged(lines: int = 40, objectives: int = 1, negative: bool = True) -> list[list[Record]]:
    """Three runs; of several objectives, number k has the weight k + 1, and tasks take turns."""
    generator = np.random.default_rng(0)
    names = [f"objective-{k}" for k in range(objectives)]
    runs = []
    for _ in range(3):
        run = []
        for i in range(1, lines + 1):
            which = (np.arange(TASKS) + i) % objectives
            own = (which + 1.0) if objectives > 1 else generator.normal(0.2, 0.2 * negative, TASKS)
            names_of = tuple(names[k] for k in which) if objectives > 1 else ()
            run.append(Record(10 * i, np.asarray(own), 0.5 if i % 4 == 0 else None, 0, names_of))
        runs.append(run)
    return runs


def all_of(dataset: str, width: float | None = None) -> dict[str, Figure]:
    results = compared(dataset)
    more: dict[str, Any] = {} if width is None else {"width": width}
    records: Records = dict.fromkeys(RULES, logged())
    with drawing():
        return {
            "curves": learning_curves(results, records, **more),
            "accuracy": accuracy(results, **more),
            "differences": differences(results, **more),
            "weights": weights(results, "agreement", logged(), **more),
            "objectives": weights(results, "gradnorm", logged(objectives=12), **more),
            "positive": weights(results, "uniform", logged(negative=False), **more, most=9),
        }


@pytest.mark.parametrize("width", [None, 5.0])
@pytest.mark.parametrize("dataset", ["glyphs", "glyphs+folder:/a/very/long/path/to/the/birds"])
def test_every_picture_says_what_it_is_about_and_all_of_it_is_seen(
    dataset: str, width: float | None
) -> None:
    for name, figure in all_of(dataset, width).items():
        wanted = "glyphs, 5-way 1-shot, maml" if dataset == "glyphs" else "glyphs+birds, 5-way"
        assert wanted in said(figure), name
        assert "3 seeds" in said(figure), name
        assert "/a/very" not in said(figure), name
        assert_all_seen(figure, name)
        for axes in figure.axes:
            assert axes.get_xlabel() or axes is not figure.axes[-1], name
            assert axes.get_ylabel() or axes.get_yticklabels()[0].get_text() in RULES, name


def test_a_legend_hides_no_curve() -> None:
    figure = all_of("glyphs", 5.0)["curves"]
    figure.canvas.draw()
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == list(RULES)
    (axes,) = figure.axes
    assert axes.get_legend() is None
    assert legend.get_window_extent().y1 < axes.get_window_extent().y0


def test_no_dot_is_cut() -> None:
    radius = 3.0  # points, more than that of any dot
    for name, figure in all_of("glyphs").items():
        figure.canvas.draw()
        for axes in figure.axes:
            box = axes.get_window_extent()
            for line in axes.get_lines():
                if line.get_marker() in ("None", None, "") or not len(line.get_xdata()):  # type: ignore[arg-type]
                    continue
                places = line.get_transform().transform(line.get_xydata())
                pixels = line.get_markersize() / 2 * figure.dpi / 72
                assert pixels <= radius * figure.dpi / 72 * 2
                assert (places[:, 0] >= box.x0 + pixels - 0.5).all(), name
                assert (places[:, 0] <= box.x1 - pixels + 0.5).all(), name
                assert (places[:, 1] >= box.y0 + pixels - 0.5).all(), name
                assert (places[:, 1] <= box.y1 - pixels + 0.5).all(), name


def test_rows_of_weights_are_told_by_their_objective() -> None:
    results = compared()
    two = weights(results, "gradnorm", logged(objectives=2))
    assert labels_of(two) == ["objective-1", "objective-0", f"uniform, 1/{TASKS}"]
    for line in two.axes[0].get_lines():
        if line.get_label() in ("objective-0", "objective-1"):
            number = int(str(line.get_label())[-1])
            assert set(np.asarray(line.get_ydata()).tolist()) == {number + 1.0}
    many = weights(results, "gradnorm", logged(objectives=20))
    named = [f"objective-{k}" for k in (19, 18, 17, 2, 1, 0)]
    assert labels_of(many) == ["the other 14", *named, f"uniform, 1/{TASKS}"]
    drawn = sum(len(np.asarray(line.get_xdata())) for line in many.axes[0].get_lines()[:7])
    assert drawn == 40 * TASKS


def test_one_objective_has_positive_and_negative_weights() -> None:
    assert labels_of(weights(compared(), "agreement", logged()))[:2] == [
        "weight of a task",
        "negative",
    ]


def test_smoothing_and_thinning_are_told() -> None:
    results = compared()
    assert "running mean" not in said(weights(results, "agreement", logged(30)))
    assert "running mean over 20 logged iterations" in said(
        weights(results, "agreement", logged(400))
    )
    assert "seed 0, 400 logged iterations" in said(weights(results, "agreement", logged(400)))
    thin = said(weights(results, "agreement", logged(400), most=80))
    assert "seed 0, 80 of 400 logged iterations" in thin
    figure = weights(results, "agreement", logged(30))
    shares = [np.asarray(line.get_ydata()) for line in figure.axes[1].get_lines()]
    wanted = [[100 * float((r.effective < 0).mean()) for r in run] for run in logged(30)]
    np.testing.assert_allclose(shares, wanted)


def test_a_single_seed_is_named() -> None:
    assert "maml, seed 7" in said(accuracy(compared(seeds=(7,))))


def test_curves_of_many_rules_differ() -> None:
    count = len(COLOURS) * len(STYLES)
    assert len({tuple(style(i).values()) for i in range(count)}) == count
