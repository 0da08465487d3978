"""Descriptors that stand: in the freeze they are just as they were when they were written while the tasks ran.

Of thousands of files, pipes and connections few change meanwhile. So ahead of the freeze all calls that tell of a
change are laid out, beside what they answered then; in the freeze they are made, and the answers compared column by
column, as bytes. What differs in anything has fallen: it is looked at one by one, as if it had not been known. Of
what stands nothing is written again, and nothing is made of it here but its line in the table of descriptors.

A file stands only if no other descriptor of the tree is open on the same inode: whether two are one description is
not asked here.
"""

from __future__ import annotations

import bisect
import fcntl
import os
import select
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from migrator.engine.user.descriptors.ahead import Entry, Facts, Place
from migrator.engine.user.descriptors.classify import Root
from migrator.engine.user.descriptors.description import Description, Holder
from migrator.engine.user.descriptors.fdinfo import FdInfo
from migrator.engine.user.descriptors.other_ends import Ends, ends_of
from migrator.engine.user.descriptors.pipes import USUAL, Full
from migrator.engine.user.descriptors.questions import Answers, Questions
from migrator.engine.user.descriptors.sockopts import Default
from migrator.image.records_files import FileKind, Socket
from migrator.linux import descriptors
from migrator.linux.batch import Area, Strings, Table, differing
from migrator.linux.stat import FINGERPRINT_WORDS, STAT_SIZE, Fingerprint, Status
from migrator.linux.x86_64 import MINUS_ONE, NR

_STAT_WORDS = STAT_SIZE // 8
_MODE_USER_GROUP = 6, 7, 8  # of the half words of struct stat
_AT_SYMLINK_NOFOLLOW = 0x100
_RDHUP = 0x2000

Inode = tuple[int, int]  # st_dev, st_ino


class Candidate(NamedTuple):
    """What was found under a number of a running process, and written. `objref` is that of its File."""

    process: Holder
    number: int
    objref: int
    cloexec: bool
    inode: Inode
    kernel_ino: int  # as /proc/locks has it


class _Group:
    """Candidates of one kind. `fds` are ours, a column; `fallen` are indices."""

    def __init__(self, candidates: Sequence[Candidate], states: Area) -> None:
        """`states`: where they are told to when they are looked at."""
        self.candidates = candidates
        self._states = states
        self.fallen: set[int] = set()
        self._at = {candidate.inode: at for at, candidate in enumerate(candidates)}
        pidfds = [candidate.process.pidfd for candidate in candidates]
        numbers = [candidate.number for candidate in candidates]
        self._fetch = Table(len(candidates), (NR["pidfd_getfd"], pidfds, numbers, 0))
        self._fetched = False

    @property
    def fds(self) -> memoryview:
        return self._fetch.results(0)

    def look(self, root_fd: int) -> None:
        """Fetch all, and see which have fallen."""
        if self.candidates:
            self._fetched = True
            self._fetch.walk()
            self._look(root_fd)

    def indices_of(self, inodes: Iterable[Inode]) -> set[int]:
        return {at for inode in inodes if (at := self._at.get(inode)) is not None}

    def drop(self, fallen: Iterable[int]) -> None:
        self.fallen |= set(fallen)

    def stand(self) -> list[int]:
        return [at for at in range(len(self.candidates)) if at not in self.fallen]

    def close(self, indices: Iterable[int] | None = None) -> None:
        """Let go of these, or of all."""
        if self._fetched:
            fds = self.fds
            held = [at for at in (range(len(fds)) if indices is None else indices) if fds[at] >= 0]
            descriptors.close_all(fds[at] for at in held)
            for at in held:
                fds[at] = -1

    def descriptions(self, kind: FileKind, root: Root) -> Iterator[Description]:
        """Of those that stand."""
        fds, states = self.fds.tolist(), self._states
        for at in self.stand():
            process, number, objref, cloexec, *_ = self.candidates[at]
            status = Status.unpack(states.view, at * states.stride)
            info = FdInfo(0, 0, cloexec, {})
            yield Description(fds[at], status, 0, info, kind, "", root, [(process, number)], objref)

    def _look(self, root_fd: int) -> None:
        raise NotImplementedError


