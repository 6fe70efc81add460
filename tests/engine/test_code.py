"""What is read in a function's bytecode, whose instructions change from one Python to the next."""

from __future__ import annotations

import dis
from typing import Any

from gametalearn.engine.state import code
from gametalearn.engine.state.code import names_of

NAMES_OF_ONES_OWN = {"STORE_NAME", "DELETE_NAME"}
"""In the body of a class or a module, of what is defined there."""
NEVER_RUN = {"LOAD_SUPER_METHOD", "LOAD_ZERO_SUPER_ATTR", "LOAD_ZERO_SUPER_METHOD"}
"""Steps of Python's compiler, which another instruction replaces."""


def test_every_instruction_that_has_a_name_is_read() -> None:
    """Fails under a Python with an instruction that this package does not know."""
    known = code._ATTRIBUTES | code._GLOBALS | {"IMPORT_NAME"} | NAMES_OF_ONES_OWN | NEVER_RUN
    assert {dis.opname[i] for i in dis.hasname} <= known


scale = width = 1
inner: Any = None


class Point:
    left = 0


class Base:
    def other(self, x): ...


class Net(Base):
    calls: Any
    gone: Any
    lock: Any

    def forward(self, x):
        import math as m
        from os import path

        self.calls += 1
        del self.gone
        super().other(x)
        kept = [scale * v.real for v in x if v.imag]
        with self.lock:
            return (lambda: inner.attribute)(), f"{x.shown:{width}}", m.pi, path.sep, kept

    def matches(self, x):
        match x:
            case Point(left=0):
                return x


def test_the_names_of_a_function() -> None:
    found = names_of(Net.forward.__code__)
    assert found.globals == {"super", "scale", "inner", "width"}
    assert found.attributes >= {
        *(
            "calls",
            "gone",
            "other",
            "real",
            "imag",
            "lock",
            "attribute",
            "shown",
            "pi",
            "path",
            "sep",
        )
    }
    assert found.imports == {"math", "os"}
    assert not found.computed


def test_the_names_in_a_pattern_may_be_any() -> None:
    found = names_of(Net.matches.__code__)
    assert found.globals == {"Point"}
    assert found.computed
