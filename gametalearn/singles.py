"""Baselines for a comparison over several objectives: models that each learn one of them alone.

The baseline of an objective sees as many of its training tasks as the rules' models do: for the same number
of iterations, its share of a meta-batch. All other settings are the comparison's, with the plain
mean as the rule. It is tested on the same episodes of its objective as the rules are.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from gametalearn.config import RESUMABLE, TrainConfig, is_images
from gametalearn.distributed import Team
from gametalearn.errors import InputError
from gametalearn.jobs import Planned, Terms, place_of, run_test
from gametalearn.metrics import read_metrics
from gametalearn.places import absolute, joined, shown
from gametalearn.results import Result, Single
from gametalearn.runfolder import load_run
from gametalearn.settings import settings_of
from gametalearn.shares import divided

__all__ = ["Asked", "asked", "check_given", "collected", "label_of", "single_runs"]

TRAINED = "train"
"""The value of ``--single`` when it names no runs."""


TERMS = ("split", "protocol", "objectives")
"""Beside data set, ways, shots, seed and input: what the tests of a given run depend on."""

BUDGET = ("iterations", "meta_batch")
"""What decides how many tasks a run sees, of which a comparison tells the number."""


Asked = bool | Mapping[str, Path | str]
"""Whether baselines are wanted, or a mapping from objectives to the folders of their existing runs."""


def asked(text: str | None) -> Asked:
    """What ``--single OBJECTIVE=FOLDER,...`` asks for; ``train`` names no folder, and None asks for nothing.

    >>> asked("omniglot=runs/a,mini-imagenet=runs/b")
    {'omniglot': 'runs/a', 'mini-imagenet': 'runs/b'}
    """
    if text is None or text == TRAINED:
        return text is not None
    found: dict[str, Path | str] = {}
    for part in text.split(","):
        given = part.strip()
        # of folder:PATH=FOLDER the path may hold more equals signs, of other names FOLDER may
        name, equals, folder = (
            given.rpartition("=") if given.startswith("folder:") else given.partition("=")
        )
        if not (name and equals and folder):
            raise InputError(
                f"`single` takes OBJECTIVE=FOLDER, such as omniglot=runs/omniglot; got '{part}'"
            )
        if name in found:
            raise InputError(f"`single` names two folders for '{name}'")
        found[name] = folder
    return found


def label_of(objective: str) -> str:
    """The name of an objective's baseline among the runs.

    >>> label_of("omniglot"), label_of("folder:/data/birds")
    ('single:omniglot', 'single:folder-data-birds')
    """
    return "single:" + re.sub(r"[^\w.-]+", "-", objective)


def single_runs(
    config: TrainConfig,
    single: Asked,
    seeds: Sequence[int],
    folder: Path | None,
    terms: Terms,
) -> list[Planned]:
    """The runs to train, seed by seed: one for each objective without a given run.

    Raises:
        InputError: the comparison's objectives cannot be learned one by one, or unknown ones are named.
    """
    if single is False:
        return []
    given, episodes = _given(single), terms.episodes
    names = config.datasets
    if terms.source is not None or terms.validation is not None or terms.test is not None:
        raise InputError("`single` works on data sets given by name, but episodes were passed in")
    if len(names) < 2:
        raise InputError(
            f"`single` is for several data sets, such as omniglot+mini-imagenet; got {shown(config.dataset)}"
        )
    if config.share == "proportional":
        raise InputError(
            "`single` needs to know how many tasks each data set gets; set `share` to fixed, or to "
            "numbers"
        )
    if config.meta_batch < len(names) or episodes < len(names):
        raise InputError(
            f"`single` needs a task and a test episode from each of {len(names)} data sets; raise "
            "`meta_batch` or `episodes`"
        )
    if unknown := [name for name in given if absolute(name) not in map(absolute, names)]:
        raise InputError(
            f"`single` names a run for '{unknown[0]}', which is not one of {', '.join(names)}"
        )
    labels = [label_of(name) for name in names]
    if alike := [name for i, name in enumerate(names) if labels[i] in labels[:i]]:
        raise InputError(
            f"`single` would keep the models of '{alike[0]}' and of another data set in one folder, "
            f"{label_of(alike[0])}; rename the folder of images"
        )
    there = {absolute(name) for name in given}
    return [
        Planned(
            label_of(name),
            alone,
            None if folder is None else place_of(folder, label_of(name), seed),
            config.of_rule(config.rule, seed),
        )
        for seed in seeds
        for name in names
        if absolute(name) not in there
        for alone in [_alone(config, name, seed)]
    ]


def _given(single: Asked) -> Mapping[str, Path | str]:
    return single if isinstance(single, Mapping) else {}


def _alone(config: TrainConfig, name: str, seed: int) -> TrainConfig:
    """The settings with one data set, whose images are converted as in the comparison.

    Its best weights are chosen by as many validation episodes as the rules' models have of this objective.
    """
    size, channels = config.brought_to if is_images(name) else (config.image_size, config.channels)
    settings = dataclasses.replace(config, rotations=config.rotations and name == "omniglot")
    uniform = settings.of_rule("uniform", seed)
    names = config.datasets
    validated = divided(config.validation_episodes, [1] * len(names))[names.index(name)]
    return dataclasses.replace(
        uniform, dataset=joined([name]), meta_batch=_tasks(config)[name], share="fixed",
        image_size=size, channels=channels, validation_episodes=max(validated, 2),
    )  # fmt: skip


def _tasks(config: TrainConfig) -> dict[str, int]:
    """How many tasks of a meta-batch come from each data set."""
    return dict(zip(config.datasets, config.divided_into or (), strict=True))


def check_given(
    config: TrainConfig, single: Asked, seeds: Sequence[int], shape: Sequence[int], terms: Terms
) -> None:
    """Refuse given runs that do not match, before anything is trained; ``shape`` is that of one input.

    Raises:
        InputError: a run is missing, has a different data set or seed, or takes different episodes.
    """
    for name, folder in _given(single).items():
        for seed in seeds:
            place = Path(folder) / f"seed{seed}"
            run = load_run(place, device=config.device, loss=terms.loss, score=terms.score)
            alone = _alone(config, name, seed)
            wanted = {
                "dataset": absolute(joined([name])), "ways": config.ways, "shots": config.shots,
                "seed": seed, **{setting: getattr(alone, setting) for setting in TERMS},
            }  # fmt: skip
            for setting, value in wanted.items():
                if (own := getattr(run.config, setting)) != value:
                    raise InputError(
                        f"`single` {place}: its `{setting}` is {own or 'not set'}, not "
                        f"{value or 'left unset'}"
                    )
            if (done := _done(place)) < run.config.iterations:
                raise InputError(
                    f"`single` {place}: it stopped at {done} of {run.config.iterations} iterations; "
                    f"finish it with gametalearn train --resume {place}"
                )
            if run.input_shape != tuple(shape):
                raise InputError(
                    f"`single` {place}: it takes inputs of {_shape(run.input_shape)}, but the "
                    f"comparison's are {_shape(shape)}; train it with matching `image_size` and "
                    "`channels`"
                )


def _done(place: Path) -> int:
    """Iterations that a run has done, of which the last one is always logged."""
    return int(read_metrics(place)["iteration"][-1])


def _differing(own: TrainConfig, wanted: TrainConfig) -> list[str]:
    """Settings of a given run that shaped its training and are others than the comparison's."""
    # the input is compared by its shape
    free = {*RESUMABLE, *BUDGET, *TERMS, "dataset", "seed", "image_size", "channels", "share",
            "validation_episodes"}  # fmt: skip
    return [
        f"{name} {_plain(getattr(own, name))} instead of {_plain(getattr(wanted, name))}"
        for name in settings_of(wanted)
        if name not in free and getattr(own, name) != getattr(wanted, name)
    ]


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value) or "unset"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def collected(
    config: TrainConfig,
    trained: Mapping[str, list[Result]],
    single: Asked,
    seeds: Sequence[int],
    terms: Terms,
    team: Team,
) -> dict[str, Single]:
    """The baselines of all objectives, in order: those trained here, and given runs, tested now.

    Args:
        trained: by `label_of` an objective, a result for each seed.
        single: for each other objective, the folder whose ``seedN`` are its runs; False asks for none.
    """
    if single is False:
        return {}
    folders = {absolute(name): Path(folder) for name, folder in _given(single).items()}
    found = {}
    for number, (name, count) in enumerate(_tasks(config).items()):
        budget = config.iterations * count
        if (folder := folders.get(absolute(name))) is None:
            found[name] = Single(trained[label_of(name)], budget, budget)
            continue
        tested = [
            _tested(folder / f"seed{seed}", config.of_rule(config.rule, seed), number, terms, team)
            for seed in seeds
        ]
        differs = dict.fromkeys(text for _, _, texts in tested for text in texts)
        found[name] = Single(
            [one for one, *_ in tested], tested[0][1], budget, str(folder), tuple(differs)
        )
    return found


def _tested(
    place: Path, whole: TrainConfig, number: int, terms: Terms, team: Team
) -> tuple[Result, int, list[str]]:
    """A given run's result on an objective's test episodes, its number of training tasks, and `_differing`."""
    run = load_run(place, device=whole.device, loss=terms.loss, score=terms.score, team=team)
    source = team.everywhere(lambda: terms.tests(whole))
    evaluation = run_test(run, terms.episodes, source, None, number)
    seconds = team.on_first(lambda: float(read_metrics(place)["seconds/total"][-1]))
    tasks = run.config.iterations * run.config.meta_batch
    wanted = _alone(whole, whole.datasets[number], whole.seed)
    return Result(evaluation, seconds, run.iteration), tasks, _differing(run.config, wanted)
