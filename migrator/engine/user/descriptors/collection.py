"""All open file descriptions of a tree, fetched: each once, whoever holds it.

Thousands of descriptors are common, and this is done while the tree stands still: the system calls for them are made
in one go (migrator.linux.batch).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from migrator.engine.user.descriptors import fdinfo
from migrator.engine.user.descriptors.classify import Obstacle, Root, classify
from migrator.engine.user.descriptors.description import Description, DescriptorTable, Holder, Slot
from migrator.engine.user.descriptors.fdinfo import FdInfo
from migrator.errors import CheckpointFailed
from migrator.linux import descriptors
from migrator.linux.batch import Area, Strings, each, raise_first
from migrator.linux.stat import STAT_SIZE, Status
from migrator.linux.sys import KCMP_FILE
from migrator.linux.x86_64 import NR

T = TypeVar("T")

_AT_ONCE = 1024  # descriptors that are looked at in one go: each needs one more of ours meanwhile
_INFO, _LINK = 1024, 512  # bytes that are enough for most of fdinfo and for most paths
_AT_FDCWD, _AT_SYMLINK_NOFOLLOW = -100, 0x100


class _Item(NamedTuple):
    table: DescriptorTable
    process: Holder
    number: int

    def __str__(self) -> str:
        return f"pid {self.process.pid} fd {self.number}"


class _Seen(NamedTuple):
    """What a fetched descriptor is, by what the kernel says of it."""

    fd: int  # ours
    status: Status
    link: str
    owned: bool


class Collection:
    """All descriptors of stopped processes, fetched. `close()` gives back what was fetched.

    Raises CheckpointFailed naming pid and descriptor if one cannot be carried; the workload is untouched.
    """

    def __init__(self, processes: Sequence[Holder]) -> None:
        self.tables: list[DescriptorTable] = []
        self.descriptions: list[Description] = []
        self._buckets: dict[tuple[int, int, int], list[Description]] = {}
        self._last: dict[int, tuple[int, Description]] = {}  # number -> (pid, description) met last
        descriptors.allow_many_files()
        self.root = Root(processes[0].pid)
        ordered: list[DescriptorTable] = []
        try:
            for process in processes:
                place, known = search(ordered, partial(_order_tables, process))
                if known:
                    ordered[place].processes.append(process)
                else:
                    self.tables.append(DescriptorTable([process]))
                    ordered.insert(place, self.tables[-1])
            owners = [(table, table.processes[0]) for table in self.tables]
            items = [_Item(t, p, number) for t, p in owners for number in fdinfo.numbers(p.pid)]
            for first in range(0, len(items), _AT_ONCE):
                self._add(items[first : first + _AT_ONCE])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for description in self.descriptions:
            os.close(description.fd)
        self.descriptions.clear()
        if self.root.fd >= 0:
            self.root.close()
            self.root.fd = -1

    def _add(self, items: Sequence[_Item]) -> None:
        infos = _infos(items)
        inherited = self._inherited(items)
        seen = iter(self._fetch([item for i, item in enumerate(items) if i not in inherited]))
        try:
            for i, (item, info) in enumerate(zip(items, infos, strict=True)):
                known = self._last[item.number][1] if i in inherited else None
                description = known or self._description(item, next(seen), info)
                description.holders.append((item.process, item.number))
                self._last[item.number] = item.process.pid, description
                item.table.slots.append(Slot(item.number, description, info.cloexec, info.locks))
        finally:
            self.root.known.clear()
            for left in seen:
                os.close(left.fd)

    def _inherited(self, items: Sequence[_Item]) -> set[int]:
        """Which are the same description as what was met last under that number: a child mostly has its parent's."""
        last = {number: pid for number, (pid, _) in self._last.items()}
        asked, before = [], []
        for i, item in enumerate(items):
            if item.number in last:
                asked.append(i)
                before.append(last[item.number])
            last[item.number] = item.process.pid
        numbers = [items[i].number for i in asked]
        pids = [items[i].process.pid for i in asked]
        (orders,) = each(len(asked), (NR["kcmp"], before, pids, KCMP_FILE, numbers, numbers))
        raise_first(orders, "kcmp", [items[i] for i in asked])
        return {i for i, order in zip(asked, orders, strict=True) if order == 0}

    def _fetch(self, items: Sequence[_Item]) -> list[_Seen]:
        count = len(items)
        (fds,) = each(count, (NR["pidfd_getfd"], [i.process.pidfd for i in items], [i.number for i in items], 0))
        try:
            raise_first(fds, "pidfd_getfd", items)
            links, states, owners = Area(_LINK, count), Area(STAT_SIZE, count), Area(8, count)
            paths = Strings([b"/proc/self/fd/%d" % fd for fd in fds])
            lengths, results, _ = each(
                count,
                (NR["readlink"], paths.addresses, links.addresses, _LINK),
                (NR["fstat"], fds, states.addresses),
                (NR["fcntl"], fds, descriptors.F_GETOWN_EX, owners.addresses),  # EBADF of O_PATH: nobody
            )
            raise_first(lengths, "readlink", items)
            raise_first(results, "fstat", items)
            texts = [
                os.fsdecode(links.get(i, length)) if length < _LINK else os.readlink(f"/proc/self/fd/{fds[i]}")
                for i, length in enumerate(lengths)
            ]
            self._look_up(texts)
        except BaseException:
            for fd in fds:
                if fd >= 0:
                    os.close(fd)
            raise
        pids = owners.view.cast("i")[1::2].tolist()
        return [
            _Seen(fds[i], Status.unpack(states.view, i * states.stride), texts[i], pids[i] != 0) for i in range(count)
        ]

    def _look_up(self, links: Sequence[str]) -> None:
        """What the paths lead to in the tree: classify() asks for it one by one."""
        paths = [path for link in links if link[:1] == "/" and (path := self.root.inside(link)) is not None]
        names = Strings([os.fsencode(path.lstrip("/") or ".") for path in paths])
        states = Area(STAT_SIZE, len(paths))
        (results,) = each(
            len(paths),
            (NR["newfstatat"], self.root.fd, names.addresses, states.addresses, _AT_SYMLINK_NOFOLLOW),
        )
        for i, (path, result) in enumerate(zip(paths, results, strict=True)):
            self.root.known[path] = Status.unpack(states.view, i * states.stride) if result == 0 else None

    def _description(self, item: _Item, seen: _Seen, info: FdInfo) -> Description:
        status = seen.status
        try:
            bucket = self._buckets.setdefault((status.st_dev, status.st_ino, info.flags), [])
            place, known = search(bucket, partial(_order_files, seen.fd)) if bucket else (0, False)
            if known:
                os.close(seen.fd)
                return bucket[place]
            verdict = classify(seen.link, status, info, self.root)
        except BaseException as error:
            os.close(seen.fd)
            if not isinstance(error, Obstacle):
                raise
            raise CheckpointFailed(f"{item}: {error}", hint="the workload runs on, untouched") from None
        made = Description(seen.fd, status, info.flags, info, verdict.kind, verdict.path, self.root, owned=seen.owned)
        bucket.insert(place, made)
        self.descriptions.append(made)
        return made


