"""A run goes on with, and is tested on, the images that it began with, or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import tomli_w
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import gametalearn
from gametalearn import InputError, TrainConfig, cli, compare, load_dataset, load_run, train
from gametalearn.checkpoint import load_checkpoint, save_checkpoint
from gametalearn.cli import main
from gametalearn.data import folder as folder_module
from gametalearn.data.identity import FolderIdentity, differences
from gametalearn.flags import in_flags
from gametalearn.gradients import meta_gradients
from gametalearn.places import joined, names_in
from gametalearn.transfer import described

SPLITS = ("train", "val", "test")
TINY = {
    "model": "mlp", "hidden": 4, "image_size": 4, "channels": 1, "ways": 2, "shots": 1,
    "queries": 1, "meta_batch": 2, "iterations": 2, "inner_steps": 1, "test_steps": 1,
    "validation_episodes": 2, "threads": 1,
}  # fmt: skip


def config(dataset: str, **given: Any) -> TrainConfig:
    return TrainConfig.of(dataset, **{**TINY, **given})


def picture(file: Path, seed: int, side: int = 4) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def pictures(root: Path, seed: int = 0, classes: int = 12) -> Path:
    """Class folders c00, c01, ... of 3 images each."""
    for c in range(classes):
        for i in range(3):
            picture(root / f"c{c:02}" / f"{i}.png", 1000 * seed + 10 * c + i)
    return root


def classes_of(folder: Path) -> dict[str, tuple[str, ...]]:
    return {s: load_dataset(f"folder:{folder}", s, image_size=4).classes for s in SPLITS}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``A/imgs``, ``B/imgs`` and a run of ``folder:imgs`` that was started in A."""
    root = tmp_path_factory.mktemp("template").resolve()
    pictures(root / "A" / "imgs", seed=0)
    pictures(root / "B" / "imgs", seed=1, classes=15)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "A")
        train(config("folder:imgs"), root / "run", progress=False)
    return root


@pytest.fixture
def here(template: Path, tmp_path: Path) -> Path:
    """A copy of the template whose run was made there; the working directory is another one."""
    root = tmp_path.resolve() / "here"
    shutil.copytree(template, root)
    rename(root / "run", str(template), str(root))
    return root


def rename(run: Path, old: str, new: str) -> None:
    """Another path in a run's files, as if it had been started there."""
    for name in ("config.toml", "data.json"):
        (run / name).write_text((run / name).read_text().replace(old, new))
    for name in ("checkpoint.pt", "best.pt"):
        content = load_checkpoint(run / name)
        content["config"]["dataset"] = content["config"]["dataset"].replace(old, new)
        save_checkpoint(run / name, content)


def settings(run: Path) -> dict[str, Any]:
    return tomllib.loads((run / "config.toml").read_text())


def record(run: Path) -> dict[str, Any]:
    content = json.loads((run / "data.json").read_text())
    assert content["schema"] == "gametalearn.data/1"
    return content["folders"][0]  # type: ignore[no-any-return]


