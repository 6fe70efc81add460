"""``gametalearn bench``: one meta-gradient of gametalearn beside learn2learn's, and its errors.

The same model, batch, threads and order of differentiation on both sides. learn2learn computes the
gradient of the summed query loss, task by task, as its users do; gametalearn computes the rows of
every task.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gametalearn.adaptation import MAML, default_loss, model_parameters
from gametalearn.engine.allocator import keep_memory
from gametalearn.engine.floor import floor_of
from gametalearn.engine.plan import choose
from gametalearn.engine.task import data_of
from gametalearn.episodes import TaskBatch
from gametalearn.errors import InputError
from gametalearn.gradients import meta_gradients
from gametalearn.models import Conv4

__all__ = ["CONFIGS", "Setting", "run", "run_bench", "sweep"]

Side = Literal["gametalearn", "learn2learn"]
AXES = ("tasks", "steps", "shots", "threads")


@dataclass(frozen=True)
class Setting:
    """What is measured; the published ones stand in `CONFIGS`.

    Attributes:
        tasks, ways, shots, queries: the batch; queries a class.
        steps, inner_lr: the inner loop, a rate for the mean loss.
        channels, image_size, hidden, pool: the Conv4.
        first_order: FOMAML on both sides.
        constant_memory: gametalearn's option of that name.
    """

    tasks: int = 16
    ways: int = 5
    shots: int = 1
    queries: int = 1
    steps: int = 1
    inner_lr: float = 0.4
    channels: int = 1
    image_size: int = 28
    hidden: int = 64
    pool: Literal["stride", "max"] = "stride"
    first_order: bool = False
    constant_memory: bool = False

    def model(self) -> Conv4:
        """The network, from a fixed seed."""
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return Conv4(self.ways, self.channels, self.image_size, self.hidden, self.pool)

    def batch(self, seed: int = 0) -> TaskBatch:
        """Random images of the right shapes: speed does not depend on them."""
        g = torch.Generator().manual_seed(seed)
        shape = (self.channels, self.image_size, self.image_size)

        def part(each: int) -> tuple[Tensor, Tensor]:
            y = torch.arange(self.ways).repeat(self.tasks, each)
            return torch.rand(*y.shape, *shape, generator=g), y

        support, query = part(self.shots), part(self.queries)
        return TaskBatch(*support, *query, torch.zeros(self.tasks, dtype=torch.int64))

    def learner(self) -> MAML:
        """MAML with these steps."""
        return MAML(self.inner_lr, self.steps, self.first_order)


CONFIGS = {
    "omniglot-5w1s": Setting(),
    "omniglot-5w1s-q15": Setting(queries=15),
    "mini-imagenet-5w1s": Setting(
        tasks=4,
        queries=15,
        steps=5,
        inner_lr=0.05,
        channels=3,
        image_size=84,
        hidden=32,
        pool="max",
    ),
}
REPEATS = {"omniglot-5w1s": 21, "omniglot-5w1s-q15": 11, "mini-imagenet-5w1s": 5}
ERROR_BATCHES = {"omniglot-5w1s": 8, "omniglot-5w1s-q15": 4, "mini-imagenet-5w1s": 2}
KINK = 3e-5
"""Relative float32 error of a row from which on a kink was crossed; without, it is about 3e-6."""


def learn2learn_gradient(
    setting: Setting, model: nn.Module, batch: TaskBatch
) -> Callable[[], list[Tensor]]:
    """A function that computes each task's meta-gradient with learn2learn's MAML."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its dependencies, when imported
            import learn2learn as l2l
    except ImportError as error:
        raise InputError(
            f"bench: learn2learn cannot be imported ({error}); install it with `make learn2learn`"
        ) from error
    maml = l2l.algorithms.MAML(model, lr=setting.inner_lr, first_order=setting.first_order)
    parameters = list(model.parameters())

    def gradient() -> list[Tensor]:
        rows = []
        for i in range(len(batch)):
            learner = maml.clone()
            for _ in range(setting.steps):
                learner.adapt(F.cross_entropy(learner(batch.support_x[i]), batch.support_y[i]))
            loss = F.cross_entropy(learner(batch.query_x[i]), batch.query_y[i])
            loss.backward()  # type: ignore[no-untyped-call]
            rows.append([p.grad for p in parameters])
            for p in parameters:
                p.grad = None
        return [torch.cat([g.flatten() for g in row]) for row in rows]  # type: ignore[union-attr]

    return gradient


