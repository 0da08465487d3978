"""Unix sockets of a tree, their partners and what is on its way between them."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from migrator.engine.user.descriptors import addresses, diag, pipes, sockopts
from migrator.engine.user.descriptors.classify import DELETED, Obstacle, Root
from migrator.engine.user.descriptors.description import Description
from migrator.errors import CheckpointFailed
from migrator.image.records_files import MAX_CHUNK, Socket, SocketBuffer, SocketOption, SocketState
from migrator.linux.openat2 import open_in_root

SIOCUNIXFILE = 0x89E0
_LISTEN = 10
_WHOLE = 1
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT
_CONTROL = socket.CMSG_SPACE(253 * 4) + socket.CMSG_SPACE(12)

Item = tuple[Description, socket.SocketType]


class BoundFile(NamedTuple):
    """The file that a unix socket was bound to. `there`: it has its name still."""

    path: str
    status: os.stat_result
    there: bool


def file_of(sock: int) -> BoundFile | None:
    """The file of a unix socket, None if it has none."""
    try:
        fd = fcntl.ioctl(sock, SIOCUNIXFILE)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        path = os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    return BoundFile(path, status, not (path.endswith(DELETED) and status.st_nlink == 0))


def place_of(where: BoundFile, root: Root) -> str:
    """Where the file of a socket lies in the tree. Raises Obstacle.

    The name that it was bound to may be another's by now: supervisord gives it its own by link(2) and unlink(2)."""
    status, path = where.status, where.path
    if status.st_nlink > 1:
        raise Obstacle(f"{path.removesuffix(DELETED)}, the file of a unix socket, has other names (link(2))")
    removed = path.endswith(DELETED)
    folder, name = os.path.split(path)
    inside = root.inside(folder)
    if inside is None:
        raise Obstacle(f"{path} lies outside of the root directory of the tree")
    if removed:
        name = _other_name(inside, status, root)
        if not name:
            raise Obstacle(
                f"{path.removesuffix(DELETED)}, the file of a unix socket, has another name in another directory"
            )
    return os.path.join(inside, name)


def _other_name(folder: str, status: os.stat_result, root: Root) -> str:
    with _directory(root.fd, folder.lstrip("/") or ".") as fd, os.scandir(fd) as entries:
        for entry in entries:
            if entry.inode() == status.st_ino and entry.stat(follow_symlinks=False).st_dev == status.st_dev:
                return entry.name
    return ""


