"""System V IPC of the calling thread's IPC namespace (sysvipc(7)).

    found = with_ipc_namespace(pid, segments)

The functions act in the namespace of the thread that calls them. Numbers are those of x86-64.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from migrator.linux import sys
from migrator.linux.namespaces import entered

T = TypeVar("T")

_SHMGET, _SHMAT, _SHMCTL, _SHMDT = 29, 30, 31, 67
_SEMGET, _SEMCTL, _MSGGET, _MSGSND, _MSGRCV, _MSGCTL = 64, 66, 68, 69, 70, 71
_SETRESUID, _SETRESGID = 117, 119
_IPC_CREAT, _IPC_EXCL, _IPC_NOWAIT = 0o1000, 0o2000, 0o4000
_IPC_RMID, _IPC_SET, _IPC_STAT, _SHM_LOCK, _GETALL, _SETALL = 0, 1, 2, 11, 13, 17
_MSG_COPY = 0o40000
SHM_DEST, SHM_LOCKED = 0o1000, 0o2000  # in the mode of a segment: goes with its last mapping; is in memory for good
_KEEP = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class IpcObject:
    """One line of /proc/sysvipc. size: of a segment in bytes, of a set its semaphores, of a queue its messages."""

    id: int
    key: int
    mode: int
    size: int
    uid: int
    gid: int
    cuid: int
    cgid: int


def with_ipc_namespace(pid: int, function: Callable[[], T]) -> T:
    """Run `function` in the IPC namespace of `pid`, the calling thread being there meanwhile."""
    with entered(f"/proc/{pid}/ns/ipc", "ipc"):
        return function()


def segments() -> list[IpcObject]:
    return [_line(w, size=int(w[3]), first=7) for w in _lines("shm")]


def semaphores() -> list[IpcObject]:
    return [_line(w, size=int(w[3]), first=4) for w in _lines("sem")]


def queues() -> list[IpcObject]:
    return [_line(w, size=int(w[4]), first=7) for w in _lines("msg")]


def _lines(kind: str) -> list[list[str]]:
    with open(f"/proc/sysvipc/{kind}") as file:
        return [line.split() for line in file.read().splitlines()[1:]]


def _line(words: list[str], *, size: int, first: int) -> IpcObject:
    key, number = int(words[0]) & _KEEP, int(words[1])
    return IpcObject(number, key, int(words[2], 8), size, *(int(w) for w in words[first : first + 4]))


# ---------------------------------------------------------------------- shared memory


def open_segment(shmid: int) -> int:
    """A descriptor of a segment, for reading and writing."""
    address = sys.call(_SHMAT, shmid, 0, 0, name="shmat", about=f"segment {shmid}")
    try:
        with open("/proc/self/maps") as file:
            line = next(line for line in file if line.startswith(f"{address:x}-"))
        return os.open(f"/proc/self/map_files/{line.split()[0]}", os.O_RDWR | os.O_CLOEXEC)
    finally:
        sys.call(_SHMDT, address, name="shmdt")


def make_segment(item: IpcObject) -> None:
    """Under its own number. Raises OSError; FileExistsError where that is taken."""
    with _number("shm", item), _creator(item):
        made = sys.call(
            _SHMGET, _signed(item.key), item.size, item.mode & 0o777 | _IPC_CREAT | _IPC_EXCL, name="shmget"
        )
    _check(made, item, lambda: remove_segment(made))
    set_segment(item)
    if item.mode & SHM_LOCKED:
        sys.call(_SHMCTL, item.id, _SHM_LOCK, 0, name="shmctl")


def set_segment(item: IpcObject) -> None:
    """Give it this owner and this mode."""
    _set(_SHMCTL, item, 112)


def remove_segment(shmid: int) -> None:
    """It goes once nobody has it mapped."""
    sys.call(_SHMCTL, shmid, _IPC_RMID, 0, name="shmctl", about=f"segment {shmid}")


# ---------------------------------------------------------------------- semaphores


def values(item: IpcObject) -> bytes:
    """Of all semaphores of a set, u16 each."""
    answer = ctypes.create_string_buffer(2 * item.size)
    sys.call(_SEMCTL, item.id, 0, _GETALL, ctypes.addressof(answer), name="semctl", about=f"semaphores {item.id}")
    return answer.raw


def make_semaphores(item: IpcObject, values: bytes) -> None:
    with _number("sem", item), _creator(item):
        made = sys.call(
            _SEMGET, _signed(item.key), item.size, item.mode & 0o777 | _IPC_CREAT | _IPC_EXCL, name="semget"
        )
    _check(made, item, lambda: sys.call(_SEMCTL, made, 0, _IPC_RMID, 0))
    given = ctypes.create_string_buffer(values, len(values))
    sys.call(_SEMCTL, item.id, 0, _SETALL, ctypes.addressof(given), name="semctl")
    _set(_SEMCTL, item, 104)


# ---------------------------------------------------------------------- queues


def messages(item: IpcObject) -> Iterator[tuple[int, bytes]]:
    """(type, text) of what waits in a queue; it stays there."""
    size = _limits()
    buffer = ctypes.create_string_buffer(8 + size)
    for index in range(item.size):
        got = sys.call(
            _MSGRCV, item.id, ctypes.addressof(buffer), size, index, _MSG_COPY | _IPC_NOWAIT,
            name="msgrcv", about=f"queue {item.id}",
        )  # fmt: skip
        yield int.from_bytes(buffer.raw[:8], "little", signed=True), buffer.raw[8 : 8 + got]


def queue_limit(item: IpcObject) -> int:
    """msg_qbytes."""
    answer = ctypes.create_string_buffer(120)  # struct msqid64_ds
    sys.call(_MSGCTL, item.id, _IPC_STAT, ctypes.addressof(answer), name="msgctl")
    return int(struct.unpack_from("<Q", answer, 88)[0])


def make_queue(item: IpcObject, limit: int) -> None:
    with _number("msg", item), _creator(item):
        made = sys.call(_MSGGET, _signed(item.key), item.mode & 0o777 | _IPC_CREAT | _IPC_EXCL, name="msgget")
    _check(made, item, lambda: sys.call(_MSGCTL, made, _IPC_RMID, 0))
    _set(_MSGCTL, item, 120, (88, limit))


def put_message(msqid: int, kind: int, text: bytes) -> None:
    message = ctypes.create_string_buffer(struct.pack("<q", kind) + text, 8 + len(text))
    sys.call(_MSGSND, msqid, ctypes.addressof(message), len(text), _IPC_NOWAIT, name="msgsnd", about=f"queue {msqid}")


def _limits() -> int:
    with open("/proc/sys/kernel/msgmax") as file:
        return int(file.read())


# ---------------------------------------------------------------------- all of them


def _signed(key: int) -> int:
    return key - (1 << 32) if key >> 31 else key


@contextmanager
def _number(kind: str, item: IpcObject) -> Iterator[None]:
    """The next object that this thread makes gets the number of `item` (kernel.shm_next_id and its like)."""
    with open(f"/proc/sys/kernel/{kind}_next_id", "w") as file:
        file.write(str(item.id))
    yield


@contextmanager
def _creator(item: IpcObject) -> Iterator[None]:
    """This thread alone is the creator of `item`, as its effective user and group."""
    sys.call(_SETRESGID, -1, item.cgid, -1, name="setresgid")
    try:
        sys.call(_SETRESUID, -1, item.cuid, -1, name="setresuid")
        try:
            yield
        finally:
            sys.call(_SETRESUID, -1, 0, -1, name="setresuid")
    finally:
        sys.call(_SETRESGID, -1, 0, -1, name="setresgid")


def _check(made: int, item: IpcObject, remove: Callable[[], object]) -> None:
    if made != item.id:
        remove()
        raise FileExistsError(0, f"number {item.id} of a System V object is taken")


def _set(call: int, item: IpcObject, size: int, *more: tuple[int, int]) -> None:
    """Owner and mode (IPC_SET), and other fields of its struct by offset."""
    buffer = ctypes.create_string_buffer(size)
    which = (item.id, 0) if call == _SEMCTL else (item.id,)
    struct.pack_into("<iIIIII", buffer, 0, 0, item.uid, item.gid, 0, 0, item.mode & 0o777)
    for offset, value in more:
        struct.pack_into("<Q", buffer, offset, value)
    sys.call(call, *which, _IPC_SET, ctypes.addressof(buffer), name="IPC_SET", about=f"object {item.id}")
