"""`make gpu-check`'s program, on the CPU: every point, what it writes, and how it ends."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.gpu_check import __main__ as program
from experiments.gpu_check import runs
from experiments.gpu_check.__main__ import POINTS, main, tried
from experiments.gpu_check.outcomes import SMALL, Outcome, tf32

SLOW = {"bench", "processes", "tests"}
"""Points that start processes; they have tests of their own."""


def test_without_a_card_it_ends_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda:99"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("gpu-check: --device cuda:99: not usable here (")
    assert err.endswith("); nothing was checked\n")


def test_every_point_passes_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = [name for name in POINTS if name not in SLOW]
    file = tmp_path / "new" / "check.json"
    words = ["--device", "cpu", "--only", ",".join(points), "--json", str(file)]
    assert main([*words, "--minutes", "1000"]) == 0  # however slow the machine
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"gpu-check on cpu, torch {torch.__version__}"
    assert [line.split()[:2] for line in lines[1:-1]] == [["PASS", name] for name in points]
    assert lines[-1] == "PASS"
    found = json.loads(file.read_text())
    assert found["schema"] == "gametalearn.gpu-check/1"
    assert (found["device"], found["passed"]) == ("cpu", True)
    assert list(found["points"]) == points
    assert {own["verdict"] for own in found["points"].values()} == {"PASS"}
    for errors in found["points"]["rows"]["errors"].values():
        assert 0 < errors["float64"] < 1e-9 < errors["float32"]
    assert found["points"]["resume"]["bit_identical"] is True
    assert found["points"]["training"]["iterations_per_second"] > 0


def test_two_processes_train_what_one_does() -> None:
    found = runs.check_processes("cpu", SMALL)
    assert found.verdict == "PASS", found
    assert 0 <= found.figures["difference"] < 1e-3


def test_one_card_is_too_few_for_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert runs.check_processes("cuda", SMALL) == Outcome("SKIP", "there is only one GPU")


@pytest.mark.parametrize(("error", "verdict"), [(1e-13, "PASS"), (1e-3, "FAIL")])
def test_the_benchmark_passes_where_both_sides_compute_the_same(
    error: float, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def run_bench(name: str, **options: Any) -> dict[str, Any]:
        asked.append((name, options["device"], options["setting"]))
        return {"speedup": 3.0, "float64_rel_error": error, "float64_rel_error_learn2learn": 0.0}

    monkeypatch.setattr(runs, "run_bench", run_bench)
    found = runs.check_bench("cuda", SMALL)
    assert found.verdict == verdict
    assert "omniglot-5w1s 3.0 times" in found.said
    assert asked == [(name, "cuda", setting) for name, setting in SMALL.settings.items()]


def test_the_suite_is_run_on_the_device() -> None:
    found = runs.check_tests("cpu", SMALL)
    assert found.verdict == "PASS"
    assert "passed" in found.said
    refused = runs.check_tests("cuda:99", SMALL)
    assert refused.verdict == "FAIL"
    assert "GAMETALEARN_TEST_DEVICE=cuda:99" in refused.said


def test_what_raises_or_warns_has_failed_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(device: str, sizes: Any) -> Outcome:
        raise RuntimeError("CUDA error: an illegal memory access")

    def warns(device: str, sizes: Any) -> Outcome:
        warnings.warn("gametalearn: Conv4 is computed task by task", stacklevel=1)
        return Outcome("PASS", "all well", {"error": 1.0})

    def skips(device: str, sizes: Any) -> Outcome:
        return Outcome("SKIP", "not here")

    points = {"raises": raises, "warns": warns, "skips": skips}
    monkeypatch.setattr(program, "POINTS", points)
    file = tmp_path / "check.json"
    assert main(["--device", "cpu", "--json", str(file), "--only", "raises,warns,skips"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(
        "FAIL  raises     RuntimeError: CUDA error: an illegal memory access"
    )
    assert lines[2].startswith("FAIL  warns      gametalearn: Conv4 is computed task by task")
    assert lines[3].startswith("SKIP  skips      not here")
    assert lines[4] == "FAIL: raises, warns"
    found = json.loads(file.read_text())
    assert found["passed"] is False
    assert "illegal memory access" in found["points"]["raises"]["traceback"]
    assert found["points"]["warns"]["error"] == 1.0
    assert tried(skips, "cpu", SMALL).verdict == "SKIP"
    assert main(["--device", "cpu", "--only", "skips", "--minutes", "-1"]) == 0
    assert "SKIP  skips      not started within -1 minutes" in capsys.readouterr().out


def test_points_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--device", "cpu", "--only", "rows,speed"])
    assert "unknown point 'speed'; choose from rows, smooth" in capsys.readouterr().err


def test_tf32_is_left_as_it_was() -> None:
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    for allowed in (True, False):
        with tf32(allowed):
            assert torch.backends.cudnn.allow_tf32 is allowed
            assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == flags
