import collections
import datetime
import itertools
import os
import pickle
import pickletools
import struct
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gametalearn.data.pickles import load_arrays
from gametalearn.errors import InputError

ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def loaded(folder: Path, data: bytes) -> Any:
    (folder / "x.pkl").write_bytes(data)
    return load_arrays(folder / "x.pkl")


def same(found: Any, expected: Any) -> None:
    assert isinstance(found, np.ndarray)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        ARRAY,
        np.asfortranarray(ARRAY),
        ARRAY[:, ::2],
        ARRAY.astype(">i4"),
        np.linspace(0, 1, 5, dtype=np.float32),
        np.array([True, False]),
        np.array(["n01", "n0234"]),
        np.array([b"n01", b"n0234"]),
        np.empty((0, 84, 84, 3), np.uint8),
        np.array(7),
    ],
)
def test_arrays_come_back(tmp_path: Path, array: np.ndarray[Any, Any], protocol: int) -> None:
    found = loaded(tmp_path, pickle.dumps({"data": array, "n": [1]}, protocol))
    same(found["data"], array)
    assert found["n"] == [1]
    same(loaded(tmp_path, pickle.dumps(array, protocol)), array)
    nested = loaded(tmp_path, pickle.dumps({"class_dict": {"a": array}}, protocol))
    same(nested["class_dict"]["a"], array)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_containers_come_back(tmp_path: Path, protocol: int) -> None:
    plain = {
        "a": [1, 2.5, None, True, "text", (1, 2)],
        "b": {"c": [2**70]},
        "o": collections.OrderedDict(x=1),
    }
    assert loaded(tmp_path, pickle.dumps(plain, protocol)) == plain
    numbers = {"a": [np.uint8(3), np.int64(-4), np.float32(0.5)], "b": b"bytes"}
    assert loaded(tmp_path, pickle.dumps(numbers, protocol)) == {"a": [3, -4, 0.5], "b": b"bytes"}


def python2(protocol: int) -> tuple[bytes, bytes]:
    """{'image_data': array, 'class_dict': {'n01': [0, 1]}} as cPickle of Python 2 writes it."""

    def text(value: bytes) -> bytes:
        if protocol == 0:
            return b"S" + repr(value)[1:].encode("ascii") + b"\n"
        return b"T" + struct.pack("<i", len(value)) + value

    pixels = b"\xff\x80\n'\\\x00\"abcde"
    data = b"".join(
        [
            b"\x80\x02" if protocol == 2 else b"",
            b"(" + text(b"image_data"),
            b"cnumpy.core.multiarray\n_reconstruct\n",
            b"(cnumpy\nndarray\n(I0\nt" + text(b"b") + b"tR",
            b"(I1\n(I2\nI2\nI1\nI3\nt",
            b"cnumpy\ndtype\n(" + text(b"u1") + b"I0\nI1\ntR",
            b"(I3\n" + text(b"|") + b"NNNI-1\nI-1\nI0\ntb",
            (b"I00\n" if protocol < 2 else b"\x89") + text(pixels) + b"tb",
            text(b"class_dict") + b"(" + text(b"n01") + b"(lI0\naI1\nad",
            b"d.",
        ]
    )
    return data, pixels


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_pickles_of_python_2(tmp_path: Path, protocol: int) -> None:
    data, pixels = python2(protocol)
    found = loaded(tmp_path, data)
    same(found["image_data"], np.frombuffer(pixels, np.uint8).reshape(2, 2, 1, 3))
    assert found["class_dict"] == {"n01": [0, 1]}


