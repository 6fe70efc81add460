"""Settings, checkpoints and run folders that are damaged, odd or hostile, through the command line.

Each gives a correct result (exit code 0) or one line on stderr (exit code 2): no traceback, no hang,
nothing written outside the output folder. Derandomised, so every run tries the same inputs; the
files that data sets come from have tests of their own in tests/data/test_fuzz.py.
"""

import contextlib
import dataclasses
import datetime
import io
import os
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from gametalearn.checkpoint import load_checkpoint, save_checkpoint
from gametalearn.cli import main
from gametalearn.config import TrainConfig
from gametalearn.settings import settings_of
from gametalearn.weighting import RULES

TINY = "--dataset sinusoid --iterations 2 --meta-batch 2 --hidden 4 --validation-episodes 2 --quiet"
TINY += " --log-every 1 --checkpoint-every 1 --rule agreement --threads 1"
DEADLINE = datetime.timedelta(seconds=120)  # a hang, on a machine however busy


def some(max_examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=max_examples,
        derandomize=True,
        deadline=DEADLINE,
        database=None,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    )


COUNTS = [40, pytest.param(500, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, a tested one and a comparison."""
    root = tmp_path_factory.mktemp("base")
    for words in (
        f"train {TINY} --out {root}/run",
        f"evaluate {root}/run --episodes 2 --quiet",
        f"compare {TINY.replace('--rule agreement', '--rules uniform,agreement')} --seeds 1 "
        f"--episodes 2 --out {root}/cmp",
    ):
        assert main(words.split()) == 0
    return root


@contextlib.contextmanager
def sandbox() -> Iterator[Path]:
    """A folder, the current one, in which only ``out`` may come to be or change."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        (folder / "out").mkdir()
        yield folder
        assert sorted(os.listdir(folder)) in (["out"], ["config.toml", "out"])


def called(*words: object) -> int:
    """The exit code of a command that says at most one line."""
    err = io.StringIO()
    threads = torch.get_num_threads()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(word) for word in words])
    torch.set_num_threads(threads)
    lines = err.getvalue().splitlines()
    assert code in (0, 2)
    if code == 2:
        assert len(lines) == 1, lines
        assert lines[0].startswith("gametalearn")
        assert len(lines[0]) < 1000
        assert "Traceback" not in lines[0]
    else:
        assert not lines
    return code


# ---------------------------------------------------------------------------------------------
# damage

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "delete", "insert", "repeat", "cut", "number"]),
        st.randoms(use_true_random=False).map(lambda random: random.randrange(2**32)),
        st.integers(0, 2**32 - 1),
    ),
    min_size=1,
    max_size=3,
)