class StandingFiles(_Group):
    """Regular files that were opened by a path."""

    def __init__(self, files: Sequence[tuple[Candidate, int, int, Fingerprint, bytes]]) -> None:
        """Of each its F_GETFL, its offset, its state, and its path from the root."""
        count = len(files)
        super().__init__([candidate for candidate, *_ in files], Area(STAT_SIZE, count))
        self._there, self._owners = Area(STAT_SIZE, count), Area(8, count)
        self._names = Strings([name for *_, name in files])
        self._ask = Table(
            count,
            (NR["fstat"], 0, self._states.addresses),
            (NR["fcntl"], 0, fcntl.F_GETFL),
            (NR["fcntl"], 0, descriptors.F_GETOWN_EX, self._owners.addresses),
            (NR["fcntl"], 0, descriptors.F_GETSIG),
            (NR["lseek"], 0, 0, os.SEEK_CUR),
            (NR["close"], 0),
            (NR["newfstatat"], 0, self._names.addresses, self._there.addresses, _AT_SYMLINK_NOFOLLOW),
        )
        states = [state for _, _, _, state, _ in files]
        zeros = bytes(8 * count)
        self._expected = [
            zeros,
            array("q", [flags for _, flags, *_ in files]).tobytes(),
            zeros,
            zeros,
            array("q", [offset for _, _, offset, *_ in files]).tobytes(),
            zeros,
            zeros,
            zeros,
            *(_column(column) for column in zip(*states, strict=True)),
            *(_column([state[at] for state in states]) for at in (0, 1)),
        ]

    def _look(self, root_fd: int) -> None:
        for place in range(6):
            self._ask.put(place, 1, self.fds)
        self._ask.put(6, 1, root_fd)
        self._ask.walk()
        self._fetched = False  # they are closed again
        words, there = self._states.view.cast("Q"), self._there.view.cast("Q")
        answers = [
            *(self._ask.results(place) for place in range(7)),
            self._owners.view.cast("Q"),
            *(words[at::_STAT_WORDS] for at in FINGERPRINT_WORDS),
            *(there[at::_STAT_WORDS] for at in (0, 1)),
        ]
        self.drop(differing(answers, self._expected))


