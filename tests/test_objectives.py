"""Several objectives, from the command line to the metrics, the table and the refusals."""

import itertools
import json
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image

from gametalearn import GradNorm, InputError, TrainConfig
from gametalearn.data import load_dataset
from gametalearn.run import Parts, outer_of
from gametalearn.runfolder import load_run
from tests.support.commands import run
from tests.support.pictures import divided_pictures

TINY = "--hidden 4 --queries 2 --inner-steps 1 --test-steps 1 --meta-batch 4 --log-every 1"
TINY += " --validation-episodes 4 --threads 1 --quiet"
SEVEN = ("uniform", "gradnorm", "uncertainty", "uncertainty-positive", "dwa", "dtp", "agreement")


def metrics(place):
    return [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]


def test_seven_rules_weigh_two_real_data_sets_differently(
    capsys, tmp_path, monkeypatch, two_real_root
):
    monkeypatch.setenv("GAMETALEARN_DATA", str(two_real_root))
    command = f"compare --dataset omniglot+mini-imagenet --rules {','.join(SEVEN)} {TINY}"
    command += " --iterations 12 --no-rotations --seeds 1 --episodes 6 --rule-options dwa.period=2"
    command += " uncertainty.lr=0.1 uncertainty-positive.lr=0.1"  # 12 iterations are few
    code, out, _ = run(capsys, f"{command} --out", tmp_path)
    assert code == 0
    weights = {}
    for rule in SEVEN:
        records = metrics(tmp_path / rule / "seed0")
        assert len(records) == 12
        assert all(r["group"] == [0, 0, 1, 1] for r in records)
        assert all(len(r["raw"]) == (4 if rule in ("uniform", "agreement") else 2) for r in records)
        weights[rule] = np.array([r["effective"] for r in records])
    np.testing.assert_allclose(weights["uniform"], 0.25)
    for one, other in itertools.combinations(SEVEN, 2):
        assert np.abs(weights[one] - weights[other]).max() > 1e-3, (one, other)
    found = json.loads((tmp_path / "results.json").read_text())
    for rule in SEVEN:
        parts = found["rules"][rule]["objectives"]
        assert list(parts) == ["omniglot", "mini-imagenet"]
        mean = np.mean([part["accuracy"] for part in parts.values()])
        assert found["rules"][rule]["accuracy"] == pytest.approx(mean)
    headers = [line.split() for line in out.splitlines()]
    assert ["rule", "omniglot", "mini-imagenet"] in headers


def test_three_torchjd_rules_in_compare_on_glyphs(capsys, tmp_path):
    rules = ["torchjd:UPGrad", "torchjd:MGDA", "torchjd:IMTL-G"]
    command = f"compare --dataset glyphs --rules uniform,{','.join(rules)} {TINY}"
    code, out, _ = run(capsys, f"{command} --iterations 3 --seeds 1 --episodes 4 --out", tmp_path)
    assert code == 0
    assert all(f"\n{rule} " in out for rule in rules)
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["rules"]) == ["uniform", *rules]
    # the first meta-batch is the same for all, before any rule has moved the model
    first = {
        rule: metrics(tmp_path / rule.replace(":", "-") / "seed0")[0] for rule in found["rules"]
    }
    for one, other in itertools.combinations(first, 2):
        assert first[one]["losses"] == first[other]["losses"]
        difference = np.subtract(first[one]["effective"], first[other]["effective"])
        assert np.abs(difference).max() > 1e-3, (one, other)


def test_each_objective_stands_in_the_metrics_and_the_evaluation(capsys, tmp_path):
    name = f"folder:{divided_pictures(tmp_path / 'dots')}"
    file = tmp_path / "c.toml"
    file.write_text(f"dataset = ['glyphs', '{name}']\n")  # a list, as good as glyphs+folder:...
    command = f"train --config {file} --rule gradnorm {TINY} --iterations 2 --meta-batch 5"
    code, *_ = run(capsys, f"{command} --out", tmp_path / "a")
    assert code == 0
    for record in metrics(tmp_path / "a"):
        assert record["group"] == [0, 0, 0, 1, 1]
        assert list(record["objectives"]) == ["glyphs", name]
        for number, found in enumerate(record["objectives"].values()):
            own = [i for i, group in enumerate(record["group"]) if group == number]
            assert found["loss"] == pytest.approx(np.mean([record["losses"][i] for i in own]))
            assert found["effective"] == pytest.approx(sum(record["effective"][i] for i in own))
            assert found["accuracy"] == pytest.approx(np.mean([record["scores"][i] for i in own]))
        assert len(record["raw"]) == 2
        assert len(record["effective"]) == 5
        assert list(record["diagnostics"]["objectives"]) == ["0", "1"]
        rates = record["rule"]["r"]
        assert list(rates) == ["glyphs", name]
        assert sum(rates.values()) == pytest.approx(2)  # by definition their mean is 1
    validation = record["validation"]
    assert validation["accuracy"] == pytest.approx(np.mean(list(validation["objectives"].values())))
    code, out, _ = run(capsys, "evaluate --episodes 6 --quiet", tmp_path / "a")
    assert code == 0
    total, first, second = out.splitlines()
    assert "(6 episodes" in total
    assert first.startswith("  glyphs: accuracy")
    assert second.startswith(f"  {name}: accuracy")
    assert "(3 episodes" in first
    assert "(3 episodes" in second


