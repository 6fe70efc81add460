"""The runs of a comparison: which there are, one of them, several at a time, or as commands."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shlex
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from gametalearn.adaptation import Learner
from gametalearn.build import build_source, stream_seed
from gametalearn.config import TrainConfig
from gametalearn.distributed import ALONE, Team
from gametalearn.environment import version
from gametalearn.episodes import Source
from gametalearn.errors import InputError
from gametalearn.evaluation import Evaluation, evaluate, protocol_of
from gametalearn.live import Outlook
from gametalearn.losses import Loss, default_loss
from gametalearn.mixture import MixedSource
from gametalearn.progress import counting
from gametalearn.randomness import word
from gametalearn.registry import handed_in, is_handed_in
from gametalearn.results import Result, require_finite, write_evaluation
from gametalearn.run import Parts, Run, Watch, outer_of, start
from gametalearn.scores import ScoreLike, default_score
from gametalearn.settings import (
    parse_rule_options,
    refuse_other_options,
    refuse_unused,
    settings_of,
    unmet,
)
from gametalearn.stored import read_evaluation, version_in
from gametalearn.training import train_parts, using_threads

__all__ = [
    "Planned",
    "Terms",
    "begun",
    "commands_of",
    "flags_of",
    "place_of",
    "run_test",
    "runs_of",
    "train_and_test",
]


T = TypeVar("T")


@dataclass(frozen=True)
class Planned:
    """A run of a comparison: what its rule goes by, its settings, and its folder, if it has one.

    A run that learns one objective of several alone has ``whole``, the settings of all of them: it is
    tested on the episodes of its objective among theirs.
    """

    rule: str
    config: TrainConfig
    place: Path | None
    whole: TrainConfig | None = None

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.rule}, seed {self.config.seed}"

    @property
    def tested(self) -> Path | None:
        """Where its test is kept."""
        return None if self.place is None else self.place / "evaluation.json"


@dataclass(frozen=True)
class Terms:
    """What all runs of a comparison have in common beside their settings; as in `compare`."""

    rules: Mapping[str, Any]
    model: Callable[[int], nn.Module] | None = None
    source: Callable[[int], Source] | None = None
    validation: Callable[[int], Source] | None = None
    test: Callable[[int], Source] | None = None
    learner: Learner | None = None
    loss: Loss = default_loss
    score: ScoreLike = default_score
    optimizer: Callable[..., Any] | None = None
    episodes: int = 600
    overwrite: bool = False
    progress: bool = True
    watch: Watch | None = None

    def parts(self, rule: str, seed: int) -> Parts:
        """What is handed in to one run."""
        model = source = None
        if self.model is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(word(seed))
                model = _new(self.model(seed), "model", "build a new one each time it is called")
        if self.source is not None:
            source = _new(
                self.source(seed), "source", "give a new one, such as source.with_seed(seed)"
            )
        validation = None if self.validation is None else self.validation(seed)
        given = self.rules.get(rule, "uniform")  # a single objective is learned by the plain mean
        return Parts(
            model, source, validation, self.learner, None, self.loss, self.score, self.optimizer,
            None if isinstance(given, str) else given,
        )  # fmt: skip

    def tests(self, config: TrainConfig) -> Source:
        """The test episodes of a run."""
        return build_source(config, "test") if self.test is None else self.test(config.seed)


_GIVEN: dict[int, weakref.ref[Any]] = {}
"""Models and sources that were handed in to a run of this process, by their identity."""


def _new(part: T, what: str, remedy: str) -> T:
    """Refuse a part that an earlier run has had: it was trained in place, or has run on."""
    earlier = _GIVEN.get(id(part))
    if earlier is not None and earlier() is part:
        raise InputError(
            f"compare: `{what}` returned the same {type(part).__name__} twice, so that one run would go on "
            f"where another ended; let it {remedy}"
        )
    with contextlib.suppress(TypeError):  # what cannot be noted cannot be checked
        _GIVEN[id(part)] = weakref.ref(part)
    return part


def place_of(folder: Path, rule: str, seed: int) -> Path:
    """Where a run lies below a comparison's folder."""
    return folder / rule.replace(":", "-") / f"seed{seed}"


