"""The benchmark measures the same thing on every side, in turn, and writes the promised fields."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from gametalearn import InputError
from gametalearn.benchmark import Setting, run_bench, sweep
from gametalearn.benchmark import rounds as rounds_module
from gametalearn.benchmark import settings as settings_module
from gametalearn.benchmark.__main__ import main as side_main
from gametalearn.benchmark.command import SWEEP_VALUES, run
from gametalearn.benchmark.figures import FIELDS
from gametalearn.benchmark.report import summary
from gametalearn.benchmark.rounds import seconds_left
from gametalearn.benchmark.sides import SIDES
from gametalearn.cli import main

SMALL = Setting(tasks=2, ways=3, steps=2, image_size=16, hidden=4)
PROMISED = {
    "config",
    "threads",
    "gametalearn_ms",
    "learn2learn_ms",
    "speedup",
    "learn2learn_as_shipped_ms",
    "speedup_as_shipped",
    "float64_rel_error",
    "float32_rel_error",
    "setup_s",
    "peak_rss_mb",
    "publishable",
}
"""What is relied on from outside."""
EXPLAINED = {name for names, _ in FIELDS for name in names.split(", ")}


def test_each_side_has_a_process_of_its_own_and_its_fields(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "bench.json"
    result = run_bench("omniglot-5w1s", 1, file, rounds=1, repeats=2, setting=SMALL)
    assert json.loads(file.read_text()) == result
    pids = {p["side"]: p["pid"] for p in result["processes"]}
    assert set(pids) == set(SIDES)
    assert len({os.getpid(), *pids.values()}) == 1 + len(SIDES)
    assert set(result) == EXPLAINED
    assert set(result) >= PROMISED
    assert result["config"] == "omniglot-5w1s"
    assert (result["threads"], result["rounds"], result["repeats"]) == (1, 1, 2)
    assert all(len(p["ms"]) == 2 for p in result["processes"])
    assert len({p["inputs"] for p in result["processes"]}) == 1
    assert result["speedup"] == pytest.approx(
        result["learn2learn_ms"] / result["gametalearn_ms"], rel=1e-2
    )
    assert max(result["float64_rel_error"], result["float64_rel_error_learn2learn"]) < 1e-9
    assert set(result["float32_rel_error"]) == {"gametalearn", "learn2learn"}
    assert all(e < 1e-2 for e in result["float32_rel_error"].values())
    assert set(result["peak_rss_mb"]) == {"gametalearn", "learn2learn"}
    assert result["publishable"] is False
    assert "fewer than 3 rounds" in result["not_publishable_because"][0]
    keeps = {p["side"]: p["allocator_keeps_memory"] for p in result["processes"]}
    assert keeps["learn2learn-as-shipped"] is False
    assert keeps["gametalearn"] == keeps["learn2learn"] == result["allocator_keeps_memory"]
    assert "times slower" in summary(result)


def test_sides_take_turns_and_leave_their_rows_once(made_up: Any) -> None:
    result = run_bench("omniglot-5w1s", 2, rounds=3, measure=made_up)
    parts = [job.part for job in made_up.jobs]
    assert parts == [*SIDES, *SIDES, *SIDES, "reference"]
    with_rows = [i for i, job in enumerate(made_up.jobs) if job.rows is not None]
    assert [made_up.jobs[i].part for i in with_rows] == ["gametalearn", "learn2learn", "reference"]
    assert with_rows[:2] == [SIDES.index("gametalearn"), SIDES.index("learn2learn")]
    assert {job.threads for job in made_up.jobs} == {2}
    assert len({job.repeats for job in made_up.jobs}) == 1
    assert [p["round"] for p in result["processes"]] == [1] * 6 + [2] * 6 + [3] * 6
    assert result["speedup"] == 2.5
    assert result["speedup_as_shipped"] == 3.0
    assert result["publishable"] is True


def test_a_job_is_the_same_on_the_other_side_of_its_command_line(made_up: Any) -> None:
    setting = dataclasses.replace(SMALL, pool="max", constant_memory=True)
    run_bench("omniglot-5w1s", 2, rounds=1, repeats=7, setting=setting, measure=made_up)
    words = made_up.jobs[0].words()
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert Setting(**json.loads(given["--setting"])) == setting
    assert (given["--side"], given["--threads"], given["--repeats"]) == ("gametalearn", "2", "7")


def test_every_process_works_on_the_device(made_up: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds_module, "check_device", lambda device: None)
    made_up.changes = {
        "device": {"name": "cuda (A Card)", "tf32_convolutions": True, "tf32_products": False},
        "peak_device_mb": 12.0,
    }
    result = run_bench("omniglot-5w1s", 1, device="cuda", measure=made_up)
    assert {job.device for job in made_up.jobs} == {"cuda"}
    words = made_up.jobs[0].words()
    assert words[words.index("--device") + 1] == "cuda"
    assert result["device"]["tf32_convolutions"] is True
    assert result["peak_device_mb"] == {"gametalearn": 12.0, "learn2learn": 12.0}
    text = summary(result)
    assert text.startswith("omniglot-5w1s on cuda (A Card), threads: 1")
    assert "of the device  12 MB (learn2learn 12 MB)" in text
    assert {r["device"]["name"] for r in sweep("omniglot-5w1s", "tasks", [1], 1, device="cuda",
                                              measure=made_up)} == {"cuda (A Card)"}  # fmt: skip
    made_up.changes = {}
    assert run_bench("omniglot-5w1s", 1, measure=made_up)["peak_device_mb"] is None


def test_a_device_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settings_module, "unusable", lambda device: "not usable here (no driver)")
    told = "gametalearn: bench: --device cuda: not usable here (no driver); try cpu\n"
    assert main(["bench", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == told
    assert main(["bench", "--device", "mps"]) == 2
    told = "gametalearn: bench: --device must be cpu or cuda; got 'mps'\n"
    assert capsys.readouterr().err == told
    with pytest.raises(InputError, match="bench: `device` cuda:1: not usable here"):
        run_bench("omniglot-5w1s", device="cuda:1")
    words = ["--side", "gametalearn", "--device", "cuda"]
    assert side_main(words) == 2  # a process of its own says the same
    assert "not usable here (no driver); try cpu" in capsys.readouterr().err


def test_sides_with_other_inputs_are_not_compared(made_up: Any) -> None:
    def measure(job: Any) -> dict[str, Any]:
        made_up.changes = {"inputs": job.part.partition("-")[0]}
        answer: dict[str, Any] = made_up(job)
        return answer

    with pytest.raises(InputError, match="did not get the same weights and batch"):
        run_bench("omniglot-5w1s", 1, measure=measure)


def test_progress_says_side_round_and_how_long(made_up: Any) -> None:
    said: list[str] = []
    run_bench("omniglot-5w1s", 1, rounds=2, errors=False, say=said.append, measure=made_up)
    assert len(said) == 2 * len(SIDES)
    assert said[0].startswith("bench: gametalearn, round 1 of 2 (process 1 of 12); about ")
    assert said[7].startswith("bench: learn2learn, round 2 of 2 (process 8 of 12); about ")
    assert all(line.endswith(" left") for line in said)


def test_load_is_told_as_soon_as_it_is_seen_and_once(made_up: Any) -> None:
    said: list[str] = []
    made_up.changes = {"others_share": 0.5}
    run_bench("omniglot-5w1s", 1, errors=False, say=said.append, measure=made_up)
    assert "others use 50% of the machine's CPU time" in said[1]
    assert sum("others use" in line for line in said) == 1


def test_the_time_left_is_that_of_the_processes_before() -> None:
    assert seconds_left([], ["a", "b"], usual=10) == 20
    assert seconds_left([("a", 4), ("b", 8)], ["a", "b", "c"], usual=10) == 4 + 8 + 6
    assert seconds_left([("a", 4), ("a", 6)], ["a"], usual=10) == 5


def test_a_sweep_varies_one_thing(made_up: Any) -> None:
    results = sweep("omniglot-5w1s", "tasks", [1, 3], 2, measure=made_up, constant_memory=True)
    assert [(r["axis"], r["value"], r["setting"]["tasks"]) for r in results] == [
        ("tasks", 1, 1),
        ("tasks", 3, 3),
    ]
    assert {r["threads"] for r in results} == {2}
    assert all(r["setting"]["constant_memory"] for r in results)
    assert not any("float64_rel_error" in r for r in results)
    threads = sweep("omniglot-5w1s", "threads", [1, 2], 9, measure=made_up)
    assert [r["threads"] for r in threads] == [1, 2]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``arguments(WORDS)``: those of ``gametalearn bench WORDS``, parsed."""
    from gametalearn import cli

    parser = cli.parser_of(["bench"])
    return lambda *words: parser.parse_args(["bench", *words])


