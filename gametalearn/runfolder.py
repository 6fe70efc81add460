"""A run's folder: ``config.toml`` and checkpoints; written and read."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from torch import nn

from gametalearn import registry
from gametalearn.checkpoint import file_of, kept_in, load_checkpoint, save_checkpoint
from gametalearn.config import TrainConfig
from gametalearn.distributed import ALONE, Team
from gametalearn.environment import unusable
from gametalearn.errors import InputError, SharedError, summary
from gametalearn.files import held, replacing
from gametalearn.losses import Loss, default_loss
from gametalearn.metrics import Metrics
from gametalearn.provenance import (
    RECORD,
    Record,
    checked,
    keep,
    other_settings,
    relocated,
    same_run,
)
from gametalearn.resuming import check_changes
from gametalearn.run import Outer, Parts, Run, precision_of, start
from gametalearn.scores import SCORES, ScoreLike, default_score
from gametalearn.settings import read_toml

__all__ = [
    "claim",
    "config_in",
    "is_kept",
    "load_run",
    "restore",
    "save",
    "save_best",
    "settings_in",
    "start_over",
]

BELONGS = ("config.toml", "metrics.jsonl", RECORD)
"""What a run that has not reached its first checkpoint may have written."""
MISFIT = (LookupError, TypeError, ValueError, RuntimeError, AttributeError)
"""What comes of restoring something other than what was saved."""
EVALUATED = ("model", "learner", "loss", "score")
"""The kinds of parts that an evaluation needs."""


def settings_in(folder: Path) -> dict[str, Any]:
    """The settings of a run as its files tell them, in this version's terms.

    Raises:
        InputError: no run there, or a damaged file.
    """
    file = folder / "config.toml"
    if not file.exists():
        raise InputError(
            f"{folder}: no run there ({file.name} is missing); give what train --out wrote"
        )
    values = read_toml(file)
    if "loss" not in values:  # then checkpoints told of a loss and a score that were handed in
        saved = [folder / name for name in ("checkpoint.pt", "best.pt") if (folder / name).exists()]
        values |= _parts_of(load_checkpoint(saved[0])) if saved else {}
    return values


def _parts_of(content: Mapping[str, Any]) -> dict[str, str]:
    parts, found = content.get("parts", {}), {}
    if parts.get("loss", registry.name_of(default_loss)) != registry.name_of(default_loss):
        found["loss"] = f"{registry.HANDED_IN}{registry.short(parts['loss'])}"
    if (score := parts.get("score", "default")) != "default":
        found["score"] = score if score in SCORES else f"{registry.HANDED_IN}{score}"
    return found


def config_in(
    folder: Path, given: Mapping[str, str] | None = None, *, trust: bool = False,
    kinds: tuple[str, ...] = registry.KINDS,
) -> TrainConfig:  # fmt: skip
    """The settings of a run, if what they would import is asked for.

    Args:
        folder: what `gametalearn.train` wrote.
        given: by kind, the names of parts that the user repeats.
        trust: whether the user trusts the folder.
        kinds: of the parts that are about to be built.

    Raises:
        InputError: no run there; or a part is named as ``module:attribute``, and nobody repeated it.
    """
    values = settings_in(folder)
    if not trust:
        registry.refuse_untrusted(values, kinds, given or {}, folder)
    return TrainConfig.from_dict(values, str(folder / "config.toml"))


def claim(
    folder: Path,
    config: TrainConfig,
    overwrite: bool,
    moved: bool,
    data: Record | None,
    stack: contextlib.ExitStack,
    exact: bool,
) -> dict[str, Any] | None:
    """Make ``folder`` this run's until ``stack`` ends; what its checkpoint holds, if it has one.

    A run of other settings that ended before its first checkpoint, and so keeps nothing, gives way.
    One that is there may go on under settings of which some have changed (`check_changes`), unless
    ``exact``.
    """
    file = folder / "config.toml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(held(folder))
        if file.exists() and not overwrite:
            there = settings_in(folder)
            if same_run(there, config, moved, exact=exact):
                saved = _saved(folder, config)
                if there != config.as_dict():  # of an older version, or in a new place
                    _write_config(file, config)
                keep(folder, data)
                return saved
            known = config.as_dict().keys()
            ours = {"dataset", "learner", "iterations", "seed"} <= there.keys() <= known
            if not ours or {p.name for p in folder.iterdir()} - set(BELONGS):
                raise InputError(other_settings(folder, there, config, exact=exact))
        elif any(folder.iterdir()) and not overwrite:
            raise InputError(f"{folder} is not empty and holds no run; choose another `out`")
        _empty(folder)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror}); choose another `out`"
        ) from error
    _write_config(file, config)
    keep(folder, data)
    return None


def start_over(folder: Path) -> None:
    """Leave nothing of a run that is there but its settings, so that it begins anew.

    Raises:
        InputError: another process is using the folder.
    """
    if folder.exists():
        with held(folder):
            _empty(folder)
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def _empty(folder: Path) -> None:
    kept = [file_of(folder, iteration).name for iteration in kept_in(folder)]
    for name in ("checkpoint.pt", "best.pt", "metrics.jsonl", "lake.json", "probe.json", RECORD,
                 *kept):  # fmt: skip
        (folder / name).unlink(missing_ok=True)
    for old in folder.glob("evaluation*.json"):
        old.unlink()


def _write_config(file: Path, config: TrainConfig) -> None:
    with replacing(file) as stream:
        tomli_w.dump(config.as_dict(), stream)


def _saved(folder: Path, config: TrainConfig) -> dict[str, Any] | None:
    """The checkpoint's content; lines of metrics after it, which will come again, are cut off."""
    metrics, file, content, length = folder / "metrics.jsonl", folder / "checkpoint.pt", None, 0
    if file.exists():
        content = load_checkpoint(file)
        length = content.get("metrics_bytes", -1)
        there = content.get("config")
        there = {**there, **_parts_of(content)} if isinstance(there, dict) else there
        # what its folders of images hold has been compared; where they lie may have changed
        if not same_run(there, config, moved=True):
            raise InputError(
                f"{file}: does not belong to the settings in config.toml; `overwrite` the run"
            )
        if isinstance(there, dict) and isinstance(done := content.get("iteration"), int):
            check_changes(folder, there, config, done)
    if metrics.exists() and metrics.stat().st_size > length:
        os.truncate(metrics, length)
    return content


