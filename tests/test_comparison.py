import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from gametalearn.comparison import Comparison, Result, compare, paired_difference
from gametalearn.config import TrainConfig
from gametalearn.errors import InputError
from gametalearn.evaluation import Evaluation
from gametalearn.report import _Record, _weights, plot_comparison
from gametalearn.runfolder import load_run


def tiny(**given):
    settings = {"iterations": 6, "meta_batch": 4, "hidden": 8, "validation_episodes": 4}
    settings |= {"log_every": 1, "validate_every": 3}
    return TrainConfig.of("sinusoid", **{**settings, **given})


def untimed(folder):
    results = json.loads((folder / "results.json").read_text())
    for rule in results["rules"].values():
        for seed in rule["seeds"]:
            del seed["seconds"]
    return results


def test_paired_difference_equals_scipys_paired_test():
    generator = np.random.default_rng(0)
    a, b = generator.random(50), generator.random(50)
    found, peer = paired_difference(a, b), stats.ttest_rel(a, b)
    interval = peer.confidence_interval(0.95)
    assert found["difference"] == pytest.approx((a - b).mean())
    assert found["p_value"] == pytest.approx(peer.pvalue)
    assert found["ci95"] == pytest.approx([interval.low, interval.high])


def test_paired_difference_at_its_edges():
    same = np.array([0.5, 0.25, 1.0])
    assert paired_difference(same, same) == {"difference": 0, "ci95": [0, 0], "p_value": 1}
    assert paired_difference(same + 0.5, same) == {
        "difference": 0.5, "ci95": [0.5, 0.5], "p_value": 0,
    }  # fmt: skip


def test_rules_differ_in_nothing_but_the_rule(tmp_path):
    compare(tiny(), ["uniform", "agreement"], 2, 5, tmp_path, progress=False)
    first = {}
    for rule in ("uniform", "agreement"):
        lines = (tmp_path / rule / "seed1" / "metrics.jsonl").read_text().splitlines()
        first[rule] = json.loads(lines[0])
    # before the first update both rules have the same weights and see the same episodes
    assert first["uniform"]["losses"] == first["agreement"]["losses"]
    assert first["uniform"]["effective"] != first["agreement"]["effective"]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["schema"] == "gametalearn.compare/1"
    assert [s["seed"] for s in found["rules"]["uniform"]["seeds"]] == [0, 1]
    assert found["paired"][0]["baseline"] == "uniform"


def test_twice_the_same_is_bit_identical_and_another_seed_is_not(tmp_path):
    for name, seeds in (("a", [0]), ("b", [0]), ("c", [1])):
        compare(tiny(), ["uniform", "agreement"], seeds, 5, tmp_path / name, progress=False)
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")
    assert untimed(tmp_path / "a") != untimed(tmp_path / "c")


def test_two_processes_find_what_one_does(tmp_path):
    for name, jobs in (("a", 1), ("b", 2)):
        config = tiny(threads=1)
        compare(config, ["uniform", "agreement"], 2, 5, tmp_path / name, jobs=jobs, progress=False)
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")
    with pytest.raises(InputError, match="`jobs` 2"):
        compare(tiny(), ["uniform"], jobs=2)


def test_what_is_finished_is_not_trained_again(tmp_path, monkeypatch):
    compare(tiny(), ["uniform"], 1, 5, tmp_path, progress=False)
    before = load_run(tmp_path / "uniform" / "seed0", "latest").meta
    monkeypatch.setattr("gametalearn.training.meta_gradients", None)  # training would fail
    again = compare(tiny(), ["uniform"], 1, 5, tmp_path, progress=False)
    assert again.as_dict()["rules"]["uniform"]["seeds"][0]["seed"] == 0
    monkeypatch.undo()
    compare(tiny(), ["uniform", "norm-control"], 2, 5, tmp_path, progress=False)
    assert before.keys() == load_run(tmp_path / "norm-control" / "seed1").meta.keys()
    with pytest.raises(InputError, match="other settings"):
        compare(tiny(inner_lr=0.5), ["uniform"], 1, 5, tmp_path, progress=False)


