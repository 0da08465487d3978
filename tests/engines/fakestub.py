"""A process that stands in for the stubs of the user engine, and for the workload.

    with Child() as child:
        child.run("r, w = os.pipe()")      # statements, in the child
        child.ask("os.read(r, 10)")        # an expression: its value

As a stub it is given descriptors and makes system calls, as the engine's own stubs do.
"""

from __future__ import annotations

import array
import ctypes
import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import pytest

from migrator.engine.user.descriptors import Holder, fdinfo

_CONTROL = 1000  # number of the child's end of the control socket, above all that tests use

_PRELUDE = """
import os, socket, select, fcntl, struct, signal, ctypes, time, array

def _flags():
    out = []
    for n in range(900):
        try:
            out.append((n, fcntl.fcntl(n, fcntl.F_GETFL), fcntl.fcntl(n, fcntl.F_GETFD)))
        except OSError:
            pass
    return out

def adopt(n):
    return socket.socket(fileno=n)

def receive(sock, count):
    out = b""
    while len(out) < count and (part := sock.recv(count - len(out))):
        out += part
    return out
"""


def hide_control(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control sockets are the test's own: they are not part of what is saved."""
    all_of = fdinfo.numbers
    monkeypatch.setattr(fdinfo, "numbers", lambda pid: [n for n in all_of(pid) if n < _CONTROL])


class Child:
    """A child that does what it is told. `vpid` is its pid in the image."""

    def __init__(self, vpid: int = 0, *, keep: bool = False, before: Callable[[], None] | None = None) -> None:
        self._ended = False
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._ours.close()
                os.dup2(theirs.fileno(), _CONTROL)
                if not keep:
                    os.closerange(0, _CONTROL)
                os.closerange(_CONTROL + 1, 4096)
                if before is not None:
                    before()
                _serve()
            finally:
                os._exit(1)
        theirs.close()
        self.vpid = vpid or self.pid
        self.pidfd = os.pidfd_open(self.pid)
        self.ask("None")  # it has closed what it inherited

    @property
    def process(self) -> Holder:
        return Holder(self.pid, self.vpid, self.pidfd)

    def run(self, code: str) -> None:
        self._tell(("run", code))

    def ask(self, expression: str) -> Any:
        return self._tell(("ask", expression))

    def stop(self) -> None:
        """Stop it as a signal does; returns when it stands."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    # -- as a stub

    def install_fds(self, items: list[tuple[int, int, bool]]) -> None:
        self._tell(("install", [(number, cloexec) for _, number, cloexec in items]), [fd for fd, _, _ in items])

    def call_batch(self, calls: Sequence[tuple[int, ...]]) -> list[int]:
        return list(self._tell(("batch", [tuple(call) for call in calls])))

    def put(self, data: bytes) -> int:
        return int(self._tell(("put", data)))

    # -- inside

    def _tell(self, message: Any, fds: Sequence[int] = ()) -> Any:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._ours.sendmsg([pickle.dumps(message)], ancillary)
        good, value = pickle.loads(self._ours.recv(1 << 20))
        if not good:
            raise AssertionError(f"in the child: {value}")
        return value

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def end(self) -> None:
        """Kill it; its pid stays known."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._ended = True

    def kill(self) -> None:
        if not self._ended:
            self.end()
        os.close(self.pidfd)
        self._ours.close()


def _serve() -> None:
    control = socket.socket(fileno=_CONTROL)
    # reading descriptors needs room for them below: recv_fds gives the lowest free numbers
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    scratch = ctypes.create_string_buffer(1 << 16)
    names: dict[str, Any] = {}
    exec(_PRELUDE, names)
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1 << 20, 250)
        if not data:
            os._exit(0)
        kind, argument = pickle.loads(data)
        try:
            value = None
            if kind == "run":
                exec(argument, names)
            elif kind == "ask":
                value = eval(argument, names)
            elif kind == "put":
                ctypes.memmove(scratch, argument, len(argument))
                value = ctypes.addressof(scratch)
            elif kind == "batch":
                value = [_call(libc, call) for call in argument]
            else:
                _install(fds, argument)
            answer = (True, value)
        except BaseException:
            answer = (False, traceback.format_exc())
        control.send(pickle.dumps(answer))


def _call(libc: Any, call: tuple[int, ...]) -> int:
    result = libc.syscall(*[ctypes.c_long(word) for word in call])
    return -ctypes.get_errno() if result == -1 else int(result)


def _install(fds: list[int], places: list[tuple[int, bool]]) -> None:
    high = [os.dup2(fd, 2000 + index) for index, fd in enumerate(fds)]
    os.closerange(0, _CONTROL)
    for fd, (number, cloexec) in zip(high, places, strict=True):
        os.dup2(fd, number, inheritable=not cloexec)
        os.close(fd)