@contextlib.contextmanager
def _directory(root: int, path: str) -> Iterator[int]:
    fd = open_in_root(root, path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


class UnixDump:
    """Made and collected inside the network namespace of the tree."""

    def __init__(self, items: Sequence[Item], defaults: sockopts.Defaults) -> None:
        self._items = items
        self._defaults = defaults
        self._known = diag.unix_sockets_here()
        self._by_inode = {item.stat.st_ino: (item, sock) for item, sock in items}
        self._sockets: list[Socket] = []
        self._buffers: list[SocketBuffer] = []
        self._with_file: set[tuple[int, int]] = set()

    def collect(self) -> None:
        entries = []
        for item, sock in self._items:
            entry = self._known.get(item.stat.st_ino)
            if entry is None:
                raise CheckpointFailed(f"{item}: the kernel does not list this unix socket (CONFIG_UNIX_DIAG?)")
            entries.append((item, sock, entry))
        # who listens on a file has the first claim on it; connections come ahead of their listeners' names
        entries.sort(key=lambda e: e[2].state != _LISTEN)
        options = self._defaults.changed([sock for _, sock, _ in entries])
        for (item, sock, entry), changed in zip(entries, options, strict=True):
            sockopts.check(changed, item)
            self._sockets.append(self._socket(item, sock, entry, changed))
            if entry.state != _LISTEN:
                self._buffers += self._waiting(item, sock, ended=bool(entry.shutdown & 1 or not entry.peer))
        self._sockets.sort(key=lambda rec: rec.state not in (SocketState.CONNECTED, SocketState.PEER_GONE))

    def sockets(self, objref: Callable[[int], int]) -> Iterator[Socket]:
        for rec in self._sockets:
            rec.objref = objref(rec.objref)
            rec.peer_objref = objref(rec.peer_objref) if rec.peer_objref else 0
            yield rec

    def buffers(self, objref: Callable[[int], int]) -> Iterator[SocketBuffer]:
        for rec in self._buffers:
            rec.socket_objref = objref(rec.socket_objref)
            yield rec

    def close(self, *, silent: bool) -> None:
        """Nothing was changed."""

    # objrefs of the records are inode numbers until they are written

    def _socket(
        self, item: Description, sock: socket.SocketType, entry: diag.UnixSocket, options: list[SocketOption]
    ) -> Socket:
        state, peer = self._state(item, sock, entry)
        path, mode, uid, gid = self._file(item, sock) if _named(sock) else ("", 0, 0, 0)
        try:
            peer_address = addresses.pack(sock.family, sock.getpeername())
        except OSError:
            peer_address = b""
        query = sock.getsockopt
        return Socket(
            objref=item.stat.st_ino,
            family=sock.family,
            type=sock.type,
            protocol=sock.proto,
            state=state,
            shutdown=entry.shutdown,
            backlog=entry.backlog if state == SocketState.LISTENING else 0,
            peer_objref=peer,
            sndbuf=query(sockopts.SOL_SOCKET, sockopts.SO_SNDBUF),
            rcvbuf=query(sockopts.SOL_SOCKET, sockopts.SO_RCVBUF),
            buf_lock=query(sockopts.SOL_SOCKET, sockopts.SO_BUF_LOCK),
            mode=mode,
            uid=uid,
            gid=gid,
            error=0,
            local=addresses.pack(sock.family, sock.getsockname()),
            peer=peer_address,
            path=path,
            device="",
            congestion="",
            options=options + sockopts.peer_user(sock),
        )

    def _state(self, item: Description, sock: socket.SocketType, entry: diag.UnixSocket) -> tuple[SocketState, int]:
        if entry.state == _LISTEN:
            if entry.waiting or entry.queued:
                raise CheckpointFailed(
                    f"{item}: {entry.waiting or entry.queued} connections wait to be accepted",
                    hint="try again: a moment later the program will have accepted them",
                )
            return SocketState.LISTENING, 0
        if entry.peer < 0:
            return SocketState.UNCONNECTED, 0
        if entry.peer in self._by_inode:
            other = self._known[entry.peer]
            if other.peer != item.stat.st_ino and (
                sock.type != socket.SOCK_DGRAM or not _named(self._by_inode[entry.peer][1])
            ):
                raise CheckpointFailed(f"{item}: a datagram socket connected one way to one without a name")
            return SocketState.CONNECTED, entry.peer
        if entry.peer == 0 and (sock.type == socket.SOCK_DGRAM or entry.shutdown == 3):
            return SocketState.PEER_GONE, 0
        raise CheckpointFailed(
            f"{item}: the other end of this unix socket is outside of the tree",
            hint="save the process that has it along, or have it disconnected first",
        )

    def _file(self, item: Description, sock: socket.SocketType) -> tuple[str, int, int, int]:
        """(path, mode, uid, gid) of the file that a socket is bound to; "" if another record has it."""
        where = file_of(sock.fileno())
        if where is None:
            return "", 0, 0, 0  # an abstract name
        status = where.status
        key = status.st_dev, status.st_ino
        if not where.there or key in self._with_file:
            return "", 0, 0, 0
        self._with_file.add(key)
        try:
            inside = place_of(where, item.root)
        except Obstacle as error:
            raise CheckpointFailed(f"{item}: {error}") from None
        return inside, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid

    def _waiting(self, item: Description, sock: socket.SocketType, *, ended: bool) -> Iterator[SocketBuffer]:
        """What can be received, left in place: the peek offset walks over it. `ended`: nothing more will come."""
        whole = sock.type != socket.SOCK_STREAM
        left = pipes.waiting(sock.fileno())
        if not left and not whole:
            return
        before = sock.getsockopt(sockopts.SOL_SOCKET, sockopts.SO_PEEK_OFF)
        sock.setsockopt(sockopts.SOL_SOCKET, sockopts.SO_PEEK_OFF, 0)
        try:
            while left > 0 or whole:
                try:
                    data, control, flags, sender = sock.recvmsg(
                        MAX_CHUNK, _CONTROL, socket.MSG_PEEK | socket.MSG_DONTWAIT
                    )
                except BlockingIOError:
                    return
                except OSError as error:
                    if error.errno == errno.ENOTCONN:  # of SOCK_SEQPACKET that was never connected
                        return
                    raise
                if not data and not whole:
                    return
                _refuse_control(item, control)
                if whole and flags & socket.MSG_TRUNC:
                    raise CheckpointFailed(f"{item}: a message of more than {MAX_CHUNK} bytes is on its way")
                if not data and sock.type == socket.SOCK_SEQPACKET and ended and left <= 0:
                    return  # the end: an empty message looks the same
                address = addresses.pack(sock.family, sender) if whole and sender else b""
                yield SocketBuffer(item.stat.st_ino, _WHOLE if whole else 0, data, address)
                left -= len(data)
        finally:
            sock.setsockopt(sockopts.SOL_SOCKET, sockopts.SO_PEEK_OFF, before)


def _named(sock: socket.SocketType) -> bool:
    return bool(sock.getsockname())


def _refuse_control(item: Description, control: list[tuple[int, int, bytes]]) -> None:
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds = array.array("i")
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
            for fd in fds:
                os.close(fd)
            raise CheckpointFailed(
                f"{item}: descriptors are on their way through this unix socket (SCM_RIGHTS)",
                hint="try again: a moment later they will have been received",
            )
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            raise CheckpointFailed(
                f"{item}: credentials are on their way through this unix socket (SCM_CREDENTIALS)",
                hint="try again: a moment later they will have been received",
            )
