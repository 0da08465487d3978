"""Listening sockets of a running tree: whether connections wait to be accepted.

Such a connection belongs to no descriptor yet and cannot be saved, so the freeze fails while there is one.
A program takes them within microseconds when it runs: with new ones held back by the network lock, a
freeze that waits for this moment finds none.

    with Listeners(processes) as listeners:      # ahead of the freeze
        ...                                      # hold the network
        listeners.settle(0.005)                  # then freeze
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Sequence
from types import TracebackType

from migrator.engine.user.descriptors import calls, fdinfo
from migrator.engine.user.descriptors.description import Holder

_PAUSE = 0.0002


class Listeners:
    """The listeners that `processes` have now, each held by a duplicate: close it soon.

    A process or descriptor that vanishes meanwhile is left out."""

    def __init__(self, processes: Sequence[Holder]) -> None:
        self._fds: list[int] = []
        self._poll = select.poll()
        seen: set[str] = set()
        for process in processes:
            try:
                for number in fdinfo.numbers(process.pid):
                    link = os.readlink(f"/proc/{process.pid}/fd/{number}")
                    if link.startswith("socket:[") and link not in seen:
                        seen.add(link)
                        self._look(process, number)
            except OSError:
                continue

    def _look(self, process: Holder, number: int) -> None:
        fd = calls.pidfd_getfd(process.pidfd, number)
        sock = socket.socket(fileno=fd)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            self._fds.append(sock.detach())
            self._poll.register(fd, select.POLLIN)
        else:
            sock.close()

    @property
    def waiting(self) -> int:
        """Listeners with a connection that waits."""
        return len(self._poll.poll(0))

    def settle(self, seconds: float) -> bool:
        """Wait for the program to have accepted everything, at most this long; whether it has."""
        end = time.monotonic() + seconds
        while self.waiting:
            if time.monotonic() > end:
                return False
            time.sleep(_PAUSE)
        return True

    def close(self) -> None:
        for fd in self._fds:
            self._poll.unregister(fd)
            os.close(fd)
        self._fds.clear()

    def __enter__(self) -> Listeners:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