def _infos(items: Sequence[_Item]) -> list[FdInfo]:
    """fdinfo of each. Raises OSError naming it."""
    count = len(items)
    paths = Strings([b"/proc/%d/fdinfo/%d" % (item.process.pid, item.number) for item in items])
    texts = Area(_INFO, count)
    (fds,) = each(count, (NR["openat"], _AT_FDCWD, paths.addresses, os.O_RDONLY | os.O_CLOEXEC))
    lengths, _ = each(count, (NR["read"], fds, texts.addresses, _INFO), (NR["close"], fds))
    raise_first(fds, "open of fdinfo", items)
    raise_first(lengths, "read of fdinfo", items)
    return [
        # one with many entries or locks is read again, to its end
        fdinfo.parse(texts.get(i, length)) if length < _INFO // 2 else fdinfo.read(item.process.pid, item.number)
        for i, (item, length) in enumerate(zip(items, lengths, strict=True))
    ]


def _order_tables(process: Holder, table: DescriptorTable) -> int:
    return descriptors.order_tables(process.pid, table.processes[0].pid)


def _order_files(fd: int, description: Description) -> int:
    return descriptors.order_files(fd, description.fd)


def search(ordered: list[T], compare: Callable[[T], int]) -> tuple[int, bool]:
    """(place, whether it is there) by binary search in the kernel's own order of objects (kcmp(2)).

    Anonymous inodes all look the same to stat(2): comparing each with each would be quadratic."""
    low, high = 0, len(ordered)
    while low < high:
        middle = (low + high) // 2
        result = compare(ordered[middle])
        if result == 0:
            return middle, True
        if result < 0:
            high = middle
        else:
            low = middle + 1
    return low, False
