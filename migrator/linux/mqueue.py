"""POSIX message queues of the calling thread's IPC namespace (mq_overview(7)).

A name is without the slash. Numbers are those of x86-64.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import struct
from collections.abc import Iterator
from typing import NamedTuple

from migrator.linux import sys

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC, _CMD_CREATE = 1, 6  # of fsopen(2) and fsmount(2); of fsconfig(2)
_OPEN, _UNLINK, _SEND, _RECEIVE, _GETSETATTR = 240, 241, 242, 243, 245
_ATTRIBUTES = struct.Struct("<8q")  # struct mq_attr: flags, maxmsg, msgsize, curmsgs
RDWR = os.O_RDWR | os.O_NONBLOCK


class Attributes(NamedTuple):
    max_messages: int
    message_size: int
    messages: int  # that wait


@contextlib.contextmanager
def mounted() -> Iterator[int]:
    """A descriptor of a mount that nobody sees: the directory that has all queues."""
    kind = ctypes.create_string_buffer(b"mqueue")
    context = sys.call(_FSOPEN, ctypes.addressof(kind), _CLOEXEC, name="fsopen", about="mqueue")
    try:
        sys.call(_FSCONFIG, context, _CMD_CREATE, 0, 0, 0, name="fsconfig", about="mqueue")
        mount = sys.call(_FSMOUNT, context, _CLOEXEC, 0, name="fsmount", about="mqueue")
    finally:
        os.close(context)
    try:
        yield mount
    finally:
        os.close(mount)


def names() -> list[str]:
    """Of all queues."""
    with mounted() as mount:
        return listing(mount)


def listing(mount: int) -> list[str]:
    return sorted(os.listdir(f"/proc/self/fd/{mount}"))  # fsmount(2) gives an O_PATH descriptor


def device() -> int:
    """st_dev of all queues of the namespace."""
    with mounted() as mount:
        return os.fstat(mount).st_dev


def open_queue(name: str, flags: int = RDWR) -> int:
    """A descriptor, which is always close-on-exec. `flags` are those of the description: F_GETFL shows all of them."""
    return _open(name, flags, 0, 0)


def create(name: str, attributes: Attributes) -> int:
    """A queue that was not there, and a descriptor of it. What it may have is limited by RLIMIT_MSGQUEUE."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    given = _ATTRIBUTES.pack(0, attributes.max_messages, attributes.message_size, 0, 0, 0, 0, 0)
    buffer = ctypes.create_string_buffer(given, len(given))
    return _open(name, RDWR | os.O_CREAT | os.O_EXCL, 0o600, ctypes.addressof(buffer))


def _open(name: str, flags: int, mode: int, attributes: int) -> int:
    path = ctypes.create_string_buffer(os.fsencode(name))
    return sys.call(_OPEN, ctypes.addressof(path), flags, mode, attributes, name="mq_open", about=f"/{name}")


def unlink(name: str) -> None:
    path = ctypes.create_string_buffer(os.fsencode(name))
    sys.call(_UNLINK, ctypes.addressof(path), name="mq_unlink", about=f"/{name}")


def attributes(fd: int) -> Attributes:
    answer = ctypes.create_string_buffer(_ATTRIBUTES.size)
    sys.call(_GETSETATTR, fd, 0, ctypes.addressof(answer), name="mq_getattr", about=f"fd {fd}")
    return Attributes(*_ATTRIBUTES.unpack(answer.raw)[1:4])


class Status(NamedTuple):
    size: int  # bytes of all messages that wait
    notified: int  # the process that is told of the next one (mq_notify(3)), or 0


def status(fd: int) -> Status:
    """What can be read of a queue, as it can of a file in /dev/mqueue. `fd` is open for reading."""
    fields = dict(word.split(":") for word in os.pread(fd, 256, 0).decode().split() if ":" in word and word[-1] != ":")
    return Status(int(fields["QSIZE"]), int(fields["NOTIFY_PID"]))


def receive(fd: int, address: int, room: int, priority: int) -> int:
    """Take the next message to `address`, where `room` is no less than the queue's message_size, and its priority to
    the u32 at `priority`; how long it is. Raises BlockingIOError where there is none."""
    return sys.call(_RECEIVE, fd, address, room, priority, 0, name="mq_receive", about=f"fd {fd}")


def send(fd: int, address: int, length: int, priority: int) -> None:
    sys.call(_SEND, fd, address, length, priority, 0, name="mq_send", about=f"fd {fd}")


def put(fd: int, priority: int, text: bytes) -> None:
    buffer = ctypes.create_string_buffer(text, max(1, len(text)))
    send(fd, ctypes.addressof(buffer), len(text), priority)
