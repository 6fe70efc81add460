"""Rules for the whole test session. It stands at the root so that doctests keep them too."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: one worker a core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REAL_DATA = "GAMETALEARN_REAL_DATA"
EXCUSED = ["this system mounts no disk"]
"""Why a test may be skipped all the same."""
if sys.version_info >= (3, 13):
    EXCUSED.append("could not import 'learn2learn'")  # which does not build there


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Where real data is promised, a skipped test is a failed one, but for what this system or this Python
    cannot have.

    An xfail is no skip.
    """
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get(REAL_DATA):
        # A skip's longrepr is (file, line, reason).
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        if any(excuse in str(reason) for excuse in EXCUSED):
            return
        report.outcome = "failed"
        report.longrepr = f"{reason}: no test may be skipped while {REAL_DATA} is set"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.fixture(scope="session", autouse=True)
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Point GAMETALEARN_DATA to a folder of this session's own: the user's cache stays untouched.

    What is prepared there is kept for the session, so the glyphs are drawn once.
    """
    root = tmp_path_factory.mktemp("gametalearn-data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GAMETALEARN_DATA", str(root))
        yield root


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data that GAMETALEARN_REAL_DATA names; skips where it names none."""
    value = os.environ.get(REAL_DATA)
    if not value:
        pytest.skip(f"{REAL_DATA} is not set")
    root = Path(value).resolve()
    if not root.is_dir():
        pytest.fail(f"{REAL_DATA}={value}: no such folder; name an existing one, or unset it")
    return root


@pytest.fixture(scope="session")
def omniglot_root(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with Omniglot prepared from real data, once a session."""
    from gametalearn.data import prepare_omniglot

    root = tmp_path_factory.mktemp("omniglot")
    prepare_omniglot(root, real_data / "omniglot")
    return root


@pytest.fixture(scope="session")
def two_real_root(real_data: Path, omniglot_root: Path) -> Path:
    """The same with the 25 classes of mini-ImageNet beside it."""
    from gametalearn.data import prepare_mini_imagenet

    prepare_mini_imagenet(omniglot_root, real_data / "mini-imagenet-25")
    return omniglot_root
