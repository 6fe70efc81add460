"""Whatever a forward, a loss, a score or a learner reads may change between two calls.

Each case changes one thing between calls of `meta_gradients`, and changes it back. A program that
was kept for too long would give the numbers from before: silently, so that each case also shows that
the plain loop's numbers do change, and that it was replayed before.
"""

from __future__ import annotations

import argparse
import array
import collections
import contextlib
import contextvars
import ctypes
import dataclasses
import enum
import functools
import importlib
import itertools
import operator
import random
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from operator import attrgetter as reader_of
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from gametalearn import MAML, TaskBatch, meta_gradients
from gametalearn.gradients import TaskGradients

Action = Callable[[], object]
Body = Callable[[Any, Tensor], Tensor]

LEARNER = MAML(0.3, 0)
"""Without inner steps a trace takes a third of the time, and reads the same things."""
BOUND = 1e-9


class Net(nn.Module):
    """Two layers, the second in use; whatever ``body`` does with them, and whatever it holds."""

    def __init__(self, body: Body | None = None, **held: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()
        for name, value in held.items():
            setattr(self, name, value)
        self.body = body

    def plain(self, x: Tensor) -> Tensor:
        output: Tensor = self.second(torch.tanh(x))
        return output

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) if self.body is None else self.body(self, x)


def batch_of(tasks: int, dtype: torch.dtype = torch.float64) -> TaskBatch:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(3).repeat(tasks, 2)
    x, z = torch.randn(2, tasks, 6, 4, generator=g, dtype=torch.float64).to(dtype).unbind()
    return TaskBatch(x, y, z, y, torch.zeros(tasks, dtype=torch.int64))


class Change(NamedTuple):
    """A model, and what is done to something that it depends on."""

    model: nn.Module
    do: Action
    undo: Action
    options: dict[str, Any] = {}  # noqa: RUF012
    learner: Any = LEARNER


def numbers(change: Change, method: str) -> TaskGradients:
    dtype = next(change.model.parameters()).dtype
    options: dict[str, Any] = {
        name: value() if isinstance(value, _Made) else value
        for name, value in change.options.items()
    }
    return meta_gradients(
        change.model,
        batch_of(1, dtype),
        change.learner,
        method=method,  # type: ignore[arg-type]
        **options,
    )


class _Made:
    """An option that is made anew for each call, such as a bound method."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __call__(self) -> Any:
        return self.make()


def distance(got: TaskGradients, expected: TaskGradients) -> float:
    """The largest difference in relation to the largest value, over rows, updates, loss, score."""
    found = [0.0]
    for name in ("rows", "updates", "loss", "score"):
        a, b = getattr(got, name).double(), getattr(expected, name).double()
        if a.shape != b.shape:
            return float("inf")
        found.append(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)))
    return max(found)


def check(change: Change, *, looped: str = "", bound: float = BOUND) -> None:
    """Loop and auto agree before a change, after it, and when it is undone.

    Args:
        change: what is changed.
        looped: matches the one warning of a model that cannot be replayed; by default it is replayed,
            and any warning is an error.
        bound: on the difference.
    """
    before = numbers(change, "loop")
    if looped:
        with pytest.warns(UserWarning, match=f"cannot be replayed.*{looped}"):
            first = numbers(change, "auto")
    else:
        first = numbers(change, "auto")
    assert distance(first, before) <= bound
    for _ in range(2):  # call 2 is compared with the loop, call 3 is not
        assert distance(numbers(change, "auto"), before) <= bound
    change.do()
    try:
        after = numbers(change, "loop")
        assert distance(after, before) > 1e3 * bound, "the change has no effect"
        assert distance(numbers(change, "auto"), after) <= bound, "after the change"
    finally:
        change.undo()
    again = numbers(change, "loop")
    assert distance(again, before) <= bound, "the change was not undone"
    assert distance(numbers(change, "auto"), again) <= bound, "after it was undone"


CASES: dict[str, Callable[[], Change]] = {}


def case(make: Callable[[], Change]) -> Callable[[], Change]:
    CASES[make.__name__] = make
    return make


def sets(holder: Any, name: str, value: Any) -> tuple[Action, Action]:
    """Sets an attribute, and puts back what stood there."""
    own = vars(holder) if hasattr(holder, "__dict__") else {}
    old = own[name] if name in own else getattr(holder, name)
    return lambda: setattr(holder, name, value), lambda: setattr(holder, name, old)


def puts(holder: Any, key: Any, value: Any) -> tuple[Action, Action]:
    """Sets an entry, and puts back what stood there."""
    old = holder[key]
    return lambda: holder.__setitem__(key, value), lambda: holder.__setitem__(key, old)


def added(holder: Any, name: str, value: Any) -> tuple[Action, Action]:
    """Sets an attribute that the holder itself does not have, though a class of it may."""
    return lambda: setattr(holder, name, value), lambda: delattr(holder, name)


def scaled(read: Callable[[Any], Any], **held: Any) -> Net:
    """A model whose output is multiplied by ``read(model)``."""
    return Net(lambda m, x: m.plain(x) * read(m), **held)


def here(name: str, value: Any) -> tuple[Action, Action]:
    """Replaces a global variable of this file."""
    return puts(globals(), name, value)


class Plain:
    """An object whose attributes are named in no method of it."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def plain(**held: Any) -> Plain:
    made = Plain()
    vars(made).update(held)
    return made


class Slotted:
    __slots__ = ("rate",)

    def __init__(self, rate: float) -> None:
        self.rate = rate


@dataclasses.dataclass
class Options:
    rate: float = 1.0


@dataclasses.dataclass(frozen=True)
class FrozenOptions:
    rate: float = 1.0


@dataclasses.dataclass(eq=False)
class Bare:
    rate: float = 1.0


# Objects that the model holds.


@case
def attribute_of_an_object() -> Change:
    model = scaled(lambda m: m.held.rate, held=plain(rate=1.0))
    return Change(model, *sets(model.held, "rate", 2.0))


@case
def attribute_of_a_nested_object() -> Change:
    inner = plain(rate=1.0)
    model = scaled(lambda m: m.held.more[0].inner.rate, held=plain(more=[plain(inner=inner)]))
    return Change(model, *sets(inner, "rate", 2.0))


@case
def object_replaced() -> Change:
    model = scaled(lambda m: m.held.rate, held=plain(rate=1.0))
    return Change(model, *sets(model, "held", plain(rate=2.0)))


@case
def slot() -> Change:
    model = scaled(lambda m: m.held.rate, held=Slotted(1.0))
    return Change(model, *sets(model.held, "rate", 2.0))


@case
def simple_namespace() -> Change:
    model = scaled(lambda m: m.held.rate, held=types.SimpleNamespace(rate=1.0))
    return Change(model, *sets(model.held, "rate", 2.0))


@case
def argparse_namespace() -> Change:
    model = scaled(lambda m: m.held.rate, held=argparse.Namespace(rate=1.0))
    return Change(model, *sets(model.held, "rate", 2.0))


@case
def dataclass() -> Change:
    model = scaled(lambda m: m.held.rate, held=Options())
    return Change(model, *sets(model.held, "rate", 2.0))


@case
def frozen_dataclass_replaced() -> Change:
    model = scaled(lambda m: m.held.rate, held=FrozenOptions())
    return Change(model, *sets(model, "held", FrozenOptions(2.0)))


@case
def made_dataclass() -> Change:
    kind = dataclasses.make_dataclass("Made", [("rate", float, 1.0)])
    model = scaled(lambda m: m.held.rate, held=kind())
    return Change(model, *sets(model.held, "rate", 2.0))


@case
def method_of_a_made_dataclass() -> Change:
    def factor(self: Any) -> float:
        return NUMBER

    kind = dataclasses.make_dataclass("Made", [], namespace={"factor": factor})
    return Change(scaled(lambda m: m.held.factor(), held=kind()), *here("NUMBER", 2.0))


@case
def object_as_a_whole_by_asdict() -> Change:
    model = scaled(lambda m: dataclasses.asdict(m.held)["rate"], held=Bare())
    return Change(model, *sets(model.held, "rate", 2.0))


