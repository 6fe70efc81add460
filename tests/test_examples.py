"""Programs that users start from: each is short, runs, and does what it says."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gametalearn import registry
from tests.support.commands import run
from tests.support.pages import ROOT
from tests.support.runs import lines

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"

PROGRAMS = {
    "accelerate_loop.py": "sum of losses: ",
    "learn2learn_maml.py": "squared error on unseen tasks: ",
    "lora_fomaml.py": "squared error on unseen tasks: ",
    "own_parts.py": "clipped  .* (no difference shown|ahead|behind)\n",
    "protonet.py": "accuracy on unseen scripts: ",
    "torchjd_losses.py": "agreement: mean loss ",
}
"""Each program, and how a line that it prints begins."""


def test_all_of_them_are_tested_and_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    found = {file.name for file in EXAMPLES.iterdir()} - {"README.md"}
    assert found == {
        *PROGRAMS, "embeddings.py", "tokens.py", "torchrun_own.py", "plugin", "slurm_array.sh", NOTEBOOK.name
    }  # fmt: skip
    assert found == set(re.findall(r"^\| \[([\w.]+)\]", listed, re.MULTILINE))


def test_they_are_short() -> None:
    for file in [*EXAMPLES.rglob("*.py"), *EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.toml")]:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 60, file


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, with one thread: everything here is small."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def ran(name: str) -> str:
    """What a program prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out, torch.random.fork_rng(devices=[]):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return out.getvalue()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs_and_what_it_trains_improves(name: str, elsewhere: Path) -> None:
    if name == "accelerate_loop.py":
        pytest.importorskip("accelerate", reason="accelerate is not installed")
    out = ran(name)
    assert re.search(PROGRAMS[name], out), out
    for before, after in re.findall(r"([\d.]+)%? before, ([\d.]+)%? after", out):
        assert (float(after) < float(before)) == ("accuracy" not in out), out


@pytest.mark.parametrize("name", ["embeddings.py", "tokens.py"])
def test_own_data_is_learned_from(name: str, elsewhere: Path) -> None:
    before, after = runpy.run_path(str(EXAMPLES / name))["main"](iterations=60)
    assert len(before.values) == len(after.values) == 300
    assert after.mean - after.ci95 > before.mean + before.ci95


def test_a_run_over_embeddings_goes_on_and_is_the_same(elsewhere: Path) -> None:
    main = runpy.run_path(str(EXAMPLES / "embeddings.py"))["main"]
    first = main(elsewhere / "run", iterations=4)[1]
    again = main(elsewhere / "run", iterations=4)[1]  # finished: nothing is trained
    assert (first.values == again.values).all()


def test_a_rule_from_an_installed_package(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = shutil.copytree(EXAMPLES / "plugin", elsewhere / "plugin")
    words = "install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation"
    subprocess.run(
        [sys.executable, "-m", "pip", *words.split(), "--target", "site", str(package)], check=True
    )
    monkeypatch.syspath_prepend("site")
    registry._entries.cache_clear()
    try:
        code, shown, _ = run(capsys, "train --help")
        assert not code
        assert "clipped" in shown
        small = "--iterations 1 --meta-batch 3 --hidden 4 --validation-episodes 2 --log-every 1"
        rule = "--rule clipped --rule-options clipped.c=0.001"
        code, _, error = run(capsys, f"train --dataset sinusoid {small} {rule} --quiet --out a")
        assert not code, error
    finally:
        registry._entries.cache_clear()
    (line,) = lines(Path("a"))
    assert all(0 < weight < 0.1 / 3 for weight in line["effective"])  # far below the mean's 1/3


def test_two_processes_find_what_one_finds(elsewhere: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = subprocess.run(
        [sys.executable, *command, str(EXAMPLES / "torchrun_own.py")],
        env=env, text=True, capture_output=True,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    (Path("runs")).rename("both")
    two, one = (
        float(out.partition("mse ")[2].split()[0]) for out in (done.stdout, ran("torchrun_own.py"))
    )
    assert "2 process(es)" in done.stdout
    assert two == pytest.approx(one, rel=1e-3)


# ---------------------------------------------------------------------------------------------
# the notebook


def source_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def printed(cells: list[dict[str, Any]]) -> list[str]:
    """What each cell of code printed, with # for every number: they may differ by machine."""
    texts = [
        "".join("".join(o["text"]) for o in cell["outputs"] if o.get("name") == "stdout")
        for cell in cells
    ]
    return [re.sub(r"\d+(\.\d+)?", "#", text) for text in texts]


def executed(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells with what they print now: in a kernel, or in this process where there is none."""
    if importlib.util.find_spec("nbclient") and importlib.util.find_spec("ipykernel"):
        import nbclient
        import nbformat

        found = nbformat.read(NOTEBOOK, as_version=4)
        nbclient.NotebookClient(found, timeout=300, kernel_name="python3").execute()
        return [dict(cell) for cell in found.cells if cell["cell_type"] == "code"]
    names: dict[str, Any] = {"__name__": "__main__"}
    new = []
    with torch.random.fork_rng(devices=[]):
        for cell in cells:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(source_of(cell), str(NOTEBOOK), "exec"), names)
            new.append({**cell, "outputs": [{"name": "stdout", "text": out.getvalue()}]})
    return new


def test_the_notebook_runs_and_stands_with_its_outputs(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 40_000
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert not [output for output in outputs if output.get("name") == "stderr"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert printed(executed(cells)) == printed(cells), (
        "run it anew: jupyter execute --inplace examples/quickstart.ipynb"
    )
