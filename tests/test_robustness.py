"""What a day-long run meets: full and read-only disks, two runs in one folder, memory that must not grow."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from gametalearn import metrics, training
from gametalearn.checkpoint import load_checkpoint
from gametalearn.cli import main
from gametalearn.episodes import EpisodeSampler
from gametalearn.errors import InputError
from gametalearn.files import held
from gametalearn.gradients import meta_gradients
from gametalearn.images import ClassImages
from gametalearn.runfolder import load_run
from gametalearn.sheet import contact_sheet
from tests.support.runs import assert_same_run

FLAGS = "--dataset sinusoid --meta-batch 3 --hidden 8 --rule agreement --threads 1 --quiet"
FLAGS += " --log-every 1 --validate-every 20 --validation-episodes 3 --checkpoint-every 4"
SLOW = pytest.mark.slow
TRAIN = ["train", *FLAGS.split(), "--iterations", "60", "--out"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main([*TRAIN, str(folder)]) == 0
    return folder


def refused(capsys, *words):
    """The one line of a command that ends with exit code 2."""
    code = main([str(word) for word in words])
    err = capsys.readouterr().err
    assert code == 2
    assert len(err.splitlines()) == 1, err
    return err


# ---------------------------------------------------------------------------------------------
# full and read-only disks


class Full:
    """A stream that takes ``left`` bytes; then the disk is full, in the middle of a write."""

    def __init__(self, stream, left, error):
        self.stream, self.left, self.error = stream, left, error

    def write(self, data):
        data = memoryview(data).cast("B")
        self.stream.write(data[: self.left])
        if len(data) > self.left:
            self.left = 0
            raise OSError(self.error, os.strerror(self.error))
        self.left -= len(data)
        return len(data)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()


@pytest.mark.parametrize("left", [0, 1000, 4000])
def test_a_disk_that_is_full_at_a_checkpoint(tmp_path, monkeypatch, capsys, whole, left):
    made = []
    fdopen = os.fdopen

    def filling(handle, *mode):
        made.append(handle)
        stream = fdopen(handle, *mode)
        return Full(stream, left, errno.ENOSPC) if len(made) == 4 else stream

    monkeypatch.setattr(os, "fdopen", filling)  # the fourth file is a third checkpoint
    err = refused(capsys, *TRAIN, tmp_path / "a")
    assert "checkpoint.pt: cannot be written (No space left on device)" in err
    assert "what was there is unchanged" in err
    assert load_checkpoint(tmp_path / "a" / "checkpoint.pt")["iteration"] == 8
    names = {"config.toml", "metrics.jsonl", "checkpoint.pt"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == names
    monkeypatch.undo()
    assert main(["train", "--quiet", "--resume", str(tmp_path / "a")]) == 0
    assert_same_run(tmp_path / "a", whole)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_at_the_metrics(tmp_path, monkeypatch, capsys, whole, error):
    opened = Path.open

    def failing(path, *mode, **more):
        stream = opened(path, *mode, **more)
        return Full(stream, 9000, error) if path.name == "metrics.jsonl" else stream

    monkeypatch.setattr(Path, "open", failing)
    err = refused(capsys, *TRAIN, tmp_path / "a")
    assert f"metrics.jsonl: cannot be written ({os.strerror(error)})" in err
    assert "the last checkpoint is unchanged" in err
    monkeypatch.undo()
    done = load_checkpoint(tmp_path / "a" / "checkpoint.pt")
    assert 4 <= done["iteration"] < 60
    assert (tmp_path / "a" / "metrics.jsonl").stat().st_size > done["metrics_bytes"]  # half a line
    assert main(["train", "--quiet", "--resume", str(tmp_path / "a")]) == 0
    assert_same_run(tmp_path / "a", whole)


PLACES = ["/proc/gametalearn/a", "/dev/null/a", "/dev/full"]


@pytest.mark.parametrize("place", PLACES)
def test_a_folder_that_cannot_be_made(capsys, place):
    assert "choose another --out" in refused(capsys, *TRAIN, place)
    compare = [word.replace("--rule", "--rules") for word in TRAIN]
    assert "choose another --out" in refused(capsys, "compare", *compare[1:], place)
    images = ClassImages.from_tensors(torch.zeros(6, 1, 4, 4), torch.arange(6) // 2)
    batch = EpisodeSampler(images, ways=2, shots=1, queries=1).sample(1)
    with pytest.raises(InputError, match="cannot be created"):
        contact_sheet(batch, Path(place) / "a.png", 2)


def test_a_read_only_folder(tmp_path, monkeypatch, capsys, whole):
    """As root may write anywhere, the system calls are made to refuse."""
    shutil.copytree(whole, tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}

    def refuse(*_args, **_more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    opened = Path.open
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(
        Path, "open", lambda p, mode="r", *a: opened(p, mode, *a) if mode[0] == "r" else refuse()
    )
    assert "Read-only file system" in refused(capsys, "evaluate", tmp_path / "a", "--episodes", 2)
    assert "Read-only file system" in refused(capsys, *TRAIN, tmp_path / "a", "--overwrite")
    assert main(["train", "--quiet", "--resume", str(tmp_path / "a")]) == 0  # nothing to write
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before


@contextlib.contextmanager
def mounted(folder, size):
    """A small file system of its own; only root may."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def may_mount():
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or not shutil.which("mount"):
        return False
    probe = "mount -t tmpfs -o size=64k tmpfs /mnt && umount /mnt"
    command = ["unshare", "--mount", "sh", "-c", probe]
    return shutil.which("unshare") and subprocess.run(command, capture_output=True).returncode == 0


