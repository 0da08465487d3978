"""What was written ahead of the freeze counts in the end only if nothing of it has changed: each change is seen."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from fakestub import Child, hide_control
from test_user_predump import Stream

from migrator.engine.user.descriptors import DescriptorDump, PredumpedFiles, collection, fdinfo, sockopts
from migrator.engine.user.descriptors import Holder as Owner
from migrator.engine.user.descriptors.collection import Collection
from migrator.engine.user.descriptors.sockets import SocketDump
from migrator.image.codec import Record
from migrator.image.objhash import ObjHash
from migrator.image.records_files import FileKind, PipeBuffer, Socket, SocketOption, SocketTcp
from migrator.linux import descriptors

F_SETPIPE_SZ = 1031
Pair = tuple[int, int]


class Locks:
    """A list of locks that says what it is to say."""

    def __init__(self, locked: set[int] | None) -> None:
        self.locked = locked

    def inodes(self) -> set[int] | None:
        return self.locked


class Written(Stream):
    def write(self, rec: Record) -> None:
        self.encoded(rec.encode())

    def flush(self) -> None:
        pass


class Ourselves:
    """Our own descriptors, or those of another process, written ahead."""

    def __init__(self, owner: Owner | None = None) -> None:
        pid = os.getpid()
        self.owner = owner or Owner(pid, pid, os.pidfd_open(pid))
        self.stream = Written()
        self.predumped = PredumpedFiles(ObjHash(), self.stream, self.owner.pid)
        self.predumped.with_pipes_and_connections = True
        self.look()

    def look(self) -> None:
        self.predumped.predump(self.owner)
        self.standing = self.predumped.standing([self.owner])

    def collect(self, locked: set[int] | None = frozenset()) -> tuple[set[int], set[int]]:
        """As in the freeze: (numbers that stand, numbers that were looked at one by one)."""
        found = Collection([self.owner], self.predumped.known, flags_of, Locks(locked), self.standing)
        try:
            (table,) = found.tables
            numbers = [number for number, _, _ in table.entries]
            assert numbers == sorted(set(numbers))
            return {number for number, _, _ in table.standing}, {slot.number for slot in table.slots}
        finally:
            found.close()

    def close(self) -> None:
        os.close(self.owner.pidfd)


def numbers() -> list[int]:
    """What we have open, without the directory in which that is read."""
    listed = sorted(map(int, os.listdir("/proc/self/fd")))
    return [number for number in listed if is_open(number)]


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def flags_of_any(owner: Owner, numbers: Sequence[int]) -> list[int]:
    return [int(fdinfo.read(owner.pid, number).cloexec) for number in numbers]


def flags_of(_owner: Owner, numbers: Sequence[int]) -> list[int]:
    return [fcntl.fcntl(number, fcntl.F_GETFD) for number in numbers]


@pytest.fixture(autouse=True)
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "MANY", 0)
    hide_control(monkeypatch)
    of_any = fdinfo.numbers
    monkeypatch.setattr(fdinfo, "numbers", lambda pid: numbers() if pid == os.getpid() else of_any(pid))


@pytest.fixture
def child() -> Iterator[Child]:
    with Child() as made:
        yield made


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[int]]:
    """Four files, open for reading and writing, of ten bytes."""
    out = []
    for name in "abcd":
        (tmp_path / name).write_text("0123456789")
        out.append(os.open(tmp_path / name, os.O_RDWR))
    yield out
    for fd in out:
        os.close(fd)


@pytest.fixture
def pipes() -> Iterator[list[Pair]]:
    out = [os.pipe() for _ in range(3)]
    yield out
    for ends in out:
        for fd in ends:
            os.close(fd)


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def connections(request: pytest.FixtureRequest) -> Iterator[list[socket.socket]]:
    """Three connections, both ends of each."""
    host = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}[request.param]
    out = []
    with socket.create_server((host, 0), family=request.param) as listener:
        for _ in range(3):
            out.append(socket.create_connection(listener.getsockname()[:2]))
            out.append(listener.accept()[0])
        yield out
        for sock in out:
            sock.close()


def test_what_has_not_changed_stands(files: list[int], pipes: list[Pair], connections: list[socket.socket]) -> None:
    ours = Ourselves()
    os.write(pipes[0][1], b"what waits in it is no part of it")
    connections[0].send(b"nor here")
    stand, looked_at = ours.collect()
    expected = {*files, *(end for ends in pipes for end in ends), *(sock.fileno() for sock in connections)}
    assert expected <= stand
    assert not stand & looked_at
    assert set(numbers()) <= stand | looked_at
    ours.close()


def a_file(path: Path) -> list[int]:
    return [os.open(path, os.O_RDWR | os.O_CREAT)]


def a_pipe(_: Path) -> list[int]:
    return list(os.pipe())


def a_connection(_: Path) -> list[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return [ours.detach(), listener.accept()[0].detach()]


@pytest.mark.parametrize("later", [a_file, a_pipe, a_connection])
@pytest.mark.parametrize("earlier", [a_file, a_pipe, a_connection])
def test_a_number_that_was_used_again_between_two_looks_is_that_of_the_last(
    earlier: Callable[[Path], list[int]], later: Callable[[Path], list[int]], tmp_path: Path
) -> None:
    """What had it before is not compared with what has it now, which would fall and be listed twice."""
    before = earlier(tmp_path / "earlier")
    ours = Ourselves()
    after = later(tmp_path / "later")
    os.dup2(after[0], before[0])
    os.close(after[0])
    ours.look()
    stand, looked_at = ours.collect()  # none of them is there twice
    assert before[0] in stand
    assert before[0] not in looked_at
    for number in {*before, *after[1:]}:
        os.close(number)
    ours.close()


def other_owner(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())


def other_signal(fd: int) -> None:
    fcntl.fcntl(fd, descriptors.F_SETSIG, signal.SIGUSR1)


def close_on_exec(fd: int) -> None:
    os.set_inheritable(fd, True)


def of_another(fd: int) -> None:
    other = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    os.lseek(other, 1, os.SEEK_SET)
    os.dup2(other, fd, inheritable=False)
    os.close(other)


def another_file(fd: int) -> None:
    other = os.open("/etc/passwd", os.O_RDONLY)
    os.dup2(other, fd, inheritable=False)
    os.close(other)


def path_of(fd: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{fd}"))


def replaced(fd: int) -> None:
    (path_of(fd).parent / "new").write_text("0123456789")
    (path_of(fd).parent / "new").rename(path_of(fd))


CHANGES_OF_FILES: dict[str, Callable[[int], object]] = {
    "offset": lambda fd: os.lseek(fd, 3, os.SEEK_SET),
    "size": lambda fd: os.ftruncate(fd, 5),
    "contents": lambda fd: os.pwrite(fd, b"x", 0),
    "flags": lambda fd: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND),
    "close-on-exec": close_on_exec,
    "owner": other_owner,
    "signal": other_signal,
    "mode": lambda fd: os.fchmod(fd, 0o640),
    "user": lambda fd: os.fchown(fd, 7, -1),
    "group": lambda fd: os.fchown(fd, -1, 7),
    "another description": of_another,
    "another file": another_file,
    "another name": lambda fd: path_of(fd).rename(path_of(fd).parent / "else"),
    "no name": lambda fd: path_of(fd).unlink(),
    "two names": lambda fd: os.link(path_of(fd), path_of(fd).parent / "else"),
    "replaced": replaced,
    "directory": lambda fd: path_of(fd).parent.rename(path_of(fd).parent.parent / "elsewhere"),
}


@pytest.mark.parametrize("change", CHANGES_OF_FILES.values(), ids=CHANGES_OF_FILES.keys())
def test_a_file_of_which_anything_has_changed_falls(files: list[int], change: Callable[[int], object]) -> None:
    ours = Ourselves()
    change(files[1])
    stand = standing_after(ours)
    assert files[1] not in stand
    assert (files[0] in stand) == (change is not CHANGES_OF_FILES["directory"])
    ours.close()


def test_a_file_that_is_open_once_more_is_compared_with_that(files: list[int]) -> None:
    ours = Ourselves()
    copy = os.dup(files[0])
    other = os.open(path_of(files[1]), os.O_RDWR)
    stand, looked_at = ours.collect()
    assert {files[0], files[1], copy, other} <= looked_at
    assert files[2] in stand
    os.close(copy)
    os.close(other)
    ours.close()


def test_of_one_that_was_there_twice_neither_stands(files: list[int]) -> None:
    copy = os.dup(files[0])
    ours = Ourselves()
    other = os.open(path_of(files[0]), os.O_RDWR)
    os.dup2(other, copy, inheritable=False)  # the same of all but that it is another description
    os.close(other)
    assert {files[0], copy} <= ours.collect()[1]
    os.close(copy)
    ours.close()


@pytest.mark.parametrize("told", [True, False])
def test_a_file_that_is_locked_falls(files: list[int], told: bool) -> None:
    ours = Ourselves()
    fcntl.flock(files[1], fcntl.LOCK_EX)
    locked = {os.fstat(files[1]).st_ino} if told else None
    stand, looked_at = ours.collect(locked)
    assert files[1] in looked_at
    assert (files[0] in stand) == told
    ours.close()


def test_closed_numbers_do_not_stand(files: list[int], pipes: list[Pair]) -> None:
    gone = os.open("/etc/hostname", os.O_RDONLY)
    ours = Ourselves()
    os.close(gone)
    stand = standing_after(ours)
    assert gone not in stand
    assert {*files, *pipes[0]} <= stand
    ours.close()


def another_pipe(fd: int) -> None:
    """Its reading end under the number of the one that was there; the other pipe has no reading end then."""
    ends = os.pipe()
    os.dup2(ends[0], fd, inheritable=False)
    for end in ends:
        os.close(end)


def emptied(fd: int) -> None:
    other = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.dup2(other, fd, inheritable=False)
    os.close(other)


CHANGES_OF_PIPES: dict[str, Callable[[int], object]] = {
    "asynchronous": lambda fd: fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.FASYNC),
    "flags": lambda fd: os.set_blocking(fd, False),
    "capacity": lambda fd: fcntl.fcntl(fd, F_SETPIPE_SZ, 1 << 17),
    "close-on-exec": close_on_exec,
    "owner": other_owner,
    "signal": other_signal,
    "mode": lambda fd: os.fchmod(fd, 0o640),
    "another pipe": another_pipe,
    "another description": emptied,
    "another end": os.dup,
}


@pytest.mark.parametrize("change", CHANGES_OF_PIPES.values(), ids=CHANGES_OF_PIPES.keys())
def test_a_pipe_of_which_anything_has_changed_falls_with_both_ends(
    pipes: list[Pair], change: Callable[[int], object]
) -> None:
    ours = Ourselves()
    made = change(pipes[1][0])
    stand, looked_at = ours.collect()
    assert set(pipes[1]) <= looked_at
    assert {*pipes[0], *pipes[2]} <= stand
    if change is os.dup:
        os.close(made)
    ours.close()


def test_what_waits_in_the_end_is_saved_also_if_it_is_as_long(child: Child) -> None:
    child.run(
        "r, w = os.pipe(); l = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(l.getsockname())"
    )
    child.run("s, _ = l.accept(); os.write(w, b'before'); c.send(b'before')")
    ours = Ourselves(child.process)
    assert child.ask("os.read(r, 9), s.recv(9)") == (b"before", b"before")
    child.run("os.write(w, b'later.'); c.send(b'later.')")
    child.stop()
    dump = DescriptorDump(
        [ours.owner],
        ObjHash(),
        ours.stream,
        predumped=ours.predumped,
        flags=flags_of_any,
        locks=Locks(set()),
        standing=ours.standing,
    )
    try:
        dump.collect()
        places = {connection.candidate.number for connection in ours.standing.connections()}
        assert places == {3, 4} and len(ours.standing.full_pipes()) == 1
        dump.write()
    finally:
        dump.undo()
        child.go_on()
    assert [rec.data for rec in ours.stream.records if isinstance(rec, PipeBuffer)] == [b"later."]
    assert [rec.received for rec in ours.stream.records if isinstance(rec, SocketTcp) and rec.received] == [b"later."]


def test_what_a_child_has_as_well_falls(files: list[int], pipes: list[Pair], connections: list[socket.socket]) -> None:
    ours = Ourselves()
    with Child(keep=True) as child:
        child.run(f"for fd in {[files[0], *pipes[0], connections[0].fileno()]}: os.close(fd)")
        found = Collection([ours.owner, child.process], ours.predumped.known, flags_of_any, Locks(set()), ours.standing)
        try:
            stand = {number for number, _, _ in found.tables[0].standing}
            held = {number: slot.description.holders for slot in found.tables[0].slots for number in [slot.number]}
        finally:
            found.close()
    assert {files[0], *pipes[0], connections[0].fileno()} <= stand
    for number in (*files[1:], *pipes[1], *pipes[2], connections[1].fileno()):
        assert {holder.pid for holder, _ in held[number]} == {os.getpid(), child.pid}
    ours.close()


def test_what_waits_in_pipes_that_stand_is_told(pipes: list[Pair]) -> None:
    os.write(pipes[0][1], b"before")
    ours = Ourselves()
    os.write(pipes[1][1], b"after")
    found = Collection([ours.owner], ours.predumped.known, flags_of, Locks(set()), ours.standing)
    amounts = {(full.fd >= 0, full.amount) for full in ours.standing.full_pipes()}
    found.close()
    assert {(True, len(b"before")), (True, len(b"after"))} <= amounts
    ours.close()


def peek_offsets_of_tcp() -> bool:
    """Whether this kernel has them."""
    with socket.socket() as sock:
        return sockopts.peeks_from(sock) == -1 and not sock.setsockopt(socket.SOL_SOCKET, sockopts.SO_PEEK_OFF, -1)


def linger(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 7))


CHANGES_OF_CONNECTIONS: dict[str, Callable[[socket.socket], object]] = {
    "flags": lambda sock: os.set_blocking(sock.fileno(), False),
    "close-on-exec": lambda sock: close_on_exec(sock.fileno()),
    "owner": lambda sock: other_owner(sock.fileno()),
    "signal": lambda sock: other_signal(sock.fileno()),
    "another connection": lambda sock: another_connection(sock),
    "user": lambda sock: os.fchown(sock.fileno(), 7, -1),
    "group": lambda sock: os.fchown(sock.fileno(), -1, 7),
    "another number": lambda sock: os.dup(sock.fileno()),
    "end": lambda sock: sock.shutdown(socket.SHUT_WR),
    "end of reading": lambda sock: sock.shutdown(socket.SHUT_RD),
    "linger": linger,
    "time": lambda sock: sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("qq", 3, 5)),
    "congestion": lambda sock: sock.setsockopt(
        socket.IPPROTO_TCP, socket.TCP_CONGESTION, another_congestion(sock).encode()
    ),
    "sndbuf": lambda sock: sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192),
    "rcvbuf": lambda sock: sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192),
    "device": lambda sock: sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo"),
    "filter": lambda sock: attach_filter(sock),
}
if peek_offsets_of_tcp():
    CHANGES_OF_CONNECTIONS["peek offset"] = lambda sock: sock.setsockopt(socket.SOL_SOCKET, sockopts.SO_PEEK_OFF, 0)


def another_connection(sock: socket.socket) -> None:
    """From the same host to the same host, under the number of the one that was there."""
    with (
        socket.create_server((sock.getsockname()[0], 0), family=sock.family) as listener,
        socket.create_connection(listener.getsockname()[:2]) as other,
    ):
        os.dup2(other.fileno(), sock.fileno(), inheritable=False)


def another_congestion(sock: socket.socket) -> str:
    now = sockopts.text(sock, socket.IPPROTO_TCP, socket.TCP_CONGESTION)
    there = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    return next(name for name in there if name != now)


def attach_filter(sock: socket.socket) -> None:
    import ctypes

    accept = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0xFFFF), 8)
    sock.setsockopt(socket.SOL_SOCKET, 26, struct.pack("@HP", 1, ctypes.addressof(accept)))


def standing_after(ours: Ourselves) -> set[int]:
    """Those that stand, none being looked at."""
    root = os.open("/", os.O_PATH)
    there = numbers()
    now = collection.Listed(there, flags_of(ours.owner, there))
    try:
        ours.standing.look(root, {ours.owner.pid: now})
        return set(there) - set(ours.standing.others(ours.owner.pid, now))
    finally:
        ours.standing.close()
        os.close(root)


@pytest.mark.parametrize("change", CHANGES_OF_CONNECTIONS.values(), ids=CHANGES_OF_CONNECTIONS.keys())
def test_a_connection_of_which_anything_has_changed_falls(
    connections: list[socket.socket], change: Callable[[socket.socket], object]
) -> None:
    ours = Ourselves()
    made = change(connections[2])
    if change is CHANGES_OF_CONNECTIONS["another number"]:
        stand, _ = ours.collect()
        assert isinstance(made, int)
        os.close(made)
    else:
        stand = standing_after(ours)
    assert connections[2].fileno() not in stand
    assert connections[0].fileno() in stand
    ours.close()


def test_urgent_data_falls(connections: list[socket.socket]) -> None:
    ours = Ourselves()
    connections[2].send(b"!", socket.MSG_OOB)
    stand = standing_after(ours)
    assert connections[3].fileno() not in stand
    ours.close()


def changed_options(sock: socket.socket) -> Iterator[tuple[int, int]]:
    """Set each option of a connection that can be set to another value, one by one."""
    asked = sockopts.Defaults().of(sock.family, socket.SOCK_STREAM, socket.IPPROTO_TCP, connected=True)
    for level, name, _, special in asked:
        if special or sockopts.uncarried(SocketOption(level, name, 3)):
            continue
        before = sock.getsockopt(level, name)
        for value in (before ^ 1, before + 1, 1, 2, 4, 8, 16, 64):
            try:
                sock.setsockopt(level, name, value)
            except OSError:
                continue
            if sock.getsockopt(level, name) != before:
                yield level, name
                break


def test_each_option_that_can_be_set_is_seen(connections: list[socket.socket]) -> None:
    seen = 0
    options = changed_options(connections[2])
    while True:
        ours = Ourselves()
        option = next(options, None)
        if option is None:
            break
        assert connections[2].fileno() not in standing_after(ours), option
        seen += 1
        ours.close()
    assert connections[2].fileno() in standing_after(ours)
    ours.close()
    assert seen >= 20


def test_the_record_of_a_connection_is_the_same_either_way(connections: list[socket.socket]) -> None:
    """From the answers to one table of questions, and from a look at a stopped one."""
    linger(connections[0])
    connections[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("qq", 3, 5))
    connections[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 40000)
    os.fchown(connections[0].fileno(), 7, 8)
    assert len(list(changed_options(connections[0]))) >= 20
    ours = Ourselves()
    fds = [sock.fileno() for sock in connections]
    found = Collection([ours.owner])
    items = [item for item in found.descriptions if item.holders[0][1] in fds and item.kind == FileKind.SOCKET]
    dump = SocketDump(items, ours.owner.pid, lambda: pytest.fail("nothing is written"))
    dump.collect()
    slow = {(rec.local, rec.peer): replace(rec, objref=0) for rec in dump.connections}
    ahead = {
        (rec.local, rec.peer): replace(rec, objref=0)
        for rec in ours.stream.records
        if isinstance(rec, Socket) and (rec.local, rec.peer) in slow
    }
    dump.close(silent=False)
    found.close()
    ours.close()
    assert len(slow) == len(connections)
    assert ahead == slow
