"""A run where there is nothing but its folder: it is loaded, adapted, and tested on other data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gametalearn import (
    EpisodeSampler,
    InputError,
    Sinusoid,
    TaskBatch,
    TrainConfig,
    adapt,
    evaluate,
    load_dataset,
    load_run,
    train,
)
from gametalearn.build import stream_seed
from gametalearn.checkpoint import load_checkpoint, save_checkpoint
from gametalearn.cli import main
from gametalearn.transfer import is_other
from tests.support.pictures import pictures
from tests.support.runs import tiny

TINY: dict[str, Any] = {
    "model": "conv4", "hidden": 4, "image_size": 16, "channels": 1, "ways": 3, "shots": 1,
    "queries": 2, "meta_batch": 2, "iterations": 2, "inner_steps": 1, "test_steps": 2,
    "validation_episodes": 2, "threads": 1, "pool": "max",
}  # fmt: skip
WORDS = ["--episodes", "9", "--quiet"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with learned inner rates, the images that it was trained on, and what it predicts."""
    root = tmp_path_factory.mktemp("trained").resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GAMETALEARN_DATA", str(root / "data"))
        dataset = f"folder:{pictures(root / 'birds', 'bird', 15)}"
        run = train(
            TrainConfig.of(dataset, learner="metasgd", **TINY), root / "run", progress=False
        )
    run.load_best()
    torch.save(predictions(run), root / "predictions.pt")
    return root


def predictions(run: Any) -> Tensor:
    """Of new images, by a copy that was fitted to some of them."""
    x = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    fitted = adapt(run.model, x[:3], torch.arange(3), run.test_learner, meta=run.meta)
    with torch.no_grad():
        logits: Tensor = fitted(x[3:])
    return logits


@pytest.fixture
def alone(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run's folder beside an empty data root; its images are not there."""
    shutil.copytree(trained / "run", tmp_path / "run")
    for file in (tmp_path / "run").glob("*.pt"):
        content = load_checkpoint(file)
        content["config"]["dataset"] = f"folder:{tmp_path}/gone"
        save_checkpoint(file, content)
    for name in ("config.toml", "data.json"):
        file = tmp_path / "run" / name
        file.write_text(file.read_text().replace(f"{trained}/birds", f"{tmp_path}/gone"))
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("GAMETALEARN_DATA", str(tmp_path / "empty"))
    return tmp_path / "run"


def test_a_run_alone_is_loaded_and_adapted_to_new_images(alone: Path, trained: Path) -> None:
    run = load_run(alone)
    assert (run.input_shape, run.score.name) == ((1, 16, 16), "accuracy")
    assert torch.equal(predictions(run), torch.load(trained / "predictions.pt"))
    assert list((alone.parent / "empty").iterdir()) == []
    with pytest.raises(InputError, match="it is no longer there; if the folder has moved"):
        run.episodes("test")
    with pytest.raises(InputError, match="it is no longer there"):
        _ = run.source


def test_a_run_alone_is_tested_on_a_folder(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flowers = pictures(tmp_path / "my flowers", "flower", 5, side=20)
    words = ["evaluate", str(alone), "--dataset", f"folder:{flowers}", *WORDS]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"on folder:{flowers}, all: accuracy " in said
    stored = json.loads((alone / "evaluation-my-flowers.json").read_text())
    assert (stored["dataset"], stored["on"]) == (f"folder:{flowers}", "all")
    assert not (alone / "evaluation.json").exists()  # which `compare` takes for the run's own test
    # against the same by hand, with all five classes at the run's size
    data = load_dataset(f"folder:{flowers}", "all", image_size=16, channels=1)
    assert sorted(data.classes) == [f"flower{c}" for c in range(5)]
    run, source = load_run(alone), EpisodeSampler(data, ways=3, shots=1, queries=2)
    found = evaluate(run.model, source, run.test_learner, 9, stream_seed(0, "all"), meta=run.meta)
    assert stored["values"] == found.values.tolist()
    assert main([*words, "--on", "train"]) == 0
    assert ", train: accuracy " in capsys.readouterr().out
    assert main([*words, "--on", "test"]) == 2  # a fifth of five classes, and two of them
    assert "has 1 classes; lower --ways" in capsys.readouterr().err.replace(
        "1 class;", "1 classes;"
    )


def test_several_runs_are_tested_on_the_same_other_data(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(alone, tmp_path / "second")
    flowers = f"folder:{pictures(tmp_path / 'flowers', 'flower', 5)}"
    assert (
        main(["evaluate", str(alone), str(tmp_path / "second"), "--dataset", flowers, *WORDS]) == 0
    )
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.partition("accuracy")[2] == second.partition("accuracy")[2]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("sinusoid", "dataset 'sinusoid' needs --model mlp and --ways 1"),
        ("nonesuch", "unknown data set 'nonesuch'"),
        ("folder:{t}/nowhere", "but there is no folder {t}/nowhere;"),
        ("folder:{t}/nowhere+folder:{t}/two", "folder: {t}/nowhere is not a folder"),
        ("folder:{t}/shared", "trained on"),
        ("omniglot", "gametalearn data prepare omniglot"),
    ],
)
def test_data_that_do_not_fit_are_refused(
    dataset: str, message: str, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "shared", "new", 3)
    shutil.copytree(
        tmp_path / "shared" / "new0", tmp_path / "shared" / "bird3"
    )  # perhaps trained on
    words = ["evaluate", str(alone), "--dataset", dataset.format(t=tmp_path), *WORDS]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert message.format(t=tmp_path) in said
    assert said.count("\n") == 1
    assert not list(alone.glob("evaluation*"))


def test_all_classes_are_for_other_data(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(alone), "--on", "all", *WORDS]) == 2
    assert "--on all works only on data that the run was not trained on" in capsys.readouterr().err