MOUNTS = pytest.mark.skipif(not may_mount(), reason="this system mounts no disk for a test")


@MOUNTS
@pytest.mark.parametrize("room", [12, 30, 60, 90])
def test_a_small_disk(tmp_path, capsys, whole, room):
    with mounted(tmp_path / "disk", "1M") as disk:
        (disk / "filler").write_bytes(bytes(2**20 - 1024 * room))
        err = refused(capsys, *TRAIN, disk / "a")
        assert "No space left on device" in err
        if (disk / "a" / "checkpoint.pt").exists():
            assert load_checkpoint(disk / "a" / "checkpoint.pt")["iteration"] >= 4
            assert load_run(disk / "a", "latest").iteration >= 4
        assert not list((disk / "a").glob(".*"))
        (disk / "filler").unlink()
        assert main([*TRAIN, str(disk / "a")]) == 0
        assert_same_run(disk / "a", whole)


@MOUNTS
def test_a_disk_that_becomes_read_only(tmp_path, capsys, monkeypatch, whole):
    with mounted(tmp_path / "disk", "4M") as disk:
        steps = []

        def remounting(*args, **more):
            steps.append(1)
            if len(steps) == 10:
                remount(disk, "ro,size=4M")
            return meta_gradients(*args, **more)

        # a file open for writing keeps the system from it: as after an error of the disk
        monkeypatch.setattr(training, "meta_gradients", remounting)
        monkeypatch.setattr(training, "Metrics", reopened(metrics.Metrics))
        assert "Read-only file system" in refused(capsys, *TRAIN, disk / "a")
        monkeypatch.undo()
        assert load_checkpoint(disk / "a" / "checkpoint.pt")["iteration"] == 8
        before = {p.name: p.read_bytes() for p in (disk / "a").iterdir()}
        assert "Read-only file system" in refused(capsys, "train", "--resume", disk / "a")
        assert {p.name: p.read_bytes() for p in (disk / "a").iterdir()} == before
        remount(disk, "rw,size=4M")
        assert main(["train", "--quiet", "--resume", str(disk / "a")]) == 0
        assert_same_run(disk / "a", whole)


def remount(disk, options):
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def reopened(metrics):
    """Metrics that open their file for each line."""

    class Reopened(metrics):  # type: ignore[valid-type,misc]
        def write(self, record):
            with self._explained(), self._file.open("ab") as self._stream:
                super().write(record)

        def sync(self):
            return self._file.stat().st_size

        def __enter__(self):
            return self

    return Reopened


# ---------------------------------------------------------------------------------------------
# killed in the middle of writing

KILLED = """
import os, signal, sys, tempfile
import torch._dynamo  # what every run would import
from gametalearn import checkpoint, metrics, runfolder, training
from gametalearn.cli import main

def die_at(owner, name, number, after):
    call, calls = getattr(owner, name), []

    def dying(*args, **more):
        calls.append(1)
        if len(calls) < number:
            return call(*args, **more)
        if after:
            call(*args, **more)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dying)

places = [(tempfile, "mkstemp"), (os, "fsync"), (os, "replace"), (checkpoint._Noting, "write"),
          (metrics.Metrics, "write"), (runfolder, "save_checkpoint")]
for owner, name in places:
    for number in map(int, sys.argv[1].split(",")):
        for after in (False, True):
            if (child := os.fork()) == 0:
                die_at(owner, name, number, after)
                main(sys.argv[2:])
                os._exit(1)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code == -signal.SIGKILL, (name, number, after, code)
"""


