import dataclasses
import json
from functools import partial

import numpy as np
import pytest
import torch

from gametalearn.comparison import compare
from gametalearn.config import TrainConfig
from gametalearn.data import load_dataset
from gametalearn.data.sinusoid import Sinusoid
from gametalearn.episodes import EpisodeSampler
from gametalearn.errors import InputError
from gametalearn.gradients import meta_gradients
from gametalearn.models import MLP
from gametalearn.report import plot_comparison
from gametalearn.stored import earlier_looks, read_results
from gametalearn.training import train
from gametalearn.weighting import GradNorm, Uniform
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
        ("uniform", 1, 5, "a list of names, such as .'uniform'.; got 'uniform'"),
        (3, 1, 5, "a list of names"),
        ([3], 1, 5, "3 needs a name"),
        ([GradNorm], 1, 5, "needs a name, as in"),
        ({"mine": 3}, 1, 5, "'mine': 3 is neither a rule's name nor"),
        (["uniform"], "3", 5, "a number of seeds or a list of them, got '3'"),
        (["uniform"], 2.0, 5, "a number of seeds or a list of them, got 2.0"),
        (["uniform"], True, 5, "a number of seeds or a list of them, got True"),
        (["uniform"], [0.5], 5, "`seed` must be an integer"),
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
    with pytest.raises(InputError, match="needs `model` mlp"):
        dataclasses.replace(TrainConfig.of("glyphs"), dataset="sinusoid")


# What would be compared with itself, or with something else, without a word.


def sines(seed):
    return Sinusoid(seed=seed)


def scaled(factor):
    class Scaled(Sinusoid):
        def sample(self, num_tasks, part=slice(None)):
            batch = super().sample(num_tasks, part)
            return dataclasses.replace(batch, query_y=factor * batch.query_y)

        def with_seed(self, seed):
            return Scaled(seed=seed)

    return lambda seed: Scaled(seed=seed)


def quick(**more):
    return TrainConfig.of(
        "sinusoid", iterations=1, meta_batch=2, hidden=4, validation_episodes=2, **more
    )


def test_a_model_or_source_that_two_runs_share_is_refused(tmp_path):
    """The second run would go on where the first one ended."""
    net, stream = MLP(hidden=(4,)), Sinusoid()
    with pytest.raises(InputError, match="`model` returned the same MLP twice"):
        compare(quick(), ["uniform", "agreement"], 1, 2, model=lambda seed: net, progress=False)
    with pytest.raises(InputError, match="`source` returned the same Sinusoid twice"):
        compare(
            quick(), ["uniform", "agreement"], 1, 2, source=lambda seed: stream, validation=sines,
            test=sines, progress=False,
        )  # fmt: skip
    found = compare(
        quick(), {"uniform": "uniform", "same": Uniform}, 2, 2, progress=False,
        model=lambda seed: MLP(hidden=(4,)), source=sines, validation=lambda seed: stream, test=sines,
    )  # fmt: skip
    assert found.by_seed("same") == [0.0, 0.0]


def test_other_test_episodes_are_tested_again(tmp_path):
    first = compare(quick(), ["uniform"], 1, 4, tmp_path, test=scaled(1), progress=False)
    again = compare(
        quick(), {"uniform": "uniform", "same": Uniform}, 1, 4, tmp_path, test=scaled(3),
        progress=False,
    )  # fmt: skip
    means = [run[0].evaluation.mean for run in again.results.values()]
    assert means[0] == means[1] != first.results["uniform"][0].evaluation.mean


def test_arguments_of_a_partial_are_part_of_the_rule(tmp_path):
    class Scale:
        def __init__(self, k):
            self.k = k

        def __call__(self, gradients):
            return Uniform()(gradients)

    compare(quick(), {"mine": partial(Scale, k=1)}, 1, 2, tmp_path, progress=False)
    with pytest.raises(
        InputError, match=r"rule=partial of Scale \(k=1\), not partial of Scale \(k=50\)"
    ):
        compare(quick(), {"mine": partial(Scale, k=50)}, 1, 2, tmp_path, progress=False)


def test_fewer_than_one_process_is_refused(tmp_path):
    with pytest.raises(InputError, match="`jobs` must be at least 1, got 0"):
        compare(quick(), ["uniform"], 1, 2, tmp_path, jobs=0)


