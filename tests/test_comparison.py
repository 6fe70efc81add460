import dataclasses
import json

import pytest
import torch

from gametalearn.comparison import compare
from gametalearn.config import TrainConfig
from gametalearn.errors import InputError
from gametalearn.gradients import meta_gradients
from gametalearn.report import plot_comparison
from gametalearn.stored import earlier_looks, read_results
from tests.support.runs import tiny, untimed, weights


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
    assert found["schema"] == "gametalearn.compare/2"
    assert [s["seed"] for s in found["rules"]["uniform"]["seeds"]] == [0, 1]
    assert found["paired"][0]["baseline"] == "uniform"


def test_twice_the_same_is_bit_identical_and_another_seed_is_not(tmp_path):
    for name, seeds in (("a", [0]), ("b", [0]), ("c", [1])):
        compare(tiny(), ["uniform", "agreement"], seeds, 5, tmp_path / name, progress=False)
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")
    assert untimed(tmp_path / "a") != untimed(tmp_path / "c")


def test_two_processes_find_what_one_does(tmp_path, capsys):
    for name, jobs in (("a", 1), ("b", 2)):
        compare(tiny(threads=1), ["uniform", "agreement"], 2, 5, tmp_path / name, jobs=jobs)
        assert [line.split(" runs")[0][-6:] for line in said(capsys)] == [
            "1 of 4", "2 of 4", "3 of 4", "4 of 4"
        ]  # fmt: skip
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")
    with pytest.raises(InputError, match="`jobs` 2"):
        compare(tiny(), ["uniform"], jobs=2)


def test_what_is_finished_is_not_trained_again(tmp_path, monkeypatch):
    compare(tiny(), ["uniform"], 1, 5, tmp_path, progress=False)
    before = weights(tmp_path / "uniform" / "seed0")
    monkeypatch.setattr("gametalearn.training.meta_gradients", None)  # training would fail
    again = compare(tiny(), ["uniform"], 1, 5, tmp_path, progress=False)
    assert again.as_dict()["rules"]["uniform"]["seeds"][0]["seed"] == 0
    monkeypatch.undo()
    compare(tiny(), ["uniform", "norm-control"], 2, 5, tmp_path, progress=False)
    after = weights(tmp_path / "uniform" / "seed0")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    other = weights(tmp_path / "norm-control" / "seed1")
    assert not all(torch.equal(value, other[name]) for name, value in before.items())
    with pytest.raises(InputError, match="other settings"):
        compare(tiny(inner_lr=0.5), ["uniform"], 1, 5, tmp_path, progress=False)


def test_plots_are_written(tmp_path):
    comparison = compare(tiny(), ["uniform", "agreement"], 2, 5, tmp_path, progress=False)
    files = plot_comparison(comparison, tmp_path)
    assert {f.name for f in files} == {
        "learning_curves.png", "mse.png", "differences.png", "weights-agreement.png"
    }  # fmt: skip
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)


@pytest.mark.parametrize(
    ("rules", "seeds", "episodes", "message"),
    [
        ([], 1, 5, "`rules`"),
        (["uniform", "uniform"], 1, 5, "each rule once"),
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


@pytest.mark.parametrize("primary", ["uniform", "gradnorm"])
def test_a_primary_rule_is_one_that_is_compared(tmp_path, primary):
    with pytest.raises(InputError, match=f"'{primary}' is not compared with 'uniform'"):
        compare(tiny(), ["uniform", "agreement"], 1, 5, tmp_path / "a", primary=[primary])
    assert not (tmp_path / "a").exists()


def test_more_seeds_train_only_the_new_ones_and_equal_all_from_the_start(tmp_path, monkeypatch):
    rules, trained = ["uniform", "agreement"], []
    compare(tiny(), rules, 3, 5, tmp_path / "a", progress=False)

    def counted(*args, **more):
        trained.append(1)
        return meta_gradients(*args, **more)

    monkeypatch.setattr("gametalearn.training.meta_gradients", counted)
    compare(tiny(), rules, 5, 5, tmp_path / "a", progress=False)
    assert len(trained) == 2 * 2 * 6  # rules, new seeds, iterations
    compare(tiny(), rules, 5, 5, tmp_path / "b", progress=False)
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")
    for place in ("a", "b"):
        found = read_results(tmp_path / place)
        assert earlier_looks(tmp_path / place, found) == ([3] if place == "a" else [])


def said(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if "runs done" in line]


def test_it_says_how_far_it_is(tmp_path, capsys):
    compare(tiny(), ["uniform", "agreement"], 2, 5, tmp_path)
    first, second, _, last = said(capsys)
    assert first.startswith("uniform, seed 0: test mse ")
    assert "; 1 of 4 runs done, about " in first
    assert second.startswith("agreement, seed 0: test mse ")
    assert "; minus uniform so far " in second
    assert " (1 seed); 2 of 4 runs done, about " in second
    assert last.endswith("4 of 4 runs done")
    compare(tiny(), ["uniform", "agreement"], 3, 5, tmp_path)  # what is there is no news
    assert len(said(capsys)) == 2


def test_a_config_is_checked():
    with pytest.raises(InputError, match="`meta_batch` must be at least 1, got 0"):
        TrainConfig.of("sinusoid", meta_batch=0)
    with pytest.raises(InputError, match="unknown learner 'maml\\+\\+'; did you mean 'maml'"):
        TrainConfig.of("sinusoid", learner="maml++")
    with pytest.raises(InputError, match="unknown settings metabatch"):
        TrainConfig.of("sinusoid", metabatch=2)
    with pytest.raises(InputError, match="needs model='mlp'"):
        dataclasses.replace(TrainConfig.of("glyphs"), dataset="sinusoid")