class StandingPipes(_Group):
    """Both ends of pipes: the first half of the candidates are those for reading, the second those for writing."""

    def __init__(self, pipes: Sequence[tuple[int, tuple[Candidate, Facts], tuple[Candidate, Facts]]]) -> None:
        """Of each its objref, and both ends with what was known of them."""
        both = [read for _, read, _ in pipes] + [write for _, _, write in pipes]
        count = len(both)
        super().__init__([candidate for candidate, _ in both], Area(STAT_SIZE, count))
        self._objrefs = [objref for objref, _, _ in pipes]
        self._owners, self._amounts = Area(8, count), Area(8, len(pipes))
        self._ask = Table(
            count,
            (NR["fstat"], 0, self._states.addresses),
            (NR["fcntl"], 0, fcntl.F_GETFL),
            (NR["fcntl"], 0, descriptors.F_GETOWN_EX, self._owners.addresses),
            (NR["fcntl"], 0, descriptors.F_GETSIG),
        )
        self._measure = Table(
            len(pipes),
            (NR["fcntl"], 0, fcntl.F_GETPIPE_SZ),
            (NR["ioctl"], 0, descriptors.FIONREAD, self._amounts.addresses),
        )
        facts = [known for _, known in both]
        zeros = bytes(8 * count)
        self._expected = [
            zeros,
            array("q", [flags for _, _, _, flags, *_ in facts]).tobytes(),
            zeros,
            zeros,
            zeros,
            *(_column([known[at] for known in facts]) for at in (0, 1)),
            *(array("I", [known[at] for known in facts]).tobytes() for at in (2, 4, 5)),
        ]
        self._measured = [array("q", [USUAL]).tobytes() * len(pipes), bytes(8 * len(pipes))]

    def indices_of(self, inodes: Iterable[Inode]) -> set[int]:
        return self._whole(super().indices_of(inodes))

    def drop(self, fallen: Iterable[int]) -> None:
        super().drop(self._whole(fallen))

    def _whole(self, ends: Iterable[int]) -> set[int]:
        """With the other ends of the same pipes."""
        count = len(self._objrefs)
        return {at for end in ends for at in (end % count, end % count + count)}

    def _look(self, root_fd: int) -> None:
        for place in range(4):
            self._ask.put(place, 1, self.fds)
        self._ask.walk()
        words, halves = self._states.view.cast("Q"), self._states.view.cast("I")
        answers = [
            *(self._ask.results(place) for place in range(4)),
            self._owners.view.cast("Q"),
            *(words[at::_STAT_WORDS] for at in (0, 1)),
            *(halves[at :: 2 * _STAT_WORDS] for at in _MODE_USER_GROUP),
        ]
        self.drop(differing(answers, self._expected))
        count = len(self._objrefs)
        for place in range(2):
            self._measure.put(place, 1, self.fds[:count])
        self._measure.walk()
        self.drop(differing([self._measure.results(place) for place in range(2)], self._measured))

    def full(self) -> list[Full]:
        """Those in which bytes wait, of those that stand."""
        amounts = self._amounts.view.cast("i")[::2].tolist()
        return [
            Full(fd, objref, amount, USUAL, False)
            for at, (fd, objref, amount) in enumerate(zip(self.fds.tolist(), self._objrefs, amounts, strict=False))
            if amount and at not in self.fallen
        ]


class Connection(NamedTuple):
    """One that stands: `fd` is ours, `objref` that of its Socket."""

    fd: int
    objref: int
    ends: Ends
    candidate: Candidate

    def __str__(self) -> str:
        return f"pid {self.candidate.process.pid} fd {self.candidate.number}"


class StandingConnections(_Group):
    """Connections of TCP of one family."""

    def __init__(
        self,
        family: int,
        connections: Sequence[tuple[Candidate, Socket, Answers]],
        defaults: Sequence[Default],
    ) -> None:
        """Of each what the stream has of it, and what it answered when that was written."""
        self._questions = Questions(family, len(connections), defaults)
        super().__init__([candidate for candidate, _, _ in connections], self._questions.states)
        self._objrefs = [rec.objref for _, rec, _ in connections]
        self._ends = [ends_of(rec.local, rec.peer) for _, rec, _ in connections]
        answers = [known for _, _, known in connections]
        self._expected = [array("q", column).tobytes() for column in zip(*answers, strict=True)]

    def _look(self, root_fd: int) -> None:
        self._questions.ask(self.fds)
        self.drop(differing(self._questions.answers, self._expected))
        poll = select.poll()
        at = {fd: at for at, fd in enumerate(self.fds.tolist()) if at not in self.fallen}
        for fd in at:
            poll.register(fd, select.POLLPRI | _RDHUP)
        self.drop(at[fd] for fd, _ in poll.poll(0))

    def connections(self) -> Iterator[Connection]:
        fds = self.fds.tolist()
        for at in self.stand():
            yield Connection(fds[at], self._objrefs[at], self._ends[at], self.candidates[at])


class Listed(NamedTuple):
    """The numbers that a process has open, in order, each with FD_CLOEXEC or 0; negative if that was not asked."""

    numbers: Sequence[int]
    flags: Sequence[int]

    def flag_of(self, number: int) -> int:
        return self.flags[bisect.bisect_left(self.numbers, number)]


