"""Points that train whole runs or start processes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.gpu_check.outcomes import CARD, EXACT, Outcome, Sizes, error_of, outcome
from gametalearn import EpisodeSampler, TrainConfig, train
from gametalearn.benchmark import run_bench
from gametalearn.checkpoint import load_checkpoint
from gametalearn.images import ClassImages

__all__ = ["check_bench", "check_processes", "check_resume", "check_tests", "check_training"]

ROOT = Path(__file__).resolve().parents[2]
CLOSE = 1e-3
"""The largest relative difference between weights trained in two ways, after a few iterations."""


def made_up_images(seed: int, size: int, channels: int = 3, classes: int = 20) -> ClassImages:
    generator = torch.Generator().manual_seed(seed)
    shape = (classes * 20, channels, size, size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return ClassImages.from_tensors(images, torch.arange(len(images)) // 20)


def check_training(device: str, sizes: Sizes) -> Outcome:
    """A whole training run with mini-ImageNet's published settings, on random images."""
    config = TrainConfig.of(
        "mini-imagenet", device=device, iterations=sizes.iterations, validation_episodes=2,
        validate_every=sizes.iterations, checkpoint_every=sizes.iterations,
        log_every=sizes.iterations // 3, **sizes.training,
    )  # fmt: skip
    size = 84 if sizes is CARD else sizes.image_size
    source, validation = (
        EpisodeSampler(made_up_images(seed, size), config.ways, config.shots, config.queries, seed)
        for seed in (0, 1)
    )
    lines: list[tuple[float, dict[str, Any]]] = []
    run = train(
        config, source=source, validation=validation, progress=False,
        watch=lambda run, record: lines.append((time.perf_counter(), record)),
    )  # fmt: skip
    (start, first), (end, last) = lines[1], lines[-1]
    rate = (last["iteration"] - first["iteration"]) / (end - start)
    finite = all(bool(torch.isfinite(p).all()) for p in run.model.parameters())
    return outcome(
        finite, f"{rate:.1f} iterations/s (aim on a card: 40 to 80)", iterations_per_second=rate
    )


def tiny(device: str, iterations: int) -> TrainConfig:
    return TrainConfig.of(
        "sinusoid", device=device, iterations=iterations, meta_batch=4, hidden=8, log_every=2,
        validation_episodes=4, validate_every=3, checkpoint_every=3, rule="agreement",
    )  # fmt: skip


def compared(one: dict[str, Tensor], other: dict[str, Tensor], what: str) -> Outcome:
    """Weights that were trained in two ways: close to each other, and perhaps bit-identical."""
    error = error_of(*(torch.cat([t.cpu().flatten() for t in w.values()]) for w in (one, other)))
    bits = all(torch.equal(one[name].cpu(), other[name].cpu()) for name in one)
    said = f"{what}: {'bit-identical' if bits else f'relative difference {error:.1e}'}"
    return outcome(error <= CLOSE, said, difference=error, bit_identical=bits)


def check_resume(device: str, sizes: Sizes) -> Outcome:
    """A run that stopped and resumed has the weights of one that did not stop."""
    with tempfile.TemporaryDirectory() as folder:
        whole = train(tiny(device, 6), progress=False).model.state_dict()
        train(tiny(device, 3), Path(folder) / "run", progress=False)
        halves = train(tiny(device, 6), Path(folder) / "run", progress=False).model.state_dict()
    return compared(halves, whole, "resumed and whole")


def check_bench(device: str, sizes: Sizes) -> Outcome:
    """A meta-gradient beside learn2learn's, on the same device."""
    if importlib.util.find_spec("learn2learn") is None:
        return Outcome("SKIP", "learn2learn is not installed; `make gpu-check` builds it")
    found = {
        name: run_bench(
            name, rounds=sizes.rounds, repeats=sizes.repeats, device=device, setting=setting,
        )
        for name, setting in sizes.settings.items()
    }  # fmt: skip
    keys = ("float64_rel_error", "float64_rel_error_learn2learn")
    exact = all(result[key] <= EXACT for result in found.values() for key in keys)
    told = ", ".join(f"{name} {result['speedup']:.1f} times" for name, result in found.items())
    aims = "aims on a card: 8, 4 and 4"
    return outcome(exact, f"learn2learn takes {told} as long ({aims})", results=found)


def check_processes(device: str, sizes: Sizes) -> Outcome:
    """Two processes, with a GPU each, train the same weights as one."""
    cards = torch.cuda.device_count() if device != "cpu" else None
    if cards is not None and cards < 2:
        return Outcome("SKIP", "there is only one GPU")
    kind = "cpu" if device == "cpu" else "cuda"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = [f"{key.replace('_', '-')} = {json.dumps(value)}" for key, value in (
            ("dataset", "sinusoid"), ("device", kind), ("iterations", 4), ("meta_batch", 4),
            ("hidden", 8), ("validation_episodes", 4), ("rule", "agreement"), ("threads", 1),
        )]  # fmt: skip
        (folder / "c.toml").write_text("\n".join(config) + "\n")
        several = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
        for out, before in (("one", ()), ("two", several)):
            command = [sys.executable, "-m", *before, "gametalearn", "train", "--quiet"]
            command += ["--config", str(folder / "c.toml"), "--out", str(folder / out)]
            env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode:
                return Outcome("FAIL", f"{out}: {(done.stderr.strip() or 'no message')[-300:]}")
        one, two = (load_checkpoint(folder / n / "checkpoint.pt")["meta"] for n in ("one", "two"))
    return compared(two, one, "two processes and one")


def check_tests(device: str, sizes: Sizes) -> Outcome:
    """The numerical part of the test suite."""
    if importlib.util.find_spec("pytest") is None or not (ROOT / "tests").is_dir():
        return Outcome("SKIP", "pytest or the tests are missing; `make gpu-check` has both")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sizes.tests]
    env = os.environ | {"GAMETALEARN_TEST_DEVICE": device}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    last = lines[-1].strip("= ") if lines else done.stderr.strip()[-300:]
    return outcome(done.returncode == 0, last, output=lines[-40:] if done.returncode else [])
