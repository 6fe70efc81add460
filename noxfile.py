"""The matrix of versions: `nox -l` lists it, `nox -s NAME` runs a session of it.

`make package` installs nox into .venv-package. Each session makes an environment of its own, in which
pip puts the versions that the session names; torch alone is 1 to 6 GB in each.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import nox

nox.options.sessions = ["lowest", "package"]
nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = True

ROOT = Path(__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

NUMERICAL = (
    "tests/engine",
    "tests/weighting",
    "tests/bridges",
    "tests/test_gradients.py",
    "tests/test_adaptation.py",
    "tests/test_prototypes.py",
    "tests/test_models.py",
    "tests/test_normalisation.py",
    "tests/test_protocols.py",
    "tests/test_update.py",
    "tests/test_checkpoint.py",
    "tests/test_evaluation.py",
    "tests/test_objectives.py",
    "tests/test_training.py",
    "tests/test_statistics.py",
)
"""The numerical suite: what is computed, against independent oracles."""

TOOLS = ("pytest", "pytest-xdist", "hypothesis", "psutil")
"""Requirements of these tests, among those of the extra `dev`."""

EXTRAS = ("tensorboard", "torchvision", "torchjd")
"""Those whose lower bounds go with the others. Some of TorchJD's rules need cvxpy, which takes numpy 2."""

CONTEMPORARIES = ("pyparsing<3.3",)
"""What our dependencies' lowest versions need in turn, where a newer one makes them warn: warnings are
errors in tests. matplotlib 3.9 calls what pyparsing 3.3 deprecates."""

FILES = (
    "tests/data",
    "tests/test_episodes.py",
    "tests/test_figures.py",
    "tests/test_report.py",
    "tests/test_sheet.py",
    "tests/test_cli.py",
    "tests/test_tensorboard.py",
)
"""What the other dependencies are for: data sets, figures, reports, the command line."""

TRIED = (
    ("3.11", "2.6.0"),
    ("3.11", "2.9.1"),
    ("3.11", "2.13.0"),
    ("3.11", "2.14.1"),
    ("3.13", "2.14.1"),
)
UNTRIED = (("3.12", "2.14.1"), ("3.13", "2.6.0"), ("3.14", "2.14.1"))
"""Versions of Python and torch. `.ci/run` runs the whole suite under 3.11 and 2.14.1; under the others of
`TRIED` ran what CONTRIBUTING.md lists. For `UNTRIED` no interpreter was at hand, or no time."""


def suite(session: nox.Session, *files: str) -> None:
    """The tests that are named after ``--``, or these files."""
    chosen = session.posargs or ["-n", "logical", *files]
    session.run("python", "-m", "pytest", *chosen, env={"PYTHONPATH": str(ROOT)})


@nox.session
@nox.parametrize(
    ("python", "torch"),
    [
        *(nox.param(*pair, id=f"python{pair[0]}-torch{pair[1]}") for pair in TRIED),
        *(nox.param(*pair, id=f"python{pair[0]}-torch{pair[1]}-untried") for pair in UNTRIED),
    ],
)
def numerical(session: nox.Session, torch: str) -> None:
    """The numerical suite under one version of Python and of torch, all else the newest."""
    session.install(f"torch=={torch}", f"{ROOT}[torchjd]", *tools(*TOOLS, "torchjd"))
    suite(session, *NUMERICAL)


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """The numerical suite, and the files that use other dependencies, under the lower bounds of all."""
    extras = PROJECT["optional-dependencies"]
    bounds = PROJECT["dependencies"] + [r for name in EXTRAS for r in extras[name]] + tools(*TOOLS)
    session.install(*map(lower_bound, bounds), *CONTEMPORARIES)
    session.install("--no-deps", str(ROOT))
    suite(session, *NUMERICAL, *FILES, "--ignore=tests/bridges/test_torchjd.py")


def tools(*names: str) -> list[str]:
    """What the extra ``dev`` requires under these names."""
    dev = PROJECT["optional-dependencies"]["dev"]
    return [r for r in dev if re.match(r"[\w-]+", r)[0] in names]


def lower_bound(requirement: str) -> str:
    """``name>=1.2,<3`` as ``name==1.2``."""
    return re.sub(r">=([\w.]+).*", r"==\1", requirement)


@nox.session(
    python=["3.11", "3.12", "3.13", "3.14"]
)  # untried: pytest -m slow tests/test_package.py is
def package(session: nox.Session) -> None:
    """The wheel, installed as a user does, runs the demo in an empty folder."""
    session.install("build")
    out = Path(session.create_tmp())
    session.run("python", "-m", "build", "--wheel", "--outdir", str(out / "dist"), str(ROOT))
    (wheel,) = (out / "dist").glob("*.whl")
    session.install(str(wheel))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    flags = re.search(r"^DEMO_FLAGS := (.*)$", makefile, flags=re.MULTILINE)
    empty = out / "empty"
    empty.mkdir()
    with session.chdir(empty):
        session.run("gametalearn", "compare", *shlex.split(flags[1]), "--out", "demo",
                    env={"GAMETALEARN_DATA": str(empty / "data")})  # fmt: skip
