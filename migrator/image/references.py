"""Objrefs: each defined once, before it is used, and used only as what it is.

What a record defines and uses is read off its fields: `objref` defines (in a record) or uses (in an
item of an array), `<what>_objref` uses. 0 is "none" and never defined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from typing import NoReturn

from migrator.image.codec import Record

MAX_OBJECTS = 1 << 20

# Objects that come again in later rounds, because they change while the tasks still run.
RESENT = frozenset({"Mm", "Shm", "SharedFile", "Fs", "Sighand", "Signal", "File", "FileTable"})

# The kinds of object that a field takes. A field that is not here takes any kind.
WANTED: dict[str, tuple[str, ...]] = {
    "mm_objref": ("Mm",),
    "files_objref": ("FileTable",),
    "fs_objref": ("Fs",),
    "sighand_objref": ("Sighand",),
    "signal_objref": ("Signal",),
    "cred_objref": ("Cred",),
    "exe_objref": ("MappedFile", "SharedFile", "Shm"),
    "name_objref": ("Name",),
    "file_objref": ("File",),
    "epoll_objref": ("File",),
    "pipe_objref": ("Pipe",),
    "socket_objref": ("Socket",),
    "peer_objref": ("Socket",),
    "shared_objref": ("Shm", "SharedFile"),
    "queue_objref": ("MqQueue",),
    "owned_objref": ("File", "MappedFile"),
    "inotify_objref": ("Inotify",),
    "pty_objref": ("Pty",),
}

# Two ends that refer to each other: one of them is used before it is defined. Checked at the trailer.
FORWARD = frozenset({"peer_objref"})

# Checked with the rest of the mapping, where its kind is known.
_CHECKED_ELSEWHERE = frozenset({"Vmas"})


class _Plan:
    """What the fields of one kind of record define and use."""

    __slots__ = ("defines", "items", "reserved", "uses")

    def __init__(self, cls: type[Record]) -> None:
        names = [f.name for f in fields(cls)] if cls._members else []  # type: ignore[arg-type]
        self.defines = "objref" in names
        self.reserved = "reserved" in names
        self.uses = [(n, attrgetter(n), WANTED.get(n)) for n in names if n.endswith("_objref")]
        self.items: list[tuple[str, list[str]]] = []
        if cls.__name__ in _CHECKED_ELSEWHERE:
            return
        for tail, kind in cls._tails if cls._members else ():
            if kind is not bytes and kind is not str:
                used = [name for name in kind._plain if name == "objref" or name.endswith("_objref")]
                if used:
                    self.items.append((tail, used))


class References:
    """The objects of one stream. `fail` is called with a message, and raises."""

    def __init__(self, fail: Callable[[str], NoReturn]) -> None:
        self._fail = fail
        self._kinds: dict[int, str] = {}
        self._forward: dict[int, str] = {}
        self._plans: dict[type[Record], _Plan] = {}

    def check(self, record: Record) -> None:
        cls = type(record)
        plan = self._plans.get(cls)
        if plan is None:
            plan = self._plans[cls] = _Plan(cls)
        if plan.reserved and getattr(record, "reserved"):  # noqa: B009 - not a field of every record
            self._fail("a reserved field is not zero")
        kinds = self._kinds
        for name, get, wanted in plan.uses:
            objref = get(record)
            if objref and (wanted is None or kinds.get(objref) not in wanted):
                self._use_field(name, objref)
        for tail, names in plan.items:
            for item in getattr(record, tail):
                for name in names:
                    self._use_field(name, getattr(item, name))
        if plan.defines:
            objref = record.objref  # type: ignore[attr-defined]
            if objref > 0 and objref not in kinds and len(kinds) < MAX_OBJECTS:
                kinds[objref] = cls.__name__
            else:
                self._define(objref, cls.__name__)

    def use(self, objref: int, kind: str, what: str, *others: str) -> None:
        """`what` refers to an object that must be there and of this kind, or of one of the others."""
        have = self._kinds.get(objref)
        if have is None:
            self._fail(f"{what}: objref {objref} is not defined")
        if have != kind and have not in others:
            self._fail(f"{what}: objref {objref} is a {have}, not a {' or a '.join((kind, *others))}")

    def finish(self) -> None:
        """At the trailer: what was referred to in advance must have come."""
        for objref, name in self._forward.items():
            if objref not in self._kinds:
                self._fail(f"{name} {objref} never came")
            if self._kinds[objref] not in WANTED[name]:
                self._fail(f"{name} {objref} is a {self._kinds[objref]}, not a {' or a '.join(WANTED[name])}")

    def _define(self, objref: int, kind: str) -> None:
        if objref <= 0:
            self._fail(f"objref {objref} is not positive")
        have = self._kinds.get(objref)
        if have is None:
            if len(self._kinds) >= MAX_OBJECTS:
                self._fail(f"more than {MAX_OBJECTS} objects")
            self._kinds[objref] = kind
        elif have != kind:
            self._fail(f"objref {objref} is a {have} already")
        elif kind not in RESENT:
            self._fail(f"objref {objref} comes twice")

    def _use_field(self, name: str, objref: int) -> None:
        if not objref:
            return
        have = self._kinds.get(objref)
        if have is None:
            if name in FORWARD and objref > 0:
                if len(self._forward) >= MAX_OBJECTS:
                    self._fail(f"more than {MAX_OBJECTS} objects")
                self._forward[objref] = name
                return
            self._fail(f"{name} {objref} is not defined")
        wanted = WANTED.get(name)
        if wanted is not None and have not in wanted:
            self._fail(f"{name} {objref} is a {have}, not a {' or a '.join(wanted)}")