def _about(run: Run) -> dict[str, Any]:
    """What both checkpoints tell."""
    score = {k: getattr(run.score, k) for k in ("name", "higher_is_better", "format")}
    return {
        "config": run.config.as_dict(),
        "model": run.model.state_dict(),
        "data": {
            "input_shape": list(run.input_shape), "objectives": list(run.objectives), "score": score,
            "dtype": precision_of(run.model),
            "eval": [name for name, module in run.model.named_modules() if not module.training],
        },
    }  # fmt: skip


def save_best(run: Run) -> None:
    """Write ``best.pt``: the best validated weights."""
    if run.out is not None:
        save_checkpoint(run.out / "best.pt", {**_about(run), **run.best})


def is_kept(run: Run) -> bool:
    """Whether the checkpoint of this iteration is one that the settings keep."""
    return run.config.keep_every > 0 and run.iteration % run.config.keep_every == 0


def save(run: Run, outer: Outer, metrics: Metrics) -> None:
    """Write ``checkpoint.pt``, all that the next iteration depends on; twice where it `is_kept`."""
    if run.out is None:
        return
    content = {
        **_about(run),
        "iteration": run.iteration,
        "meta": {name: p.detach() for name, p in run.meta.items()},
        **outer.state_dict(),
        "source": run.source.state_dict(),
        "best": run.best,
        "seconds": {"total": run.seconds, "elapsed": run.elapsed},  # as in metrics.jsonl
        "skipped": run.skipped,
        "metrics_bytes": metrics.sync(),
    }
    if is_kept(run):
        save_checkpoint(file_of(run.out, run.iteration), content)
    save_checkpoint(run.out / "checkpoint.pt", content)


def restore(run: Run, outer: Outer, content: dict[str, Any]) -> None:
    """Put a checkpoint's content into a run that was just started."""
    try:
        _check_adapted(run, content)
        run.put(content["meta"])
        run.model.load_state_dict(content["model"])
        _set_modes(run.model, content)
        outer.load_state_dict(content)
        run.source.load_state_dict(content["source"])
        run.iteration, seconds = int(content["iteration"]), content["seconds"]
        if not isinstance(seconds, dict):  # an older version kept training alone
            seconds = {"total": seconds, "elapsed": seconds}
        run.seconds, run.elapsed = float(seconds["total"]), float(seconds["elapsed"])
        run.best, run.skipped = dict(content["best"]), int(content["skipped"])
    except SharedError:
        raise
    except MISFIT as error:
        raise _misfit(Path("checkpoint.pt"), error) from error


