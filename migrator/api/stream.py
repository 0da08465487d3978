"""A descriptor that another thread reads or writes, and that can be taken away from it.

An engine blocks in read(2) or write(2) until its stream goes on, and no signal reaches a thread that is not
the first. So it works on a descriptor of ours: `cut()` puts another file in its place, from which reading ends
and to which writing fails, and wakes whoever waits in the old one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat

from migrator.errors import MigratorError

_AMOUNT = 1 << 20


class StreamCut(MigratorError):
    """Whoever waited for it has given up."""


class Stream:
    """The stream of an image. `fd` is the descriptor for the engine; the one given stays with the caller."""

    def __init__(self, fd: int, *, writing: bool) -> None:
        self._given = os.dup(fd)
        self._writing = writing
        self.was_cut = False
        self.fd = os.dup(fd)

    def check(self) -> None:
        """Raises StreamCut if it was cut, for whoever has read or written all of it before that."""
        if self.was_cut:
            raise StreamCut("the stream was cut")

    def cut(self) -> None:
        """Whoever reads comes to the end, whoever writes gets EPIPE. To be called again until the thread has
        noticed: it may just have been about to block. What is in a pipe is spoilt by it; a socket is shut down."""
        if not self.was_cut:
            self.was_cut = True
            self._replace()
        self._wake()

    def _replace(self) -> None:
        if not self._writing:
            other = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        else:
            read, other = os.pipe2(os.O_CLOEXEC)
            os.close(read)
        os.dup2(other, self.fd, inheritable=False)
        os.close(other)

    def _wake(self) -> None:
        mode = os.fstat(self._given).st_mode
        if stat.S_ISSOCK(mode):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._given)) as peer:
                peer.shutdown(socket.SHUT_RDWR)
        elif stat.S_ISFIFO(mode):
            how = os.O_RDONLY if self._writing else os.O_WRONLY
            with contextlib.suppress(OSError):
                other = os.open(f"/proc/self/fd/{self._given}", how | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    if self._writing:
                        os.read(other, _AMOUNT)
                    else:
                        os.write(other, b"\0")
                finally:
                    os.close(other)

    def close(self) -> None:
        for fd in (self._given, self.fd):
            os.close(fd)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
