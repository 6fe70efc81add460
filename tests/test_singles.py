"""Models of one objective alone beside the rules: what they see, how they are tested, what is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from gametalearn import InputError, TrainConfig, compare, evaluate
from gametalearn.build import build_source, stream_seed
from gametalearn.runfolder import load_run
from gametalearn.singles import asked
from gametalearn.stored import read_results
from gametalearn.tradeoffs import relative_change
from tests.support.commands import run
from tests.support.pictures import divided_pictures
from tests.support.runs import lines, untimed

TINY = (
    "--hidden 4 --queries 2 --inner-steps 1 --test-steps 1 --iterations 2 --log-every 1 --pool max"
)
TINY += " --validation-episodes 4 --threads 1 --quiet --rules uniform,gradnorm --episodes 6"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Two objectives, 3 tasks of one and 1 of the other, 3 seeds: the objectives and the folder."""
    root = tmp_path_factory.mktemp("single")
    names = [f"folder:{divided_pictures(root / name, seed=i)}" for i, name in enumerate(("a", "b"))]
    return names, root


def command(names: list[str]) -> str:
    share = ",".join(f"{name}={n}" for name, n in zip(names, (3, 1), strict=True))
    return f"compare --dataset {'+'.join(names)} --share {share} {TINY} --seeds 3"


@pytest.fixture(scope="module")
def found(compared: tuple[list[str], Path]) -> tuple[dict[str, Any], str]:
    """The content of ``results.json``, and what was printed."""
    import contextlib
    import io

    from gametalearn.cli import main

    names, root = compared
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([*command(names).split(), "--single", "--out", str(root / "out")])
    assert code == 0
    return read_results(root / "out"), out.getvalue()


def place(root: Path, name: str, seed: int) -> Path:
    (folder,) = [p for p in root.glob("single-*") if p.name.endswith(name)]
    return folder / f"seed{seed}"


def test_each_sees_the_tasks_of_its_objective_and_no_others(
    compared: tuple[list[str], Path], found: Any
) -> None:
    names, root = compared
    for name, count in zip(names, (3, 1), strict=True):
        own = place(root / "out", name[-1], 1)
        config = load_run(own).config
        assert (config.dataset, config.meta_batch, config.rule) == (name, count, "uniform")
        assert (config.image_size, config.channels, config.seed) == (28, 3, 1)
        assert config.validation_episodes == 2  # of 4, as many as the rules' models have of each
        assert [len(line["losses"]) for line in lines(own)] == [count, count]
        assert found[0]["single"][name]["tasks"] == found[0]["single"][name]["budget"] == 2 * count
    together = load_run(root / "out" / "uniform" / "seed1")
    assert [line["group"] for line in lines(root / "out" / "uniform" / "seed1")] == [
        [0, 0, 0, 1]
    ] * 2
    assert together.input_shape == load_run(place(root / "out", "a", 1)).input_shape


def test_they_are_tested_on_the_episodes_of_the_rules(
    compared: tuple[list[str], Path], found: Any
) -> None:
    names, root = compared
    config = load_run(root / "out" / "uniform" / "seed2").config
    for number, name in enumerate(names):
        alone = load_run(place(root / "out", name[-1], 2))
        episodes = build_source(config, "test")  # of both, in equal numbers
        seed = stream_seed(2, "test")
        whole = evaluate(alone.model, episodes, alone.test_learner, 6, seed, meta=alone.meta)
        assert whole.group.tolist() == [0, 0, 0, 1, 1, 1]
        own = json.loads((place(root / "out", name[-1], 2) / "evaluation.json").read_text())
        assert own["values"] == whole.values[whole.group == number].tolist()
        wanted = found[0]["single"][name]["seeds"][2]["accuracy"]
        assert wanted == pytest.approx(np.mean(own["values"]))


