"""What a comparison says: by hand, by simulation, as a file and as a table."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from gametalearn.cautions import at_once
from gametalearn.config import TrainConfig
from gametalearn.errors import InputError
from gametalearn.evaluation import Evaluation
from gametalearn.results import Comparison, Result, Single, write_results
from gametalearn.scores import SCORES
from gametalearn.stored import earlier_looks, read_results
from gametalearn.tables import needed, rows, sentence, title

Values = Any
"""Of each rule, for each seed, the accuracies of its test episodes: ``(S, E)``."""


def comparison(values: dict[str, Values], group: Any = None, **more: Any) -> Comparison:
    """What `compare` would have found if the test episodes had had these accuracies."""
    names = ("glyphs",) if group is None else ("glyphs", "omniglot")
    results = {
        rule: [
            Result(
                Evaluation(
                    np.asarray(one, dtype=np.float64),
                    np.zeros(len(one), dtype=np.int64) if group is None else np.array(group),
                    "accuracy", "transductive", seed,
                ),
                1.5, 100,
            )
            for seed, one in enumerate(seeds)
        ]
        for rule, seeds in values.items()
    }  # fmt: skip
    seeds, episodes = np.shape(next(iter(values.values())))
    config = more.pop("config", TrainConfig.of("+".join(names), threads=1))
    return Comparison(config, tuple(range(seeds)), episodes, names, results, **more)


FIVE = {
    "uniform": [[0.5, 0.7], [0.3, 0.5], [0.5, 0.5], [0.4, 0.5], [0.6, 0.6]],
    "agreement": [[0.4, 0.6], [0.2, 0.3], [0.4, 0.3], [0.3, 0.5], [0.4, 0.6]],
    "norm-control": [[0.5, 0.8], [0.3, 0.4], [0.6, 0.5], [0.4, 0.5], [0.6, 0.6]],
}


def test_by_hand() -> None:
    found = comparison(FIVE).as_dict()
    json.dumps(found, allow_nan=False)
    means = np.mean(FIVE["uniform"], axis=1)
    uniform = found["rules"]["uniform"]
    assert uniform["accuracy"] == pytest.approx(means.mean())
    assert uniform["ci95"] == pytest.approx(stats.t.ppf(0.975, 4) * means.std(ddof=1) / 5**0.5)
    # variances of the seeds' two episodes 0.02, 0.02, 0, 0.005, 0
    error = math.sqrt((0.02 + 0.02 + 0.005) / 2) / 5
    assert uniform["ci95_episodes"] == pytest.approx(1.96 * error)
    assert uniform["seeds"][1] == {
        "seed": 1, "accuracy": pytest.approx(0.4), "ci95_episodes": pytest.approx(1.96 * 0.1),
        "seconds": 1.5, "best_iteration": 100,
    }  # fmt: skip
    agreement, control = found["paired"]
    d = np.mean(FIVE["agreement"], axis=1) - means
    peer = stats.ttest_1samp(d, 0)
    assert agreement["by_seed"] == pytest.approx(d.tolist(), abs=1e-12)
    assert agreement["difference"] == pytest.approx(d.mean(), abs=1e-12)
    assert agreement["ci95"] == pytest.approx(list(peer.confidence_interval(0.95)), abs=1e-12)
    assert agreement["p_value"] == pytest.approx(peer.pvalue, abs=1e-12)
    assert agreement["p_holm"] == pytest.approx(2 * peer.pvalue, abs=1e-12)  # the smaller of two
    assert control["p_holm"] == control["p_value"]
    assert (agreement["seeds"], agreement["seeds_ahead"], control["seeds_ahead"]) == (5, 0, 2)
    assert agreement["episodes"]["ci95"][0] < agreement["difference"]


def test_the_schema() -> None:
    """The keys that DESIGN calls fixed; anything else is an addition that has to be meant."""
    found = comparison(FIVE).as_dict()
    assert found["schema"] == "gametalearn.compare/2"
    assert list(found) == [
        "schema", "dataset", "ways", "shots", "queries", "learner", "iterations", "meta_batch",
        "episodes", "protocol", "metric", "environment", "rules", "paired", "config",
    ]  # fmt: skip
    assert found["metric"] == {"name": "accuracy", "higher_is_better": True, "format": "percent"}
    assert list(found["rules"]["uniform"]) == ["accuracy", "ci95", "ci95_episodes", "seeds"]
    assert list(found["paired"][0]) == [
        "rule", "baseline", "difference", "ci95", "p_value", "p_holm", "seeds", "seeds_ahead",
        "by_seed", "episodes",
    ]  # fmt: skip
    assert list(found["paired"][0]["episodes"]) == ["ci95", "p_value"]
    environment = found["environment"]
    assert set(environment["versions"]) == {"python", "torch", "numpy", "scipy"}
    assert (environment["device"], environment["threads"]) == ("cpu", 1)
    assert environment["command"] is None
    assert comparison(FIVE, command="gametalearn compare").as_dict()["environment"]["command"]


def made_of(comparison: Comparison, single: dict[str, Single]) -> str:
    return dataclasses.replace(comparison, single=single).table()


def test_the_schema_of_several_objectives() -> None:
    """Further keys of schema 2, on objectives that differ in difficulty."""
    generator = np.random.default_rng(3)
    group = [0, 0, 0, 0, 1, 1]
    level = np.array([0.9] * 4 + [0.3] * 2)
    values = {
        rule: level + shift + 0.02 * generator.random((4, 6))
        for rule, shift in (("uniform", 0.0), ("dwa", np.where(level < 0.5, 0.06, -0.03)))
    }
    made = comparison(values, group)
    tests = {"glyphs": level[:4] + 0.05, "omniglot": level[4:] + 0.15}
    single = {
        name: Single(
            [
                Result(
                    Evaluation(own, np.full(len(own), k), "accuracy", "transductive", seed), 2.0, 9
                )
                for seed in range(4)
            ],
            tasks=40, budget=40 + 10 * k, given=None,
        )
        for k, (name, own) in enumerate(tests.items())
    }  # fmt: skip
    found = dataclasses.replace(made, single=single).as_dict()
    json.dumps(found, allow_nan=False)
    assert list(found)[12:] == ["brought_to", "rules", "single", "paired", "config"]
    assert found["brought_to"] == {"image_size": 28, "channels": 1}
    assert "converted to 28 x 28 pixels in grayscale" in " ".join(made.table().split())
    assert list(found["single"]["omniglot"]) == [
        "accuracy", "ci95", "ci95_episodes", "seeds", "tasks", "budget", "runs"
    ]  # fmt: skip
    entry = found["rules"]["dwa"]
    assert list(entry)[4:] == ["objectives", "mean_rank", "delta_m"]
    assert list(entry["objectives"]["glyphs"]) == [
        "accuracy", "ci95", "ci95_episodes", "by_seed", "minus_single"
    ]  # fmt: skip
    assert [list(found["paired"][0]["objectives"]), list(entry["delta_m"])] == [
        ["glyphs", "omniglot"], ["mean", "ci95", "by_seed"]
    ]  # fmt: skip
    assert [found["rules"][rule]["mean_rank"] for rule in values] == [1.5, 1.5]
    # by hand: (0.88 - 0.95) / 0.95 and (0.37 - 0.45) / 0.45, a hundredth for what is random
    assert entry["delta_m"]["mean"] == pytest.approx(-(0.07 / 0.95 + 0.08 / 0.45) / 2, abs=0.02)
    by_seed = [
        ((one[:4].mean() - 0.95) / 0.95 + (one[4:].mean() - 0.45) / 0.45) / 2
        for one in values["dwa"]
    ]
    assert entry["delta_m"]["by_seed"] == pytest.approx(by_seed)
    interval = stats.ttest_1samp(by_seed, 0).confidence_interval()  # the single models are constant
    assert entry["delta_m"]["ci95"] == pytest.approx(list(interval))
    assert "The models trained on omniglot alone saw 40 of its tasks" in " ".join(
        made_of(made, single).split()
    )
    zero = {**single, "glyphs": dataclasses.replace(single["glyphs"], results=[
        Result(Evaluation(np.zeros(4), np.zeros(4, dtype=np.int64), "accuracy", "transductive", s), 1, 1)
        for s in range(4)
    ])}  # fmt: skip
    none = dataclasses.replace(made, single=zero)
    assert none.as_dict()["rules"]["dwa"]["delta_m"] is None
    assert "Delta_m is undefined" in " ".join(none.table().split())
    other = dataclasses.replace(single["glyphs"].results[0].evaluation, seed=7)
    wrong = dataclasses.replace(
        single["glyphs"],
        results=[Result(other, 1.0, 1), *single["glyphs"].results[1:]],
    )
    with pytest.raises(InputError, match="'glyphs' alone were tested on different episodes"):
        dataclasses.replace(made, single={**single, "glyphs": wrong}).as_dict()


def test_each_objective_has_digits_that_fit_it() -> None:
    """Errors of different size: with the digits of their mean the smaller one showed nothing."""
    values = {
        rule: np.array([[25000.0, 25000.0, 2.5 + shift, 2.5 + shift]] * 3)
        for rule, shift in (("uniform", 0.0), ("dwa", 0.125))
    }
    made = comparison(values, [0, 0, 1, 1])
    table = dataclasses.replace(made, given=SCORES["mse"]).table()
    lines = [line.split() for line in table.splitlines()]
    assert ["dwa", "25000", "±", "0", "2.625", "±", "0.000"] in lines
    assert any(line[:1] == ["dwa"] and "+0.125" in line for line in lines)


def test_strata_are_seeds_and_groups_also_where_groups_have_no_names() -> None:
    """A source need not name its groups; seed 1's group 0 must not join seed 0's group 1."""
    generator = np.random.default_rng(0)
    level, group = np.array([0.2, 0.5, 0.8]), np.repeat(np.arange(3), 4)
    values = {
        rule: [np.clip(level[group] + 0.1 * generator.standard_normal(12), 0, 1) for _ in range(4)]
        for rule in ("uniform", "agreement")
    }
    named = comparison(values, group)
    named = dataclasses.replace(named, objectives=("a", "b", "c"))
    plain = dataclasses.replace(named, objectives=("all",))
    ours, theirs = plain.as_dict(), named.as_dict()
    for rule in values:
        assert ours["rules"][rule]["ci95_episodes"] == theirs["rules"][rule]["ci95_episodes"]
    assert ours["paired"][0]["episodes"] == theirs["paired"][0]["episodes"]
    low, high = ours["paired"][0]["episodes"]["ci95"]
    assert (low + high) / 2 == pytest.approx(ours["paired"][0]["difference"])


def test_an_objective_without_test_episodes_on_a_seed_is_told() -> None:
    """Seed 1 has none of omniglot's."""
    made = comparison({"uniform": [[0.5, 0.7, 0.9]] * 3, "dwa": [[0.5, 0.6, 0.7]] * 3}, [0, 0, 1])
    assert "had no test episode" not in made.table()
    for results in made.results.values():
        without = dataclasses.replace(results[1].evaluation, group=np.zeros(3, dtype=np.int64))
        results[1] = dataclasses.replace(results[1], evaluation=without)
    assert made.as_dict()["rules"]["uniform"]["objectives"]["omniglot"]["by_seed"] == [
        0.9,
        None,
        0.9,
    ]
    said = " ".join(made.table().split())
    assert (
        "On some seeds, omniglot had no test episode; means on these seeds are over the others"
        in said
    )


