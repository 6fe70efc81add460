"""Several processes find what one finds, send no more than they need, and never wait for ever."""

import contextlib
import functools
import json
import multiprocessing
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn

from gametalearn import distributed, evaluation, training
from gametalearn.adaptation import MAML
from gametalearn.checkpoint import load_checkpoint
from gametalearn.cli import main
from gametalearn.config import TrainConfig
from gametalearn.distributed import ALONE, Tasks, Team, joined, weighted_update
from gametalearn.episodes import EpisodeSampler
from gametalearn.errors import InputError, SharedError
from gametalearn.gradients import TaskGradients, adapt_and_score, meta_gradients
from gametalearn.images import ClassImages
from gametalearn.mixture import MixedSource
from gametalearn.training import train
from gametalearn.update import apply_update
from gametalearn.weighting import RULES, make_rule

TASKS = 5  # divisible by neither 2 nor 4


# ---------------------------------------------------------------------------------------------
# processes


def processes(size, work, *args):
    """What ``work(team, *args)`` returns in each of ``size`` processes; exceptions are returned."""
    # forked from a server that has imported torch; they run this file, whatever its module is called
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gametalearn", "pytest"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pairs = [context.Pipe(duplex=False) for _ in range(size)]
    running = []
    for rank, (_, sender) in enumerate(pairs):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        given = {"child": (env, sender, work.__name__, args)}
        process = context.Process(target=runpy.run_path, args=(__file__, given))
        process.start()
        sender.close()
        running.append(process)
    results = []
    try:
        for receiver, _ in pairs:
            assert receiver.poll(120), "a process hangs"
            try:
                results.append(pickle.loads(receiver.recv_bytes()))
            except EOFError:
                results.append(None)  # it died
        for process in running:
            process.join(20)
            assert process.exitcode is not None, "a process does not end"
    finally:
        for process in running:
            process.kill()
    return results


def run_child(env, sender, name, args):
    os.environ.update({k: str(v) for k, v in env.items()})
    torch.set_num_threads(1)
    try:
        with joined() as team:
            result = globals()[name](team, *args)
    except (Exception, KeyboardInterrupt) as error:
        result = error
    sender.send_bytes(pickle.dumps(result))


def unwrapped(results):
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


# ---------------------------------------------------------------------------------------------
# runs in float64 or float32 on a smooth model, with two objectives


class Cast:
    """A source whose inputs are of another dtype."""

    group_names = ("a", "b")

    def __init__(self, source, dtype):
        self.source, self.dtype = source, dtype
        self.state_dict, self.load_state_dict = source.state_dict, source.load_state_dict

    def sample(self, num_tasks, part=slice(None)):
        return self.source.sample(num_tasks, part).to(dtype=self.dtype)

    def with_seed(self, seed):
        return Cast(self.source.with_seed(seed), self.dtype)


def images(seed, classes=8, each=6):
    generator = torch.Generator().manual_seed(seed)
    middle = torch.rand(classes, 1, 1, 3, 3, generator=generator)
    noise = torch.rand(classes, each, 1, 3, 3, generator=generator)
    data = ((0.6 * middle + 0.4 * noise).flatten(0, 1) * 255).round().to(torch.uint8)
    return ClassImages.from_tensors(data, torch.arange(classes).repeat_interleave(each))


def build_source(dtype, split):
    samplers = [EpisodeSampler(images(i), 3, 1, 2, seed=10 * i + len(split)) for i in range(2)]
    return Cast(MixedSource(samplers), dtype)


