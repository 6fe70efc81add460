"""What a result was computed with: versions, device, threads, command. `results.json` keeps it."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from gametalearn import __version__
from gametalearn.config import TrainConfig

__all__ = ["environment", "unusable", "version"]

VERSIONS = ("torch", "numpy", "scipy")


def environment(config: TrainConfig, command: str | None = None) -> dict[str, Any]:
    """Plain values: what a comparison's numbers depend on beside its settings.

    Args:
        config: names the device and the threads; 0 threads are PyTorch's choice, which is told.
        command: the command line that was given, if there was one.
    """
    return {
        "gametalearn": version(),
        "versions": {"python": platform.python_version(), **{n: _installed(n) for n in VERSIONS}},
        "platform": platform.platform(),
        "device": device_name(config.device),
        "threads": config.threads or torch.get_num_threads(),
        "command": command,
    }


def device_name(device: str) -> str:
    """A device, and for a GPU what it is called.

    >>> device_name("cpu")
    'cpu'
    """
    if not device.startswith("cuda"):
        return device
    return f"{device} ({torch.cuda.get_device_name(device)})"


def unusable(device: str) -> str | None:
    """Why a device cannot be used on this machine; None where it can."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        return f"not usable here ({str(error).splitlines()[0]})"
    return None


@functools.cache
def version() -> str:
    """The version, and in a git checkout the commit, and whether the package's files differ from it.

    Like ``0.1.0`` or ``0.1.0 (commit 0123456789ab, changed)``.
    """
    found = __version__
    if _git("ls-files", "--error-unmatch", "__init__.py"):  # not another project's checkout
        changed = ", changed" if _git("status", "--porcelain", "-uno", "--", ".") else ""
        found += f" (commit {_git('rev-parse', '--short=12', 'HEAD')}{changed})"
    return found


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _git(*words: str) -> str:
    """What git says of this package's folder; "" where it knows nothing of it, or is not there."""
    try:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
