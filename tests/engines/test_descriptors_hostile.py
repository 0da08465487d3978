"""Records of a real program, altered: whatever comes of them, it is an error that says so, or a descriptor."""

# ruff: noqa: F811

from __future__ import annotations

import copy
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakestub import Child
from moving import Moved, Surroundings, hidden  # noqa: F401

from migrator.engine.user.descriptors import DescriptorRestore
from migrator.errors import ImageError, MigratorError, RestartFailed
from migrator.image import records_files as r
from migrator.image.codec import Record

pytestmark = pytest.mark.root

PROGRAM = """
os.chdir({folder!r})
a = os.open('file', os.O_RDWR | os.O_CREAT); b = os.open('gone', os.O_RDWR | os.O_CREAT); os.unlink('gone')
os.write(b, b'deleted'); p, q = os.pipe(); os.write(q, b'in the pipe'); os.eventfd(3); os.open('/dev/null', 0)
ep = select.epoll(); ep.register(p, 1); os.mkfifo('fifo'); f = os.open('fifo', os.O_RDWR); os.write(f, b'fifo')
ctypes.CDLL(None).timerfd_create(1, 0); ctypes.CDLL(None).syscall(289, -1, ctypes.c_char_p(b'x' * 8), 8, 0)
u, v = socket.socketpair(); u.send(b'there'); d, e = socket.socketpair(1, 2); d.send(b'message')
l = socket.socket(1); l.bind('socket'); l.listen(); c = socket.socket(1); c.connect('socket'); s, _ = l.accept()
n = socket.socket(1, 2); n.bind('named'); d2 = socket.socket(1, 2); d2.connect('named'); d2.send(b'named')
t = socket.socket(); t.bind(('127.0.0.1', 0)); t.listen(); g = socket.socket(); g.connect(t.getsockname())
h, _ = t.accept(); g.send(b'received'); y = socket.socket(); y.connect(t.getsockname()); z, _ = t.accept()
z.close(); i = socket.socket(2, 2); i.bind(('127.0.0.1', 0)); j = socket.socket(2, 2); j.connect(i.getsockname())
j.send(b'datagram')
"""


@pytest.fixture(scope="module")
def nowhere() -> Iterator[str]:
    """A network namespace with nothing but loopback."""
    name = f"dsh{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
    yield f"/run/netns/{name}"
    subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.fixture
def records(tmp_path: Path, hidden: None) -> list[Record]:
    with Child() as child:
        child.run(PROGRAM.format(folder=str(tmp_path)))
        with Moved(child) as moved:
            return moved.saved.records


def build(records: list[Record], netns: str, ahead: list[Record] = []) -> None:  # noqa: B006
    """ahead: those that come while the program still runs."""
    context = Surroundings()
    context.netns = netns
    restore = DescriptorRestore(context)
    try:
        restore.final = False
        for rec in ahead:
            restore.record(rec)
        restore.final = True
        for rec in records:
            restore.record(rec)
        restore.settle(list(restore.tables))
        for objref in list(restore.tables):
            with Child() as stub:
                restore.install(stub, objref)
                restore.finish([stub])
        restore.activate()
    finally:
        restore.close()
        os.close(context.root_fd)


def spoil(rng: random.Random, rec: Record) -> Record:
    """One field of a record replaced, in or out of what makes sense; paths stay as they are."""
    rec = copy.copy(rec)
    names = [name for name in rec.__slots__ if not isinstance(getattr(rec, name), str)]
    name = rng.choice(names)
    value: Any = getattr(rec, name)
    if isinstance(value, int):
        code = next(m.code for m in rec._members if m.name == name)
        top = {"I": 1 << 32, "i": 1 << 31, "Q": 1 << 64, "q": 1 << 63, "H": 1 << 16, "B": 256}[code]
        new: Any = rng.choice([0, 1, 2, 3, value + 1, value ^ 4, 7, 1000, top - 1, rng.randrange(top)]) % top
        setattr(rec, name, -new if code in "iq" and rng.random() < 0.2 else new)
    elif isinstance(value, bytes):
        cut = rng.randrange(len(value) + 1)
        noise = rng.randbytes(rng.choice([0, 1, 2, 14, 300]))
        setattr(rec, name, rng.choice([value[:cut], value[:cut] + noise, noise, noise + value, value * 3]))
    else:
        setattr(rec, name, rng.choice([[], value * 2, value[::-1], value[:1]]))
    return rec