def mutated(data: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    for kind, where, value in edits:
        at, length = where % max(len(data), 1), 1 + value % 16
        match kind:
            case "flip":
                middle = bytes([data[at] ^ 1 << value % 8]) if data else b""
                data = data[:at] + middle + data[at + 1 :]
            case "set":
                data = data[:at] + bytes([value % 256]) + data[at + 1 :]
            case "cut":
                data = data[:at]
            case "delete":
                data = data[:at] + data[at + length :]
            case "insert":
                data = data[:at] + value.to_bytes(4, "little") * (length // 4 + 1) + data[at:]
            case "repeat":
                data = data[:at] + data[at : at + length] * (1 + value % 50) + data[at + length :]
            case "number":
                data = data[:at] + str(value - 2**31).encode() + data[at + 1 :]
    return data


CHEAP = {"dataset": "sinusoid", "iterations": 2, "meta_batch": 2, "hidden": 4, "threads": 1}
CHEAP |= {"validation_episodes": 2, "shots": 2, "queries": 2}
COSTLY = ("inner_steps", "test_steps", "train_shots", "episodes", "ways", *list(CHEAP)[1:])


def settings_in(text: bytes) -> dict[str, Any]:
    with contextlib.suppress(tomllib.TOMLDecodeError, UnicodeDecodeError):
        return {k.replace("-", "_"): v for k, v in tomllib.loads(text.decode()).items()}
    return {}


def affordable(values: dict[str, Any]) -> bool:
    """Whether settings ask for little work: long runs are no hangs."""
    numbers = [values[n] for n in COSTLY if isinstance(values.get(n), (int, float))]
    return all(number <= 64 or number > 10**9 for number in numbers) and (
        str(values.get("dataset", "sinusoid")).startswith(("sinusoid", "folder:"))
    )


# ---------------------------------------------------------------------------------------------
# settings

NASTY = [
    *(0, 1, -1, 2, 3, 64, 10**9 + 1, 2**63, -(2**80), 10**400, True, False),
    *(0.0, 0.5, -0.5, 1e-320, 1e30, 1e308, -1e308, float("inf"), float("-inf"), float("nan")),
    *("", " ", "x", "sinusoid", "uniform", "agreement", "torchjd:", "torchjd:Mean", "torchjd:../x"),
    *("glyphs+", "+", "folder:", "folder:.", "folder:/nonexistent", "../out", "\0", "\n", "é" * 300),
    *("cpu", "cuda", "cuda:99", "meta", "gpu", "cpu:0", "mps", "adam", "%s{}", "\x1b[31m", "nan"),
    *("--out=x", "-1", "1e9", "0x10", "١", "maml", "reptile", "metasgd", "gradnorm", "dtp", "mlp"),
    *([], [1], ["uniform", "agreement"], [[]], {}, {"a": 1}, datetime.date(2020, 1, 1)),
]  # fmt: skip
FIELDS = {f.name: str(f.type) for f in dataclasses.fields(TrainConfig) if f.name != "dataset"}
CHOICES = {name: field.metadata["choices"] for name, field in settings_of(TrainConfig).items()}
OTHERS = ["rules", "seeds", "quiet", "debug", "overwrite", "config", "resume", "jobs", "folder"]
OF_TYPE: dict[str, st.SearchStrategy[Any]] = {
    "int": st.sampled_from([0, 1, 1, 2, 2, 3, 3, 4, 4, 7, -1, 10**9 + 1, 2**63]),
    "float": st.floats() | st.sampled_from([0, 0.25, 1, 10, 1e3, 1e30]),
    "bool": st.booleans(),
    "str": st.sampled_from(NASTY),
}


def value_of(name: str) -> st.SearchStrategy[Any]:
    """Mostly values that the option could have; odd ones too."""
    likely = OF_TYPE.get(FIELDS.get(name, ""), st.sampled_from(NASTY))
    if choices := CHOICES.get(name):
        likely = st.sampled_from(choices)
    elif name in ("rule", "rules"):
        likely = st.sampled_from([*RULES, "torchjd:MGDA", "torchjd:Mean", "agreement,dwa"])
    odd = st.sampled_from(NASTY) | st.text(max_size=8)
    return st.integers(0, 9).flatmap(lambda dice: likely if dice else odd)


PAIRS = st.sampled_from([*list(FIELDS) * 4, *OTHERS, "", "x", "\0", "shots ", "WAYS"]).flatmap(
    lambda name: st.tuples(st.just(name), value_of(name))
)
SETTINGS = st.lists(PAIRS, min_size=1, max_size=3)
GOOD = {**CHEAP, "quiet": True, "learner": "maml", "inner-lr": 0.01}


def try_settings(command: str, pictures: str, pairs: list[tuple[str, Any]], edits: Any) -> None:
    values = {**GOOD, **({"dataset": pictures, **OF_PICTURES} if pictures else {}), **dict(pairs)}
    text = tomli_w.dumps({k: v for k, v in values.items() if "out" not in k}).encode()
    text = mutated(text, edits) if edits else text
    assume(affordable(settings_in(text)))
    with sandbox() as folder:
        (folder / "config.toml").write_bytes(text)
        missing = {k: v for k, v in CHEAP.items() if k not in settings_in(text)}
        more = ["--seeds", "1", "--episodes", "2", "--jobs", "1"] if command == "compare" else []
        more += [f"--{k.replace('_', '-')}={v}" for k, v in missing.items()]
        called(command, "--config", "config.toml", "--out", "out/a", *more, "--quiet")


OF_PICTURES = {"ways": 2, "shots": 1, "queries": 1, "model": "conv4", "image_size": 16}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("pictures")
    for first, split in enumerate(("train", "val", "test")):
        for number in range(3):
            (root / split / f"{split}{number}").mkdir(parents=True)
            for i in range(4):
                picture = Image.new("L", (16, 16), 15 * i + 60 * number + 5 * first)
                picture.save(root / split / f"{split}{number}" / f"{i}.png")
    return f"folder:{root}"


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.filterwarnings("ignore")  # what torch says of odd numbers
def test_odd_settings(pictures: str, count: int) -> None:
    where = st.sampled_from(["", "", pictures])
    command = st.sampled_from(["train", "train", "compare"])
    some(count)(given(command, where, SETTINGS, st.none())(try_settings))()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_settings(count: int) -> None:
    some(count)(given(st.just("train"), st.just(""), st.just([]), EDITS)(try_settings))()


# ---------------------------------------------------------------------------------------------
# run folders

FILES = ("config.toml", "checkpoint.pt", "best.pt", "metrics.jsonl", "evaluation.json")
COMMANDS = {
    "resume": ["train", "--resume", "out/run", "--quiet"],
    "train": ["train", *TINY.split(), "--out", "out/run"],
    "overwrite": ["train", *TINY.split(), "--overwrite", "--out", "out/run"],
    "evaluate": ["evaluate", "out/run", "--episodes", "2", "--quiet"],
    "latest": ["evaluate", "out/run", "--episodes", "2", "--checkpoint", "latest", "--quiet"],
    "compare": [
        *("compare", *TINY.replace("--rule agreement", "--rules uniform,agreement").split()),
        *("--seeds", "1", "--episodes", "2", "--out", "out/cmp"),
    ],
}
HOW = ("edit", "edit", "edit", "empty", "remove", "folder", "link", "swap", "content", "content")
JUNK: st.SearchStrategy[Any] = st.sampled_from(
    [None, 0, -1, 10**30, float("nan"), "", "x", [], {}, torch.zeros(3), True]
)


def damage(folder: Path, name: str, how: str, edits: Any, junk: Any) -> None:
    file = folder / name
    match how:
        case "edit":
            file.write_bytes(mutated(file.read_bytes(), edits))
        case "empty":
            file.write_bytes(b"")
        case "swap":
            file.write_bytes((folder / FILES[edits[0][1] % len(FILES)]).read_bytes())
        case "content" if name.endswith(".pt"):
            content = load_checkpoint(file)
            spoil(content, edits[0][1], junk)
            save_checkpoint(file, content)
        case "content" if name == "config.toml":
            values = tomllib.loads(file.read_text())
            spoil(values, edits[0][1], str(junk) if isinstance(junk, torch.Tensor | None) else junk)
            file.write_text(tomli_w.dumps(values))
        case _:
            file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "link":
        file.symlink_to(name)


def spoil(content: dict[Any, Any], where: int, junk: Any) -> None:
    """Replace or remove an entry, at any depth."""
    key = list(content)[where % len(content)]
    if isinstance(content[key], dict) and content[key] and where % 5:
        spoil(content[key], where // len(content), junk)
    elif where % 3:
        content[key] = junk
    else:
        del content[key]


def try_folder(base: Path, name: str, command: str, how: str, edits: Any, junk: Any) -> None:
    with sandbox() as folder:
        for part in ("run", "cmp"):
            shutil.copytree(base / part, folder / "out" / part)
        run = folder / "out" / ("cmp/agreement/seed0" if command == "compare" else "run")
        damage(run, name, how, edits, junk)
        if (run / "config.toml").is_file():
            assume(affordable(settings_in((run / "config.toml").read_bytes())))
        code = called(*COMMANDS[command])
        if command == "overwrite" and how not in ("folder",):
            assert code == 0


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_run_folders(base: Path, count: int) -> None:
    what = (st.sampled_from(FILES), st.sampled_from(list(COMMANDS)), st.sampled_from(HOW))
    some(count)(given(st.just(base), *what, EDITS, JUNK)(try_folder))()