class Standing:
    """All candidates of a tree. After look() those that stand; close() lets go of them.

    listed: of each process, by pid, all that it had open when it was looked at"""

    def __init__(
        self,
        files: StandingFiles,
        pipes: StandingPipes,
        connections: Sequence[StandingConnections],
        listed: Mapping[int, Listed],
    ) -> None:
        self.listed = listed
        self._files, self._pipes, self._connections = files, pipes, connections
        self._groups: list[_Group] = [files, pipes, *connections]
        self._entries: dict[int, list[Entry]] = {}
        self._fallen: dict[int, set[int]] = {}  # by pid, the numbers of those
        self._inodes: dict[int, list[Inode]] = {}  # by the kernel's own numbers
        for group in self._groups:
            for process, number, objref, cloexec, inode, kernel_ino in group.candidates:
                self._entries.setdefault(process.pid, []).append((number, objref, cloexec))
                self._inodes.setdefault(kernel_ino, []).append(inode)
        for entries in self._entries.values():
            entries.sort()
        candidates = {pid: {number for number, _, _ in entries} for pid, entries in self._entries.items()}
        self._others = {
            pid: [number for number in known.numbers if number not in candidates.get(pid, ())]
            for pid, known in listed.items()
        }

    def look(self, root_fd: int, listed: Mapping[int, Listed]) -> None:
        """Make all calls. `listed` is how it is now; what is not in it has fallen."""
        changed = {pid: self._changed(pid, listed.get(pid)) for pid in self._entries}
        for group in self._groups:
            group.look(root_fd)
            if any(changed.values()):
                group.drop(
                    at for at, one in enumerate(group.candidates) if one.number in changed.get(one.process.pid, ())
                )
            group.close(group.fallen)
            self._note(group, group.fallen)

    def others(self, pid: int, listed: Listed) -> list[int]:
        """The numbers of a process that do not stand, in order."""
        fallen = self._fallen.get(pid, set())
        known = self.listed.get(pid)
        if known is not None and listed.numbers == known.numbers:
            return sorted(fallen.union(self._others[pid]))
        stand = {number for number, _, _ in self._entries.get(pid, ())} - fallen
        return [number for number in listed.numbers if number not in stand]

    def entries(self, pid: int) -> list[Entry]:
        """The lines of a table that stand."""
        entries, fallen = self._entries.get(pid, []), self._fallen.get(pid)
        return [entry for entry in entries if entry[0] not in fallen] if fallen else entries

    def drop(self, inodes: Sequence[Inode]) -> list[Place]:
        """Have all on these inodes fall. Those that stood until now."""
        out: list[Place] = []
        for group in self._groups:
            fallen = group.indices_of(inodes) - group.fallen
            group.drop(fallen)
            out += self._note(group, fallen)
        return out

    def drop_locked(self, locked: set[int] | None) -> list[Place]:
        """Likewise of inodes by the kernel's own numbers; None: any may be locked."""
        numbers = self._inodes.keys() if locked is None else self._inodes.keys() & locked
        return self.drop([inode for number in numbers for inode in self._inodes[number]])

    def full_pipes(self) -> list[Full]:
        return self._pipes.full()

    def connections(self) -> list[Connection]:
        return [connection for group in self._connections for connection in group.connections()]

    def descriptions(self, root: Root) -> Iterator[Description]:
        """Of what stands and can be waited for (epoll(7))."""
        yield from self._pipes.descriptions(FileKind.PIPE, root)
        for group in self._connections:
            yield from group.descriptions(FileKind.SOCKET, root)

    def close(self) -> None:
        for group in self._groups:
            group.close()

    def _changed(self, pid: int, listed: Listed | None) -> set[int]:
        """Numbers whose close-on-exec flag is not what it was, or that are not there any more."""
        known = self.listed[pid]
        if listed is None:
            return set(known.numbers)
        if listed == known:
            return set()
        now = dict(zip(*listed, strict=True))
        return {number for number, flag in zip(*known, strict=True) if now.get(number) != flag}

    def _note(self, group: _Group, fallen: Iterable[int]) -> list[Place]:
        places = [(group.candidates[at].process.pid, group.candidates[at].number) for at in fallen]
        for pid, number in places:
            self._fallen.setdefault(pid, set()).add(number)
        return places


def _column(values: Iterable[int]) -> bytes:
    return array("Q", [value & MINUS_ONE for value in values]).tobytes()
