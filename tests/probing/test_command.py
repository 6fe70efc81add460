"""``gametalearn probe``: the table, the files, checkpoints that were kept, and messages."""

from __future__ import annotations

import hashlib
import json

import pytest

from gametalearn.cli import main
from tests.support.commands import run

TINY = "--dataset sinusoid --meta-batch 3 --hidden 8 --validation-episodes 3 --quiet --threads 1"
FEW = "--meta-batches 5 --reference 6 --quiet"


def digests(folder):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.iterdir()
        if not p.name.startswith("probe")
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probed") / "a"
    words = f"train {TINY} --iterations 6 --keep-every 2 --out {folder}"
    assert main(words.split()) == 0
    return folder


def test_tables_json_and_plots_and_the_run_as_it_was(capsys, trained):
    before = digests(trained)
    rules = "uniform,agreement,geometric-median"
    code, out, err = run(capsys, f"probe {trained} --rules {rules} --checkpoint 2,latest {FEW}")
    assert (code, err) == (0, "")
    assert digests(trained) == before
    assert f"{trained} (iteration 2): 5 meta-batches of 3 tasks" in out
    assert f"{trained} (latest, iteration 6)" in out
    for text in ("to the mean of 6 tasks", "all updates at one length", "as they are, at one rate"):
        assert out.count(text) == 2
    assert out.count("through the optimiser") == 2
    assert "fresh, minus uniform [95%]" in out
    found = json.loads((trained / "probe.json").read_text())
    assert found["schema"] == "gametalearn.probe/1"
    assert [c["iteration"] for c in found["checkpoints"]] == [2, 6]
    latest = found["checkpoints"][1]
    assert list(latest["rules"]) == rules.split(",")
    gains = latest["rules"]["agreement"]["gains"]["optimizer"]["fresh"]
    assert len(gains["by_meta_batch"]) == 5
    assert gains["minus_baseline"]["p_holm"] >= gains["minus_baseline"]["p_value"]
    low, high = gains["ci95"]
    assert low < gains["mean"] < high
    for name in ("probe-2.png", "probe-latest.png"):
        assert (trained / name).read_bytes().startswith(b"\x89PNG")


def test_the_reference_and_the_meta_batches_are_counted_apart(
    capsys, monkeypatch, trained, tmp_path
):
    monkeypatch.setattr("gametalearn.progress.EVERY", 0)
    words = f"probe {trained} --meta-batches 3 --reference 5"  # 2 meta-batches of 3 tasks
    assert main([*words.split(), "--out", str(tmp_path)]) == 0
    shown = [line for line in capsys.readouterr().err.splitlines() if " of " in line]
    label = f"probe {trained / 'checkpoint.pt'}"
    assert [line.partition(" meta-batches, about")[0] for line in shown] == [
        f"{label}: reference: 1 of 2",
        f"{label}: 1 of 3",
        f"{label}: 2 of 3",
    ]


def test_all_kept_checkpoints_under_disturbance(capsys, trained, tmp_path):
    out = tmp_path / "b"
    flags = "--rules uniform,normalized-mean --checkpoint all --disagree 0.5 --meta-batch 4"
    code, text, _ = run(capsys, f"probe {trained} {flags} {FEW} --out {out}")
    assert code == 0
    assert "clean, minus uniform [95%]" in text
    assert "to the mean of 8 clean tasks" in text  # whole meta-batches
    found = json.loads((out / "probe.json").read_text())["checkpoints"]
    assert [c["checkpoint"] for c in found] == ["2", "4", "6"]  # the latest is the last of them
    assert found[0]["config"]["disagree"] == 0.5
    assert {p.name for p in out.iterdir()} == {
        "probe.json", "probe-2.png", "probe-4.png", "probe-6.png"
    }  # fmt: skip


def test_best_has_no_optimiser_and_two_meta_batches_no_interval(capsys, trained, tmp_path):
    flags = f"--checkpoint best --rules uniform,agreement --meta-batches 2 --out {tmp_path / 'c'}"
    code, out, err = run(capsys, f"probe {trained} {flags} --reference 3 --quiet")
    assert code == 0
    reason = f"{trained}/best.pt does not contain its state"
    assert err == f"gametalearn: the optimiser's steps are not measured: {reason}\n"
    assert "through the optimiser" not in out
    assert "For intervals and tests take at least 3 meta-batches." in out
    assert "verdict" not in out
    assert "95%" not in out
    assert "±" not in out


def test_one_rule_alone(capsys, trained, tmp_path):
    code, out, _ = run(capsys, f"probe {trained} --rules agreement {FEW} --out {tmp_path / 'd'}")
    assert code == 0
    assert "p_holm is" not in out