def test_what_is_other_data(trained: Path, tmp_path: Path) -> None:
    run = trained / "run"
    other = pictures(tmp_path / "other", "fish", 3)
    shared = pictures(tmp_path / "shared", "bird", 3)
    assert is_other(run, f"folder:{other}")
    assert is_other(run, str(other))
    assert is_other(run, "glyphs")
    assert is_other(run, f"folder:{shared}+folder:{other}")  # several are another data set than one
    assert not is_other(run, f"folder:{shared}")  # its classes may be those that were trained on
    assert not is_other(run, f"folder:{trained}/birds")
    assert not is_other(run, f"folder:{tmp_path}/none")
    assert not is_other(tmp_path / "no run", "glyphs")


def test_other_inputs_than_the_runs_are_refused(tmp_path: Path) -> None:
    from gametalearn.transfer import episodes_for

    run = train(tiny(iterations=1), tmp_path / "a", progress=False)
    run.input_shape = (2,)
    with pytest.raises(InputError, match=r"inputs have the shape \(1,\), .* trained on \(2,\)"):
        episodes_for(run.config, run.input_shape, "test", {})


def test_an_older_run_takes_its_shapes_from_its_data(alone: Path, tmp_path: Path) -> None:
    for name in ("checkpoint.pt", "best.pt"):
        content = load_checkpoint(alone / name)
        del content["data"]
        save_checkpoint(alone / name, content)
    with pytest.raises(InputError, match="it is no longer there; if the folder has moved"):
        load_run(alone)
    train(tiny(iterations=1), tmp_path / "b", progress=False)
    content = load_checkpoint(tmp_path / "b" / "best.pt")
    del content["data"]
    save_checkpoint(tmp_path / "b" / "best.pt", content)
    assert load_run(tmp_path / "b").input_shape == (1,)


def test_a_run_in_memory_needs_its_folder_no_more(tmp_path: Path) -> None:
    train(tiny(iterations=1), tmp_path / "a", progress=False)
    run = load_run(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    assert run.source.sample(1).support_x.shape == (1, 10, 1)


def test_a_device_that_is_not_there_gives_way_to_the_cpu(
    alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unusable(device: str) -> str | None:
        return "not usable here (no driver)" if device == "cuda" else None

    monkeypatch.setattr("gametalearn.runfolder.unusable", unusable)
    file = alone / "config.toml"
    file.write_text(file.read_text().replace('device = "cpu"', 'device = "cuda"'))
    told = r"trained on cuda, not usable here \(no driver\); loaded for the cpu"
    with pytest.warns(UserWarning, match=told):
        assert load_run(alone).config.device == "cpu"
    assert load_run(alone, device="cpu").config.device == "cpu"
    assert main(["evaluate", str(alone), "--device", "cuda", *WORDS]) == 2
    assert "--device cuda: not usable here (no driver); try cpu" in capsys.readouterr().err


class Doubles(Sinusoid):
    """Sinusoids in double precision."""

    def sample(self, num_tasks: int, part: slice = slice(None)) -> TaskBatch:
        return super().sample(num_tasks, part).to(dtype=torch.float64)

    def with_seed(self, seed: int) -> Doubles:
        return Doubles(seed=seed)


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))


@pytest.mark.parametrize("learner", ["maml", "metasgd"])
def test_a_model_comes_back_in_its_precision(learner: str, tmp_path: Path) -> None:
    config = tiny(iterations=2, learner=learner)
    run = train(
        config, tmp_path / "a", model=Net().double(), source=Doubles(), validation=Doubles(),
        progress=False,
    )  # fmt: skip
    loaded = load_run(tmp_path / "a", "latest", model=Net)
    assert loaded.meta.keys() == run.meta.keys()
    for name, p in loaded.meta.items():
        assert p.dtype == torch.float64
        assert torch.equal(p, run.meta[name])