@pytest.mark.parametrize(("groups", "each"), [(2, True), (12, True), (13, False)])
def test_a_few_groups_of_one_data_set_have_columns(groups: int, each: bool) -> None:
    values = np.linspace(0.3, 0.9, 2 * groups)
    made = comparison({"uniform": [values] * 3, "dwa": [values - 0.1] * 3}, [*range(groups)] * 2)
    config = TrainConfig.of("glyphs", objectives="group")
    names = tuple(f"script-{k}" for k in range(groups))
    text = dataclasses.replace(made, config=config, objectives=names).table()
    assert ("each objective minus uniform, points [95%]" in text) == each
    assert all((name in text) == each for name in names)
    assert "mean rank" in text


@pytest.mark.parametrize(
    ("seeds", "flag"),
    [((0, 1), "--seeds 5"), ((7,), "--seeds 7,0,1,2,3"), ((0, 9), "--seeds 0,9,1,2,3")],
)
def test_seeds_are_added_to_those_that_are_there(seeds: tuple[int, ...], flag: str) -> None:
    few = {rule: values[: len(seeds)] for rule, values in FIVE.items()}
    text = dataclasses.replace(comparison(few), seeds=seeds).table()
    assert f"verdict; {flag} trains only those that are missing" in " ".join(text.split())
    header = next(line for line in text.splitlines() if line.startswith("rule"))
    assert header.split()[-3:] == ["minus", "uniform", "ahead"]  # and no verdict
    assert "no difference shown" not in text


