"""What a function's bytecode names: globals, attributes and imports, nested functions included."""

from __future__ import annotations

import dis
import sys
from dataclasses import dataclass
from types import CodeType

__all__ = ["COMPUTED", "Names", "is_library", "is_library_class", "names_of"]

# Named in a function, these read attributes whose names stand in no bytecode.
COMPUTED = frozenset(
    [
        *("getattr", "setattr", "hasattr", "delattr", "vars", "dir", "eval", "exec", "globals"),
        *("locals", "__dict__", "__getattribute__", "attrgetter", "methodcaller"),
        *("asdict", "astuple", "copy", "deepcopy", "dumps", "format", "format_map"),
        *("import_module", "__import__", "modules"),
    ]
)
_ATTRIBUTES = frozenset(
    ["LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR", "LOAD_SUPER_ATTR", "IMPORT_FROM"]
)
_GLOBALS = frozenset(
    ["LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS", "STORE_GLOBAL", "DELETE_GLOBAL"]
)
_LIBRARIES = frozenset(
    [
        *("torch", "functorch", "torchgen", "numpy", "scipy", "PIL", "tqdm"),
        # pytest writes calls of its own into the assertions of a test's functions
        *("pytest", "_pytest", "pluggy", "hypothesis"),
    ]
)


@dataclass(frozen=True)
class Names:
    """What stands in the bytecode of a function and of the functions that it defines.

    Attributes:
        globals: names that are looked up in the function's module.
        attributes: names that are read from, or set on, some object.
        imports: modules that it imports when it runs.
        texts: strings that stand in it.
        computed: whether attributes may be read whose names are computed.
    """

    globals: frozenset[str]
    attributes: frozenset[str]
    imports: frozenset[str]
    texts: frozenset[str]
    computed: bool


_known: dict[int, tuple[CodeType, Names]] = {}


def names_of(code: CodeType) -> Names:
    """The names in ``code``, read once."""
    if id(code) not in _known:  # by identity: to hash a code object takes as long
        _known[id(code)] = code, _read(code)
    return _known[id(code)][1]


def _read(code: CodeType) -> Names:
    found: dict[str, set[str]] = {"globals": set(), "attributes": set(), "imports": set()}
    found["texts"] = {c for c in code.co_consts if isinstance(c, str)}
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if instruction.opname in _GLOBALS:
            found["globals"].add(name)
        elif instruction.opname in _ATTRIBUTES:
            found["attributes"].add(name)
        elif instruction.opname == "IMPORT_NAME":
            found["imports"].add(name)
        elif instruction.opname == "MATCH_CLASS":  # its names are a constant
            found["attributes"].add("__dict__")
    inner = [names_of(c) for c in code.co_consts if isinstance(c, CodeType)]
    merged = {
        kind: frozenset(own.union(*(getattr(n, kind) for n in inner)))
        for kind, own in found.items()
    }
    computed = not COMPUTED.isdisjoint(merged["globals"] | merged["attributes"])
    return Names(**merged, computed=computed)


def is_library_class(kind: type) -> bool:
    """Whether a class is one of those that a library has under their names, and not made by it."""
    module = sys.modules.get(kind.__module__)
    return is_library(kind.__module__) and getattr(module, kind.__name__, None) is kind


def is_library(module: object) -> bool:
    """Whether a module's code is taken as given: the standard library, torch, numpy and the like."""
    root = module.partition(".")[0] if isinstance(module, str) else ""
    return root in _LIBRARIES or (root in sys.stdlib_module_names and root != "__main__")
