"""What may change when a run goes on, and what becomes of it then.

A run's folder holds what its settings give from the first iteration on. So only those may change on
which that does not depend: how often something is written or validated, where it is computed, and how
long it is. A run is made longer under a constant outer rate alone: along a schedule, each iteration's
rate depends on their number.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gametalearn import registry
from gametalearn.config import RESUMABLE, TrainConfig
from gametalearn.errors import InputError
from gametalearn.provenance import same_run
from gametalearn.settings import check, settings_of

__all__ = ["as_before", "check_changes", "with_changes"]

ELSEWHERE = ("threads", "device")
"""Settings on which the last bits of a result depend."""


def with_changes(config: TrainConfig, given: Mapping[str, Any], run: Path) -> TrainConfig:
    """The settings of a run that goes on, with those that were given with it.

    Args:
        config: the run's own.
        given: by name; what the run has anyway, or the place of its ``dataset``, changes nothing.
        run: its folder, for messages.

    Raises:
        InputError: a setting that cannot change any more.
    """
    for name, value in given.items():
        check(settings_of(config)[name], value)
        there = getattr(config, name)
        if name in RESUMABLE or name == "dataset" or value == there or _handed_in(there):
            continue
        begun = "none" if there in ("", {}) else there
        may = ", ".join(f"`{one}`" for one in RESUMABLE)
        raise InputError(
            f"`{name}` {value}: {run} was started with {begun}, which cannot change within a "
            f"run; train another run, or leave it out ({may} may change)"
        )
    return dataclasses.replace(config, **{n: v for n, v in given.items() if n in RESUMABLE})


def _handed_in(value: Any) -> bool:
    return isinstance(value, str) and registry.is_handed_in(value)


def as_before(config: TrainConfig, there: Mapping[str, Any], given: Collection[str]) -> TrainConfig:
    """The settings of a run that goes on where ``there`` are its own: what may change and was not
    ``given`` stays as it is. Those of another run say nothing."""
    if not same_run(there, config):
        return config
    kept = {name: there[name] for name in RESUMABLE if name in there and name not in given}
    return dataclasses.replace(config, **kept)


def check_changes(run: Path, there: Mapping[str, Any], config: TrainConfig, done: int) -> None:
    """Can a run go on under settings of which those that may change have changed?

    It is warned of a change after which the result is no longer, bit for bit, that of the settings.

    Args:
        run: its folder, for messages.
        there: what its checkpoint was written under.
        config: what it shall go on under.
        done: iterations that it has done.

    Raises:
        InputError: it has nothing left to do; or its length changes, on which its outer rate depends.
    """
    before, now = TrainConfig.completed(there), config.as_dict()
    changed = [
        name for name in RESUMABLE
        if type(before[name]) is not type(now[name]) or before[name] != now[name]
    ]  # fmt: skip
    if "iterations" in changed:
        if config.iterations <= done:
            raise InputError(
                f"`iterations` {config.iterations}: {run} has already done {done}; give a larger number, or leave it out"
            )
        of_a_schedule = config.meta_optimizer in registry.BUILT_IN["meta_optimizer"]
        if of_a_schedule and config.meta_schedule != "constant":
            raise InputError(
                f"`iterations` {config.iterations}: the outer rate of {run} follows `meta_schedule` "
                f"{config.meta_schedule} over {before['iterations']} iterations, so that a longer or "
                "shorter run has other rates from the first one on; train that in another folder, with "
                "`meta_schedule` constant if it may have to go on"
            )
    elif changed and config.iterations <= done:
        raise InputError(
            f"`{changed[0]}` {now[changed[0]]}: {run} has done all of its {done} "
            "iterations; give more `iterations`, or leave it out"
        )
    if moved := [name for name in ELSEWHERE if name in changed]:
        told = " and ".join(
            f"{name} {before[name]} to {now[name] or 'what PyTorch chooses'}" for name in moved
        )
        warnings.warn(
            f"{run}: changed from {told} after iteration {done}; from here on its numbers are "
            "those of the unchanged run up to rounding, no longer bit for bit",
            stacklevel=2,
        )
