"""The destination side: descriptors made again in the agent, and given to the stubs of their owners."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from migrator.engine.base import LateLock, LockKind
from migrator.engine.user.descriptors import anonymous, epolls, files, inotify, locks
from migrator.engine.user.descriptors.epolls import Stub
from migrator.engine.user.descriptors.pipes import PipeRestore, fill_all
from migrator.engine.user.descriptors.predumped import BY_PATH
from migrator.engine.user.descriptors.private_root import Move
from migrator.engine.user.descriptors.socket_restore import SocketRestore
from migrator.errors import ImageError, RestartFailed
from migrator.image import records_files as r
from migrator.image.codec import Record
from migrator.linux import descriptors, namespaces
from migrator.linux.x86_64 import NR

_PIDFD_THREAD = os.O_EXCL  # Linux 6.9
_SETTABLE = os.O_APPEND | os.O_NONBLOCK | os.O_ASYNC | os.O_DIRECT | os.O_NOATIME
_MAX_NUMBER = 1 << 30
_OF_A_TASK = re.compile(r"/proc/\d+/")
_OF_NAMESPACES = ("/proc/sys/", "/proc/sysvipc/")  # another file for whoever opens them in other namespaces
_GIVEN = (r.FileKind.PIPE, r.FileKind.MEMFD, r.FileKind.SOCKET)  # to their owners
_AHEAD = (r.FileKind.PIPE, r.FileKind.SOCKET)  # that can be made while the tasks still run
_PIPES_AT_ONCE = 64  # that are filled together
_USUAL = 16384  # descriptors for which there is room before it is known how many there are
T = TypeVar("T")
OF_DESCRIPTORS = frozenset({r.File, r.FileTable, r.Pipe, r.PipeBuffer, r.Socket, r.SocketBuffer, r.SocketTcp})
_ANONYMOUS = frozenset(
    map(int, (r.FileKind.EVENTFD, r.FileKind.TIMERFD, r.FileKind.SIGNALFD, r.FileKind.PIDFD, r.FileKind.INOTIFY))
)


class _Given(NamedTuple):
    """What a stub was given."""

    stub: Stub
    table: r.FileTable
    openings: int  # of any file, by then
    contents: list[tuple[int, int, int, int]]  # number, close-on-exec, objref of a File, how often that was opened


class Context(Protocol):
    """What restoring descriptors needs of the engine around it."""

    @property
    def root_fd(self) -> int: ...  # the root directory of the tree, O_PATH
    @property
    def netns(self) -> str | None: ...  # file of the network namespace, None: ours
    def pid_of(self, vpid: int) -> int: ...  # as we see it; 0 if there is none
    @property
    def live(self) -> bool: ...  # whether the saved tasks are still there, and go only when the copy is to run
    def open_shm(self, objref: int, flags: int) -> int: ...  # a memfd or a mapped file, opened anew
    def open_queue(self, objref: int, flags: int) -> int: ...  # a POSIX message queue, likewise


class DescriptorRestore:
    """Builds descriptors as their records come; nothing runs and nothing is sent before activate().

    The stream is hostile: ImageError for what no source writes, RestartFailed for what this host cannot
    do. After either, close() leaves nothing behind."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.tables: dict[int, r.FileTable] = {}
        self.final = True  # else the tasks still run, and what comes is pre-dumped
        self._early: dict[int, files.Opened | None] = {}  # Files by path that came pre-dumped; None: not opened so far
        self._owner_of: dict[int, int] = {}  # by objref of a File that is opened by its path: whose it must be
        self._ahead: set[int] = set()  # those of pipes and connections that did
        self._changed: set[int] = set()  # those of them that came again
        self._opened: dict[int, int] = {}  # how often they were opened
        self._openings = 0  # how often any of them was opened anew
        self._has_already: dict[int, _Given] = {}  # by vpid
        self._files: dict[int, int] = {}  # objref of a File -> our descriptor
        self._records: dict[int, r.File] = {}
        self._late: set[int] = set()  # Files of procfs about what the tasks do not have yet
        self._pipes: dict[int, PipeRestore] = {}
        self._unfilled: dict[int, PipeRestore] = {}
        self._unfilled_bytes = 0
        self._deleted: dict[int, files.DeletedRestore] = {}
        self._ready: dict[int, int] = {}  # objref of an anonymous object -> our descriptor, to be taken once
        self._timers: dict[int, r.TimerFd] = {}
        self._started: list[tuple[int, r.TimerFd]] = []
        self._epolls: list[r.EpollItems] = []
        self._locks: list[r.FileLock] = []
        self._pidfds: dict[int, int] = {}
        self._inotifys: dict[int, int] = {}  # objref of an Inotify -> our descriptor of its File
        self._watches: list[r.InotifyWatch] = []
        self._late_locks: list[LateLock] = []
        self.put_off: list[r.File | r.FileLock] = []  # what `late_locks` was made of
        self._installed: dict[int, tuple[Stub, int]] = {}  # vpid -> (stub, objref of its table)
        self._sockets = SocketRestore(context)
        descriptors.allow_many_files(_USUAL)
        self._takers: dict[type[Record], Callable[[Any], None]] = {
            r.File: self._file,
            r.FileTable: self._table,
            r.Pipe: self._pipe,
            r.PipeBuffer: self._pipe_buffer,
            r.EventFd: lambda rec: self._object(rec.objref, anonymous.make_eventfd(rec)),
            r.TimerFd: self._timerfd,
            r.SignalFd: lambda rec: self._object(rec.objref, anonymous.make_signalfd(rec)),
            r.PidFd: self._pidfd,
            r.Inotify: lambda rec: self._object(rec.objref, inotify.make()),
            r.InotifyWatch: self._watches.append,
            r.DeletedFile: self._deleted_file,
            r.FileData: lambda rec: self._known(self._deleted, rec.inode_objref, "deleted file").add(rec),
            r.EpollItems: self._epoll_items,
            r.FileLock: self._lock,
            r.FileOwner: self._owner,
            r.Socket: self._socket,
            r.SocketBuffer: self._sockets.buffer,
            r.SocketTcp: self._sockets.tcp,
            r.Pty: self._pty,
        }

    def record(self, rec: Record) -> None:
        """Take the next record. Raises ImageError or RestartFailed naming what it is about."""
        taker = self._takers.get(type(rec))
        if taker is None:
            raise ImageError(f"{type(rec).__name__} is no record of descriptors")
        try:
            taker(rec)
        except (OSError, OverflowError, ValueError) as error:
            raise RestartFailed(f"{_about(rec)}: {error}") from error

    def settle(self, tables: Iterable[int]) -> None:
        """Once all records are there, and ahead of install(): complete the pre-dumped files that `tables` name."""
        self._fill_pipes()
        named = [d.file_objref for objref in tables if objref in self.tables for d in self.tables[objref].descriptors]
        early = [objref for objref in dict.fromkeys(named) if objref in self._early]  # in order: memory is slow
        opened = [(file, self._records[objref]) for objref in early if (file := self._early[objref]) is not None]
        there = files.still_there(opened, self._context.root_fd)
        kept = {rec.objref for (_, rec), same in zip(opened, there, strict=True) if same}
        if self._changed or len(kept) < len(early):
            for objref in early:
                if objref not in kept or objref in self._changed:
                    self._make_good(self._records[objref], kept=objref in kept)

    def install(self, stub: Stub, files_objref: int) -> None:
        """Give a stopped stub the descriptors of a table, and no others."""
        self._give(stub, self._known(self.tables, files_objref, "table of descriptors"))
        self._installed[stub.vpid] = stub, files_objref

    def install_early(self, stub: Stub, files_objref: int) -> None:
        """The same while the tasks still run, of what a table has so far: in the end it may be all."""
        table = self.tables.get(files_objref)
        if table is not None and all(d.file_objref in self._files for d in table.descriptors):
            self._give(stub, table)

    def _give(self, stub: Stub, table: r.FileTable) -> None:
        """Give a stub a table, unless it has just these openings of these files under these numbers."""
        given = self._has_already.get(stub.vpid)
        if given is not None and given.stub is stub and given.openings == self._openings and given.table is table:
            return  # nothing has come since
        contents = [(d.fd, d.cloexec, d.file_objref, self._opened.get(d.file_objref, 0)) for d in table.descriptors]
        if given is None or given.stub is not stub:
            stub.install_fds([(self._files[d.file_objref], d.fd, bool(d.cloexec)) for d in table.descriptors])
        elif given.contents != contents:
            has, wanted = set(given.contents), set(contents)
            gone = sorted(number for number, *_ in has - wanted)
            new = [(self._files[objref], number, bool(cloexec)) for number, cloexec, objref, _ in wanted - has]
            stub.change_fds(gone, new)
        self._has_already[stub.vpid] = _Given(stub, table, self._openings, contents)

    def finish(self, stubs: Iterable[Stub]) -> None:
        """Once every stub has its descriptors: what epoll waits for, and who is told by signals."""
        for stub in stubs:
            if stub.vpid not in self._installed:
                raise ImageError(f"pid {stub.vpid} has no table of descriptors")
        self._open_late()
        self._drop_unnamed()
        for pipe in self._pipes.values():
            pipe.close()
        for deleted in self._deleted.values():
            deleted.settle()
        for rec in self._epolls:
            self._epoll(rec)
        self._owners()
        self._take_locks()
        self._sockets.settle()
        for watch in self._watches:
            inotify.watch(
                self._known(self._inotifys, watch.inotify_objref, "inotify instance"), watch, self._context.root_fd
            )
        self._forget_events()
        for fd, timer in self._started:
            anonymous.start_timerfd(fd, timer)
        self._let_go()

    def _let_go(self) -> None:
        """Close what activate() has no need of. What a task closes would not end while it is open here as well: a pipe
        for its reader, a lock for whoever waits, the writing of a program for who executes it."""
        needed = (r.FileKind.SOCKET, r.FileKind.INOTIFY)
        kept = {objref: fd for objref, fd in self._files.items() if self._records[objref].kind in needed}
        descriptors.close_all({*self._files.values()} - {*kept.values()})
        self._files = kept
        self._started.clear()

    def _drop_unnamed(self) -> None:
        """Of what was made ahead, close what nobody has in the end: whoever has the other end of a pipe would wait
        for it."""
        if not self._ahead:
            return
        named = {d.file_objref for _, table in self._installed.values() for d in self.tables[table].descriptors}
        for objref in self._ahead - named:
            rec = self._records[objref]
            if rec.kind == r.FileKind.SOCKET and self._sockets.has_come(rec.inode_objref):
                raise ImageError(f"socket {rec.inode_objref}: a connection that nobody has")
            os.close(self._files.pop(objref))
        for objref in self._ahead & named:
            rec = self._records[objref]
            if rec.kind == r.FileKind.SOCKET and not self._sockets.has_come(rec.inode_objref):
                raise ImageError(f"socket {rec.inode_objref}: the state of its connection never came")

    @property
    def late_locks(self) -> list[LateLock]:
        """Locks that the stopped source still has: to be taken once it is gone, ahead of activate()."""
        return self._late_locks

    @property
    def moves(self) -> list[Move]:
        """Files that activate() moves into their places, for who has to do it in our stead: `finish_moves()`."""
        return self._sockets.moves

    def activate(self) -> None:
        """The last thing before the tasks run: connections speak again, files of sockets are in their places, and
        nothing is open but in the tasks.

        Another agent can do it if we die: what it needs is in the kernel, or in `moves`."""
        self._sockets.activate()
        self._forget_events()
        self.close()

    def close(self) -> None:
        """Close everything that the agent holds. The stubs keep what they were given."""
        self._sockets.close()
        for pipe in self._pipes.values():
            pipe.close()
        for deleted in self._deleted.values():
            deleted.close()
        descriptors.close_all({*self._files.values(), *self._ready.values()})
        self._files.clear()
        self._ready.clear()
        self._started.clear()
        self._inotifys.clear()

    def _forget_events(self) -> None:
        for fd in self._inotifys.values():
            inotify.forget_events(fd)

    # ------------------------------------------------------------------ records

    def _pty(self, rec: r.Pty) -> None:
        raise RestartFailed(
            f"the image has a terminal (/dev/pts/{rec.index}), which this engine does not carry",
            hint="the engine that has saved it does: --engine kernel",
        )

    def _pipe(self, rec: r.Pipe) -> None:
        self._new(self._pipes, rec.objref)
        self._pipes[rec.objref] = PipeRestore(rec)

    def _socket(self, rec: r.Socket) -> None:
        if self.final:
            self._sockets.add(rec)
        else:
            self._sockets.add_early(rec)

    def _pipe_buffer(self, rec: r.PipeBuffer) -> None:
        pipe = self._known(self._pipes, rec.pipe_objref, "pipe")
        pipe.add(rec)
        if pipe.made:  # ahead of the freeze: else it is filled when it is
            self._unfilled[rec.pipe_objref] = pipe
            self._unfilled_bytes += len(rec.data)
            if len(self._unfilled) >= _PIPES_AT_ONCE or self._unfilled_bytes >= r.MAX_CHUNK:
                self._fill_pipes()

    def _fill_pipes(self) -> None:
        unfilled, self._unfilled, self._unfilled_bytes = [*self._unfilled.values()], {}, 0
        fill_all(unfilled)

    def _deleted_file(self, rec: r.DeletedFile) -> None:
        self._new(self._deleted, rec.objref)
        self._deleted[rec.objref] = files.DeletedRestore(rec, self._context.root_fd)

    def _timerfd(self, rec: r.TimerFd) -> None:
        self._object(rec.objref, anonymous.make_timerfd(rec))
        self._timers[rec.objref] = rec

    def _pidfd(self, rec: r.PidFd) -> None:
        if not rec.pid:
            self._object(rec.objref, anonymous.make_pidfd_of_gone())
            self._pidfds[rec.objref] = 0
            return
        pid = self._context.pid_of(rec.pid) if rec.pid > 0 else 0
        if not pid:
            raise ImageError(f"a pidfd of pid {rec.pid}, which is not in the tree")
        self._object(rec.objref, os.pidfd_open(pid))
        self._pidfds[rec.objref] = pid

    def _object(self, objref: int, fd: int) -> None:
        if objref in self._ready:
            os.close(fd)
            raise ImageError(f"object {objref} comes twice")
        self._ready[objref] = fd

    def _file(self, rec: r.File) -> None:
        if rec.pos < 0:
            raise ImageError(f"file {rec.objref}: offset {rec.pos}")
        before = self._records.get(rec.objref)
        if before is not None and (before.kind, before.path) != (rec.kind, rec.path):
            raise ImageError(f"file {rec.objref} comes again as another one")
        if rec.kind not in BY_PATH:
            self._new(self._records, rec.objref)
        self._records[rec.objref] = rec
        if before is not None:
            self._changed.add(rec.objref)  # and made good when all is there
            return
        if not self.final and rec.kind not in _AHEAD:
            self._early[rec.objref] = None
            if rec.path.startswith(_OF_NAMESPACES):
                return
            with contextlib.suppress(RestartFailed):  # it may be closed by the end
                self._files[rec.objref] = fd = files.open_path(rec, self._context.root_fd)
                self._early[rec.objref] = files.Opened.of(fd, rec)
            return
        self._files[rec.objref] = fd = self._open(rec)
        if not self.final:
            self._ahead.add(rec.objref)
        self._configure(fd, rec)

    def _make_good(self, rec: r.File, *, kept: bool) -> None:
        """A file that was opened early, as its last record has it; opened now if that is not the file any more."""
        fd = self._files.pop(rec.objref, -1)
        try:
            if kept:
                files.adjust(fd, rec)
            else:
                if fd >= 0:
                    os.close(fd)
                fd, self._early[rec.objref] = -1, None
                self._opened[rec.objref] = self._opened.get(rec.objref, 0) + 1
                self._openings += 1
                fd = self._open_path(rec)
                if rec.objref not in self._late:
                    self._check_owner(rec, fd)
        finally:
            if fd >= 0:
                self._files[rec.objref] = fd

    def _open_path(self, rec: r.File) -> int:
        """What tells about a descriptor, a thread or namespaces is opened once they are there, and another file has its
        place."""
        try:
            if not rec.path.startswith(_OF_NAMESPACES):
                return files.open_path(rec, self._context.root_fd)
        except RestartFailed:
            if not _OF_A_TASK.match(rec.path):
                raise
        self._late.add(rec.objref)
        return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def _open_late(self) -> None:
        for objref in self._late:
            rec = self._records[objref]
            opened = partial(files.open_path, rec, self._context.root_fd)
            fd = self._open_inside(opened) if rec.path.startswith(_OF_NAMESPACES) else opened()
            os.close(self._files[objref])
            self._files[objref] = fd
        for stub, table in self._installed.values() if self._late else ():
            late = [d for d in self.tables[table].descriptors if d.file_objref in self._late]
            items = [(self._files[d.file_objref], d.fd, bool(d.cloexec)) for d in late]
            stub.change_fds([d.fd for d in late], items)

    def _open_inside(self, opened: Callable[[], int]) -> int:
        """What a process in the namespaces of the tree opens."""
        stub, _ = next(iter(self._installed.values()))
        own = namespaces.of_its_own(stub.pid, namespaces.WITH_SYSCTLS)
        return namespaces.open_in(stub.pid, own, opened) if own else opened()

    def _open(self, rec: r.File) -> int:
        """A description of our own, which is still to be configured."""
        kind, inode = rec.kind, rec.inode_objref
        if kind in BY_PATH:
            return self._open_path(rec)
        if kind in (r.FileKind.PIPE, r.FileKind.FIFO):
            return self._known(self._pipes, inode, "pipe").open(rec, self._context.root_fd)
        if kind == r.FileKind.DELETED and inode in self._deleted:
            return self._known(self._deleted, inode, "deleted file").open(rec)
        if kind in (r.FileKind.MEMFD, r.FileKind.DELETED):
            return self._context.open_shm(inode, files.lasting(rec.flags))
        if kind == r.FileKind.MQUEUE:
            return self._context.open_queue(inode, rec.flags)
        if kind == r.FileKind.SOCKET:
            return self._sockets.take(inode)
        if kind == r.FileKind.EPOLL:
            return descriptors.epoll_create()
        if kind in _ANONYMOUS:
            if rec.flags & _PIDFD_THREAD and inode in self._pidfds and inode in self._ready:
                os.close(self._ready.pop(inode))
                pid = self._pidfds[inode]
                return os.pidfd_open(pid, _PIDFD_THREAD) if pid else anonymous.make_pidfd_of_gone(_PIDFD_THREAD)
            if inode not in self._ready or (kind == r.FileKind.TIMERFD) != (inode in self._timers):
                raise ImageError(f"file {rec.objref}: object {inode} is not there, taken, or something else")
            if kind == r.FileKind.INOTIFY:
                self._inotifys[inode] = self._ready[inode]
            return self._ready.pop(inode)
        raise ImageError(f"file {rec.objref}: unknown kind {kind}")

    def _configure(self, fd: int, rec: r.File) -> None:
        kind = rec.kind
        if kind in (r.FileKind.DELETED, r.FileKind.MEMFD, r.FileKind.MQUEUE):
            os.lseek(fd, rec.pos, os.SEEK_SET)
        elif kind in (r.FileKind.PIPE, r.FileKind.FIFO) or (kind not in BY_PATH and rec.flags & _SETTABLE):
            fcntl.fcntl(fd, fcntl.F_SETFL, rec.flags & _SETTABLE)
        if kind == r.FileKind.TIMERFD:
            self._started.append((fd, self._timers[rec.inode_objref]))

    def _table(self, rec: r.FileTable) -> None:
        last = -1
        for item in rec.descriptors:
            if not last < item.fd < _MAX_NUMBER or item.cloexec > 1 or item.file_objref not in self._records:
                raise ImageError(f"table {rec.objref}: fd {item.fd} is out of order or refers to no file")
            last = item.fd
        self.tables[rec.objref] = rec

    def _epoll_items(self, rec: r.EpollItems) -> None:
        epoll = self._records.get(rec.epoll_objref)
        if epoll is None or epoll.kind != r.FileKind.EPOLL:
            raise ImageError(f"file {rec.epoll_objref} is no epoll instance")
        self._epolls.append(rec)

    def _owner(self, rec: r.FileOwner) -> None:
        file = self._known(self._records, rec.owned_objref, "file")
        if file.kind in _GIVEN:
            os.fchown(self._files[rec.owned_objref], rec.uid, rec.gid)
        elif file.kind in r.OWNED_INODES:
            self._owner_of[rec.owned_objref] = rec.uid
            if (fd := self._files.get(rec.owned_objref)) is not None and rec.owned_objref not in self._late:
                try:
                    self._check_owner(file, fd)
                except RestartFailed:
                    if self.final:
                        raise
                    os.close(self._files.pop(rec.owned_objref))  # it may be closed by the end
                    self._early[rec.owned_objref] = None
        else:
            raise ImageError(f"file {rec.owned_objref}: an owner of what has none of its own")

    def _check_owner(self, rec: r.File, fd: int) -> None:
        """What a user had made there is another user's here: it would be opened for one who could not."""
        uid = self._owner_of.get(rec.objref)
        if uid is not None and (here := os.fstat(fd).st_uid) != uid:
            raise RestartFailed(
                f"{rec.path} (file {rec.objref}) belongs to user {here} here, and to user {uid} where it was saved",
                hint="the file must be the same on both hosts: see --copy-files",
            )

    def _lock(self, rec: r.FileLock) -> None:
        self._known(self._records, rec.file_objref, "file")
        self._locks.append(rec)  # taken once the processes have their descriptors

    @staticmethod
    def _new(table: Mapping[int, object], objref: int) -> None:
        if objref in table:
            raise ImageError(f"object {objref} comes twice")

    @staticmethod
    def _known(table: dict[int, T], objref: int, what: str) -> T:
        try:
            return table[objref]
        except KeyError:
            raise ImageError(f"there is no {what} {objref}") from None

    # ------------------------------------------------------------------ inside the stubs

    def _epoll(self, rec: r.EpollItems) -> None:
        entry = self._installed.get(rec.pid)
        if entry is None:
            raise ImageError(f"epoll instance {rec.epoll_objref}: there is no pid {rec.pid}")
        stub, table = entry
        installed = {d.fd: d for d in self.tables[table].descriptors}
        number = next((n for n, d in installed.items() if d.file_objref == rec.epoll_objref), -1)
        if number < 0:
            raise ImageError(f"pid {rec.pid} does not have epoll instance {rec.epoll_objref}")
        epolls.restore(stub, number, rec, installed)

    def _take_locks(self) -> None:
        """Lock what was locked. What a live source still has is put off, if it is that very file."""
        if not self._locks and not any(rec.lock for rec in self._records.values()):
            return
        holders: dict[int, tuple[int, int]] = {}  # objref of a File -> pid and number of one who has it
        for stub, table in self._installed.values():
            for item in self.tables[table].descriptors:
                holders.setdefault(item.file_objref, (stub.pid, item.fd))
        for objref, (pid, number) in holders.items():
            rec = self._records[objref]
            if rec.lock:
                where = rec.path if rec.kind in BY_PATH else f"a file without a name, once {rec.path}"
                fd = self._files[objref]
                with self._or_later(rec, rec, LateLock(pid, number, LockKind.FLOCK, rec.lock, 0, 0, where)):
                    locks.take_flock(fd, rec.lock, where)
        for lock in self._locks:
            rec = self._records[lock.file_objref]
            span = lock.start, lock.length
            if not lock.pid:
                fd = self._known(self._files, lock.file_objref, "file")
                pid, number = holders.get(lock.file_objref, (0, 0))
                with self._or_later(rec, lock, LateLock(pid, number, LockKind.DESCRIPTION, lock.kind, *span, rec.path)):
                    locks.take_for_file(fd, lock, rec.path)
                continue
            entry = self._installed.get(lock.pid)
            installed = self.tables[entry[1]].descriptors if entry is not None else []
            if entry is None or (lock.fd, lock.file_objref) not in {(d.fd, d.file_objref) for d in installed}:
                raise ImageError(f"a lock of pid {lock.pid} on fd {lock.fd}, which it does not have")
            stub = entry[0]
            with self._or_later(rec, lock, LateLock(stub.pid, lock.fd, LockKind.PROCESS, lock.kind, *span, rec.path)):
                locks.take(stub, lock, rec.path)

    @contextlib.contextmanager
    def _or_later(self, rec: r.File, lock: r.File | r.FileLock, late: LateLock) -> Iterator[None]:
        try:
            yield
        except locks.Locked:
            if not self._context.live or not late.pid or not locks.is_very_file(self._files[rec.objref], rec):
                raise
            self._late_locks.append(late)
            self.put_off.append(lock)

    def _owners(self) -> None:
        wanted = {objref: rec for objref, rec in self._records.items() if rec.owner_type or rec.owner_signal}
        if not wanted:
            return
        for stub, table in self._installed.values():
            for item in self.tables[table].descriptors:
                rec = wanted.pop(item.file_objref, None)
                if rec is not None:
                    _set_owner(stub, item.fd, rec)


def _set_owner(stub: Stub, number: int, rec: r.File) -> None:
    """From inside: the owner's pid is the tree's own, and the rights to signal it are the setter's."""
    batch: list[tuple[int, ...]] = []
    if rec.owner_type:
        address = stub.put(struct.pack("<ii", rec.owner_type - 1, rec.owner_pid))
        batch.append((NR["fcntl"], number, descriptors.F_SETOWN_EX, address))
    if rec.owner_signal:
        batch.append((NR["fcntl"], number, descriptors.F_SETSIG, rec.owner_signal))
    if min(stub.call_batch(batch)) < 0:
        raise RestartFailed(f"pid {stub.vpid} fd {number}: pid {rec.owner_pid} cannot be made its owner")


def _about(rec: Record) -> str:
    path = getattr(rec, "path", "")
    objref = getattr(rec, "objref", 0)
    return f"{type(rec).__name__} {objref or ''}{f' ({path})' if path else ''}"