@case
def object_shown_as_text() -> Change:
    class Shown:
        rate = 1.0

        def __repr__(self) -> str:
            return str(self.rate)

    model = scaled(lambda m: float(str(m.held)), held=Shown())
    return Change(model, *sets(model.held, "rate", 2.0))


@case
def object_formatted() -> Change:
    text = "{0.rate}"
    model = scaled(lambda m: float(text.format(m.held)), held=plain(rate=1.0))
    return Change(model, *sets(model.held, "rate", 2.0))


@case
def object_matched_by_keyword() -> Change:
    def body(m: Any, x: Tensor) -> Tensor:
        match m.held:
            case Plain(rate=rate):
                return cast(Tensor, m.plain(x) * rate)
        raise AssertionError

    model = Net(body, held=plain(rate=1.0))
    return Change(model, *sets(model.held, "rate", 2.0))


@case
def class_of_an_object() -> Change:
    class Other(Plain):
        def factor(self) -> float:
            return 2.0

    class One(Plain):
        def factor(self) -> float:
            return 1.0

    model = scaled(lambda m: m.held.factor(), held=One())
    return Change(
        model,
        lambda: setattr(model.held, "__class__", Other),
        lambda: setattr(model.held, "__class__", One),
    )


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@case
def class_of_a_layer() -> Change:
    model = Net()
    return Change(
        model,
        lambda: setattr(model.second, "__class__", Doubling),
        lambda: setattr(model.second, "__class__", nn.Linear),
    )


@case
def class_of_the_model() -> Change:
    class Tripled(Net):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    model = Net()
    return Change(
        model,
        lambda: setattr(model, "__class__", Tripled),
        lambda: setattr(model, "__class__", Net),
    )


# Attributes that are not there at first.


@case
def attribute_added_to_the_model() -> Change:
    model = scaled(lambda m: getattr(m, "rate", 1.0))
    return Change(model, *added(model, "rate", 2.0))


@case
def attribute_added_to_an_object() -> Change:
    model = scaled(lambda m: getattr(m.held, "rate", 1.0), held=plain())
    return Change(model, *added(model.held, "rate", 2.0))


@case
def attribute_added_to_a_namespace() -> Change:
    model = scaled(lambda m: getattr(m.held, "rate", 1.0), held=argparse.Namespace())
    return Change(model, *added(model.held, "rate", 2.0))


@case
def attribute_looked_for() -> Change:
    model = scaled(lambda m: 2.0 if hasattr(m, "doubled") else 1.0)
    return Change(model, *added(model, "doubled", None))


@case
def attribute_looked_for_and_gone() -> Change:
    model = scaled(lambda m: 2.0 if hasattr(m, "doubled") else 1.0, doubled=0)
    return Change(model, lambda: delattr(model, "doubled"), lambda: setattr(model, "doubled", 0))


@case
def attribute_tried() -> Change:
    def body(m: Any, x: Tensor) -> Tensor:
        try:
            rate = m.held.rate
        except AttributeError:
            rate = 1.0
        return cast(Tensor, m.plain(x) * rate)

    model = Net(body, held=plain())
    return Change(model, *added(model.held, "rate", 2.0))


@case
def entry_of_an_object_dictionary() -> Change:
    model = scaled(lambda m: vars(m.held).get("rate", 1.0), held=plain())
    return Change(model, *added(model.held, "rate", 2.0))


@case
def name_in_an_object_dictionary() -> Change:
    model = scaled(lambda m: 2.0 if "doubled" in m.__dict__ else 1.0)
    return Change(model, *added(model, "doubled", None))


@case
def method_patched_on_the_instance() -> Change:
    class Own(Net):
        def factor(self) -> float:
            return 1.0

    model = Own(lambda m, x: m.plain(x) * m.factor())
    return Change(model, *added(model, "factor", lambda: 2.0))


@case
def forward_patched_on_the_instance() -> Change:
    model = Net()
    return Change(model, *added(model, "forward", lambda x: 2 * model.plain(x)))


@case
def forward_patched_on_a_layer() -> Change:
    model = Net()
    return Change(
        model, *added(model.second, "forward", lambda x: F.linear(x, torch.ones(3, 4).double()))
    )


# Containers.


@case
def entry_of_a_dictionary() -> Change:
    model = scaled(lambda m: m.held["rate"], held={"rate": 1.0})
    return Change(model, *puts(model.held, "rate", 2.0))


@case
def entry_of_a_list() -> Change:
    model = scaled(lambda m: m.held[1], held=[5.0, 1.0])
    return Change(model, *puts(model.held, 1, 2.0))


@case
def list_grown() -> Change:
    model = scaled(lambda m: sum(m.held), held=[1.0])
    return Change(
        model, lambda: cast(Any, model.held).append(1.0), lambda: cast(Any, model.held).pop()
    )


@case
def entry_of_lists_in_dictionaries() -> Change:
    inner = [1.0]
    model = scaled(lambda m: m.held["a"]["b"][0][0], held={"a": {"b": (inner,)}})
    return Change(model, *puts(inner, 0, 2.0))


@case
def member_of_a_set() -> Change:
    model = scaled(lambda m: sum(m.held), held={1.0})
    return Change(
        model, lambda: cast(Any, model.held).add(4.0), lambda: cast(Any, model.held).discard(4.0)
    )


@case
def entry_of_a_deque() -> Change:
    model = scaled(lambda m: m.held[-1], held=collections.deque([3.0, 1.0]))
    return Change(model, *puts(model.held, -1, 2.0))


@case
def default_dictionary() -> Change:
    model = scaled(lambda m: m.held["rate"], held=collections.defaultdict(float, rate=1.0))
    return Change(model, *puts(model.held, "rate", 2.0))


@case
def dictionary_with_attributes() -> Change:
    class Attributes(dict[str, Any]):
        __getattr__ = dict.__getitem__

    model = scaled(lambda m: m.held.rate, held=Attributes(rate=1.0))
    return Change(model, *puts(model.held, "rate", 2.0))


@case
def user_dictionary() -> Change:
    model = scaled(lambda m: m.held["rate"], held=collections.UserDict(rate=1.0))
    return Change(model, *puts(model.held, "rate", 2.0))


@case
def subclass_of_a_user_dictionary() -> Change:
    class Mine(collections.UserDict[str, float]):
        pass

    model = scaled(lambda m: m.held["rate"], held=Mine(rate=1.0))
    return Change(model, *puts(model.held, "rate", 2.0))


@case
def subclass_of_a_chain_map() -> Change:
    class Mine(collections.ChainMap[str, float]):
        pass

    model = scaled(lambda m: m.held["rate"], held=Mine({"rate": 1.0}))
    return Change(model, *puts(model.held, "rate", 2.0))


@case
def order_of_a_dictionary() -> Change:
    held = {"one": 1.0, "two": 2.0}

    def to_the_end(name: str) -> Action:
        return lambda: held.update({name: held.pop(name)})

    return Change(
        scaled(lambda m: next(iter(m.held.values())), held=held),
        to_the_end("one"),
        to_the_end("two"),
    )


@case
def read_only_view_of_a_dictionary() -> Change:
    held = {"rate": 1.0}
    model = scaled(lambda m: m.held["rate"], held=types.MappingProxyType(held))
    return Change(model, *puts(held, "rate", 2.0))


@case
def values_of_a_dictionary() -> Change:
    held = {"rate": 1.0}
    return Change(scaled(lambda m: sum(m.held), held=held.values()), *puts(held, "rate", 2.0))


@case
def items_of_a_dictionary() -> Change:
    held = {"rate": 1.0}
    model = scaled(lambda m: sum(v for _, v in m.held), held=held.items())
    return Change(model, *puts(held, "rate", 2.0))


@case
def keys_of_a_dictionary() -> Change:
    held = {"rate": 1.0}
    model = scaled(lambda m: len(m.held), held=held.keys())
    return Change(model, lambda: held.update(other=0.0), lambda: held.pop("other"))


@case
def array_changed() -> Change:
    model = scaled(lambda m: float(m.held[1]), held=np.ones(3))
    return Change(model, *puts(model.held, 1, 2.0))


