"""Write a program's operators as one TorchScript function, which runs them without Python.

A replay of a traced program calls thousands of operators from Python, and only one thread at a time
can be in Python. The script makes the same calls with the same arguments from TorchScript's
interpreter: the numbers are the same to the last bit, which is checked before a script is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Script", "script_of"]

Script = Callable[..., tuple[Tensor, ...]]


class _UnfitError(Exception):
    """An operator or argument that is not written down here."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
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

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        types_of = {a.name: a.type for a in schema.arguments}
        values = [self.text(v, t) for v, t in zip(args, types_of.values(), strict=False)]
        values += [f"{k}={self.text(v, types_of[k])}" for k, v in kwargs.items()]
        call = f"torch.ops.{schema.name.replace('::', '.')}({', '.join(values)})"
        result = func(*args, **kwargs)
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
            raise _UnfitError(schema.name)
        self.statements.append(f"{', '.join(results)} = {call}" if results else call)
        return result

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


def script_of(
    program: Callable[..., tuple[Tensor, ...]],
    constants: Sequence[Tensor],
    tensors: Sequence[Tensor],
) -> Script | None:
    """The program as a script, or None if it cannot be written as one.

    It is run twice on ``tensors``: once to write the operators down, once as a script, whose
    results must be the same.

    Args:
        program: what to record. For tensors of these shapes and strides it must always call the
            same operators.
        constants: tensors that the program reads besides its arguments.
        tensors: arguments of the program.
    """
    with torch.inference_mode():
        known = [t.detach() for t in tensors]
        recorder = _Recorder([*known, *constants])
        names = [recorder.names[t] for t in (*known, *constants)]
        try:
            with recorder:
                expected = program(*known)
            results = [recorder.names[t] for t in expected]
            unit = torch.jit.CompilationUnit(_source(names, recorder.statements, results))

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
