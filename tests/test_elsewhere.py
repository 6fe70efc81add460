"""A run tested with other ways, shots, queries and classes, and several runs on the same episodes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from gametalearn import (
    EpisodeSampler,
    InputError,
    TrainConfig,
    evaluate,
    load_dataset,
    load_run,
    train,
)
from gametalearn.build import stream_seed
from gametalearn.evaluation import Evaluation
from gametalearn.protocols import compared
from tests.support.commands import run
from tests.support.pictures import pictures
from tests.support.runs import tiny

Capture = pytest.CaptureFixture[str]

TINY: dict[str, Any] = {
    "model": "mlp", "hidden": 4, "image_size": 16, "ways": 3, "shots": 1, "queries": 2,
    "meta_batch": 2, "iterations": 1, "validation_episodes": 2, "threads": 1,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "maml": {"model": "conv4"},
    "flat": {},
    "proto": {"learner": "proto-maml", "seed": 1},
    "large": {"learner": "protonet", "image_size": 20, "channels": 3},
    "reptile": {"learner": "reptile", "inner_batch": 2},
    "spoiled": {"train_shots": 3, "disagree": 1.0},
}
FEW = "--episodes 6 --quiet"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("elsewhere").resolve()
    for name, given in RUNS.items():
        train(TrainConfig.of("glyphs", **{**TINY, **given}), root / name, progress=False)
    return root


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """Copies of the runs, to write tests into."""
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / "runs"


def by_hand(folder: Path, source: EpisodeSampler, split: str, seed: int = 0) -> list[float]:
    """The values of a run's test on a sampler that was made here."""
    loaded = load_run(folder)
    found = evaluate(
        loaded.model, source, loaded.test_learner, 6, stream_seed(seed, split), meta=loaded.meta
    )
    values: list[float] = found.values.tolist()
    return values


def test_more_ways_shots_and_queries(runs: Path, capsys: Capture) -> None:
    folder = runs / "proto"
    words = f"evaluate --ways 12 --shots 2 --queries 4 {FEW}"
    code, out, _ = run(capsys, words, folder)
    assert code == 0
    assert "iteration 1), 12-way 2-shot, 4 queries per class: accuracy " in out
    stored = json.loads((folder / "evaluation-12-way-2-shot-4-queries.json").read_text())
    assert (stored["ways"], stored["shots"], stored["queries"]) == (12, 2, 4)
    assert not stored.keys() & {"dataset", "on"}  # which are those of the run
    data = load_dataset("glyphs", "test", image_size=16)
    wanted = by_hand(folder, EpisodeSampler(data, 12, 2, 4), "test", seed=1)
    assert stored["values"] == wanted
    assert not (folder / "evaluation.json").exists()  # which `compare` takes for the run's own test
    loaded = load_run(folder)
    source = loaded.episodes("test", ways=12, shots=2, queries=4)
    found = evaluate(
        loaded.model, source, loaded.test_learner, 6, stream_seed(1, "test"), meta=loaded.meta
    )
    assert found.values.tolist() == wanted


def test_other_shots_for_a_learner_with_a_fixed_head(runs: Path, capsys: Capture) -> None:
    code, out, _ = run(capsys, f"evaluate --shots 5 --ways 3 {FEW}", runs / "maml")
    assert code == 0
    assert ", 3-way 5-shot, 2 queries per class: " in out
    stored = json.loads((runs / "maml" / "evaluation-3-way-5-shot-2-queries.json").read_text())
    data = load_dataset("glyphs", "test", image_size=16)
    assert stored["values"] == by_hand(runs / "maml", EpisodeSampler(data, 3, 5, 2), "test")


@pytest.mark.parametrize("ways", [2, 12])
def test_a_fixed_head_has_the_ways_of_its_training(ways: int, runs: Path, capsys: Capture) -> None:
    code, _, err = run(capsys, f"evaluate --ways {ways}", runs / "maml")
    assert code == 2
    assert f"--ways {ways}: this run's model has an output for each of 3 classes" in err
    assert "proto-maml or protonet" in err
    assert err.count("\n") == 1
    code, _, err = run(capsys, f"evaluate --ways {ways}", runs / "proto", runs / "maml")
    assert code == 2
    assert f"{runs / 'maml'}: --ways {ways}: this run's" in err
    assert not list(runs.glob("*/evaluation*"))  # the first run was not tested either
    with pytest.raises(InputError, match=f"`ways` {ways}: this run's model"):
        load_run(runs / "maml").episodes("test", ways=ways)


def test_what_no_episode_can_have_is_refused(runs: Path, capsys: Capture) -> None:
    for words, message in (
        ("--ways 1", "--ways must be at least 2, got 1"),
        ("--shots 0", "--shots must be at least 1, got 0"),
        ("--queries 0", "--queries must be at least 1, got 0"),
        ("--ways 5000", "5000 ways requested, but split 'test' of 'glyphs'"),
        ("--shots 5000", "5000 shots + 2 queries = 5002 examples per class requested"),
        ("--protocol lake --source x --shots 5", "leave out --shots 5"),
    ):
        code, _, err = run(capsys, f"evaluate --quiet {words}", runs / "proto")
        assert code == 2
        assert message in err
    with pytest.raises(InputError, match="`shots` must be at least 1"):
        load_run(runs / "proto").episodes("test", shots=0)