@case
def array_of_objects() -> Change:
    model = scaled(lambda m: m.held[0], held=np.array([1.0, "text"], dtype=object))
    return Change(model, *puts(model.held, 0, 2.0))


@case
def array_of_python() -> Change:
    model = scaled(lambda m: m.held[0], held=array.array("d", [1.0]))
    return Change(model, *puts(model.held, 0, 2.0))


@case
def bytes_changed() -> Change:
    model = scaled(lambda m: m.held[0], held=bytearray([1]))
    return Change(model, *puts(model.held, 0, 2))


@case
def number_of_c() -> Change:
    model = scaled(lambda m: m.held.value, held=ctypes.c_double(1.0))
    return Change(
        model,
        lambda: setattr(model.held, "value", 2.0),
        lambda: setattr(model.held, "value", 1.0),
    )


@case
def array_of_c() -> Change:
    model = scaled(lambda m: m.held[0], held=(ctypes.c_double * 1)(1.0))
    return Change(model, *puts(model.held, 0, 2.0))


# Values of kinds that compare by what they hold.


class Rate(float):
    pass


class Count(int):
    pass


class Name(str):
    pass


class Level(enum.Enum):
    LOW = 1.0
    HIGH = 2.0

    rate: float


class Number(enum.IntEnum):
    ONE = 1
    TWO = 2


class Parts(enum.Flag):
    FIRST = 1
    SECOND = 2


@case
def subclass_of_float() -> Change:
    model = scaled(lambda m: m.held, held=Rate(1.0))
    return Change(model, *sets(model, "held", Rate(2.0)))


@case
def subclass_of_int() -> Change:
    model = scaled(lambda m: m.held, held=Count(1))
    return Change(model, *sets(model, "held", Count(2)))


@case
def subclass_of_str() -> Change:
    model = scaled(lambda m: len(m.held), held=Name("a"))
    return Change(model, *sets(model, "held", Name("bb")))


@case
def subclass_of_str_in_a_list() -> Change:
    model = scaled(lambda m: len(m.held[0]), held=[Name("a")])
    return Change(model, *puts(model.held, 0, Name("bb")))


@case
def integer_enumeration() -> Change:
    model = scaled(lambda m: m.held, held=Number.ONE)
    return Change(model, *sets(model, "held", Number.TWO))


@case
def other_member_by_value() -> Change:
    model = scaled(lambda m: m.held.value, held=Level.LOW)
    return Change(model, *sets(model, "held", Level.HIGH))


@case
def other_member_by_name() -> Change:
    model = scaled(lambda m: len(m.held.name), held=Level.LOW)
    return Change(model, *sets(model, "held", Level.HIGH))


@case
def other_member_by_identity() -> Change:
    model = scaled(lambda m: 2.0 if m.held is Level.HIGH else 1.0, held=Level.LOW)
    return Change(model, *sets(model, "held", Level.HIGH))


@case
def flags() -> Change:
    model = scaled(lambda m: 2.0 if Parts.SECOND in m.held else 1.0, held=Parts.FIRST)
    return Change(model, *sets(model, "held", Parts.FIRST | Parts.SECOND))


def rated_member(read: Callable[[Any], Any]) -> Change:
    Level.LOW.rate = 1.0
    return Change(scaled(read), *sets(Level.LOW, "rate", 2.0))


@case
def attribute_of_a_member() -> Change:
    return rated_member(lambda m: Level.LOW.rate)


@case
def attribute_of_a_member_by_name() -> Change:
    return rated_member(lambda m: Level["LOW"].rate)


@case
def attribute_of_a_member_by_value() -> Change:
    return rated_member(lambda m: Level(1.0).rate)


# Classes.


class Rated(Net):
    rate = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) * self.rate


class Derived(Rated):
    pass


class Elsewhere:
    rate = 1.0
    nested: Any = plain(rate=1.0)


class Based(Elsewhere):
    pass


class Meta(type):
    rate = 1.0


class OfMeta(metaclass=Meta):
    pass


@case
def attribute_of_the_class() -> Change:
    return Change(Rated(), *sets(Rated, "rate", 2.0))


@case
def attribute_of_a_base_class() -> Change:
    return Change(Derived(), *sets(Rated, "rate", 2.0))


@case
def attribute_of_a_base_class_hidden() -> Change:
    return Change(Derived(), *added(Derived, "rate", 2.0))


@case
def method_of_a_base_class_hidden() -> Change:
    return Change(Derived(), *added(Derived, "forward", lambda self, x: 2 * self.plain(x)))


@case
def attribute_of_a_base_of_an_object_hidden() -> Change:
    return Change(scaled(lambda m: m.held.rate, held=Based()), *added(Based, "rate", 2.0))


@case
def attribute_of_another_class() -> Change:
    return Change(scaled(lambda m: Elsewhere.rate), *sets(Elsewhere, "rate", 2.0))


@case
def object_in_another_class() -> Change:
    return Change(scaled(lambda m: Elsewhere.nested.rate), *sets(Elsewhere.nested, "rate", 2.0))


@case
def attribute_of_a_metaclass() -> Change:
    return Change(scaled(lambda m: OfMeta.rate), *sets(Meta, "rate", 2.0))


@case
def attribute_of_the_class_by_type() -> Change:
    return Change(scaled(lambda m: type(m.held).rate, held=Based()), *sets(Elsewhere, "rate", 2.0))


@case
def method_patched_on_the_class() -> Change:
    return Change(Rated(), *sets(Rated, "forward", lambda self, x: 2 * self.plain(x)))


@case
def forward_patched_in_torch() -> Change:
    old = nn.Linear.forward
    return Change(Net(), *sets(nn.Linear, "forward", lambda self, x: 2 * old(self, x)))


class Convolving(Net):
    def __init__(self) -> None:
        super().__init__(lambda m, x: m.plain(m.layer(x[:, None])[:, 0]))
        self.layer = nn.Conv1d(1, 1, 3, padding=1).double()


@case
def method_patched_in_torch() -> Change:
    old = nn.Conv1d._conv_forward
    return Change(
        Convolving(), *sets(nn.Conv1d, "_conv_forward", lambda self, *args: 2 * old(self, *args))
    )


@case
def method_patched_on_a_layer() -> Change:
    model = Convolving()
    return Change(
        model,
        *added(model.layer, "_conv_forward", lambda x, w, b: 2 * F.conv1d(x, w, b, padding=1)),
    )


@case
def method_patched_in_gametalearn() -> Change:
    old = MAML.adapt

    def adapt(self: MAML, *args: Any) -> dict[str, Tensor]:
        return {n: 2 * p for n, p in old(self, *args).items()}

    return Change(Net(), *sets(MAML, "adapt", adapt))


class Norm(nn.LayerNorm):
    pass


class OwnNorm(Norm):
    pass


@pytest.mark.parametrize("kind", [nn.LayerNorm, Norm, OwnNorm], ids=lambda kind: kind.__name__)
def test_settings_of_layers_and_of_their_subclasses(kind: type[nn.LayerNorm]) -> None:

    model = Net(lambda m, x: m.second(m.norm(m.first(x))), norm=kind(4).double())
    check(Change(model, *sets(model.norm, "eps", 1.0)))


# Global variables, and other modules.

NUMBER = 1.0
LIST = [1.0]
DICTIONARY = {"rate": 1.0}
OBJECT = plain(rate=1.0)
TENSOR = torch.ones((), dtype=torch.float64)
VECTOR = torch.ones(3, dtype=torch.float64)
FUNCTION: Callable[[], float] = lambda: 1.0  # noqa: E731
VARIABLE: contextvars.ContextVar[float] = contextvars.ContextVar("VARIABLE", default=1.0)

settings: Any = types.ModuleType("settings_of_a_user")
exec(
    """
RATE = 1.0
hidden = {"LATE": 1.0}

def __getattr__(name):
    if name in hidden:
        return hidden[name]
    raise AttributeError(name)
""",
    vars(settings),
)
sys.modules["settings_of_a_user"] = settings


@case
def global_number() -> Change:
    return Change(scaled(lambda m: NUMBER), *here("NUMBER", 2.0))


