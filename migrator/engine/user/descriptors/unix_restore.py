"""Unix sockets made again: pairs, listeners, names, and what was on its way."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from migrator.engine.user.descriptors import addresses, sockopts
from migrator.engine.user.descriptors.made_sockets import MadeSockets
from migrator.engine.user.descriptors.netns import NetNs
from migrator.engine.user.descriptors.private_root import Move, PrivateRoot
from migrator.errors import ImageError, RestartFailed
from migrator.image.records_files import MAX_CHUNK, Socket, SocketBuffer, SocketState
from migrator.linux.credentials import as_user
from migrator.linux.openat2 import open_in_root

T = TypeVar("T")
_KINDS = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)
_MAX_WAITING = 64 << 20  # bytes on their way in all sockets together
_ROOM = 1 << 16
_PARTS = 32 << 10


class UnixRestore(MadeSockets[socket.socket]):
    """Records are gathered; settle() makes the sockets, in an order in which every name is free."""

    def __init__(self, root_fd: int, net: NetNs) -> None:
        super().__init__()
        self._root_fd = root_fd
        self._net = net
        self._records: dict[int, Socket] = {}
        self._buffers: dict[int, list[SocketBuffer]] = {}
        self._bytes = 0
        self._others: list[socket.socket] = []  # ends that the tree does not have: closed when settled
        self._roots: dict[str, PrivateRoot] = {}
        self._bound_in: dict[int, PrivateRoot] = {}
        self._peers: dict[int, tuple[int, int]] = {}  # uid and gid that SO_PEERCRED names, where it is not root

    def add(self, rec: Socket) -> None:
        if rec.type not in _KINDS or rec.protocol:
            raise ImageError(f"socket {rec.objref}: unknown type {rec.type} or protocol {rec.protocol}")
        for raw in (rec.local, rec.peer):
            if raw and not isinstance(addresses.unpack(raw), bytes):
                raise ImageError(f"socket {rec.objref}: an address of another family")
        ids, options = sockopts.split_peer_user(rec.options)
        if any(ids):
            self._peers[rec.objref] = ids
        self._records[rec.objref] = replace(rec, options=options)  # the record is compared in a second look

    def buffer(self, rec: SocketBuffer) -> None:
        self._bytes += len(rec.data) + 64
        if self._bytes > _MAX_WAITING or len(rec.data) > MAX_CHUNK:
            raise ImageError(f"socket {rec.socket_objref}: more on its way than sockets hold")
        self._buffers.setdefault(rec.socket_objref, []).append(rec)

    def settle(self) -> None:
        """Make all sockets. Listeners come after connections, which need their names for a moment."""
        for rec in self._records.values():
            if rec.state in (SocketState.CONNECTED, SocketState.PEER_GONE) and rec.objref not in self._made:
                self._connect(rec)
        for rec in self._records.values():
            if rec.objref not in self._made:
                self._made[rec.objref] = sock = self._net.socket(rec.family, rec.type)
                if rec.local:
                    self._bind(sock, rec, rec.objref)
                if rec.state == SocketState.LISTENING:
                    self._as_peer(rec, partial(sock.listen, min(rec.backlog, 1 << 16)))
        loose = [r for r in self._records.values() if r.type == socket.SOCK_DGRAM and self._is_loose(r)]
        for rec in loose:
            self._fill_named(rec)
        for rec in loose:
            if rec.state == SocketState.CONNECTED:
                self._reach(self._made[rec.objref], self._peer(rec))
        self._finish()

    @property
    def moves(self) -> list[Move]:
        return [move for folder, root in self._roots.items() if folder for move in root.moves_in(folder)]

    def activate(self) -> None:
        for root in self._roots.values():
            root.commit()

    def close(self) -> None:
        super().close()
        for sock in self._others:
            sock.close()
        for root in self._roots.values():
            root.close()
        self._roots.clear()

    # ------------------------------------------------------------------ connections

    def _peer(self, rec: Socket) -> Socket:
        peer = self._records.get(rec.peer_objref)
        itself = peer is rec and not (rec.type == socket.SOCK_DGRAM and rec.local)
        if peer is None or peer.type != rec.type or itself:
            raise ImageError(f"socket {rec.objref}: its peer {rec.peer_objref} is no socket of its type")
        return peer

    def _is_loose(self, rec: Socket) -> bool:
        """A datagram socket that finds its peer by name, rather than one of a pair."""
        if rec.state == SocketState.PEER_GONE:
            return False
        if rec.state != SocketState.CONNECTED:
            return True
        peer = self._peer(rec)
        return peer.peer_objref != rec.objref or bool(peer.local and rec.local)

    def _connect(self, rec: Socket) -> None:
        if rec.state == SocketState.PEER_GONE:
            gone = replace(rec, objref=0, local=rec.peer, path="", options=[])
            mine, other = self._pair(rec, gone)
            self._made[rec.objref] = mine
            self._others.append(other)
            self._fill(other, mine, rec)
            return
        peer = self._peer(rec)
        if rec.type == socket.SOCK_DGRAM and self._is_loose(rec):
            return
        if peer.peer_objref != rec.objref or peer.state != SocketState.CONNECTED:
            raise ImageError(f"socket {rec.objref}: its peer {peer.objref} is connected to another")
        mine, other = self._pair(rec, peer)
        self._made[rec.objref], self._made[peer.objref] = mine, other
        self._fill(other, mine, rec)
        self._fill(mine, other, peer)

    def _pair(self, a: Socket, b: Socket) -> tuple[socket.socket, socket.socket]:
        """Two connected sockets with the names of these records."""
        if a.type == socket.SOCK_DGRAM or not (a.local or b.local):
            with self._net:
                mine, other = self._as_peer(a, partial(socket.socketpair, socket.AF_UNIX, a.type))
            for sock, rec in ((mine, a), (other, b)):
                if rec.local:
                    self._bind(sock, rec, rec.objref)
            return mine, other
        listeners = {r.local for r in self._records.values() if r.state == SocketState.LISTENING}
        if not a.local or (b.local in listeners and a.local not in listeners):
            other, mine = self._pair(b, a)
            return mine, other
        with self._net.socket(a.family, a.type) as listener:
            client = self._net.socket(b.family, b.type)
            if b.local:
                self._bind(client, b, b.objref)
            root, inside = self._bind(listener, a, 0)
            # each end is told who did the other half: b who listened, a who connected
            self._as_peer(b, partial(listener.listen, 1))
            _within(root, lambda: self._as_peer(a, partial(client.connect, a.local[2:])))
            accepted, _ = listener.accept()
            if root is not None and not a.path:
                root.remove(inside)
        return accepted, client

    def _as_peer(self, rec: Socket, function: Callable[[], T]) -> T:
        """Do what makes the kernel note the peer of `rec`, as the user that was noted before."""
        ids = self._peers.get(rec.objref)
        return function() if ids is None else as_user(*ids, function)

    # ------------------------------------------------------------------ names

    def _bind(self, sock: socket.socket, rec: Socket, objref: int) -> tuple[PrivateRoot | None, str]:
        """Bind to the name of `rec`; (the private root it was done in, the file's path inside)."""
        address = rec.local[2:]
        try:
            if address[:1] == b"\0":
                sock.bind(address)
                return None, ""
            root = self._root_of(rec)
            inside = root.prepare(address)
            root.remove(inside)
            root.run(lambda: sock.bind(address))
            if rec.path:
                root.moves(inside, os.path.basename(rec.path), rec.mode, rec.uid, rec.gid)
            if objref:
                self._bound_in[objref] = root
            return root, inside
        except OSError as error:
            raise RestartFailed(
                f"the unix socket {addresses.show(rec.local)} cannot be bound: {error}",
                hint="is its directory there on this host, or another program using its name?",
            ) from error

    def _root_of(self, rec: Socket) -> PrivateRoot:
        """Where the file of a socket is made: beside its place, or anywhere if its file is gone."""
        folder = os.path.dirname(rec.path) if rec.path else ""
        root = self._roots.get(folder)
        if root is None:
            flags = os.O_PATH | os.O_DIRECTORY
            if folder:
                place = open_in_root(self._root_fd, folder.lstrip("/") or ".", flags)
            else:
                place = os.open(tempfile.gettempdir(), flags | os.O_CLOEXEC)
            root = self._roots[folder] = PrivateRoot(place)
        return root

    def _reach(self, sock: socket.socket, rec: Socket) -> None:
        """Connect a datagram socket to the one of `rec`, by its name."""
        if not rec.local:
            raise ImageError(f"socket {rec.objref}: without a name, and somebody is connected to it")
        _within(self._bound_in.get(rec.objref), lambda: sock.connect(rec.local[2:]))

    # ------------------------------------------------------------------ contents

    def _fill(self, sender: socket.socket, receiver: socket.socket, rec: Socket) -> None:
        waiting = self._buffers.pop(rec.objref, [])
        if not waiting:
            return
        total = sum(len(buffer.data) + 1024 for buffer in waiting)
        sockopts.force_buffers(sender, 4 * (total + _ROOM), 4 * (total + _ROOM))
        for data in _parts(waiting, whole=rec.type != socket.SOCK_STREAM):
            if sender.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) != len(data):
                raise RestartFailed(f"socket {rec.objref} does not take what was on its way to it")

    def _fill_named(self, rec: Socket) -> None:
        """Datagrams from anybody: sent by whoever has the sender's name, or by a socket made for it."""
        waiting = self._buffers.pop(rec.objref, [])
        names = {r.local: r.objref for r in self._records.values() if r.local}
        for buffer in waiting:
            if not rec.local:
                raise ImageError(f"socket {rec.objref}: datagrams for a socket without a name or peer")
            known = names.get(buffer.address)
            sender = self._made[known] if known else self._net.socket(rec.family, rec.type)
            try:
                if buffer.address and not known:
                    root, inside = self._bind(sender, replace(rec, local=buffer.address, path=""), 0)
                    if root is not None:
                        root.remove(inside)
                sockopts.force_buffers(sender, 4 * (len(buffer.data) + _ROOM), _ROOM)
                data = buffer.data
                _within(
                    self._bound_in.get(rec.objref),
                    lambda s=sender, d=data: s.sendto(d, socket.MSG_DONTWAIT, rec.local[2:]),  # type: ignore[misc]
                )
            finally:
                if not known:
                    sender.close()

    def _finish(self) -> None:
        if self._buffers:
            raise ImageError(f"socket {next(iter(self._buffers))}: contents for a socket that has none")
        for sock in self._others:
            sock.close()
        for objref, rec in self._records.items():
            sock = self._made[objref]
            if rec.shutdown and rec.state == SocketState.CONNECTED:
                sock.shutdown(rec.shutdown - 1)
            for option in rec.options:
                sockopts.put(sock, option)
            sockopts.force_buffers(sock, rec.sndbuf, rec.rcvbuf)
            sock.setsockopt(sockopts.SOL_SOCKET, sockopts.SO_BUF_LOCK, rec.buf_lock & 3)


def _parts(waiting: Iterable[SocketBuffer], *, whole: bool) -> Iterable[bytes]:
    for buffer in waiting:
        if whole:
            yield buffer.data
        else:
            for start in range(0, len(buffer.data), _PARTS):
                yield buffer.data[start : start + _PARTS]


def _within(root: PrivateRoot | None, function: Callable[[], T]) -> T:
    return function() if root is None else root.run(function)