@pytest.mark.parametrize(
    ("numbers", "iterations"), [("2", "120"), pytest.param("1,2,3", "400", marks=SLOW)]
)
def test_killed_at_each_step_of_a_save_it_ends_as_if_never_killed(tmp_path, numbers, iterations):
    words = [word.replace("60", iterations) for word in TRAIN]
    assert main([*words, str(tmp_path / "whole")]) == 0
    subprocess.run([sys.executable, "-c", KILLED, numbers, *words, tmp_path / "a"], check=True)
    assert main([*words, str(tmp_path / "a")]) == 0
    assert_same_run(tmp_path / "a", tmp_path / "whole")
    assert not list((tmp_path / "a").glob(".*"))


# ---------------------------------------------------------------------------------------------
# two at once


def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path):
    program = (
        "import sys, time, pathlib\n"
        "from gametalearn.files import held\n"
        "with held(pathlib.Path(sys.argv[1])):\n"
        "    print('there', flush=True); time.sleep(60)\n"
    )
    (tmp_path / ".checkpoint.pt.x.unfinished").write_bytes(b"half")
    command = [sys.executable, "-c", program, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        assert not list(tmp_path.iterdir())  # what a killed process left
        refused = pytest.raises(InputError, match="another process is using it")
        with refused, held(tmp_path, patience=0.2):
            pass
        process.kill()
        process.wait()
        with held(tmp_path, patience=5):
            pass


# ---------------------------------------------------------------------------------------------
# a service, and pythonw, have no stderr

SILENT = """
import sys
sys.stderr = None
from gametalearn.cli import main
for words in (sys.argv[1] + " --out a/b", "train --resume a/b", "evaluate a/b --episodes 2",
              sys.argv[1].replace("train", "compare") + " --seeds 1 --episodes 2 --out c",
              "episodes --dataset folder:none", "train --no-such-flag"):
    print(words.split()[0], main(words.split()))
from gametalearn import TrainConfig, train
train(TrainConfig.of("sinusoid", iterations=1, meta_batch=2, validation_episodes=2), progress=True)
print("done")
"""


def test_without_stderr(tmp_path):
    """Also the data sets that draw a bar while they are packed."""
    for split, name in (("train", "a"), ("train", "b"), ("val", "c"), ("val", "d"),
                        ("test", "e"), ("test", "f")):  # fmt: skip
        for i in range(2):
            file = tmp_path / "in" / split / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 40 * i + ord(name)).save(file)
    train = "train --dataset folder:in --model mlp --hidden 4 --image-size 4 --ways 2 --shots 1"
    train += " --queries 1 --meta-batch 2 --iterations 2 --validation-episodes 2"
    root = Path(training.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", SILENT, train], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(root), "GAMETALEARN_DATA": str(tmp_path / "data")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = [line for line in done.stdout.splitlines() if re.fullmatch(r"[a-z]+ \d", line)]
    assert codes == ["train 0", "train 0", "evaluate 0", "compare 0", "episodes 2", "train 2"]
    assert done.stdout.splitlines()[-1] == "done"
    assert done.stderr == ""
    assert "it/s" not in done.stdout  # progress does not go where results do


# ---------------------------------------------------------------------------------------------
# memory

LOAD = """
import gc, os, sys, psutil
from gametalearn import training
from gametalearn.cli import main
from gametalearn.episodes import EpisodeSampler
from gametalearn.errors import InputError
from gametalearn.gradients import meta_gradients
from gametalearn.images import ClassImages
from gametalearn.sheet import contact_sheet

early, late, me, gradients, steps, seen = *map(int, sys.argv[1:3]), psutil.Process(), \
    training.meta_gradients, [], []

def counting(*args, **more):
    steps.append(1)
    if len(steps) in (early, late):
        gc.collect()
        seen.append((me.memory_info().rss, me.num_fds(), me.num_threads()))
    return gradients(*args, **more)

training.meta_gradients = counting
assert main(sys.argv[3:]) == 0
print(*(value for one in seen for value in one))
"""


@pytest.mark.parametrize(
    ("early", "late", "dataset"),
    [
        (100, 400, "sinusoid --threads 1"),
        pytest.param(200, 2000, "sinusoid --threads 1", marks=SLOW),
        pytest.param(200, 2000, "glyphs --hidden 16 --threads 2", marks=SLOW),
    ],
)
def test_memory_files_and_threads_do_not_grow(tmp_path, early, late, dataset):
    flags = f"--dataset {dataset} --meta-batch 4 --rule agreement --quiet --log-every 5"
    flags += " --validate-every 50 --validation-episodes 8 --checkpoint-every 25"
    words = ["train", *flags.split(), "--iterations", str(late), "--out", str(tmp_path / "a")]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(early), str(late), *words],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    *before, files, threads = map(int, done.stdout.splitlines()[-1].split()[:3])
    *after, more_files, more_threads = map(int, done.stdout.splitlines()[-1].split()[3:])
    print(before, after, files, threads)
    assert after[0] <= 1.05 * before[0]
    assert (more_files, more_threads) == (files, threads)


