"""A restricted unpickler: numpy arrays and plain containers, nothing else.

No class of the file's choosing is ever looked up, and not even numpy's own unpickling runs: the few
names that a pickled array refers to are answered with stand-ins from this module, which build the
array from its bytes by `numpy.frombuffer`.
"""

from __future__ import annotations

import mmap
import pickle
import re
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gametalearn.errors import InputError, summary

__all__ = ["load_arrays"]

_PLAIN_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|[SU]\d{1,4})")


def load_arrays(path: Path) -> Any:
    """Read a pickle of numpy arrays, numbers, strings and plain containers.

    Byte strings of Python 2 stay `bytes`, and byte arrays become it. Arrays are read-only; those of objects are refused.

    Raises:
        InputError: the pickle asks for anything else, or is damaged; nothing of it has been run.
    """
    try:
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _unwrap(_Unpickler(data, encoding="bytes").load())
    except Exception as error:  # a damaged pickle raises anything, MemoryError included
        raise InputError(
            f"{path}: not a readable pickle of arrays and plain containers: {summary(error)}"
        ) from error


class _DType:
    """Stands in for `numpy.dtype`: a plain number or string type."""

    def __init__(self, spec: str | bytes, *_: object) -> None:
        text = _text(spec)
        if not isinstance(text, str) or not _PLAIN_DTYPE.fullmatch(text):
            raise pickle.UnpicklingError(f"an array of type {text!r}")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order, subarray, names, fields = (_text(s) for s in state[1:5])
        if order not in ("<", ">", "|", "=") or (subarray, names, fields) != (None, None, None):
            raise pickle.UnpicklingError("a structured array")
        if order != "|":
            self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands in for `numpy.ndarray`; its state is set by `__setstate__` as numpy's is."""

    array: np.ndarray[Any, Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.array = _frombuffer(data, dtype, shape, "F" if fortran else "C").array


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    if isinstance(data, str):
        data = data.encode("latin1")
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _DType):
        raise pickle.UnpicklingError("an array of objects")
    result = _Array()
    array = np.frombuffer(data, dtype.dtype)
    array.flags.writeable = False
    result.array = array.reshape(shape, order="F" if _text(order) == "F" else "C")
    return result


def _reconstruct(kind: Any, *_: object) -> _Array:
    if kind is not _Array:
        raise pickle.UnpicklingError("a subclass of array")
    return _Array()


def _scalar(dtype: Any, data: Any) -> Any:
    return _frombuffer(data, dtype, (), "C").array.item()


def _encode(text: Any, encoding: Any) -> bytes:
    # how Python 3 writes bytes in protocols 0 to 2
    if not isinstance(text, str) or _text(encoding) != "latin1":
        raise pickle.UnpicklingError("text in an unknown encoding")
    return text.encode("latin1")


def _empty() -> bytes:
    return b""


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _empty,  # how Python 3 writes b"" in protocols 0 to 2
    ("collections", "OrderedDict"): dict,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
}


class _Unpickler(pickle._Unpickler):
    # The one in Python, not the one in C, which allocates whatever memo index a file asks for. Read
    # from a memory map, a length beyond the end of the file allocates nothing either.
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}; refused") from None

    def load_bytearray8(self) -> None:
        # The standard one allocates whatever length the file states before it reads a byte.
        (length,) = struct.unpack("<Q", self.read(8))  # type: ignore[attr-defined]
        self.append(self.read(length))  # type: ignore[attr-defined]

    dispatch: ClassVar[Any] = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _unwrap(value: Any) -> Any:
    """Arrays in place of stand-ins, in the two levels of containers where they are looked for."""
    if isinstance(value, dict):
        return {_text(k): _unwrap_leaf(v) for k, v in value.items()}
    return _unwrap_leaf(value)


def _unwrap_leaf(value: Any) -> Any:
    if isinstance(value, dict):
        return {_text(k): v.array if isinstance(v, _Array) else v for k, v in value.items()}
    return value.array if isinstance(value, _Array) else value
