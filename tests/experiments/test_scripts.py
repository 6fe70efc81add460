"""The scripts of experiments/, on the smallest of problems."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import gametalearn
from gametalearn import TrainConfig, compare, load_run, train
from gametalearn.stored import read_results
from tests.support.pictures import divided_pictures

ROOT = Path(gametalearn.__file__).parents[1] / "experiments"

TINY = """
dataset = "glyphs"
hidden = 4
ways = 3
queries = 2
iterations = 3
meta-batch = 4
validation-episodes = 2
validate-every = 3
log-every = 1
inner-steps = 1
"""


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_disagreement_grid_runs_resumes_and_draws(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "c.toml").write_text(TINY)
    out = tmp_path / "out"
    command = f"--config {tmp_path}/c.toml --out {out} --seeds 1 --episodes 3 --meta-batches 4"
    command += " --rules uniform,agreement --kinds shuffled,permuted --optimizers sgd"
    main = script("run_disagreement").main
    assert main([*command.split(), "--shares", "0,0.5"]) == 0
    printed = capsys.readouterr().out.splitlines()
    # headers, cells x rules, a blank line, cells, a blank line
    assert len(printed) == 2 + 3 * 2 + 1 + 2 + 3 + 1
    cells = json.loads((out / "disagreement.json").read_text())["cells"]
    assert [(c["kind"], c["share"]) for c in cells] == [
        ("none", 0.0), ("shuffled", 0.5), ("permuted", 0.5),
    ]  # fmt: skip
    for cell in cells:
        uniform, agreement = (cell["rules"][rule] for rule in ("uniform", "agreement"))
        assert uniform["paired"] is None
        assert set(agreement["paired"]) == {"difference", "ci95", "p_value"}
        tasks = uniform["tasks"]
        assert tasks["weight_clean"] == pytest.approx(1)
        assert tasks["norm_clean"] > 0
        assert (tasks["weight_spoiled"] is None) == (cell["share"] == 0)
        config = (
            out / f"sgd-4-{cell['kind']}-{cell['share']:g}" / "uniform" / "seed0" / "config.toml"
        )
        assert f"disagree = {cell['share']}" in config.read_text()
    for name in ("disagreement.png", "weights.png"):
        assert (out / name).stat().st_size > 5000
    before = {p: p.stat().st_mtime_ns for p in out.rglob("checkpoint.pt")}
    assert main([*command.split(), "--shares", "0,0.25,0.5"]) == 0  # more of the grid
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())  # nothing trained again
    assert len(json.loads((out / "disagreement.json").read_text())["cells"]) == 5
    more = ["--shares", "0.25", "--rules", "uniform,norm-control"]
    assert main([*command.split(), *more]) == 0  # one more rule in some of its cells
    cells = json.loads((out / "disagreement.json").read_text())["cells"]
    assert len(cells) == 5
    for cell in cells:
        assert ("norm-control" in cell["rules"]) == (cell["share"] == 0.25)
        assert "agreement" in cell["rules"]
    assert (out / "table.md").read_text().count("norm-control") == 2
    header, _, *lines = (out / "summary.md").read_text().splitlines()
    assert header.endswith("| uniform (%) | agreement | norm-control |")
    for line, cell in zip(lines, cells, strict=True):
        found = line.split(" | ")
        difference = cell["rules"]["agreement"]["paired"]["difference"]
        ahead = "1/1 |" if difference > 0 else "0/1 |"
        assert found[5].startswith(f"{100 * difference:+.2f}, ")  # of one seed: no interval
        assert f"{found[5]} |".endswith(ahead)
        assert (found[6].strip(" |") != "") == (cell["share"] == 0.25)
    capsys.readouterr()
    assert main([*command.split(), "--shares", "0", "--episodes", "4"]) == 0
    assert "written with other settings" in capsys.readouterr().err
    assert len(json.loads((out / "disagreement.json").read_text())["cells"]) == 1


def test_bad_input_is_one_line(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "c.toml").write_text(TINY)
    flags = ["--config", str(tmp_path / "c.toml"), "--out", str(tmp_path), "--rules", "unifrom"]
    assert script("run_disagreement").main(flags) == 2
    assert "unifrom" in capsys.readouterr().err
    for bad, message in (
        (["--shares", "0,x"], "--shares and --meta-batches take numbers"),
        (["--kinds", "shuffled,swapped"], "`disagree_kind` must be one of"),
        (["--optimizers", "adam,adm"], "unknown outer optimiser 'adm'; did you mean 'adam'?"),
    ):
        assert script("run_disagreement").main([*flags[:4], "--seeds", "1", *bad]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "cell 1" not in error  # before anything runs
    for bad, message in (
        (["--out", str(tmp_path / "a.foo")], "let it end in .png"),
        (["--out", str(tmp_path / "a.png"), "--steps", "1,x"], "--steps takes numbers"),
    ):
        assert script("plot_sinusoid").main([str(tmp_path), *bad]) == 2
        assert message in capsys.readouterr().err
    assert script("plot_sinusoid").main([str(tmp_path), "--out", str(tmp_path / "a.png")]) == 2
    assert "no run there" in capsys.readouterr().err


def test_adaptation_curves_are_drawn(tmp_path: Path, capsys: Any) -> None:
    for learner in ("maml", "reptile"):
        config = TrainConfig.of(
            "sinusoid", learner=learner, iterations=3, meta_batch=2, hidden=8,
            validation_episodes=2, inner_steps=2,
        )  # fmt: skip
        train(config, tmp_path / learner, progress=False)
    folders = [str(tmp_path / learner) for learner in ("maml", "reptile")]
    flags = ["--steps", "0,1,3", "--tasks", "4", "--half", "--out", str(tmp_path / "s.png")]
    assert script("plot_sinusoid").main([*folders, *flags]) == 0
    assert (tmp_path / "s.png").stat().st_size > 5000
    assert capsys.readouterr().out.count("mean squared error") == 2


@pytest.mark.slow
def test_processes_are_timed_beside_threads(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "c.toml").write_text('dataset = "sinusoid"\nhidden = 4\nmeta-batch = 4\n')
    command = f"--config {tmp_path}/c.toml --out {tmp_path} --iterations 20 --repeats 1"
    assert script("run_processes").main(command.split()) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == [
        "2 processes of 1 thread", "1 process of 2 threads", "processes / threads",
    ]  # fmt: skip
    found = json.loads((tmp_path / "processes.json").read_text())
    assert found["ratio"] == pytest.approx(found["processes"][0] / found["threads"][0])
    a, b = (load_run(tmp_path / f"{way}0", "latest").meta for way in ("processes", "threads"))
    for name, value in a.items():  # the same run both ways
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-6)


def test_where_the_time_of_an_iteration_goes(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "c.toml").write_text('dataset = "sinusoid"\nhidden = 4\nmeta-batch = 4\n')
    flags = f"--config {tmp_path}/c.toml --iterations 20 --episodes 8 --rule agreement"
    assert script("run_iteration").main(flags.split()) == 0
    iteration, evaluation = capsys.readouterr().out.splitlines()[-2:]
    found = re.fullmatch(
        r"iteration: ([\d.]+) ms, its meta-gradients ([\d.]+) ms, everything else ([\d.]+)%",
        iteration,
    )
    assert found is not None
    whole, gradients, share = map(float, found.groups())
    assert 0 < gradients <= whole
    assert 0 < share < 100
    assert evaluation.startswith("evaluate: ")


def test_weights_are_read_off_a_log(tmp_path: Path, capsys: Any) -> None:
    """Of two clean tasks that agree and a longer spoiled one that opposes them."""
    names = ("norms", [1.0, 1.0, 2.0]), ("cosine", [[1, 0.5, -0.25], [0.5, 1, 0], [-0.25, 0, 1]])
    record = {"iteration": 7, "spoiled": [False, False, True], "diagnostics": dict(names)}
    record["losses"] = [1.0, 4.0, 2.0]
    clean = {**record, "iteration": 8, "spoiled": [False] * 3}
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(record)}\n{json.dumps(clean)}\n")
    main = script("read_weights").main
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    # s = (1, 1.5, 3.5) of sum 6; (1.25, 1.5, 0.75) of 3.5; (0, 0.5, -0.5); (0.25, 0.5, -0.25)
    assert [line.split(" | ", 1)[1] for line in lines[2:6]] == [
        "0.00 | 0.62 / 1.75 | 0% / 0% |",
        "1.00 | 1.18 / 0.64 | 0% / 0% |",
        "1.00 | 0.75 / -1.50 | 0% / 100% |",
        "1.00 | 1.12 / -0.75 | 0% / 100% |",
    ]
    assert lines[-4].startswith("1 meta-batches. Length of a gradient: clean 1.00, corrupted 2.00")
    assert "clean tasks +0.500, of a clean and a corrupted one -0.125, of two corr" in lines[-3]
    assert lines[-2].endswith("median 1.00.")  # 6 / 6
    # (-0.5 + 0) / (sqrt(1 + 1 + 2 * 0.5) * 2)
    assert "mean corrupted gradient: -0.144. A corrupted" in lines[-1]
    assert lines[-1].endswith("in 50.0% of pairs.")
    for flags, message in (
        (["--first", "8"], "no logged iteration from 8 on has corrupted tasks"),
        (["--first", "8", "--last", "9"], "no logged iteration from 8 to 9 has"),
        (["--first", "-1"], "--first must be at least 1, got -1"),
        (["--first", "8", "--last", "7"], "--last must be at least 8, got 7"),
    ):
        assert main([str(tmp_path), *flags]) == 2
        assert message in capsys.readouterr().err

    (tmp_path / "config.toml").write_text(
        'dataset = "glyphs"\ndisagree = 0.4\ndisagree_kind = "permuted"\nseed = 3\niterations = 9\n'
    )
    assert main([str(tmp_path), "--json", str(tmp_path / "looks" / "a.json")]) == 0
    found = json.loads((tmp_path / "looks" / "a.json").read_text())
    assert (found["tasks"], found["seed"], found["iterations"]) == ("permuted", 3, [1, 9])
    assert found["rules"]["agreement"]["spoiled"] == pytest.approx(1.75)
    assert script("tables").looks(tmp_path / "looks").splitlines()[2] == (
        "| permuted | 1 to 9 | 50.0 | -0.125 | -0.144 | 1.00 | 2.00 |"
    )


def test_learners_are_compared_at_one_budget(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "c.toml").write_text(TINY)
    out = tmp_path / "out"
    flags = [
        "--config",
        str(tmp_path / "c.toml"),
        "--out",
        str(out),
        "--seeds",
        "2",
        "--episodes",
        "3",
    ]
    main = script("run_learners").main
    assert main([*flags, "--learners", "fomaml,protonet"]) == 0
    assert "minus fomaml" in capsys.readouterr().out
    found = read_results(out)
    (pair,) = found["paired"]
    for number, seed in enumerate(range(2)):
        means = []
        for learner in ("fomaml", "protonet"):
            kept = json.loads((out / learner / f"seed{seed}" / "evaluation.json").read_text())
            config = load_run(out / learner / f"seed{seed}").config
            assert (config.learner, config.rule, config.seed) == (learner, "uniform", seed)
            means.append(np.mean(kept["values"]))
            assert found["rules"][learner]["seeds"][number]["accuracy"] == pytest.approx(means[-1])
        assert pair["by_seed"][number] == pytest.approx(means[1] - means[0])
    before = (out / "fomaml" / "seed0" / "checkpoint.pt").stat().st_mtime_ns
    assert main([*flags, "--learners", "fomaml,protonet"]) == 0  # all of it is there
    assert (out / "fomaml" / "seed0" / "checkpoint.pt").stat().st_mtime_ns == before
    assert main([*flags, "--learners", "fomaml,protonett"]) == 2
    assert "did you mean 'protonet'" in capsys.readouterr().err


def test_tables_have_the_numbers_of_their_results(tmp_path: Path, capsys: Any) -> None:
    tables = script("tables")
    pages = [*sorted(ROOT.glob("*.md")), *tables.OTHERS]
    named = [found for page in pages for found in tables.TABLE.findall(page.read_text())]
    shown = {(found[1], found[2]) for found in named}
    listed = json.loads((ROOT / "results" / "screened.json").read_text())["cells"]
    of_cells = {cell[kind] for cell in listed for kind in ("results", "oracle")}
    for folder in filter(Path.is_dir, (ROOT / "results").iterdir()):
        kinds = {kind for kind, name in shown if name == f"results/{folder.name}"}
        for file, wanted in (("results.json", {"table", "benchmark"}), ("search.json", {"search"})):
            told = kinds & wanted or (file == "results.json" and folder.name in of_cells)
            assert bool(told) == (folder / file).exists(), (folder.name, file)
    for page in pages:
        assert tables.renewed(page) == page.read_text(), "run python experiments/tables.py"

    found = read_results(ROOT / "results" / "demo")
    first, *_ = [
        line for line in tables.markdown(found).splitlines() if line.startswith("| uniform")
    ]
    entry = found["rules"]["uniform"]
    assert f"| {100 * entry['accuracy']:.2f} ± {100 * entry['ci95']:.2f} |" in first
    assert "objective" not in tables.markdown(found)
    seconds = min(one["seconds"] for one in entry["seeds"])
    assert first.endswith(f"| {1000 * seconds / 80:.0f} |")

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: results/none -->\nold\n<!-- end -->\nafter\n")
    assert tables.main([str(page)]) == 2
    assert "results/none/results.json: cannot be read" in capsys.readouterr().err
    assert "old" in page.read_text()
    (tmp_path / "results" / "none").mkdir(parents=True)
    (tmp_path / "results" / "none" / "probe.json").write_text("{}")
    for kind, message in (
        ("probe", "page.md, probe of results/none: damaged results (KeyError('checkpoints'))"),
        ("tabel", "page.md: no table 'tabel'; there are table, benchmark,"),
    ):
        page.write_text(f"before\n<!-- {kind}: results/none -->\nold\n<!-- end -->\nafter\n")
        assert tables.main([str(page)]) == 2
        assert message in capsys.readouterr().err
        assert "old" in page.read_text()
    page.write_text("<!-- looks: results/empty -->\nold\n<!-- end -->\n")
    assert tables.main([str(page)]) == 2
    assert "empty: no files of read_weights.py there" in capsys.readouterr().err
    assert tables.main([str(tmp_path / "no.md")]) == 2
    assert "no.md: cannot be read" in capsys.readouterr().err


def test_the_course_of_a_comparison_is_the_average_of_its_logs(tmp_path: Path, capsys: Any) -> None:
    given = {"disagree": 0.5, "meta_batch": 4, "iterations": 4, "validate_every": 2, "log_every": 1}
    config = TrainConfig.of(
        "glyphs", hidden=4, ways=3, queries=2, validation_episodes=2, threads=1, **given
    )  # fmt: skip
    compare(config, ["uniform", "agreement", "normalized-mean"], 3, 3, tmp_path, progress=False)
    read_course, tables = script("read_course"), script("tables")
    assert read_course.main([str(tmp_path)]) == 0
    found = json.loads((tmp_path / "course.json").read_text())
    assert found["tasks"] == 4
    assert found["rules"]["uniform"]["cosine"]["mean"] == pytest.approx(1, abs=1e-4)
    assert found["rules"]["uniform"]["effective_tasks"]["mean"] == pytest.approx(4, abs=1e-3)
    assert found["rules"]["uniform"]["corrupted_weight"]["mean"] == pytest.approx(0.5)
    for seed in range(3):
        lines = (tmp_path / "agreement" / f"seed{seed}" / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        one = read_course.of_run(tmp_path / "agreement" / f"seed{seed}", "accuracy")
        assert one["cosine"] == pytest.approx(
            np.mean([r["diagnostics"]["update_cosine"] for r in records])
        )
        weight = [
            sum(abs(e) for e, bad in zip(r["effective"], r["spoiled"], strict=True) if bad)
            / sum(map(abs, r["effective"]))
            for r in records
        ]
        assert one["corrupted_weight"] == pytest.approx(np.mean(weight))
        assert one["validation"] == {i: records[i - 1]["validation"]["accuracy"] for i in (2, 4)}
    shown = tables.course(tmp_path).splitlines()
    assert shown[0].startswith("| rule | validation accuracy % after 2, 4 |")
    assert [line.split(" | ")[0] for line in shown[2:5]] == [
        "| uniform", "| agreement", "| normalized-mean",
    ]  # fmt: skip
    assert shown[-1].startswith("Rank correlation of the last column with the test accuracy: ")
    published = {"a paper": {"score": "48.70 ± 1.84", "iterations": 60000, "differs": "84 pixels"}}
    (tmp_path / "published.json").write_text(json.dumps(published))
    header, _, uniform, *_, last = [
        line for line in tables.benchmark(tmp_path).splitlines() if line.startswith("|")
    ]
    assert (
        "| validation accuracy % at 2 and 4 | cosine to the mean | effective tasks of 4 |" in header
    )
    both = (f"{100 * found['rules']['uniform']['validation'][at]['mean']:.2f}" for at in ("2", "4"))
    assert f" | 4 | {', '.join(both)} | 1.000 | 4.00 | 0.0 |" in uniform
    assert last == "| a paper | 48.70 ± 1.84 |  |  | 60,000 |  |  |  |  |  | 84 pixels |"
    logged = {
        f"objectives/{n}/effective": np.array(v)
        for n, v in (("a", [9] * 18 + [1, 3]), ("b", [6.0] * 20))
    }
    assert read_course.shares({**logged, "objectives/a/loss": np.ones(20)}) == {
        "share/a": 0.25,
        "share/b": 0.75,
    }
    some = {"objectives/c/effective": np.array([np.nan] * 20)}  # a group without a task
    assert read_course.shares({**logged, **some}) == read_course.shares({}) == {}
    assert read_course.main([str(tmp_path / "none")]) == 2
    assert "results.json: cannot be read" in capsys.readouterr().err


def test_parts_of_a_comparison_are_joined_as_if_trained_together(
    tmp_path: Path, capsys: Any
) -> None:
    config = TrainConfig.of(
        "glyphs", hidden=4, ways=3, queries=2, validation_episodes=2, threads=1, iterations=2,
        meta_batch=2, validate_every=2, log_every=1,
    )  # fmt: skip
    rules = ["uniform", "agreement", "norm-control"]
    parts = {
        "whole": (rules, range(3)), "a": (rules[:2], range(2)), "b": (rules, [2]),
        "c": (rules[2:], range(2)),
    }  # fmt: skip
    read_course = script("read_course")
    for name, (own, seeds) in parts.items():
        compare(config, own, list(seeds), 3, tmp_path / name, progress=False)
        assert read_course.main([str(tmp_path / name)]) == 0
    a, b, c, out = (str(tmp_path / name) for name in ("a", "b", "c", "out"))
    main = script("join_results").main
    assert main([a, b, c, "--out", out]) == 0
    found, whole = (read_results(tmp_path / name) for name in ("out", "whole"))
    for key in ("config", "metric", "episodes"):
        assert found[key] == whole[key]
    assert list(found["rules"]) == rules
    for rule, entry in whole["rules"].items():
        joined = found["rules"][rule]
        for one in [*entry["seeds"], *joined["seeds"]]:
            del one["seconds"]
        assert joined["seeds"] == entry["seeds"]
        for key in ("accuracy", "ci95", "ci95_episodes"):
            assert joined[key] == pytest.approx(entry[key])
    for pair, one in zip(found["paired"], whole["paired"], strict=True):
        assert pair.pop("episodes") == {"ci95": None, "p_value": None}
        assert pair.keys() == one.keys() - {"episodes"}
        for key, value in pair.items():
            assert value == pytest.approx(one[key], abs=1e-12)
    course, expected = (
        json.loads((tmp_path / name / "course.json").read_text())["rules"]
        for name in ("out", "whole")
    )
    for rule, entry in expected.items():
        assert course[rule].keys() == entry.keys()
        for name in ("cosine", "length", "effective_tasks", "negative_share"):
            assert course[rule][name]["mean"] == pytest.approx(entry[name]["mean"])
        validated = (at[rule]["validation"]["2"]["mean"] for at in (course, expected))
        assert next(validated) == pytest.approx(next(validated))
    assert json.loads((tmp_path / "out" / "course.json").read_text())["scores"] == {
        rule: {str(one["seed"]): one["accuracy"] for one in entry["seeds"]}
        for rule, entry in found["rules"].items()
    }
    before = {
        name: (tmp_path / "out" / name).read_bytes() for name in ("course.json", "results.json")
    }
    courses_of_c = tmp_path / "c" / "course.json"
    kept = courses_of_c.read_text()
    older = json.loads(kept)
    older["scores"]["norm-control"]["1"] += 0.25
    less = {**json.loads(kept), "rules": {"norm-control": {"cosine": {"mean": 1.0}}}}
    capsys.readouterr()
    for text, message in (
        ("{}", "c/course.json: not of the trainings of the results.json beside it; write it anew"),
        ("{", "c/course.json: damaged"),
        ("[]", "c/course.json: damaged"),
        (json.dumps(older), "c/course.json: not of the trainings"),
        (json.dumps(less), "course.json: damaged, or validated at different iterations"),
    ):
        courses_of_c.write_text(text)
        assert main([a, b, c, "--out", out]) == 2
        assert message in capsys.readouterr().err
    courses_of_c.unlink()
    assert main([a, b, c, "--out", out]) == 2
    told = capsys.readouterr().err
    assert "c/course.json is not there, so that no course.json is written" in told
    assert "out/course.json is of other results, and would stay; remove it" in told
    for name, content in before.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert main([a, b, c, "--out", str(tmp_path / "new")]) == 0
    assert not (tmp_path / "new" / "course.json").exists()
    capsys.readouterr()
    assert main([a, b, c, "--out", str(courses_of_c.parent / "results.json")]) == 2
    assert "results.json: cannot be created" in capsys.readouterr().err
    courses_of_c.write_text(kept)
    for folders, message in (
        ([a, a], "'uniform' is in several parts on the seeds 0, 1"),
        ([out, b], f"--out {out} is one of the parts"),
        ([a, b], "'norm-control' has no training on the seeds 0, 1"),
    ):
        assert main([*folders, "--out", out]) == 2
        assert message in capsys.readouterr().err
    other = json.loads((tmp_path / "c" / "results.json").read_text())
    for change, message in (
        ({"episodes": 4}, "the parts differ in 'episodes'"),
        ({"environment": {"gametalearn": "0.0.1"}}, "the parts were trained by"),
    ):
        (tmp_path / "c" / "results.json").write_text(json.dumps({**other, **change}))
        assert main([a, b, c, "--out", out]) == 2
        assert message in capsys.readouterr().err


def test_a_probe_is_shown_with_its_differences(tmp_path: Path) -> None:
    def rule(gain: float, pair: dict[str, Any] | None, effective: float) -> dict[str, Any]:
        return {"cosine_uniform": {"mean": 0.5}, "cosine_true": {"mean": -0.25},
                "effective_tasks": {"mean": effective},
                "gains": {"length": {"clean": {"mean": gain, "minus_baseline": pair}}}}  # fmt: skip

    pair = {"mean": 0.002, "ci95": [-0.001, 0.005]}
    one = {"iteration": 250, "aim": "clean", "baseline": "a", "reference": 1024, "tasks": 16,
           "rules": {"a": rule(0.001, None, 16), "b": rule(0.003, pair, 9.96)}}  # fmt: skip
    (tmp_path / "probe.json").write_text(json.dumps({"checkpoints": [one]}))
    header, _, a, b = script("tables").probed(tmp_path).splitlines()
    assert (
        "| cosine to a | cosine to the mean of 1,024 clean tasks | effective tasks of 16 |"
        in header
    )
    assert a == "| 250 | a | 0.500 | -0.250 | 16.0 | 1.0 |"
    assert b == "| 250 | b | 0.500 | -0.250 | 10.0 | 3.0: +2.0 [-1.0, +5.0] |"


def test_gains_are_ranked_against_scores(tmp_path: Path, capsys: Any) -> None:
    rules = ["uniform", "a", "b", "c"]
    scores = dict(zip(rules, (0.5, 0.7, 0.6, 0.4), strict=True))
    gains = dict(zip(rules, ((2.0, 4.0), (3.0, 4.0), (2.0, 4.5), (2.0, 2.0)), strict=True)) | {
        "only probed": (1.0, 1.0)
    }
    metric = {"name": "accuracy", "higher_is_better": True, "format": "percent"}
    settings: dict[str, Any] = {"hidden": 4, "seed": 3, "rule_options": {}}
    results: dict[str, Any] = {"metric": metric, "config": {"hidden": 4},
               "rules": {rule: {"accuracy": scores[rule]} for rule in rules}}  # fmt: skip
    checkpoints: list[dict[str, Any]] = [
        {"baseline": "uniform", "aim": "clean", "iteration": 10 * (at + 1), "meta_batches": 7,
         "config": settings,
         "rules": {rule: {"gains": {"length": {"clean": {"mean": gains[rule][at]}}}}
                   for rule in [*rules, "only probed"]}}
        for at in range(2)
    ]  # fmt: skip
    (tmp_path / "probe.json").write_text(json.dumps({"checkpoints": checkpoints}))
    module, tables = script("rank_gains"), script("tables")
    module.read_results = tables.read_results = lambda folder: results
    assert module.main([str(tmp_path / "probe.json"), str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gains.json").read_text())
    gained = {rule: found["rules"][rule]["length"] for rule in rules}
    # means over the two checkpoints of own - uniform's
    assert gained == pytest.approx({"uniform": 0, "a": 0.5, "b": 0.25, "c": -1})
    assert found["correlations"]["length"]["rho"] == pytest.approx(1)
    assert "length: rank correlation +1.00" in capsys.readouterr().out
    assert found["correlations"]["length"]["p_value"] == pytest.approx(2 / 24)  # of all orders
    for size in (3, 5, 7, 9):
        x, y = np.random.default_rng(size).normal(size=(2, size)).round(1)
        rho, p_value = module.rank_correlation(list(x), list(y))
        exact = stats.permutation_test(
            (x,), lambda x, y=y: stats.spearmanr(x, y).statistic, permutation_type="pairings", n_resamples=10**6
        ) if size <= 7 else stats.spearmanr(x, y)  # fmt: skip
        assert (rho, p_value) == pytest.approx((exact.statistic, exact.pvalue))
    lines = tables.gains(tmp_path).splitlines()
    assert lines[2] == "| a | +500.0 | 70.00 |"
    assert lines[-1].startswith("| **rank correlation** | +1.00 (p = ")
    (tmp_path / "empty.json").write_text('{"checkpoints": []}')
    assert module.main([str(tmp_path / "empty.json"), str(tmp_path)]) == 2
    assert "empty.json: no probe" in capsys.readouterr().err
    for change, message in (
        (
            {"config": {"hidden": 5}},
            "differ in `hidden` (5, 4); compare a probe and trainings of the same",
        ),
        (
            {"config": {**settings, "rule_options": {"a": {"x": 1}}}},
            "differ in the options of 'a' ({'x': 1}, {})",
        ),
        ({"meta_batches": 7, "aim": "none"}, "other.json: no probe, or a damaged one"),
        (
            {"rules": dict.fromkeys(rules, checkpoints[0]["rules"]["a"])},
            "all gains or scores are equal",
        ),
    ):
        found = {"checkpoints": [{**checkpoints[0], **change}]}
        (tmp_path / "other.json").write_text(json.dumps(found))
        assert module.main([str(tmp_path / "other.json"), str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert (
        module.main([str(tmp_path / "probe.json"), str(tmp_path), "--out", str(tmp_path / "file")])
        == 2
    )
    assert "file: cannot be created" in capsys.readouterr().err
    del results["rules"]["c"]
    assert module.main([str(tmp_path / "probe.json"), str(tmp_path)]) == 2
    assert "at least three others" in capsys.readouterr().err


def test_options_are_searched_on_validation(tmp_path: Path, capsys: Any) -> None:
    pictures = f"folder:{divided_pictures(tmp_path / 'dots')}"
    (tmp_path / "c.toml").write_text(
        TINY.replace('"glyphs"', f'"glyphs+{pictures}"') + "image-size = 28\n"
    )
    main, out = script("search_options").main, tmp_path / "out"
    command = ["--config", str(tmp_path / "c.toml"), "--out", str(out), "--seed", "7"]
    tried = ["--try", "dtp.gamma=0.5,dtp.indicator=likelihood", "--try", "dwa"]
    assert main([*command, *tried]) == 0
    printed = capsys.readouterr().out.splitlines()
    found = json.loads((out / "search.json").read_text())
    assert [cell["tried"] for cell in found["cells"]] == ["uniform", tried[1], "dwa"]
    assert len(printed) == 3
    assert found["cells"][0]["change"] == 0
    base = list(found["cells"][0]["validation"].values())
    assert len(base) == 2
    for cell in found["cells"]:
        own = list(cell["validation"].values())
        change = np.mean([a / b - 1 for a, b in zip(own, base, strict=True)])
        assert cell["change"] == pytest.approx(change)
        folder = out / cell["tried"].replace(",", "+")
        run = load_run(folder, "latest")
        assert run.config.seed == 7
        assert cell["tried"].startswith(run.config.rule)
        record = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert cell["validation"] == record["validation"]["objectives"]
    assert run.config.rule_options == {}
    options = load_run(out / tried[1].replace(",", "+")).config.rule_options
    assert options == {"dtp": {"gamma": 0.5, "indicator": "likelihood"}}
    shown = script("tables").search(out).splitlines()
    assert shown[2].endswith(f"| {100 * base[0]:.2f} | {100 * base[1]:.2f} | +0.00 |")
    assert shown[-1] == "Seed 7, 3 iterations, one training each."

    before = (out / "dwa" / "checkpoint.pt").stat().st_mtime_ns
    assert main([*command, *tried]) == 0  # all of it is there
    assert (out / "dwa" / "checkpoint.pt").stat().st_mtime_ns == before
    assert main([*command, "--try", "dtp"]) == 0  # what was tried stays
    tried_so_far = [
        cell["tried"] for cell in json.loads((out / "search.json").read_text())["cells"]
    ]
    assert tried_so_far == ["uniform", tried[1], "dwa", "dtp"]
    capsys.readouterr()
    assert main([*command, "--try", "dwa", "--jobs", "0"]) == 2
    assert "--jobs must be at least 1, got 0" in capsys.readouterr().err
    for bad, message in (
        ("dwaa", "did you mean 'dwa'"),
        ("dwa.steps=3", "no option 'steps'"),
        ("dtp.gamma=0,dwa.period=2", "has options of dtp and dwa; try one rule at a time"),
        ("no.such:Rule", "no.such"),
    ):
        assert main([*command, "--try", bad]) == 2
        assert message in capsys.readouterr().err


def test_a_table_of_two_objectives_has_each_of_them(tmp_path: Path) -> None:
    pictures = f"folder:{divided_pictures(tmp_path / 'dots')}"
    config = TrainConfig.of(
        f"glyphs+{pictures}", hidden=4, ways=3, queries=2, validation_episodes=2, threads=1,
        iterations=1, meta_batch=2, image_size=28,
    )  # fmt: skip
    out = tmp_path / "out"
    compare(config, ["uniform", "dwa"], 1, 4, out, progress=False, single=True)
    found = read_results(out)
    lines = script("tables").markdown(found).splitlines()
    for caption in ("Test accuracy %, each objective:", "Over the objectives:"):
        assert caption in lines
    mean = found["rules"]["dwa"]["objectives"]["glyphs"]["accuracy"]
    here = lines.index("Test accuracy %, each objective:")
    assert lines[here + 2].startswith("| rule | glyphs | ")
    assert lines[here + 5].startswith(f"| dwa | {100 * mean:.2f} |")
    assert lines[here + 6].startswith("| (alone) | ")


def test_a_list_of_cells_is_a_table(tmp_path: Path) -> None:
    """A rule beside the plain mean, and trainings on the clean tasks alone."""

    def results(scores: dict[str, list[float]]) -> dict[str, Any]:
        rules = {
            rule: {"accuracy": float(np.mean(own)), "ci95": 0.01,
                   "seeds": [{"seed": i, "accuracy": v} for i, v in enumerate(own)]}
            for rule, own in scores.items()
        }  # fmt: skip
        pair = {"rule": "mine", "baseline": "uniform", "difference": 0.1, "ci95": [0.05, 0.15],
                "p_holm": 0.01, "by_seed": [0.1] * 3}  # fmt: skip
        return {"metric": {"name": "accuracy", "higher_is_better": True, "format": "percent"}, "rules": rules,
                "paired": [pair], "environment": {"gametalearn": "0.1.0 (commit abcdef012345)"}}  # fmt: skip

    cell = {
        "data": "dots",
        "tasks": "shuffled",
        "set_on": False,
        "results": "one",
        "oracle": "best",
    }
    cells = [cell, {**cell, "tasks": "clean", "set_on": True, "oracle": None}]
    (tmp_path / "mine.json").write_text(json.dumps({"rule": "mine", "cells": cells}))
    there = {
        "one": results({"uniform": [0.5, 0.6, 0.7], "mine": [0.6, 0.7, 0.8]}),
        "best": results({"uniform": [0.75, 0.75, 0.9]}),
    }
    tables = script("tables")
    tables.read_results = lambda folder: there[folder.name]
    header, _, first, second, _, about, *_ = tables.cells(tmp_path / "mine").splitlines()
    assert "| clean tasks alone | mine minus that [95%] | share of its gain % |" in header
    behind = [-0.15, -0.05, -0.1]
    half = 4.302652730 * np.std(behind, ddof=1) / 3**0.5
    low, high = 100 * (np.mean(behind) - half), 100 * (np.mean(behind) + half)
    assert first == (
        "| dots | shuffled | no | 60.00 ± 1.00 | 70.00 ± 1.00 | +10.00 [+5.00, +15.00] | ahead | "
        f"80.00 ± 1.00 | -10.00 [{low:+.2f}, {high:+.2f}] | 50 | abcdef0 |"
    )
    assert second.endswith("| ahead |  |  |  | abcdef0 |")
    assert about.startswith("Test accuracy %; commits of the rules")
    there["best"] = results({"uniform": [0.75, 0.75]})
    with pytest.raises(gametalearn.InputError, match="one and best have other seeds"):
        tables.cells(tmp_path / "mine")


def test_the_figures_are_those_of_the_page(tmp_path: Path, capsys: Any) -> None:
    main = script("draw_figures").main
    assert main(["--out", str(tmp_path)]) == 0
    page = (ROOT / "README.md").read_text()
    for file in tmp_path.iterdir():
        assert f"(figures/{file.name})" in page
        assert file.stat().st_size > 10_000
    assert len(list(tmp_path.iterdir())) == 6
    assert main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