def load_run(
    folder: Path | str,
    checkpoint: str | int = "best",
    device: str | None = None,
    *,
    dataset: str | None = None,
    model: Any = None,
    learner: Any = None,
    loss: Loss = default_loss,
    score: ScoreLike = default_score,
    trust: bool = False,
    team: Team = ALONE,
) -> Run:
    """A saved run, its model with the weights of one of its checkpoints.

    No data are read (but for a run of an older version that kept no shapes), so that a run is loaded
    and adapted where there is nothing but its folder; `Run.source` and `Run.episodes` read them.

    What was handed in to `gametalearn.train` is needed again: ``model``, ``learner``, ``loss`` and
    ``score``, as it was then. Where the run's files name one as ``module:attribute``, which loading
    does not import unasked, repeat that name, hand the part in, or give ``trust``. Of a ``team``,
    only the first process reads files. To test it:

        run = load_run("runs/demo/uniform/seed0")
        result = evaluate(run.model, source, run.test_learner, meta=run.meta, loss=run.loss)

    Args:
        folder: what `train` wrote.
        checkpoint: ``best``, the best validated weights; ``latest``; or the iteration of one that
            the setting ``keep_every`` kept.
        device: instead of the run's own; where that cannot be used here, the default is the CPU, and a
            warning says so.
        dataset: where the run's folders of images lie now, as ``folder:PATH``, if they have moved;
            or the run's own data set, repeated.
        model, learner: the part, or its name.
        loss, score: the part, or ``module:attribute``.
        trust: import whatever the run's files name.
        team: as in `train`.

    Raises:
        InputError: no run there, its checkpoint is damaged, or its parts are others.
    """
    folder = Path(folder)
    file = file_of(folder, checkpoint)
    handed = {"model": model, "learner": learner, "loss": loss, "score": score}
    given = {k: part for k, part in handed.items() if isinstance(part, str)}
    objects = {k: part for k, part in handed.items() if k not in given and part is not None}
    if dataset is not None:
        given["dataset"] = dataset
    parts = Parts(**objects)

    def read() -> tuple[TrainConfig, dict[str, Any]]:
        built = tuple(k for k in EVALUATED if k not in objects or _is_default(objects[k]))
        config = config_in(folder, given, trust=trust, kinds=built)
        _check_parts(folder, config, parts, given)
        here = config.dataset
        config = dataclasses.replace(config, device=_usable(folder, config.device, device))
        if dataset is not None and dataset != here:
            config = relocated(config, dataset)
        if not file.exists():
            raise InputError(_absent(folder, file))
        content = load_checkpoint(file)
        if "input_shape" not in _data_of(content):  # an older run: its shapes are those of its data
            if not trust:
                registry.refuse_untrusted(config.as_dict(), ("dataset",), given, folder)
            checked(folder, config)
        return config, content

    config, content = team.on_first(read)
    out = folder if team.first else None
    run = team.everywhere(lambda: start(config, parts, out, team, known=_data_of(content) or None))
    try:
        run.model.load_state_dict(content["model"])
        _check_adapted(run, content)
        run.put(content["meta"])
        run.iteration = int(content["iteration"])
        _set_modes(run.model, content)
    except SharedError:
        raise
    except MISFIT as error:
        raise _misfit(file, error) from error
    best = content if file.name == "best.pt" else content.get("best", {})
    run.best = {k: best[k] for k in ("iteration", "value", "meta") if k in best}
    return run


def _check_adapted(run: Run, content: Mapping[str, Any]) -> None:
    """Refuse a model and a learner that adapt other parameters than the run's did."""
    if others := sorted(content["meta"].keys() ^ run.meta.keys()):
        raise SharedError(
            f"the run did{'' if others[0] in content['meta'] else ' not'} adapt '{others[0]}', and this model "
            "and learner differ in that; pass them as they were, with the same parameters frozen"
        )


def _set_modes(model: nn.Module, content: Mapping[str, Any]) -> None:
    """Put each module into the mode that it was trained in; older versions did not tell."""
    still = _data_of(content).get("eval")
    if still is not None:
        for name, module in model.named_modules():
            module.training = name not in still


def _data_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint tells of the data; nothing in an older version's."""
    found = content.get("data")
    return found if isinstance(found, dict) else {}


def _usable(folder: Path, own: str, given: str | None) -> str:
    """The device that was given, or the run's own, or the CPU where that is not there."""
    device = given or own
    if (why := unusable(device)) is None:
        return device
    if given:
        raise InputError(f"`device` {device}: {why}; try cpu")
    warnings.warn(f"{folder}: trained on {device}, {why}; loaded for the cpu", stacklevel=2)
    return "cpu"


def _absent(folder: Path, file: Path) -> str:
    """What to do about a checkpoint that is not there."""
    if file.name in ("best.pt", "checkpoint.pt"):
        return f"{file}: no checkpoint yet; run `gametalearn train --resume {folder}`"
    kept = ", ".join(map(str, kept_in(folder)))
    remedy = f"kept are those of iterations {kept}" if kept else "none was: train with `keep_every`"
    return f"{file}: this checkpoint was not kept; {remedy}, or take latest or best"


def _is_default(part: object) -> bool:
    """Whether a part was left to the settings."""
    return part is None or part is default_loss or part is default_score


def _check_parts(folder: Path, config: TrainConfig, parts: Parts, given: Mapping[str, str]) -> None:
    """A run is tested with the parts that it was trained with."""
    named = parts.named(config)
    for kind in EVALUATED:
        there, here = str(getattr(config, kind)), given.get(kind, str(getattr(named, kind)))
        outside = registry.from_outside(kind, there) and registry.alike(
            registry.HANDED_IN + registry.short(there.split(":")[1]), here
        )
        absent = (
            registry.is_handed_in(there)
            and kind not in given
            and (_is_default(getattr(parts, kind)))
        )
        if absent or not (registry.alike(there, here) or outside):
            name = there.removeprefix(registry.HANDED_IN)
            other = "" if absent else f", not {here.removeprefix(registry.HANDED_IN)}"
            raise InputError(
                f"{folder}: this run has {kind}={name}{other}; pass {kind}= as it was given then"
            )


def _misfit(file: Path, error: Exception) -> InputError:
    return InputError(
        f"{file}: does not fit its config.toml ({summary(error)}); `overwrite` the run"
    )
