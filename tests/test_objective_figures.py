"""Pictures of several objectives: what is drawn, by the objectives' names, and that all of it is seen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gametalearn import TrainConfig
from gametalearn.canvas import drawing
from gametalearn.evaluation import Evaluation
from gametalearn.logs import Record, Records
from gametalearn.objective_figures import objective_weights, rule_facts, trade_off
from gametalearn.report import html_of, plot_results
from gametalearn.results import Comparison, Result, Single
from tests.support.drawn import assert_all_seen, labels_of, said

LEVELS = {  # of two objectives: gradnorm and uniform are on the front, the others are behind
    "uniform": (0.9, 0.3),
    "gradnorm": (0.8, 0.4),
    "dwa": (0.85, 0.25),
    "dtp": (0.7, 0.39),
}


def compared(objectives: int = 2, single: bool = True, seeds: int = 3) -> dict[str, Any]:
    """Every rule at its levels, which the further objectives repeat, with a spread over seeds."""
    names = tuple(f"objective-{k}" for k in range(objectives))
    group = np.repeat(np.arange(objectives), 4)
    generator = np.random.default_rng(0)

    def test(level: Any, seed: int, of: Any) -> Result:
        values = level + 0.01 * generator.random(len(of))
        return Result(Evaluation(values, of, "accuracy", "transductive", seed), 12.0, 40)

    found = {
        rule: [test(np.array(pair)[group % 2], seed, group) for seed in range(seeds)]
        for rule, pair in LEVELS.items()
    }
    config = TrainConfig.of("glyphs", iterations=100)
    made = Comparison(config, tuple(range(seeds)), len(group), names, found)
    alone = {
        name: Single([test(0.9, s, np.full(4, k)) for s in range(seeds)], 10, 10)
        for k, name in enumerate(names)
    }
    return dataclasses.replace(made, single=alone if single else {}).as_dict()


def logged(objectives: int = 2, lines: int = 30, seeds: int = 3) -> list[list[Record]]:
    """Of K tasks each the first is objective 0's; objective k has the weight k + 1 in all lines."""
    runs = []
    for seed in range(seeds):
        run = []
        for i in range(1, lines + 1):
            which = [
                k for k in range(objectives) if k < 2 or (i + k) % 3
            ]  # some are absent at times
            own = np.array([[(k + 1.0) / 2] * 2 for k in which]).flatten()
            names = tuple(f"objective-{k}" for k in which for _ in range(2))
            facts = {f"objective-{k}": 1 + 0.1 * k + 0.01 * seed for k in which}
            run.append(Record(10 * i, own, None, 0, names, {"r": facts}))
        runs.append(run)
    return runs


def curve(figure: Any, label: str, panel: int = 0) -> Any:
    (line,) = [x for x in figure.axes[panel].get_lines() if x.get_label() == label]
    return np.asarray(line.get_xydata())


@pytest.mark.parametrize("width", [None, 5.0])
@pytest.mark.parametrize("objectives", [2, 3, 9])
def test_all_of_it_is_seen(objectives: int, width: float | None) -> None:
    results, runs = compared(objectives), logged(objectives)
    more: dict[str, Any] = {} if width is None else {"width": width}
    with drawing():
        for figure in (
            trade_off(results, **more),
            objective_weights(results, dict.fromkeys(LEVELS, runs), **more),
            rule_facts(results, {"gradnorm": runs}, "gradnorm", "r", **more),
        ):
            assert figure is not None
            assert_all_seen(figure, said(figure))
            assert "glyphs, 5-way 1-shot, maml, 3 seeds" in said(figure)


def test_the_weights_of_an_objective_are_the_sums_of_its_tasks() -> None:
    figure = objective_weights(compared(2), {"gradnorm": logged(2)})
    assert figure is not None
    assert labels_of(figure) == ["objective-0", "objective-1"]
    for k in range(2):
        np.testing.assert_allclose(curve(figure, f"objective-{k}")[:, 1], k + 1.0)
    assert "effective weights by objective" in said(figure)


def test_of_objectives_without_a_task_at_times_the_tasks_weights_are_drawn() -> None:
    """T is 4 or 6; a sum would be 0 where there is no task, and says how many there are otherwise."""
    results, runs = compared(3), logged(3)
    figure = objective_weights(results, {"gradnorm": runs})
    assert figure is not None
    assert labels_of(figure) == ["objective-0", "objective-1", "objective-2"]
    for k in range(3):
        there = [i for i in range(1, 31) if k < 2 or (i + k) % 3]
        wanted = [[10 * i, (k + 1) / 2 * (6 if (i + 2) % 3 else 4)] for i in there]
        np.testing.assert_allclose(
            curve(figure, f"objective-{k}")[~np.isnan(curve(figure, f"objective-{k}")[:, 1])],
            wanted,
        )
    assert "1 if all are equal" in said(figure)
    assert "gradnorm" in said(figure)
    plain = [[dataclasses.replace(r, effective=np.full(len(r.effective), 1 / len(r.effective))) for r in run]
             for run in runs]  # fmt: skip
    assert objective_weights(results, {"uniform": plain}) is None


def test_objectives_keep_their_colours_from_plot_to_plot() -> None:
    """The order of their values differs between plots, and between the rules' panels."""
    results, runs = compared(2), logged(2)
    turned = [
        [
            dataclasses.replace(
                r, effective=r.effective[::-1].copy(),
                facts={"kappa": {"objective-0": 0.9, "objective-1": 0.1}},
            )
            for r in run
        ]
        for run in runs
    ]  # fmt: skip
    records = {"gradnorm": runs, "dtp": turned}
    drawn = [
        objective_weights(results, records),
        rule_facts(results, records, "gradnorm", "r"),
        rule_facts(results, records, "dtp", "kappa"),
    ]
    seen: dict[str, set[Any]] = {"objective-0": set(), "objective-1": set()}
    for figure in drawn:
        assert figure is not None
        for axes in figure.axes:
            for line in axes.get_lines():
                if line.get_label() in seen:
                    seen[str(line.get_label())].add(line.get_color())
    assert [len(colours) for colours in seen.values()] == [1, 1]
    assert seen["objective-0"] != seen["objective-1"]


