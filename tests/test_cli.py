import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gametalearn
from gametalearn import DynamicWeightAverage, GradNorm
from gametalearn.run import Parts, outer_of
from gametalearn.runfolder import load_run
from tests.support.commands import run

TINY = "--dataset sinusoid --iterations 4 --meta-batch 2 --hidden 8 --validation-episodes 3 --quiet"


def test_train_evaluate_and_resume(capsys, tmp_path):
    code, out, _ = run(capsys, f"train {TINY} --rule agreement --out", tmp_path / "a")
    assert code == 0
    assert "best validation mse" in out
    code, out, _ = run(capsys, "train --quiet --resume", tmp_path / "a")
    assert (code, out.split()[0]) == (0, "4")
    code, out, _ = run(capsys, "evaluate --episodes 7 --quiet", tmp_path / "a")
    assert code == 0
    stored = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert (stored["episodes"], len(stored["values"])) == (7, 7)


def test_compare_prints_a_table_and_writes_results(capsys, tmp_path):
    command = f"compare {TINY} --seeds 2 --episodes 5 --primary agreement --out"
    code, out, _ = run(capsys, command, tmp_path)
    assert code == 0
    assert "minus uniform" in out
    assert "norm-control" in out
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["rules"]) == ["uniform", "agreement", "norm-control"]
    assert found["primary"] == ["agreement"]
    assert found["environment"]["command"] == f"gametalearn {command} {tmp_path}"
    assert (tmp_path / "learning_curves.png").exists()
    report = (tmp_path / "report.html").read_text()
    assert f"gametalearn {command} {tmp_path}" in report
    (tmp_path / "report.html").unlink()
    assert run(capsys, "report", tmp_path)[:2] == (0, f"wrote {tmp_path}/report.html\n")
    assert (tmp_path / "report.html").read_text() == report
    (tmp_path / "agreement" / "seed1" / "metrics.jsonl").unlink()
    assert run(capsys, "report", tmp_path)[0] == 0
    assert "there are no curves" in (tmp_path / "report.html").read_text()


def test_five_seeds_are_the_default_and_one_may_be_named(capsys, tmp_path):
    command = f"compare {TINY} --rules uniform --plan --out"
    _, out, _ = run(capsys, command, tmp_path / "a")
    assert [line.rpartition("/")[2] for line in out.splitlines()] == [
        f"seed{seed}" for seed in range(5)
    ]
    _, out, _ = run(capsys, command, tmp_path / "a", "--seeds", "7,")
    assert "--seed 7 " in out
    assert len(out.splitlines()) == 1
    for text, seeds in (
        ("[3]", [3]),
        ("[3, 5]", [3, 5]),
        ("2", [0, 1]),
        ("'7,'", [7]),
        ("[0]", [0]),
    ):
        (tmp_path / "c.toml").write_text(f"seeds = {text}\n")
        _, out, _ = run(capsys, command, tmp_path / "a", "--config", tmp_path / "c.toml")
        assert [line.rpartition("/seed")[2] for line in out.splitlines()] == list(map(str, seeds))
    for text in ("[]", "['x']", "[1.5]"):
        (tmp_path / "c.toml").write_text(f"seeds = {text}\n")
        code, _, err = run(capsys, command, tmp_path / "a", "--config", tmp_path / "c.toml")
        assert code == 2
        assert "--seeds takes a number, or a list such as 0,1,2 or 7, (the seed 7); got '" in err


