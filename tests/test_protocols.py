from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from scipy import stats

from gametalearn import ClassImages, EpisodeSampler, InputError, TaskBatch, TrainConfig, adapt
from gametalearn.adaptation import MAML
from gametalearn.cli import main
from gametalearn.evaluation import evaluate
from gametalearn.models import Conv4
from gametalearn.protocols import (
    check_lake,
    evaluate_all,
    evaluate_lake,
    write_evaluations,
    write_lake,
)
from tests.support.commands import run

NAMES: list[Any] = ["transductive", "inductive", "query-at-a-time"]


@pytest.fixture
def source() -> EpisodeSampler:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 1, 16, 16), dtype=torch.uint8, generator=generator)
    return EpisodeSampler(ClassImages.from_tensors(images, torch.arange(60) // 6), 3, 2, 3, 1)


@pytest.mark.parametrize("norm", ["batch", "support", "group", "none"])
def test_every_norm_knows_every_protocol(source: EpisodeSampler, norm: Any) -> None:
    torch.manual_seed(0)
    model = Conv4(3, image_size=16, hidden=8, norm=norm)
    ticks: list[int] = []
    found = evaluate_all(model, source, MAML(0.1, 2), 10, 5, NAMES, progress=ticks.append)
    assert list(found) == NAMES
    assert [e.protocol for e in found.values()] == NAMES
    values = [e.values.tolist() for e in found.values()]
    if norm == "batch":
        assert values[0] != values[1] != values[2] != values[0]
    elif norm == "support":
        assert values[0] != values[1] == values[2]
    else:
        assert values[0] == values[1] == values[2]
        assert sum(ticks) == 20  # transductive is not computed again
    assert model.norm == norm
    if norm != "group":
        alone = evaluate(model, source, MAML(0.1, 2), 10, 5, protocol="inductive")
        assert alone.values.tolist() == values[1]


def test_the_files_top_is_the_runs_own_protocol(source: EpisodeSampler, tmp_path: Path) -> None:
    model, file = Conv4(3, image_size=16, hidden=8), tmp_path / "evaluation.json"
    found = evaluate_all(model, source, MAML(0.1), 4, 0, NAMES[:2])
    for own in NAMES[:2]:
        write_evaluations(file, found, own, 7, 3)
        stored = json.loads(file.read_text())
        assert stored["schema"] == "gametalearn.evaluation/1"
        assert (stored["protocol"], stored["iteration"], stored["inner_steps"]) == (own, 7, 3)
        assert stored["values"] == found[own].values.tolist()
        assert stored["accuracy"] == found[own].mean
        assert list(stored["protocols"]) == NAMES[:2]
        for name, record in stored["protocols"].items():
            assert record["values"] == found[name].values.tolist()
            assert (record["accuracy"], record["ci95"]) == (found[name].mean, found[name].ci95)
    write_evaluations(file, {"inductive": found["inductive"]}, "transductive", 7, 3)
    stored = json.loads(file.read_text())
    assert stored["protocol"] == "inductive"
    assert "protocols" not in stored


def lake_tasks() -> TaskBatch:
    """Twenty runs: the queries are noisy copies of the support images."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(20, 20, 1, 28, 28, generator=g)
    y = torch.stack([torch.randperm(20, generator=g) for _ in range(20)])
    noise = torch.rand(20, 20, 1, 28, 28, generator=g)
    noisy = 0.5 * torch.stack([x[i, y[i]] for i in range(20)]) + 0.5 * noise
    return TaskBatch(x, torch.arange(20).expand(20, -1).contiguous(), noisy, y, torch.arange(20))


def test_lakes_error_rate_is_the_mean_over_runs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tasks, learner = Conv4(20, hidden=8), lake_tasks(), MAML(1.0, 3)
    found = evaluate_lake(model, tasks, learner, NAMES)
    errors, others = [], []
    for i in range(20):
        own, alone = (
            adapt(model, tasks.support_x[i], tasks.support_y[i], learner, protocol=how)
            for how in NAMES[:2]
        )
        with torch.no_grad():
            wrong = own(tasks.query_x[i]).argmax(1) != tasks.query_y[i]
            logits = torch.cat([alone(x[None]) for x in tasks.query_x[i]])
        errors.append(float(wrong.double().mean()))
        others.append(float((logits.argmax(1) != tasks.query_y[i]).double().mean()))
    assert 0 < np.mean(errors) < 0.95  # better than chance: there is something to compare
    np.testing.assert_allclose(1 - found["transductive"].values, errors, atol=1e-6)
    np.testing.assert_allclose(1 - found["inductive"].values, others, atol=1e-6)
    write_lake(tmp_path / "lake.json", found, "transductive", 5, 3)
    stored = json.loads((tmp_path / "lake.json").read_text())
    assert stored["schema"] == "gametalearn.lake/1"
    assert stored["protocol"] == "transductive"
    assert stored["error_rate"] == pytest.approx(np.mean(errors))
    assert stored["std"] == pytest.approx(np.std(errors, ddof=1))
    low, high = stats.t.interval(0.95, 19, np.mean(errors), stats.sem(errors))
    assert stored["ci95"] == pytest.approx((high - low) / 2)  # not 1.96 errors: 2.09 for 20 runs
    assert stored["runs"] == pytest.approx(errors, abs=1e-12)
    assert list(stored["protocols"]) == NAMES
    rates = {name: record["error_rate"] for name, record in stored["protocols"].items()}
    assert len(set(rates.values())) > 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"split": "maml"}, "`split` maml: its training has seen alphabets of the task"),
        ({"ways": 5}, "needs a run of .*`ways` 20.*; this one has `ways` 5"),
        ({"dataset": "glyphs"}, "this one has `dataset` glyphs"),
        ({"image_size": 32}, "with `image_size` 28; this one has `image_size` 32"),
        ({"channels": 3}, "this one has `channels` 3"),
    ],
)
def test_lake_refuses_runs_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    check_lake(TrainConfig.of("omniglot", ways=20))
    check_lake(TrainConfig.of("omniglot", ways=20, split="lake"))
    with pytest.raises(InputError, match=message):
        check_lake(TrainConfig.of(**{"dataset": "omniglot", "ways": 20, **given}))


TINY = "--iterations 2 --meta-batch 2 --hidden 8 --validation-episodes 2 --quiet --threads 1"


def test_both_and_query_at_a_time_from_the_command_line(capsys: Any, tmp_path: Path) -> None:
    place = tmp_path / "a"
    code, *_ = run(capsys, f"train --dataset sinusoid {TINY} --out", place)
    assert code == 0
    code, out, _ = run(capsys, "evaluate --protocol both --query-at-a-time --episodes 3", place)
    assert code == 0
    assert [line.rsplit(", ", 1)[1] for line in out.splitlines()] == [f"{n})" for n in NAMES]
    stored = json.loads((place / "evaluation.json").read_text())
    assert list(stored["protocols"]) == NAMES
    assert stored["protocol"] == "inductive"  # no normalisation: a query is by itself
    assert stored["mse"] == stored["protocols"]["transductive"]["mse"]
    code, *_ = run(capsys, "evaluate --query-at-a-time --episodes 3", place)
    assert code == 0
    stored = json.loads((place / "evaluation.json").read_text())
    assert stored["protocol"] == "query-at-a-time"
    for flags, message in (
        ("--protocol inductive --query-at-a-time", "its own protocol, not inductive"),
        ("--protocol lake", "--protocol lake needs --source PATH"),
        ("--source x", "and no other protocol takes it"),
        ("--protocol lake --source x --on val", "has its own tasks; leave out --on val"),
        ("--protocol lake --source x --episodes 9", "leave out --episodes 9"),
        ("--protocol lake --source x --seed 3", "leave out --seed 3"),
        ("--protocol lake --source x", "this one has --dataset sinusoid"),
    ):
        code, _, err = run(capsys, f"evaluate {flags}", place)
        assert code == 2
        assert message in err


def test_several_runs_meet_the_same_episodes_and_make_one_table(
    capsys: Any, tmp_path: Path
) -> None:
    """Each row is the run's own test; a difference is the paired one, by scipy."""
    small = "--iterations 2 --hidden 4 --meta-batch 2 --validation-episodes 2 --threads 1 --quiet"
    for name, more in (("a", "--seed 0"), ("b", "--seed 1")):
        assert main(["train", "--out", str(tmp_path / name), *small.split(), *more.split()]) == 0
    folders = [str(tmp_path / name) for name in ("a", "b")]
    capsys.readouterr()
    assert main(["evaluate", *folders, "--episodes", "9", "--quiet"]) == 0
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert (
        "glyphs, test, 5-way 1-shot, 5 queries per class: 9 episodes, the same for every run"
        in said
    )
    tests = [json.loads((tmp_path / n / "evaluation.json").read_text()) for n in ("a", "b")]
    assert len({test["seed"] for test in tests}) == 1  # not each run's own
    first, second = [np.array(test["values"]) for test in tests]
    found = scipy.stats.ttest_rel(second, first)
    low, high = found.confidence_interval()
    (row,) = [line for line in said if line.startswith(f"{folders[1]} accuracy % ")]
    shown = f"{100 * second.mean():.2f} ± {196 * second.std(ddof=1) / 3:.2f}"
    difference = f"{100 * (second - first).mean():+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
    assert f"{shown} {difference} {found.pvalue:.2g}" in row
    assert "About rules or settings they say nothing" in " ".join(said)
    assert main(["evaluate", folders[0], folders[0]]) == 2
    assert "given twice" in capsys.readouterr().err
