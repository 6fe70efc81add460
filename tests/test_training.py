import itertools
import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gametalearn.checkpoint import load_checkpoint
from gametalearn.config import TrainConfig
from gametalearn.errors import InputError
from gametalearn.gradients import meta_gradients
from gametalearn.run import Parts, start
from gametalearn.runfolder import load_run
from gametalearn.training import train
from gametalearn.weighting import RULES
from tests.support import runs
from tests.support.runs import assert_equal, assert_same_run, lines


def tiny(**given):
    settings = {"iterations": 12, "meta_batch": 3, "validate_every": 4, "checkpoint_every": 5}
    settings |= {"validation_episodes": 5}
    return runs.tiny(**{**settings, **given})


def test_one_iteration_of_uniform_sgd_is_a_step_along_the_mean_row():
    config = tiny(iterations=1, meta_optimizer="sgd", meta_lr=0.1)
    run = train(config, progress=False)
    begun = start(config, Parts())
    gradients = meta_gradients(begun.model, begun.source.sample(3), begun.learner)
    wanted = torch.cat([p.detach().flatten() for p in begun.model.parameters()])
    wanted = wanted - 0.1 * gradients.rows.mean(0)
    found = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("learner", ["maml", "fomaml", "anil", "metasgd", "reptile"])
def test_every_learner_trains_and_lowers_the_validation_error(learner):
    run = train(
        tiny(learner=learner, iterations=60, validate_every=60, meta_lr=3e-3, inner_steps=2),
        progress=False,
    )
    start = tiny(learner=learner, iterations=1, meta_lr=1e-12)
    assert -run.best["value"] < -train(start, progress=False).best["value"]
    if learner == "metasgd":
        rates = [p for name, p in run.meta.items() if name.startswith("inner_lr.")]
        assert any((rate != 0.01).any() for rate in rates)


def test_the_global_random_state_is_not_touched():
    before = torch.get_rng_state()
    train(tiny(iterations=2), progress=False)
    assert torch.equal(before, torch.get_rng_state())


def test_same_seed_same_run_and_another_seed_another(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny(seed=seed, rule="agreement"), tmp_path / name, progress=False)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert lines(tmp_path / "a") != lines(tmp_path / "c")


def test_metrics_say_what_the_run_did(tmp_path):
    train(tiny(rule="agreement"), tmp_path / "a", progress=False)
    records = lines(tmp_path / "a")
    assert [r["iteration"] for r in records] == list(range(1, 13))
    assert sum(abs(w) for w in records[3]["effective"]) == pytest.approx(1, abs=1e-6)
    assert [r["iteration"] for r in records if "validation" in r] == [4, 8, 12]
    best = load_checkpoint(tmp_path / "a" / "best.pt")
    found = {r["iteration"]: r["validation"]["mse"] for r in records if "validation" in r}
    assert found[best["iteration"]] == min(found.values())