@case
def global_list() -> Change:
    return Change(scaled(lambda m: LIST[0]), *puts(LIST, 0, 2.0))


@case
def global_dictionary() -> Change:
    return Change(scaled(lambda m: DICTIONARY["rate"]), *puts(DICTIONARY, "rate", 2.0))


@case
def global_object() -> Change:
    return Change(scaled(lambda m: OBJECT.rate), *sets(OBJECT, "rate", 2.0))


@case
def global_function() -> Change:
    return Change(scaled(lambda m: FUNCTION()), *here("FUNCTION", lambda: 2.0))


@case
def global_tensor_replaced() -> Change:
    return Change(scaled(lambda m: TENSOR), *here("TENSOR", torch.full_like(TENSOR, 2.0)))


@case
def global_tensor_in_place() -> Change:
    return Change(scaled(lambda m: TENSOR), lambda: TENSOR.mul_(2), lambda: TENSOR.div_(2))


@case
def global_tensor_by_data() -> Change:
    old, new = TENSOR.data, torch.full_like(TENSOR, 2.0)
    return Change(
        scaled(lambda m: TENSOR),
        lambda: setattr(TENSOR, "data", new),
        lambda: setattr(TENSOR, "data", old),
    )


@case
def global_tensor_set() -> Change:
    old, new, replace = VECTOR.clone(), 2 * VECTOR, cast(Any, VECTOR.set_)
    return Change(scaled(lambda m: VECTOR), lambda: replace(new), lambda: replace(old))


@case
def tensor_in_a_list() -> Change:
    model = scaled(lambda m: m.held[0], held=[torch.ones(3, dtype=torch.float64)])
    return Change(model, lambda: model.held[0].mul_(2), lambda: model.held[0].div_(2))  # type: ignore[index]


@case
def memory_that_numpy_shares() -> Change:
    values = np.ones(3)
    model = scaled(lambda m: m.held, held=torch.from_numpy(values))
    return Change(model, lambda: values.__imul__(2), lambda: values.__itruediv__(2))


@case
def attribute_of_a_tensor() -> Change:
    held: Any = torch.ones(3, dtype=torch.float64)
    held.rate = 1.0
    return Change(scaled(lambda m: m.held * m.held.rate, held=held), *sets(held, "rate", 2.0))


@case
def gradient_of_a_tensor() -> Change:
    held = torch.ones(3, dtype=torch.float64, requires_grad=True)
    held.grad = torch.ones_like(held)
    return Change(
        scaled(lambda m: m.held.grad, held=held),
        lambda: setattr(held, "grad", torch.full_like(held, 2.0)),
        lambda: setattr(held, "grad", torch.ones_like(held)),
    )


@case
def another_module() -> Change:
    return Change(scaled(lambda m: settings.RATE), *sets(settings, "RATE", 2.0))


@case
def another_module_imported_late() -> Change:
    def body(m: Any, x: Tensor) -> Tensor:
        from settings_of_a_user import RATE  # type: ignore[import-not-found]

        return cast(Tensor, m.plain(x) * RATE)

    return Change(Net(body), *sets(settings, "RATE", 2.0))


@case
def another_module_by_a_computed_name() -> Change:
    return Change(scaled(lambda m: getattr(settings, "RA" + "TE")), *sets(settings, "RATE", 2.0))


@case
def another_module_as_a_dictionary() -> Change:
    return Change(scaled(lambda m: vars(settings)["RATE"]), *sets(settings, "RATE", 2.0))


@case
def name_added_to_another_module() -> Change:
    return Change(scaled(lambda m: getattr(settings, "NEW", 1.0)), *added(settings, "NEW", 2.0))


@case
def another_module_with_a_getattr() -> Change:
    return Change(scaled(lambda m: settings.LATE), *puts(settings.hidden, "LATE", 2.0))


@case
def another_module_by_importlib() -> Change:
    return Change(
        scaled(lambda m: importlib.import_module("settings_of_a_user").RATE),
        *sets(settings, "RATE", 2.0),
    )


@case
def another_module_by_sys() -> Change:
    return Change(
        scaled(lambda m: sys.modules["settings_of_a_user"].RATE), *sets(settings, "RATE", 2.0)
    )


@case
def globals_as_a_dictionary() -> Change:
    return Change(scaled(lambda m: globals()["NUMBER"]), *here("NUMBER", 2.0))


@case
def evaluated() -> Change:
    return Change(scaled(lambda m: eval("NUMBER")), *here("NUMBER", 2.0))


def helper() -> float:
    return NUMBER


def helper_of_a_helper() -> float:
    return helper()


