"""Descriptors saved from one process and made again in another, kind by kind."""

# ruff: noqa: F811

from __future__ import annotations

import os
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fakestub import Child
from moving import Bytes, Moved, Surroundings, child, hidden, move  # noqa: F401

from migrator.engine.base import LockKind
from migrator.engine.user.descriptors import DescriptorDump, DescriptorRestore, Transients, survey
from migrator.errors import CheckpointFailed, ImageError, RestartFailed
from migrator.image.codec import Record
from migrator.image.objhash import ObjHash
from migrator.image.records_files import Descriptor, File, FileKind, FileLock, FileTable, Pipe
from migrator.linux import cgroup, descriptors

pytestmark = pytest.mark.root


def test_a_file_is_open_at_the_same_offset_with_the_same_flags(
    child: Child, move: Callable[..., Child], tmp_path: Path
) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    child.run(f"a = os.open({str(tmp_path / 'f')!r}, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC); os.lseek(a, 4, 0)")
    child.run(f"b = os.open({str(tmp_path / 'f')!r}, os.O_RDONLY | os.O_NONBLOCK); os.dup2(b, 77)")
    copy = move(child)
    assert copy.ask("os.read(0, 3), os.read(1, 2), os.read(77, 2)") == (b"456", b"01", b"23")


def test_two_processes_that_share_a_description_share_its_offset(child: Child, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    child.run(f"os.open({str(tmp_path / 'f')!r}, os.O_RDONLY)")
    with Child() as other:
        fd = _fetch(child, 0)
        other.install_fds([(fd, 5, False)])
        os.close(fd)
        with Moved(child, other) as moved:
            assert len(moved.saved.of(File)) == 1
            one, two = moved.restore([child, other])
            assert (one.ask("os.read(0, 4)"), two.ask("os.read(5, 4)")) == (b"0123", b"4567")


def test_a_pipe_keeps_its_bytes_its_size_and_its_end(child: Child, move: Callable[..., Child]) -> None:
    child.run("r, w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC); fcntl.fcntl(w, fcntl.F_SETPIPE_SZ, 1 << 18)")
    child.run("sent = os.urandom(200000); os.write(w, sent)")
    sent = child.ask("sent")
    copy = move(child)
    assert copy.ask("fcntl.fcntl(0, fcntl.F_GETPIPE_SZ)") == 1 << 18
    assert copy.ask("os.read(0, 300000)") == sent
    copy.run("os.close(1)")
    assert copy.ask("os.read(0, 1)") == b""


def test_packets_of_a_pipe_stay_packets(child: Child, move: Callable[..., Child]) -> None:
    child.run("r, w = os.pipe2(os.O_DIRECT); [os.write(w, b'x' * n) for n in (10, 1, 300)]")
    copy = move(child)
    assert copy.ask("[len(os.read(0, 4096)) for _ in range(3)]") == [10, 1, 300]


def test_many_pipes_keep_each_its_own(child: Child, move: Callable[..., Child]) -> None:
    child.run("[os.pipe() for _ in range(100)]; [os.write(2 * n + 1, b'%d ' % n * n) for n in range(0, 100, 2)]")
    copy = move(child)
    assert copy.ask("[os.read(2 * n, 4096) for n in range(0, 100, 2) if n]") == [
        b"%d " % n * n for n in range(2, 100, 2)
    ]
    copy.run("[os.write(2 * n + 1, b'x') for n in range(100)]")
    assert copy.ask("[os.read(2 * n, 4096) for n in range(100)]") == [b"x"] * 100  # and nothing else was in them


def test_what_was_written_in_packets_is_all_there_among_other_pipes(child: Child, move: Callable[..., Child]) -> None:
    child.run(
        "a = os.pipe(); r, w = os.pipe2(os.O_DIRECT); b = os.pipe(); os.write(a[1], b'one'); os.write(b[1], b'two')"
    )
    child.run(
        "os.write(w, b'12'); os.write(w, b'345'); fcntl.fcntl(w, fcntl.F_SETFL, 0); fcntl.fcntl(r, fcntl.F_SETFL, 0)"
    )
    copy = move(child)
    assert copy.ask("os.read(0, 10), os.read(4, 10)") == (b"one", b"two")
    assert copy.ask("os.read(2, 10)") == b"12345"


def test_a_pipe_whose_writer_is_gone_is_at_its_end_after_its_last_bytes(
    child: Child, move: Callable[..., Child]
) -> None:
    child.run("r, w = os.pipe(); os.write(w, b'last'); os.close(w)")
    copy = move(child)
    assert copy.ask("os.read(0, 10), os.read(0, 10)") == (b"last", b"")


def test_reading_what_is_in_a_pipe_leaves_it_there(child: Child) -> None:
    child.run("r, w = os.pipe(); os.write(w, b'still here')")
    with Moved(child):
        pass
    child.go_on()
    assert child.ask("os.read(0, 100)") == b"still here"


def test_a_fifo_is_found_by_its_name_with_what_is_in_it(
    child: Child, move: Callable[..., Child], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    path = str(tmp_path / "fifo")
    child.run(f"r = os.open({path!r}, os.O_RDONLY | os.O_NONBLOCK); w = os.open({path!r}, os.O_WRONLY)")
    child.run("fcntl.fcntl(r, fcntl.F_SETFL, 0); os.write(w, b'through')")
    copy = move(child)
    assert copy.ask("os.read(0, 100)") == b"through"
    assert copy.ask("os.readlink('/proc/self/fd/0')") == path


def test_a_deleted_file_comes_along_with_its_holes(child: Child, move: Callable[..., Child], tmp_path: Path) -> None:
    path = str(tmp_path / "gone")
    child.run(f"a = os.open({path!r}, os.O_RDWR | os.O_CREAT, 0o640); b = os.open({path!r}, os.O_RDONLY)")
    child.run(f"os.unlink({path!r}); os.ftruncate(a, 50 << 20); os.pwrite(a, b'data', 20 << 20)")
    child.run("os.lseek(b, 20 << 20, 0)")
    copy = move(child)
    assert copy.ask("os.read(1, 4), os.fstat(0).st_size, os.fstat(0).st_nlink") == (b"data", 50 << 20, 0)
    assert copy.ask("os.fstat(0).st_ino == os.fstat(1).st_ino and os.fstat(0).st_blocks < 1000")
    assert copy.ask("oct(os.fstat(0).st_mode)") == "0o100640"
    assert os.listdir(tmp_path) == []


def test_directories_and_devices_are_opened_by_their_path(
    child: Child, move: Callable[..., Child], tmp_path: Path
) -> None:
    child.run(f"os.open({str(tmp_path)!r}, os.O_RDONLY | os.O_DIRECTORY); os.open('/dev/null', os.O_RDWR)")
    child.run(f"os.open('/dev/zero', 0); os.open('/dev/urandom', os.O_CLOEXEC); os.open({str(tmp_path)!r}, os.O_PATH)")
    copy = move(child)
    assert copy.ask("os.read(2, 3), os.read(1, 3), len(os.read(3, 3))") == (b"\0\0\0", b"", 3)
    assert copy.ask("os.readlink('/proc/self/fd/0')") == str(tmp_path)


def test_counters_and_kinds_of_eventfds_are_kept(child: Child, move: Callable[..., Child]) -> None:
    child.run("os.eventfd(7, os.EFD_NONBLOCK); os.eventfd(2, os.EFD_SEMAPHORE); os.eventfd(0)")
    child.run("os.eventfd_write(2, 1 << 40)")
    copy = move(child)
    assert copy.ask("[os.eventfd_read(n) for n in (0, 1, 1, 2)]") == [7, 1, 1, 1 << 40]


def test_a_timerfd_runs_on_for_what_remained(child: Child, move: Callable[..., Child]) -> None:
    child.run(TIMERS)
    child.run("make(1, 0, 3600_000_000_000, 0); make(0, 0, 1000, 50_000_000); make(1, 0, 1000, 0); make(7, 0, 0, 0)")
    time.sleep(0.12)
    copy = move(child)
    copy.run(TIMERS)
    left, interval = copy.ask("left(0)")
    assert 3590 < left / 1e9 < 3600 and interval == 0
    ticks = copy.ask("struct.unpack('Q', os.read(1, 8))[0]")
    assert 2 <= ticks < 10, ticks
    assert copy.ask("left(1)")[1] == 50_000_000
    assert copy.ask("os.read(2, 8)") == struct.pack("Q", 1)
    assert copy.ask("left(3)") == (0, 0)


def test_a_signalfd_has_its_mask(child: Child, move: Callable[..., Child]) -> None:
    child.run("signal.pthread_sigmask(signal.SIG_BLOCK, [40])")
    child.run("ctypes.CDLL(None).syscall(289, -1, ctypes.c_char_p(struct.pack('Q', 1 << 39)), 8, 0o4000)")
    copy = move(child)
    copy.run("signal.pthread_sigmask(signal.SIG_BLOCK, [40]); os.kill(os.getpid(), 40)")
    assert copy.ask("struct.unpack('I', os.read(0, 128)[:4])") == (40,)


def test_an_epoll_instance_waits_for_the_same_files(child: Child, move: Callable[..., Child]) -> None:
    child.run("ep = select.epoll(); r, w = os.pipe(); e = os.eventfd(0); f = os.eventfd(1); g = os.eventfd(1)")
    child.run(
        "ep.register(r, 1); ep.register(e, 1 | 1 << 31); ep.register(f, 1 | 1 << 30); ep.register(g, 4 | 1 << 30)"
    )
    child.run("assert sorted(ep.poll(0)) == [(f, 1), (g, 4)]; ep.modify(g, 4 | 1 << 30)")
    copy = move(child)
    copy.run("ep = select.epoll.fromfd(0)")
    assert copy.ask("ep.poll(0)") == [(5, 4)], "the first one-shot was spent, the second was renewed"
    copy.run("os.write(2, b'x'); os.eventfd_write(3, 1)")
    assert copy.ask("sorted(ep.poll(0))") == [(1, 1), (3, 1)]


def test_epoll_knows_a_file_whose_number_was_closed_or_taken_by_another(
    child: Child, move: Callable[..., Child]
) -> None:
    child.run("ep = select.epoll(); e = os.eventfd(0); f = os.eventfd(0); ep.register(e, 1); ep.register(f, 1)")
    child.run("os.dup2(e, 50); os.dup2(f, 51); os.close(e); os.dup2(os.open('/dev/null', 0), f)")
    copy = move(child)
    copy.run("ep = select.epoll.fromfd(0); os.eventfd_write(50, 1); os.eventfd_write(51, 1)")
    assert sorted(copy.ask("ep.poll(0)")) == [(1, 1), (2, 1)]


def test_the_owner_of_a_pipe_is_told(child: Child, move: Callable[..., Child]) -> None:
    child.run("r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, os.getpid()); fcntl.fcntl(r, 10, 35)")
    copy = move(child)
    assert copy.ask("fcntl.fcntl(0, fcntl.F_GETOWN), fcntl.fcntl(0, 11)") == (child.vpid, 35)


def test_the_signal_of_a_pipe_and_a_file_without_an_owner_is_told(
    child: Child, move: Callable[..., Child], tmp_path: Path
) -> None:
    child.run(f"r, w = os.pipe(); f = os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_RDWR)")
    child.run("fcntl.fcntl(w, 10, 35); fcntl.fcntl(f, 10, 36)")
    copy = move(child)
    assert copy.ask("[(fcntl.fcntl(fd, 11), fcntl.fcntl(fd, fcntl.F_GETOWN)) for fd in range(3)]") == [
        (0, 0),
        (35, 0),
        (36, 0),
    ]


def test_the_owner_of_what_never_sends_a_signal_is_told(child: Child, move: Callable[..., Child]) -> None:
    child.run("os.eventfd(0); os.open('/', os.O_DIRECTORY); os.open('/dev/null', os.O_RDWR)")
    child.run("import gc; gc.disable(); e = select.epoll(); os.dup2(e.fileno(), 3)")
    child.run("[fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid()) for fd in range(4)]; fcntl.fcntl(1, 10, 35)")
    copy = move(child)
    assert copy.ask("[fcntl.fcntl(fd, fcntl.F_GETOWN) for fd in range(4)]") == [child.vpid] * 4
    assert copy.ask("fcntl.fcntl(1, 11)") == 35


def test_a_memfd_refers_to_its_shared_memory(child: Child) -> None:
    child.run("m = os.memfd_create('thing', os.MFD_ALLOW_SEALING); os.write(m, b'contents'); fcntl.fcntl(m, 1033, 2)")
    child.run("os.open('/proc/self/fd/0', os.O_RDONLY)")
    with Moved(child) as moved:
        (memfd,) = moved.dump.memfds
        assert (memfd.size, memfd.seals, memfd.name) == (8, 2, "thing")
        (objref,) = {rec.inode_objref for rec in moved.saved.of(File)}
        moved.context.shm[objref] = os.memfd_create("thing")
        os.write(moved.context.shm[objref], b"contents")
        (copy,) = moved.restore([child])
        assert copy.ask("os.read(0, 10), os.read(1, 3), os.lseek(0, 0, 1)") == (b"", b"con", 8)


def test_a_pidfd_is_of_the_same_process(child: Child) -> None:
    with Child() as other:
        child.run(f"os.pidfd_open({other.pid})")
        with Moved(child, other) as moved:
            one, two = moved.restore([child, other])
            assert f"Pid:\t{two.pid}\n" in one.ask("open('/proc/self/fdinfo/0').read()")


@pytest.mark.parametrize("flags", [0, os.O_EXCL], ids=["process", "thread"])
def test_a_pidfd_of_one_that_is_gone_stays_that(child: Child, flags: int) -> None:
    child.run(f"p = os.fork() or os._exit(0); fd = os.pidfd_open(p, {flags}); os.waitpid(p, 0); os.set_blocking(fd, 0)")
    assert survey([child.process], own_netns=True) == []
    with Moved(child) as moved:
        (copy,) = moved.restore([child])
        assert "Pid:\t-1\n" in copy.ask("open('/proc/self/fdinfo/0').read()")
        assert copy.ask("fcntl.fcntl(0, fcntl.F_GETFL)") == os.O_RDWR | os.O_NONBLOCK | flags
        assert copy.ask("__import__('select').select([0], [], [], 0)[0]") == [0]


def test_a_pidfd_of_one_that_has_ended_waits_for_its_parent_to_take_note(child: Child) -> None:
    child.run("a, b = os.pipe(); p = os.fork() or os.read(a, 1) and os._exit(0); one, two = map(os.pidfd_open, (p, p))")
    with Transients([child.process]) as transients:
        assert transients.settle(0) and not transients.waiting()
        child.run("os.write(b, b'x'); os.waitid(os.P_PID, p, os.WEXITED | os.WNOWAIT)")
        assert "has ended, and its parent is still to take note" in transients.waiting()
        assert survey([child.process], own_netns=True) == []
        child.run("os.waitpid(p, 0); os.close(one)")
        assert transients.settle(0) and not transients.waiting()


def test_an_inotify_instance_that_was_closed_waits_for_nobody(child: Child, tmp_path: Path) -> None:
    child.run(
        f"l = ctypes.CDLL(None); fd = l.inotify_init(); l.inotify_add_watch(fd, {os.fsencode(tmp_path)!r}, 0x100)"
    )
    child.run("other = os.dup(fd)")
    with Transients([child.process]) as transients:
        (tmp_path / "new").mkdir()
        assert "(inotify)" in transients.waiting()
        child.run("os.close(fd)")
        assert "(inotify)" in transients.waiting()
        child.run("os.close(other)")
        assert not transients.waiting()


def test_what_was_a_socket_a_moment_ago_is_not_held(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number is a pipe's by the time that it is fetched: who held that would keep its other end from hanging up."""
    child.run("ends = os.pipe()")
    (number, *_) = child.ask("ends")
    readlink = os.readlink
    monkeypatch.setattr(os, "readlink", lambda path: readlink(path).replace("pipe:", "socket:"))
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=r"non-socket"):
        descriptors.fetch_socket(child.process.pidfd, number)
    with Transients([child.process]) as transients:
        assert not transients.waiting()
    assert set(os.listdir("/proc/self/fd")) == before


OWNERS = """
import socket
f = [*os.pipe(), *(s.detach() for s in socket.socketpair()), socket.socket().detach()]
[os.fchown(fd, 1000 + at, 100) for at, fd in enumerate(f)]
"""


def test_owners_of_pipes_and_sockets_are_kept(child: Child, tmp_path: Path) -> None:
    child.run(OWNERS)
    wanted = child.ask("[(os.fstat(fd).st_uid, os.fstat(fd).st_gid) for fd in sorted(f)]")
    assert wanted[0] == wanted[1] == (1001, 100) and len({*wanted}) == 4
    with Moved(child) as moved:
        (copy,) = moved.restore([child])
        assert copy.ask("[(os.fstat(fd).st_uid, os.fstat(fd).st_gid) for fd in range(5)]") == wanted


def test_a_lock_of_a_description_is_taken_again(child: Child, tmp_path: Path) -> None:
    path = tmp_path / "locked"
    path.write_bytes(b"")
    child.run(f"fcntl.flock(os.open({str(path)!r}, os.O_RDWR), fcntl.LOCK_EX)")
    with Moved(child) as moved:
        with pytest.raises(RestartFailed, match="locked by somebody else"):
            moved.restore([child])
        moved.dump.undo()
        child.end()
        (copy,) = moved.restore([child])
        assert "FLOCK  ADVISORY  WRITE" in copy.ask("open('/proc/self/fdinfo/0').read()")


def test_a_lock_that_a_live_source_has_is_put_off_if_it_is_the_very_file(child: Child, tmp_path: Path) -> None:
    path = tmp_path / "locked"
    path.write_text("content")
    child.run(f"import struct; f = os.open({str(path)!r}, os.O_RDWR); fcntl.flock(f, fcntl.LOCK_EX)")
    child.run("fcntl.lockf(f, fcntl.LOCK_EX, 10, 5)")
    context = Surroundings()
    context.live = True
    with Moved(child, context=context) as moved:
        (copy,) = moved.restore([child])
        found = {(lock.pid, lock.fd, lock.kind, lock.mode, lock.start, lock.length) for lock in moved.late_locks}
        assert found == {(copy.pid, 0, LockKind.FLOCK, 2, 0, 0), (copy.pid, 0, LockKind.PROCESS, 2, 5, 10)}
        assert "lock:" not in copy.ask("open('/proc/self/fdinfo/0').read()")
        os.utime(path, ns=(0, 0))  # it is another file, as far as can be told
        with pytest.raises(RestartFailed, match="locked by somebody else"):
            moved.restore([child])


def test_locks_on_ranges_are_taken_again(child: Child, tmp_path: Path) -> None:
    path = tmp_path / "locked"
    path.write_bytes(bytes(100))
    child.run(f"a = os.open({str(path)!r}, os.O_RDWR); b = os.open({str(path)!r}, os.O_RDWR)")
    child.run("fcntl.lockf(a, fcntl.LOCK_EX, 10, 5); fcntl.lockf(a, fcntl.LOCK_SH, 0, 50)")
    child.run("fcntl.fcntl(b, 37, struct.pack('hhxxxxqqixxxx', 1, 0, 20, 2, 0)); os.dup(b)")
    with Moved(child) as moved:
        assert len(moved.saved.of(FileLock)) == 3
        with pytest.raises(RestartFailed, match="locked by somebody else"):
            moved.restore([child])
        moved.dump.undo()
        child.end()
        (copy,) = moved.restore([child])
        locks = [line.split() for line in copy.ask("open('/proc/self/fdinfo/0').read()").split("\n") if "lock" in line]
        assert [(w[2], w[4], w[7], w[8]) for w in locks] == [
            ("POSIX", "WRITE", "5", "14"),
            ("POSIX", "READ", "50", "EOF"),
        ]
        (lock,) = [w for w in copy.ask("open('/proc/self/fdinfo/1').read()").split("\n") if "OFDLCK" in w]
        assert lock.split()[4:] == ["WRITE", "-1", lock.split()[6], "20", "21"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("ctypes.CDLL(None).syscall(323, 1)", "a userfaultfd"),
        ("os.open('/dev/ptmx', os.O_RDWR)", "a terminal that the program has made"),
        ("os.close(os.openpty()[0])", "is a terminal"),
        ("os.open('/dev/kmsg', os.O_RDONLY)", "a device with a state of its own"),
        ("os.open('/proc/self/ns/net', 0)", "a namespace"),
        ("ctypes.CDLL(None).fanotify_init(0, 0)", "a fanotify group"),
        ("fcntl.fcntl(os.open('/etc/hostname', os.O_RDONLY), 1024, 0)", "a lock that cannot be carried"),
        ("os.pidfd_open(1)", "pidfd of pid 1"),
        (
            "d = tempfile.mkdtemp(); a, b = d + '/a', d + '/b'; open(a, 'w').close(); os.link(a, b); os.open(a, 0);"
            " os.unlink(a)",
            "its name was removed, but it has others",
        ),
        ("d = tempfile.mkdtemp(); os.open(d, 0); os.rmdir(d)", "is a directory that was removed"),
        (
            "s = socket.socket(2, 2); b = ctypes.create_string_buffer(b'\\6\\0\\0\\0\\0\\1\\0\\0', 8);"
            " s.setsockopt(1, 26, struct.pack('@HP', 1, ctypes.addressof(b)))",
            "a socket with a packet filter",
        ),
        (
            "l = ctypes.CDLL(None); l.mq_open(b'/t', 0o102, 0o600, None); l.mq_unlink(b'/t')",
            "message queue of the host",
        ),
        (
            "f, name = tempfile.mkstemp(); os.unlink(name); os.setxattr(f, 'user.a', b'1')",
            "has the attribute user.a",
        ),
        ("os.open('/proc/pressure/memory', os.O_RDWR)", "a trigger of pressure"),
        ("os.open(cgroups + '/cgroup.procs', os.O_WRONLY)", "depends on who has opened it"),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(child: Child, code: str, reason: str) -> None:
    child.run(f"import struct, tempfile; cgroups = {str(cgroup.hierarchy().mountpoint)!r}")
    child.run(code)
    (sentence,) = survey([child.process], own_netns=True)
    assert sentence.startswith(f"pid {child.pid} (") and reason in sentence
    child.stop()
    dump = DescriptorDump([child.process], ObjHash(), Bytes())
    with pytest.raises(CheckpointFailed, match=reason):
        dump.dump()
    dump.undo()


def test_a_file_with_a_state_for_each_opening_is_refused(child: Child, tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tracefs", "none", tmp_path], check=True)
    try:
        child.run(f"os.open('{tmp_path}/trace', os.O_RDONLY)")
        (sentence,) = survey([child.process], own_netns=True)
        assert f"{tmp_path}/trace is a file of tracefs, which keeps a state for each opening" in sentence
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_pipe_from_outside_of_the_tree_is_refused_by_name(child: Child) -> None:
    read, write = os.pipe()
    child.install_fds([(read, 4, False)])
    (sentence,) = survey([child.process], own_netns=True)
    assert f"fd 4: pipe:[{os.fstat(read).st_ino}] is shared with pid {os.getpid()}" in sentence
    child.stop()
    dump = DescriptorDump([child.process], ObjHash(), Bytes())
    with pytest.raises(CheckpointFailed, match="written by a process outside"):
        dump.dump()
    dump.undo()
    os.close(read)
    os.close(write)


def test_a_file_that_shrank_is_refused_with_its_path(child: Child, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * 100)
    child.run(f"os.lseek(os.open({str(path)!r}, os.O_RDONLY), 60, 0)")
    with Moved(child) as moved:
        os.truncate(path, 50)
        with pytest.raises(RestartFailed, match=f"{path}.* has 50 bytes here"):
            moved.restore([child])
        path.unlink()
        with pytest.raises(RestartFailed, match=f"{path}.* cannot be opened: No such file"):
            moved.restore([child])


def test_links_do_not_lead_out_of_the_root(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to("/etc/hostname")
    context = Surroundings()
    context.root_fd = os.open(tmp_path / "root", os.O_PATH)
    restore = DescriptorRestore(context)
    with pytest.raises(RestartFailed, match="No such file"):
        restore.record(_file(path="/link"))
    with pytest.raises(RestartFailed, match="No such file"):
        restore.record(_file(objref=2, path="/../../../../../../etc/hostname"))


@pytest.mark.parametrize(
    "rec",
    [
        FileTable(1, 0, [Descriptor(0, 7, 0, 0)]),
        lambda: _file(kind=99),
        lambda: _file(kind=FileKind.PIPE, inode_objref=5),
        lambda: _file(kind=FileKind.EVENTFD, inode_objref=5),
        lambda: _file(kind=FileKind.SOCKET, inode_objref=5),
        lambda: _file(path="relative"),
        lambda: _file(pos=-1),
    ],
)
def test_records_that_no_source_writes_are_refused(rec: Record | Callable[[], Record]) -> None:
    restore = DescriptorRestore(Surroundings())
    with pytest.raises(ImageError):
        restore.record(rec() if callable(rec) else rec)
    restore.close()


def test_a_pipe_does_not_take_more_than_it_holds() -> None:
    restore = DescriptorRestore(Surroundings())
    restore.record(Pipe(1, 4096))
    from migrator.image.records_files import PipeBuffer

    restore.record(PipeBuffer(1, 0, bytes(4096)))
    with pytest.raises(ImageError, match="in a pipe of 4096"):
        restore.record(PipeBuffer(1, 0, b"x"))


def _file(
    kind: int = FileKind.REGULAR, path: str = "/etc/hostname", pos: int = 0, inode_objref: int = 0, objref: int = 1
) -> File:
    return File(objref, kind, 0o100000, 0o100644, pos, 0, 0, 0, 0, 0, inode_objref, 0, 0, 0, 0, 0, path)


def _fetch(child: Child, number: int) -> int:
    from migrator.linux.sys import pidfd_getfd

    return pidfd_getfd(child.pidfd, number)


TIMERS = """
libc = ctypes.CDLL(None)
def make(clock, flags, value, interval):
    fd = libc.timerfd_create(clock, 0)
    spec = struct.pack('qqqq', *divmod(interval, 10**9), *divmod(value, 10**9))
    assert libc.timerfd_settime(fd, flags, spec, None) == 0
def left(fd):
    b = ctypes.create_string_buffer(32)
    assert libc.timerfd_gettime(fd, b) == 0
    i, j, v, w = struct.unpack('qqqq', b.raw)
    return v * 10**9 + w, i * 10**9 + j
"""