def test_means_and_differences_count_each_group_the_same() -> None:
    """With ``--objectives group`` some alphabets have more test episodes than others."""
    generator = np.random.default_rng(0)
    values = {rule: generator.random((4, 6)) for rule in ("uniform", "agreement")}
    group = np.array([0, 0, 0, 0, 1, 2])
    config = TrainConfig.of("glyphs", objectives="group", threads=1)
    made = comparison(values, group=group, config=config)
    made = dataclasses.replace(made, objectives=("Greek", "Latin", "Thai"))
    found, by_hand = made.as_dict(), {}
    for rule, own in values.items():
        over_groups = [[seed[group == g].mean() for g in range(3)] for seed in own]
        by_hand[rule] = np.mean(over_groups, axis=1)
        assert found["rules"][rule]["accuracy"] == pytest.approx(by_hand[rule].mean(), abs=1e-12)
        seeds = [one["accuracy"] for one in found["rules"][rule]["seeds"]]
        assert seeds == pytest.approx(by_hand[rule].tolist(), abs=1e-12)
    (pair,) = found["paired"]
    apart = by_hand["agreement"] - by_hand["uniform"]
    assert pair["by_seed"] == pytest.approx(apart.tolist(), abs=1e-12)
    assert pair["difference"] == pytest.approx(apart.mean(), abs=1e-12)
    pooled = (values["agreement"] - values["uniform"]).mean()
    assert abs(pair["difference"] - pooled) > 0.01  # what counting episodes would give
    _, (uniform, agreement) = rows(found)
    means = [float(line[1].split()[0]) for line in (uniform, agreement)]
    assert float(agreement[2].split()[0]) == pytest.approx(means[1] - means[0], abs=0.011)
    text = " ".join(made.table().split())
    assert "All means and differences are over the 3 objectives that were tested, each of" in text
    assert "objectives that were tested" not in comparison(FIVE).table()


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_have_neither_interval_nor_p(seeds: int) -> None:
    found = comparison({rule: values[:seeds] for rule, values in FIVE.items()})
    content = found.as_dict()
    for pair in content["paired"]:
        assert (pair["ci95"], pair["p_value"], pair["p_holm"]) == (None, None, None)
        assert len(pair["by_seed"]) == pair["seeds"] == seeds
        assert pair["episodes"]["ci95"] is not None
    assert content["rules"]["uniform"]["ci95"] is None
    text = found.table()
    assert "p_holm" not in text
    assert "behind" not in text
    assert f"{seeds} seed" in text
    assert "too few" in text
    assert "too few" in sentence(content, content["paired"][0])


