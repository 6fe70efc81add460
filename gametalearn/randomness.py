"""The global random numbers of torch, NumPy and Python: put back after use, or started from a seed."""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from gametalearn.errors import InputError

__all__ = ["derived", "generator", "seeded", "start_from", "undisturbed", "word"]


def derived(seed: int, purpose: str, number: int = 0) -> int:
    """A seed for a stream of its own beside that of ``seed``, in [0, 2^32).

    PyTorch's generators on a CPU start from the last 32 bits of a seed, so a seed that is only far away, such
    as ``seed + 2**40``, gives the very same numbers.

    >>> derived(0, "augmentation") == derived(0, "augmentation"), derived(0, "augmentation") == derived(1, "augmentation")
    (True, False)
    """
    told = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return int.from_bytes(told[:4], "big")


def word(seed: int) -> int:
    """A seed in [0, 2^32) as it is, and any other one as one of these: different ones stay different streams.

    >>> word(7), word(2**32 + 7) == 7, word(-1) == word(2**32 - 1)
    (7, False, False)
    """
    try:
        seed = operator.index(seed)  # NumPy's integers too
    except TypeError as error:
        raise InputError(f"a seed must be an integer, got {seed!r}") from error
    return seed if 0 <= seed < 2**32 else derived(seed, "word")


def generator(seed: int) -> torch.Generator:
    """A generator on the CPU that starts from any integer; see `word`."""
    return torch.Generator().manual_seed(word(seed))


@contextmanager
def undisturbed(device: torch.device | None = None) -> Iterator[None]:
    """The random states of torch, numpy and Python are afterwards what they were before.

    Args:
        device: whose random numbers are kept beside those of the CPU, if it is a CUDA device.
    """
    legacy, own = np.random.get_state(), random.getstate()  # noqa: NPY002
    devices = [device] if device is not None and device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(legacy)  # noqa: NPY002
        random.setstate(own)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Within, as after `start_from`; afterwards all random numbers go on as if nothing had been.

    Args:
        seed: at least 0.
        device: whose random numbers start from the seed, too, if it is a CUDA device.

    >>> with seeded(3):
    ...     first = float(torch.rand(())), random.random()
    >>> with seeded(3):
    ...     print(first == (float(torch.rand(())), random.random()))
    True
    """
    with undisturbed(device):
        start_from(seed)
        if device is not None and device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def start_from(seed: int) -> None:
    """Let the random numbers of torch (on the CPU), numpy and Python start from a seed of at least 0."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
