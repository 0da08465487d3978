"""Sockets made again: unix sockets and their partners, TCP and UDP, netlink."""

from __future__ import annotations

import socket
from typing import Protocol

from migrator.engine.user.descriptors.inet_restore import InetRestore
from migrator.engine.user.descriptors.netlink import NetlinkRestore
from migrator.engine.user.descriptors.netns import NetNs
from migrator.engine.user.descriptors.private_root import Move
from migrator.engine.user.descriptors.unix_restore import UnixRestore
from migrator.errors import ImageError
from migrator.image import records_files as r


class Context(Protocol):
    @property
    def root_fd(self) -> int: ...
    @property
    def netns(self) -> str | None: ...


class SocketRestore:
    """Takes records, gives descriptors. Nothing is sent before activate()."""

    def __init__(self, context: Context) -> None:
        self._net = NetNs(context.netns)
        self._unix = UnixRestore(context.root_fd, self._net)
        self._inet = InetRestore(self._net)
        self._netlink = NetlinkRestore(self._net)
        self._families: dict[int, UnixRestore | InetRestore | NetlinkRestore] = {}
        self._taken: set[int] = set()
        self._settled = False

    def add(self, rec: r.Socket) -> None:
        family = self._add(rec)
        family.add(rec)

    def add_early(self, rec: r.Socket) -> None:
        """A connection of TCP while its program still runs. It counts once its SocketTcp comes."""
        if self._add(rec) is not self._inet or rec.state != r.SocketState.CONNECTED or rec.type != socket.SOCK_STREAM:
            raise ImageError(f"socket {rec.objref} comes too early")
        self._inet.add_early(rec)

    def _add(self, rec: r.Socket) -> UnixRestore | InetRestore | NetlinkRestore:
        if rec.objref in self._families or self._settled:
            raise ImageError(f"socket {rec.objref} comes twice, or too late")
        if rec.state not in tuple(r.SocketState) or rec.shutdown > 3:
            raise ImageError(f"socket {rec.objref}: unknown state {rec.state}")
        family: UnixRestore | InetRestore | NetlinkRestore = self._inet
        if rec.family == socket.AF_UNIX:
            family = self._unix
        elif rec.family == socket.AF_NETLINK:
            family = self._netlink
        self._families[rec.objref] = family
        return family

    def buffer(self, rec: r.SocketBuffer) -> None:
        self._family(rec.socket_objref).buffer(rec)

    def tcp(self, rec: r.SocketTcp) -> None:
        if self._family(rec.socket_objref) is not self._inet:
            raise ImageError(f"socket {rec.socket_objref} is none of TCP")
        self._inet.tcp(rec)

    def take(self, objref: int) -> int:
        """The descriptor of a socket, which becomes the caller's. Once per socket."""
        family = self._family(objref)
        if objref in self._taken:
            raise ImageError(f"socket {objref} is open twice")
        if not self._inet.is_early(objref):
            self.settle()
        self._taken.add(objref)
        return family.take(objref)

    def has_come(self, objref: int) -> bool:
        """Whether the state of a connection of TCP came."""
        return self._inet.has_come(objref)

    def activate(self) -> None:
        """Connections speak, and files of unix sockets are in their places."""
        self._unix.activate()
        self._inet.activate()

    def close(self) -> None:
        self._unix.close()
        self._inet.close()
        self._netlink.close()
        self._net.close()

    @property
    def moves(self) -> list[Move]:
        """What activate() does to the files of unix sockets."""
        return self._unix.moves

    def settle(self) -> None:
        """All Sockets and their contents came: what needs several of them is done now."""
        if not self._settled:
            self._settled = True
            self._unix.settle()
            self._inet.settle()
            self._netlink.settle()

    def _family(self, objref: int) -> UnixRestore | InetRestore | NetlinkRestore:
        family = self._families.get(objref)
        if family is None:
            raise ImageError(f"there is no socket {objref}")
        return family
