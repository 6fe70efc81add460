"""``--tensorboard``: the event files say what ``metrics.jsonl`` says, after an interruption too."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gametalearn import InputError, TrainConfig, Uniform, Weights, compare, train
from gametalearn.cli import main
from gametalearn.tensorboard import TensorBoard

SMALL: dict[str, Any] = {
    "iterations": 8, "log_every": 2, "validate_every": 4, "validation_episodes": 4,
    "checkpoint_every": 4, "meta_batch": 3, "hidden": 4, "threads": 1,
}  # fmt: skip


def config(dataset: str = "glyphs", **more: Any) -> TrainConfig:
    return TrainConfig.of(dataset, **{**SMALL, **more})


def logged(run: Path) -> Any:
    """What TensorBoard itself reads there."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(
        str(run / "tensorboard"), {"histograms": 0, "scalars": 0, "images": 0}
    )
    events.Reload()
    return events


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(run: Path) -> None:
    events, records = logged(run), lines(run)
    for name in ("loss", "accuracy", "diagnostics/update_norm"):
        first, *rest = name.split("/")
        wanted = [(r["iteration"], r[first][rest[0]] if rest else r[first]) for r in records]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [value for _, value in found] == pytest.approx([v for _, v in wanted], rel=1e-6)
    tested = [r["iteration"] for r in records if "validation" in r]
    assert [event.step for event in events.Scalars("validation/accuracy")] == tested
    for event, record in zip(events.Histograms("weights/effective"), records, strict=True):
        values = event.histogram_value
        assert event.step == record["iteration"]
        assert values.num == len(record["effective"])
        assert values.sum == pytest.approx(sum(record["effective"]))


class Partly(Uniform):
    """Of whose raw weights one is no number."""

    def forward(self, gradients: Any) -> Weights:
        raw, effective = torch.ones(3), super().forward(gradients).effective
        raw[0] = float("inf")
        return Weights(raw, effective)


def test_weights_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    train(config(iterations=2), tmp_path / "a", rule=Partly(), progress=False, watch=TensorBoard())
    assert [e.histogram_value.num for e in logged(tmp_path / "a").Histograms("weights/raw")] == [
        2,
        2,
    ]


def test_it_logs_what_metrics_has_and_the_first_meta_batch(tmp_path: Path) -> None:
    words = ["train", "--out", str(tmp_path / "run"), "--tensorboard", "--quiet"]
    flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in SMALL.items()]
    assert main([*words, *(word for flag in flags for word in flag)]) == 0
    assert_same(tmp_path / "run")
    (image,) = logged(tmp_path / "run").Images("first meta-batch")
    assert image.step == 1
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert image.width > 300


def test_a_killed_run_logs_nothing_twice(tmp_path: Path) -> None:
    """It ends between two checkpoints; what it had logged since the first one is replaced."""
    program = """
import os, sys
from gametalearn import TrainConfig, train
from gametalearn.tensorboard import TensorBoard
board = TensorBoard()
def watch(run, record):
    board(run, record)
    if record["iteration"] == 6:
        os.kill(os.getpid(), 9)
train(TrainConfig.of(**eval(sys.argv[1])), sys.argv[2], watch=watch, progress=False)
"""
    given = {"dataset": "glyphs", **SMALL}
    done = subprocess.run([sys.executable, "-c", program, repr(given), str(tmp_path / "run")])
    assert done.returncode == -signal.SIGKILL
    assert logged(tmp_path / "run").Scalars("loss")[-1].step == 6
    train(config(), tmp_path / "run", watch=TensorBoard(), progress=False)
    assert [record["iteration"] for record in lines(tmp_path / "run")] == [1, 2, 4, 6, 8]
    assert_same(tmp_path / "run")


def test_a_run_that_goes_on_within_the_second_is_read_after_what_it_had(tmp_path: Path) -> None:
    """By another process, whose number may be a smaller one: TensorBoard reads files by their names."""

    class Ends(TensorBoard):
        def __call__(self, run: Any, record: Any) -> None:
            super().__call__(run, record)
            if record["iteration"] == 6:
                raise RuntimeError("ends")

    with pytest.raises(RuntimeError, match="ends"):
        train(config(), tmp_path / "run", watch=Ends(), progress=False)
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    *first, _, host, _, count = file.name.rsplit(".", 4)
    time.sleep(1 - time.time() % 1)  # so that both are in one second
    file.rename(file.with_name(".".join([*first, str(int(time.time())), host, "9999999", count])))
    train(config(), tmp_path / "run", watch=TensorBoard(), progress=False)
    assert_same(tmp_path / "run")


def test_runs_without_images_and_of_a_comparison(tmp_path: Path) -> None:
    board = TensorBoard()
    settings = config("sinusoid", hidden=8)
    compare(settings, ["uniform", "agreement"], 1, 4, tmp_path, watch=board, progress=False)
    for rule in ("uniform", "agreement"):
        events = logged(tmp_path / rule / "seed0")
        assert [event.step for event in events.Scalars("mse")] == [1, 2, 4, 6, 8]
        assert not events.Tags()["images"]
    assert pickle.loads(pickle.dumps(board))._writers == {}  # as `compare --jobs` sends it


def test_it_does_not_change_the_run_and_needs_a_folder(tmp_path: Path) -> None:
    train(config(), tmp_path / "with", watch=TensorBoard(), progress=False)
    train(config(), tmp_path / "without", progress=False)
    with_it, without = lines(tmp_path / "with"), lines(tmp_path / "without")
    for record in [*with_it, *without]:
        del record["seconds"]
    assert with_it == without
    with pytest.raises(InputError, match="`out`"):
        train(config(), watch=TensorBoard(), progress=False)


def test_without_tensorboard_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(["train", "--out", str(tmp_path / "run"), "--tensorboard", "--quiet"]) == 2
    assert not (tmp_path / "run").exists()
    assert "pip install tensorboard" in capsys.readouterr().err
