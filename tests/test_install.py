"""What the texts say about installing leads somewhere: each line names what there is, and works."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

import gametalearn
from gametalearn.registry import TORCHJD_PACKAGE

ROOT = Path(gametalearn.__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("*/README.md")),
]
SOURCES = [
    *PAGES,
    *sorted(ROOT.glob("gametalearn/**/*.py")),
    *sorted(ROOT.glob("experiments/*.py")),
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def commands(file: Path) -> list[str]:
    """``pip install ...`` as it stands in backquotes, in a block or at the end of an error."""
    text = re.sub(r"install\n\s*", "install ", file.read_text(encoding="utf-8"))
    found = re.findall(r"pip install [^`\"\n;]+", text)
    lines = (line.partition(", ")[0].strip() for line in found)  # a sentence may go on
    return [line.replace("{TORCHJD_PACKAGE}", TORCHJD_PACKAGE) for line in lines]


def requirements(command: str) -> list[str]:
    words = shlex.split(command.split("#")[0])[2:]
    groups = {words[i + 1] for i, w in enumerate(words[:-1]) if w in ("--group", "--find-links")}
    return [w for w in words if not w.startswith("-") and w not in groups]


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=!~ ;]", requirement)[0].lower().replace("_", "-")


def extras_of(requirement: str) -> list[str]:
    found = re.search(r"\[(.*?)\]", requirement)
    return [extra.strip() for extra in found[1].split(",")] if found else []


ALL = [(file, command) for file in SOURCES for command in commands(file)]


def test_there_are_lines() -> None:
    assert any("torchjd" in command for _, command in ALL)


@pytest.mark.parametrize(("file", "command"), ALL, ids=lambda x: str(x).rpartition("/")[2])
def test_an_install_line_names_what_there_is(file: Path, command: str) -> None:
    known = {name_of(r) for r in itertools.chain(PROJECT["dependencies"], *EXTRAS.values())}
    for requirement in requirements(command):
        if requirement.startswith("."):
            assert set(extras_of(requirement)) <= EXTRAS.keys(), f"{file}: {command}"
        else:
            assert name_of(requirement) != "gametalearn", f"{file}: it is not published: {command}"
            assert name_of(requirement) in known, f"{file}: {command}"


def test_extras_that_are_named_are_there() -> None:
    for file in SOURCES:
        for extras in re.findall(r"gametalearn\[([\w,-]+)\]", file.read_text(encoding="utf-8")):
            assert set(extras.split(",")) <= EXTRAS.keys(), file
    assert EXTRAS["torchjd"] == [TORCHJD_PACKAGE]


def test_make_targets_that_are_named_are_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for file in [*SOURCES, ROOT / "pyproject.toml"]:
        text = file.read_text(encoding="utf-8")
        named = re.findall(r"`make ([\w-]+)", text)
        named += re.findall(r"^make ([\w-]+)", text, flags=re.MULTILINE)
        assert set(named) <= targets, file


def run(words: list[str], cwd: Path) -> str:
    """What a program prints that is run as by a user: no folder of ours is on Python's path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_install_lines_work_in_a_fresh_environment(tmp_path: Path) -> None:
    """From a clone, and from a wheel; dependencies are this environment's, to fetch no gigabytes."""
    clone = tmp_path / "clone"
    run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", str(clone)], tmp_path)
    lines = {c for page in PAGES for c in commands(page) if "--group" not in c}
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), "."], clone)
    (wheel,) = tmp_path.glob("gametalearn-*.whl")
    for number, line in enumerate([*sorted(lines), f"pip install {wheel}"]):
        place = tmp_path / f"env{number}"
        venv.create(place, with_pip=True)
        (packages,) = place.glob("lib/python*/site-packages")
        (packages / "shared.pth").write_text(sysconfig.get_path("purelib"))
        python = place / "bin" / "python"
        install = [str(python), "-m", "pip", "install", "-q"]
        run([*install, *shlex.split(line.split("#")[0])[2:]], clone)
        installed = any(w.startswith(".") or w.endswith(".whl") for w in requirements(line))
        if installed:
            asked = "import gametalearn, gametalearn.report; print(gametalearn.__file__)"
            asked += "; import importlib.resources as r"
            asked += "; r.files('gametalearn').joinpath('report.html.jinja').read_text()"
            if "torchjd" in line:
                asked += "; import gametalearn.bridges.torchjd"
            assert run([str(python), "-c", asked], tmp_path).startswith(str(packages)), line
            run([f"{place}/bin/gametalearn", "--version"], tmp_path)
