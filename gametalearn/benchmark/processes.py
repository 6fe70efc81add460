"""One process for one side: started, heard and, whatever happens, ended."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gametalearn.benchmark.settings import Setting
from gametalearn.benchmark.sides import Side
from gametalearn.errors import InputError

__all__ = ["Job", "end_with_parent", "in_process"]

Part = Side | Literal["reference"]


@dataclass(frozen=True)
class Job:
    """What one process does.

    Attributes:
        part: a side to time, or ``"reference"``: to compare the rows that sides have left.
        config: the name that messages call it by.
        setting: what is measured.
        threads, repeats: see `time_side`.
        rows: folder for the rows; None to leave none.
        batches: batches of which rows are left.
        device: what a side is computed on; the loop that rows are compared with is on the CPU.
    """

    part: Part
    config: str
    setting: Setting
    threads: int
    repeats: int
    rows: Path | None = None
    batches: int = 1
    device: str = "cpu"

    def words(self) -> list[str]:
        """The arguments of ``python -m gametalearn.benchmark``."""
        words = ["--side", self.part, "--config", self.config, "--threads", str(self.threads)]
        words += ["--repeats", str(self.repeats), "--batches", str(self.batches)]
        words += ["--device", self.device]
        words += ["--setting", json.dumps(dataclasses.asdict(self.setting))]
        return words if self.rows is None else [*words, "--rows", str(self.rows)]


def in_process(job: Job) -> dict[str, Any]:
    """What a process of its own answers to a job.

    Raises:
        InputError: it failed; the message is its last line, and its notes are all of them.
    """
    return answer_of(job.words(), job.part)


def answer_of(words: Sequence[str], name: str) -> dict[str, Any]:
    """The JSON object that ``python -m gametalearn.benchmark`` prints last."""
    code, out, err = _run([sys.executable, "-P", "-m", "gametalearn.benchmark", *words])
    lines = [line for line in err.splitlines() if line.strip()]
    if code:
        last = lines[-1].strip() if lines else _ending(code)
        error = InputError(
            last if code == 2 and last.startswith("bench: ")
            else f"bench: {name} failed in its process: {last}"
        )  # fmt: skip
        error.add_note(err)
        raise error
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    return answer


def _run(command: list[str]) -> tuple[int, str, str]:
    """Exit code and output of a process that does not outlive this call, nor this process.

    It has a session of its own, so that a terminal's Ctrl-C reaches this process alone, which ends
    the other; its standard input ends when this process does, however that comes about.
    """
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    read, write = os.pipe()
    try:
        with subprocess.Popen(
            [*command, "--attached"],
            stdin=read,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate()
            finally:
                process.kill()
                process.wait()
    finally:
        os.close(read)
        os.close(write)
    return process.returncode, out, err


def end_with_parent() -> None:
    """End this process when its standard input does; a thread waits for that, and costs nothing."""

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code} without a message"
    why = " (the system may be short of memory)" if -code == signal.SIGKILL else ""
    return f"ended by {signal.Signals(-code).name}{why}"