def part(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """Those that can be pre-dumped, and the others."""
    pipes = {rec.objref for rec in records if isinstance(rec, r.Pipe)}
    tcp = {rec.socket_objref for rec in records if isinstance(rec, r.SocketTcp)}
    ahead = [
        rec
        for rec in records
        if isinstance(rec, r.Pipe)
        or (isinstance(rec, r.Socket) and rec.objref in tcp)
        or (isinstance(rec, r.File) and rec.inode_objref in pipes | tcp and rec.kind != r.FileKind.FIFO)
    ]
    return ahead, [rec for rec in records if rec not in ahead]


@pytest.mark.parametrize("seed", range(12))
def test_altered_records_that_come_ahead_raise_nothing_but_errors_that_say_so(
    seed: int, records: list[Record], nowhere: str
) -> None:
    rng = random.Random(seed)
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(25):
        halves = part(records)
        for _ in range(rng.choice([1, 1, 2, 5])):
            half = rng.choice(halves)
            at = rng.randrange(len(half))
            how = rng.random()
            if how < 0.5:
                half[at] = spoil(rng, half[at])
            elif how < 0.7:
                half.insert(rng.randrange(len(half)), half[at])
            elif how < 0.9:
                other = rng.choice(halves)
                other.insert(rng.randrange(len(other) + 1), half[at])
            else:
                del half[at]
        try:
            build(halves[1], nowhere, halves[0])
        except MigratorError as error:
            assert str(error)
    assert set(os.listdir("/proc/self/fd")) <= before


def test_a_connection_that_came_ahead_and_has_no_state_in_the_end_is_refused(
    records: list[Record], nowhere: str
) -> None:
    ahead, rest = part([rec for rec in records if not isinstance(rec, r.EpollItems)])
    build(rest, nowhere, ahead)
    lost = next(rec for rec in rest if isinstance(rec, r.SocketTcp))
    with pytest.raises(ImageError, match="the state of its connection never came"):
        build([rec for rec in rest if rec is not lost], nowhere, ahead)


def test_sockets_that_are_no_connections_do_not_come_ahead(records: list[Record], nowhere: str) -> None:
    ahead, rest = part(records)
    for rec in rest:
        if isinstance(rec, r.Socket):
            with pytest.raises(ImageError, match="comes too early"):
                build([], nowhere, [*ahead, rec])


def test_a_pipe_that_came_ahead_takes_no_more_than_it_holds(records: list[Record], nowhere: str) -> None:
    ahead, rest = part(records)
    pipe = next(rec for rec in ahead if isinstance(rec, r.Pipe))
    more = r.PipeBuffer(pipe.objref, 0, bytes(pipe.capacity))
    with pytest.raises(ImageError, match="bytes or more in a pipe"):
        build([more, *rest], nowhere, ahead)


@pytest.mark.parametrize("seed", range(12))
def test_altered_records_raise_nothing_but_errors_that_say_so(seed: int, records: list[Record], nowhere: str) -> None:
    rng = random.Random(seed)
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(25):
        altered = list(records)
        for _ in range(rng.choice([1, 1, 2, 5])):
            at = rng.randrange(len(altered))
            how = rng.random()
            if how < 0.8:
                altered[at] = spoil(rng, altered[at])
            elif how < 0.9:
                altered.insert(rng.randrange(len(altered)), altered[at])
            else:
                del altered[at]
        try:
            build(altered, nowhere)
        except MigratorError as error:
            assert error.message
    assert set(os.listdir("/proc/self/fd")) <= before, "descriptors were left open"


def test_a_socket_does_not_take_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    address = b"\1\0" + os.fsencode(tmp_path / "precious")
    restore = DescriptorRestore(Surroundings())
    restore.record(
        r.Socket(
            1, 1, 1, 0, r.SocketState.LISTENING, 0, 5, 0, 4608, 4608, 0, 0o777, 0, 0, 0, address, b"",
            str(tmp_path / "precious"), "", "", [],
        )
    )  # fmt: skip
    with pytest.raises(RestartFailed, match="precious is no socket here"):
        restore.record(r.File(2, r.FileKind.SOCKET, 2, 0o140777, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, ""))
    restore.activate()
    restore.close()
    assert (tmp_path / "precious").read_text() == "data"
    assert os.listdir(tmp_path) == ["precious"]


def test_a_terminal_of_the_other_engine_is_refused_by_name() -> None:
    terminal = r.Pty(1, 5, 0, 0, 0, 0, 0, 5, 0o620, 24, 80, 0, 0, bytes(44))
    restore = DescriptorRestore(Surroundings())
    with pytest.raises(RestartFailed, match=r"a terminal .*pts/5.*does not carry") as refused:
        restore.record(terminal)
    assert "--engine kernel" in refused.value.hint
    restore.close()
