"""Every configuration in experiments/configs runs for a few iterations."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gametalearn
from gametalearn import commands
from gametalearn.cli import main
from gametalearn.data.omniglot import VALIDATION_ALPHABETS
from gametalearn.data.packed import packing

ROOT = Path(gametalearn.__file__).parents[1] / "experiments"
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with random images in the places of Omniglot's and mini-ImageNet's."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def images(count: int, channels: int, size: int) -> Any:
        return random.integers(256, size=(count, channels, size, size), dtype=np.uint8)

    validation = min(VALIDATION_ALPHABETS)
    with packing(root / "omniglot", (1, 28, 28)) as out:
        for i in range(1623):
            part = "background" if i < 964 else "evaluation"
            group = validation if i < 40 else f"alphabet{i // 40}"
            out.add(f"{group}/{i}", group, images(20, 1, 28), part)
    with packing(root / "mini-imagenet", (3, 84, 84)) as out:
        for split, count in (("train", 8), ("val", 6), ("test", 6)):
            for i in range(count):
                out.add(f"{split}{i}", "mini-imagenet", images(32, 3, 84), split)
    return root


def test_there_are_configurations() -> None:
    names = {file.stem for file in CONFIGS}
    for shots in (1, 5):
        assert {f"omniglot-{w}w{shots}s{end}" for w in (5, 20) for end in ("", "-reptile")} <= names
        assert {f"mini-imagenet-5w{shots}s", f"mini-imagenet-5w{shots}s-reptile"} <= names
    for k in (5, 10):
        assert {f"sinusoid-k{k}-{name}" for name in ("maml", "fomaml", "reptile")} <= names


# One of each family; the others are like them, and slow together.
FEW = (
    "omniglot-5w1s omniglot-20w1s-mamlpp omniglot-5w5s-reptile mini-imagenet-5w1s sinusoid-k5-maml "
)
FEW += "sinusoid-k10-reptile"


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(f, marks=[] if f.stem in FEW.split() else pytest.mark.slow, id=f.stem)
        for f in CONFIGS
    ],
)
def test_it_trains(
    file: Path, noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAMETALEARN_DATA", str(noise))
    flags = "--iterations 2 --meta-batch 2 --hidden 4 --validation-episodes 2 --validate-every 2"
    flags += " --inner-steps 2 --test-steps 2 --log-every 1 --quiet --threads 1"
    out = tmp_path / "run"
    assert main(["train", "--config", str(file), *flags.split(), "--out", str(out)]) == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_it_states_what_the_run_will_do(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(commands, "train", lambda args: seen.append(commands.config_of(args)))
    assert main(["train", "--config", str(file), "--out", "nowhere"]) == 0
    stated = tomllib.loads(file.read_text())
    for key, value in stated.items():
        assert getattr(seen[0], key.replace("-", "_")) == value
    assert file.read_text().startswith("# ")  # it says where its numbers come from
    assert all(len(line) <= 100 for line in file.read_text().splitlines())
    # nothing is left to defaults, which may be tuned later
    needed = "dataset shots queries learner inner_lr inner_steps test_steps iterations meta_batch "
    needed += "meta_lr meta_optimizer meta_schedule validate_every validation_episodes"
    if "sinusoid" not in file.stem:
        needed += " ways model hidden pool norm"
    if "omniglot" in file.stem:
        needed += " split rotations"
    assert {n.replace("_", "-") for n in needed.split()} <= stated.keys()


def test_a_published_setting_by_hand() -> None:
    found = tomllib.loads((ROOT / "configs" / "omniglot-20w1s.toml").read_text())
    assert found["inner-lr"] == 2.0  # 0.1 printed, on a loss summed over 20 ways
    assert (found["inner-steps"], found["test-steps"], found["meta-batch"]) == (5, 5, 16)
