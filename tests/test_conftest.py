"""The session's own rules, checked on small sessions that run inside this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gametalearn
from tests.support.device import DEVICE, VARIABLE, unfit

pytest_plugins = ["pytester"]

ROOT = Path(gametalearn.__file__).parents[1]

SKIPS = """
import pytest

def test_passes(): pass

def test_needs_real_data(real_data): pass

@pytest.mark.skip(reason="a mark")
def test_marked(): pass

@pytest.mark.xfail
def test_expected_to_fail(): assert False

@pytest.mark.xfail(run=False)
def test_expected_to_crash(): pass
"""

SKIPPED_MODULE = """
import pytest
pytest.importorskip("a_module_that_nobody_has")
"""


@pytest.fixture
def session(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest((ROOT / "conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile(test_skips=SKIPS)
    return pytester


def test_skips_are_skips_without_real_data(
    session: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GAMETALEARN_REAL_DATA", raising=False)
    session.makepyfile(test_module=SKIPPED_MODULE)
    session.runpytest_inprocess().assert_outcomes(passed=1, skipped=3, xfailed=2)


def test_skips_are_failures_with_real_data(
    session: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAMETALEARN_REAL_DATA", str(session.path))
    result = session.runpytest_inprocess()
    result.assert_outcomes(passed=2, errors=1, xfailed=2)
    result.stdout.fnmatch_lines(["*a mark: no test may be skipped while GAMETALEARN_REAL_DATA*"])


def test_skipped_module_is_an_error_with_real_data(
    session: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAMETALEARN_REAL_DATA", str(session.path))
    session.makepyfile(test_module=SKIPPED_MODULE)
    session.runpytest_inprocess().assert_outcomes(errors=1)


def test_missing_real_data_is_a_failure(
    session: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAMETALEARN_REAL_DATA", str(session.path / "nowhere"))
    result = session.runpytest_inprocess("-k", "needs_real_data")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*nowhere: no such folder*"])


def test_data_root_is_not_the_users(data_root: Path) -> None:
    assert os.environ["GAMETALEARN_DATA"] == str(data_root)
    assert data_root.is_dir()


@pytest.mark.parametrize(
    ("name", "told"),
    [("cuda:99", "not usable here"), ("meta", "on cpu or cuda"), ("gpu", "on cpu or cuda")],
)
def test_a_device_that_is_not_there_ends_the_session(name: str, told: str) -> None:
    """Before any test runs, in a line that names the device."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "tests/weighting/test_dtp.py"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, VARIABLE: name}, capture_output=True, text=True
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = [x for x in (done.stdout + done.stderr).splitlines() if VARIABLE in x]
    assert line.startswith(f"ERROR: {VARIABLE}={name}: ")
    assert told in line
    assert line.endswith("; unset it to test on the CPU")


def test_the_device_is_the_one_that_was_asked_for(device: str) -> None:
    assert device == (os.environ.get(VARIABLE) or "cpu") == DEVICE
    assert unfit(device) is None