def test_regression_has_shots_and_no_ways(tmp_path: Path, capsys: Capture) -> None:
    train(tiny(iterations=1), tmp_path / "a", progress=False)
    code, out, _ = run(capsys, f"evaluate --shots 4 {FEW}", tmp_path / "a")
    assert code == 0
    assert ", 4-shot, 10 queries: mse " in out
    stored = json.loads((tmp_path / "a" / "evaluation-4-shot-10-queries.json").read_text())
    assert (stored["shots"], "ways" in stored) == (4, False)
    code, _, err = run(capsys, "evaluate --ways 5", tmp_path / "a")
    assert code == 2
    assert "--ways 5: sinusoid is regression, without classes" in err


def test_a_test_on_training_classes_is_a_test(runs: Path, capsys: Capture) -> None:
    """Not with the shots of the training, and without its spoiled targets."""
    for on in ("train", "val"):
        code, out, _ = run(capsys, f"evaluate --on {on} {FEW}", runs / "spoiled")
        assert code == 0
        assert f"iteration 1) on {on}: accuracy" in out
        stored = json.loads((runs / "spoiled" / f"evaluation-{on}.json").read_text())
        assert stored["on"] == on
        data = load_dataset("glyphs", on, image_size=16)
        assert stored["values"] == by_hand(runs / "spoiled", EpisodeSampler(data, 3, 1, 2), on)
    assert load_run(runs / "spoiled").source.sample(1).support_x.shape[1] == 9  # of the training
    assert not (runs / "spoiled" / "evaluation.json").exists()


def test_several_runs_elsewhere_are_paired(runs: Path, tmp_path: Path, capsys: Capture) -> None:
    """On images of two sizes and numbers of channels: the same classes and images, by scipy."""
    flowers = pictures(tmp_path / "flowers", "flower", 6, side=24, each=9)
    folders = [runs / "proto", runs / "large"]
    words = f"evaluate --shots 4 --queries 5 --ways 5 {FEW} --dataset folder:{flowers}"
    code, out, err = run(capsys, words, *folders)
    assert code == 0, err
    said = [" ".join(line.split()) for line in out.splitlines()]
    what = f"folder:{flowers}, all, 5-way 4-shot, 5 queries per class"
    assert f"{what}: 6 episodes, the same for every run" in said
    lines = [line for line in said if f" on {what}" in line and ": accuracy" in line]
    assert len(lines) == 2
    assert ", seed " in lines[1]  # the first run's, for both
    name = "evaluation-flowers-5-way-4-shot-5-queries.json"
    tests = [json.loads((folder / name).read_text()) for folder in folders]
    assert tests[0]["seed"] == tests[1]["seed"]
    assert [test["dataset"] for test in tests] == [f"folder:{flowers}"] * 2
    first, second = (np.array(test["values"]) for test in tests)
    found = scipy.stats.ttest_rel(second, first)
    (row,) = [line for line in said if line.startswith(f"{folders[1]} accuracy % ")]
    assert f"{100 * (second - first).mean():+.2f} [" in row
    assert row.endswith(f"{found.pvalue:.2g}")
    # the sampled images are the same, in each run's own size
    sources: list[Any] = [
        load_run(folder).episodes("all", dataset=f"folder:{flowers}", ways=5, shots=4, queries=5)
        for folder in folders
    ]
    assert [source.input_shape for source in sources] == [(1, 16, 16), (3, 20, 20)]
    one, two = (source.with_seed(7).draw(6) for source in sources)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("first", "second", "words", "message"),
    [
        ("maml", "flat", "", "--protocol is inductive, not transductive; set --protocol for both"),
        ("flat", "reptile", "", "order of support examples is random, not by class; test them one"),
        ("flat", "sines", "", "--dataset is sinusoid, not glyphs; set --dataset for both"),
        ("flat", "shots", "--ways 3", "--shots is 2, not 1; set --shots for both"),
    ],
)  # fmt: skip
def test_what_cannot_be_paired_is_refused_before_any_test(
    first: str, second: str, words: str, message: str, runs: Path, capsys: Capture
) -> None:
    if second == "sines":
        train(tiny(iterations=1), runs / "sines", progress=False)
    if second == "shots":
        config = TrainConfig.of("glyphs", **{**TINY, "shots": 2})
        train(config, runs / "shots", progress=False)
    code, out, err = run(capsys, f"evaluate {words} {FEW}", runs / first, runs / second)
    assert (code, out) == (2, "")
    assert f"{runs / second} cannot be paired with {runs / first}: {message}" in err
    assert err.count("\n") == 1
    assert not list(runs.glob("*/evaluation*"))
    if second == "shots":
        code, out, _ = run(capsys, f"evaluate --shots 5 {FEW}", runs / first, runs / second)
        assert code == 0
        assert "minus the first" in out