def test_equal_differences_and_identical_rules() -> None:
    values = np.random.default_rng(0).random((3, 4)).round(2) / 2
    found = comparison({"uniform": values, "same": values, "shifted": values + 0.25}).as_dict()
    same, shifted = found["paired"]
    assert (same["difference"], same["ci95"], same["p_value"]) == (0, [0, 0], 1)
    assert shifted["ci95"] == pytest.approx([0.25, 0.25])
    assert (shifted["p_value"], shifted["p_holm"]) == (None, None)
    assert shifted["episodes"]["p_value"] is None
    assert "equal differences do not show" in sentence(found, shifted)
    json.dumps(found, allow_nan=False)


def test_one_episode_each() -> None:
    found = comparison({"uniform": [[0.5], [0.4], [0.6]], "a": [[0.4], [0.3], [0.6]]}).as_dict()
    pair = found["paired"][0]
    assert pair["p_value"] is not None
    assert pair["episodes"] == {"ci95": None, "p_value": None}
    assert found["rules"]["a"]["ci95_episodes"] is None


def test_what_is_not_finite_or_not_paired_is_refused() -> None:
    bad = copy.deepcopy(FIVE)
    bad["agreement"][2][1] = math.nan
    with pytest.raises(InputError, match="NaN"):
        comparison(bad).as_dict()
    mixed = comparison(FIVE)
    mixed.results["agreement"].reverse()
    with pytest.raises(InputError, match="'agreement' and 'uniform' were tested on different"):
        mixed.paired()


