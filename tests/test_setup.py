"""`.ci/make_venv.sh`, which every make target begins with; no packages, no network."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gametalearn

SCRIPT = Path(gametalearn.__file__).parents[1] / ".ci" / "make_venv.sh"


class Machine:
    """A folder to work in, and a path on which only the given interpreters stand."""

    def __init__(self, root: Path) -> None:
        self.bin = root / "bin"
        self.work = root / "work with a space"
        self.bin.mkdir()
        self.work.mkdir()
        for tool in ("sh", "cat"):
            found = shutil.which(tool)
            assert found
            (self.bin / tool).symlink_to(found)

    def add(self, name: str, command: str) -> None:
        script = self.bin / name
        script.write_text(f"#!/bin/sh\n{command}\n", encoding="utf-8")
        script.chmod(0o755)

    def make_venv(self, *python: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", str(SCRIPT), ".venv", *python],
            cwd=self.work,
            env={"PATH": str(self.bin)},
            capture_output=True,
            text=True,
            timeout=60,
        )


SHIM = "echo 'command not found' >&2; exit 127"
OTHER_VERSION = "exit 1"  # what the script's question about versions ends with, on any other Python
WORKING = f'exec "{sys.executable}" "$@"'


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_passes_over_interpreters_that_do_not_work(machine: Machine) -> None:
    machine.add("python3.11", SHIM)
    machine.add("python3.12", OTHER_VERSION)
    machine.add("python3.14", OTHER_VERSION)
    machine.add("python3", WORKING)
    result = machine.make_venv()
    assert result.returncode == 0, result.stderr
    assert "Making .venv with python3 (3.1" in result.stdout
    stamp = machine.work / ".venv" / ".python"
    assert stamp.read_text(encoding="utf-8").strip() == str(machine.work / ".venv")

    written = stamp.stat().st_mtime_ns
    again = machine.make_venv()
    assert (again.returncode, again.stdout) == (0, "")
    assert stamp.stat().st_mtime_ns == written, "a second call must not set off an installation"


@pytest.mark.parametrize("python", [(), ("python3.11",)])
def test_no_working_interpreter_is_one_line(machine: Machine, python: tuple[str, ...]) -> None:
    machine.add("python3.11", SHIM)
    result = machine.make_venv(*python)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "PYTHON=" in result.stderr
    assert not (machine.work / ".venv").exists()


def test_leaves_a_foreign_environment_alone(machine: Machine) -> None:
    machine.add("python3", WORKING)
    foreign = machine.work / ".venv" / "bin" / "python"
    foreign.parent.mkdir(parents=True)
    foreign.write_text('#!/bin/sh\n[ "$2" = "" ]\n', encoding="utf-8")  # runs, fits no version
    os.chmod(foreign, 0o755)
    result = machine.make_venv()
    assert result.returncode == 2
    assert "make clean" in result.stderr
    assert foreign.exists()


@pytest.mark.parametrize(
    ("version", "fits"),
    [((3, 10), False), ((3, 11), True), ((3, 13), True), ((3, 14), True), ((3, 15), False)],
)
def test_the_versions_that_are_taken(
    machine: Machine, version: tuple[int, int], fits: bool
) -> None:
    """An interpreter that says it is another version."""
    said = f"import sys; sys.version_info = {version}; exec(sys.argv.pop(1))"
    machine.add("python3", f"shift; exec {shlex.quote(sys.executable)} -c '{said}' \"$@\"")
    result = machine.make_venv()
    # with other arguments than `-c PROGRAM` it is no interpreter, so that no environment is made
    assert ("Making .venv with python3" in result.stdout) == fits
    assert ("no working Python" in result.stderr) != fits


def test_the_package_names_the_same_versions() -> None:
    pyproject = tomllib.loads((SCRIPT.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    prefix = "Programming Language :: Python :: 3."
    named = [c.removeprefix(prefix) for c in pyproject["project"]["classifiers"] if prefix in c]
    script = SCRIPT.read_text(encoding="utf-8")
    assert f"(3, {named[0]}) <= sys.version_info[:2] <= (3, {named[-1]})" in script
    assert " ".join(f"python3.{minor}" for minor in named) in script