def test_a_protocol_that_both_know_pairs_them(runs: Path, capsys: Capture) -> None:
    words = f"evaluate --protocol inductive {FEW}"
    code, out, _ = run(capsys, words, runs / "maml", runs / "flat")
    assert code == 0
    assert out.count("minus the first") == 1


def test_a_table_of_other_episodes_or_scores_is_never_made() -> None:
    values, group = np.array([0.5, 0.7]), np.array([0, 1])
    one = Evaluation(values, group, "accuracy", "inductive", 0)
    for other in (
        Evaluation(values, group[::-1].copy(), "accuracy", "inductive", 0),
        Evaluation(values, group, "mae", "inductive", 0),
        Evaluation(values[:1], group[:1], "accuracy", "inductive", 0),
    ):
        with pytest.raises(InputError, match="b: not tested on the episodes or by the score"):
            compared({"a": {"inductive": one}, "b": {"inductive": other}})


def test_a_split_of_other_data_which_are_other_for_some_runs_alone(
    runs: Path, tmp_path: Path, capsys: Capture
) -> None:
    birds = pictures(tmp_path / "birds", "bird", 15)
    train(TrainConfig.of(f"folder:{birds}", **TINY), runs / "birds", progress=False)
    code, _, err = run(capsys, "evaluate --dataset glyphs", runs / "maml", runs / "birds")
    assert code == 2
    assert (
        "--dataset glyphs is new data for some of these runs, but others were trained on it" in err
    )
    code, out, _ = run(capsys, f"evaluate --dataset glyphs --on val {FEW}", runs / "birds")
    assert code == 0
    assert "iteration 1) on glyphs, val: accuracy" in out
    stored = json.loads((runs / "birds" / "evaluation-glyphs-val.json").read_text())
    assert (stored["dataset"], stored["on"]) == ("glyphs", "val")
    data = load_dataset("glyphs", "val", image_size=16, channels=3)
    assert stored["values"] == by_hand(runs / "birds", EpisodeSampler(data, 3, 1, 2), "val")


def test_other_data_with_a_part_that_was_trained_on_are_refused(
    tmp_path: Path, capsys: Capture
) -> None:
    """All classes of a folder that is joined to another were tested on, the trained ones too."""
    birds = pictures(tmp_path / "birds", "bird", 15)
    flowers = pictures(tmp_path / "flowers", "flower", 4)
    train(TrainConfig.of(f"folder:{birds}", **TINY), tmp_path / "run", progress=False)
    dataset = f"folder:{birds}+folder:{flowers}"
    code, _, err = run(capsys, f"evaluate --dataset {dataset}", tmp_path / "run")
    assert code == 2
    assert f"{birds} has a class 'bird0', and so do the run's own data" in err
    loaded = load_run(tmp_path / "run")
    with pytest.raises(InputError, match="has a class 'bird0'"):
        loaded.episodes("all", dataset=dataset)
    with pytest.raises(InputError, match="this is what the run was trained on"):
        loaded.episodes("test", dataset=f"folder:{birds}")
    assert loaded.episodes("all", dataset=f"folder:{flowers}").sample(1).support_x.shape == (
        *(1, 3), *(3, 16, 16),
    )  # fmt: skip
    loaded.config = TrainConfig.of("omniglot", split="maml")
    with pytest.raises(InputError, match="trained on omniglot with `split` maml"):
        loaded.episodes("test", dataset="omniglot+glyphs")


def test_a_data_set_that_draws_its_own_episodes(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shots are changed if it takes them, and refused otherwise."""
    (tmp_path / "mine_elsewhere.py").write_text(
        "from gametalearn import Sinusoid\n"
        "class Fixed(Sinusoid):\n"
        "    def __init__(self, seed=0):\n"
        "        super().__init__(10, 10, seed)\n"
        "    def with_seed(self, seed):\n"
        "        return Fixed(seed)\n"
        "def free(shots, queries, seed):\n"
        "    return Sinusoid(shots, queries, seed)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("Fixed", "free"):
        dataset = f"mine_elsewhere:{name}"
        config = tiny(iterations=1).as_dict() | {"dataset": dataset, "loss": "default"}
        train(TrainConfig.from_dict(config, ""), tmp_path / name, progress=False, model=mlp())
        loaded = load_run(tmp_path / name, model=mlp(), trust=True)
        if name == "Fixed":
            with pytest.raises(
                InputError, match="`shots`: the data set mine_elsewhere:Fixed draws"
            ):
                loaded.episodes("test", shots=3)
        else:
            assert loaded.episodes("test", shots=3).sample(1).support_x.shape == (1, 3, 1)


def mlp() -> torch.nn.Module:
    return torch.nn.Linear(1, 1)