def test_several_objectives_count_the_same_and_their_distance_is_no_error() -> None:
    generator = np.random.default_rng(1)
    group = [0] * 30 + [1] * 10
    level = np.where(np.array(group) == 0, 0.8, 0.3)
    values = {rule: level + generator.normal(0, 0.05, (3, 40)) for rule in ("uniform", "agreement")}
    values["agreement"][:, 30:] += 0.1  # the second objective alone
    found = comparison(values, group).as_dict()
    parts = found["rules"]["uniform"]["objectives"]
    assert list(parts) == ["glyphs", "omniglot"]
    assert parts["omniglot"]["accuracy"] == pytest.approx(values["uniform"][:, 30:].mean())
    own = values["uniform"]
    assert found["rules"]["uniform"]["accuracy"] == pytest.approx(
        (own[:, :30].mean() + own[:, 30:].mean()) / 2
    )
    error = math.sqrt(own[:, :30].var(1, ddof=1).sum() / 30 + own[:, 30:].var(1, ddof=1).sum() / 10)
    assert found["rules"]["uniform"]["ci95_episodes"] == pytest.approx(1.96 * error / 6)
    difference = values["agreement"] - own
    wanted = (difference[:, :30].mean(1) + difference[:, 30:].mean(1)) / 2
    assert found["paired"][0]["by_seed"] == pytest.approx(wanted.tolist())
    assert 0.03 < found["paired"][0]["difference"] < 0.07
    text = comparison(values, group).table()
    assert ["rule", "glyphs", "omniglot"] in [line.split() for line in text.splitlines()]


def test_primary_rules_are_a_family_of_their_own() -> None:
    found = comparison(FIVE, primary=("agreement",)).as_dict()
    agreement, control = found["paired"]
    assert found["primary"] == ["agreement"]
    assert agreement["p_holm"] == agreement["p_value"]
    assert control["p_holm"] == control["p_value"]
    text = comparison(FIVE, primary=("agreement",)).table().replace("\n", " ")
    assert "within each of two families, agreement (primary) and the other 1;" in text


# ---------------------------------------------------------------------------------------------
# simulation: comparisons without an effect, from the accuracies of their test episodes

EPISODES = 40
COMPARISONS = 2000


def null(
    generator: np.random.Generator, rules: int, seeds: int, kind: str, comparisons: int
) -> np.ndarray[Any, Any]:
    """Accuracies ``(comparisons, rules, seeds, episodes)`` of rules that do not differ.

    Runs of one seed share its level; each has a deviation of its own (2 points), three times as large as
    the error with which its 40 episodes measure it.
    """
    shape = (comparisons, rules, seeds)
    deviation = generator.normal(0, 0.02, shape)
    if kind == "collapsed":  # one run in ten, of whichever rule
        deviation -= np.where(generator.random(shape) < 0.1, 0.3, 0.0)
    if (
        kind == "skewed"
    ):  # now and then a run of the first rule fails, the others are as good in mean
        deviation = np.zeros(shape)
        deviation[:, 0] = 0.02 - generator.exponential(0.02, (comparisons, seeds))
    level = 0.7 + generator.normal(0, 0.03, (comparisons, 1, seeds))
    noise = generator.normal(0, 0.02 / 3 * EPISODES**0.5, (*shape, EPISODES))
    return np.asarray((level + deviation)[..., None] + noise)


