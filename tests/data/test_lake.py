from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gametalearn.cli import main
from gametalearn.data.archives import ZipFiles
from gametalearn.data.decode import decode, resized
from gametalearn.data.lake import FixedTasks, load_lake
from gametalearn.data.omniglot import load_omniglot
from gametalearn.episodes import Source
from gametalearn.errors import InputError

Files = dict[str, bytes]


def drawing(run: int, number: int, item: bool) -> bytes:
    """An image whose ink tells the run (column), the character (row) and the kind (width)."""
    image = Image.new("1", (105, 105), 1)
    image.paste(0, (5 * run, 5 * number, 5 * run + (9 if item else 4), 5 * number + 4))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def answer(run: int, item: int) -> int:
    """The number of an item's class, a permutation in each run."""
    return (7 * item + run) % 20


def synthetic(prefix: str = "") -> Files:
    files = {}
    for run in range(20):
        name = f"run{run + 1:02}"
        lines = []
        for i in range(20):
            files[f"{prefix}{name}/training/class{i + 1:02}.png"] = drawing(run, i, False)
            files[f"{prefix}{name}/test/item{i + 1:02}.png"] = drawing(run, answer(run, i), True)
            lines.append(
                f"{name}/test/item{i + 1:02}.png {name}/training/class{answer(run, i) + 1:02}.png\n"
            )
        files[f"{prefix}{name}/class_labels.txt"] = "".join(lines).encode()
    return files


