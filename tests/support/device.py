"""The device that the numerical tests compute on: what GAMETALEARN_TEST_DEVICE names, else the CPU.

Tests take it as the fixture ``device``; helpers that make the tensors of many tests take it from here.
What they compare with is computed on the CPU.
"""

from __future__ import annotations

import os

import torch

from gametalearn.environment import unusable

__all__ = ["DEVICE", "VARIABLE", "unfit"]

VARIABLE = "GAMETALEARN_TEST_DEVICE"
DEVICE = os.environ.get(VARIABLE) or "cpu"


def unfit(device: str) -> str | None:
    """Why the tests cannot compute on a device; None where they can. They need float64."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        return "the tests compute on cpu or cuda"
    return unusable(device)