def test_relative_changes_and_differences_are_those_of_the_seeds(
    compared: tuple[list[str], Path], found: Any
) -> None:
    names, _ = compared
    content, _ = found
    single = [[s["accuracy"] for s in content["single"][n]["seeds"]] for n in names]
    for rule in ("uniform", "gradnorm"):
        entry = content["rules"][rule]
        mine = [entry["objectives"][n]["by_seed"] for n in names]
        by_seed = relative_change(np.transpose(mine), np.transpose(single))
        assert entry["delta_m"]["by_seed"] == pytest.approx(by_seed)
        of_means = [
            entry["objectives"][n]["accuracy"] / content["single"][n]["accuracy"] - 1 for n in names
        ]
        assert entry["delta_m"]["mean"] == pytest.approx(np.mean(of_means))
        for name, own, alone in zip(names, mine, single, strict=True):
            minus = entry["objectives"][name]["minus_single"]
            assert minus["by_seed"] == pytest.approx(np.subtract(own, alone).tolist())
    (pair,) = content["paired"]
    for name in names:
        rule, base = (
            content["rules"][r]["objectives"][name]["by_seed"] for r in ("gradnorm", "uniform")
        )
        apart = pair["objectives"][name]
        assert apart["by_seed"] == pytest.approx(np.subtract(rule, base).tolist())
        if np.ptp(apart["by_seed"]):
            peer = stats.ttest_rel(rule, base).confidence_interval()
            assert apart["ci95"] == pytest.approx(list(peer))
    ranks = [content["rules"][rule]["mean_rank"] for rule in ("uniform", "gradnorm")]
    assert sum(ranks) == pytest.approx(3)


def test_table_and_report_say_it(compared: tuple[list[str], Path], found: Any) -> None:
    _, root = compared
    content, text = found
    assert "\n(alone) " in text
    assert "each objective minus uniform, points [95%]" in text
    assert "each objective minus that of models that learned it alone, points [95%]" in text
    assert ["rule", "mean", "rank", "Delta_m", "%", "[95%]"] in [
        line.split() for line in text.splitlines()
    ]
    change = 100 * content["rules"]["gradnorm"]["delta_m"]["mean"]
    page = (root / "out" / "report.html").read_text()
    for where in (text, page):
        assert f"{change:+.2f} [" in where
        assert "Delta_m is the mean over objectives of the relative change" in " ".join(
            where.split()
        )
    assert "--single --out" in page
    for name in compared[0]:  # their scores and their times, seed by seed
        assert page.count(f"(alone) {name}</") == 2
    for name in ("a", "b"):  # run by run, for a cluster
        assert page.count(f"--out {place(root / 'out', name, 0).parent}/seed") == 3


