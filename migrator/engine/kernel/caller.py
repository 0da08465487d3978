"""The process that calls restart(), and becomes the root of the tree.

    caller = Caller.start(1234, namespaces)
    ...                                        # its cgroup, what stands around it
    caller.write(data)                         # the stream
    caller.complete()                          # all tasks are what they were, and wait for their freezer

It has two descriptors: the stream, and one to tell of an error. When it has become the root it has neither any more,
so the end of the second without a word says that the tree is complete. Nothing of it runs then before it is frozen
and thawed: RESTART_FROZEN.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct

from migrator.engine.kernel import calls
from migrator.engine.spawn import spawn
from migrator.errors import RestartFailed
from migrator.linux import pidfd
from migrator.linux import x86_64 as arch

_PIPE_SIZE = 1 << 20
_GO = b"g"


class Caller:
    """`pid` is ours of it; the end of it is the caller's business: kill()."""

    def __init__(self, pid: int, pidfd: int, stream: int, status: int) -> None:
        self.pid = pid
        self._pidfd, self._stream, self._status = pidfd, stream, status
        self._gone = False

    @classmethod
    def start(cls, pid: int, namespaces: int = 0, *, unshare: int = 0) -> Caller:
        """A child of this thread with this pid, in new `namespaces`; it calls unshare(2) once the stream begins.

        Raises RestartFailed if the pid is taken."""
        theirs, stream = os.pipe2(os.O_CLOEXEC)
        status, tell = os.pipe2(os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # a limit of pipe-user-pages: slower
                fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
            os.set_blocking(stream, False)
            code = arch.caller_code(theirs, tell, unshare)
            made = spawn([pid], namespaces, code=code, keep=(theirs, tell))
        except BaseException:
            os.close(stream)
            os.close(status)
            raise
        finally:
            os.close(theirs)
            os.close(tell)
        return cls(*made, stream, status)

    def go(self) -> None:
        """What follows is the stream."""
        os.write(self._stream, _GO)

    def write(self, data: bytes | memoryview) -> bool:
        """Hand it over; false if it was not taken because the caller has ended its call: see complete()."""
        view = memoryview(data)
        poll = select.poll()
        poll.register(self._stream, select.POLLOUT)
        poll.register(self._status, select.POLLIN)
        while view:
            ready = dict(poll.poll())
            if self._status in ready:
                return False
            try:
                view = view[os.write(self._stream, view) :]
            except BrokenPipeError:
                return False
            except BlockingIOError:
                continue
        return True

    def read(self, fd: int, size: int) -> bytes | None:
        """The next bytes of `fd`, b"" at its end; None if the caller has ended its call meanwhile."""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self._status, select.POLLIN)
        return None if self._status in dict(poll.poll()) else os.read(fd, size)

    def complete(self) -> None:
        """The stream has been handed over: wait until the tree is complete. Raises ImageError or RestartFailed."""
        self._close_stream()
        said = os.read(self._status, 8)
        if said:
            (result,) = struct.unpack("<q", said.ljust(8, b"\xff"))
            raise calls.restart_failed(-result, calls.last_error(self.pid))
        if pidfd.ends(self._pidfd, 0):
            raise RestartFailed(f"pid {self.pid}, which was to become the root, was killed")

    def kill(self) -> None:
        """End it and take its end. Twice does no harm."""
        if not self._gone:
            self._gone = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)

    def close(self) -> None:
        """Close what we have of it. Twice does no harm."""
        self._close_stream()
        for fd in (self._status, self._pidfd):
            if fd >= 0:
                os.close(fd)
        self._status = self._pidfd = -1

    def _close_stream(self) -> None:
        if self._stream >= 0:
            os.close(self._stream)
            self._stream = -1