def test_only_objectives_that_differ_are_drawn() -> None:
    results = compared(2)
    still = [[dataclasses.replace(r, effective=np.ones(4), objectives=r.objectives[:4]) for r in run]
             for run in logged()]  # fmt: skip
    assert objective_weights(results, {"uniform": still}) is None
    assert objective_weights(results, {"uniform": [[Record(1, np.ones(2), None)]]}) is None


def test_of_dozens_of_objectives_some_are_named() -> None:
    figure = objective_weights(compared(2), {"gradnorm": logged(30)})
    assert figure is not None
    labels = labels_of(figure)
    assert labels[0] == "22 other objectives"
    assert labels[1:5] == [f"objective-{k}" for k in (29, 28, 27, 26)]
    assert set(labels[5:]) == {f"objective-{k}" for k in (3, 2, 1, 0)}  # some are absent at times
    assert trade_off(compared(13)) is None


def test_a_running_mean_is_over_what_is_there_and_told() -> None:
    figure = objective_weights(compared(3), {"gradnorm": logged(3, lines=200)})
    assert figure is not None
    assert "running mean over 11 logged iterations" in said(figure)
    there = np.array([(i + 2) % 3 > 0 for i in range(1, 201)])
    tasks = np.where(there, 6, 4)  # T
    window = [tasks[max(0, i - 5) : i + 6] for i in range(200)]
    wanted = [0.5 * part.mean() for part in window]
    np.testing.assert_allclose(curve(figure, "objective-0")[:, 1], wanted)
    own = curve(figure, "objective-2")[:, 1]
    np.testing.assert_allclose(own[~np.isnan(own)], 1.5 * 6)  # only where it has a task


def test_what_a_rule_goes_by() -> None:
    results, runs = compared(), logged()
    figure = rule_facts(results, {"gradnorm": runs}, "gradnorm", "r")
    assert figure is not None
    np.testing.assert_allclose(curve(figure, "objective-1")[:, 1], 1.1 + 0.01)  # of seeds 0, 1, 2
    assert "relative inverse training rate r" in said(figure)
    assert rule_facts(results, {"gradnorm": runs}, "gradnorm", "kappa") is None


def test_two_objectives_stand_against_each_other_with_their_front() -> None:
    results = compared()
    figure = trade_off(results)
    assert figure is not None
    assert labels_of(figure) == [*LEVELS, "(alone)"]
    for rule in LEVELS:
        own = results["rules"][rule]["objectives"].values()
        np.testing.assert_allclose(curve(figure, rule), [[100 * o["accuracy"] for o in own]])
    seeds = [
        np.asarray(line.get_xydata())
        for line in figure.axes[0].get_lines()
        if len(line.get_xdata()) == 3  # type: ignore[arg-type]
    ]
    wanted = [
        100 * np.transpose([o["by_seed"] for o in results["rules"][rule]["objectives"].values()])
        for rule in LEVELS
    ]
    np.testing.assert_allclose(seeds, wanted)
    assert "on the Pareto front (uniform, gradnorm" in said(figure)
    assert "objective-0" in figure.axes[0].get_xlabel()
    assert "objective-1" in figure.axes[0].get_ylabel()
    for entry in results["rules"].values():  # as an older version wrote it
        for own in entry["objectives"].values():
            del own["by_seed"]
    assert trade_off(results) is None


@pytest.mark.parametrize("single", [True, False])
def test_of_three_objectives_the_differences_are_drawn(single: bool) -> None:
    results = compared(3, single)
    figure = trade_off(results)
    assert figure is not None
    assert labels_of(figure) == list(LEVELS)
    pairs = {pair["rule"]: pair["objectives"] for pair in results["paired"]}
    for rule in ("gradnorm", "dwa"):
        wanted = [
            results["rules"][rule]["objectives"][n]["minus_single"]["difference"]
            if single
            else pairs[rule][n]["difference"]
            for n in pairs[rule]
        ]
        np.testing.assert_allclose(curve(figure, rule)[:, 1], 100 * np.array(wanted))
    label = "learned alone" if single else "uniform"
    assert f"minus {label} (points)" in figure.axes[0].get_ylabel()


def test_they_are_written_and_in_the_report(tmp_path: Path) -> None:
    results = compared(2)
    records: Records = {rule: logged() for rule in LEVELS}
    records["uniform"] = [[dataclasses.replace(r, validation=0.5) for r in run] for run in logged()]
    records = {rule: [[dataclasses.replace(r, validation=0.5) for r in run] for run in runs]
               for rule, runs in records.items()}  # fmt: skip
    names = {file.name for file in plot_results(results, records, tmp_path)}
    assert {"trade_off.png", "objective_weights.png", "r-gradnorm.png"} <= names
    assert "kappa-dtp.png" not in names  # none of these runs told it
    page = html_of(results, records, [], Path("runs/a"))
    for caption in (
        "What the rules reach on each objective.",
        "The effective weight of each objective in the updates.",
        "The relative inverse training rate r of each objective, by which gradnorm goes.",
    ):
        assert caption in page
    assert "What the rules reach on each objective." in html_of(results, None, [], Path("a"))