def _ours(setting: Setting, model: nn.Module, batch: TaskBatch) -> Callable[[], Tensor]:
    learner = setting.learner()
    constant = setting.constant_memory
    return lambda: meta_gradients(model, batch, learner, constant_memory=constant).rows


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _alternate(calls: Iterable[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Times of calls made in turn, after one call of each that is not counted."""
    calls = list(calls)
    rounds = [[_milliseconds(call) for call in calls] for _ in range(repeats + 1)]
    return [list(times) for times in zip(*rounds[1:], strict=True)]


def _peak_rss_mb() -> float:
    """The most memory this process has held; `getrusage` would count its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = [x for x in status.read_text().splitlines() if x.startswith("VmHWM")]
        return int(lines[0].split()[1]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _alone(setting: Setting, threads: int, side: Side, repeats: int) -> dict[str, float]:
    """What one side takes in a process of its own, its allocator as it comes: ``ms``, ``rss_mb``."""
    command = [sys.executable, "-m", "gametalearn.benchmark", side, str(threads), str(repeats)]
    text = json.dumps(dataclasses.asdict(setting))
    done = subprocess.run([*command, text], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"bench: {side} alone failed: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _alone_main(side: str, threads: str, repeats: str, text: str) -> None:
    setting = Setting(**json.loads(text))
    torch.set_num_threads(int(threads))
    model, batch = setting.model(), setting.batch()
    make = _ours if side == "gametalearn" else learn2learn_gradient
    (times,) = _alternate([make(setting, model, batch)], int(repeats))
    print(json.dumps({"ms": statistics.median(times), "rss_mb": _peak_rss_mb()}))


def _errors(setting: Setting, batches: int) -> dict[str, Any]:
    """Relative errors of the rows against the float64 loop.

    Of the batch that is timed as a whole, and over the tasks of several batches. In a few tasks of
    each, rounding moves a number across the kink of a ReLU or a max-pool, on either side: they
    decide the error of a batch. How precise a side is, the median over tasks tells, and the share
    of tasks in which a kink was crossed.
    """
    model, double = setting.model(), setting.model().double()
    whole: dict[str, float] = {}
    tasks: dict[str, list[Tensor]] = {"gametalearn": [], "learn2learn": []}
    for seed in range(batches):
        batch = setting.batch(seed)
        wide = batch.to(dtype=torch.float64)
        reference = meta_gradients(double, wide, setting.learner(), method="loop").rows
        for side, rows in (
            ("gametalearn", _ours(setting, model, batch)()),
            ("learn2learn", torch.stack(learn2learn_gradient(setting, model, batch)())),
        ):
            error = rows.double() - reference
            tasks[side].append(error.norm(dim=1) / reference.norm(dim=1))
            whole.setdefault(side, (error.norm() / reference.norm()).item())  # of the first batch
        if seed == 0:
            error = _ours(setting, double, wide)() - reference
            largest = (error.norm(dim=1) / reference.norm(dim=1)).max().item()
    every = {side: torch.cat(parts) for side, parts in tasks.items()}
    return {
        "float64_rel_error": largest,
        "float32_rel_error": whole,
        "float32_rel_error_median": {side: e.median().item() for side, e in every.items()},
        "float32_kinks_crossed": {
            side: (e > KINK).double().mean().item() for side, e in every.items()
        },
    }


def run_bench(
    config: str,
    threads: int | None = None,
    json_path: Path | None = None,
    *,
    repeats: int | None = None,
    setting: Setting | None = None,
    alone: bool = True,
    errors: bool = True,
) -> dict[str, Any]:
    """Time one meta-gradient on both sides, alternating.

    Args:
        config: a name in `CONFIGS`.
        threads: PyTorch threads on both sides; its own choice by default.
        json_path: where to write the result.
        repeats: timed pairs; by default as many as make the median steady.
        setting: a variation, in place of ``CONFIGS[config]``.
        alone: also run each side in a process of its own (as shipped, and peak memory).
        errors: also compare with a float64 loop.

    Returns:
        Milliseconds are medians; ``speedup`` is learn2learn's time over gametalearn's with the same
        threads and allocator settings; ``*_ms_quartiles`` tells the spread; ``floor_ms`` is the
        time of the convolutions and matrix products alone; ``first_order_ms`` is gametalearn's
        FOMAML, ``first_order_floor_ms`` its floor. ``float64_rel_error`` is the largest over tasks
        of the norm of a row's error over the row's; ``float32_rel_error`` the same of the whole
        batch's rows at once. One crossed kink of ReLU or max-pool decides it, so the median over
        the tasks of `ERROR_BATCHES` batches stands beside it, and the share of them in which a
        kink was crossed.
    """
    if config not in CONFIGS:
        raise InputError(f"bench: config must be one of {', '.join(CONFIGS)}; got '{config}'")
    if threads is not None and threads < 1:
        raise InputError(f"bench: threads must be at least 1, got {threads}")
    if repeats is not None and repeats < 1:
        raise InputError(f"bench: repeats must be at least 1, got {repeats}")
    setting = CONFIGS[config] if setting is None else setting
    repeats = REPEATS[config] if repeats is None else repeats
    before = torch.get_num_threads()
    threads = before if threads is None else threads
    torch.set_num_threads(threads)
    try:
        result = _measure(config, setting, threads, repeats, errors)
        if alone:
            shipped = {side: _alone(setting, threads, side, max(2, repeats // 2)) for side in SIDES}
            result["learn2learn_as_shipped_ms"] = shipped["learn2learn"]["ms"]
            result["speedup_as_shipped"] = shipped["learn2learn"]["ms"] / result["gametalearn_ms"]
            result["peak_rss_mb"] = {side: s["rss_mb"] for side, s in shipped.items()}
    finally:
        torch.set_num_threads(before)
    result = {name: _rounded(value) for name, value in result.items()}
    if json_path is not None:
        write_json(json_path, result)
    return result


SIDES: tuple[Side, ...] = ("gametalearn", "learn2learn")


def _measure(
    config: str, setting: Setting, threads: int, repeats: int, errors: bool
) -> dict[str, Any]:
    shared = keep_memory()
    model, batch = setting.model(), setting.batch()
    ours, theirs = _ours(setting, model, batch), learn2learn_gradient(setting, model, batch)
    first_order = dataclasses.replace(setting, first_order=True)
    first_call = _milliseconds(ours)
    meta, data = model_parameters(model), data_of(batch)
    plan = choose(meta, data, threads=threads)
    floor, first_floor = (
        floor_of(model, s.learner(), default_loss, meta, data, plan) for s in (setting, first_order)
    )
    own, other, floors, first, first_floors = _alternate(
        [ours, theirs, floor, _ours(first_order, model, batch), first_floor], repeats
    )
    own_ms, other_ms = statistics.median(own), statistics.median(other)
    result: dict[str, Any] = {
        "config": config,
        "threads": threads,
        "gametalearn_ms": own_ms,
        "learn2learn_ms": other_ms,
        "speedup": other_ms / own_ms,
        "gametalearn_ms_quartiles": _quartiles(own),
        "learn2learn_ms_quartiles": _quartiles(other),
        "first_order_ms": statistics.median(first),
        "floor_ms": statistics.median(floors),
        "first_order_floor_ms": statistics.median(first_floors),
        "setup_s": max(0.0, first_call - own_ms) / 1e3,
        "setting": dataclasses.asdict(setting),
        "plan": dataclasses.asdict(plan),
        "allocator_keeps_memory": shared,
        "machine": machine(),
    }
    if errors:
        result |= _errors(setting, ERROR_BATCHES[config])
    return result


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return {k: _rounded(v) for k, v in value.items()} if isinstance(value, dict) else value


def write_json(path: Path, result: Any) -> None:
    """Write a result, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def sweep(
    config: str,
    axis: str,
    values: Iterable[int],
    threads: int | None = None,
    repeats: int = 3,
    **changes: Any,
) -> list[dict[str, Any]]:
    """`run_bench` of a config, with ``changes``, while one of tasks, steps, shots or threads varies.

    Each result has ``axis`` and ``value`` besides the fields of `run_bench`; without errors.
    """
    if axis not in AXES:
        raise InputError(f"bench: --sweep must be one of {', '.join(AXES)}; got '{axis}'")
    results = []
    for value in values:
        setting = dataclasses.replace(CONFIGS[config], **changes)
        if axis != "threads":
            setting = Setting(**{**dataclasses.asdict(setting), axis: value})
        used = value if axis == "threads" else threads
        result = run_bench(config, used, repeats=repeats, setting=setting, errors=False)
        results.append({"axis": axis, "value": value, **result})
    return results


SWEEP_VALUES = {
    "tasks": (1, 2, 4, 8, 16, 32),
    "steps": (1, 2, 3, 5, 10),
    "shots": (1, 2, 5, 10),
    "threads": tuple(n for n in (1, 2, 4, 8) if n <= (os.cpu_count() or 1)),
}


def plot_sweep(results: list[dict[str, Any]], path: Path) -> None:
    """Time and peak memory against the axis: gametalearn, learn2learn, and the floor."""
    from matplotlib.figure import Figure

    axis, config = results[0]["axis"], results[0]["config"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time_plot, memory_plot = figure.subplots(1, 2)
    x = [r["value"] for r in results]
    for label, key, style in (
        ("learn2learn", "learn2learn_ms", "s-"),
        ("gametalearn", "gametalearn_ms", "o-"),
        ("gametalearn, first order", "first_order_ms", "o:"),
        ("convolutions and products alone", "floor_ms", "k--"),
    ):
        time_plot.plot(x, [r[key] for r in results], style, label=label)
    for side, style in (("learn2learn", "s-"), ("gametalearn", "o-")):
        memory_plot.plot(x, [r["peak_rss_mb"][side] for r in results], style, label=side)
    time_plot.set(xlabel=axis, ylabel="ms a meta-gradient", ylim=(0, None))
    memory_plot.set(xlabel=axis, ylabel="peak memory of the process, MB", ylim=(0, None))
    for plot in (time_plot, memory_plot):
        plot.set_xticks(x)
        plot.grid(alpha=0.3)
        plot.legend(frameon=False, fontsize=8)
    threads = "" if axis == "threads" else f", {results[0]['threads']} threads"
    figure.suptitle(f"{config}{threads}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def run(args: argparse.Namespace) -> None:
    """``gametalearn bench``: print the figures, write them where asked."""
    changes = {"constant_memory": args.constant_memory}
    if args.sweep is None:
        setting = dataclasses.replace(CONFIGS[args.config], **changes)
        result = run_bench(
            args.config, args.threads, args.json, repeats=args.repeats, setting=setting
        )
        print(summary(result))
        return
    values = SWEEP_VALUES[args.sweep]
    results = sweep(args.config, args.sweep, values, args.threads, args.repeats or 3, **changes)
    for r in results:
        memory = r["peak_rss_mb"]
        print(
            f"{args.sweep} {r['value']:3d}: gametalearn {r['gametalearn_ms']:7.1f} ms "
            f"{memory['gametalearn']:5.0f} MB, learn2learn {r['learn2learn_ms']:7.1f} ms "
            f"{memory['learn2learn']:5.0f} MB ({r['speedup']:.2f}x), floor {r['floor_ms']:.1f} ms"
        )
    if args.json is not None:
        write_json(args.json, results)
        picture = args.json.with_suffix(".png")
        plot_sweep(results, picture)
        print(f"{args.json} and {picture}")


def summary(result: dict[str, Any]) -> str:
    """A result in a few lines."""
    errors, rss = result["float32_rel_error"], result["peak_rss_mb"]
    share = 1 - result["floor_ms"] / result["gametalearn_ms"]
    return "\n".join(
        (
            f"{result['config']}, {result['threads']} threads",
            f"  gametalearn  {result['gametalearn_ms']:8.1f} ms   "
            f"quartiles {_range(result['gametalearn_ms_quartiles'])}",
            f"  learn2learn  {result['learn2learn_ms']:8.1f} ms   "
            f"quartiles {_range(result['learn2learn_ms_quartiles'])}   "
            f"{result['speedup']:.2f} times slower",
            f"  as shipped   {result['learn2learn_as_shipped_ms']:8.1f} ms   "
            f"{result['speedup_as_shipped']:.2f} times slower",
            f"  first order  {result['first_order_ms']:8.1f} ms   "
            f"floor {result['first_order_floor_ms']:.1f} ms",
            f"  floor        {result['floor_ms']:8.1f} ms   "
            f"convolutions and products alone; {share:.0%} is overhead",
            f"  error        float64 {result['float64_rel_error']:.1e}; float32 "
            f"{errors['gametalearn']:.1e} (learn2learn {errors['learn2learn']:.1e})",
            f"  memory       {rss['gametalearn']:.0f} MB (learn2learn {rss['learn2learn']:.0f} MB)",
            f"  setup        {result['setup_s']:.1f} s, once",
            *_busy(result),
        )
    )


def _busy(result: dict[str, Any]) -> list[str]:
    load = result["machine"]["load"]
    if load <= result["threads"] + 0.5:
        return []
    return [
        f"  The machine is busy (load {load:.1f}): with more than one thread, OpenMP's waiting "
        "costs more than the work. Measure again when it is idle."
    ]


def _quartiles(times: list[float]) -> list[float]:
    return statistics.quantiles(times * 2 if len(times) == 1 else times, n=4, method="inclusive")


def _range(quartiles: list[float]) -> str:
    return f"{quartiles[0]:.1f} to {quartiles[2]:.1f}"


if __name__ == "__main__":
    _alone_main(*sys.argv[1:])
