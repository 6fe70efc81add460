"""The device that the numerical tests compute on, for the whole session."""

from __future__ import annotations

import pytest
import torch

from tests.support import device as chosen


def pytest_configure() -> None:
    """End at once where there is no such device; on a GPU, float32 is float32 in every test.

    By itself PyTorch computes convolutions in TF32 there, whose errors are a thousand times larger
    than those that the tests allow.
    """
    if (why := chosen.unfit(chosen.DEVICE)) is not None:
        raise pytest.UsageError(
            f"{chosen.VARIABLE}={chosen.DEVICE}: {why}; unset it to test on the CPU"
        )
    if chosen.DEVICE != "cpu":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(scope="session")
def device() -> str:
    """What GAMETALEARN_TEST_DEVICE names, ``"cpu"`` by default."""
    return chosen.DEVICE
