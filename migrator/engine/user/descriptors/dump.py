"""The source side: all descriptors of a stopped tree, as records."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple, Protocol

from migrator.engine.user.descriptors import anonymous, epolls, files, inotify, locks, pipes
from migrator.engine.user.descriptors.classify import Obstacle
from migrator.engine.user.descriptors.collection import Collection, Flags
from migrator.engine.user.descriptors.description import Description, Holder
from migrator.engine.user.descriptors.found import GONE, MessageQueue
from migrator.engine.user.descriptors.inet_dump import Still
from migrator.engine.user.descriptors.predumped import BY_PATH, PredumpedFiles
from migrator.engine.user.descriptors.sockets import SocketDump
from migrator.engine.user.descriptors.standing import Standing
from migrator.errors import CheckpointFailed
from migrator.image.codec import Record
from migrator.image.records_files import File, FileKind, PidFd
from migrator.linux import descriptors
from migrator.linux.file_locks import LockList

_F_GET_SEALS = 1034


class Refs(Protocol):
    def get(self, key: Hashable) -> tuple[int, bool]: ...


class Writer(Protocol):
    def write(self, rec: Record) -> None: ...
    def encoded(self, raw: bytes) -> None: ...
    def flush(self) -> None: ...


class Memfd(NamedTuple):
    """A memfd, or a deleted file that is mapped as well, which the tree has open; its contents are somebody else's to
    save, under ("shm", dev, ino)."""

    dev: int
    ino: int
    fd: int  # ours, a duplicate of the workload's: it shares the file position
    size: int
    seals: int
    name: str


class DescriptorDump:
    """Saves the descriptors of `processes`, all of them stopped, the network held silent.

        dump.collect()      # fetch everything; `memfds` is known from here on
        tables = dump.write()
        dump.undo()         # or dump.release()

    Raises CheckpointFailed, naming pid and descriptor; whatever happens, undo() leaves every file and
    connection as it was. `still` keeps the tasks stopped inside it, also without this program."""

    def __init__(
        self,
        processes: Sequence[Holder],
        objhash: Refs,
        writer: Writer,
        *,
        still: Still = nullcontext,
        predumped: PredumpedFiles | None = None,
        shared: Container[tuple[int, int]] = (),
        flags: Flags | None = None,
        locks: LockList | None = None,
        standing: Standing | None = None,
        own_netns: bool = True,
    ) -> None:
        """`predumped`: what was written of them while they ran. `shared`: (st_dev, st_ino) of files without a name
        whose contents are somebody else's to save, under ("shm", dev, ino). `own_netns`: the tree's addresses move with
        it. The rest: see Collection."""
        self._flags, self._locks, self._may_stand = flags, locks, standing
        self._own_netns = own_netns
        self._shared = shared
        self._predumped = predumped or PredumpedFiles(objhash, writer)
        self._still = still
        self._processes = list(processes)
        self._objhash = objhash
        self._writer = writer
        self._collection: Collection | None = None
        self._nameless: list[Description] = []  # those that are no files that were opened by path
        self._sockets: SocketDump | None = None
        self._socket_objrefs: dict[int, int] = {}  # by inode number, of those that are pre-dumped
        self._standing: set[int] = set()  # these objrefs
        self.memfds: list[Memfd] = []

    def collect(self) -> None:
        """Fetch every description, once. Writes nothing."""
        if not self._processes:
            return
        try:
            collection = self._collection = Collection(
                self._processes, self._predumped.known, self._flags, self._locks, self._may_stand
            )
            self._nameless = [d for d in collection.descriptions if d.known is None and d.kind not in BY_PATH]
            self._memfds()
            sockets = [d for d in self._nameless if d.kind == FileKind.SOCKET]
            standing = collection.standing.connections() if collection.standing is not None else []
            self._sockets = SocketDump(
                sockets, self._processes[0].pid, self._still, standing, own_netns=self._own_netns
            )
            self._sockets.collect()
        except BaseException as error:
            self.undo()
            if isinstance(error, OSError):
                raise CheckpointFailed(f"descriptors cannot be collected: {error}") from error
            raise

    def dump(self) -> dict[int, int]:
        """collect() and write() in one, for who has no shared memory to put between them."""
        self.collect()
        return self.write()

    def write(self) -> dict[int, int]:
        """Write all records; pid -> objref of its FileTable."""
        if self._collection is None:
            return {}
        try:
            return self._write(self._collection)
        except OSError as error:
            raise CheckpointFailed(f"descriptors cannot be saved: {error}") from error

    def undo(self) -> None:
        """Abort: nothing of the tree is held any more, and sockets are as they were."""
        self._end(silent=False)

    def release(self) -> None:
        """Commit: the copy elsewhere has the connections; here they end without a word when the tasks do."""
        self._end(silent=True)

    def _end(self, *, silent: bool) -> None:
        sockets, self._sockets = self._sockets, None
        if sockets is not None:
            sockets.close(silent=silent)
        collection, self._collection = self._collection, None
        if collection is not None:
            collection.close()
        self.memfds.clear()

    @property
    def queues(self) -> list[MessageQueue]:
        """POSIX message queues, whose contents are somebody else's to save, under ("mqueue", dev, ino)."""
        found = [d for d in self._nameless if d.kind == FileKind.MQUEUE]
        made = {d.inode: MessageQueue(d.inode, d.path, f"/proc/self/fd/{d.fd}", d.stat.st_nlink == 0) for d in found}
        return list(made.values())

    # ------------------------------------------------------------------ inside

    def _memfds(self) -> None:
        met = set()
        for item in self._nameless:
            if item.inode in met:
                continue
            if item.kind == FileKind.MEMFD or (item.kind == FileKind.DELETED and item.inode in self._shared):
                met.add(item.inode)
                seals = fcntl.fcntl(item.fd, _F_GET_SEALS) if item.kind == FileKind.MEMFD else 0
                self.memfds.append(Memfd(*item.inode, item.fd, item.stat.st_size, seals, item.path))

    def _write(self, collection: Collection) -> dict[int, int]:
        write = self._writer.write
        assert self._sockets is not None
        self._connections(self._sockets)
        self._inodes(collection.standing)
        for made in self._sockets.sockets(self._socket):
            if made.objref not in self._standing:
                write(made)
        self._writer.flush()  # the other side has something to do while connections are looked at
        for rec in self._sockets.buffers(self._socket):
            write(rec)
        pids = {process.pid: process.vpid for process in self._processes}
        self._predumped.take(objref for table in collection.tables for _, objref, _ in table.standing)
        for item in collection.descriptions:
            item.objref = self._predumped.objref_of(item)
            if not self._predumped.stands(item):
                self._predumped.put(self._file(item, pids), item.stat)
        self._epolls(collection)
        for table in collection.tables:
            for lock in locks.save(table):
                write(lock)
        out = {}
        for table in collection.tables:
            objref, _ = self._objhash.get(("files", table.processes[0].pid))
            self._predumped.put_table(objref, table.entries)
            out.update({process.pid: objref for process in table.processes})
        return out

    def _epolls(self, collection: Collection) -> None:
        instances = [item for item in self._nameless if item.kind == FileKind.EPOLL]
        if instances:
            descriptions, tables = collection.with_standing()
            for item in instances:
                items = epolls.save(item, tables, descriptions)
                if items is not None:
                    self._writer.write(items)

    def _connections(self, sockets: SocketDump) -> None:
        """Find those of which the stream has all but their state."""
        records = {rec.objref: rec for rec in sockets.connections}
        for item in self._nameless if records else ():
            rec = records.get(item.stat.st_ino) if item.kind == FileKind.SOCKET else None
            if rec is not None and (objref := self._predumped.sockets.find(item, rec)):
                self._socket_objrefs[rec.objref] = objref
                self._standing.add(objref)

    def _socket(self, inode: int) -> int:
        return self._socket_objrefs.get(inode) or self._objref(("socket", inode))

    def _objref(self, key: Hashable) -> int:
        return self._objhash.get(key)[0]

    def _inodes(self, standing: Standing | None) -> None:
        """Write the objects that files are opened on, and note their objrefs."""
        pipe_ends: dict[tuple[int, int], list[Description]] = {}
        others = []
        for item in self._nameless:
            if item.kind in (FileKind.PIPE, FileKind.FIFO):
                pipe_ends.setdefault(item.inode, []).append(item)
            else:
                others.append(item)
        for ends in pipe_ends.values():
            pipes.check(ends)
        self._write_all(pipes.save_all([*pipe_ends.values()], self._pipe))
        if standing is not None:
            self._write_all(pipes.contents_of(standing.full_pipes()))
        for item in others:
            self._inode(item)

    def _pipe(self, ends: list[Description], capacity: int) -> tuple[int, bool]:
        """The objref of a pipe, and whether it is new in the stream."""
        objref = self._predumped.pipes.find(ends, capacity)
        new = not objref
        if new:
            objref = self._objref(("pipe", *ends[0].inode))
        for end in ends:
            end.inode_objref = objref
        return objref, new

    def _inode(self, item: Description) -> None:
        if item.kind in (FileKind.DELETED, FileKind.MEMFD) and (reason := files.own_attributes(item.fd)):
            raise CheckpointFailed(f"{item}: {reason}", hint="the workload runs on, untouched")
        match item.kind:
            case FileKind.EVENTFD | FileKind.TIMERFD | FileKind.SIGNALFD:
                item.inode_objref = self._objref((item.kind.name, item.fd))
                self._writer.write(_ANONYMOUS[item.kind](item.inode_objref, item))
            case FileKind.DELETED:
                shared = item.inode in self._shared
                item.inode_objref, first = self._objhash.get(("shm" if shared else "inode", *item.inode))
                if first and not shared:
                    self._write_all(files.save_deleted(item.inode_objref, item))
            case FileKind.MEMFD:
                item.inode_objref = self._objref(("shm", *item.inode))
            case FileKind.INOTIFY:
                self._inotify(item)
            case FileKind.MQUEUE:
                item.inode_objref = self._objref(("mqueue", *item.inode))
            case FileKind.SOCKET:
                item.inode_objref = self._socket(item.stat.st_ino)
            case FileKind.PIDFD:
                item.inode_objref = self._objref(("pidfd", item.fd))
                self._writer.write(PidFd(item.inode_objref, self._target_of_pidfd(item)))

    def _inotify(self, item: Description) -> None:
        item.inode_objref = self._objref(("inotify", item.fd))
        try:
            found = inotify.watches(item.info.watches)
            inotify.resolve(item.root, found, self._predumped.watched)
        except Obstacle as error:
            raise CheckpointFailed(f"{item}: {error}", hint="the workload runs on, untouched") from None
        self._write_all(inotify.save(item.inode_objref, found, self._predumped.watched))

    def _target_of_pidfd(self, item: Description) -> int:
        pid = int(item.info.fields["Pid"])
        if pid == GONE:
            return 0
        for process in self._processes:
            if process.pid == pid:
                return process.vpid
        raise CheckpointFailed(f"{item}: a pidfd of pid {pid}, which is not in the tree")

    def _file(self, item: Description, pids: dict[int, int]) -> File:
        status = item.stat
        owner = self._owner(item, pids) if item.owned else (0, 0, 0)
        path = "" if item.kind == FileKind.MEMFD else item.path
        return File(
            objref=item.objref,
            kind=item.kind,
            flags=item.flags if item.kind != FileKind.MQUEUE else fcntl.fcntl(item.fd, fcntl.F_GETFL),
            mode=status.st_mode,
            pos=item.info.pos,
            size=status.st_size,
            mtime=max(0, status.st_mtime_ns),
            dev=status.st_dev,
            ino=status.st_ino,
            rdev=status.st_rdev,
            inode_objref=item.inode_objref,
            owner_type=owner[0],
            owner_pid=owner[1],
            owner_signal=owner[2],
            lock=locks.flock_of(item) if item.info.locks else 0,
            reserved=0,
            path=path,
        )

    @staticmethod
    def _owner(item: Description, pids: dict[int, int]) -> tuple[int, int, int]:
        kind, pid, signal = descriptors.owner(item.fd)
        if kind and pid not in pids:
            raise CheckpointFailed(f"{item}: its owner for signals (F_SETOWN) is pid {pid}, which is not in the tree")
        return kind, pids.get(pid, 0), signal

    def _write_all(self, records: Iterator[Record]) -> None:
        for rec in records:
            self._writer.write(rec)


_ANONYMOUS: dict[FileKind, Callable[[int, Description], Record]] = {
    FileKind.EVENTFD: anonymous.save_eventfd,
    FileKind.TIMERFD: anonymous.save_timerfd,
    FileKind.SIGNALFD: anonymous.save_signalfd,
}
