"""What records about descriptors must say, beyond referring to objects that are there.

A part of `migrator.image.order`, which calls it for every such record.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from migrator.image import records_files as f
from migrator.image.codec import Record
from migrator.image.hierarchy import MAX_PID
from migrator.image.references import References

MAX_FD = 1 << 30  # the kernel's ceiling of fs.nr_open
MAX_OFFSET = (1 << 63) - 1  # loff_t
MAX_SOCKADDR = 128  # struct sockaddr_storage
NSIG = 64
_WATCH_EVENTS = 0xFFF  # IN_ALL_EVENTS
_WATCH_MASK = 0x84000000 | _WATCH_EVENTS  # IN_ONESHOT, IN_EXCL_UNLINK

_Kind = f.FileKind
# The object that a File of each kind is opened on; the others are opened on their path.
_INODES = {
    int(_Kind.DELETED): "DeletedFile",
    int(_Kind.PIPE): "Pipe",
    int(_Kind.FIFO): "Pipe",
    int(_Kind.EVENTFD): "EventFd",
    int(_Kind.TIMERFD): "TimerFd",
    int(_Kind.SIGNALFD): "SignalFd",
    int(_Kind.MEMFD): "Shm",
    int(_Kind.SOCKET): "Socket",
    int(_Kind.PIDFD): "PidFd",
    int(_Kind.MQUEUE): "MqQueue",
    int(_Kind.INOTIFY): "Inotify",
    int(_Kind.PTY_MASTER): "Pty",
    int(_Kind.PTY_SLAVE): "Pty",
}
# What it may be instead: a deleted file that is mapped as well.
_OTHERS = {int(_Kind.DELETED): ("SharedFile",)}
_LAST_OWNER = int(max(f.OwnerType))
_NAMES = {int(kind): kind.name for kind in _Kind}
_RESENT = tuple(
    map(int, (_Kind.REGULAR, _Kind.DIRECTORY, _Kind.PATH, _Kind.DEVICE))
)  # have no state but offset and flags
_BY_PATH = (*_RESENT, *map(int, (_Kind.FIFO, _Kind.PTY_MASTER, _Kind.PTY_SLAVE)))
_PTY_FLAGS = sum(f.PtyFlag)
_TIOCPKT = 0x7F  # TIOCPKT_FLUSHREAD to TIOCPKT_IOCTL
_MAX_PTY = 1 << 20  # NR_UNIX98_PTY_MAX
_TERMIOS2 = 44


class FilesOrder:
    """The records of descriptors in one stream.

    fail:    called with a message; raises
    in_tree: called with a pid; fails if the present tree does not have it"""

    def __init__(
        self, references: References, fail: Callable[[str], NoReturn], in_tree: Callable[[int], object]
    ) -> None:
        self._references = references
        self._fail = fail
        self._in_tree = in_tree
        self._sizes: dict[int, int] = {}  # of DeletedFiles, by objref
        self._opened: dict[int, int] = {}  # of Files: hash of kind and path, which stay when it comes again
        self._kinds: dict[int, int] = {}  # of Files, by objref
        self._watches: dict[int, int] = {}  # of Inotifys: the last wd
        self._ptys: dict[int, int] = {}  # of Ptys: flags
        self._masters: set[int] = set()  # Ptys whose PTY_MASTER came
        self._typed: set[int] = set()  # Ptys whose line that is being typed came
        self._connections: set[int] = set()  # Sockets whose SocketTcp came
        self.checks: dict[type[Record], Callable[[Any], None]] = {
            f.FileTable: self._table,
            f.File: self._file,
            f.PipeBuffer: self._pipe_buffer,
            f.EpollItems: self._epoll_items,
            f.TimerFd: self._timer,
            f.DeletedFile: self._deleted_file,
            f.FileData: self._file_data,
            f.PidFd: self._pidfd,
            f.InotifyWatch: self._watch,
            f.Pty: self._pty,
            f.PtyData: self._pty_data,
            f.FileLock: self._lock,
            f.FileOwner: self._owner,
            f.Socket: self._socket,
            f.SocketBuffer: self._socket_buffer,
            f.SocketTcp: self._socket_tcp,
        }

    def _table(self, table: f.FileTable) -> None:
        last = -1
        for item in table.descriptors:
            if not last < item.fd <= MAX_FD:
                self._fail(f"fd {item.fd} after fd {last}")
            if item.cloexec > 1 or item.reserved:
                self._fail(f"fd {item.fd}: unknown flags")
            self._references.use(item.file_objref, "File", f"fd {item.fd}")
            last = item.fd

    def _file(self, file: f.File) -> None:
        kind = file.kind
        if kind not in _NAMES:
            self._fail(f"unknown kind {kind}")
        wanted = _INODES.get(kind)
        if wanted is not None:
            self._references.use(file.inode_objref, wanted, f"a file of kind {_NAMES[kind]}", *_OTHERS.get(kind, ()))
        elif file.inode_objref:
            self._fail(f"a file of kind {_NAMES[kind]} has no object of its own")
        if kind in _BY_PATH and not file.path.startswith("/"):
            self._fail(f"path {file.path!r} is not absolute")
        if file.pos < 0 or file.size > MAX_OFFSET:
            self._fail(f"impossible offset {file.pos} or size {file.size}")
        opened = hash((kind, file.path))
        if self._opened.get(file.objref, opened) != opened:
            self._fail(f"file {file.objref} comes again as another one")
        if file.objref in self._opened and kind not in _RESENT:
            self._fail(f"a file of kind {_NAMES[kind]} comes twice")
        self._opened[file.objref], self._kinds[file.objref] = opened, kind
        if kind in (_Kind.PTY_MASTER, _Kind.PTY_SLAVE):
            self._end_of_pty(file)
        if file.lock > 2:
            self._fail(f"unknown lock {file.lock}")
        if file.owner_type > _LAST_OWNER or not 0 <= file.owner_signal <= NSIG:
            self._fail(f"owner of type {file.owner_type} with signal {file.owner_signal}")
        if not 0 <= file.owner_pid <= MAX_PID:
            self._fail(f"owned by impossible pid {file.owner_pid}")

    def _pipe_buffer(self, buffer: f.PipeBuffer) -> None:
        self._chunk(buffer.pipe_objref, "Pipe", buffer.flags, buffer.data)

    def _epoll_items(self, items: f.EpollItems) -> None:
        self._in_tree(items.pid)
        self._references.use(items.epoll_objref, "File", "the epoll instance")
        for item in items.items:
            if item.reserved or item.fd < 0:
                self._fail(f"item of fd {item.fd}")
            self._references.use(item.file_objref, "File", f"item of fd {item.fd}")

    def _timer(self, timer: f.TimerFd) -> None:
        if timer.flags > 3:  # TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET
            self._fail(f"unknown flags {timer.flags:#x}")

    def _deleted_file(self, file: f.DeletedFile) -> None:
        if file.size > MAX_OFFSET:
            self._fail(f"impossible size {file.size}")
        self._sizes[file.objref] = file.size

    def _file_data(self, data: f.FileData) -> None:
        self._chunk(data.inode_objref, "DeletedFile", 0, data.data)
        if data.offset + len(data.data) > self._sizes[data.inode_objref]:
            self._fail(f"{len(data.data)} bytes at {data.offset} are beyond the end of the file")

    def _pidfd(self, pidfd: f.PidFd) -> None:
        if pidfd.pid:
            self._in_tree(pidfd.pid)

    def _watch(self, watch: f.InotifyWatch) -> None:
        self._references.use(watch.inotify_objref, "Inotify", "a watch")
        if not self._watches.get(watch.inotify_objref, 0) < watch.wd:
            self._fail(f"watch {watch.wd} after watch {self._watches.get(watch.inotify_objref, 0)}")
        self._watches[watch.inotify_objref] = watch.wd
        if watch.mask & ~_WATCH_MASK or not watch.mask & _WATCH_EVENTS:
            self._fail(f"unknown mask {watch.mask:#x}")
        if not watch.path.startswith("/"):
            self._fail(f"path {watch.path!r} is not absolute")

    def _pty(self, pty: f.Pty) -> None:
        if pty.index >= _MAX_PTY or pty.flags & ~_PTY_FLAGS or pty.status & ~_TIOCPKT or pty.mode & ~0o7777:
            self._fail(f"terminal {pty.index}: flags {pty.flags:#x}, status {pty.status:#x}, mode {pty.mode:o}")
        if not 0 <= pty.session <= MAX_PID or not 0 <= pty.foreground <= MAX_PID:
            self._fail(f"terminal {pty.index}: session {pty.session}, group {pty.foreground}")
        hung_up = bool(pty.flags & f.PtyFlag.HUNG_UP)
        if (pty.foreground and not pty.session) or (hung_up and pty.session):
            self._fail(f"terminal {pty.index} of session {pty.session} has group {pty.foreground} in the foreground")
        if hung_up and pty.flags & f.PtyFlag.SLAVE_CLOSED:
            self._fail(f"terminal {pty.index}: both ends are closed")
        if pty.status and not pty.flags & f.PtyFlag.PACKET:
            self._fail(f"terminal {pty.index}: status {pty.status:#x} without packet mode")
        if len(pty.termios) != _TERMIOS2 and not (hung_up and not pty.termios):
            self._fail(f"terminal {pty.index}: {len(pty.termios)} bytes of termios instead of {_TERMIOS2}")
        if pty.session:
            self._in_tree(pty.session)
        self._ptys[pty.objref] = pty.flags

    def _pty_data(self, data: f.PtyData) -> None:
        self._references.use(data.pty_objref, "Pty", "what waits in a terminal")
        if not 1 <= data.direction <= 2 or data.end > max(f.PtyEnd) or (data.end and data.direction == 2):
            self._fail(f"direction {data.direction}, end {data.end}")
        if self._ptys[data.pty_objref] & f.PtyFlag.HUNG_UP:
            self._fail("waits in a terminal that was hung up")
        if not data.data and data.end != f.PtyEnd.EOF:
            self._fail("nothing waits")
        if len(data.data) > f.MAX_CHUNK:
            self._fail(f"{len(data.data)} bytes in one piece")
        if data.direction == 1 and data.end and data.pty_objref in self._typed:
            self._fail("a line behind the one that is being typed")
        if data.direction == 1 and not data.end:
            self._typed.add(data.pty_objref)

    def _end_of_pty(self, file: f.File) -> None:
        flags = self._ptys[file.inode_objref]
        if file.kind == _Kind.PTY_SLAVE:
            if flags & f.PtyFlag.SLAVE_CLOSED:
                self._fail("a slave that is closed")
            return
        if flags & f.PtyFlag.HUNG_UP or file.inode_objref in self._masters:
            self._fail("a master that is closed, or another one has it")
        self._masters.add(file.inode_objref)

    def _owner(self, owner: f.FileOwner) -> None:
        self._references.use(owner.owned_objref, "File", "an owner", "MappedFile")
        if self._kinds.get(owner.owned_objref, int(_Kind.REGULAR)) not in f.OWNED_INODES:
            self._fail(f"an owner of file {owner.owned_objref}, which has none of its own")

    def _lock(self, lock: f.FileLock) -> None:
        self._references.use(lock.file_objref, "File", "a lock")
        if lock.pid:
            self._in_tree(lock.pid)
        if lock.kind not in (1, 2) or lock.fd < 0:
            self._fail(f"unknown kind {lock.kind} of lock, or impossible fd {lock.fd}")
        if lock.start > MAX_OFFSET or lock.length > MAX_OFFSET - lock.start:
            self._fail(f"{lock.length} bytes locked at {lock.start}")

    def _socket(self, socket: f.Socket) -> None:
        if socket.state not in f.SocketState._value2member_map_:
            self._fail(f"unknown state {socket.state}")
        if socket.shutdown > 3 or socket.buf_lock > 3:
            self._fail(f"unknown flags: shutdown {socket.shutdown}, buf_lock {socket.buf_lock}")
        if max(len(socket.local), len(socket.peer)) > MAX_SOCKADDR:
            self._fail(f"addresses of {len(socket.local)} and {len(socket.peer)} bytes")

    def _socket_buffer(self, buffer: f.SocketBuffer) -> None:
        self._chunk(buffer.socket_objref, "Socket", buffer.flags, buffer.data)
        if len(buffer.address) > MAX_SOCKADDR:
            self._fail(f"an address of {len(buffer.address)} bytes")

    def _socket_tcp(self, tcp: f.SocketTcp) -> None:
        self._references.use(tcp.socket_objref, "Socket", "a connection")
        if tcp.socket_objref in self._connections:
            self._fail(f"the connection of socket {tcp.socket_objref} comes twice")
        self._connections.add(tcp.socket_objref)
        if tcp.unsent > len(tcp.sent):
            self._fail(f"{tcp.unsent} bytes not sent, of {len(tcp.sent)}")
        if max(tcp.snd_wscale, tcp.rcv_wscale) > 14:
            self._fail(f"windows scaled by {tcp.snd_wscale} and {tcp.rcv_wscale} (RFC 7323 has at most 14)")

    def _chunk(self, objref: int, kind: str, flags: int, data: bytes) -> None:
        self._references.use(objref, kind, "contents")
        if flags > 1:
            self._fail(f"unknown flags {flags:#x}")
        if len(data) > f.MAX_CHUNK:
            self._fail(f"{len(data)} bytes in one piece, {f.MAX_CHUNK} are allowed")
