"""gametalearn: gradient-based few-shot meta-learning with gradient agreement.

The names of `gametalearn.public` are imported when the first of them is asked for: the command line
is at work, and can answer Ctrl-C, before the seconds that torch takes.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gametalearn.public import *  # noqa: F403


__version__ = "0.1.0"  # pyproject.toml reads it here

MODULES = {module.name for module in pkgutil.iter_modules(globals()["__path__"])}
"""Their names as they are written: ``Run`` is no module, even where a file system finds ``run.py`` by it."""


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__all__":  # what the import system looks for
        raise AttributeError(name)
    if name in MODULES:
        return importlib.import_module(f"gametalearn.{name}")
    return getattr(importlib.import_module("gametalearn.public"), name)


def __dir__() -> list[str]:
    return [*globals(), *__getattr__("__all__")]