def result(values, group=None):
    values = np.array(values, dtype=float)
    group = np.zeros(len(values), dtype=np.int64) if group is None else np.array(group)
    return Result(Evaluation(values, group, "accuracy", "transductive", 0), 1.0, 1)


def test_results_by_hand():
    config = TrainConfig.of("glyphs+omniglot")
    results = {
        "uniform": [result([0.5, 0.7], [0, 1]), result([0.3, 0.5], [0, 1])],
        "agreement": [result([0.6, 0.8], [0, 1]), result([0.4, 0.6], [0, 1])],
    }
    found = Comparison(config, (0, 1), 2, ("glyphs", "omniglot"), results).as_dict()
    rule = found["rules"]["uniform"]
    assert rule["accuracy"] == pytest.approx(0.5)
    # standard error of 0.5, 0.7, 0.3, 0.5
    assert rule["ci95"] == pytest.approx(1.96 * (0.08 / 3) ** 0.5 / 2)
    assert rule["objectives"]["omniglot"]["accuracy"] == pytest.approx(0.6)
    assert found["paired"][0]["difference"] == pytest.approx(0.1)
    json.dumps(found, allow_nan=False)


def test_the_table_shows_the_interval_over_three_seeds():
    results = {
        "uniform": [result([0.5, 0.7]), result([0.3, 0.5]), result([0.5, 0.5])],
        "agreement": [result([0.6, 0.7]), result([0.4, 0.5]), result([0.5, 0.6])],
    }
    comparison = Comparison(TrainConfig.of("glyphs"), (0, 1, 2), 2, ("glyphs",), results)
    means = np.array([0.6, 0.4, 0.5])
    half = stats.t.ppf(0.975, 2) * means.std(ddof=1) / 3**0.5
    assert comparison.over_seeds("uniform") == pytest.approx(half)
    table = comparison.table()
    assert f"± {100 * half:.2f}" in table
    assert "50.00 ±" in table
    assert "nan" not in table.lower()


def test_plots_are_written(tmp_path):
    comparison = compare(tiny(), ["uniform", "agreement"], 2, 5, tmp_path, progress=False)
    files = plot_comparison(comparison, tmp_path)
    assert {f.name for f in files} == {"learning_curves.png", "mse.png", "weights-agreement.png"}
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)


def test_the_share_of_negative_weights_is_drawn_where_there_are_any(tmp_path):
    def height(*weights):
        runs = [[_Record(i, np.array(weights), None) for i in (1, 10, 20)]]
        with Image.open(_weights("rule", runs, tmp_path / "weights.png")) as picture:
            return picture.height

    assert height(0.2, 0.8) < height(-0.2, 1.2)


@pytest.mark.parametrize(
    ("rules", "seeds", "episodes", "message"),
    [
        ([], 1, 5, "`rules`"),
        (["uniform", "uniform"], 1, 5, "different rules"),
        (["uniform"], [], 5, "`seeds`"),
        (["uniform"], 1, 1, "`episodes`"),
        (["unifrom"], 1, 5, "unifrom"),
    ],
)
def test_bad_arguments_are_found_before_anything_is_trained(
    tmp_path, rules, seeds, episodes, message
):
    with pytest.raises(InputError, match=message):
        compare(tiny(), rules, seeds, episodes, tmp_path / "a", progress=False)
    assert not (tmp_path / "a").exists()


def test_a_config_is_checked():
    with pytest.raises(InputError, match="`meta_batch` must be at least 1, got 0"):
        TrainConfig.of("sinusoid", meta_batch=0)
    with pytest.raises(InputError, match="unknown learner 'maml\\+\\+'; did you mean 'maml'"):
        compare(TrainConfig.of("sinusoid", learner="maml++"), ["uniform"], progress=False)
    with pytest.raises(InputError, match="unknown settings metabatch"):
        TrainConfig.of("sinusoid", metabatch=2)
    with pytest.raises(InputError, match="needs model='mlp'"):
        dataclasses.replace(TrainConfig.of("glyphs"), dataset="sinusoid")
