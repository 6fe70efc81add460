"""What the source archive and the wheel hold, and that the wheel works where nothing else is."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

import gametalearn

ROOT = Path(gametalearn.__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NAME = f"gametalearn-{gametalearn.__version__}"
INFO = f"{NAME}.dist-info"

CODE = {
    f"gametalearn/{p.relative_to(ROOT / 'gametalearn')}"
    for p in (ROOT / "gametalearn").rglob("*.py")
}
DATA = {"gametalearn/py.typed", "gametalearn/report.html.jinja"}
BESIDE = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both, made from a copy of the working tree, in which there are other things too."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("gametalearn", "tests", "docs", "experiments", "examples"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    (copy / "runs").mkdir()
    (copy / "runs" / "best.pt").write_bytes(b"weights")
    build = "import setuptools.build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    dist = copy / "dist"
    return {"sdist": dist / f"{NAME}.tar.gz", "wheel": dist / f"{NAME}-py3-none-any.whl"}


@pytest.fixture
def wheel(archives: dict[str, Path]) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(archives["wheel"]) as found:
        yield found


@pytest.fixture
def metadata(wheel: zipfile.ZipFile) -> Message:
    return message_from_string(wheel.read(f"{INFO}/METADATA").decode())


def test_the_wheel_holds_the_package_and_no_more(wheel: zipfile.ZipFile) -> None:
    files = {name for name in wheel.namelist() if not name.startswith(INFO)}
    assert files == CODE | DATA
    assert f"{INFO}/licenses/LICENSE" in wheel.namelist()


def test_the_source_archive_holds_what_builds_the_wheel(archives: dict[str, Path]) -> None:
    with tarfile.open(archives["sdist"]) as found:
        files = {m.name.removeprefix(f"{NAME}/") for m in found.getmembers() if m.isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    assert {f for f in files if ".egg-info/" not in f} - made == CODE | DATA | BESIDE


def test_metadata_are_complete(metadata: Message) -> None:
    assert metadata["Name"] == "gametalearn"
    assert metadata["Version"] == gametalearn.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Author"]
    assert metadata["Summary"]
    assert metadata["Keywords"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    text = metadata.get_payload()
    assert isinstance(text, str)
    assert text.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_no_address_is_a_placeholder(metadata: Message) -> None:
    for url in metadata.get_all("Project-URL", []):
        assert re.search(r", https://[a-z0-9.-]+\.[a-z]+/", url), url


def test_one_place_has_the_version() -> None:
    assert "version" in PYPROJECT["project"]["dynamic"]
    for name in ("CITATION.cff", "MANIFEST.in", "Makefile", "noxfile.py"):
        assert gametalearn.__version__ not in (ROOT / name).read_text(encoding="utf-8"), name


def test_torchvision_is_left_to_those_who_download(metadata: Message) -> None:
    needed = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert not [r for r in needed if r.startswith("torchvision")]
    assert [r for r in needed if re.fullmatch(r"torch<[\d.]+,>=[\d.]+", r)]


@pytest.mark.slow
def test_the_wheel_runs_the_demo_from_an_empty_folder(
    archives: dict[str, Path], tmp_path: Path
) -> None:
    """In an environment of its own; dependencies are this one's, to fetch no gigabytes."""
    place, empty = tmp_path / "env", tmp_path / "empty"
    venv.create(place, with_pip=True)
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    flags = re.search(r"^DEMO_FLAGS := (.*)$", makefile, flags=re.MULTILINE)
    assert flags
    empty.mkdir()
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean["GAMETALEARN_DATA"] = str(tmp_path / "data")
    for words in (
        f"python -m pip install -q --no-deps {archives['wheel']}",
        f"gametalearn compare {flags[1]} --out demo",
    ):
        subprocess.run(shlex.split(f"{place}/bin/{words}"), cwd=empty, check=True, env=clean)
    assert [p.name for p in empty.iterdir()] == ["demo"]
    results = json.loads((empty / "demo" / "results.json").read_text())
    assert results["rules"].keys() == {"uniform", "agreement", "norm-control"}
    assert (
        results["environment"]["gametalearn"] == gametalearn.__version__
    )  # of the wheel, no commit
    assert (empty / "demo" / "report.html").stat().st_size > 10_000
