"""Every private or unstable interface of PyTorch that the package uses stands in the engine's README."""

from __future__ import annotations

import ast
import fnmatch
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest
from torch import nn

import gametalearn

ROOT = Path(gametalearn.__file__).parent
README = (ROOT / "engine" / "README.md").read_text()
TITLE = "## Private and deprecated interfaces of PyTorch"
UNSTABLE = (
    *("functorch", "torchgen", "torch.jit", "torch.OptionalType", "torch.FloatType"),
    *("torch.fx.experimental", "torch.fx.node", "torch.utils.weak"),
)
"""Parts of PyTorch that it promises nothing about, though their names have no underscore."""
IN_TEXT = {
    name
    for holder in (nn.Module(), nn.LSTM(1, 1), nn.modules.module)
    for name in vars(holder)
    if name.startswith("_") and not name.startswith("__")
}
"""Private names of PyTorch that code may read as texts, by ``vars`` and ``getattr``."""
NOT_TORCH = {"_actions", "_option_string_actions", "_name_", "_value_"}
"""Private attributes of Python's own objects."""


def interfaces(code: str) -> set[str]:
    """Those that a file uses: in full where they are imported, else the name of the attribute."""
    tree = ast.parse(code)
    imported, own = _imported(tree), _own(tree) | NOT_TORCH
    found = set()
    for node in ast.walk(tree):
        for name in _named(node, imported):
            head = name.split(".")[0]
            if head in ("torch", "functorch", "torchgen"):
                if _is_private(name) or name.startswith(UNSTABLE):
                    found.add(name)
            elif head == name and _is_private(name) and name not in own:
                found.add(name)
    inner = {name.rpartition(".")[0] for name in found}
    return found - inner  # `a._b.c` says it, without `a._b`


def _is_private(name: str) -> bool:
    return any(re.fullmatch(r"_[A-Za-z]\w*", part) for part in name.split("."))


def _imported(tree: ast.AST) -> dict[str, str]:
    """What names stand for: imported modules, and their parts, also as in ``aten = torch.ops.aten``."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                head = alias.name.split(".")[0]
                found[alias.asname or head] = alias.name if alias.asname else head
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target, value in _assigned(node):
                name = _in_full(value, found)
                if isinstance(target, ast.Name) and name:
                    found.setdefault(target.id, name)
    return found


def _assigned(node: ast.Assign) -> list[tuple[ast.expr, ast.expr]]:
    target, value = node.targets[0], node.value
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return list(zip(target.elts, value.elts, strict=False))
    return [(target, value)]


def _in_full(node: ast.expr, imported: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return imported.get(node.id)
    if isinstance(node, ast.Attribute):
        inner = _in_full(node.value, imported)
        return inner and f"{inner}.{node.attr}"
    return None


def _named(node: ast.AST, imported: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Attribute):
        yield _in_full(node, imported) or node.attr
    elif isinstance(node, ast.keyword) and node.arg:
        yield node.arg
    elif isinstance(node, ast.Constant) and _in_text(node.value):
        yield node.value


def _in_text(value: object) -> TypeGuard[str]:
    of_torch = r"torch(\.\w+)+"
    return isinstance(value, str) and bool(value in IN_TEXT or re.fullmatch(of_torch, value))


def _own(tree: ast.AST) -> set[str]:
    """The names that a file defines itself, those apart that every module of a network has."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        if isinstance(node, ast.ClassDef):
            of_torch = any(ast.unparse(base).endswith("Module") for base in node.bases)
            found |= _stored(node) - (IN_TEXT if of_torch else set())
    return found


def _stored(tree: ast.AST) -> set[str]:
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {node.attr for node in nodes if isinstance(node.ctx, ast.Store)}


@functools.cache
def used() -> dict[str, set[str]]:
    """The interfaces that each file of the package uses."""
    files = {str(p.relative_to(ROOT)): interfaces(p.read_text()) for p in ROOT.rglob("*.py")}
    return {file: names for file, names in files.items() if names}


def listed(text: str) -> list[tuple[str, str]]:
    """Each interface in the README's table with each file where it is used."""
    table = text.split(TITLE)[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return [
        (name, file)
        for names, files, *_ in rows
        for name in re.findall(r"`([^`]+)`", names)
        for file in re.findall(r"`([^`]+)`", files)
    ]


def covers(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def unlisted(text: str) -> set[tuple[str, str]]:
    """Interfaces, and the files where they are used, that the README does not list."""
    rows = listed(text)
    return {
        (name, file)
        for file, names in used().items()
        for name in names
        if not any(file == where and covers(pattern, name) for pattern, where in rows)
    }


def test_every_interface_is_listed_where_it_is_used():
    assert unlisted(README) == set()


def test_what_is_listed_is_used():
    found = used()
    for pattern, file in listed(README):
        names = found.get(file, set())
        assert any(covers(pattern, name) for name in names), f"{file} does not use {pattern}"


def test_a_row_that_is_missing_is_noticed():
    rows = [line for line in README.split(TITLE)[1].splitlines() if line.startswith("| `")]
    assert len(rows) > 10
    for row in rows:
        assert unlisted(README.replace(row, "")), row


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import torch\ntorch._C._foo(1)", "torch._C._foo"),
        ("import torch._dynamo.config as c\nc.x = 1", "torch._dynamo.config.x"),
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("from torch import jit\njit.trace(f)", "torch.jit.trace"),
        ("import torch\naten = torch.ops.aten\naten._foo.default", "torch.ops.aten._foo.default"),
        ("from torch.fx.experimental.proxy_tensor import make_fx",
         "torch.fx.experimental.proxy_tensor.make_fx"),
        ("import functorch\nfunctorch.vmap", "functorch.vmap"),
        ("def f(t):\n    return t._version", "_version"),
        ("def f(g, t):\n    return g(t, _no_check=True)", "_no_check"),
        ("def f(m):\n    return vars(m)['_parameters']", "_parameters"),
        ("class A(nn.Module):\n    def f(self, m):\n        self._buffers = m._buffers", "_buffers"),
    ],
)  # fmt: skip
def test_an_interface_is_seen(code: str, name: str):
    assert interfaces(code) == {name}


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.func.vmap(torch.relu)",
        "import os\nos._exit(1)",
        "class A:\n    def f(self):\n        self._x = 1\n        return self._x",
        "def _f(): ...\n_f()\ntext = '_f'",
    ],
)
def test_what_is_public_or_ones_own_is_not(code: str):
    assert interfaces(code) == set()


def test_one_file_knows_torchscript():
    for file in ROOT.rglob("*.py"):
        if file.name != "torchscript.py":
            assert "torch.jit" not in file.read_text(), f"{file.name}: see engine/torchscript.py"
