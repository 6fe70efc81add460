"""TorchScript, all of it: a program written as one function that runs without Python, and what of a
user's own code is refused because TorchScript compiled it.

A replay of a traced program calls thousands of operators from Python, and only one thread at a time
can be in Python. The script makes the same calls with the same arguments from TorchScript's
interpreter: the numbers are the same to the last bit, which is checked before a script is used.

PyTorch calls TorchScript deprecated. No other file of the package mentions it, and a replay needs no
script: it runs through Python where `script_of` gives none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from gametalearn.engine.errors import UnreplayableError

__all__ = ["SCRIPTED", "TensorFunction", "refuse_scripted", "script_of", "scripts_refused"]

TensorFunction = Callable[..., tuple[Tensor, ...]]

SCRIPTED = torch.jit.ScriptModule
"""The class of the modules that it compiled."""


def refuse_scripted(*_: object) -> NoReturn:
    """Refuse a module that it compiled: what such a module depends on cannot be seen."""
    raise UnreplayableError("torch.jit compiled a part of it")


@contextmanager
def scripts_refused() -> Iterator[None]:
    """Within this context, this thread may call no function that TorchScript compiled.

    It differentiates a function of its own accord, once; a trace would take down the wrong thing.
    """
    call, thread = torch.jit.ScriptFunction.__call__, threading.get_ident()

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            raise UnreplayableError("it calls a function that torch.jit compiled")
        return call(self, *args, **kwargs)

    torch.jit.ScriptFunction.__call__ = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.jit.ScriptFunction.__call__ = call  # type: ignore[method-assign]


def script_of(
    program: TensorFunction, constants: Sequence[Tensor], tensors: Sequence[Tensor]
) -> TensorFunction | None:
    """The program as a script, or None if it cannot be written as one.

    It is run twice on ``tensors``: once to write the operators down, once as a script, whose
    results must be the same.

    Args:
        program: what to write down. For tensors of these shapes and strides it must always call the
            same operators.
        constants: tensors that the program reads besides its arguments.
        tensors: arguments of the program.
    """
    with torch.inference_mode():
        known = [t.detach() for t in tensors]
        writer = _Writer([*known, *constants])
        names = [writer.names[t] for t in (*known, *constants)]
        try:
            with writer:
                expected = program(*known)
            results = [writer.names[t] for t in expected]
            unit = torch.jit.CompilationUnit(_source(names, writer.statements, results))

            def script(*tensors: Tensor) -> tuple[Tensor, ...]:
                # Optimising would take time, and could change numbers. Each thread has its setting.
                with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                    return tuple(unit.run(*tensors, *constants))

            same = all(
                torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
                for a, b in zip(script(*known), expected, strict=True)
            )
        except (_UnfitError, KeyError, RuntimeError, NotImplementedError):
            return None
    return script if same else None


def _source(names: Sequence[str], statements: Sequence[str], results: Sequence[str]) -> str:
    header = f"def run({', '.join(f'{n}: Tensor' for n in names)}) -> List[Tensor]:"
    return "\n    ".join([header, *statements, f"return [{', '.join(results)}]"]) + "\n"


class _UnfitError(Exception):
    """An operator or argument that is not written down here."""


class _Writer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down a statement for every operator that is called within this context."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Weakly: a tensor is freed when the program is done with it, as in any other run.
        self.names: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.statements: list[str] = []
        self.count = 0
        for tensor in known:
            self.name(tensor)

    def name(self, value: Any) -> str:
        """A new name; for a tensor, the one by which it is known from now on."""
        self.count += 1
        name = f"t{self.count}"
        if isinstance(value, Tensor) and value not in self.names:
            self.names[value] = name
        return name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call, result = self.call(func, args, kwargs or {}), func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            results = [self.name(result)]
        elif isinstance(result, tuple) and all(r is None or isinstance(r, Tensor) for r in result):
            results = [self.name(r) for r in result]
        elif isinstance(result, list) and all(isinstance(r, Tensor) for r in result):
            whole = self.name(None)
            self.statements.append(f"{whole} = {call}")
            for i, r in enumerate(result):
                self.statements.append(f"{self.name(r)} = {whole}[{i}]")
            return result
        else:  # a number that depends on data: it could change from call to call
            raise _UnfitError(func._schema.name)
        self.statements.append(f"{', '.join(results)} = {call}" if results else call)
        return result

    def call(self, func: Any, args: Any, kwargs: Any) -> str:
        """The call of an operator, in TorchScript."""
        schema = func._schema
        types_of = {a.name: a.type for a in schema.arguments}
        values = [self.text(v, t) for v, t in zip(args, types_of.values(), strict=False)]
        values += [f"{k}={self.text(v, types_of[k])}" for k, v in kwargs.items()]
        return f"torch.ops.{schema.name.replace('::', '.')}({', '.join(values)})"

    def text(self, value: Any, kind: Any) -> str:
        """An argument of the type that the operator's schema gives, in TorchScript."""
        if isinstance(kind, torch.OptionalType):
            kind = kind.getElementType()
        if isinstance(value, Tensor):
            if value not in self.names:
                raise _UnfitError("a tensor from elsewhere")
            name: str = self.names[value]
            return name
        if isinstance(value, list | tuple):
            inner = kind.getElementType()
            parts = ", ".join(self.text(v, inner) for v in value)
            return f"torch.jit.annotate(List[{inner}], [{parts}])"
        if value is None or isinstance(value, bool | str):
            return repr(value)
        if isinstance(value, torch.device):
            return f"torch.device('{value}')"
        if isinstance(kind, torch.FloatType):
            value = float(value)
        if isinstance(value, float):
            return repr(value) if abs(value) < float("inf") else f"float('{value}')"
        if isinstance(value, int | torch.dtype | torch.layout | torch.memory_format):
            return str(value)
        raise _UnfitError(f"an argument of type {type(value).__name__}")