def test_gradnorms_shared_weights_are_the_last_shared_layer_or_the_one_named(capsys, tmp_path):
    command = f"train --dataset glyphs --objectives group --rule gradnorm {TINY} --iterations 1"
    spans = {}
    for name, flag in (("default", ""), ("named", "--shared blocks.0.conv.weight")):
        assert run(capsys, f"{command} {flag} --out", tmp_path / name)[0] == 0
        loaded = load_run(tmp_path / name)
        rule = outer_of(loaded, Parts()).rule
        assert isinstance(rule, GradNorm)
        assert isinstance(rule.span, slice)
        rows = torch.cat([p.detach().flatten() for p in loaded.meta.values()])
        spans[name] = rows[rule.span], loaded.meta
    for name, layer in (("default", "blocks.3.conv.weight"), ("named", "blocks.0.conv.weight")):
        found, meta = spans[name]
        assert torch.equal(found, meta[layer].detach().flatten())


def test_proportional_shares(capsys, tmp_path):
    name = f"folder:{divided_pictures(tmp_path / 'dots')}"
    command = f"train --dataset glyphs+{name} --share proportional {TINY} --iterations 2"
    code, *_ = run(capsys, f"{command} --meta-batch 40 --out", tmp_path / "a")
    assert code == 0
    groups = [g for record in metrics(tmp_path / "a") for g in record["group"]]
    assert len(groups) == 80
    assert sum(groups) < 8  # 5 classes beside some hundreds


def test_scripts_as_objectives_of_one_data_set(capsys, tmp_path):
    command = f"train --dataset glyphs --objectives group --rule dtp {TINY} --iterations 2"
    code, *_ = run(capsys, f"{command} --meta-batch 6 --out", tmp_path / "a")
    assert code == 0
    for record in metrics(tmp_path / "a"):
        groups = record["group"]
        assert len(set(groups)) > 1
        assert len(record["objectives"]) == len(set(groups))
        assert len(record["raw"]) > max(groups)
        assert record["rule"]["kappa"].keys() == record["objectives"].keys()
        # the batch is part of the average, and begins it
        if record["iteration"] == 1:
            told = {name: own["accuracy"] for name, own in record["objectives"].items()}
            assert record["rule"]["kappa"] == pytest.approx(told)
    code, out, _ = run(capsys, "evaluate --episodes 12 --quiet", tmp_path / "a")
    assert code == 0
    assert len(out.splitlines()) > 2


def test_a_run_says_which_input_the_data_sets_are_brought_to(capsys, tmp_path):
    name = f"folder:{divided_pictures(tmp_path / 'dots')}"
    tiny = TINY.replace(" --quiet", " --iterations 1")
    for flags, wanted in (("", "28 x 28 pixels in RGB"), (
        "--image-size 32 --channels 1", "32 x 32 pixels in grayscale")):  # fmt: skip
        command = f"train --dataset glyphs+{name} {tiny} {flags} --overwrite --out"
        code, _, err = run(capsys, command, tmp_path / "a")
        assert code == 0
        assert f"train: images of all data sets are converted to {wanted}" in err
    _, _, err = run(capsys, f"train --dataset glyphs {tiny} --out", tmp_path / "b")
    assert "are converted to" not in err


def test_numbers_of_tasks_are_a_balance(capsys, tmp_path):
    name = f"folder:{divided_pictures(tmp_path / 'dots')}"
    for rule in ("uniform", "dwa"):  # which has equal weights so soon
        command = f"train --dataset glyphs+{name} --share glyphs=3,{name}=1 {TINY} --iterations 1"
        code, *_ = run(capsys, f"{command} --rule {rule} --out", tmp_path / rule)
        assert code == 0
        (record,) = metrics(tmp_path / rule)
        assert record["group"] == [0, 0, 0, 1]
        assert record["effective"] == pytest.approx([0.25] * 4)
        assert [o["effective"] for o in record["objectives"].values()] == pytest.approx(
            [0.75, 0.25]
        )