def as_folder(folder: Path, files: Files) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def as_zip(path: Path, files: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("__MACOSX/run01/test/._item01.png", b"x")
    return path


@pytest.fixture(scope="module")
def files() -> Files:
    return synthetic()


def test_every_layout_gives_the_same_tasks(files: Files, tmp_path: Path) -> None:
    nested = {f"all_runs/{name}": data for name, data in files.items()}
    sources = [
        as_folder(tmp_path / "plain", files),
        as_folder(tmp_path / "nested", nested),
        as_zip(tmp_path / "zip" / "all_runs.zip", files),
        as_zip(tmp_path / "nested.zip", nested),
        tmp_path / "zip",  # the folder that holds the archive
    ]
    first = load_lake(sources[0])
    assert first.support_x.shape == first.query_x.shape == (20, 20, 1, 28, 28)
    for source in sources[1:]:
        batch = load_lake(source)
        pairs = zip(first._tensors(), batch._tensors(), strict=True)
        assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_labels_and_images_are_in_their_places(files: Files, tmp_path: Path) -> None:
    batch = load_lake(as_zip(tmp_path / "runs.zip", files))
    for run in range(20):
        assert batch.query_y[run].tolist() == [answer(run, i) for i in range(20)]
        for images, item in ((batch.support_x[run], False), (batch.query_x[run], True)):
            for i in (0, 7, 19):
                number = answer(run, i) if item else i
                wanted = resized(decode(drawing(run, number, item), "x"), 28, 1)
                np.testing.assert_array_equal((images[i] * 255).round().numpy(), 255 - wanted)
    assert batch.support_y[3].tolist() == list(range(20))
    assert batch.group.tolist() == list(range(20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run07/class_labels.txt": None}, "run07/class_labels.txt"),
        ({"run07/training/class03.png": None}, "run07/training/class03.png"),
        ({"run07/test/item20.png": b"no image"}, r"run07/test/item20.png.* not a readable image"),
        ({"run07/class_labels.txt": b"run07/test/item01.png\n"}, "line 1: expected 'run07/test/item"),
        ({"run07/class_labels.txt": b"../../etc/passwd x\n"}, "line 1: expected"),
        ({"run07/class_labels.txt": b"run07/test/item01.png run07/training/class21.png\n"},
         "'class21', but a class is class01 to class20"),
        ({"run07/class_labels.txt": b"run07/test/item21.png run07/training/class02.png\n"},
         "'item21', but an item is item01 to item20"),
        ({"run07/class_labels.txt": b"run07/test/item02.png run07/training/class02.png\n"},
         "no line for item01, item03, item04; each item needs its class"),
        ({"run07/class_labels.txt": 2 * b"run07/test/item01.png run07/training/class01.png\n"},
         "line 2: .* each item once"),
        ({"run21/test/item01.png": drawing(0, 0, True)}, r"21 runs found, not the 20 .*\(run21\)"),
        ({"again/run01/test/item01.png": drawing(0, 0, True)}, "run01 appears twice"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_layout_is_said(
    files: Files, tmp_path: Path, change: dict[str, bytes | None], message: str
) -> None:
    changed = {n: d for n, d in {**files, **change}.items() if d is not None}
    with pytest.raises(InputError, match=message):
        load_lake(as_zip(tmp_path / "runs.zip", changed))


def test_labels_of_other_editors_are_read(files: Files, tmp_path: Path) -> None:
    name = "run01/class_labels.txt"
    written = b"\xef\xbb\xbf" + files[name].replace(b"\n", b"\r\n") + b"\r\n"
    batch = load_lake(as_zip(tmp_path / "runs.zip", {**files, name: written}))
    assert batch.query_y[0].tolist() == [answer(0, i) for i in range(20)]


def test_missing_runs_and_sources_are_said(files: Files, tmp_path: Path) -> None:
    some = {n: d for n, d in files.items() if n < "run03"}
    with pytest.raises(
        InputError, match=r"2 runs found, not the 20 .*\(run03, run04, run05, ...\)"
    ):
        load_lake(as_folder(tmp_path / "some", some))
    with pytest.raises(InputError, match="0 runs found"):
        load_lake(as_folder(tmp_path / "none", {"a/b.png": b""}))
    with pytest.raises(InputError, match="no such file or folder; expected the published"):
        load_lake(tmp_path / "nowhere")
    (tmp_path / "text.zip").write_text("text")
    with pytest.raises(InputError, match="not a readable zip archive"):
        load_lake(tmp_path / "text.zip")


def test_fixed_tasks_come_in_order_and_again(files: Files, tmp_path: Path) -> None:
    batch = load_lake(as_zip(tmp_path / "runs.zip", files))
    source = FixedTasks(batch)
    assert isinstance(source, Source)
    assert source.sample(16).group.tolist() == list(range(16))
    state = source.state_dict()
    assert source.sample(6).group.tolist() == [16, 17, 18, 19, 0, 1]
    source.load_state_dict(state)
    assert source.sample(6, slice(2, 4)).group.tolist() == [18, 19]
    assert source.with_seed(3).sample(2).group.tolist() == [0, 1]


@pytest.fixture(scope="module")
def real_runs(
    real_data: Path, omniglot_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Runs made of real drawings: class i of run r is character 33 r + i of the evaluation part."""
    packed = load_omniglot("test", omniglot_root)
    files: Files = {}
    with ZipFiles(real_data / "omniglot" / "images_evaluation.zip") as archive:
        members: dict[str, list[str]] = {}
        for member in archive.names():
            members.setdefault("/".join(member.split("/")[-3:-1]), []).append(member)
        for run in range(20):
            name = f"run{run + 1:02}"
            lines = ""
            for i in range(20):
                drawings = members[packed.classes[(33 * run + i) % packed.num_classes]]
                files[f"{name}/training/class{i + 1:02}.png"] = archive.read(drawings[0])
                files[f"{name}/test/item{i + 1:02}.png"] = archive.read(drawings[1])
                lines += f"{name}/test/item{i + 1:02}.png {name}/training/class{i + 1:02}.png\n"
            files[f"{name}/class_labels.txt"] = lines.encode()
    return as_zip(tmp_path_factory.mktemp("runs") / "all_runs.zip", files)


def test_real_drawings_are_prepared_as_omniglot_is(omniglot_root: Path, real_runs: Path) -> None:
    packed, batch = load_omniglot("test", omniglot_root), load_lake(real_runs)
    for run in range(20):
        for i in range(0, 20, 6):
            first = packed.first[(33 * run + i) % packed.num_classes]
            assert torch.equal(batch.support_x[run, i], packed.take(first))
            assert torch.equal(batch.query_x[run, i], packed.take(first + 1))


def test_a_run_is_tested_on_them(
    omniglot_root: Path,
    real_runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GAMETALEARN_DATA", str(omniglot_root))
    flags = "--dataset omniglot --ways 20 --queries 1 --iterations 6 --meta-batch 2 --hidden 8"
    flags += " --validation-episodes 2 --validate-every 6 --no-rotations --quiet --threads 1"
    place = str(tmp_path / "a")
    assert main(["train", *flags.split(), "--out", place]) == 0
    capsys.readouterr()
    assert main(["evaluate", place, "--protocol", "lake", "--source", str(real_runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["transductive)" in lines[0], "inductive)" in lines[1], len(lines)] == [True, True, 2]
    stored = json.loads((tmp_path / "a" / "lake.json").read_text())
    assert list(stored["protocols"]) == ["transductive", "inductive"]
    for record in stored["protocols"].values():
        assert len(record["runs"]) == 20
        assert 0 < record["error_rate"] < 0.95  # chance is 0.95
        assert all(round(20 * r, 6) == round(20 * r) for r in record["runs"])
    # a copy of the run says the same where no data are
    alone = tmp_path / "alone"
    shutil.copytree(place, alone)
    (alone / "lake.json").unlink()
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.setenv("GAMETALEARN_DATA", str(tmp_path / "empty"))
        words = ["evaluate", str(alone), "--protocol", "lake", "--source", str(real_runs)]
        assert main(words) == 0
        assert json.loads((alone / "lake.json").read_text()) == stored
        assert main([*words, "--dataset", "glyphs"]) == 2
    assert "leave out --dataset glyphs" in capsys.readouterr().err
    assert not (tmp_path / "empty").exists()
    # several runs make one table, whatever their own seeds: the tasks are the same
    file = alone / "config.toml"
    file.write_text(file.read_text().replace("seed = 0", "seed = 1"))
    words = ["evaluate", place, str(alone), "--protocol", "lake", "--source", str(real_runs)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "Lake's one-shot task, 20 runs, the same for every model" in said
    assert said.count("+0.00 [+0.00, +0.00]") == 2
    assert main(["train", *flags.split(), "--split", "maml", "--out", place + "maml"]) == 0
    assert main(["evaluate", place + "maml", "--protocol", "lake", "--source", str(real_runs)]) == 2
    assert "has seen alphabets of the task" in capsys.readouterr().err