def test_an_interrupted_run_is_saved_and_goes_on_bit_for_bit(tmp_path, monkeypatch):
    config = tiny(rule="agreement", learner="metasgd")
    train(config, tmp_path / "whole", progress=False)
    calls = []

    def interrupting(*args, **kwargs):
        calls.append(1)
        if len(calls) in (3, 10):
            os.kill(os.getpid(), signal.SIGINT)
        return meta_gradients(*args, **kwargs)

    monkeypatch.setattr("gametalearn.training.meta_gradients", interrupting)
    for done in (3, 10):
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "parts", progress=False)
        assert load_checkpoint(tmp_path / "parts" / "checkpoint.pt")["iteration"] == done
    train(config, tmp_path / "parts", progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert len(calls) == 12


@pytest.fixture(scope="module")
def two_folders(tmp_path_factory):
    """Two small data sets of images, as ``--dataset`` takes them."""
    root, generator = tmp_path_factory.mktemp("two"), np.random.default_rng(0)
    for place, split, name in itertools.product("ab", ("train", "val", "test"), "xyz"):
        folder = root / place / split / f"{split}-{name}"
        folder.mkdir(parents=True)
        for i in range(3):
            pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return f"folder:{root}/a+folder:{root}/b"


STATES: list[dict[str, Any]] = [{"rule": rule} for rule in RULES]
STATES += [{"rule": f"torchjd:{name}"} for name in ("PCGrad", "GradVac", "ExcessMTL", "UPGrad")]
STATES += [
    {"disagree": 0.5},
    {"share": "proportional", "meta_optimizer": "sgd"},
    {"learner": "reptile", "inner_optimizer": "adam", "inner_batch": 1},
    {"learned_rates": True, "multi_step_loss": 8, "first_order_until": 6, "clip_norm": 0.1},
]


@pytest.mark.parametrize("given", STATES, ids=lambda given: "-".join(map(str, given.values())))
def test_every_state_is_restored(tmp_path, monkeypatch, two_folders, given):
    config = TrainConfig.of(two_folders, model="mlp", hidden=4, image_size=8, channels=1, ways=2,
                            shots=2, queries=1, meta_batch=4, iterations=9, inner_steps=2,
                            test_steps=2, log_every=1, validate_every=4, validation_episodes=2,
                            threads=1, meta_schedule="cosine", **given)  # fmt: skip
    calls = []

    def interrupting(*args, **kwargs):
        calls.append(1)
        if len(calls) == 14:
            os.kill(os.getpid(), signal.SIGTERM)
        return meta_gradients(*args, method="loop", **kwargs)

    monkeypatch.setattr("gametalearn.training.meta_gradients", interrupting)
    train(config, tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", progress=False)
    train(config, tmp_path / "parts", progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    a, b = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    del a["seconds"], b["seconds"], a["metrics_bytes"], b["metrics_bytes"]
    assert_equal(a, b)


@pytest.mark.parametrize("wanted", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_as_if_never_killed(tmp_path, wanted):
    # the kills come at any point, in a save or a validation too
    flags = "--dataset sinusoid --hidden 8 --meta-batch 3 --rule agreement --log-every 1 --quiet"
    flags += " --validate-every 7 --validation-episodes 5 --checkpoint-every 3 --threads 1"
    command = [sys.executable, "-c", PROGRAM, "train", *flags.split(), "--iterations"]
    subprocess.run([*command, "400", "--out", tmp_path / "whole"], check=True)
    moments, kills = random.Random(0), 0
    while kills < wanted:
        process = subprocess.Popen([*command, "400", "--out", tmp_path / "killed"])
        file = tmp_path / "killed" / "checkpoint.pt"
        before, waited = file.stat().st_mtime_ns if file.exists() else 0, time.monotonic()
        while (file.stat().st_mtime_ns if file.exists() else 0) == before:
            time.sleep(0.002)  # let it make some way, so that the kills fall all over the run
            if process.poll() is not None or time.monotonic() - waited > 60:
                break
        time.sleep(moments.uniform(0, 0.12))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        if process.returncode == 0:
            break
    assert kills == wanted, f"the run ended after {kills} kills; make it longer"
    subprocess.run([*command, "400", "--out", tmp_path / "killed"], check=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


PROGRAM = "import sys; from gametalearn.cli import main; sys.exit(main())"


def test_another_run_is_refused_without_overwrite(tmp_path):
    train(tiny(iterations=2), tmp_path / "a", progress=False)
    with pytest.raises(InputError, match=r"other settings \(meta_lr 0.001, not 0.5\)"):
        train(tiny(iterations=2, meta_lr=0.5), tmp_path / "a", progress=False)
    train(tiny(iterations=2, meta_lr=0.5), tmp_path / "a", overwrite=True, progress=False)
    assert len(lines(tmp_path / "a")) == 2
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        train(tiny(), tmp_path / "b", progress=False)


def test_settings_that_do_not_fit_leave_the_folder_alone(tmp_path):
    for wrong in ({"rule": "agreemnt"}, {"rule": "gradnorm", "shared": "nose"}, {"rule": "dtp"}):
        with pytest.raises(InputError):
            train(tiny(**wrong), tmp_path / "a", progress=False)
        assert not (tmp_path / "a").exists()


def test_a_run_without_a_checkpoint_gives_way(tmp_path, monkeypatch):
    def diverging(*args, **kwargs):
        gradients = meta_gradients(*args, **kwargs)
        gradients.rows.fill_(float("inf"))
        return gradients

    monkeypatch.setattr("gametalearn.training.meta_gradients", diverging)
    with pytest.raises(InputError, match="not finite"):
        train(tiny(meta_lr=0.5), tmp_path / "a", progress=False)
    monkeypatch.undo()
    train(tiny(iterations=2), tmp_path / "a", progress=False)
    assert len(lines(tmp_path / "a")) == 2
    # but a file of the user's own is none of ours
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.toml").write_text("seed = 3")
    with pytest.raises(InputError, match="other settings"):
        train(tiny(), tmp_path / "b", progress=False)
    assert (tmp_path / "b" / "config.toml").read_text() == "seed = 3"


def test_tasks_that_are_not_finite_stop_the_run_or_are_left_out(monkeypatch):
    def spoiled(*args, **kwargs):
        gradients = meta_gradients(*args, **kwargs)
        gradients.rows[1, 5] = float("nan")
        if len(gradients.loss) == 2:
            gradients.loss[0] = float("inf")
        return gradients

    monkeypatch.setattr("gametalearn.training.meta_gradients", spoiled)
    with pytest.raises(InputError, match=r"iteration 1: .* task 1 is not finite"):
        train(tiny(), progress=False)
    run = train(tiny(nonfinite="skip"), progress=False)
    assert run.skipped == 12
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    with pytest.raises(InputError, match="every task of this one is such"):
        train(tiny(nonfinite="skip", meta_batch=2), progress=False)


def test_a_saved_run_is_loaded_with_its_best_or_latest_weights(tmp_path):
    run = train(tiny(learner="metasgd"), tmp_path / "a", progress=False)
    latest = load_run(tmp_path / "a", "latest")
    assert all(torch.equal(p, run.meta[name]) for name, p in latest.meta.items())
    best = load_run(tmp_path / "a")
    assert all(torch.equal(p, run.best["meta"][name]) for name, p in best.meta.items())
    state = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(v, run.model.state_dict()[k]) for k, v in state.items())
    with pytest.raises(InputError, match="no run there"):
        load_run(tmp_path)


def test_checkpoints_are_kept_beside_the_latest_and_the_best(tmp_path):
    config = tiny(rule="agreement", keep_every=4)
    train(config, tmp_path / "a", progress=False)
    kept = {f"checkpoint-{iteration}.pt" for iteration in (4, 8, 12)}
    others = {"config.toml", "metrics.jsonl", "checkpoint.pt", "best.pt"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == kept | others
    train(tiny(rule="agreement", iterations=8), tmp_path / "b", progress=False)  # a constant rate
    shorter = load_run(tmp_path / "b", "latest")
    for checkpoint in (8, "8"):
        found = load_run(tmp_path / "a", checkpoint)
        assert found.iteration == 8
        assert all(torch.equal(p, shorter.meta[name]) for name, p in found.meta.items())
    with pytest.raises(InputError, match="not kept; kept are those of iterations 4, 8, 12, or"):
        load_run(tmp_path / "a", 5)
    with pytest.raises(InputError, match="not kept; none was: train with `keep_every`"):
        load_run(tmp_path / "b", 5)
    with pytest.raises(InputError, match="`checkpoint` must be best, latest or an iteration"):
        load_run(tmp_path / "a", "lasted")
    train(tiny(), tmp_path / "a", progress=False, overwrite=True)
    assert {p.name for p in (tmp_path / "a").iterdir()} == others
