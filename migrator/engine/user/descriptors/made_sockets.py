"""What the sockets of every family have in common once they are made again."""

from __future__ import annotations

from socket import SocketType
from typing import Generic, TypeVar

S = TypeVar("S", bound=SocketType)


class MadeSockets(Generic[S]):
    """Sockets by objref. The descriptor of one that was taken is its taker's to close, the others are ours."""

    def __init__(self) -> None:
        self._made: dict[int, S] = {}
        self._taken: set[int] = set()

    def take(self, objref: int) -> int:
        self._taken.add(objref)
        return self._made[objref].fileno()

    def close(self) -> None:
        for objref, sock in self._made.items():
            if objref in self._taken:
                sock.detach()
            else:
                sock.close()
        self._made.clear()