def pairs_of(values: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    names = ["uniform", *(f"rule{i}" for i in range(1, len(values)))]
    return comparison(dict(zip(names, values, strict=True))).paired()


def covers(interval: list[float]) -> bool:
    return interval[0] <= 0 <= interval[1]


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_interval_over_seeds_covers_what_it_claims(seeds: int, record_property: Any) -> None:
    generator = np.random.default_rng(seeds)
    shares, by_episodes = {}, 0.0
    for kind in ("normal", "collapsed", "skewed"):
        count = 500 if kind == "skewed" else COMPARISONS
        found = [pairs_of(v)[0] for v in null(generator, 2, seeds, kind, count)]
        shares[kind] = float(np.mean([covers(pair["ci95"]) for pair in found]))
        if kind == "normal":
            by_episodes = float(np.mean([covers(pair["episodes"]["ci95"]) for pair in found]))
    record_property("coverage", {**shares, "over episodes": by_episodes})
    assert 0.93 <= shares["normal"] <= 0.97
    assert shares["collapsed"] >= 0.93


def test_holm_keeps_the_error_of_a_table_of_eight_rules() -> None:
    values = null(np.random.default_rng(8), 9, 5, "normal", COMPARISONS)
    false = [any(pair["p_holm"] < 0.05 for pair in pairs_of(v)) for v in values]
    assert np.mean(false) <= 0.06


# ---------------------------------------------------------------------------------------------
# files

BEFORE = {
    "schema": "gametalearn.compare/1", "dataset": "glyphs", "ways": 5, "shots": 1, "queries": 5,
    "learner": "maml", "iterations": 150, "meta_batch": 16, "episodes": 600,
    "protocol": "transductive",
    "rules": {
        rule: {
            "accuracy": float(np.mean(values)), "ci95": 0.0073,
            "seeds": [
                {"seed": i, "accuracy": v, "ci95": 0.01, "seconds": 44.0, "best_iteration": 150}
                for i, v in enumerate(values)
            ],
        }
        for rule, values in {"uniform": [0.66, 0.65, 0.64], "agreement": [0.64, 0.635, 0.61]}.items()
    },
    "paired": [
        {"rule": "agreement", "baseline": "uniform", "difference": -0.0214,
         "ci95": [-0.0251, -0.0177], "p_value": 7.2e-29},
    ],
    "config": {"dataset": "glyphs", "objectives": "dataset"},
}  # fmt: skip


def stored(folder: Path, content: Any) -> dict[str, Any]:
    (folder / "results.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )
    return read_results(folder)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    found = comparison(FIVE, primary=("agreement",))
    write_results(tmp_path, found)
    assert read_results(tmp_path) == found.as_dict()


def test_a_look_at_these_settings_is_remembered(tmp_path: Path) -> None:
    three, five = (
        comparison({rule: values[:seeds] for rule, values in FIVE.items()}) for seeds in (3, 5)
    )
    write_results(tmp_path, five)
    assert earlier_looks(tmp_path, five.as_dict()) == []
    for _ in range(2):  # the same look twice
        write_results(tmp_path, three)
        write_results(tmp_path, five)
        assert earlier_looks(tmp_path, five.as_dict()) == [3]
    assert len((tmp_path / "looks.jsonl").read_text().splitlines()) == 2
    (tmp_path / "looks.jsonl").write_text('{"seeds": 3}\n')
    assert earlier_looks(tmp_path, five.as_dict()) == []  # damaged: it is a note, and no more
    write_results(tmp_path, dataclasses.replace(three, config=TrainConfig.of("glyphs", ways=3)))
    write_results(tmp_path, five)
    assert earlier_looks(tmp_path, five.as_dict()) == []  # that was at other settings


def test_what_is_chosen_after_a_look_is_told(tmp_path: Path) -> None:
    """Rules that are left out, other seeds, and a primary rule that was not named before."""
    rules = {**FIVE, "dwa": FIVE["agreement"], "dtp": FIVE["agreement"]}
    found = comparison(rules)
    write_results(tmp_path, found)
    assert at_once(tmp_path, found.as_dict()) == []
    fewer = comparison(FIVE)
    (said,) = at_once(tmp_path, fewer.as_dict())
    assert said.startswith("Results of dwa, dtp were written here before, and are left out now")
    (said,) = at_once(tmp_path, comparison(rules, primary=("agreement",)).as_dict())
    assert said.startswith("agreement was named as primary after results had been written")
    some = dataclasses.replace(
        comparison({rule: values[:3] for rule, values in rules.items()}), seeds=(0, 2, 7)
    )
    (said,) = at_once(tmp_path, some.as_dict())
    assert said.startswith("Results of other seeds (1, 3, 4) were written here before")


def test_different_versions_in_one_table_are_told(tmp_path: Path) -> None:
    found = comparison(FIVE)
    assert "versions" not in found.as_dict()
    old, *rest = found.results["uniform"]
    mixed = {**found.results, "uniform": [dataclasses.replace(old, version="0.1.0"), *rest]}
    other = dataclasses.replace(found, results=mixed)
    assert other.as_dict()["versions"] == ["0.1.0", "unknown"]
    assert "different versions (0.1.0; unknown)" in " ".join(other.table().split())


def test_older_results_say_now_what_they_say_over_seeds(tmp_path: Path) -> None:
    found = stored(tmp_path, BEFORE)
    pair = found["paired"][0]
    assert pair["by_seed"] == pytest.approx([-0.02, -0.015, -0.03])
    assert pair["p_value"] == pytest.approx(stats.ttest_1samp(pair["by_seed"], 0).pvalue)
    assert pair["p_value"] > 0.03
    assert pair["episodes"] == {"ci95": [-0.0251, -0.0177], "p_value": 7.2e-29}
    assert found["rules"]["uniform"]["ci95_episodes"] == 0.0073
    assert found["metric"]["name"] == "accuracy"
    assert "behind uniform by 2.17 points" in sentence(found, pair)


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"results\.json: cannot be read"):
        read_results(tmp_path)
    good = comparison(FIVE).as_dict()
    bad: list[Any] = ["{", "[]", "{}", json.dumps({**good, "schema": "gametalearn.compare/3"})]
    bad += [json.dumps(good).replace('"difference": -', '"difference": NaN, "x": -')]
    for key in good:
        bad.append({k: v for k, v in good.items() if k != key})
    for path, value in (
        (("rules", "uniform", "accuracy"), "high"),
        (("rules", "uniform", "seeds"), []),
        (("rules", "agreement", "seeds", 0, "seed"), 7),
        (("paired", 0, "by_seed"), [0.1]),
        (("paired", 0, "rule"), "gradnorm"),
        (("paired", 0, "episodes"), None),
        (("metric", "name"), 3),
        (("dataset",), 3),
        (("ways",), "five"),
    ):
        changed = copy.deepcopy(good)
        place: Any = changed
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        bad.append(changed)
    for content in bad:
        with pytest.raises(InputError, match=r"results\.json: (damaged|schema)"):
            stored(tmp_path, content)


# ---------------------------------------------------------------------------------------------
# words


def test_the_table() -> None:
    text = comparison(FIVE).table()
    assert all(len(line) <= 100 for line in text.splitlines())
    lines = {line.split("  ")[0]: line for line in text.splitlines() if line}
    assert lines["rule"].split() == [
        "rule", "test", "accuracy", "%", "minus", "uniform", "[95%]", "p_holm", "ahead", "verdict"
    ]  # fmt: skip
    assert "50.90 ± " not in lines["uniform"]
    assert lines["uniform"].split()[1] == "51.00"
    assert lines["agreement"].split("  ")[-1] == "behind"
    assert "-11.00 [" in lines["agreement"]
    assert lines["norm-control"].endswith("2 of 5  no difference shown")
    assert "95% intervals over the 5 seeds" in text
    assert "norm-control: showing half a point would take " in text
    assert "nan" not in text.lower()


def test_verdicts_follow_the_direction() -> None:
    generator = np.random.default_rng(0)
    low = 0.1 + 0.01 * generator.random((5, 20))
    config = TrainConfig.of("sinusoid", threads=1)
    for shift, word in ((0.05, "behind"), (-0.05, "ahead of")):
        values = {"uniform": low, "agreement": low + shift + 0.001 * generator.random((5, 20))}
        found = comparison(values, config=config, given=SCORES["mse"])
        content = found.as_dict()
        said = sentence(content, content["paired"][0])
        assert said.startswith(f"agreement is {word} uniform by 0.0")
        assert f"{word.split()[0]} on 5 of 5 seeds." in said
        assert title(content).startswith("sinusoid, regression 10-shot, maml, 20000 iterations, 5")
        assert all(len(line) <= 100 for line in found.table().splitlines())


def test_how_many_seeds_would_do_takes_the_family_into_account() -> None:
    one = comparison({rule: FIVE[rule] for rule in ("uniform", "norm-control")}).as_dict()
    two = comparison(FIVE).as_dict()
    few, more = needed(one, one["paired"][0]), needed(two, two["paired"][1])
    assert few.startswith("showing half a point would take ")
    assert int(few.split()[6]) < int(more.split()[6])


def test_long_names_and_many_objectives_stay_readable() -> None:
    names = ["uniform", "uncertainty-positive", "torchjd:AlignedMTL"]
    generator = np.random.default_rng(0)
    values = {name: generator.random((5, 4)) for name in names}
    assert max(map(len, comparison(values).table().splitlines())) <= 100
