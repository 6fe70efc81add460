"""What ``results.json`` reports on each objective of a comparison, and on a rule over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gametalearn.errors import InputError
from gametalearn.evaluation import Evaluation
from gametalearn.statistics import half_width, over_seeds
from gametalearn.tradeoffs import mean_ranks, relative_change, relative_change_of_means

__all__ = ["PerObjective"]

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class PerObjective:
    """The tests of a comparison, objective by objective.

    Attributes:
        metric: the score's name.
        higher_is_better: whether a higher score is better.
        names: what the numbers in ``group`` stand for.
        tested: for each rule, one test per seed; all rules share the same episodes.
        single: for each objective, by name, the tests of the models that learned it alone, one per
            seed, on the same episodes of that objective and no others; empty if there are none.
    """

    metric: str
    higher_is_better: bool
    names: tuple[str, ...]
    tested: Mapping[str, Sequence[Evaluation]]
    single: Mapping[str, Sequence[Evaluation]]

    def entry(self, rule: str) -> dict[str, Any]:
        """``objectives``; ``mean_rank`` among several rules; ``delta_m`` if there are single models."""
        entry: dict[str, Any] = {"objectives": {n: self._mean(rule, n) for n in self._present}}
        if len(self.tested) > 1:
            entry["mean_rank"] = self._ranks[list(self.tested).index(rule)]
        if self.single:
            entry["delta_m"] = self._delta_m(rule)
        return entry

    def _delta_m(self, rule: str) -> dict[str, Any] | None:
        """Of the means over seeds, with its interval; ``by_seed``, each seed's own."""
        values = np.transpose([self._by_seed(rule, name) for name in self.single])
        single = np.transpose([[one.mean for one in tests] for tests in self.single.values()])
        of_means = relative_change_of_means(values, single, self.higher_is_better)
        by_seed = relative_change(values, single, self.higher_is_better)
        if of_means is None or by_seed is None:
            return None
        return {**estimated("mean", of_means), "by_seed": by_seed}

    def differences(self, rule: str, baseline: str) -> dict[str, Any]:
        """For each objective, the rule's mean minus the baseline's, over seeds."""
        return {
            name: estimated(
                "difference",
                [
                    None if mine is None or theirs is None else mine - theirs
                    for mine, theirs in zip(
                        self._by_seed(rule, name), self._by_seed(baseline, name), strict=True
                    )
                ],
            )
            for name in self._present
        }

    @property
    def _present(self) -> list[str]:
        """The objectives that have a test episode with some seed; the rules share their episodes."""
        first = next(iter(self.tested.values()))
        groups = {int(g) for one in first for g in np.unique(one.group)}
        return [name for number, name in enumerate(self.names) if number in groups]

    @property
    def _ranks(self) -> list[float]:
        means = [[self._mean(rule, n)[self.metric] for n in self._present] for rule in self.tested]
        return mean_ranks(means, self.higher_is_better)

    def _parts(self, rule: str, name: str) -> list[Array]:
        """Each seed's values of one objective, which may be none."""
        number = self.names.index(name)
        return [one.values[one.group == number] for one in self.tested[rule]]

    def _by_seed(self, rule: str, name: str) -> list[float | None]:
        return [float(p.mean()) if len(p) else None for p in self._parts(rule, name)]

    def _mean(self, rule: str, name: str) -> dict[str, Any]:
        """One objective's mean, its intervals, and each seed's mean."""
        by_seed, parts = self._by_seed(rule, name), self._parts(rule, name)
        over = over_seeds([value for value in by_seed if value is not None])
        strata = np.repeat(range(len(parts)), [len(part) for part in parts])
        found: dict[str, Any] = {
            self.metric: over.mean,
            "ci95": over.half,
            "ci95_episodes": half_width(np.concatenate(parts), strata),
            "by_seed": by_seed,
        }
        if name in self.single:
            alone = self.single[name]
            for mine, other, whole in zip(parts, alone, self.tested[rule], strict=True):
                if (whole.seed, len(mine)) != (other.seed, len(other.values)):
                    raise InputError(
                        f"'{rule}' and the model of '{name}' alone were tested on different "
                        "episodes; they cannot be paired"
                    )
            pairs = zip(parts, alone, strict=True)
            differences = [float((mine - other.values).mean()) for mine, other in pairs]
            found["minus_single"] = estimated("difference", differences)
        return found


def estimated(key: str, by_seed: Sequence[float | None]) -> dict[str, Any]:
    """The mean over those seeds that have a value, its 95% t interval (or None), and each seed's."""
    over = over_seeds([value for value in by_seed if value is not None])
    interval = None if over.ci95 is None else list(over.ci95)
    return {key: over.mean, "ci95": interval, "by_seed": list(by_seed)}
