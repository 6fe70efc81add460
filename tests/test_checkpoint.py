import os
import subprocess
import sys

import pytest
import torch

from gametalearn.checkpoint import load_checkpoint, save_checkpoint
from gametalearn.errors import InputError
from gametalearn.files import replacing


@pytest.fixture
def file(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"model": {"w": torch.arange(1000.0)}, "iteration": 3})
    return tmp_path / "a.pt"


def test_round_trip(file):
    content = load_checkpoint(file)
    assert content["iteration"] == 3
    assert torch.equal(content["model"]["w"], torch.arange(1000.0))
    assert [p.name for p in file.parent.iterdir()] == ["a.pt"]


def test_any_flipped_bit_of_the_weights_is_found(file):
    raw = bytearray(file.read_bytes())
    start = raw.find(torch.arange(1000.0).numpy().tobytes()[4:400])
    assert start > 0
    for offset in (0, 1000, 3000):
        flipped = bytearray(raw)
        flipped[start + offset] ^= 1
        file.write_bytes(flipped)
        with pytest.raises(InputError, match=r"a\.pt: damaged"):
            load_checkpoint(file)


@pytest.mark.parametrize("length", [0, 1, 100, 2000])
def test_a_truncated_file_is_named(file, length):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(InputError, match=r"a\.pt: damaged"):
        load_checkpoint(file)


def test_a_missing_file_and_another_version_are_named(tmp_path):
    with pytest.raises(InputError, match=r"b\.pt: cannot be read"):
        load_checkpoint(tmp_path / "b.pt")
    torch.save({"format": "gametalearn.checkpoint/99"}, tmp_path / "c.pt")
    with pytest.raises(InputError, match="checkpoint/99"):
        load_checkpoint(tmp_path / "c.pt")


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    program = (
        "import os, torch, sys\n"
        "class Evil:\n"
        "    def __reduce__(self): return (os.mkdir, (sys.argv[2],))\n"
        "torch.save({'format': 'gametalearn.checkpoint/1', 'x': Evil()}, sys.argv[1])\n"
    )
    target = tmp_path / "ran"
    subprocess.run([sys.executable, "-c", program, tmp_path / "e.pt", target], check=True)
    with pytest.raises(InputError, match="damaged or not a checkpoint"):
        load_checkpoint(tmp_path / "e.pt")
    assert not target.exists()


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(file):
    before = file.read_bytes()

    def fail(error):
        with replacing(file) as stream:
            stream.write(b"half")
            raise error

    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == ["a.pt"]
    with pytest.raises(InputError, match="cannot be written"):
        fail(OSError(28, os.strerror(28)))
    assert file.read_bytes() == before
