"""All open file descriptions of a tree, fetched: each once, whoever holds it.

Thousands of descriptors are common, and this is done while the tree stands still: the system calls for them are made
in one go (migrator.linux.batch).
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import NamedTuple, TypeVar

from migrator.engine.user.descriptors import fdinfo
from migrator.engine.user.descriptors.ahead import Place
from migrator.engine.user.descriptors.classify import Classification, Obstacle, Root, check_locks, classify
from migrator.engine.user.descriptors.description import Description, DescriptorTable, Holder, Slot
from migrator.engine.user.descriptors.fdinfo import FdInfo
from migrator.engine.user.descriptors.predumped import Known
from migrator.engine.user.descriptors.standing import Listed, Standing
from migrator.errors import CheckpointFailed
from migrator.image.records_files import FileKind
from migrator.linux import descriptors
from migrator.linux.batch import Area, Strings, each, raise_first
from migrator.linux.file_locks import LockList
from migrator.linux.stat import STAT_SIZE, Status, fingerprints
from migrator.linux.sys import KCMP_FILE
from migrator.linux.x86_64 import NR

T = TypeVar("T")
Flags = Callable[[Holder, Sequence[int]], list[int]]

_AT_ONCE = 1024  # descriptors that are looked at in one go: each needs one more of ours meanwhile
_INFO, _LINK = 1024, 512  # bytes that are enough for most of fdinfo and for most paths
MANY = 1000  # numbers of a process from which it pays to ask it, and to read the list of locks
_FORMAT = 0o170000  # of a mode
_AT_FDCWD, _AT_SYMLINK_NOFOLLOW = -100, 0x100


class _Item(NamedTuple):
    table: DescriptorTable
    process: Holder
    number: int
    flags: int  # FD_CLOEXEC or 0; negative: not known yet

    def __str__(self) -> str:
        return f"pid {self.process.pid} fd {self.number}"


class _Fetched:
    """Descriptors fetched together, and what the kernel says of each without words. `fds` are ours; one that became a
    description's, or was closed, is -1."""

    def __init__(self, items: Sequence[_Item]) -> None:
        count = len(items)
        self.items = items
        (self.fds,) = each(count, (NR["pidfd_getfd"], [i.process.pidfd for i in items], [i.number for i in items], 0))
        try:
            raise_first(self.fds, "pidfd_getfd", items)
            self._states, owners = Area(STAT_SIZE, count), Area(8, count)
            results, self.flags, _, signals = each(
                count,
                (NR["fstat"], self.fds, self._states.addresses),
                (NR["fcntl"], self.fds, fcntl.F_GETFL),
                (NR["fcntl"], self.fds, descriptors.F_GETOWN_EX, owners.addresses),  # EBADF of O_PATH: nobody
                (NR["fcntl"], self.fds, descriptors.F_GETSIG),
            )
            raise_first(results, "fstat", items)
            raise_first(self.flags, "F_GETFL", items)
        except BaseException:
            self.close()
            raise
        pids = owners.view.cast("i")[1::2]
        self.owned = [pid != 0 or signal > 0 for pid, signal in zip(pids, signals, strict=False)]
        self.fingerprints = fingerprints(self._states.view)

    def status(self, at: int) -> Status:
        return Status.unpack(self._states.view, at * self._states.stride)

    def take(self, at: int) -> int:
        fd, self.fds[at] = self.fds[at], -1
        return fd

    def close(self) -> None:
        for fd in self.fds:
            if fd >= 0:
                os.close(fd)
        self.fds = []


def make_room(processes: Sequence[Holder]) -> None:
    """Ahead of the freeze, while they run: so that all that they have open can be fetched at once, and what does not
    stand once more. Raises OSError if one has ended."""
    descriptors.allow_many_files(_AT_ONCE + 2 * sum(fdinfo.count(process.pid) for process in processes))


def begin(processes: Sequence[Holder]) -> LockList | None:
    """As soon as all are stopped: begin with what takes a while, if there are enough descriptors for it."""
    return LockList() if any(fdinfo.count(process.pid) >= MANY for process in processes) else None