class Evil:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def evil_pickles(marker: Path) -> dict[str, Any]:
    run = f"open({str(marker)!r}, 'w')"
    return {
        "os.system": Evil(os.system, (f"touch {marker}",)),
        "subprocess": Evil(subprocess.call, (["touch", str(marker)],)),
        "eval": Evil(eval, (run,)),
        "exec": Evil(exec, (run,)),
        "open": Evil(open, (str(marker), "w")),
        "getattr": Evil(getattr, ("text", "join")),
        "np.load": Evil(np.load, (str(marker),)),
        "np.save": Evil(np.save, (str(marker), 1)),
        "np.memmap": Evil(np.memmap, (str(marker), "u1", "w+", 0, (4,))),
        "torch": Evil(__import__, ("torch",)),
        "bytearray": bytearray(3),
        "set": Evil(set, ([1],)),
        "print": Evil(print, ("x",)),
        "complex": complex(1, 2),
        "date": datetime.date(2000, 1, 1),
        "path": Path("x"),
        "objects": np.array([{}, []], dtype=object),
        "records": np.zeros(2, dtype=[("a", "u1"), ("b", "O")]),
        "masked": np.ma.masked_array([1, 2], [True, False]),
        "times": np.array(["2000"], dtype="datetime64[D]"),
        "default": collections.defaultdict(list, a=[1]),
        "class": Evil,
    }


@pytest.mark.parametrize("kind", list(evil_pickles(Path("x"))))
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_anything_else_is_refused_before_it_runs(tmp_path: Path, kind: str, protocol: int) -> None:
    marker = tmp_path / "marker"
    if kind == "class":
        data = b"cos\nsystem\n."
    else:
        data = pickle.dumps({"data": ARRAY, "x": evil_pickles(marker)[kind]}, protocol)
    with pytest.raises(InputError, match=r"x\.pkl: not a readable pickle") as error:
        loaded(tmp_path, data)
    assert not marker.exists()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "call",
    [
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I0\ntS'b'\ntR.",
        b"cnumpy\nndarray\n((I1000000000000\ntS'u1'\ntR.",
        b"cnumpy\ndtype\n(S'O'\ntR.",
        b"cnumpy\ndtype\n(S'V8'\ntR.",
        b"cnumpy\ndtype\n(S'u1,O'\ntR.",
        b"cnumpy\ndtype\n(cnumpy\nndarray\ntR.",
        b"cnumpy\ndtype\n(S'u1'\ntR(I3\nS'|'\nNS'a'\n(dI8\nI1\nI0\ntb.",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O'\ntRS'12345678'\ntR.",
        b"ccollections\nOrderedDict\n(cos\nsystem\ntR.",
        b"c_codecs\nencode\n(Vabc\nS'rot13'\ntR.",
        b"cnumpy\nndarray\n(S'__setstate__'\ntb.",
        b"Ppersistent\n.",
        b"\x82\x01.",
    ],
)
def test_crafted_calls_are_refused(tmp_path: Path, call: bytes) -> None:
    with pytest.raises(InputError, match="not a readable pickle"):
        loaded(tmp_path, call)


def test_a_shape_that_does_not_fit_the_bytes(tmp_path: Path) -> None:
    data = pickle.dumps(np.zeros(1000, np.uint8), 2).replace(b"M\xe8\x03\x85", b"M\xe9\x03\x85")
    with pytest.raises(InputError, match="cannot reshape"):
        loaded(tmp_path, data)


def test_a_memo_index_takes_no_memory(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        for opcode in (b"r\xff\xff\xff\x7f", b"p2147483647\n"):
            assert loaded(tmp_path, b"]" + opcode + b".") == []
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_a_length_cannot_take_all_memory(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        for opcode, length in itertools.product(
            (b"\x8e", b"\x8d", b"\x96", b"\x95"), (2**31, 2**40)
        ):
            with pytest.raises(InputError, match="not a readable pickle"):
                loaded(tmp_path, b"\x80\x05" + opcode + struct.pack("<Q", length) + b"abc.")
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("data", [b"", b".", b"\x80\x04", b"hello world", b"(" * 10000 + b"."])
def test_what_is_no_pickle(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InputError, match="not a readable pickle"):
        loaded(tmp_path, data)
    with pytest.raises(InputError, match="not a readable pickle"):
        load_arrays(tmp_path / "absent.pkl")


def test_optimized_pickles(tmp_path: Path) -> None:
    data = pickletools.optimize(pickle.dumps({"a": ARRAY, "b": ARRAY}, 2))
    same(loaded(tmp_path, data)["b"], ARRAY)
