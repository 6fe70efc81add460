"""``report.html`` in a browser: headless Chromium, spoken to by its own protocol over a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gametalearn.cli import main
from gametalearn.report import html_of
from gametalearn.stored import read_results

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Browser:
    """One page of Chromium; what it asks for and complains of is kept in ``events``."""

    def __init__(self, send: int, receive: int) -> None:
        self.send, self.stream = send, os.fdopen(receive, "rb", buffering=0)
        self.events: list[dict[str, Any]] = []
        self.number, self.rest, self.session = 0, b"", ""
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            more = self.stream.read(2**16)
            assert more, "Chromium has ended"
            self.rest += more
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)  # type: ignore[no-any-return]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        words: dict[str, Any] = {"id": self.number, "method": method, "params": params}
        if self.session:
            words["sessionId"] = self.session
        os.write(self.send, json.dumps(words).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]  # type: ignore[no-any-return]
            self.events.append(message)

    def open(self, file: Path, width: int) -> None:
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=800, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self.call("Page.navigate", url=file.as_uri())
        while not self.of("Page.loadEventFired"):
            self.events.append(self._message())

    def value(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"]["value"]

    def of(self, method: str) -> list[dict[str, Any]]:
        return [e["params"] for e in self.events if e.get("method") == method]


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.fail(f"none of {', '.join(NAMES)} is on the path: install Debian's chromium")
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    # it reads from descriptor 3 and writes to 4; bash puts them there
    process = subprocess.Popen(
        [
            "bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", program,
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={profile}",
        ],
        pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs_in)
    os.close(theirs_out)
    browser = Browser(ours_out, ours_in)
    try:
        yield browser
    finally:
        process.terminate()
        process.wait(timeout=30)
        browser.stream.close()
        os.close(ours_out)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    words = (
        "compare --dataset sinusoid --iterations 8 --meta-batch 4 --hidden 8 --threads 1 --quiet"
    )
    words += " --validation-episodes 4 --log-every 1 --episodes 6 --seeds 3"
    assert main([*words.split(), "--out", str(folder)]) == 0
    return folder


MEASURED = """(() => {
  const boxes = [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect());
  return {
    title: document.title, heading: document.querySelector('h1').innerText,
    rows: document.querySelectorAll('table')[0].rows.length,
    across: document.documentElement.scrollWidth, window: innerWidth,
    pictures: boxes.map(b => [b.left, b.width, b.height]),
    scripts: document.querySelectorAll('script').length, text: document.body.innerText,
    small: Math.min(...[...document.querySelectorAll('p, li, td, th, figcaption')]
      .map(e => parseFloat(getComputedStyle(e).fontSize))),
  };
})()"""


def checked(browser: Browser, file: Path, width: int) -> dict[str, Any]:
    """Opened, it fetches nothing and complains of nothing, and all of it fits."""
    browser.open(file, width)
    found: dict[str, Any] = browser.value(MEASURED)
    assert [r["request"]["url"] for r in browser.of("Network.requestWillBeSent")] == [file.as_uri()]
    for complaint in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
        assert browser.of(complaint) == []
    assert found["across"] <= found["window"] == width
    assert len(found["pictures"]) >= 3
    for left, across, high in found["pictures"]:
        assert left >= 0
        assert across > 0.7 * min(width, 600)
        assert high > 80
    assert found["small"] >= 12
    assert found["scripts"] == 0
    return found


@pytest.mark.parametrize("width", [400, 1200])
def test_the_report_of_a_comparison(browser: Browser, compared: Path, width: int) -> None:
    found = checked(browser, compared / "report.html", width)
    assert found["title"].startswith(
        "sinusoid, regression 10-shot, maml, 8 iterations, 3 seeds x 6"
    )
    assert found["heading"] == "agreement, norm-control beside uniform"
    assert found["rows"] == 4


@pytest.mark.parametrize("width", [400, 1200])
def test_hostile_names_are_text(
    browser: Browser, compared: Path, tmp_path: Path, width: int
) -> None:
    name = "<script>document.title = 'taken'</script>"
    text = json.dumps(read_results(compared)).replace('"agreement"', json.dumps(name))
    results = json.loads(text)
    results["dataset"] = results["config"]["dataset"] = name
    file = tmp_path / "report.html"
    file.write_text(html_of(results, None, [], Path(name), missing=name))
    browser.open(file, width)
    found = browser.value(MEASURED)
    assert found["title"].startswith(f"{name}, regression")
    assert name in found["heading"]
    assert found["text"].count(name) > 3
    assert found["scripts"] == 0
    assert len(found["pictures"]) == 2
    assert found["across"] <= width


def test_it_can_be_printed(browser: Browser, compared: Path) -> None:
    browser.open(compared / "report.html", 1200)
    assert len(browser.call("Page.printToPDF")["data"]) > 20_000
