"""The walk over all that can be reached from a module, a loss or a learner."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gametalearn.engine.errors import UnreplayableError
from gametalearn.engine.state.past import Past
from gametalearn.engine.state.records import (
    Digest,
    Entries,
    ObjectRecord,
    Record,
    plain_key,
    tokens_of,
    weakly,
)

__all__ = ["Visits", "Walk"]

MOST_ENTRIES = 20_000
"""Attributes and entries that are looked at in each call; a computation with more is not replayed."""
MOST_BYTES = 2**20
"""Of arrays, likewise."""

Visit = Callable[["Walk", Any, str], Hashable]
"""``visit(walk, value, what)``: takes a value down, and returns its key."""
Visits = tuple[tuple[Any, Visit], ...]
"""Kinds of values, and what is done with them; the first that fits."""


@dataclass
class Walk:
    """One walk over all that can be reached from a root.

    Attributes:
        own: the ``id`` of each module whose tensors are arguments.
        names: of the attributes that matter.
        everything: whether all attributes do.
        always: what is done with values that are looked at whenever they are met.
        once: what is done with all others, the first time.
        found: names that the functions on the way mention.
        computed: whether one of them computes names.
        checks: as in `Watch`.
        past: how to put things back.
        seen: the number of each object met, and the object, which so keeps its address.
    """

    own: frozenset[int]
    names: frozenset[str]
    everything: bool
    always: Visits
    once: Visits
    found: set[str] = field(default_factory=set)
    computed: bool = False
    checks: list[Record] = field(default_factory=list)
    past: Past = field(default_factory=Past)
    seen: dict[int, tuple[int, object]] = field(default_factory=dict)
    entries: int = 0
    bytes: int = 0

    def of(self, value: Any, what: str) -> Hashable:
        """The key of a value, whatever it is; ``what`` is its name in messages."""
        plain = plain_key(value)
        if plain is not None:
            return plain
        for kinds, visit in self.always:
            if isinstance(value, kinds):
                return visit(self, value, what)
        if self.met(value):
            return "seen", self.number(value)
        self.number(value)
        visit = next(visit for kinds, visit in self.once if isinstance(value, kinds))
        return visit(self, value, what)

    def met(self, value: object) -> bool:
        """Whether it was met before."""
        return id(value) in self.seen

    def number(self, value: object) -> int:
        """The number of an object: how many were met before it."""
        return self.seen.setdefault(id(value), (len(self.seen), value))[0]

    def relevant(self, names: Iterable[str]) -> list[str]:
        """Those of some names that matter."""
        return sorted(n for n in names if self.everything or n in self.names)

    def hold(
        self,
        what: str,
        read: Callable[[], Mapping[Any, Any] | None],
        values: Mapping[Any, Any],
        size: int | None = None,
    ) -> Hashable:
        """Take down a holder's entries, and follow their values."""
        self.count(len(values), what)
        self.checks.append(Entries(what, read, tokens_of(values), size))
        return self.follow(values, what)

    def attributes(self, value: Any, entries: Mapping[str, Any], what: str) -> Hashable:
        """Take down an object's or a class's own attributes, and follow their values."""
        self.count(len(entries), what)
        names, tokens = frozenset(vars(value)), tokens_of(entries)
        self.checks.append(ObjectRecord(what, weakly(value), type(value), names, tokens))
        return self.follow(entries, what)

    def follow(self, entries: Mapping[Any, Any], what: str) -> Hashable:
        """The keys of entries, names and values."""
        keys = []
        for name, value in entries.items():  # no generator: it would cost a frame of the stack
            of_name = name if isinstance(name, str) else self.of(name, what)
            # what `super()` needs: a class that is not called
            inner = "" if of_name == "cell __class__" else f"{what}.{name}"
            keys.append((of_name, self.of(value, inner)))
        return tuple(keys)

    def digest(self, value: Any, read: Callable[[Any], Hashable], what: str) -> Hashable:
        """Take down what ``read`` tells of an object; that is its key."""
        self.checks.append(Digest(what, weakly(value, read), expected := read(value)))
        return expected

    def count(self, entries: int, what: str) -> None:
        """Refuse a computation that depends on too many values."""
        self.entries += entries
        if self.entries > MOST_ENTRIES:
            raise UnreplayableError(
                f"it depends on more than {MOST_ENTRIES} values, among them those in {what}"
            )

    def count_bytes(self, size: int, what: str) -> None:
        """Refuse a computation that depends on too many numbers in arrays."""
        self.bytes += size
        if self.bytes > MOST_BYTES:
            raise UnreplayableError(
                f"it depends on arrays of more than {MOST_BYTES} bytes, among them {what}; "
                "make them tensors"
            )