def test_a_rule_that_did_nothing_yet_is_told_below_the_table(capsys, tmp_path):
    """dwa's weights are equal in its first two periods."""
    name = f"folder:{divided_pictures(tmp_path / 'dots')}"
    command = f"compare --dataset glyphs+{name} --rules uniform,dwa {TINY} --iterations 2 --seeds 1"
    code, out, _ = run(capsys, f"{command} --episodes 4 --out", tmp_path / "a")
    assert code == 0
    assert "dwa weighted the tasks as uniform does: this comparison" in " ".join(out.split())


def test_at_equal_weights_a_rule_is_uniform_where_numbers_do_not_divide(capsys, tmp_path):
    """5 tasks of two data sets are 3 and 2."""
    name = f"folder:{divided_pictures(tmp_path / 'dots')}"
    for rule in ("uniform", "dwa", "gradnorm", "uncertainty-positive"):
        command = f"train --dataset glyphs+{name} {TINY} --iterations 1 --meta-batch 5"
        code, *_ = run(capsys, f"{command} --rule {rule} --out", tmp_path / rule)
        assert code == 0
        (record,) = metrics(tmp_path / rule)
        assert record["group"] == [0, 0, 0, 1, 1]
        effective = np.array(record["effective"])
        assert effective / effective.sum() == pytest.approx([0.2] * 5)


def test_where_numbers_vary_it_is_said(capsys, tmp_path):
    command = f"compare --dataset glyphs --objectives group {TINY} --iterations 1 --seeds 1 --out"
    for rules, said in (
        ("uniform,dwa,gradnorm", "With equal weights, dwa and gradnorm count every objective"),
        ("uniform,dwa", "With equal weights, dwa counts every objective in a meta-batch the same"),
        ("uniform,agreement", None),
    ):
        code, out, _ = run(capsys, f"{command} {tmp_path / rules} --rules", rules)
        assert code == 0
        text = " ".join(out.split())
        assert (said in text) if said else "With equal weights" not in text


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ("glyph=2,omniglot=2", "'glyph' is none of them; did you mean 'glyphs'?"),
        ("glyphs=2,glyphs=2", "glyphs appears twice"),
        ("glyphs=2.5,omniglot=2", "'2.5' is not a whole number"),
        ("glyphs=2,omniglot", "'omniglot' has no number"),
        ("glyphs=2", "omniglot has no task"),
    ],
)
def test_what_does_not_fit_in_a_share(share, message):
    with pytest.raises(InputError, match=re.escape(message)):
        TrainConfig.of("glyphs+omniglot", share=share)


def test_a_share_has_one_form():
    both = [
        TrainConfig.of("glyphs+omniglot", share=s)
        for s in ("glyphs=3, omniglot = 1", "omniglot=1,glyphs=3")
    ]
    assert both[0] == both[1]
    assert both[0].share == "glyphs=3,omniglot=1"
    with pytest.raises(InputError, match="several data sets"):
        TrainConfig.of("glyphs", share="Latin=2,Greek=2")


def test_tables_of_a_file_are_flags(capsys, tmp_path):
    """share, a table; single, true, false or a table."""
    name = f"folder:{divided_pictures(tmp_path / 'dots')}"
    file = tmp_path / "c.toml"
    words = f"compare --config {file} {TINY} --iterations 1 --seeds 1 --rules uniform --plan --out"
    start = f'dataset = ["glyphs", "{name}"]\nshare = {{glyphs = 3, "{name}" = 1}}\n'
    table = f'single = {{glyphs = "{tmp_path}/none"}}'
    for single, count in (("single = true", 3), ("single = false", 1), ("", 1), (table, 2)):
        file.write_text(start + single)
        code, out, err = run(capsys, words, tmp_path / "out")
        assert code == 0, err
        lines = out.splitlines()
        assert len(lines) == count
        assert f"--share glyphs=3,{name}=1" in lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("gradnorm.alpha=-1", "rule 'gradnorm': alpha must not be negative, got -1"),
        ("gradnorm.alpha=high", "alpha must be a number, got 'high'"),
        ("dwa.temperature=0", "temperature must be positive, got 0"),
        ("dwa.period=0", "period must be at least 1, got 0"),
        ("dwa.period=2.5", "period must be an integer, got 2.5"),
        ("dtp.gamma=-1", "gamma must be a number >= 0"),
        ("dtp.indicator=loss", "indicator must be 'accuracy' or 'likelihood', got 'loss'"),
        ("dtp.decay=1", "decay must be in [0, 1), got 1"),
    ],
)
def test_what_can_be_searched_is_checked_before_anything_is_trained(
    capsys, tmp_path, options, message
):
    command = f"compare --dataset glyphs --objectives group {TINY} --iterations 1 --rule-options"
    rules = f"--rules uniform,{options.partition('.')[0]}"
    code, _, err = run(capsys, f"{command} {options} {rules} --out", tmp_path / "a")
    assert code == 2
    # the data set may be drawn first, if no test before has done it
    (line,) = [line for line in err.splitlines() if not line.startswith("glyphs: drawing")]
    assert message in line
    assert not list(tmp_path.glob("a/*/*"))