def glyphs_of(split, ways=3, shots=2, queries=4):
    return EpisodeSampler(load_dataset("glyphs", split), ways, shots, queries)


def few(**more):
    small = {
        "iterations": 1,
        "meta_batch": 2,
        "model": "mlp",
        "hidden": 4,
        "validation_episodes": 2,
    }
    return TrainConfig.of("glyphs", **small, **more)


def test_episodes_that_are_handed_in_tell_their_size():
    found = compare(
        few(), ["uniform"], 1, 4, progress=False, source=lambda seed: glyphs_of("train"),
        validation=lambda seed: glyphs_of("val"), test=lambda seed: glyphs_of("test"),
    )  # fmt: skip
    config = found.config
    assert (config.ways, config.shots, config.queries) == (3, 2, 4)
    assert "3-way 2-shot" in found.table()
    run = train(few(), source=glyphs_of("train"), validation=glyphs_of("val"), progress=False)
    assert list(run.model.parameters())[-1].shape == (3,)  # an output for each class
    with pytest.raises(
        InputError, match="validation episodes are 5-way, and those of training 3-way"
    ):
        train(few(), source=glyphs_of("train"), validation=glyphs_of("val", 5), progress=False)


def test_tests_on_the_training_examples_are_told():
    with pytest.warns(UserWarning, match="training and validation draw the same examples"):
        train(few(), source=glyphs_of("train"), validation=glyphs_of("train"), progress=False)
    with pytest.warns(UserWarning, match="training and test draw the same examples"):
        compare(
            few(), ["uniform"], 1, 4, progress=False, source=lambda seed: glyphs_of("train"),
            validation=lambda seed: glyphs_of("val"), test=lambda seed: glyphs_of("train"),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"a:b": "uniform", "a-b": "agreement"}, "'a:b' and 'a-b' would share the folder a-b"),
        ({"../x": "uniform"}, "cannot be the name of a folder"),
        ({"": "uniform"}, "cannot be the name of a folder"),
    ],
)
def test_names_of_rules_are_names_of_folders(tmp_path, rules, message):
    with pytest.raises(InputError, match=message):
        compare(quick(), rules, 1, 2, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_other_settings_are_found_before_anything_is_trained(tmp_path):
    compare(quick(), ["uniform"], 1, 2, tmp_path, progress=False)
    config = dataclasses.replace(quick(), iterations=2)
    with pytest.raises(InputError, match=r"other settings \(iterations 1, not 2\)"):
        compare(config, ["agreement", "uniform"], 1, 2, tmp_path, progress=False)
    assert not (tmp_path / "agreement").exists()


def test_overwriting_keeps_nothing_that_a_later_comparison_could_take_for_new(
    tmp_path, monkeypatch
):
    first = compare(quick(), ["uniform"], 2, 2, tmp_path, progress=False)
    rows = []

    def spoiled(*args, **more):  # what was to change since: here, the code of the gradients
        rows.append(found := meta_gradients(*args, **more))
        return dataclasses.replace(found, rows=found.rows + 1.0)

    def stopped(*args, **more):
        raise KeyboardInterrupt

    for seed in range(2):  # what --tensorboard writes is no reason to refuse the folder later
        (tmp_path / "uniform" / f"seed{seed}" / "tensorboard").mkdir()
    monkeypatch.setattr("gametalearn.training.meta_gradients", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(quick(), ["uniform"], 2, 2, tmp_path, overwrite=True, progress=False)
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setattr("gametalearn.training.meta_gradients", spoiled)
    later = compare(quick(), ["uniform"], 2, 2, tmp_path, progress=False)
    assert len(rows) == 2 * quick().iterations
    for before, now in zip(first.results["uniform"], later.results["uniform"], strict=True):
        assert before.evaluation.values.tolist() != now.evaluation.values.tolist()


def test_seeds_may_be_numpy_integers():
    plain = compare(tiny(), ["uniform"], [1, 2], 5, progress=False)
    numpy = compare(tiny(), ["uniform"], list(np.arange(1, 3)), 5, progress=False)
    assert numpy.seeds == plain.seeds == (1, 2)
    assert type(numpy.seeds[0]) is int