class Collection:
    """All descriptors of stopped processes, fetched. `close()` gives back what was fetched.

    `standing` are those that may be as they were written while they ran: what is has no description here, but its line
    in its table. `known` is what was found then, and what is still so is not looked into again. `flags` asks a
    process for F_GETFD of its numbers: with that and the `locks` of this host, begun to be read when all had stopped,
    fdinfo, which takes longer than all other questions together, need not be read of most.

    Raises CheckpointFailed naming pid and descriptor if one cannot be carried; the workload is untouched.
    """

    def __init__(
        self,
        processes: Sequence[Holder],
        known: Mapping[Place, Known] | None = None,
        flags: Flags | None = None,
        locks: LockList | None = None,
        standing: Standing | None = None,
    ) -> None:
        self.standing = standing if locks is not None else None
        self._flags = flags if locks is not None else None
        self._fallen: list[Place] = []  # they stood until another description of their inode was met
        self.tables: list[DescriptorTable] = []
        self.descriptions: list[Description] = []
        self._known = known or {}
        self._unread: list[tuple[_Item, Slot]] = []  # those whose fdinfo was not read
        self._buckets: dict[tuple[int, int, int], list[Description]] = {}
        self._last: dict[int, tuple[int, Description]] = {}  # number -> (pid, description) met last
        make_room(processes)
        self.root = Root(processes[0].pid)
        ordered: list[DescriptorTable] = []
        try:
            for process in processes:
                place, there = search(ordered, partial(_order_tables, process))
                if there:
                    ordered[place].processes.append(process)
                else:
                    self.tables.append(DescriptorTable([process]))
                    ordered.insert(place, self.tables[-1])
            listed = {table.processes[0].pid: self._list(table) for table in self.tables}
            if self.standing is not None:
                self.standing.look(self.root.fd, listed)
            self._add_all([item for table in self.tables for item in self._items(table, listed)])
            if self._unread or self.standing is not None:
                assert locks is not None
                locked = locks.inodes()
                if self.standing is not None:
                    self._settle(self.standing, self.standing.drop_locked(locked), listed)
                self._read_of_locked(locked)
        except BaseException:
            self.close()
            raise

    def with_standing(self) -> tuple[list[Description], list[DescriptorTable]]:
        """All descriptions and tables, with those pipes and connections that stand."""
        if self.standing is None:
            return self.descriptions, self.tables
        slots: dict[int, list[Slot]] = {}
        descriptions = list(self.descriptions)
        for description in self.standing.descriptions(self.root):
            ((process, number),) = description.holders
            slots.setdefault(process.pid, []).append(Slot(number, description, description.info.cloexec))
            descriptions.append(description)
        tables = [
            DescriptorTable(table.processes, table.slots + slots.get(table.processes[0].pid, []))
            for table in self.tables
        ]
        return descriptions, tables

    def close(self) -> None:
        for description in self.descriptions:
            os.close(description.fd)
        self.descriptions.clear()
        if self.standing is not None:
            self.standing.close()
        if self.root.fd >= 0:
            self.root.close()
            self.root.fd = -1

    def _settle(self, standing: Standing, fallen: Sequence[Place], listed: Mapping[int, Listed]) -> None:
        """Look at those that stood and have fallen since, and note what stands now."""
        tables = {table.processes[0].pid: table for table in self.tables}
        self._add_all(
            [
                _Item(tables[pid], tables[pid].processes[0], number, listed[pid].flag_of(number))
                for pid, number in (*self._fallen, *fallen)
            ]
        )
        for pid, table in tables.items():
            table.standing = standing.entries(pid)

    def _list(self, table: DescriptorTable) -> Listed:
        process = table.processes[0]
        count = fdinfo.count(process.pid)
        if self._flags is None or count < MANY:
            numbers = fdinfo.numbers(process.pid)
            return Listed(numbers, [-1] * len(numbers))
        known = self.standing.listed.get(process.pid) if self.standing is not None else None
        if known is not None and known.numbers and len(known.numbers) == count:
            asked = self._flags(process, known.numbers)
            if min(asked) >= 0:  # a listing would have taken longer
                return Listed(known.numbers, asked)
        numbers = fdinfo.numbers(process.pid)
        return Listed(numbers, self._flags(process, numbers))

    def _items(self, table: DescriptorTable, listed: Mapping[int, Listed]) -> Iterator[_Item]:
        """Those of a table that are to be looked at one by one."""
        process = table.processes[0]
        there = listed[process.pid]
        if self.standing is None:
            return (_Item(table, process, *pair) for pair in zip(*there, strict=True))
        others = self.standing.others(process.pid, there)
        return (_Item(table, process, number, there.flag_of(number)) for number in others)

    def _add_all(self, items: Sequence[_Item]) -> None:
        for first in range(0, len(items), _AT_ONCE):
            self._add(items[first : first + _AT_ONCE])

    def _add(self, items: Sequence[_Item]) -> None:
        inherited = self._inherited(items)
        fetched = _Fetched([item for i, item in enumerate(items) if i not in inherited] if inherited else items)
        if self.standing is not None:
            self._fallen += self.standing.drop([(device, inode) for device, inode, *_ in fetched.fingerprints])
        try:
            quick = self._quick(fetched)
            plain = self._plain(fetched, quick)
            rest = [at for at in range(len(fetched.items)) if at not in quick and at not in plain]
            links = dict(zip(rest, self._links([fetched.fds[at] for at in rest]), strict=True))
            infos = iter(_infos([item for i, item in enumerate(items) if i in inherited]))
            more = dict(zip(rest, _infos([fetched.items[at] for at in rest]), strict=True))
            at = -1
            for i, item in enumerate(items):
                if i in inherited:
                    info = next(infos)
                    description, cloexec = self._last[item.number][1], info.cloexec
                else:
                    at += 1
                    if at in quick:
                        description, info = self._as_known(fetched, at, *quick[at])
                    elif at in plain:
                        info = FdInfo(0, fetched.flags[at], bool(item.flags), {}, ino=fetched.fingerprints[at][1])
                        description = self._described(fetched, at, plain[at], info)
                    else:
                        info = more[at]
                        description = self._described(fetched, at, links[at], info)
                    cloexec = bool(item.flags) if item.flags >= 0 else info.cloexec
                description.holders.append((item.process, item.number))
                self._last[item.number] = item.process.pid, description
                slot = Slot(item.number, description, cloexec, info.locks)
                item.table.slots.append(slot)
                if i not in inherited and (at in quick or at in plain):
                    self._unread.append((item, slot))
        finally:
            self.root.known.clear()
            fetched.close()

    def _read_of_locked(self, locked: set[int] | None) -> None:
        """Read the fdinfo of those that are locked after all; of all, if that cannot be told."""
        doubtful = [pair for pair in self._unread if locked is None or pair[1].description.info.ino in locked]
        for first in range(0, len(doubtful), _AT_ONCE):
            part = doubtful[first : first + _AT_ONCE]
            for (item, slot), info in zip(part, _infos([item for item, _ in part]), strict=True):
                slot.locks = info.locks
                if info.locks:
                    description = slot.description
                    description.info, description.known = info, None
                    with _refused(item):
                        check_locks(description.path, info)

    def _quick(self, fetched: _Fetched) -> dict[int, tuple[Known, int]]:
        """Which are open on the file that was found there before, which is where it was; and their offsets. But they
        may be locked."""
        get, prints, flags = self._known.get, fetched.fingerprints, fetched.flags
        met = [
            (at, known)
            for at, (_, process, number, asked) in enumerate(fetched.items)
            if asked >= 0
            and (known := get((process.pid, number))) is not None
            and prints[at][:2] == known.fingerprint[:2]
            and not (flags[at] ^ known.info.flags) & (os.O_PATH | os.O_ACCMODE)
        ]
        names, there = Strings([known.name for _, known in met]), Area(STAT_SIZE, len(met))
        found, offsets = each(
            len(met),
            (NR["newfstatat"], self.root.fd, names.addresses, there.addresses, _AT_SYMLINK_NOFOLLOW),
            (NR["lseek"], [fetched.fds[at] for at, _ in met], 0, os.SEEK_CUR),
        )
        places = fingerprints(there.view) if met else []
        return {
            at: (known, offset)
            for (at, known), result, offset, place in zip(met, found, offsets, places, strict=True)
            if result == 0 and offset >= 0 and place[:2] == known.fingerprint[:2]
        }

    def _plain(self, fetched: _Fetched, quick: Container[int]) -> dict[int, Classification]:
        """Which are sockets or pipes without names: but for locks all is known of them."""
        nameless, out = _nameless(), {}
        for at, (item, flags, (device, _, _, mode, *_)) in enumerate(
            zip(fetched.items, fetched.flags, fetched.fingerprints, strict=True)
        ):
            kind = nameless.get((device, mode & _FORMAT))
            if kind is not None and item.flags >= 0 and not flags & os.O_PATH and at not in quick:
                out[at] = kind
        return out

    def _as_known(self, fetched: _Fetched, at: int, known: Known, pos: int) -> tuple[Description, FdInfo]:
        flags, info = fetched.flags[at], known.info
        same = pos == info.pos and flags == info.flags and not info.locks
        if not same:
            info = FdInfo(pos, flags, bool(fetched.items[at].flags), info.fields, ino=info.ino)
        elif not fetched.owned[at] and fetched.fingerprints[at] == known.fingerprint:
            return self._join(fetched, at, known.status, info, known), info
        return self._join(fetched, at, fetched.status(at), info, Classification(known.kind, known.path)), info

    def _described(self, fetched: _Fetched, at: int, what: Classification | str, info: FdInfo) -> Description:
        return self._join(fetched, at, fetched.status(at), info, what)

    def _join(
        self, fetched: _Fetched, at: int, status: Status, info: FdInfo, what: Known | Classification | str
    ) -> Description:
        """The description that a fetched descriptor is of: one that was met under another number, or a new one.

        `what` it is, or where its link points."""
        key = status.st_dev, status.st_ino, info.flags
        bucket = self._buckets.setdefault(key, [])
        place = 0
        if bucket:
            place, there = search(bucket, partial(_order_files, fetched.fds[at]))
            if there:
                return bucket[place]
        if isinstance(what, str):
            with _refused(fetched.items[at]):
                what = classify(what, status, info, self.root)
        known = what if isinstance(what, Known) else None
        owned = fetched.owned[at]
        fd = fetched.take(at)
        made = Description(fd, status, info.flags, info, what.kind, what.path, self.root, owned=owned, known=known)
        bucket.insert(place, made)
        self.descriptions.append(made)
        return made

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

    def _links(self, fds: Sequence[int]) -> list[str]:
        """Where /proc has the links of descriptors of ours; what is there is looked up for classify()."""
        count = len(fds)
        links, paths = Area(_LINK, count), Strings([b"/proc/self/fd/%d" % fd for fd in fds])
        (lengths,) = each(count, (NR["readlink"], paths.addresses, links.addresses, _LINK))
        raise_first(lengths, "readlink", fds)
        texts = [
            os.fsdecode(links.get(i, length)) if length < _LINK else os.readlink(f"/proc/self/fd/{fds[i]}")
            for i, length in enumerate(lengths)
        ]
        self._look_up(texts)
        return texts

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
        if own := [path for path in paths if self.root.own_sysctl(path)]:
            self.root.known.update(zip(own, self.root.stat_inside(own), strict=True))


@contextmanager
def _refused(item: _Item) -> Iterator[None]:
    try:
        yield
    except Obstacle as error:
        raise CheckpointFailed(f"{item}: {error}", hint="the workload runs on, untouched") from None


@cache
def _nameless() -> dict[tuple[int, int], Classification]:
    """What lies on the devices of all sockets and of all pipes without names: by device and format."""
    with socket.socket(socket.AF_UNIX) as made:
        of_sockets = os.fstat(made.fileno()).st_dev
    ends = os.pipe()
    of_pipes = os.fstat(ends[0]).st_dev
    for end in ends:
        os.close(end)
    return {
        (of_sockets, stat.S_IFSOCK): Classification(FileKind.SOCKET),
        (of_pipes, stat.S_IFIFO): Classification(FileKind.PIPE),
    }


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
