"""A container's POSIX message queues go with it, and no message is ever lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli import migrator
from contained import NAME, assert_refused, await_ticks, move, own_directories, run

from migrator.linux import ipc, message_ledger, mqueue, namespaces

__all__ = ["own_directories"]
pytestmark = pytest.mark.root

# A few lines for mq_overview(7), which Python has no module for.
MQ = r"""
import ctypes, os, signal, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def ok(value):
    if value < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return value
def mq(name, flags=0, mode=0o600, most=10, size=64):
    return ok(libc.mq_open(name, flags, mode, struct.pack("8q", 0, most, size, 0, 0, 0, 0, 0)))
def send(fd, priority, text):
    ok(libc.mq_send(fd, text, len(text), priority))
def receive(fd):
    text, priority = ctypes.create_string_buffer(9000), ctypes.c_uint()
    return ok(libc.mq_receive(fd, text, 9000, ctypes.byref(priority))), text.raw, priority.value
def take(fd):
    length, text, priority = receive(fd)
    return priority, text[:length]
def get(fd):
    answer = ctypes.create_string_buffer(64)
    ok(libc.mq_getattr(fd, answer))
    return struct.unpack("8q", answer.raw)[:4]
NEW = os.O_CREAT | os.O_EXCL
"""

QUEUES = (
    MQ
    + r"""
import fcntl
os.umask(0)
full = mq(b"/full", NEW | os.O_RDWR | os.O_NONBLOCK, 0o640, 3, 30)
os.fchown(full, 5, 6)
nobody = mq(b"/nobody has it open", NEW | os.O_WRONLY, 0o604)
gone = mq(b"/gone", NEW | os.O_RDWR)
reader = mq(b"/full", os.O_RDONLY | os.O_CLOEXEC)  # which F_GETFL shows, of a queue
again = os.open(f"/proc/self/fd/{reader}", os.O_WRONLY | os.O_NONBLOCK)  # has O_LARGEFILE
asked, told = mq(b"/asked", NEW | os.O_RDWR, most=1), mq(b"/told", NEW | os.O_RDWR)
send(nobody, 7, b""); send(nobody, 0, b"left"); ok(libc.mq_close(nobody))
ok(libc.mq_unlink(b"/gone"))
for text in (b"one", b"two", b"three"):
    send(gone, 2, text)
send(gone, 9, b"first")
for priority in (1, 32767, 1):
    send(full, priority, b"x" * (priority % 30))
times = [os.fstat(fd).st_mtime_ns for fd in (full, gone)]
links = [os.readlink(f"/proc/self/fd/{fd}") for fd in (full, gone)]
flags = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (full, gone, reader, again)]
if os.fork() == 0:
    while True:  # waits for a message most of the time, or for room
        priority, text = take(asked)
        send(told, priority, text)
print("ready")
n = 0
while True:
    n += 1
    for k in range(4):
        send(asked, k, b"%d %d" % (n, k))
    assert sorted(take(told) for k in range(4)) == [(k, b"%d %d" % (n, k)) for k in range(4)]
    assert get(full) == (os.O_NONBLOCK, 3, 30, 3) and get(reader)[0] == 0 and get(gone) == (0, 10, 64, 4)
    status = os.fstat(full)
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (5, 6, 0o640)
    assert times == [os.fstat(fd).st_mtime_ns for fd in (full, gone)]
    assert links == [os.readlink(f"/proc/self/fd/{fd}") for fd in (full, gone)]
    assert flags == [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (full, gone, reader, again)]
    try:
        send(again, 1, b"no room")
    except BlockingIOError:
        pass
    else:
        print("FAIL: there is room")
    if n % 50 == 0:
        expected = [(9, b"first"), (2, b"one"), (2, b"two"), (2, b"three")]
        found = [take(gone) for _ in range(4)]
        assert found == expected, found
        left = mq(b"/nobody has it open", os.O_RDWR)
        found = [take(left), take(left)]
        assert found == [(7, b""), (0, b"left")], found
        for priority, text in found:
            send(left, priority, text)
        ok(libc.mq_close(left))
        for priority, text in expected:
            send(gone, priority, text)
        times[1] = os.fstat(gone).st_mtime_ns
    print("tick", n)
    time.sleep(0.002)
"""
)


def test_queues_keep_names_owners_and_messages_in_order(tmp_path: Path) -> None:
    run(tmp_path, QUEUES)
    for _ in range(4):
        await_ticks(tmp_path, 60)
        move()
    await_ticks(tmp_path, 60)


NOTIFIED = (
    MQ
    + r"""
queue = mq(b"/jobs", NEW | os.O_RDWR)
ok(libc.mq_notify(queue, struct.pack("<qii48x", 7, signal.SIGUSR1, 0)))
print("ready"); time.sleep(600)
"""
)
TWINS = (
    MQ
    + r"""