def doubly_wrapped(f: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(f)
    def inner(*args: Any) -> Any:
        return f(*args)

    return inner


@doubly_wrapped
@torch.no_grad()
def decorated_helper(x: Tensor) -> Tensor:
    return torch.ones_like(x) * NUMBER


@functools.lru_cache
def cached_helper(key: object) -> Callable[[], float]:
    return helper


@case
def read_by_a_helper() -> Change:
    return Change(scaled(lambda m: helper()), *here("NUMBER", 2.0))


@case
def read_by_a_helper_of_a_helper() -> Change:
    return Change(scaled(lambda m: helper_of_a_helper()), *here("NUMBER", 2.0))


@case
def read_by_a_decorated_helper() -> Change:
    model = Net(lambda m, x: m.plain(x) * decorated_helper(x[:, :3]))
    return Change(model, *here("NUMBER", 2.0))


@case
def read_by_what_a_cached_helper_returns() -> Change:
    return Change(scaled(lambda m: cached_helper(0)()), *here("NUMBER", 2.0))


@case
def cache_cleared() -> Change:
    @functools.cache
    def rate(key: object) -> float:
        return NUMBER

    def to(value: float) -> Action:
        def act() -> None:
            globals()["NUMBER"] = value
            rate.cache_clear()

        return act

    return Change(scaled(lambda m: rate(0)), to(2.0), to(1.0))


# Functions.


@case
def closure_cell() -> Change:
    rate = 1.0

    def read(m: Any) -> float:
        return rate

    def to(value: float) -> Action:
        def act() -> None:
            nonlocal rate
            rate = value

        return act

    return Change(scaled(read), to(2.0), to(1.0))


@case
def object_in_a_closure() -> Change:
    held = plain(rate=1.0)
    return Change(scaled(lambda m: held.rate), *sets(held, "rate", 2.0))


@case
def closure_of_a_closure() -> Change:
    held = plain(rate=1.0)

    def outer() -> Callable[[Any], Any]:
        def inner(m: Any) -> Any:
            return held.rate

        return doubly_wrapped(inner)

    return Change(scaled(outer()), *sets(held, "rate", 2.0))


def with_defaults(m: Any, rate: float = 1.0, *, other: float = 1.0) -> float:
    return rate * other


@case
def default_argument() -> Change:
    return Change(scaled(lambda m: with_defaults(m)), *sets(with_defaults, "__defaults__", (2.0,)))


@case
def keyword_default() -> Change:
    return Change(
        scaled(lambda m: with_defaults(m)), *sets(with_defaults, "__kwdefaults__", {"other": 2.0})
    )


@case
def code_of_a_function() -> Change:
    def one(m: Any) -> float:
        return 1.0

    def two(m: Any) -> float:
        return 2.0

    old = one.__code__
    return Change(
        scaled(one),
        lambda: setattr(one, "__code__", two.__code__),
        lambda: setattr(one, "__code__", old),
    )


@case
def attribute_of_a_function() -> Change:
    def rate(m: Any) -> Any:
        return cast(Any, rate).factor

    cast(Any, rate).factor = 1.0
    return Change(scaled(rate), *sets(rate, "factor", 2.0))


@case
def partial_of_an_object() -> Change:
    held = plain(rate=1.0)
    read = functools.partial(lambda held, m: held.rate, held)
    return Change(scaled(read), *sets(held, "rate", 2.0))


@case
def entry_of_a_partial() -> Change:
    held = {"rate": 1.0}
    read = functools.partial(lambda m, held: held["rate"], held=held)
    return Change(scaled(read), *puts(held, "rate", 2.0))


class Reader:
    """Callable, with a state."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, m: Any) -> float:
        return self.rate

    def method(self, m: Any) -> float:
        return self.rate


@case
def callable_object() -> Change:
    held = Reader(1.0)
    return Change(scaled(held), *sets(held, "rate", 2.0))


@case
def bound_method() -> Change:
    held = Reader(1.0)
    return Change(scaled(held.method), *sets(held, "rate", 2.0))


@case
def single_dispatch() -> Change:
    @functools.singledispatch
    def rate(value: object) -> float:
        return 1.0

    def to(value: float) -> Action:
        return lambda: rate.register(Plain, lambda held: value)

    return Change(scaled(lambda m: rate(m.held), held=plain()), to(2.0), to(1.0))


read_rate = operator.attrgetter("rate")
read_entry = operator.itemgetter("rate")
look_up = getattr


@case
def read_by_an_attrgetter() -> Change:
    model = scaled(lambda m: read_rate(m.held), held=plain(rate=1.0))
    return Change(model, *sets(model.held, "rate", 2.0))


@case
def read_by_an_itemgetter() -> Change:
    model = scaled(lambda m: read_entry(m.held), held={"rate": 1.0})
    return Change(model, *puts(model.held, "rate", 2.0))


@case
def read_by_getattr_under_another_name() -> Change:
    model = scaled(lambda m: look_up(m.held, "ra" + "te"), held=plain(rate=1.0))
    return Change(model, *sets(model.held, "rate", 2.0))


@case
def read_by_attrgetter_under_another_name() -> Change:
    model = scaled(lambda m: reader_of("ra" + "te")(m.held), held=plain(rate=1.0))
    return Change(model, *sets(model.held, "rate", 2.0))


@case
def getattr_with_a_computed_name() -> Change:
    model = scaled(lambda m: getattr(m.held, "ra" + "te"), held=plain(rate=1.0))
    return Change(model, *sets(model.held, "rate", 2.0))


# Properties and the like.


class Computed(Net):
    @property
    def of_attribute(self) -> Any:
        return cast(Any, self.held).rate

    @property
    def of_global(self) -> float:
        return helper()

    @functools.cached_property
    def cached(self) -> Any:
        return cast(Any, self.held).rate

    @staticmethod
    def static() -> float:
        return NUMBER

    @classmethod
    def of_class(cls) -> float:
        return helper()


@case
def property_of_an_attribute() -> Change:
    model = Computed(lambda m, x: m.plain(x) * m.of_attribute, held=plain(rate=1.0))
    return Change(model, *sets(model.held, "rate", 2.0))


@case
def property_of_a_global() -> Change:
    return Change(Computed(lambda m, x: m.plain(x) * m.of_global), *here("NUMBER", 2.0))


@case
def static_method() -> Change:
    return Change(Computed(lambda m, x: m.plain(x) * m.static()), *here("NUMBER", 2.0))


@case
def class_method() -> Change:
    return Change(Computed(lambda m, x: m.plain(x) * m.of_class()), *here("NUMBER", 2.0))


@case
def cached_property() -> Change:
    model = Computed(lambda m, x: m.plain(x) * m.cached, held=plain(rate=1.0))

    def to(value: float) -> Action:
        def act() -> None:
            vars(model.held)["rate"] = value
            vars(model).pop("cached", None)

        return act

    return Change(model, to(2.0), to(1.0))


@case
def class_with_a_getattr() -> Change:
    class Looking:
        def __init__(self) -> None:
            self.hidden = {"rate": 1.0}

        def __getattr__(self, name: str) -> Any:
            return self.hidden[name]

    model = scaled(lambda m: m.held.rate, held=Looking())
    return Change(model, *puts(cast(Any, model.held).hidden, "rate", 2.0))


@case
def descriptor() -> Change:
    class Described:
        def __init__(self) -> None:
            self.value = 1.0

        def __get__(self, holder: object, kind: type) -> float:
            return self.value

    class Own(Net):
        rate = Described()

    return Change(Own(lambda m, x: m.plain(x) * m.rate), *sets(vars(Own)["rate"], "value", 2.0))


@case
def referenced_weakly() -> Change:
    held = plain(rate=1.0)
    model = scaled(lambda m: m.held().rate, held=weakref.ref(held), kept=held)
    return Change(model, *sets(held, "rate", 2.0))


@case
def weak_dictionary() -> Change:
    held, known = plain(rate=1.0), weakref.WeakValueDictionary[str, Plain]()
    known["it"] = held
    model = scaled(lambda m: known["it"].rate, kept=held)
    return Change(model, *sets(held, "rate", 2.0))


@case
def context_variable() -> Change:
    return Change(
        scaled(lambda m: VARIABLE.get()), lambda: VARIABLE.set(2.0), lambda: VARIABLE.set(1.0)
    )


@case
def default_precision() -> Change:
    return Change(
        scaled(lambda m: torch.tensor(0.1)),
        lambda: torch.set_default_dtype(torch.bfloat16),
        lambda: torch.set_default_dtype(torch.float32),
    )


@case
def scheduler_of_a_temperature() -> Change:
    class Schedule:
        def __init__(self) -> None:
            self.temperature, self.steps = 1.0, 0

        def step(self) -> None:
            self.steps += 1
            self.temperature *= 0.5

        def back(self) -> None:
            self.steps -= 1
            self.temperature *= 2.0

    schedule = Schedule()
    return Change(Net(lambda m, x: m.plain(x) / schedule.temperature), schedule.step, schedule.back)


@case
def scheduler_of_torch() -> Change:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 + epoch)

    def step() -> None:
        optimizer.step()
        schedule.step()

    def back() -> None:
        schedule._last_lr = [1.0]

    return Change(scaled(lambda m: m.held[0].get_last_lr()[0], held=[schedule]), step, back)


# Modules.


def other_layer() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(4, 3).double()


@case
def submodule_swapped() -> Change:
    model = Net()
    return Change(model, *sets(model, "second", other_layer()))


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()


@case
def submodule_added() -> Change:
    model = chain()
    return Change(model, lambda: model.append(nn.Tanh()), lambda: model.pop(3))


@case
def submodule_removed() -> Change:
    model = chain()
    return Change(model, lambda: model.pop(1), lambda: model.insert(1, nn.Tanh()))


@case
def submodules_in_another_order() -> Change:
    class Ordered(Net):
        def forward(self, x: Tensor) -> Tensor:
            for layer in cast(nn.ModuleDict, self.layers).values():
                x = layer(x)
            return self.plain(x)

    torch.manual_seed(1)
    layers = nn.ModuleDict({"linear": nn.Linear(4, 4), "tanh": nn.Tanh()}).double()

    def to_the_end(name: str) -> Action:
        return lambda: layers.__setitem__(name, layers.pop(name))

    return Change(Ordered(layers=layers), to_the_end("linear"), to_the_end("tanh"))


def hooked(register: Callable[[], Any]) -> tuple[Action, Action]:
    """Adds a hook, and removes it."""
    handles: list[Any] = []
    return lambda: handles.append(register()), lambda: handles.pop().remove()


@case
def forward_hook() -> Change:
    model = Net()
    hook = lambda module, inputs, output: 2 * output  # noqa: E731
    return Change(model, *hooked(lambda: model.second.register_forward_hook(hook)))


@case
def forward_pre_hook() -> Change:
    model = Net()
    hook = lambda module, inputs: (2 * inputs[0],)  # noqa: E731
    return Change(model, *hooked(lambda: model.register_forward_pre_hook(hook)))


@case
def state_of_a_hook() -> Change:
    model, held = Net(), plain(rate=1.0)
    model.second.register_forward_hook(lambda module, inputs, output: output * held.rate)
    return Change(model, *sets(held, "rate", 2.0))


def of_linear(factor: Callable[[], float]) -> Callable[..., Any]:
    """A hook on all modules that is for linear layers alone."""
    return lambda m, i, o: factor() * o if isinstance(m, nn.Linear) else None


@case
def hook_on_all_modules() -> Change:
    return Change(Net(), *hooked(lambda: register_module_forward_hook(of_linear(lambda: 2.0))))


@case
def hook_on_all_inputs() -> Change:
    def hook(module: nn.Module, inputs: Any) -> Any:
        return (2 * inputs[0],) if isinstance(module, nn.Linear) else None

    return Change(Net(), *hooked(lambda: register_module_forward_pre_hook(hook)))


def test_a_hook_on_all_modules_is_replaced_or_changes() -> None:
    held = plain(rate=2.0)
    handles = [register_module_forward_hook(of_linear(lambda: held.rate))]
    try:
        check(Change(Net(), *sets(held, "rate", 3.0)), looped="hooks are registered")

        def to(rate: float) -> Action:
            def act() -> None:
                handles.pop().remove()
                handles.append(register_module_forward_hook(of_linear(lambda: rate)))

            return act

        check(Change(Net(), to(4.0), to(2.0)), looped="hooks are registered")
    finally:
        handles.pop().remove()


@case
def function_mode() -> Change:
    class Doubled(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            return 2 * result if func is torch.tanh else result

    mode: Any = Doubled()
    return Change(Net(), mode.__enter__, lambda: mode.__exit__(None, None, None))


@case
def mode_of_a_submodule() -> Change:
    norm = nn.BatchNorm1d(4).double()
    norm(torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    model = Net(lambda m, x: m.second(m.norm(m.first(x))), norm=norm)
    return Change(model, norm.eval, norm.train)


@case
def frozen_parameter() -> Change:
    model = Net()
    return Change(
        model, lambda: model.first.requires_grad_(False), lambda: model.first.requires_grad_(True)
    )


def both_states(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    state = {n: t.clone() for n, t in model.state_dict().items()}
    return {n: 2 * t for n, t in state.items()}, state


@case
def parameters_loaded() -> Change:
    model = Net()
    new, old = both_states(model)
    return Change(model, lambda: model.load_state_dict(new), lambda: model.load_state_dict(old))


@case
def parameters_assigned() -> Change:
    model = Net()
    new, old = both_states(model)
    return Change(
        model,
        lambda: model.load_state_dict(new, assign=True),
        lambda: model.load_state_dict(old, assign=True),
    )


@case
def parameters_by_data() -> Change:
    model = Net()
    new, old = both_states(model)

    def to(state: dict[str, Tensor]) -> Action:
        def act() -> None:
            for name, parameter in model.named_parameters():
                parameter.data = state[name]

        return act

    return Change(model, to(new), to(old))


@case
def buffer_replaced() -> Change:
    model = scaled(lambda m: m.factor)
    model.register_buffer("factor", torch.ones(3, dtype=torch.float64))
    return Change(model, *sets_buffer(model, torch.full((3,), 2.0, dtype=torch.float64)))


def sets_buffer(model: nn.Module, value: Tensor) -> tuple[Action, Action]:
    old = model.get_buffer("factor")
    return lambda: setattr(model, "factor", value), lambda: setattr(model, "factor", old)


def test_other_precisions() -> None:
    model = Net()
    check(Change(model, *sets(model, "body", lambda m, x: 2 * m.plain(x))))
    model.float()
    check(Change(model, *sets(model, "body", lambda m, x: 2 * m.plain(x))), bound=1e-5)
    model.double()
    check(Change(model, *sets(model, "body", lambda m, x: 3 * m.plain(x))))


# Teachers: other models that are not trained.


def teacher(factor: float) -> nn.Linear:
    layer = other_layer().requires_grad_(False)
    layer.weight.mul_(factor)
    return layer


TEACHER = teacher(1.0)


@case
def global_teacher_replaced() -> Change:
    return Change(Net(lambda m, x: m.plain(x) * TEACHER(x)), *here("TEACHER", teacher(2.0)))


@case
def global_teacher_changed() -> Change:
    weight = TEACHER.weight
    model = Net(lambda m, x: m.plain(x) * TEACHER(x))
    return Change(model, lambda: weight.mul_(2), lambda: weight.div_(2))


@case
def teacher_in_a_tuple_replaced() -> Change:
    model = Net(lambda m, x: m.plain(x) * m.held[0](x), held=(teacher(1.0),))
    return Change(model, *sets(model, "held", (teacher(2.0),)))


@case
def teacher_in_a_tuple_loaded() -> Change:
    held = teacher(1.0)
    new, old = both_states(held)
    return Change(
        Net(lambda m, x: m.plain(x) * m.held[0](x), held=(held,)),
        lambda: held.load_state_dict(new, assign=True),
        lambda: held.load_state_dict(old, assign=True),
    )


@case
def teacher_in_a_dictionary_replaced() -> Change:
    model = Net(lambda m, x: m.plain(x) * m.held["t"](x), held={"t": teacher(1.0)})
    return Change(model, *puts(model.held, "t", teacher(2.0)))


# Functions of autograd's own kind.

FACTOR = 1.0


class Reversed(torch.autograd.Function):
    generate_vmap_rule = True
    factor = 1.0

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * FACTOR * Reversed.factor


def reversing() -> Net:
    return Net(lambda m, x: m.second(Reversed.apply(torch.tanh(m.first(x)))))


@case
def global_of_a_backward() -> Change:
    return Change(reversing(), *here("FACTOR", -2.0))


@case
def class_attribute_of_a_backward() -> Change:
    return Change(reversing(), *sets(Reversed, "factor", -2.0))


@case
def backward_replaced() -> Change:
    return Change(
        reversing(), *sets(Reversed, "backward", staticmethod(lambda ctx, *grads: 5 * grads[0]))
    )


# Losses, scores, learners.


def global_loss(prediction: Tensor, target: Tensor) -> Tensor:
    return helper() * F.cross_entropy(prediction, target)


def global_score(prediction: Tensor, target: Tensor) -> Tensor:
    return helper() * prediction.square().mean()


@case
def global_of_a_loss() -> Change:
    return Change(Net(), *here("NUMBER", 2.0), {"loss": global_loss})


@case
def global_of_a_score() -> Change:
    return Change(Net(), *here("NUMBER", 2.0), {"score": global_score})


class Trainer:
    def __init__(self) -> None:
        self.rate, self.nested = 1.0, plain(rate=1.0)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return cast(Tensor, self.rate * self.nested.rate * F.cross_entropy(prediction, target))

    __call__ = loss


@case
def method_of_a_trainer_as_the_loss() -> Change:
    trainer = Trainer()
    return Change(Net(), *sets(trainer.nested, "rate", 2.0), {"loss": _Made(lambda: trainer.loss)})


@case
def object_as_the_loss() -> Change:
    trainer = Trainer()
    return Change(Net(), *sets(trainer, "rate", 2.0), {"loss": trainer})


@case
def partial_as_the_loss() -> Change:
    held = plain(rate=1.0)
    loss = functools.partial(lambda p, t, held: held.rate * F.cross_entropy(p, t), held=held)
    return Change(Net(), *sets(held, "rate", 2.0), {"loss": loss})


@case
def object_as_the_score() -> Change:
    trainer = Trainer()
    return Change(Net(), *sets(trainer, "rate", 2.0), {"score": trainer})


class ModuleLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.held = plain(rate=1.0)
        self.register_buffer("factor", torch.ones(3, dtype=torch.float64))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        weight = self.get_buffer("factor")
        return cast(Tensor, self.held.rate * F.cross_entropy(prediction, target, weight=weight))


WEIGHTS = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)


@case
def object_of_a_module_as_the_loss() -> Change:
    loss = ModuleLoss()
    return Change(Net(), *sets(loss.held, "rate", 2.0), {"loss": loss})


@case
def buffer_of_a_loss_replaced() -> Change:
    loss = ModuleLoss()
    return Change(Net(), *sets_buffer(loss, WEIGHTS), {"loss": loss})


@case
def buffer_of_a_loss_in_place() -> Change:
    loss = ModuleLoss()
    weights = loss.get_buffer("factor")
    return Change(
        Net(), lambda: weights.mul_(WEIGHTS), lambda: weights.div_(WEIGHTS), {"loss": loss}
    )


@case
def setting_of_a_loss_of_torch() -> Change:
    loss = nn.CrossEntropyLoss()
    return Change(Net(), *sets(loss, "label_smoothing", 0.5), {"loss": loss})


class OwnLearner:
    """One inner step with a rate of its own, and a global one."""

    steps = 1
    first_order = True
    update_is_row = False

    def __init__(self) -> None:
        self.rate = 0.1

    def meta_parameters(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return params

    def adapt(self, meta: dict[str, Tensor], loss: Any, gradient: Any) -> dict[str, Tensor]:
        grads = gradient(loss, meta)
        return {n: p - helper() * self.rate * grads[n] for n, p in meta.items()}

    def for_test(self, steps: int) -> OwnLearner:
        return self


@case
def attribute_of_a_learner() -> Change:
    learner = OwnLearner()
    return Change(Net(), *sets(learner, "rate", 0.5), {}, learner)


@case
def global_of_a_learner() -> Change:
    return Change(Net(), *here("NUMBER", 2.0), {}, OwnLearner())


LOOPED = {
    "hook_on_all_modules": "hooks are registered for all modules",
    "hook_on_all_inputs": "hooks are registered for all modules",
    "function_mode": "within a mode",
    "globals_as_a_dictionary": "depends on more than",
    "evaluated": "depends on more than",
}
"""What is seen, and not replayed, before or after the change."""


@pytest.mark.parametrize("name", CASES)
def test_a_change_is_seen(name: str) -> None:
    looped = name in LOOPED
    with pytest.warns(UserWarning, match=LOOPED[name]) if looped else contextlib.nullcontext():
        check(CASES[name]())


def test_a_change_is_seen_after_inner_steps_of_many_tasks() -> None:
    held = plain(rate=1.0)
    change = Change(scaled(lambda m: held.rate), *sets(held, "rate", 2.0))
    results = []
    for value in (1.0, 2.0, 1.0):
        vars(held)["rate"] = value
        for _ in range(3):
            auto, loop = (
                meta_gradients(change.model, batch_of(3), MAML(0.3, 2), method=method)
                for method in ("auto", "loop")
            )
            assert distance(auto, loop) <= BOUND
        results.append(loop)
    assert distance(results[0], results[1]) > 1e-3


@pytest.mark.parametrize(
    "read",
    [
        lambda m: m.held.item(),
        lambda m: 2.0 if bool(m.held > 1.5) else 1.0,
        lambda m: m.held.tolist(),
        lambda m: float(m.held),
        lambda m: float(m.held.numpy()),
        lambda m: float(np.asarray(m.held)),
        lambda m: 1.0 if torch.equal(m.held, torch.ones_like(m.held)) else 2.0,
        lambda m: len(range(int(m.held))),
    ],
    ids=["item", "bool", "tolist", "float", "numpy", "asarray", "equal", "int"],
)
def test_numbers_of_a_tensor_that_python_reads(read: Callable[[Any], Any]) -> None:
    model = scaled(read, held=torch.ones((), dtype=torch.float64))
    held = cast(Tensor, model.held)
    check(Change(model, lambda: held.mul_(2), lambda: held.div_(2)), looped="reads a tensor")


def test_a_proxy_of_the_model_that_a_child_holds() -> None:

    class Child(nn.Module):
        def __init__(self, parent: nn.Module) -> None:
            super().__init__()
            vars(self)["parent"] = weakref.proxy(parent)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, x * vars(self)["parent"].rate)

    model = Net(lambda m, x: m.child(m.plain(x)), rate=1.0)
    model.child = Child(model)
    batch = batch_of(1)
    loop = meta_gradients(model, batch, LEARNER, method="loop")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "gametalearn: Net is computed task by task")
        assert distance(meta_gradients(model, batch, LEARNER), loop) <= BOUND


# What a forward leaves behind.


def lists_of(value: object) -> Iterator[object]:
    """A value, and what is in it if it is a container."""
    yield value
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for v in value:
            yield from lists_of(v)


def is_a_ghost(value: object) -> bool:
    """Whether it is a tensor that has a meaning within a trace alone."""
    return isinstance(value, Tensor) and (
        isinstance(value, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


class Left(NamedTuple):
    """A model, and how to read what its forward leaves behind."""

    model: nn.Module
    read: Callable[[], Any]


LEAVING: dict[str, tuple[str, Callable[[], Left]]] = {}


def leaves(looped: str) -> Callable[[Callable[[], Left]], Callable[[], Left]]:
    def register(make: Callable[[], Left]) -> Callable[[], Left]:
        LEAVING[make.__name__] = looped, make
        return make

    return register


def counting(count: Callable[[Any], object], read: Callable[[Any], Any], **held: Any) -> Left:
    def body(m: Any, x: Tensor) -> Tensor:
        count(m)
        return cast(Tensor, m.plain(x))

    model = Net(body, **held)
    return Left(model, lambda: read(model))


def count_entry(m: Any) -> None:
    m.held[0] += 1


@leaves("changes Net.n")
def attribute_counts() -> Left:
    def count(m: Any) -> None:
        m.n += 1

    return counting(count, lambda m: m.n, n=0)


@leaves("changes Net.n")
def counted_number_is_used() -> Left:
    def body(m: Any, x: Tensor) -> Tensor:
        m.n += 1
        return cast(Tensor, m.plain(x) * m.n)

    model = Net(body, n=0)
    return Left(model, lambda: model.n)


@leaves("changes Net.held")
def list_counts() -> Left:
    return counting(count_entry, lambda m: m.held[0], held=[0])


@leaves("changes Net.held")
def counter_counts() -> Left:
    return counting(count_entry, lambda m: m.held[0], held=collections.Counter())


@leaves("changes Net.held")
def deque_counts() -> Left:
    return counting(
        lambda m: m.held.append(0), lambda m: len(m.held), held=collections.deque(maxlen=50)
    )


@leaves("changes Net.held")
def array_counts() -> Left:
    return counting(count_entry, lambda m: int(m.held[0]), held=np.zeros(1))


@leaves("changes Net.held")
def array_of_python_counts() -> Left:
    return counting(count_entry, lambda m: m.held[0], held=array.array("l", [0]))


@leaves("changes Net.held")
def bytes_count() -> Left:
    return counting(count_entry, lambda m: m.held[0], held=bytearray(1))


@leaves("changes Net.held.rate")
def slot_counts() -> Left:
    def count(m: Any) -> None:
        m.held.rate += 1

    return counting(count, lambda m: m.held.rate, held=Slotted(0))


@leaves("changes .*variable|changes .*VARIABLE")
def context_variable_counts() -> Left:
    VARIABLE.set(0)
    return counting(lambda m: VARIABLE.set(VARIABLE.get() + 1), lambda m: VARIABLE.get())


@leaves("changes .*cell n")
def nonlocal_counts() -> Left:
    n = 0

    def count(m: Any) -> None:
        nonlocal n
        n += 1

    return counting(count, lambda m: n)


CALLS = 0


@leaves("changes .*CALLS")
def global_counts() -> Left:
    def count(m: Any) -> None:
        global CALLS
        CALLS += 1

    globals()["CALLS"] = 0
    return counting(count, lambda m: CALLS)


@leaves("changes .*calls")
def class_counts() -> Left:
    class Counted(Plain):
        calls = 0

    def count(m: Any) -> None:
        Counted.calls += 1

    return counting(count, lambda m: Counted.calls)


@leaves("changes")
def class_counts_that_has_no_number_yet() -> Left:
    class Counted(Plain):
        pass

    kind: Any = Counted

    def count(m: Any) -> None:
        kind.calls = getattr(kind, "calls", 0) + 1

    return counting(count, lambda m: kind.calls)


@leaves("changes .*calls")
def function_counts() -> Left:
    def count(m: Any) -> None:
        cast(Any, count).calls += 1

    cast(Any, count).calls = 0
    return counting(count, lambda m: cast(Any, count).calls)


@leaves("changes")
def function_counts_that_has_no_number_yet() -> Left:
    def count(m: Any) -> None:
        function: Any = count
        function.calls = getattr(function, "calls", 0) + 1

    return counting(count, lambda m: cast(Any, count).calls)


@leaves("")
def tensor_counts() -> Left:
    return counting(lambda m: m.held.add_(1), lambda m: m.held.clone(), held=torch.zeros(2))


@leaves("changes Net.n")
def tensor_and_number_count() -> Left:
    def count(m: Any) -> None:
        m.n += 1
        m.held.add_(1)

    return counting(count, lambda m: m.held.clone(), held=torch.zeros(2), n=0)


@leaves("")
def memory_bank() -> Left:
    def body(m: Any, x: Tensor) -> Tensor:
        h = cast(Tensor, m.plain(x))
        m.held[: len(h)] = h.detach()
        return h

    model = Net(body, held=torch.zeros(8, 3, dtype=torch.float64))
    return Left(model, lambda: cast(Tensor, model.held).clone())


@leaves("changes Net.n")
def ring_of_memory() -> Left:
    def body(m: Any, x: Tensor) -> Tensor:
        h = cast(Tensor, m.plain(x))
        m.n = (m.n + 1) % 4
        m.held[m.n] = h.detach().mean(0)
        return cast(Tensor, h * m.held.mean(0))

    model = Net(body, held=torch.zeros(4, 3, dtype=torch.float64), n=0)
    return Left(model, lambda: cast(Tensor, model.held).clone())


@leaves("assigns to a tensor's data")
def data_assigned() -> Left:
    def body(m: Any, x: Tensor) -> Tensor:
        h = cast(Tensor, m.plain(x))
        m.held.data = h.detach()
        return h

    model = Net(body, held=torch.zeros(6, 3, dtype=torch.float64))
    return Left(model, lambda: cast(Tensor, model.held).clone())


@leaves("changes Net.last")
def features_kept() -> Left:
    def body(m: Any, x: Tensor) -> Tensor:
        m.last = m.plain(x)
        return cast(Tensor, m.last)

    model = Net(body, last=None)
    return Left(model, lambda: model.last)


@leaves("changes .*features")
def features_kept_by_a_hook() -> Left:
    model = Net(features={})
    features = cast(dict[str, Tensor], model.features)
    model.second.register_forward_hook(lambda m, i, o: features.update(first=o))
    return Left(model, lambda: features)


@leaves("changes")
def features_kept_in_a_closure() -> Left:
    kept: list[Tensor] = []
    model = Net()
    model.second.register_forward_hook(lambda m, i, o: kept.append(o.detach()))
    return Left(model, lambda: kept)


@leaves("Random")
def random_numbers_of_python() -> Left:
    model = scaled(lambda m: m.held.random(), held=random.Random(0))
    return Left(model, lambda: cast(random.Random, model.held).getstate())


@leaves("Generator")
def random_numbers_of_numpy() -> Left:
    model = scaled(lambda m: m.held.random(), held=np.random.default_rng(0))
    return Left(model, lambda: repr(cast(Any, model.held).bit_generator.state))


@leaves("random")
def random_numbers_of_torch() -> Left:
    generator = torch.Generator().manual_seed(0)
    model = scaled(lambda m: torch.rand(3, generator=generator, dtype=torch.float64))
    return Left(model, generator.get_state)


@leaves("count")
def iterator_counts() -> Left:
    model = scaled(lambda m: next(m.held), held=itertools.count(1))
    return Left(model, lambda: repr(model.held))


@leaves("generator")
def generator_counts() -> Left:
    model = scaled(lambda m: next(m.held), held=(1.0 + i for i in range(1000)))
    return Left(model, lambda: None)


@leaves("Net.held is a count")
def iterator_made_in_the_first_call() -> Left:
    def body(m: Any, x: Tensor) -> Tensor:
        if m.held is None:
            m.held = itertools.count(1)
        return cast(Tensor, m.plain(x) * next(m.held))

    model = Net(body, held=None)
    return Left(model, lambda: repr(model.held))


def table() -> Tensor:
    return torch.arange(1.0, 4.0, dtype=torch.float64)


@leaves("replayed")
def table_in_an_attribute() -> Left:
    def body(m: Any, x: Tensor) -> Tensor:
        if m.table is None:
            m.table = table()
        return cast(Tensor, m.plain(x) * m.table)

    model = Net(body, table=None)
    return Left(model, lambda: model.table)


@leaves("replayed")
def table_in_a_buffer() -> Left:
    def body(m: Any, x: Tensor) -> Tensor:
        if not hasattr(m, "table"):
            m.register_buffer("table", table())
        return cast(Tensor, m.plain(x) * m.table)

    model = Net(body)
    return Left(model, lambda: 0)


@leaves("replayed")
def table_in_a_cached_property() -> Left:
    class Cached(Net):
        @functools.cached_property
        def table(self) -> Tensor:
            return table()

    model = Cached(lambda m, x: m.plain(x) * m.table)
    return Left(model, lambda: model.table)


@leaves("replayed")
def table_in_a_global_dictionary() -> Left:
    tables: dict[int, Tensor] = {}

    def body(m: Any, x: Tensor) -> Tensor:
        if 3 not in tables:
            tables[3] = table()
        return cast(Tensor, m.plain(x) * tables[3])

    return Left(Net(body), lambda: tables)


@leaves("replayed")
def table_in_an_object() -> Left:
    held: Any = plain()

    def body(m: Any, x: Tensor) -> Tensor:
        if not hasattr(held, "table"):
            held.table = table()
        return cast(Tensor, m.plain(x) * held.table)

    return Left(Net(body), lambda: held.table)


@leaves("replayed")
def table_in_a_cached_function() -> Left:
    cached = functools.cache(table)
    return Left(scaled(lambda m: cached()), cached)


@leaves("replayed")
def table_in_a_function() -> Left:
    def body(m: Any, x: Tensor) -> Tensor:
        own: Any = body
        if not hasattr(own, "table"):
            own.table = table()
        return cast(Tensor, m.plain(x) * own.table)

    return Left(Net(body), lambda: cast(Any, body).table)


@leaves("replayed")
def table_in_another_module() -> Left:
    def body(m: Any, x: Tensor) -> Tensor:
        if "table" not in vars(settings):
            settings.table = table()
        return cast(Tensor, m.plain(x) * settings.table)

    vars(settings).pop("table", None)
    return Left(Net(body), lambda: settings.table)


@leaves("replayed")
def table_in_a_class() -> Left:
    class Holder:
        pass

    holder: Any = Holder

    def body(m: Any, x: Tensor) -> Tensor:
        if not hasattr(holder, "table"):
            holder.table = table()
        return cast(Tensor, m.plain(x) * holder.table)

    return Left(Net(body), lambda: holder.table)


@leaves("replayed")
def table_at_a_tensor() -> Left:
    held: Any = torch.ones(3, dtype=torch.float64)

    def body(m: Any, x: Tensor) -> Tensor:
        if not hasattr(held, "table"):
            held.table = table()
        return cast(Tensor, m.plain(x) * held.table)

    return Left(Net(body), lambda: held.table)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(b, Tensor) and torch.equal(a.detach(), b.detach())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", LEAVING)
def test_what_a_forward_leaves_behind_is_what_a_loop_would_leave(name: str) -> None:
    """Of a model that is looped, after each of three calls; of one that is replayed, a table."""
    looped, make = LEAVING[name]
    batch = batch_of(2)
    plain = make()
    expected = []
    for _ in range(3):
        loop = meta_gradients(plain.model, batch, LEARNER, method="loop")
        expected.append((loop, copy_of(plain.read())))
    left = make()
    for i, (loop, state) in enumerate(expected):
        if i == 0 and looped != "replayed":
            with pytest.warns(UserWarning, match=f"Net is computed task by task.*{looped}"):
                got = meta_gradients(left.model, batch, LEARNER)
        else:  # no warning: it has been said, or it is replayed
            got = meta_gradients(left.model, batch, LEARNER)
        found = left.read()
        assert not any(map(is_a_ghost, [*lists_of(found), got.rows, *vars(left.model).values()]))
        assert equal(state, copy_of(found))
        assert distance(got, loop) <= BOUND


def copy_of(value: Any) -> Any:
    """Of what was read, as it is now."""
    if isinstance(value, dict):
        return {k: copy_of(v) for k, v in value.items()}
    if isinstance(value, list):
        return [copy_of(v) for v in value]
    return value.detach().clone() if isinstance(value, Tensor) else value