def test_runs_that_are_there_are_taken(
    compared: tuple[list[str], Path], found: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same comparison again trains nothing; another one takes the single runs by their folders."""
    names, root = compared
    before = untimed(root / "out")
    monkeypatch.setattr("gametalearn.training.meta_gradients", None)  # training would fail
    assert run(capsys, f"{command(names)} --single --out", root / "out")[0] == 0
    assert untimed(root / "out") == before
    monkeypatch.undo()
    given = ",".join(f"{n}={place(root / 'out', n[-1], 0).parent}" for n in names)
    code, _, err = run(capsys, f"{command(names)} --single {given} --out", root / "other")
    assert code == 0, err
    assert not list((root / "other").glob("single-*"))
    other = read_results(root / "other")
    for name in names:
        mine, theirs = found[0]["single"][name], other["single"][name]
        assert theirs["seeds"] == mine["seeds"]
        assert theirs["tasks"] == mine["tasks"]
        assert theirs["runs"] == str(place(root / "out", name[-1], 0).parent)
    assert "--single folder" in (root / "other" / "report.html").read_text()


def test_they_are_trained_at_once_with_the_rules(
    compared: tuple[list[str], Path], found: Any, capsys: Any
) -> None:
    names, root = compared
    once = command(names).replace("--seeds 3", "--seeds 1 --jobs 2 --rules uniform")
    assert run(capsys, f"{once} --single --out", root / "jobs")[0] == 0
    single = read_results(root / "jobs")["single"]
    for name in names:
        (mine,), theirs = single[name]["seeds"], found[0]["single"][name]["seeds"][0]
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}


def test_a_plan_has_them(compared: tuple[list[str], Path], capsys: Any) -> None:
    names, root = compared
    code, out, _ = run(capsys, f"{command(names)} --plan --single --out", root / "planned")
    assert code == 0
    plan = out.splitlines()
    assert len(plan) == 2 * 3 + 2 * 3
    assert sum(f"--dataset {names[0]} " in line and "--meta-batch 3" in line for line in plan) == 3
    assert not any("--share" in line for line in plan if f"--dataset {names[1]} " in line)


def bad(names: list[str], root: Path) -> list[tuple[str, str]]:
    both = "+".join(names)
    other = place(root / "out", "b", 0).parent
    return [
        (f"--dataset {names[0]} --single", "--single is for several data sets"),
        (f"--dataset {both} --share proportional --single", "set --share to fixed, or to numbers"),
        (f"--dataset {both} --single omniglot=runs/a", "'omniglot', which is not one of folder:"),
        (f"--dataset {both} --single runs/a", "OBJECTIVE=FOLDER"),
        (f"--dataset {both} --single --meta-batch 1", "raise --meta-batch"),
        (f"--dataset {both} --single {names[0]}={other}", "its --dataset is folder:"),
        (f"--dataset {both} --single {names[1]}={other} --channels 1",
         "takes inputs of 3 x 28 x 28, but the comparison's are 1 x 28 x 28"),
        (f"--dataset {both} --single {names[1]}={root}/none", "none/seed0"),
        (f"--dataset {both} --single {names[1]}={other} --protocol inductive",
         "its --protocol is auto, not inductive"),
        (f"--dataset {both} --single {names[1]}={stopped(other, root)}",
         "it stopped at 1 of 2 iterations; finish it with gametalearn train --resume"),
        (f"--dataset {both} --single {names[1]}={other},{names[1]}={other}", "names two folders for"),
        (f"--dataset {alike(root)} --single", "single:folder-"),
    ]  # fmt: skip


def stopped(folder: Path, root: Path) -> Path:
    """A copy of a run, as it was before its last iteration."""
    copy = root / "stopped"
    if not copy.exists():
        shutil.copytree(folder, copy)
        file = copy / "seed0" / "metrics.jsonl"
        file.write_text(file.read_text().splitlines(keepends=True)[0])
    return copy


def alike(root: Path) -> str:
    """Two folders of images whose names differ in signs alone."""
    for name in ("x,y", "x-y"):
        if not (root / name).exists():
            divided_pictures(root / name)
    return f"folder:{root / 'x,y'}+folder:{root / 'x-y'}"


def test_a_run_of_other_classes_is_refused(
    tmp_path: Path, capsys: Any, omniglot_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its training classes may be among those that the comparison tests."""
    monkeypatch.setenv("GAMETALEARN_DATA", str(omniglot_root))
    tiny = f"{TINY.replace('--rules uniform,gradnorm', '').replace('--episodes 6', '')} --ways 2"
    flags = f"--dataset omniglot --split maml --no-rotations --image-size 28 --channels 1 {tiny}"
    code, _, err = run(capsys, f"train {flags} --meta-batch 2 --out", tmp_path / "maml" / "seed0")
    assert code == 0, err
    command = f"compare --dataset glyphs+omniglot {tiny} --no-rotations --meta-batch 4 --seeds 1"
    command += f" --rules uniform --episodes 6 --single omniglot={tmp_path / 'maml'} --out"
    code, _, err = run(capsys, command, tmp_path / "out")
    assert code == 2
    assert "its --split is maml, not left unset" in err


def test_other_settings_of_given_runs_are_told(
    compared: tuple[list[str], Path], found: Any, capsys: Any
) -> None:
    names, root = compared
    given = f"{names[1]}={place(root / 'out', 'b', 0).parent}"
    flags = command(names).replace("--seeds 3", "--seeds 1 --inner-lr 0.07")
    code, out, err = run(capsys, f"{flags} --single {given} --out", root / "differing")
    assert code == 0, err
    said = f"The models trained on {names[1]} alone differ from the rules' models in more than the objective: "
    said += "inner_lr 0.1 instead of 0.07."
    assert said in " ".join(out.split())
    assert read_results(root / "differing")["single"][names[1]]["differs"] == [
        "inner_lr 0.1 instead of 0.07"
    ]
    assert "[95%]" not in out  # of one seed


@pytest.mark.parametrize("number", range(12))
def test_what_does_not_fit_is_told_in_a_line(
    compared: tuple[list[str], Path], found: Any, capsys: Any, number: int
) -> None:
    names, root = compared
    flags, message = bad(names, root)[number]
    words = f"compare {TINY} --meta-batch 4 {flags} --seeds 1 --overwrite --out"
    code, _, err = run(capsys, words, root / f"bad{number}")
    assert code == 2, err
    assert message in err
    assert len(err.strip().splitlines()) == 1, err


def test_in_python_episodes_that_are_handed_in_have_none() -> None:
    def source(seed: int) -> Any:
        raise AssertionError

    config = TrainConfig.of("glyphs+omniglot", iterations=2)
    with pytest.raises(InputError, match="`single` works on data sets given by name"):
        compare(config, ["uniform"], 1, 4, single=True, source=source, test=source)


def test_what_single_asks_for() -> None:
    assert asked(None) is False
    assert asked("train") is True
    assert asked("folder:/a=b=runs/c") == {"folder:/a=b": "runs/c"}
    assert asked("omniglot=runs/a=b") == {"omniglot": "runs/a=b"}
