"""What was found, and the files that keep it: ``results.json`` and ``evaluation.json``.

A `Comparison` holds what `gametalearn.comparison.compare` found, down to each test episode; its
`as_dict` is the content of ``results.json``. Tables, plots and reports are made of that content, so
that `gametalearn.stored.read_results` is all they need of a comparison that has ended.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gametalearn.config import TrainConfig
from gametalearn.environment import environment
from gametalearn.errors import InputError
from gametalearn.evaluation import Evaluation
from gametalearn.files import replacing, write_json
from gametalearn.objectives import PerObjective
from gametalearn.records import one_line
from gametalearn.scores import SCORES, Score
from gametalearn.statistics import (
    Estimate,
    ahead,
    half_width,
    holm,
    over_episodes,
    over_seeds,
    stratified_mean,
)
from gametalearn.tables import table

__all__ = [
    "Comparison",
    "Result",
    "Single",
    "adjusted",
    "evaluation_record",
    "looks_in",
    "pair_of",
    "require_finite",
    "write_evaluation",
    "write_results",
]

SCHEMA = "gametalearn.compare/2"
BEFORE = "gametalearn.compare/1"
"""The schemas that are read; the first one is written."""

DAMAGE = (LookupError, TypeError, ValueError, AttributeError, OverflowError)
"""What comes of reading a file that holds something else."""


@dataclass(frozen=True)
class Result:
    """One rule on one seed: its test, the seconds that its training took, its best iteration.

    ``version`` is that of the library that tested it, with the commit where there is one.
    """

    evaluation: Evaluation
    seconds: float
    iteration: int
    version: str = ""

    __repr__ = one_line


@dataclass(frozen=True)
class Single:
    """What models found that learned one objective of several alone.

    Attributes:
        results: one for each seed of the comparison, tested on the objective's own episodes.
        tasks: how many training tasks each of them saw.
        budget: how many of this objective the models of the rules saw.
        given: the folder of the runs, if they were not trained by the comparison.
        differs: settings of such runs that are others than the comparison's, in words.
    """

    results: list[Result]
    tasks: int
    budget: int
    given: str | None = None
    differs: tuple[str, ...] = ()

    __repr__ = one_line


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        config: the settings that all runs share; ``rule`` and ``seed`` are not looked at.
        seeds: their numbers.
        episodes: test episodes for each seed.
        objectives: what the numbers in ``group`` stand for.
        results: for each rule one `Result` for each seed, in the order of ``seeds``.
        given: the score that was compared; by default the one that goes with the data set.
        primary: rules whose differences were announced as the ones that count: their p-values are
            adjusted among themselves.
        command: the command line, if there was one.
        single: by the objective's name, what models found that learned it alone.
    """

    config: TrainConfig
    seeds: tuple[int, ...]
    episodes: int
    objectives: tuple[str, ...]
    results: dict[str, list[Result]]
    given: Score | None = None
    primary: tuple[str, ...] = ()
    command: str | None = None
    single: dict[str, Single] = field(default_factory=dict)

    __repr__ = one_line

    @property
    def score(self) -> Score:
        """What the values are."""
        if self.given is not None:
            return self.given
        return SCORES["mse" if self.config.regression else "accuracy"]

    @property
    def seconds(self) -> float:
        """Of training, over all runs that the comparison trained."""
        own = [single.results for single in self.single.values() if single.given is None]
        return sum(one.seconds for runs in [*self.results.values(), *own] for one in runs)

    @property
    def baseline(self) -> str:
        """The rule that the others are paired with: ``uniform``, or the first."""
        return "uniform" if "uniform" in self.results else next(iter(self.results))

    def mean(self, rule: str) -> float:
        """The mean over seeds of a rule's mean over episodes."""
        return self.over_seeds(rule).mean

    def over_seeds(self, rule: str) -> Estimate:
        """A rule's mean over seeds with its t interval (`gametalearn.statistics.over_seeds`)."""
        return over_seeds([r.evaluation.mean for r in self.results[rule]])

    def over_episodes(self, rule: str, baseline: str | None = None) -> Estimate:
        """How well these trained models, or their differences from a baseline's, were measured."""
        return over_episodes(*self._episodes(rule, baseline))

    def by_seed(self, rule: str, baseline: str | None = None) -> list[float]:
        """d_s, the rule's mean difference from the baseline on each seed."""
        values = self._values(rule, baseline or self.baseline)
        groups = (r.evaluation.group for r in self.results[rule])
        return [stratified_mean(v, g) for v, g in zip(values, groups, strict=True)]

    def paired(self) -> list[dict[str, Any]]:
        """Each rule beside the baseline, as ``results.json`` tells it."""
        pairs = [
            pair_of(
                rule, self.baseline, self.by_seed(rule), self.score.higher_is_better,
                _precision(self.over_episodes(rule, self.baseline)),
            )
            for rule in self.results
            if rule != self.baseline
        ]  # fmt: skip
        if len(self.objectives) > 1:
            for pair in pairs:
                own = self._per_objective.differences(pair["rule"], self.baseline)
                pair["objectives"] = own
        return adjusted(pairs, self.primary)

    def as_dict(self) -> dict[str, Any]:
        """The content of ``results.json``, schema ``gametalearn.compare/2``; plain, never NaN."""
        config, score = self.config, self.score
        return {
            "schema": SCHEMA,
            "dataset": config.dataset,
            "ways": None if config.regression or config.ways == 1 else config.ways,
            "shots": config.shots,
            "queries": config.queries,
            "learner": config.learner,
            "iterations": config.iterations,
            "meta_batch": config.meta_batch,
            "episodes": self.episodes,
            "protocol": self.results[self.baseline][0].evaluation.protocol,
            "metric": {k: getattr(score, k) for k in ("name", "higher_is_better", "format")},
            "environment": environment(config, self.command),
            **self._brought_to(),
            **({"versions": self._versions} if len(self._versions) > 1 else {}),
            "rules": {rule: self._entry(rule) for rule in self.results},
            **({"primary": list(self.primary)} if self.primary else {}),
            **(
                {"single": {n: self._alone(s) for n, s in self.single.items()}}
                if self.single
                else {}
            ),
            "paired": self.paired(),
            "config": {k: v for k, v in config.as_dict().items() if k not in ("rule", "seed")},
        }

    def table(self) -> str:
        """The final table: a line for each rule, and what the numbers mean."""
        return table(self.as_dict())

    def _entry(self, rule: str) -> dict[str, Any]:
        entry = self._means(self.results[rule], half_width(*self._episodes(rule)))
        return entry | (self._per_objective.entry(rule) if len(self.objectives) > 1 else {})

    @property
    def _versions(self) -> list[str]:
        """The versions that tested the runs; "unknown" where an older one did not tell."""
        return sorted({r.version or "unknown" for runs in self.results.values() for r in runs})

    def _brought_to(self) -> dict[str, Any]:
        """What the images of several data sets were converted to."""
        if len(self.config.datasets) < 2 or not self.config.of_images:
            return {}
        size, channels = self.config.brought_to
        return {"brought_to": {"image_size": size, "channels": channels}}

    def _means(self, results: list[Result], half_episodes: float | None) -> dict[str, Any]:
        """The mean over seeds, its intervals, and each seed."""
        metric = self.score.name
        over = over_seeds([r.evaluation.mean for r in results])
        return {
            metric: over.mean,
            "ci95": over.half,
            "ci95_episodes": half_episodes,
            "seeds": [
                {
                    "seed": seed,
                    metric: r.evaluation.mean,
                    "ci95_episodes": r.evaluation.ci95,
                    "seconds": round(r.seconds, 3),
                    "best_iteration": r.iteration,
                }
                for seed, r in zip(self.seeds, results, strict=True)
            ],
        }

    def _alone(self, single: Single) -> dict[str, Any]:
        """Of models of one objective alone."""
        values = [r.evaluation.values for r in single.results]
        strata = np.repeat(range(len(values)), [len(v) for v in values])
        return {
            **self._means(single.results, half_width(np.concatenate(values), strata)),
            "tasks": single.tasks,
            "budget": single.budget,
            "runs": single.given,
            **({"differs": list(single.differs)} if single.differs else {}),
        }

    @property
    def _per_objective(self) -> PerObjective:
        def tests(results: list[Result]) -> list[Evaluation]:
            return [r.evaluation for r in results]

        return PerObjective(
            self.score.name,
            self.score.higher_is_better,
            self.objectives,
            {rule: tests(results) for rule, results in self.results.items()},
            {name: tests(one.results) for name, one in self.single.items()},
        )

    def _episodes(
        self, rule: str, baseline: str | None = None
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """All values, or differences from a baseline's, and their strata: seed and objective."""
        groups = 1 + max(int(r.evaluation.group.max()) for r in self.results[rule])
        strata = [seed * groups + r.evaluation.group for seed, r in enumerate(self.results[rule])]
        return np.concatenate(self._values(rule, baseline)), np.concatenate(strata)

    def _values(self, rule: str, baseline: str | None) -> list[np.ndarray[Any, Any]]:
        """Of each seed the episodes' values, or their differences from the same ones of a baseline.

        Raises:
            InputError: the two were not tested on the same episodes.
        """
        mine = [r.evaluation for r in self.results[rule]]
        if baseline is None:
            return [one.values for one in mine]
        theirs = [r.evaluation for r in self.results[baseline]]
        for one, other in zip(mine, theirs, strict=True):
            if one.seed != other.seed or not np.array_equal(one.group, other.group):
                raise InputError(
                    f"'{rule}' and '{baseline}' were tested on different episodes; they cannot be "
                    "paired"
                )
        return [one.values - other.values for one, other in zip(mine, theirs, strict=True)]


def _precision(found: Estimate) -> dict[str, Any]:
    return {"ci95": _plain(found.ci95), "p_value": found.p_value}


def _plain(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


def pair_of(
    rule: str, baseline: str, by_seed: list[float], higher: bool, episodes: dict[str, Any]
) -> dict[str, Any]:
    """A rule beside the baseline; ``p_holm`` is still to come."""
    over = over_seeds(by_seed)
    return {
        "rule": rule,
        "baseline": baseline,
        "difference": over.mean,
        "ci95": _plain(over.ci95),
        "p_value": over.p_value,
        "p_holm": None,
        "seeds": len(by_seed),
        "seeds_ahead": sum(ahead(d, higher) for d in by_seed),
        "by_seed": by_seed,
        "episodes": episodes,
    }


def adjusted(pairs: list[dict[str, Any]], primary: Sequence[str]) -> list[dict[str, Any]]:
    """With their p-values adjusted over the primary rules, and over all others."""
    p_holm = holm([p["p_value"] for p in pairs], [p["rule"] in primary for p in pairs])
    return [{**pair, "p_holm": p} for pair, p in zip(pairs, p_holm, strict=True)]


def write_results(folder: Path, comparison: Comparison) -> None:
    """Write ``results.json``, and note in ``looks.jsonl`` that these seeds have been looked at."""
    found = comparison.as_dict()
    write_json(folder / "results.json", found, indent=2)
    looks = looks_in(folder)
    look = {
        "rules": list(comparison.results), "seeds": list(comparison.seeds),
        "primary": list(comparison.primary), "of": digest_of(found["config"]),
    }  # fmt: skip
    if look not in looks:
        with replacing(folder / LOOKS) as stream:
            stream.writelines(json.dumps(one).encode() + b"\n" for one in [*looks, look])


def digest_of(config: dict[str, Any]) -> str:
    """What tells settings from others: looks at results of other settings do not count."""
    plain = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


LOOKS = "looks.jsonl"
"""A line for each set of rules and seeds whose results were written: who adds seeds after a look
draws more false conclusions than the p-values say."""


def looks_in(folder: Path) -> list[dict[str, Any]]:
    try:
        found = [json.loads(line) for line in (folder / LOOKS).read_text().splitlines()]
        return [
            {
                **{key: list(look[key]) for key in ("rules", "seeds")},
                "primary": list(look.get("primary", ())), "of": str(look.get("of", "")),
            }
            for look in found
        ]  # fmt: skip
    except (OSError, *DAMAGE):
        return []


def require_finite(evaluation: Evaluation) -> None:
    """Raise an `InputError` if an episode's value is NaN or infinite: there is no mean to report."""
    bad = int((~np.isfinite(evaluation.values)).sum())
    if bad:
        raise InputError(
            f"{bad} of {len(evaluation.values)} test episodes diverge ({evaluation.metric} is not "
            "finite); lower `inner_lr` or `test_steps`"
        )


def evaluation_record(
    evaluation: Evaluation, iteration: int, steps: int, **more: Any
) -> dict[str, Any]:
    """The content of ``evaluation.json``, schema ``gametalearn.evaluation/1``.

    ``more``: of a model that was tested on one objective of several, its number ``objective``, and how
    many episodes ``of`` all of them were drawn.
    """
    return {
        "schema": "gametalearn.evaluation/1",
        "metric": evaluation.metric,
        evaluation.metric: evaluation.mean,
        "ci95": evaluation.ci95,
        "protocol": evaluation.protocol,
        "episodes": len(evaluation.values),
        "seed": evaluation.seed,
        "iteration": iteration,
        "inner_steps": steps,
        **more,
        "values": evaluation.values.tolist(),
        "group": evaluation.group.tolist(),
    }


def write_evaluation(
    file: Path, evaluation: Evaluation, iteration: int, steps: int, **more: Any
) -> None:
    """Write `evaluation_record` to a file."""
    content = evaluation_record(evaluation, iteration, steps, **more)
    with replacing(file) as stream:
        stream.write(json.dumps(content, allow_nan=False).encode() + b"\n")