# Bad input: exit 2, one line that names the file or the objective.


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def a_pickle(folder):
    for split in ("train", "val", "test"):
        content = {"image_data": np.zeros((2, 84, 84, 3), np.uint8), "class_dict": {split: [0, 1]}}
        content |= {"x": Evil(folder / "marker")} if split == "val" else {}
        (folder / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content))
    return "data prepare mini-imagenet --source {t}", "mini-imagenet-cache-val.pkl"


def a_table(folder, missing=True):
    (folder / "images").mkdir()
    for split in ("train", "val", "test"):
        Image.new("RGB", (90, 90)).save(folder / "images" / f"{split}.jpg")
        named = "gone.jpg" if missing and split == "test" else f"{split}.jpg"
        (folder / f"{split}.csv").write_text(f"filename,label\n{named},{split}\n")
    return "data prepare mini-imagenet --source {t}", "test.csv line 2: names 'gone.jpg'"


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def a_truncated_image(folder):
    command, _ = a_table(folder, missing=False)
    cut(folder / "images" / "val.jpg")
    return command, "val.jpg: not a readable image"


def a_truncated_image_of_a_folder(folder):
    cut(divided_pictures(folder / "dots") / "val" / "val1" / "2.png")
    return "train --dataset folder:{t}/dots --out {t}/a", "val/val1/2.png: not a readable image"


def too_few_classes_for_the_ways(folder):
    divided_pictures(folder / "dots", classes=3)
    return "train --dataset glyphs+folder:{t}/dots --queries 2 --out {t}/a", "'dots' has 3 classes"


def ways_of_each_objective(folder):
    (folder / "c.toml").write_text("dataset = ['glyphs', 'omniglot']\nways = [5, 20]")
    return "train --config {t}/c.toml --out {t}/a", "--ways must be an integer, got [5, 20]"


def the_same_twice(folder):
    return "train --dataset glyphs+glyphs --out {t}/a", "glyphs appears twice"


def fewer_tasks_than_data_sets(folder):
    divided_pictures(folder / "dots", classes=10)
    return (
        "train --dataset glyphs+folder:{t}/dots --queries 2 --meta-batch 1 --out {t}/a",
        "--meta-batch 1 has no task of folder:",
    )


def numbers_with_images(folder):
    return "train --dataset glyphs+sinusoid --out {t}/a", "sinusoid is regression and cannot be"


def a_list_without_brackets(folder):
    return (
        "train --dataset glyphs --objectives group --rule dtp --rule-options dtp.gamma=1,2 --out {t}/a",
        "got '1,2'; a list is written as [1, 2]",
    )


@pytest.mark.parametrize(
    "case",
    [
        fewer_tasks_than_data_sets,
        numbers_with_images,
        a_list_without_brackets,
        a_pickle,
        a_table,
        a_truncated_image,
        a_truncated_image_of_a_folder,
        too_few_classes_for_the_ways,
        ways_of_each_objective,
        the_same_twice,
    ],
)
def test_bad_input_is_named_in_one_line(capsys, tmp_path, monkeypatch, data_root, case):
    (tmp_path / "source").mkdir()
    command, message = case(tmp_path / "source")
    if "data prepare" in command:
        monkeypatch.setenv("GAMETALEARN_DATA", str(tmp_path / "root"))
    else:
        load_dataset("glyphs", "train")  # to draw them, once, says so on stderr
        capsys.readouterr()
    code, _, err = run(capsys, command.format(t=tmp_path / "source"))
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "source" / "marker").exists()