def runs_of(
    config: TrainConfig, rules: Mapping[str, Any], seeds: Sequence[int], folder: Path | None
) -> list[Planned]:
    """Every run of a comparison, seed by seed: what is done at any time is balanced.

    Raises:
        InputError: seeds that are none or repeated, or options of a rule that is not there.
    """
    given = [r if isinstance(r, str) else handed_in(r) for r in rules.values()]
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(
            f"`seeds` must name at least one seed, and each seed once; got {list(seeds)}"
        )
    places: dict[str, str] = {}
    for name in rules:
        place = place_of(Path(), name, 0).parent.as_posix()
        if not name.strip() or set(name) & {"/", "\\", "\0"} or place in (".", ".."):
            raise InputError(
                f"`rules`: '{name}' cannot be the name of a folder; call the rule otherwise"
            )
        if place in places:
            raise InputError(
                f"`rules`: '{places[place]}' and '{name}' would share the folder {place}; call one of them "
                "otherwise"
            )
        places[place] = name
    refuse_other_options(config.rule_options, given, rules)
    for name, field in settings_of(config).items():
        if getattr(config, name) != field.default and all(
            unmet(field, {"rule": rule}, ("rule",)) for rule in given
        ):
            refuse_unused(field, "rule", f"`rules` {', '.join(rules)}")
    return [
        Planned(
            name,
            config.of_rule(rule, seed),
            None if folder is None else place_of(folder, name, seed),
        )
        for seed in seeds
        for name, rule in zip(rules, given, strict=True)
    ]


def begun(runs: Sequence[Planned], terms: Terms) -> Run:
    """The first run before its first iteration, after every rule has been built once for it.

    Raises:
        InputError: settings, parts, data or rules do not fit: before anything is trained.
    """
    first = None
    for planned in runs[: len(terms.rules)]:
        parts = terms.parts(planned.rule, planned.config.seed)
        config = parts.named(planned.config)
        first = start(config, parts) if first is None else dataclasses.replace(first, config=config)
        outer_of(first, parts)
    assert first is not None
    return first


def commands_of(runs: Sequence[Planned], overwrite: bool = False) -> list[str]:
    """``gametalearn train ...`` for each run, quoted for a shell.

    A run that such a command trained is one of the comparison: `compare` does not train it again.
    """
    anew = ["--overwrite"] if overwrite else []
    return [
        shlex.join([
            "gametalearn", "train", *flags_of(run.config), "--out", str(run.place), *anew
        ])
        for run in runs
    ]  # fmt: skip


def flags_of(config: TrainConfig, leave_out: Collection[str] = ()) -> list[str]:
    """The flags that give these settings: those that have an effect and are not the data set's defaults.

    Rule, seed, iterations and threads always stand there, unless they are left out.
    """
    usual = TrainConfig.of(config.dataset, iterations=config.iterations)
    values = {name: value for name, value in vars(config).items() if name not in leave_out}
    words = ["--dataset", config.dataset]
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        always = name in ("rule", "seed", "iterations", "threads")
        if (
            is_handed_in(str(value))
            or name in ("dataset", *leave_out)
            or (value == getattr(usual, name) and not always)
            or unmet(field, values, [*values])
        ):
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, dict):
            words += [flag, *_rule_options(value)]
        elif str(value).startswith("-"):
            words.append(f"{flag}={value}")
        else:
            words += [flag, str(value)]
    return words


def _rule_options(options: dict[str, dict[str, Any]]) -> Iterator[str]:
    """RULE.OPTION=VALUE each, in the plainest form that is read as the same value."""
    for rule, own in options.items():
        for option, value in own.items():
            quoted = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
            plain = f"{rule}.{option}={value}"
            same = parse_rule_options([plain]) == {rule: {option: value}}
            yield plain if same and isinstance(value, str) else f"{rule}.{option}={quoted}"