def refusals(
    run: Path, capsys: pytest.CaptureFixture[str], *more: str, evaluate: bool = True
) -> set[str]:
    """What evaluating and going on say, in Python and on the command line; all must refuse."""
    capsys.readouterr()
    dataset = more[1] if more else None
    with pytest.raises(InputError) as loading:
        load_run(run, dataset=dataset).episodes("test")
    said = [in_flags(cli.parser_of(), str(loading.value))]
    if dataset is None:
        with pytest.raises(InputError) as going_on:
            train(TrainConfig.from_dict(settings(run), "x"), run, progress=False)
        said.append(in_flags(cli.parser_of(), str(going_on.value)))
    for command in (["evaluate", str(run), "--episodes", "2"], ["train", "--resume", str(run)]):
        if command[0] == "evaluate" and not evaluate:
            continue
        assert main([*command, "--quiet", *more]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        said.append(printed.err.removeprefix("gametalearn: ").strip())
    return set(said)


# ---------------------------------------------------------------------------------------------
# what a run keeps


def test_a_run_keeps_the_absolute_path_the_split_and_a_digest(here: Path) -> None:
    assert settings(here / "run")["dataset"] == f"folder:{here}/A/imgs"
    kept = record(here / "run")
    assert kept["path"] == f"{here}/A/imgs"
    found = {split: tuple(classes) for split, classes in kept["splits"].items()}
    assert found == classes_of(here / "A" / "imgs")
    assert all(c["files"] == 3 for split in SPLITS for c in kept["splits"][split].values())


def test_a_run_without_folders_keeps_no_record(tmp_path: Path) -> None:
    small = {"iterations": 1, "meta_batch": 2, "hidden": 4, "validation_episodes": 2}
    train(TrainConfig.of("sinusoid", **small), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "data.json").exists()
    load_run(tmp_path / "run")


@pytest.mark.parametrize("folder", ["with spaces", "mit Ümläuten 画", "100%", "a'b\"c", "train"])
def test_folders_of_any_name(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    train(config(f"folder:{folder}"), tmp_path / "run", progress=False)
    monkeypatch.chdir("/")
    assert load_run(tmp_path / "run").config.dataset == f"folder:{tmp_path.resolve() / folder}"


def test_ways_to_write_the_same_path_are_the_same_run(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "link").symlink_to(here / "A")
    monkeypatch.chdir(here / "A")
    monkeypatch.setenv("HOME", str(here))
    ways = ["imgs", "./imgs", "imgs/", "../A/imgs", "../link/imgs", "~/A/imgs", f"{here}//A/imgs"]
    for way in [*(f"folder:{way}" for way in ways), "imgs", "./imgs", "~/A/imgs"]:
        run = train(config(way), here / "run", progress=False)
        assert (run.iteration, run.config.dataset) == (2, f"folder:{here}/A/imgs"), way


# ---------------------------------------------------------------------------------------------
# another working directory


def test_another_working_directory_uses_the_same_images(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here / "B")
    run = load_run(here / "run")
    assert run.config.dataset == f"folder:{here}/A/imgs"
    assert run.source.dataset.classes == classes_of(here / "A" / "imgs")["train"]  # type: ignore[attr-defined]
    for words in ("evaluate --episodes 2", "train --resume"):
        assert main([*words.split(), str(here / "run"), "--quiet"]) == 0
    assert str(here / "A") in (here / "run" / "config.toml").read_text()


def test_runs_of_one_config_started_in_two_directories_are_told_apart(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here / "B")
    with pytest.raises(InputError) as error:
        train(config("folder:imgs"), here / "run", progress=False)
    assert f"dataset folder:{here}/A/imgs, not folder:{here}/B/imgs" in str(error.value)
    assert f"train --resume {here}/run --dataset folder:{here}/B/imgs" in str(error.value)
    monkeypatch.chdir(here / "A")
    assert train(config("folder:imgs"), here / "run", progress=False).iteration == 2


def test_results_of_a_comparison_name_the_absolute_path(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here / "A")
    rules = ["uniform"]
    compare(config("folder:imgs"), rules, 1, 2, here / "cmp", progress=False)
    results = json.loads((here / "cmp" / "results.json").read_text())
    assert results["dataset"] == results["config"]["dataset"] == f"folder:{here}/A/imgs"
    monkeypatch.chdir(here / "B")
    with pytest.raises(InputError, match=r"other settings \(dataset folder:.*/A/imgs, not folder:"):
        compare(config("folder:imgs"), rules, 1, 2, here / "cmp", progress=False)
    monkeypatch.chdir(here / "A")
    shutil.rmtree(here / "A" / "imgs" / classes_of(here / "A" / "imgs")["train"][0])
    with pytest.raises(InputError, match=r"cmp/uniform/seed0: trained on .*is missing"):
        compare(config("folder:imgs"), rules, 1, 2, here / "cmp", progress=False)


@pytest.mark.parametrize("folder", ["c++", "a+b", "+", "a%2Bb", "a+glyphs", "++/x+"])
def test_a_path_with_a_plus_is_a_path(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / folder / "imgs")
    monkeypatch.chdir(tmp_path / folder)
    typed = f"folder:{tmp_path}/{folder}/imgs"
    ways = ["folder:imgs", typed] if folder != "a%2Bb" else ["folder:imgs"]
    for number, way in enumerate(ways):
        run = train(config(way), tmp_path / f"run{number}", progress=False)
        assert record(tmp_path / f"run{number}")["path"] == f"{tmp_path}/{folder}/imgs"
        monkeypatch.chdir("/")
        loaded = load_run(tmp_path / f"run{number}").config
        assert loaded.dataset == run.config.dataset
        assert loaded.datasets == [typed]
        assert main(["evaluate", str(tmp_path / f"run{number}"), "--episodes", "2", "--quiet"]) == 0
        assert described({"dataset": loaded.dataset}) == typed
        both = config(f"{loaded.dataset}+glyphs", channels=1, image_size=4)
        assert both.datasets == [typed, "glyphs"]
        capsys.readouterr()
        monkeypatch.chdir(tmp_path / folder)


NAMES = st.sampled_from(["glyphs", "omniglot", "mine.data:Pairs", "sinusoid"]) | st.text(
    "ab+%2B5/. ", min_size=1, max_size=12
).map(lambda path: f"folder:/nowhere/{path}")


@given(names=st.lists(NAMES, min_size=1, max_size=3))
@hypothesis.settings(max_examples=300, deadline=None)
def test_names_are_joined_and_taken_apart(names: list[str]) -> None:
    assert names_in(joined(names)) == names


def test_a_plus_that_is_typed() -> None:
    assert names_in("folder:/nowhere/a+b/c+glyphs") == ["folder:/nowhere/a", "b/c", "glyphs"]
    assert names_in("folder:/nowhere/a+b+glyphs") == ["folder:/nowhere/a+b", "glyphs"]
    assert names_in("glyphs+omniglto") == ["glyphs", "omniglto"]
    assert names_in("glyphs+") == ["glyphs", ""]


def test_where_both_exist_the_longer_path_is_meant(tmp_path: Path) -> None:
    for folder in ("a", "a+b", "b"):
        (tmp_path / folder).mkdir()
    assert names_in(f"folder:{tmp_path}/a+b") == [f"folder:{tmp_path}/a+b"]
    assert names_in(f"folder:{tmp_path}/a+c") == [f"folder:{tmp_path}/a", "c"]
    two = f"folder:{tmp_path}/a+folder:{tmp_path}/b"
    assert names_in(two) == two.split("+")


# ---------------------------------------------------------------------------------------------
# images that have changed


def a_class(root: Path, split: str) -> Path:
    return root / classes_of(root)[split][0]


Change = Callable[[Path], object]
CHANGES: dict[str, tuple[Change, str]] = {
    "a training class removed": (
        lambda imgs: shutil.rmtree(a_class(imgs, "train")),
        r"\(11 classes, 33 files\) differs in \d+ classes: 'c\d\d' is missing",
    ),
    "a test class removed": (lambda imgs: shutil.rmtree(a_class(imgs, "test")), "is missing"),
    "a class added": (
        lambda imgs: picture(imgs / "new" / "0.png", 0),
        r"\(13 classes, 37 files\) differs in \d+ class(es)?: 'new' is new",
    ),
    "a class renamed": (
        lambda imgs: (imgs / "c03").rename(imgs / "other"),
        "'c03' is missing, 'other' is new",
    ),
    "a class in capitals": (
        lambda imgs: (imgs / "c03").rename(imgs / "C03"),
        "'c03' is missing, 'C03' is new",
    ),
    "a file removed": (
        lambda imgs: (imgs / "c03" / "1.png").unlink(),
        r"\(12 classes, 35 files\) differs in 1 class: 'c03' had 3 files and has 2",
    ),
    "a file added": (
        lambda imgs: picture(imgs / "c03" / "x.png", 0),
        "'c03' had 3 files and has 4",
    ),
    "a file renamed": (
        lambda imgs: (imgs / "c03" / "1.png").rename(imgs / "c03" / "x.png"),
        "'c03' has files of other names or sizes",
    ),
    "a file of another size": (
        lambda imgs: picture(imgs / "c03" / "1.png", 0, side=9),
        "'c03' has files of other names or sizes",
    ),
    "too few classes left": (
        lambda imgs: list(map(shutil.rmtree, sorted(imgs.iterdir())[2:])),
        r"A/imgs: 2 class folders with images, but at least 3",
    ),
    "no folder": (shutil.rmtree, "but it is no longer there; if the folder has moved"),
    "a file in its place": (
        lambda imgs: imgs.rename(imgs.with_name("elsewhere")).with_name("imgs").write_text(""),
        "but it is no longer there",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_images_are_refused_and_both_are_named(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = CHANGES[name]
    change(here / "A" / "imgs")
    before = (here / "run" / "checkpoint.pt").read_bytes()
    said = refusals(here / "run", capsys)
    assert len(said) == 1
    start = f"{here}/run: trained on {here}/A/imgs (12 classes, 36 files)"
    (text,) = said
    assert text.startswith(start)
    with pytest.raises(InputError, match=message):
        raise InputError(text)
    assert "--dataset folder:PATH" in text
    assert (here / "run" / "checkpoint.pt").read_bytes() == before


def test_a_class_moved_from_training_to_test_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in SPLITS:
        pictures(tmp_path / "imgs" / split, seed=ord(split[1]), classes=3)
        for c in (tmp_path / "imgs" / split).iterdir():
            c.rename(c.with_name(f"{split}-{c.name}"))
    train(config(f"folder:{tmp_path}/imgs"), tmp_path / "run", progress=False)
    load_run(tmp_path / "run").episodes("test")
    (tmp_path / "imgs/train/train-c01").rename(tmp_path / "imgs/test/train-c01")
    (text,) = refusals(tmp_path / "run", capsys)
    assert "differs in 1 class: 'train-c01' was in train and is in test" in text


def test_a_split_that_is_dealt_otherwise_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by a later version with another rule to deal by: not a file has changed."""
    deal = folder_module.deal_classes

    def otherwise(names: Any, where: str) -> dict[str, list[str]]:
        dealt = deal(names, where)
        return {"train": dealt["train"], "val": dealt["test"], "test": dealt["val"]}

    monkeypatch.setattr(folder_module, "deal_classes", otherwise)
    (text,) = refusals(here / "run", capsys)
    assert "was in val and is in test" in text


def test_times_do_not_count(here: Path) -> None:
    for file in (here / "A" / "imgs").rglob("*.png"):
        os.utime(file, ns=(1, 1))
    assert load_run(here / "run").config.dataset == f"folder:{here}/A/imgs"
    (here / "A" / "imgs" / "c03" / "notes.txt").write_text("no image")
    load_run(here / "run").episodes("test")


def test_only_a_new_run_takes_changed_images(here: Path) -> None:
    shutil.rmtree(here / "A" / "imgs" / "c03")
    again = config(f"folder:{here}/A/imgs")
    train(again, here / "run", overwrite=True, progress=False)
    assert "c03" not in json.dumps(record(here / "run")["splits"])
    for name in ("checkpoint.pt", "best.pt"):  # as of a run that ended before it kept anything
        (here / "run" / name).unlink()
    shutil.rmtree(here / "A" / "imgs" / "c04")
    train(again, here / "run", progress=False)
    assert "c04" not in json.dumps(record(here / "run")["splits"])
    load_run(here / "run").episodes("test")


# ---------------------------------------------------------------------------------------------
# a folder that has moved


def test_a_moved_folder_is_given_anew(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "A" / "imgs").rename(here / "moved")
    assert "it is no longer there" in next(iter(refusals(here / "run", capsys)))
    new = f"folder:{here}/moved"
    run = load_run(here / "run", dataset=new)
    assert run.config.dataset == new
    run.episodes("test")
    words = ["evaluate", str(here / "run"), "--episodes", "2", "--quiet"]
    assert main([*words, "--dataset", new]) == 0
    assert settings(here / "run")["dataset"] == f"folder:{here}/A/imgs"  # only looked at
    assert main(words) == 2
    assert main(["train", "--resume", str(here / "run"), "--dataset", new, "--quiet"]) == 0
    assert settings(here / "run")["dataset"] == new
    assert record(here / "run")["path"] == f"{here}/moved"
    assert main(words) == 0  # it knows the new place now
    assert main(["train", "--resume", str(here / "run"), "--quiet"]) == 0


def test_a_link_left_in_its_place_will_do(here: Path) -> None:
    (here / "A" / "imgs").rename(here / "moved")
    (here / "A" / "imgs").symlink_to(here / "moved")
    assert load_run(here / "run").config.dataset == f"folder:{here}/moved"
    assert main(["train", "--resume", str(here / "run"), "--quiet"]) == 0
    (here / "A" / "imgs").unlink()
    (here / "A" / "imgs").symlink_to(here / "B" / "imgs")  # the run is bound to what it named
    assert load_run(here / "run").config.dataset == f"folder:{here}/moved"


def test_a_place_given_anew_may_be_relative(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "A" / "imgs").rename(here / "moved")
    monkeypatch.chdir(here)
    assert load_run(here / "run", dataset="folder:moved").config.dataset == f"folder:{here}/moved"
    assert load_run(here / "run", dataset="moved/").config.dataset == f"folder:{here}/moved"


def test_a_folder_with_other_images_is_not_the_moved_one(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {f.name: f.read_bytes() for f in (here / "run").iterdir()}
    said = refusals(here / "run", capsys, "--dataset", f"folder:{here}/B/imgs")
    (text,) = said
    assert f"{here}/A/imgs (12 classes, 36 files), but {here}/B/imgs (15 classes, 45" in text
    (text,) = refusals(here / "run", capsys, "--dataset", f"folder:{here}/nowhere")
    assert f"but there is no folder {here}/nowhere;" in text
    assert {f.name: f.read_bytes() for f in (here / "run").iterdir()} == before


@pytest.mark.parametrize("other", ["glyphs", "sinusoid", "folder:/a+folder:/b", "nonesuch"])
def test_another_data_set_is_not_a_moved_folder(
    other: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But perhaps one to be tested on: see test_transfer.py."""
    (text,) = refusals(here / "run", capsys, "--dataset", other, evaluate=False)
    assert f"--dataset {other}: the run was trained on folder:{here}/A/imgs; it can only" in text


def test_a_moved_folder_goes_on_bit_for_bit(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def interrupting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return meta_gradients(*args, method="loop", **kwargs)

    monkeypatch.setattr("gametalearn.training.meta_gradients", interrupting)
    long = config(f"folder:{here}/A/imgs", iterations=5)
    train(long, here / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(long, here / "parts", progress=False)
    (here / "A" / "imgs").rename(here / "moved")
    words = ["train", "--resume", str(here / "parts"), "--dataset", f"folder:{here}/moved"]
    assert main([*words, "--quiet"]) == 0
    assert len(calls) == 10
    whole, parts = (load_checkpoint(here / r / "checkpoint.pt") for r in ("whole", "parts"))
    assert all(torch.equal(whole["meta"][name], parts["meta"][name]) for name in whole["meta"])


def test_moved_is_an_argument_of_train(here: Path) -> None:
    shutil.copytree(here / "A" / "imgs", here / "moved")
    new = config(f"folder:{here}/moved")
    with pytest.raises(InputError, match="holds a run with other settings"):
        train(new, here / "run", progress=False)
    assert train(new, here / "run", progress=False, moved=True).config == new
    with pytest.raises(InputError, match=r"other settings \(hidden"):
        train(config(new.dataset, hidden=5), here / "run", progress=False, moved=True)
    with pytest.raises(InputError, match="no run there"):
        train(new, here / "none", progress=False, moved=True)


def test_a_path_mended_in_the_settings_is_as_good(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "A" / "imgs").rename(here / "moved")
    file = here / "run" / "config.toml"
    file.write_text(file.read_text().replace(f"{here}/A/imgs", f"{here}/moved"))
    for words in ("evaluate --episodes 2", "train --resume"):
        assert main([*words.split(), str(here / "run"), "--quiet"]) == 0
    file.write_text(file.read_text().replace(f"{here}/moved", f"{here}/B/imgs"))
    (text,) = refusals(here / "run", capsys)
    assert f"but {here}/B/imgs (15 classes, 45 files) differs" in text


# ---------------------------------------------------------------------------------------------
# several folders


@pytest.mark.filterwarnings("ignore:the class 'c..' .*by its name among the training")
def test_each_of_several_folders_is_verified(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = f"folder:{here}/A/imgs+folder:{here}/B/imgs"
    train(config(both), here / "two", progress=False)
    kept = json.loads((here / "two" / "data.json").read_text())["folders"]
    assert [folder["path"] for folder in kept] == [f"{here}/A/imgs", f"{here}/B/imgs"]
    load_run(here / "two").episodes("test")
    swapped = f"folder:{here}/B/imgs+folder:{here}/A/imgs"
    (text,) = refusals(here / "two", capsys, "--dataset", swapped)
    assert f"trained on {here}/A/imgs (12 classes, 36 files), but {here}/B/imgs (15" in text
    (here / "B" / "imgs").rename(here / "moved")
    (text,) = refusals(here / "two", capsys)
    assert f"--dataset folder:{here}/A/imgs+folder:PATH" in text
    new = f"folder:{here}/A/imgs+folder:{here}/moved"
    assert load_run(here / "two", dataset=new).config.dataset == new
    (here / "moved" / "c03" / "1.png").unlink()
    (text,) = refusals(here / "two", capsys, "--dataset", new)
    assert f"trained on {here}/B/imgs (15 classes, 45 files), but {here}/moved" in text


# ---------------------------------------------------------------------------------------------
# runs of older versions, and damaged records


def aged(run: Path) -> Path:
    """The run as the version before wrote it, when it was started in A."""
    rename(run, f"folder:{run.parent}/A/imgs", "folder:imgs")
    (run / "data.json").unlink()
    assert settings(run)["dataset"] == "folder:imgs"
    return run


def test_an_older_run_goes_on_with_one_warning(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = aged(here / "run")
    monkeypatch.chdir(here / "A")
    told = f"could not be verified, .* it goes on with {here}/A/imgs .a relative path, seen from {here}/A"
    loaded = load_run(run)
    assert loaded.config.dataset == f"folder:{here}/A/imgs"
    with pytest.warns(UserWarning, match=told) as seen:
        loaded.episodes("test")
    assert len(seen) == 1
    with pytest.warns(UserWarning, match=told) as seen:
        assert main(["evaluate", str(run), "--episodes", "2", "--quiet"]) == 0
    assert len(seen) == 1
    with pytest.warns(UserWarning, match=told) as seen:
        assert main(["train", "--resume", str(run), "--quiet"]) == 0
    assert len(seen) == 1
    # once resumed it is bound to this place
    assert settings(run)["dataset"] == f"folder:{here}/A/imgs"
    monkeypatch.chdir(here / "B")
    with pytest.warns(UserWarning, match=f"it goes on with {here}/A/imgs$"):
        load_run(run).episodes("test")


def test_the_command_line_warns_in_one_line(here: Path) -> None:
    root = Path(gametalearn.__file__).parents[1]
    done = subprocess.run(  # pytest would catch the warning
        [sys.executable, "-m", "gametalearn", "train", "--resume", aged(here / "run"), "--quiet"],
        cwd=here / "A", env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr.startswith(f"gametalearn: {here}/run: its images could not be verified")
    assert done.stderr.count("\n") == 1


def test_an_older_run_is_the_same_run_where_it_was_started(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = aged(here / "run")
    monkeypatch.chdir(here / "A")
    with pytest.warns(UserWarning, match="could not be verified"):
        assert train(config("folder:imgs"), run, progress=False).iteration == 2


def test_an_older_run_elsewhere_says_where_it_looked(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = aged(here / "run")
    monkeypatch.chdir(here)
    (text,) = refusals(run, capsys)
    assert f"its images were in 'folder:imgs' (a relative path, seen from {here})" in text
    assert f"{here}/imgs is no folder; if the folder has moved, give its place by --dataset" in text
    new = f"folder:{here}/A/imgs"
    with pytest.warns(UserWarning, match="could not be verified"):
        load_run(run, dataset=new).episodes("test")
    with pytest.warns(UserWarning, match="could not be verified"):
        assert main(["train", "--resume", str(run), "--dataset", new, "--quiet"]) == 0


def test_an_older_run_without_folders_says_nothing(tmp_path: Path) -> None:
    small = {"iterations": 1, "meta_batch": 2, "hidden": 4, "validation_episodes": 2}
    train(TrainConfig.of("sinusoid", **small), tmp_path / "run", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(TrainConfig.of("sinusoid", **small), tmp_path / "run", progress=False)
        load_run(tmp_path / "run").episodes("test")


def spoiled(content: dict[str, Any], split: str, value: Any) -> dict[str, Any]:
    """A record in which a class of the split has another number of files."""
    next(iter(content["folders"][0]["splits"][split].values()))["files"] = value
    return content


def without(content: dict[str, Any], split: str) -> dict[str, Any]:
    content["folders"][0]["splits"][split].popitem()
    return content


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another schema": lambda content: {**content, "schema": "gametalearn.data/9"},
    "no folders": lambda content: {"schema": content["schema"]},
    "a list": lambda content: [content],
    "null": lambda content: None,
    "a class less": lambda content: without(content, "train"),
    "another count": lambda content: spoiled(content, "test", 9),
    "no count": lambda content: spoiled(content, "val", None),
    "infinite": lambda content: spoiled(content, "val", float("inf")),
    "no split": lambda content: {
        **content, "folders": [{**content["folders"][0], "splits": {"train": 3}}]
    },
}  # fmt: skip


@pytest.mark.parametrize("name", [*DAMAGE, "half", "empty"])
def test_a_damaged_record_is_refused(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = here / "run" / "data.json"
    if name in DAMAGE:
        file.write_text(json.dumps(DAMAGE[name](json.loads(file.read_text()))))
    else:
        file.write_bytes(file.read_bytes()[: 300 if name == "half" else 0])
    (text,) = refusals(here / "run", capsys)
    assert text.startswith(f"{file}: damaged (")


def test_a_record_of_other_folders_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = here / "run" / "data.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "folders": content["folders"] * 2}))
    (text,) = refusals(here / "run", capsys)
    assert "data.json has 2 of a data set's folders, config.toml 1" in text


def test_a_setting_of_another_run_is_no_record(here: Path) -> None:
    file = here / "run" / "config.toml"
    file.write_text(tomli_w.dumps({**settings(here / "run"), "dataset": "glyphs"}))
    with pytest.raises(
        InputError, match=r"data\.json has 1 of a data set's folders, config\.toml 0"
    ):
        load_run(here / "run").episodes("test")


# ---------------------------------------------------------------------------------------------
# identities


def test_identities_name_what_differs(tmp_path: Path) -> None:
    first = FolderIdentity.of(pictures(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    second = FolderIdentity.of(tmp_path / "b")
    assert (second.path, first.digest) == (str(tmp_path.resolve() / "b"), second.digest)
    assert differences(first, second) == []
    assert FolderIdentity.from_dict(json.loads(json.dumps(first.as_dict()))) == first
    picture(tmp_path / "b" / "c00" / "1.png", 0, side=9)
    (tmp_path / "b" / "c01" / "0.png").unlink()
    (tmp_path / "b" / "c02").rename(tmp_path / "b" / ("x" * 100))
    third = FolderIdentity.of(tmp_path / "b")
    assert third.digest != first.digest
    found = differences(first, third)
    assert found[:4] == [
        "'c02' is missing",
        f"'{57 * 'x'}...' is new",
        "'c00' has files of other names or sizes",
        "'c01' had 3 files and has 2",
    ]


def test_names_that_are_no_unicode_are_kept(tmp_path: Path) -> None:
    pictures(tmp_path / "a")
    (tmp_path / "a" / "c00").rename(os.fsdecode(os.fsencode(tmp_path / "a") + b"/\xff"))
    found = FolderIdentity.of(tmp_path / "a")
    assert FolderIdentity.from_dict(json.loads(json.dumps(found.as_dict()))) == found