def test_the_command_prints_a_table(
    arguments: Any, made_up: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run(arguments("--threads", "1", "--repeats", "1"), made_up)
    out, err = capsys.readouterr()
    assert "2.50 ± 0.00 times slower" in out
    assert "not to be published" not in out
    assert err.splitlines()[0].startswith("gametalearn: bench: gametalearn, round 1 of 3")
    run(arguments("--threads", "1", "--rounds", "1"), made_up)
    assert "not to be published: fewer than 3 rounds" in capsys.readouterr().out


def test_a_sweep_is_drawn(
    arguments: Any, made_up: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SWEEP_VALUES, "tasks", (1, 3))
    file = tmp_path / "sweep.json"
    run(arguments("--sweep", "tasks", "--threads", "1", "--json", str(file)), made_up)
    assert [r["value"] for r in json.loads(file.read_text())] == [1, 3]
    assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_the_help_explains_every_field(made_up: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_bench("omniglot-5w1s", 1, measure=made_up)
    assert set(result) == EXPLAINED
    assert main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    words = set(text.replace(",", " ").split())
    assert set(result) <= words
    assert "axis" in words
    assert "python -m gametalearn.benchmark --side learn2learn" in text


def test_bad_arguments_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=r"config must be one of omniglot-5w1s, .*; got 'cifar'"):
        run_bench("cifar")
    for name in ("threads", "rounds", "repeats"):
        bad: dict[str, Any] = {name: 0}
        with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
            run_bench("omniglot-5w1s", **bad)
    with pytest.raises(InputError, match=r"--sweep must be one of tasks, .*; got 'ways'"):
        sweep("omniglot-5w1s", "ways", [1])
    assert main(["bench", "--config", "cifar"]) == 2
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    capsys.readouterr()
    assert main(["bench"]) == 2
    assert capsys.readouterr().err == (
        "gametalearn: bench: learn2learn cannot be imported (No module named 'learn2learn'); "
        "install it with `make learn2learn`\n"
    )
