"""Tests of one trained run under several protocols, and Lake's one-shot task; their JSON files."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from gametalearn.adaptation import Learner, Params
from gametalearn.config import TrainConfig
from gametalearn.data.lake import WAYS, FixedTasks
from gametalearn.distributed import ALONE, Team
from gametalearn.episodes import Source, TaskBatch
from gametalearn.errors import InputError
from gametalearn.evaluation import Evaluation, evaluate
from gametalearn.files import write_json
from gametalearn.losses import Loss, default_loss
from gametalearn.normalisation import Protocol, protocol_of, switchable
from gametalearn.results import evaluation_record, require_finite
from gametalearn.scores import ScoreLike, default_score
from gametalearn.statistics import over_episodes
from gametalearn.tables import WIDTH, aligned
from gametalearn.units import Units

__all__ = [
    "Evaluations",
    "check_lake",
    "compared",
    "evaluate_all",
    "evaluate_lake",
    "write_evaluations",
    "write_lake",
]

Evaluations = dict[Protocol, Evaluation]

OVER_EPISODES = (
    "± and [ ] are 95% intervals over test episodes, and p is of the paired test over them: they say "
    "how these trained models differ on these classes. About rules or settings they say nothing; for "
    "that, train several seeds with gametalearn compare."
)


def evaluate_all(
    model: nn.Module,
    source: Source,
    learner: Learner,
    episodes: int,
    seed: int | None,
    protocols: Sequence[Protocol],
    *,
    meta: Params | None = None,
    loss: Loss = default_loss,
    score: ScoreLike = default_score,
    progress: Callable[[int], object] | None = None,
    team: Team = ALONE,
) -> Evaluations:
    """Evaluate a model under several protocols on the same episodes.

    A model whose queries have no part in each other (``norm`` of ``group`` or ``none``, or no
    normalisation by batch) predicts transductively what it predicts inductively: it is evaluated
    once, and both say so.

    Args:
        model, source, learner, episodes, seed, meta, loss, score, progress, team: as in `evaluate`.
        protocols: different ones.

    Returns:
        An `Evaluation` for each protocol, in their order.

    Raises:
        InputError: the model does not know a protocol, or an episode's value is not finite.
    """
    found: Evaluations = {}
    alike = protocol_of(model) == "inductive" and not switchable(model)
    for protocol in protocols:
        if alike and protocol == "transductive" and "inductive" in protocols:
            continue
        found[protocol] = evaluate(
            model, source, learner, episodes, seed,
            meta=meta, loss=loss, score=score, protocol=protocol, progress=progress, team=team,
        )  # fmt: skip
        require_finite(found[protocol])
    for protocol in protocols:
        if protocol not in found:
            found[protocol] = replace(found["inductive"], protocol=protocol)
    return {protocol: found[protocol] for protocol in protocols}


def write_evaluations(
    file: Path, found: Evaluations, own: Protocol, iteration: int, steps: int, **told: str | int
) -> None:
    """Write ``evaluation.json``, schema ``gametalearn.evaluation/1``.

    Args:
        file: its place.
        found: by protocol. With several, ``protocols`` holds each one's mean, interval and values.
        own: the protocol of the run, whose evaluation (if it is among them, otherwise the first)
            stands at the top, where `compare` looks for its own.
        iteration: of the weights.
        steps: inner steps.
        told: what else the file says, such as the ``dataset`` where it is not the run's own.
    """
    first = found.get(own) or next(iter(found.values()))
    content = evaluation_record(first, iteration, steps) | told
    if len(found) > 1:
        content["protocols"] = {
            protocol: {
                result.metric: result.mean,
                "ci95": result.ci95,
                "values": result.values.tolist(),
            }
            for protocol, result in found.items()
        }
    write_json(file, content)


def compared(runs: Mapping[str, Evaluations]) -> str:
    """A table of several runs under each protocol, each beside the first.

    Args:
        runs: tests on the same episodes by the same score, under the same protocols; by what they
            shall be called, the one that the others are set beside first.

    Raises:
        InputError: they are not.
    """
    base, *_ = runs.values()
    blocks: list[str] = []
    for protocol, beside in base.items():
        largest = max(abs(run[protocol].mean) for run in runs.values())
        lines = []
        for name, run in runs.items():
            result = run[protocol]
            if (result.metric, result.group.tolist()) != (beside.metric, beside.group.tolist()):
                raise InputError(
                    f"{name}: not tested on the episodes or by the score of the first run"
                )
            units = Units.fitting(result.metric, result.percent, largest)
            value = f"{units.show(result.mean)} ± {units.show(result.ci95)}"
            line = [name, units.heading, value, "", ""]
            if run is not base:
                over = over_episodes(result.values - beside.values, result.group)
                ends = ", ".join(units.show(v, "+") for v in over.ci95 or ())
                line[3] = f"{units.show(over.mean, '+')} [{ends}]"
                line[4] = "-" if over.p_value is None else f"{over.p_value:.2g}"
            lines.append(line)
        header = ["run", "score", protocol, "minus the first [95%]", "p"]
        blocks += [*aligned(header, lines), ""]
    return "\n".join([*blocks, *textwrap.wrap(OVER_EPISODES, WIDTH)])


def check_lake(config: TrainConfig) -> None:
    """Refuse a run that may have seen the task's characters, or cannot tell 20 classes apart.

    Raises:
        InputError: another data set, split, number of ways or kind of image.
    """
    wanted = {
        "dataset": (config.dataset, "omniglot", ("omniglot",)),
        "split": (config.split or "lake", "lake", ("lake",)),
        "ways": (config.ways, str(WAYS), (WAYS,)),
        "image_size": (config.image_size, "28", (0, 28)),
        "channels": (config.channels, "1", (0, 1)),
    }
    for name, (value, shown, good) in wanted.items():
        if value not in good:
            why = ": its training has seen alphabets of the task" if name == "split" else ""
            raise InputError(
                f"`protocol` lake needs a run of `dataset` omniglot, `split` lake and `ways` {WAYS}, "
                f"with `{name}` {shown}; this one has `{name}` {value}{why}"
            )


def evaluate_lake(
    model: nn.Module,
    runs: TaskBatch,
    learner: Learner,
    protocols: Sequence[Protocol] = ("transductive", "inductive"),
    *,
    meta: Params | None = None,
    loss: Loss = default_loss,
) -> Evaluations:
    """Lake's one-shot task: the accuracy of each of its 20 runs, under several protocols.

    Args:
        model: a 20-way classifier of 1 x 28 x 28 images, trained on background alphabets alone.
        runs: what `gametalearn.data.lake.load_lake` read.
        learner, meta, loss: as in `evaluate`.
        protocols: as in `evaluate_all`. A run's 20 queries are one drawing of each class, so a
            transductive model sees a balanced batch.

    Returns:
        An `Evaluation` of 20 values for each protocol; the published figure is the error rate,
        1 - mean.
    """
    found = evaluate_all(
        model, FixedTasks(runs), learner, len(runs), None, protocols,
        meta=meta, loss=loss, score="accuracy",
    )  # fmt: skip
    # 20 runs of one task, whose spread counts, and not 20 objectives of one episode each
    return {name: replace(one, group=np.zeros_like(one.group)) for name, one in found.items()}


def write_lake(
    file: Path, found: Evaluations, own: Protocol, iteration: int, steps: int
) -> dict[Protocol, dict[str, Any]]:
    """Write ``lake.json``, schema ``gametalearn.lake/1``; the record of each protocol.

    A record holds ``error_rate`` in [0, 1], the mean over runs, their standard deviation ``std``,
    the half width ``ci95`` of the mean's t interval (19 degrees of freedom), and the error rates of the
    ``runs``. The run's own protocol stands at the top, all of them in ``protocols``.
    """
    records: dict[Protocol, dict[str, Any]] = {}
    for protocol, result in found.items():
        errors = 1 - np.rint(WAYS * result.values) / WAYS  # accuracies are float32 shares of 20
        records[protocol] = {
            "error_rate": float(errors.mean()),
            "std": float(errors.std(ddof=1)),
            "ci95": over_episodes(errors).half,
            "runs": errors.tolist(),
        }
    top = own if own in records else next(iter(records))
    write_json(
        file,
        {
            "schema": "gametalearn.lake/1",
            "protocol": top,
            **records[top],
            "iteration": iteration,
            "inner_steps": steps,
            "protocols": records,
        },
    )
    return records