def test_options_come_from_a_file_and_flags_win(capsys, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(
        'dataset = "sinusoid"\nrules = ["uniform", "agreement"]\nseeds = 1\niterations = 3\n'
        "meta-batch = 2\nhidden = 8\nvalidation_episodes = 3\nquiet = true\nepisodes = 4\n"
    )
    code, *_ = run(capsys, f"compare --config {file} --iterations 2 --out", tmp_path / "a")
    assert code == 0
    found = json.loads((tmp_path / "a" / "results.json").read_text())
    assert (found["iterations"], found["meta_batch"], found["episodes"]) == (2, 2, 4)
    assert list(found["rules"]) == ["uniform", "agreement"]


def test_numbers_of_seeds_are_at_least_one(tmp_path, capsys):
    code, _, err = run(capsys, "compare --rules uniform --seeds -2 --out", tmp_path)
    assert code == 2
    assert "--seeds must be at least 1, got -2; the seed -2 is -2," in err


def test_a_plan_that_overwrites_says_how_its_runs_are_collected(tmp_path, capsys):
    command = "compare --dataset sinusoid --rules uniform --seeds 1 --plan --overwrite --out"
    code, out, err = run(capsys, command, tmp_path)
    assert code == 0
    assert out.count("--overwrite") == 1
    assert "by the same command without --plan and --overwrite" in err


def test_options_of_rules_come_from_flags_and_files(capsys, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("rules = ['uniform', 'dwa', 'gradnorm']\nseeds = 1\nepisodes = 3\n"
                    "[rule-options.dwa]\nperiod = 7\n"
                    "[rule_options.gradnorm]\nalpha = 0\noptimizer = 'sgd'\n")  # fmt: skip
    flags = "--rule-options dwa.temperature=0.5 dwa.period=3 --rule-options gradnorm.lr=0.1"
    command = f"compare {TINY} --config {file} --out {tmp_path / 'a'}"
    assert run(capsys, f"{command} {flags}")[0] == 0
    wanted = {
        "dwa": {"period": 3, "temperature": 0.5},
        "gradnorm": {"alpha": 0, "optimizer": "sgd", "lr": 0.1},
    }
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["config"]["rule_options"] == wanted
    for name in (
        "uniform",
        "dwa",
        "gradnorm",
    ):  # each run has its own rule's, and goes on with them
        place = tmp_path / "a" / name / "seed0"
        with (place / "config.toml").open("rb") as stream:
            stored = tomllib.load(stream)
        own = {name: wanted[name]} if name in wanted else None
        assert stored.get("rule_options") == own
        assert run(capsys, "train --quiet --resume", place)[0] == 0
    dwa, gradnorm = (
        outer_of(load_run(tmp_path / "a" / name / "seed0"), Parts()).rule for name in wanted
    )
    assert isinstance(dwa, DynamicWeightAverage)
    assert isinstance(gradnorm, GradNorm)
    assert (dwa.period, dwa.temperature) == (3, 0.5)
    assert (gradnorm.alpha, gradnorm.descent.lr) == (0, 0.1)
    code, _, err = run(capsys, f"{command} {flags} gradnorm.lr=0.2")
    assert code == 2
    assert "holds a run with other settings (rule_options" in err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "COMMAND"),
        ("trian", "trian"),
        ("train --ways five", "invalid int value: 'five'"),
        ("train --dataset sinusoid", "--out RUN"),
        ("train --learner maml++ --out {t}/a", "maml++"),
        ("train --dataset nonesuch --out {t}/a", "unknown data set 'nonesuch'"),
        ("train --dataset omniglot --out {t}/a", "gametalearn data prepare omniglot"),
        ("train --dataset sinusoid --rule torchjd:UPGard --out {t}/a", "known: AlignedMTL"),
        ("train --dataset sinusoid --rule agreemnt --out {t}/a", "agreement"),
        ("train --dataset sinusoid --device nonesuch --out {t}/a", "--device nonesuch"),
        ("train --dataset sinusoid --meta-batch 0 --out {t}/a", "--meta-batch must be at least 1"),
        ("train --config {t}/none.toml --out {t}/a", "none.toml"),
        ("train --config {t}/bad.toml --out {t}/a", "not a TOML file"),
        ("train --config {t}/odd.toml --out {t}/a", "'metabatch' is not an option of train"),
        ("train --dataset sinusoid --rule gradnorm --shared nose --out {t}/a", "'nose'"),
        ("train --dataset sinusoid --rule dtp --out {t}/a", "dtp"),
        (
            "train --dataset sinusoid --rule dwa --rule-options dwa.perod=9 --out {t}/a",
            "it takes period, temperature",
        ),
        (
            "train --dataset sinusoid --rule dwa --rule-options dwa.period=x --out {t}/a",
            "must be an integer, got 'x'",
        ),
        (
            "train --dataset sinusoid --rule dwa --rule-options dwa.period=0 --out {t}/a",
            "period must be at least 1",
        ),
        (
            "train --dataset sinusoid --rule dwa --rule-options dwa.period --out {t}/a",
            "RULE.OPTION=VALUE",
        ),
        (
            "train --dataset sinusoid --rule dwa --rule-options dwa.within=uniform --out {t}/a",
            "not an option of a rule",
        ),
        (
            "train --dataset sinusoid --rule dwa --rule-options dtp.gamma=1 --out {t}/a",
            "but the rule is 'dwa'",
        ),
        (
            "train --dataset sinusoid --rule dwa --rule-options dwa.period=nan --out {t}/a",
            "dwa.period must be",
        ),
        (
            "train --dataset sinusoid --config {t}/flat.toml --rule dwa --out {t}/a",
            "rule-options must be",
        ),
        (
            "compare --dataset sinusoid --rules dwa --rule-options dtp.gamma=1 --out {t}/a",
            "not among the rules dwa",
        ),
        (
            "compare --dataset sinusoid --rules dwa --rule-options dwa.gamma=1 --out {t}/a",
            "no option 'gamma'",
        ),
        ("train --resume {t}/none", "no run there"),
        ("train --dataset sinusoid --out {t}/file", "file"),
        ("evaluate {t}/none", "no run there"),
        ("compare --seeds one --out {t}/a", "got 'one'"),
        ("compare --dataset sinusoid --primary uniform --out {t}/a", "--primary: 'uniform'"),
        ("compare --dataset sinusoid --rules agreemnt --plan --out {t}/a", "agreement"),
        ("report {t}", "results.json: cannot be read"),
        ("compare --rules uniform,unifrom --dataset sinusoid --out {t}/a", "unifrom"),
        ("data prepare", "name one of the data sets"),
        ("data prepare imagenet", "'imagenet' is unknown"),
        ("data prepare omniglot --skip-bad", "an option of data prepare mini-imagenet"),
        ("data prepare glyphs --source {t}", "--source does not apply to glyphs"),
        ("data list --source {t}", "data list takes no name or source"),
        ("data prepare omniglot --source {t}/none", "none"),
        ("episodes --dataset sinusoid --out {t}/a.png", "draws images"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, tmp_path, command, message):
    (tmp_path / "bad.toml").write_text("ways = = 5")
    (tmp_path / "odd.toml").write_text("metabatch = 5")
    (tmp_path / "flat.toml").write_text("[rule-options]\nperiod = 5")
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, command.format(t=tmp_path))
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


def test_debug_shows_the_traceback(capsys, tmp_path):
    code, _, err = run(capsys, "evaluate --debug", tmp_path)
    assert code == 2
    assert "Traceback" in err


def test_help_teaches(capsys):
    for command in ("", "train", "compare", "evaluate", "report", "episodes", "data"):
        code, out, _ = run(capsys, f"{command} --help")
        assert code == 0
        assert "example" in out


def test_data_list(capsys):
    code, out, _ = run(capsys, "data list")
    assert code == 0
    assert "gametalearn data prepare omniglot" in out


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    # stands in for torch, whose import may swallow the exception or show it
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
        "except BaseException:\n    pass\n"
    )
    root = Path(gametalearn.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "gametalearn", "train", "--out", tmp_path / "a"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "gametalearn: interrupted\n")
