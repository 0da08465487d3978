"""Children whose descriptors are saved, and the copies that are given them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TypeVar

import pytest
from fakestub import Child, hide_control

from migrator.engine.user.descriptors import DescriptorDump, DescriptorRestore
from migrator.image.codec import HEADER, REGISTRY, Record
from migrator.image.objhash import ObjHash

T = TypeVar("T", bound=Record)


class Bytes:
    """Where records go, and come from: each is encoded and decoded again."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, rec: Record) -> None:
        self.encoded(rec.encode())

    def encoded(self, raw: bytes) -> None:
        kind, _ = HEADER.unpack_from(raw)
        self.records.append(REGISTRY[kind].decode(raw[8:]))

    def flush(self) -> None:
        pass

    def of(self, kind: type[T]) -> list[T]:
        return [rec for rec in self.records if isinstance(rec, kind)]


class Surroundings:
    """The context of a restore on this host, with memfds made by hand."""

    netns: str | None = None
    live = False

    def __init__(self) -> None:
        self.root_fd = os.open("/", os.O_PATH)
        self.pids: dict[int, int] = {}
        self.shm: dict[int, int] = {}

    def pid_of(self, vpid: int) -> int:
        return self.pids.get(vpid, 0)

    def open_shm(self, objref: int, flags: int) -> int:
        return os.open(f"/proc/self/fd/{self.shm[objref]}", flags)


class Moved:
    """Children saved, and what was made of them."""

    def __init__(self, *children: Child, context: Surroundings | None = None) -> None:
        self.context = context or Surroundings()
        self.stack = ExitStack()
        self.saved = Bytes()
        for child in children:
            child.stop()
        self.dump = DescriptorDump([c.process for c in children], ObjHash(), self.saved)
        self.dump.collect()
        self.tables = self.dump.write()
        self.copies: list[Child] = []

    def restore(
        self, children: list[Child], *, built: Callable[[], None] = lambda: None, dies: bool = False
    ) -> list[Child]:
        """The copies. `built` is called once they stand. `dies`: it ends ahead of activate(), and what that does
        is left to another."""
        self.copies = [self.stack.enter_context(Child(c.vpid)) for c in children]
        restore = DescriptorRestore(self.context)
        self.stack.callback(restore.close)
        self.context.pids.update({c.vpid: c.pid for c in self.copies})
        came = [rec.encode() for rec in self.saved.records]
        for rec in self.saved.records:
            restore.record(rec)
        for child, copy in zip(children, self.copies, strict=True):
            restore.install(copy, self.tables[child.pid])
        restore.finish(self.copies)
        # A second look compares the copy with them.
        assert [rec.encode() for rec in self.saved.records] == came
        self.moves = restore.moves
        self.late_locks = restore.late_locks
        built()
        if dies:
            monkey = self.stack.enter_context(pytest.MonkeyPatch.context())
            monkey.setattr(shutil, "rmtree", lambda *_, **__: None)  # the dead leave their directories
            restore.close()
            monkey.undo()
            return self.copies
        restore.activate()
        restore.close()
        return self.copies

    def __enter__(self) -> Moved:
        return self

    def __exit__(self, *what: object) -> None:
        self.dump.undo()
        self.stack.close()
        os.close(self.context.root_fd)


@pytest.fixture(autouse=True)
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_control(monkeypatch)


@pytest.fixture
def child() -> Iterator[Child]:
    with Child() as made:
        yield made


@pytest.fixture
def move() -> Iterator[Callable[..., Child]]:
    """Save a child and make a copy of it; numbers and flags are compared on the way."""
    with ExitStack() as stack:

        def moving(*children: Child, context: Surroundings | None = None) -> Child:
            before = children[0].ask("_flags()")
            moved = stack.enter_context(Moved(*children, context=context))
            copies = moved.restore(list(children))
            assert copies[0].ask("_flags()") == before
            return copies[0]

        yield moving