def test_rules_have_the_options_that_are_given(capsys, trained, tmp_path):
    rules = "--rules uniform,agreement,agreement-update,agreement-cosine"
    options = "--rule-options agreement.signal=update agreement-cosine.signal=update"
    code, _, err = run(capsys, f"probe {trained} {rules} {options} {FEW} --out {tmp_path / 'e'}")
    assert (code, err) == (0, "")
    [found] = json.loads((tmp_path / "e" / "probe.json").read_text())["checkpoints"]
    assert found["rules"]["agreement"] == found["rules"]["agreement-update"]
    assert found["rules"]["agreement"] != found["rules"]["agreement-cosine"]
    assert found["config"]["rule_options"]["agreement"] == {"signal": "update"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rule-options dwa.period=1", "--rule-options: given for 'dwa', which is not among the rules"),
        ("--rule-options agreement.sign=1", "rule 'agreement': no option 'sign'; it takes"),
        ("--checkpoint worst", "--checkpoint must be best, latest or an iteration (kept by"),
        ("--checkpoint 3", "checkpoint-3.pt: this checkpoint was not kept; kept are those of "
                           "iterations 2, 4, 6"),
        ("--checkpoint ,", "--checkpoint: name one or more"),
        ("--rules uniform,agreemnt", "unknown rule 'agreemnt'; did you mean 'agreement'"),
        ("--rules ,", "--rules: name one or more"),
        ("--meta-batches 0", "--meta-batches must be at least 1, got 0"),
        ("--length -1", "--length must be a positive, finite number, got -1.0"),
        ("--disagree-kind permuted", "--disagree-kind applies to --disagree above 0"),
        ("--disagree 2", "--disagree must be at most 1, got 2.0"),
        ("--rules uniform,os:getcwd", "rule 'os:getcwd' makes a str; name a class or a function that"),
        ("--seed -1", "--seed must be at least 0, got -1"),
        ("--rules dtp", "rule 'dtp' weighs objectives by their accuracy"),
    ],
)  # fmt: skip
def test_messages(capsys, trained, flags, message):
    code, _, err = run(capsys, f"probe {trained} --quiet {flags}")
    assert code == 2
    assert err.startswith("gametalearn: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_folder_that_cannot_be_is_said_first(capsys, trained, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, err = run(capsys, f"probe {trained} {FEW} --out {tmp_path / 'file'}")
    assert (code, out) == (2, "")
    assert err == f"gametalearn: {tmp_path / 'file'}: cannot be created (File exists)\n"


def test_what_was_measured_is_kept(capsys, monkeypatch, trained, tmp_path):
    """The second checkpoint's probe is interrupted."""
    from gametalearn.probing import command, shown

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    def then(*args):
        monkeypatch.setattr(command, "probe", interrupted)
        return shown.table(*args)

    monkeypatch.setattr(command, "table", then)
    flags = f"--checkpoint 2,latest --rules uniform,agreement {FEW} --out {tmp_path}"
    code, _, _ = run(capsys, f"probe {trained} {flags}")
    assert code == 130
    assert [
        c["checkpoint"] for c in json.loads((tmp_path / "probe.json").read_text())["checkpoints"]
    ] == ["2"]
    assert (tmp_path / "probe-2.png").exists()


def test_the_usual_rules_are_those_that_suit_the_learner(capsys, trained, tmp_path):
    code, _, err = run(capsys, f"probe {trained} {FEW} --out {tmp_path / 'a'}")
    assert (code, err) == (0, "")
    [found] = json.loads((tmp_path / "a" / "probe.json").read_text())["checkpoints"]
    assert list(found["rules"]) == [
        "uniform", "agreement", "agreement-update", "normalized-mean", "geometric-median"
    ]  # fmt: skip
    words = f"train --dataset glyphs --learner protonet --meta-batch 2 --hidden 4 --iterations 2 --keep-every 1 --quiet --threads 1 --validation-episodes 2 --out {tmp_path / 'b'}"
    assert main(words.split()) == 0
    code, _, err = run(capsys, f"probe {tmp_path / 'b'} --checkpoint all {FEW}")
    assert code == 0
    assert err.count("agreement-update is left out: it compares inner updates") == 1
    for found in json.loads((tmp_path / "b" / "probe.json").read_text())["checkpoints"]:
        assert list(found["rules"]) == [
            "uniform",
            "agreement",
            "normalized-mean",
            "geometric-median",
        ]
    code, _, err = run(capsys, f"probe {tmp_path / 'b'} --rules uniform,agreement-update {FEW}")
    assert code == 2
    assert (
        "rule 'agreement-update' compares inner updates, and with 0 inner steps there are none"
        in err
    )


def test_a_folder_without_a_run(capsys, tmp_path):
    code, _, err = run(capsys, f"probe {tmp_path}")
    assert code == 2
    assert "no run there" in err
    code, _, err = run(capsys, f"probe {tmp_path / 'typo'}")
    assert code == 2
    assert "no run there" in err
    assert not (tmp_path / "typo").exists()
