"""A container's System V objects go with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from contained import assert_refused, await_ticks, move, own_directories, run

from migrator.linux import ipc
from migrator.linux.namespaces import run_in

__all__ = ["own_directories"]
pytestmark = pytest.mark.root

SYSV = r"""
import ctypes, os, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]

def ok(value):
    if value in (-1, None, 2**64 - 1):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return value

def attach(shmid):
    return ok(libc.shmat(shmid, None, 0))

SIZE = 40 * 4096
keyed, private, gone, unused = (ok(libc.shmget(k, SIZE - 100, 0o1640)) for k in (7, 0, 0, 0x80000001))
a, b, c = attach(keyed), attach(private), attach(gone)
ok(libc.mprotect(ctypes.c_void_p(a + 8 * 4096), 4096, 1))
once = attach(unused); ctypes.memmove(once, b"unattached", 10); ok(libc.shmdt(ctypes.c_void_p(once)))
ok(libc.shmctl(gone, 0, None))
sem = ok(libc.semget(8, 3, 0o1600))
queue = ok(libc.msgget(9, 0o1600))
left = ok(libc.msgget(0, 0o1600))
for kind, text in ((3, b"third"), (1, b"first"), (2, b"second" * 100)):
    ok(libc.msgsnd(left, struct.pack("<q", kind) + text, len(text), 0))
OP = struct.Struct("<Hhh")
def semop(*ops):
    while libc.semop(sem, b"".join(OP.pack(*o) for o in ops), len(ops)) < 0:
        raise OSError(ctypes.get_errno(), "semop")
word = lambda at, page: ctypes.c_long.from_address(at + 4096 * page)
if os.fork() == 0:
    n = 0
    while True:
        n += 1
        semop((0, -1, 0))
        assert [word(x, n % 30 + 9).value for x in (a, b, c)] == [n] * 3
        message = ctypes.create_string_buffer(24)
        ok(libc.msgrcv(queue, message, 8, 5, 0))
        assert struct.unpack_from("<qq", message) == (5, n)
        semop((1, 1, 0))
print("ready")
n = 0
while True:
    n += 1
    for x in (a, b, c):
        word(x, n % 30 + 9).value = n
    ok(libc.msgsnd(queue, struct.pack("<qq", 5, n), 8, 0))
    semop((0, 1, 0))
    semop((1, -1, 0), (2, 0, 0))
    again = attach(keyed)
    assert word(again, n % 30 + 9).value == n
    word(again, 3).value = n
    ok(libc.shmdt(ctypes.c_void_p(again)))
    assert word(a, 3).value == n
    assert keyed == ok(libc.shmget(7, 0, 0)) and sem == ok(libc.semget(8, 0, 0)) and queue == ok(libc.msgget(9, 0))
    print("tick", n)
    time.sleep(0.005)
"""


def objects(pid: int) -> list[list[str]]:
    """Lines of /proc/sysvipc, without times and last users."""

    def inside() -> list[list[str]]:
        kept = {"shm": (0, 1, 2, 3, 7, 8, 9, 10), "sem": range(8), "msg": (0, 1, 2, 7, 8, 9, 10)}
        out = []
        for kind, columns in kept.items():
            for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]:
                out.append([line.split()[column] for column in columns])
        return out

    return run_in(pid, {"ipc", "pid", "mnt"}, inside)


def test_system_v_segments_semaphores_and_queues_keep_numbers_owners_and_contents(tmp_path: Path) -> None:
    pid = run(tmp_path, SYSV)
    before = objects(pid)
    assert len(before) == 7
    for _ in range(4):
        await_ticks(tmp_path)
        pid = move()
        await_ticks(tmp_path)
        assert objects(pid) == before
    assert left_messages(pid) == [(3, b"third"), (1, b"first"), (2, b"second" * 100)]


def left_messages(pid: int) -> list[tuple[int, bytes]]:
    return ipc.with_ipc_namespace(pid, lambda: list(ipc.messages(next(q for q in ipc.queues() if not q.key))))


UNDOES = """
import ctypes, struct, time
libc = ctypes.CDLL(None)
sem = libc.semget(8, 1, 0o1600)
libc.semop(sem, struct.pack("<Hhh", 0, 1, 0x1000), 1)
print("ready"); time.sleep(600)
"""
PART = """
import ctypes, time
libc = ctypes.CDLL(None); libc.shmat.restype = ctypes.c_void_p
at = libc.shmat(libc.shmget(0, 4 * 4096, 0o1600), None, 0)
libc.munmap(ctypes.c_void_p(at), 4096)
print("ready"); time.sleep(600)
"""


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (UNDOES, "with SEM_UNDO"),
        (PART, "is a part of System V segment"),
    ],
    ids=["undo", "part"],
)
def test_what_is_not_carried_of_interprocess_communication_is_refused(tmp_path: Path, script: str, reason: str) -> None:
    run(tmp_path, script)
    assert_refused(tmp_path, reason)