one = mq(b"/jobs", NEW | os.O_RDWR); ok(libc.mq_unlink(b"/jobs"))
two = mq(b"/jobs", NEW | os.O_RDWR)
print("ready"); time.sleep(600)
"""
)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (NOTIFIED, "of the next message (mq_notify(3)), which is not carried"),
        (TWINS, "2 POSIX message queues were named /jobs, one after the other"),
    ],
    ids=["notified", "twins"],
)
def test_a_queue_that_is_not_carried_is_refused(tmp_path: Path, script: str, reason: str) -> None:
    run(tmp_path, script)
    assert_refused(tmp_path, reason)


QUIET = (
    MQ
    + r"""
queue = mq(b"/jobs", NEW | os.O_RDWR)
for n in range(5):
    send(queue, n % 2, b"%d" % n)
print("ready")
time.sleep(600)
"""
)


def test_somebody_else_in_its_namespace_is_named(tmp_path: Path) -> None:
    pid = run(tmp_path, QUIET)
    child = os.fork()
    if not child:
        with namespaces.entered(f"/proc/{pid}/ns/ipc", "ipc"):
            time.sleep(600)
    try:
        deadline = time.monotonic() + 20
        while os.readlink(f"/proc/{child}/ns/ipc") != os.readlink(f"/proc/{pid}/ns/ipc"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        done = migrator("checkpoint", NAME, "--kill", "-o", tmp_path / "image", code=3)
        assert f"pid {child}, outside of the tree, is in the namespace of its POSIX message queues" in done.stderr
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# ---------------------------------------------------------------------- killed in the middle

WAITING = [(3, b"first"), (2, b""), (2, b"second"), (1, b"x" * 20), (0, b"last")]


def in_a_namespace(function: Callable[[], None]) -> None:
    """In a child with an IPC namespace of its own."""
    child = os.fork()
    if not child:
        try:
            namespaces.unshare(namespaces.CLONE_NEWIPC)
            function()
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            raise
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("removed", [False, True], ids=["named", "removed"])
@pytest.mark.parametrize("step", range(1, 2 * len(WAITING) + 1))
def test_no_message_is_lost_by_one_who_is_killed_while_it_looks(tmp_path: Path, step: int, removed: bool) -> None:
    """Killed right after the call: nobody was told how long the message is that was taken."""
    place = str(tmp_path / "ledger")

    def look_and_die(fd: int) -> None:
        receive, send, done = mqueue.receive, mqueue.send, 0

        def counted(call: Callable[..., int | None]) -> Callable[..., int | None]:
            def made(*args: int) -> int | None:
                nonlocal done
                result = call(*args)
                done += 1
                if done == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return made

        mqueue.receive, mqueue.send = counted(receive), counted(send)  # type: ignore[assignment]
        message_ledger.look(fd, place)

    def inside() -> None:
        fd = mqueue.create("jobs", mqueue.Attributes(10, 20, 0))
        for priority, text in reversed(WAITING[3:]):
            mqueue.put(fd, priority, text)
        for priority, text in WAITING[:3]:
            mqueue.put(fd, priority, text)
        if removed:
            mqueue.unlink("jobs")
        child = os.fork()
        if not child:
            look_and_die(fd)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        message_ledger.recover(place, [os.getpid()])
        assert message_ledger.look(fd) == WAITING
        message_ledger.recover(place, [os.getpid()])
        assert message_ledger.look(fd) == WAITING and not os.path.exists(place)

    in_a_namespace(inside)


def test_a_ledger_that_was_not_begun_or_is_of_another_namespace_changes_nothing(tmp_path: Path) -> None:
    place = tmp_path / "ledger"

    def inside() -> None:
        fd = mqueue.create("jobs", mqueue.Attributes(10, 20, 0))
        mqueue.put(fd, 1, b"here")
        for content in (b"", bytes(4096)):
            place.write_bytes(content)
            message_ledger.recover(str(place), [os.getpid()])
            assert message_ledger.look(fd) == [(1, b"here")]
        assert not place.exists()

    in_a_namespace(inside)


DIES = """
import os
from migrator.linux import mqueue
mqueue.send = lambda *what: os._exit(86)
from migrator.cli import main
main()
"""


def test_messages_come_back_when_the_command_is_killed_as_it_has_them(tmp_path: Path) -> None:
    """The tasks stay frozen until somebody settles it, and find all messages then."""
    pid = run(tmp_path, QUIET)
    command = [sys.executable, "-c", DIES, "checkpoint", NAME, "--kill", "-o", str(tmp_path / "image")]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode == 86

    def waiting() -> list[tuple[int, bytes]]:
        fd = mqueue.open_queue("jobs")
        try:
            return message_ledger.look(fd)
        finally:
            os.close(fd)

    assert ipc.with_ipc_namespace(pid, waiting) == []
    migrator("settle")
    expected = [(1, b"1"), (1, b"3"), (0, b"0"), (0, b"2"), (0, b"4")]
    assert ipc.with_ipc_namespace(pid, waiting) == expected
    assert json.loads(migrator("ps", "--json").stdout)[0]["state"] == "running"
    move()
