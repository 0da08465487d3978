"""Sockets: not carried yet."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

from migrator.engine.user.descriptors.description import Description
from migrator.errors import CheckpointFailed
from migrator.image.codec import Record


class SocketDump:
    def __init__(self, descriptions: Sequence[Description], pid: int) -> None:
        self._descriptions = descriptions

    def collect(self) -> None:
        for item in self._descriptions:
            raise CheckpointFailed(f"{item}: a socket, which is not carried yet")

    def records(self, objref: Callable[[Hashable], int]) -> Iterator[Record]:
        yield from ()

    def close(self, *, silent: bool) -> None: ...