# ---------------------------------------------------------------------------------------------
# comparisons that are killed

PROGRAM = "import sys; from gametalearn.cli import main; sys.exit(main())"


def results(folder):
    found = json.loads((folder / "results.json").read_text())
    for rule in found["rules"].values():
        for seed in rule["seeds"]:
            del seed["seconds"]
    del found["environment"]["command"]
    return found


def comparison(folder, jobs, seeds, iterations):
    words = "compare --dataset sinusoid --meta-batch 3 --hidden 8 --threads 1 --quiet --log-every 1"
    words += " --validate-every 20 --validation-episodes 5 --checkpoint-every 7 --episodes 9"
    words += f" --iterations {iterations} --rules uniform,agreement --seeds {seeds} --jobs {jobs}"
    return [*words.split(), "--out", str(folder)]


@contextlib.contextmanager
def running(words) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", PROGRAM, *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def changed(folder):
    """The newest write of a checkpoint or a result."""
    files = [p for p in folder.rglob("*") if p.suffix in (".pt", ".json")]
    with contextlib.suppress(FileNotFoundError):
        return max((p.stat().st_mtime_ns for p in files), default=0)
    return 0


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=SLOW)])
def test_a_comparison_of_several_processes_saves_all_runs_when_it_is_ended(tmp_path, number):
    words = comparison(tmp_path, 2, 1, 10**6)
    words[words.index("--checkpoint-every") + 1] = str(10**6)
    command = [sys.executable, "-c", PROGRAM, *words]
    runs = [tmp_path / rule / "seed0" for rule in ("uniform", "agreement")]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        until = time.monotonic() + 300
        while not all(metrics_of(run) for run in runs) and time.monotonic() < until:
            time.sleep(0.05)
        if number == signal.SIGINT:  # a terminal sends it to all
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err == "gametalearn: interrupted; what was done is saved\n"
    for run in runs:
        done = load_checkpoint(run / "checkpoint.pt")
        assert done["iteration"] == json.loads(metrics_of(run)[-1])["iteration"] > 0


def metrics_of(run):
    file = run / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize(
    ("kills", "jobs", "seeds", "iterations"),
    [
        (1, 1, 1, 60),
        pytest.param(20, 1, 2, 300, marks=SLOW),
        pytest.param(8, 2, 2, 200, marks=SLOW),
    ],
)
def test_a_comparison_that_is_killed_goes_on(tmp_path, kills, jobs, seeds, iterations):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(comparison(whole, 1, seeds, iterations)) == 0
    moments = torch.Generator().manual_seed(jobs)
    for kill in range(kills):
        with running(comparison(killed, jobs, seeds, iterations)) as process:
            before, waited = changed(killed), time.monotonic()
            for _ in range(1 + int(torch.randint(7, (), generator=moments))):  # some way each time
                while changed(killed) == before and process.poll() is None:
                    assert time.monotonic() - waited < 300
                    time.sleep(0.002)
                before = changed(killed)
            time.sleep(float(torch.rand((), generator=moments)) * 0.05)
            assert process.poll() is None, f"it ended after {kill} kills; make it longer"
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait()
            _, alive = psutil.wait_procs(children, timeout=20)
            assert not alive  # the processes of --jobs end with their parent
    with running(comparison(killed, jobs, seeds, iterations)) as process:
        assert process.wait() == 0
    assert results(killed) == results(whole)
    for rule in ("uniform", "agreement"):
        for seed in range(seeds):
            assert_same_run(killed / rule / f"seed{seed}", whole / rule / f"seed{seed}")
    assert not list(tmp_path.rglob(".*"))