def train_and_test(
    run: Planned, terms: Terms, team: Team = ALONE, outlook: Outlook | None = None
) -> Result:
    """Train one rule on one seed, and test it unless this very test was done."""
    with using_threads(run.config.threads if team.size == 1 else 0):  # else each has its share
        return _train_and_test(run, terms, team, outlook)


def _train_and_test(run: Planned, terms: Terms, team: Team, outlook: Outlook | None) -> Result:
    trained = train_parts(
        run.config, terms.parts(run.rule, run.config.seed), run.place,
        overwrite=terms.overwrite, progress=terms.progress, label=run.label, team=team,
        watch=terms.watch, exact=True, outlook=outlook,
    )  # fmt: skip
    file, iteration = run.tested, int(trained.best["iteration"])
    number = None if run.whole is None else run.whole.datasets.index(run.config.datasets[0])
    of: dict[str, Any] = {} if number is None else {"objective": number, "of": terms.episodes}
    # what no setting tells: episodes that were handed in, or how an earlier version drew several data sets'
    if terms.test is not None or len((run.whole or run.config).datasets) > 1:
        of["drawn"] = team.on_first(lambda: _fingerprint(terms.tests(run.config), run.config))
    kept = team.on_first(lambda: None if file is None else _kept(file, trained, terms.episodes, of))
    if kept is not None:
        before = team.on_first(lambda: "" if file is None else version_in(file))
        return Result(kept, trained.seconds, iteration, before)
    with counting(f"{run.label}: test", terms.episodes, terms.progress and team.first) as tick:
        source = terms.tests(run.whole or run.config)
        found = run_test(trained, terms.episodes, source, tick, number)
    if file is not None and team.first:
        write_evaluation(file, found, iteration, run.config.test_steps, version=version(), **of)
    return Result(found, trained.seconds, iteration, version())


def _fingerprint(source: Source, config: TrainConfig) -> str:
    """What tells a run's test episodes from others': a digest of the first ones, of each of several sources."""
    count = source.period if isinstance(source, MixedSource) else 1
    task = source.with_seed(stream_seed(config.seed, "test")).sample(count)
    digest = hashlib.sha256()
    for part in (task.support_x, task.support_y, task.query_x, task.query_y):
        plain = part.double() if part.is_floating_point() else part
        digest.update(plain.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def run_test(
    run: Run,
    episodes: int,
    source: Source,
    progress: Callable[[int], object] | None = None,
    objective: int | None = None,
) -> Evaluation:
    """Test a finished run's best validated weights on the test episodes of its seed.

    Of several objectives' episodes only those of the number ``objective`` count, if one is given.
    """
    run.load_best()
    protocol = run.config.protocol
    evaluation = evaluate(
        run.model,
        source,
        run.test_learner,
        episodes,
        stream_seed(run.config.seed, "test"),
        meta=run.meta,
        loss=run.loss,
        score=run.score,
        protocol=None if protocol == "auto" else protocol,  # type: ignore[arg-type]
        progress=progress,
        team=run.team,
    )
    if objective is not None:
        evaluation = evaluation.of_group(objective)
    require_finite(evaluation)
    return evaluation


def _kept(file: Path, run: Run, episodes: int, of: dict[str, Any]) -> Evaluation | None:
    """This run's test, if it was done before; None if there is none, or a different one."""
    config = run.config
    wanted = {
        "schema": "gametalearn.evaluation/1",
        "metric": run.score.name,
        "protocol": protocol_of(run.model) if config.protocol == "auto" else config.protocol,
        "seed": stream_seed(config.seed, "test"),
        "iteration": run.best["iteration"],
        "inner_steps": config.test_steps,
        **({} if "objective" in of else {"episodes": episodes}),
        **of,
    }
    found = read_evaluation(file, wanted)
    return None if found is None else dataclasses.replace(found, format=run.score.format)