def build_model(dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = {"flat": nn.Flatten(), "body": nn.Linear(9, 7), "smooth": nn.Tanh()}
        return nn.Sequential(OrderedDict(**layers, head=nn.Linear(7, 3))).to(dtype)


P = 9 * 7 + 7 + 7 * 3 + 3


def made_of(dtype):
    """What these runs are made of, fresh."""
    source, validation = (build_source(dtype, split) for split in ("train", "val"))
    return {"model": build_model(dtype), "source": source, "validation": validation}


@contextlib.contextmanager
def small(dtype, spoil=None):
    """`train` by the plain loop; yields what is computed and sent."""
    seen: dict[str, list[Any]] = {"tasks": [], "sent": []}

    def gradients(model, batch, learner, **more):
        seen["tasks"].append(len(batch))
        found = meta_gradients(model, batch, learner, method="loop", **more)
        if spoil is not None:
            spoil(len(seen["tasks"]), batch, found)
        return found

    def sent(collective):
        def wrapped(tensor, *args, **kwargs):
            if isinstance(tensor, torch.Tensor):
                seen["sent"].append(tensor.numel())
            return collective(tensor, *args, **kwargs)

        return wrapped

    def step(*args):
        seen["sent"].append("update")
        return apply_update(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "meta_gradients", gradients)
        patch.setattr(training, "apply_update", step)
        patch.setattr(
            evaluation, "adapt_and_score", functools.partial(adapt_and_score, method="loop")
        )
        for name in ("all_reduce", "broadcast", "reduce", "gather", "all_gather", "all_to_all",
                     "all_gather_into_tensor", "reduce_scatter", "scatter", "send"):  # fmt: skip
            patch.setattr(torch.distributed, name, sent(getattr(torch.distributed, name)))
        yield seen


def config(rule, **given):
    settings: dict[str, Any] = {"iterations": 20, "meta_batch": TASKS, "ways": 3, "queries": 2}
    settings |= {"inner_lr": 0.3, "inner_steps": 2, "meta_lr": 1e-2, "validation_episodes": 21}
    settings |= {"validate_every": 1000, "log_every": 1000, "checkpoint_every": 6, "threads": 1}
    return TrainConfig.of("mini-imagenet", rule=rule, **{**settings, **given})


CASES: list[tuple[str, dict[str, Any]]] = [(rule, {}) for rule in (*RULES, "torchjd:IMTLG")]
CASES += [(rule, {"within": "agreement"}) for rule in ("gradnorm", "dwa")]
CASES += [("agreement", {"meta_optimizer": "sgd", "clip_norm": 0.01, "learner": "metasgd"})]
CASES += [("uniform", {"meta_batch": 3}), ("agreement-cosine", {"meta_batch": 3})]


def run_cases(team, dtype):
    found = []
    for rule, given in CASES:
        with small(dtype) as seen:
            run = train(config(rule, **given), **made_of(dtype), team=team, progress=False)
        weights = torch.cat([p.detach().flatten() for p in run.meta.values()])
        found.append((weights, run.best["value"], seen["tasks"], seen["sent"]))
    return found


@pytest.mark.parametrize(
    ("size", "dtype", "bound"),
    [
        (2, torch.float64, 1e-9),
        (2, torch.float32, 1e-4),
        pytest.param(4, torch.float64, 1e-9, marks=pytest.mark.slow),
        pytest.param(4, torch.float32, 1e-4, marks=pytest.mark.slow),
    ],
)
def test_several_processes_end_with_the_weights_of_one(size, dtype, bound):
    alone = run_cases(ALONE, dtype)
    together = unwrapped(processes(size, run_cases, dtype))
    for i, (rule, given) in enumerate(CASES):
        weights, value = alone[i][:2]
        count = given.get("meta_batch", TASKS)
        for rank in range(size):
            theirs, their_value, tasks, sent = together[rank][i]
            name = f"{rule} {given} on process {rank}"
            assert torch.equal(theirs, together[0][i][0]), name
            assert (theirs - weights).abs().max() <= bound * weights.abs().max(), name
            assert their_value == pytest.approx(value, abs=0.05), name
            own = range(count)[Team(rank, size).share(count)]
            assert tasks == [len(own)] * 20, name  # no task but its own, perhaps none
            check_sent(rule, given, dtype, sent)
        assert sum(sum(together[rank][i][2]) for rank in range(size)) == 20 * count


def check_sent(rule, given, dtype, sent):
    """What is handed to collectives in the second iteration, which logs nothing."""
    first = sent.index("update")
    second = sent[first + 1 : sent.index("update", first + 1)]
    tasks, size = given.get("meta_batch", TASKS), P * (2 if "learner" in given else 1)
    exact = [1] if dtype == torch.float64 and rule != "agreement-cosine" else []  # a largest entry
    if rule in ("torchjd:IMTLG", "geometric-median"):  # all rows
        wanted = [tasks * size]
    elif rule in ("uniform", "screened-mean"):  # which has no evidence yet
        wanted = [size]
    elif rule == "normalized-mean":
        wanted = [*exact, tasks, size]
    elif rule.startswith(("agreement", "norm")) or given.get("within") == "agreement":
        combinations = size * (2 if "within" in given else 1)  # one an objective
        wanted = [*exact, combinations, 2 * tasks, combinations]
    else:
        wanted = [2 * size]
    assert second[-len(wanted) :] == wanted
    assert second[: -len(wanted)] in ([4 * tasks + 1], [tasks * size, 4 * tasks + 1])
    if rule == "agreement":
        assert sum(second[-len(wanted) - 1 :]) == 2 * size + 6 * tasks + 1 + len(exact)


# ---------------------------------------------------------------------------------------------
# the rules on constructed rows


def constructed(dtype):
    """Rows ``(T, P)`` at the edges: cancelling, zero, of one task, of all scales."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    cancelling = torch.cat([rows[:3], -rows[:3]])
    mostly = cancelling.clone()
    mostly[0] *= 1 + 1e-4
    one = torch.zeros(6, 40, dtype=torch.float64)
    one[4] = rows[4]
    scales = (1e-30, 1e30) if dtype == torch.float32 else (1e-200, 1e200)
    mixed = rows * torch.logspace(-15, 15, 6, dtype=torch.float64).unsqueeze(1)
    wild = [rows, cancelling, mostly, one, torch.zeros_like(rows), rows[:1], rows[:3], mixed]
    wild += [rows * scale for scale in scales]
    return [w.to(dtype) for w in wild]


def weigh_constructed(team, dtype):
    found = []
    for rows in constructed(dtype):
        count = len(rows)
        group = torch.arange(count) % 3
        loss, score = torch.linspace(0.5, 2, count, dtype=dtype), torch.linspace(0, 1, count)
        whole = TaskGradients(rows, rows.flip(1) + 0.1 * rows, loss, score, group)
        own = team.share(count)
        part = TaskGradients(*(getattr(whole, f)[own] for f in FIELDS))
        tasks = team.tasks(part, count, stop=False)
        for name in RULES:
            rule = make_rule(name, objectives=3)
            found.append(
                [weighted_update(rule, part, tasks, team) for _ in range(2)]
            )  # state moves too
    return found


FIELDS = ("rows", "updates", "loss", "score", "group")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 2e-6)])
def test_rules_at_their_edges(dtype, bound):
    alone = weigh_constructed(ALONE, dtype)
    names = [(number, rule) for number in range(len(constructed(dtype))) for rule in RULES]
    for theirs in unwrapped(processes(3, weigh_constructed, dtype)):
        for (number, rule), mine, their in zip(names, alone, theirs, strict=True):
            name, rows = f"rows {number}, {rule}", constructed(dtype)[number]
            for (weights, update), (others, other) in zip(mine, their, strict=True):
                for a, b in ((weights.raw, others.raw), (weights.effective, others.effective)):
                    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-7, msg=name)
                # entries of sums that cancel are no better than their terms
                terms = (weights.effective.abs().double() @ rows.abs().double()).max()
                good = torch.isfinite(update)  # at 1e30 a sum may leave float32
                error = (other - update)[good].double().abs().max()
                assert error <= bound * terms, name


# ---------------------------------------------------------------------------------------------
# evaluation, state, and what goes wrong


def evaluate_small(team):
    source = build_source(torch.float32, "test")
    model = build_model(torch.float32)
    adapted = []

    def adapting(model, batch, *args, **more):
        adapted.append(len(batch))
        return adapt_and_score(model, batch, *args, method="loop", **more)

    with small(torch.float32), pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "adapt_and_score", adapting)
        values = evaluation.evaluate(model, source, MAML(0.3), 37, 5, tasks_at_once=4, team=team)
    return (values.values.tolist(), values.group.tolist()), sum(adapted)


def several_things(team, folder):
    """In one group of processes, to save their start."""
    found = {"evaluation": evaluate_small(team)}

    def spoil(call, batch, gradients):
        if call == 3 and team.rank == 1:
            gradients.rows[0, 3] = float("nan")

    with small(torch.float64, spoil) as seen:
        try:
            train(config("agreement"), **made_of(torch.float64), team=team, progress=False)
        except InputError as error:
            found["error"] = (type(error), str(error), len(seen["tasks"]))
    with small(torch.float64, spoil):
        run = train(
            config("agreement", nonfinite="skip"),
            **made_of(torch.float64),
            team=team,
            progress=False,
        )
        found["skip"] = (run.skipped, torch.cat([p.detach().flatten() for p in run.meta.values()]))

    def interrupt(call, batch, gradients):
        if call == 9 and team.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with small(torch.float64, interrupt) as seen:
        try:
            train(
                config("gradnorm"),
                folder / "parts",
                **made_of(torch.float64),
                team=team,
                progress=False,
            )
        except KeyboardInterrupt:
            found["interrupted"] = len(seen["tasks"])
    with small(torch.float64):
        try:
            train(
                config("uniform"),
                folder / "parts",
                **made_of(torch.float64),
                team=team,
                progress=False,
            )
        except InputError as error:
            found["other"] = (type(error), str(error))
    return found


def test_evaluation_errors_skips_and_signals_are_the_same_on_all(tmp_path):
    first, second = unwrapped(processes(2, several_things, tmp_path))
    (alone, everything), (values, some), (others, rest) = (
        evaluate_small(ALONE), first["evaluation"], second["evaluation"],
    )  # fmt: skip
    assert values == others == alone
    assert (some, rest, everything) == (21, 16, 37)  # each its share of the episodes
    for found in (first, second):
        kind, message, calls = found["error"]
        assert kind is SharedError
        assert calls == 3
        # the first process names the classes, which only the second one knows
        assert message.startswith("iteration 3: loss or gradient of task 2 is not finite (loss ")
        assert ", classes [" in message
        assert found["interrupted"] == 9
        assert found["other"][0] is SharedError
        assert "other settings (rule gradnorm, not uniform)" in found["other"][1]

    def spoil(call, batch, gradients):
        if call == 3:
            gradients.rows[2, 3] = float("nan")

    with small(torch.float64, spoil):
        run = train(config("agreement", nonfinite="skip"), **made_of(torch.float64), progress=False)
    weights = torch.cat([p.detach().flatten() for p in run.meta.values()])
    for skipped, theirs in (first["skip"], second["skip"]):
        assert skipped == run.skipped == 1
        torch.testing.assert_close(theirs, weights, rtol=1e-9, atol=1e-11)

    # what two processes saved when interrupted, one goes on with
    assert load_checkpoint(tmp_path / "parts" / "checkpoint.pt")["iteration"] == 9
    with small(torch.float64):
        train(config("gradnorm"), tmp_path / "parts", **made_of(torch.float64), progress=False)
        train(config("gradnorm"), tmp_path / "whole", **made_of(torch.float64), progress=False)
    parts, whole = (load_checkpoint(tmp_path / n / "checkpoint.pt") for n in ("parts", "whole"))
    assert parts.keys() == whole.keys()
    for name, value in whole["meta"].items():
        torch.testing.assert_close(parts["meta"][name], value, rtol=1e-9, atol=1e-11)


def die(team, folder):
    def spoil(call, batch, gradients):
        if call == 9 and team.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with small(torch.float64, spoil):
        train(config("agreement"), folder, **made_of(torch.float64), team=team, progress=False)


def test_where_a_process_dies_the_others_end_with_a_clear_error(tmp_path):
    first, second = processes(2, die, tmp_path / "a")
    assert second is None
    assert isinstance(first, InputError)
    assert "another process of this run has ended" in str(first)
    assert load_checkpoint(tmp_path / "a" / "checkpoint.pt")["iteration"] == 6
    with small(torch.float64):
        train(config("agreement"), tmp_path / "a", **made_of(torch.float64), progress=False)
    assert load_checkpoint(tmp_path / "a" / "checkpoint.pt")["iteration"] == 20


def full_disk(team, folder, writes):
    done = []
    replace = os.replace

    def fail(*args):
        done.append(1)
        if len(done) > writes:
            raise OSError(28, os.strerror(28))
        return replace(*args)

    with small(torch.float64), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", fail)
        train(config("agreement"), folder, **made_of(torch.float64), team=team, progress=False)


def test_where_the_first_process_cannot_write_all_end(tmp_path):
    first, second = processes(2, full_disk, tmp_path / "a", 0)
    assert isinstance(first, SharedError)
    assert isinstance(second, SharedError)
    assert str(first) == str(second)
    assert "No space left on device" in str(first)
    first, second = processes(2, full_disk, tmp_path / "b", 2)  # config.toml and one checkpoint
    assert "No space left on device" in str(first)
    assert isinstance(second, InputError)
    assert "another process of this run has ended" in str(second)
    assert load_checkpoint(tmp_path / "b" / "checkpoint.pt")["iteration"] == 6


def test_shares_are_contiguous_complete_and_even():
    for count in range(1, 12):
        for size in range(1, 7):
            shares = [range(count)[Team(rank, size).share(count)] for rank in range(size)]
            assert [i for share in shares for i in share] == list(range(count))
            lengths = [len(share) for share in shares]
            assert max(lengths) - min(lengths) <= 1


def test_tasks_left_out_move_the_own_ones():
    values = torch.arange(5.0)
    kept = torch.tensor([True, False, True, False, True])
    tasks = Tasks(values, values, values.long(), kept, slice(2, 5), False).only(kept)
    assert tasks.loss.tolist() == [0, 2, 4]
    assert tasks.own == slice(1, 3)


def test_others_that_cannot_be_reached_are_an_error(monkeypatch):
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=1))
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    refused = pytest.raises(InputError, match=r"cannot join the other processes at 127\.0\.0\.1:1")
    with refused, joined():
        pass


# ---------------------------------------------------------------------------------------------
# torchrun itself

FLAGS = [
    *("--dataset", "sinusoid", "--hidden", "8", "--meta-batch", "5", "--rule", "agreement"),
    *("--log-every", "10", "--threads", "1", "--validate-every", "4000"),
    *("--validation-episodes", "5", "--checkpoint-every", "20", "--iterations"),
]


ONE_MACHINE = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--nproc-per-node", "2")


@contextlib.contextmanager
def torchrun(*words, how=ONE_MACHINE):
    command = [sys.executable, "-m", "torch.distributed.run", *how, "-m", "gametalearn"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command += map(str, words)
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()  # its children notice, since their store is gone


def torchrun_to_the_end(*words):
    with torchrun(*words) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_torchrun_stops_after_a_checkpoint_and_one_process_goes_on(tmp_path, number):
    checkpoint, waited = tmp_path / "a" / "checkpoint.pt", time.monotonic()
    with torchrun("train", *FLAGS, "600", "--out", tmp_path / "a") as process:
        while not checkpoint.exists() and process.poll() is None:
            assert time.monotonic() - waited < 400
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert "2 processes, up to 3 of 5 tasks each" in err
    assert err.count("gametalearn: interrupted; what was done is saved") == 1
    done = load_checkpoint(checkpoint)
    assert 20 <= done["iteration"] < 600
    assert (tmp_path / "a" / "metrics.jsonl").stat().st_size == done["metrics_bytes"]
    assert main(["train", "--quiet", "--resume", str(tmp_path / "a")]) == 0
    assert load_checkpoint(checkpoint)["iteration"] == 600


@pytest.mark.slow
def test_torchrun_twice_the_same_and_the_same_as_one_process(tmp_path):
    for name in ("a", "b"):
        torchrun_to_the_end("train", *FLAGS, "100", "--out", tmp_path / name)
    assert main(["train", *FLAGS, "100", "--quiet", "--out", str(tmp_path / "c")]) == 0
    a, b, c = (load_checkpoint(tmp_path / n / "checkpoint.pt")["meta"] for n in "abc")
    assert all(torch.equal(b[name], value) for name, value in a.items())
    for name, value in a.items():
        torch.testing.assert_close(c[name], value, rtol=1e-4, atol=1e-6)
    evaluate = ["evaluate", str(tmp_path / "a"), "--episodes", "33"]
    torchrun_to_the_end(*evaluate)
    two = (tmp_path / "a" / "evaluation.json").read_text()
    assert main(evaluate) == 0
    assert (tmp_path / "a" / "evaluation.json").read_text() == two
    compare = ["--rules", "uniform,agreement", "--seeds", "1", "--episodes", "9", "--quiet"]
    compare += ["--dataset", "sinusoid", "--iterations", "5", "--threads", "1", "--out"]
    torchrun_to_the_end("compare", *compare, tmp_path / "two")
    assert main(["compare", *compare, str(tmp_path / "one")]) == 0
    means = []
    for name in ("one", "two"):
        found = json.loads((tmp_path / name / "results.json").read_text())
        means.append([found["rules"][rule]["mse"] for rule in ("uniform", "agreement")])
    assert means[0] == pytest.approx(means[1], rel=1e-4)


@pytest.mark.slow
def test_two_machines_find_what_two_processes_of_one_do(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    several += ["--master-port", str(port), "--node-rank"]
    words = ["train", *FLAGS, "100", "--out"]
    with (
        torchrun(*words, tmp_path / "a", how=(*several, "0")) as first,
        torchrun(*words, tmp_path / "elsewhere", how=(*several, "1")) as second,
    ):
        for process in (first, second):
            _, err = process.communicate(timeout=240)
            assert process.returncode == 0, err
    torchrun_to_the_end(*words, tmp_path / "b")
    a, b = (load_checkpoint(tmp_path / n / "checkpoint.pt")["meta"] for n in "ab")
    assert all(torch.equal(b[name], value) for name, value in a.items())
    assert not (tmp_path / "elsewhere").exists()  # the first process writes


if "child" in globals():
    run_child(*globals()["child"])
