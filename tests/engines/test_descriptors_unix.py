"""Unix sockets saved from one process and made again in another."""

# ruff: noqa: F811, E501

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from fakestub import Child
from moving import Bytes, Moved, child, hidden, move  # noqa: F401

from migrator.engine.user.descriptors import DescriptorDump, Transients, finish_moves, notes, survey
from migrator.errors import CheckpointFailed
from migrator.image.objhash import ObjHash

pytestmark = pytest.mark.root


def test_a_pair_keeps_what_is_on_its_way_in_both_directions(child: Child, move: Callable[..., Child]) -> None:
    child.run("a, b = socket.socketpair(); a.setblocking(False); a.send(b'to b' * 20000); b.send(b'to a')")
    copy = move(child)
    copy.run("a, b = adopt(0), adopt(1)")
    assert copy.ask("b.recv(200000, socket.MSG_WAITALL | socket.MSG_DONTWAIT)") == b"to b" * 20000
    assert copy.ask("a.recv(100)") == b"to a"
    copy.run("a.send(b'again')")
    assert copy.ask("b.recv(100)") == b"again"


@pytest.mark.parametrize("kind", ["SOCK_DGRAM", "SOCK_SEQPACKET"])
def test_messages_stay_messages(child: Child, move: Callable[..., Child], kind: str) -> None:
    child.run(f"a, b = socket.socketpair(socket.AF_UNIX, socket.{kind}); [b.send(b'x' * n) for n in (1, 200, 30)]")
    copy = move(child)
    assert copy.ask("[len(adopt(os.dup(0)).recv(1000)) for _ in range(3)]") == [1, 200, 30]


PEEKING = """
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
[b.send(b'x' * n) for n in (100, 200, 300)]
import threading
seen, end = set(), threading.Event()
def peek():
    while not end.is_set():
        seen.add(len(a.recv(1000, socket.MSG_PEEK)))
looking = threading.Thread(target=peek, daemon=True)
looking.start()
"""


def test_a_running_program_peeks_at_its_next_message_whoever_else_looks(child: Child) -> None:
    child.run(PEEKING)
    with Transients([child.process]) as transients:
        for _ in range(5000):
            assert transients.settle(0)
    child.run("end.set(); looking.join(5)")
    assert child.ask("seen, looking.is_alive()") == ({100}, False)


def test_the_peek_offset_of_a_running_program_stays_its_own(child: Child) -> None:
    child.run("a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); a.setsockopt(socket.SOL_SOCKET, 42, 0)")
    child.run("[b.send(b'x' * n) for n in (100, 200, 300)]")
    with Transients([child.process]) as transients:
        for size in (100, 200, 300):
            assert transients.settle(0)
            assert child.ask("len(a.recv(1000, socket.MSG_PEEK))") == size


def test_a_descriptor_that_comes_next_is_seen_while_the_program_runs(child: Child) -> None:
    child.run("a, b = socket.socketpair(); socket.send_fds(b, [b'x'], [1])")
    with Transients([child.process]) as transients:
        assert not transients.settle(0) and "SCM_RIGHTS" in transients.waiting()
        child.run("[os.close(fd) for fd in socket.recv_fds(a, 1, 1)[1]]")
        assert transients.settle(0) and not transients.waiting()


def test_a_descriptor_behind_other_messages_is_seen_once_the_program_stands(child: Child) -> None:
    child.run("a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); b.send(b'before')")
    child.run("socket.send_fds(b, [b'x'], [1])")
    with Transients([child.process]) as transients:
        assert transients.settle(0) and "SCM_RIGHTS" in transients.waiting()
        assert child.ask("a.recv(6)") == b"before"


def test_looking_into_sockets_takes_nothing_out(child: Child) -> None:
    child.run(
        "a, b = socket.socketpair(); a.send(b'still'); c, d = socket.socketpair(1, 2); c.send(b'1'); c.send(b'2')"
    )
    for _ in range(2):
        with Moved(child):
            pass
        child.go_on()
    assert child.ask("b.recv(100), d.recv(100), d.recv(100)") == (b"still", b"1", b"2")
    child.run("a.send(b'new')")
    assert child.ask("b.recv(100)") == b"new"


def test_a_half_closed_pair_and_one_whose_peer_is_gone(child: Child, move: Callable[..., Child]) -> None:
    child.run(
        "a, b = socket.socketpair(); a.send(b'1'); a.shutdown(1); c, d = socket.socketpair(); c.send(b'2'); c.close()"
    )
    copy = move(child)
    copy.run("a, b, d = adopt(0), adopt(1), adopt(3)")
    assert copy.ask("b.recv(9), b.recv(9), d.recv(9), d.recv(9)") == (b"1", b"", b"2", b"")
    assert copy.ask("b.send(b'back'), a.recv(9)") == (4, b"back")
    copy.run("signal.signal(13, 1)")
    with pytest.raises(AssertionError, match="BrokenPipe"):
        copy.run("d.send(b'x')")


def test_a_listener_is_reached_by_its_name_and_connections_keep_theirs(
    child: Child, move: Callable[..., Child], tmp_path: Path
) -> None:
    path = str(tmp_path / "socket")
    child.run(f"l = socket.socket(socket.AF_UNIX); l.bind({path!r}); l.listen(5); os.chmod({path!r}, 0o640)")
    child.run(f"c = socket.socket(socket.AF_UNIX); c.connect({path!r}); s, _ = l.accept(); c.send(b'hello')")
    copy = move(child)
    copy.run("l, c, s = adopt(0), adopt(1), adopt(2)")
    assert copy.ask("c.getpeername(), s.getsockname(), l.getsockname(), s.recv(9)") == (path, path, path, b"hello")
    with socket.socket(socket.AF_UNIX) as outside:
        outside.connect(path)
        assert copy.ask("l.accept()[0].send(b'welcome')") == 7
        assert outside.recv(9) == b"welcome"
    assert os.listdir(tmp_path) == ["socket"]
    assert os.stat(path).st_mode & 0o777 == 0o640


def test_a_restore_that_is_given_up_leaves_the_name_to_its_owner(child: Child, tmp_path: Path) -> None:
    from migrator.engine.user.descriptors import DescriptorRestore

    path = str(tmp_path / "socket")
    child.run(f"l = socket.socket(socket.AF_UNIX); l.bind({path!r}); l.listen(5)")
    with Moved(child) as moved:
        restore = DescriptorRestore(moved.context)
        for rec in moved.saved.records:
            restore.record(rec)
        restore.close()
    child.go_on()
    with socket.socket(socket.AF_UNIX) as outside:
        outside.connect(path)
        assert child.ask("l.accept()[0].send(b'still me')") == 8
    assert os.listdir(tmp_path) == ["socket"]


def test_abstract_names_and_relative_ones(child: Child, tmp_path: Path) -> None:
    name = f"\0descriptors-{os.getpid()}"
    child.run(f"os.chdir({str(tmp_path)!r}); l = socket.socket(socket.AF_UNIX); l.bind({name!r}); l.listen()")
    child.run("r = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); r.bind('near')")
    with Moved(child) as moved:
        moved.dump.release()
        child.end()
        (copy,) = moved.restore([child])
        assert copy.ask("adopt(os.dup(1)).getsockname()") == "near"
        with socket.socket(socket.AF_UNIX) as outside, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as d:
            outside.connect(name)
            d.sendto(b"datagram", str(tmp_path / "near"))
            assert copy.ask("adopt(os.dup(1)).recv(20)") == b"datagram"


def test_datagrams_keep_their_senders_names(child: Child, move: Callable[..., Child], tmp_path: Path) -> None:
    here = str(tmp_path)
    child.run(f"r, s = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in 'rs']; r.bind({here!r} + '/r')")
    child.run(f"s.bind({here!r} + '/s'); s.connect({here!r} + '/r'); s.send(b'one'); s.send(b'')")
    child.run(f"t = socket.socket(1, 2); t.bind({here!r} + '/t'); t.sendto(b'three', {here!r} + '/r'); t.close()")
    copy = move(child)
    copy.run("r, s = adopt(0), adopt(1)")
    assert copy.ask("[r.recvfrom(9) for _ in range(3)]") == [
        (b"one", here + "/s"),
        (b"", here + "/s"),
        (b"three", here + "/t"),
    ]
    assert copy.ask("s.send(b'more'), r.recv(9), s.getpeername()") == (4, b"more", here + "/r")


def test_two_processes_are_connected_as_before(child: Child) -> None:
    child.run("a, b = socket.socketpair(); a.send(b'across')")
    with Child() as other:
        from migrator.linux.sys import pidfd_getfd

        fd = pidfd_getfd(child.pidfd, 1)
        other.install_fds([(fd, 7, True)])
        os.close(fd)
        child.run("b.close()")
        with Moved(child, other) as moved:
            one, two = moved.restore([child, other])
            assert two.ask("adopt(7).recv(9)") == b"across"
            assert one.ask("adopt(0).recv(9)") == b""


def test_options_of_sockets_are_kept(child: Child, move: Callable[..., Child]) -> None:
    child.run(
        "a, b = socket.socketpair(); a.setsockopt(1, 7, 50000); a.setsockopt(1, 16, 1); a.setsockopt(1, 20, struct.pack('qq', 3, 500000))"
    )
    before = child.ask("[a.getsockopt(1, n) for n in (7, 8, 16, 72)], [b.getsockopt(1, n) for n in (7, 8, 16, 72)]")
    copy = move(child)
    copy.run("a, b = adopt(0), adopt(1)")
    assert (
        copy.ask("[a.getsockopt(1, n) for n in (7, 8, 16, 72)], [b.getsockopt(1, n) for n in (7, 8, 16, 72)]") == before
    )
    assert copy.ask("a.getsockopt(1, 20, 16)") == child_timeout()


def child_timeout() -> bytes:
    import struct

    return struct.pack("qq", 3, 500000)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("a, b = socket.socketpair(); a.sendmsg([b'x'], [(1, 1, struct.pack('i', 0))])", "SCM_RIGHTS"),
        (
            "l = socket.socket(1); l.bind('\\0desc-%d' % os.getpid()); l.listen();"
            " c = socket.socket(1); c.connect(l.getsockname())",
            "1 connections wait to be accepted",
        ),
    ],
)
def test_what_is_on_its_way_and_cannot_be_carried_is_refused(child: Child, code: str, reason: str) -> None:
    child.run(code)
    child.stop()
    dump = DescriptorDump([child.process], ObjHash(), Bytes())
    with pytest.raises(CheckpointFailed, match=reason):
        dump.dump()


def test_a_peer_outside_of_the_tree_is_refused_by_name(child: Child) -> None:
    with socket.socketpair()[0] as a:
        b = socket.socketpair()
        child.install_fds([(b[0].fileno(), 3, False)])
        b[0].close()
        (sentence,) = survey([child.process], own_netns=True)
        assert f"pid {child.pid} (" in sentence and "fd 3" in sentence and f"pid {os.getpid()}" in sentence
        child.stop()
        dump = DescriptorDump([child.process], ObjHash(), Bytes())
        with pytest.raises(CheckpointFailed, match="outside of the tree"):
            dump.dump()
        assert a is not None
        b[1].close()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("socket.socket(16, 3, 16)", "a netlink socket of protocol 16"),
        ("socket.socket(17, 3, 0)", "a packet socket"),
        ("socket.socket(40, 1, 0)", "a vsock socket"),
        ("socket.socket(2, 3, 1)", "protocol raw"),
    ],
)
def test_other_families_are_refused_by_name(child: Child, code: str, reason: str) -> None:
    child.run(f"s = {code}")
    (sentence,) = survey([child.process], own_netns=True)
    assert reason in sentence and "fd 0" in sentence


PEERS = "[struct.unpack('iII', socket.socket(fileno=os.dup(n)).getsockopt(1, 17, 12))[1:] for n in range(9)]"
WHO = """
def who(uid, gid):
    os.setresuid(-1, 0, -1)
    os.setresgid(-1, gid, -1)
    os.setresuid(-1, uid, -1)
"""


@pytest.mark.parametrize("name", [f"\0peers-{os.getpid()}", "socket"], ids=["abstract", "path"])
def test_which_user_the_peer_was_stays_known(child: Child, tmp_path: Path, name: str) -> None:
    tmp_path.chmod(0o777)
    child.run(WHO)
    child.run(f"os.chdir({str(tmp_path)!r}); name = {name!r}; l = socket.socket(1); l.bind(name)")
    child.run("if name == 'socket': os.chmod(name, 0o777)")
    child.run("who(4001, 4101); a, b = socket.socketpair(); c, d = socket.socketpair(1, 2)")
    child.run("who(4002, 4102); l.listen()")
    child.run("who(4003, 4103); e = socket.socket(1); e.connect(name); f, _ = l.accept()")
    child.run("who(0, 4104); g = socket.socket(1); g.connect(name); h, _ = l.accept(); who(0, 0)")
    before = child.ask(PEERS)
    assert sorted(before) == [(0, 4104), *[(4001, 4101)] * 4, *[(4002, 4102)] * 3, (4003, 4103)]
    with Moved(child) as moved:
        moved.dump.release()  # of the name, which is taken until nobody has the socket open
        child.end()
        (copy,) = moved.restore([child])
        assert copy.ask(PEERS) == before


def test_the_survey_says_that_pids_of_peers_are_not_kept(child: Child) -> None:
    child.run("l = socket.socket(1); l.bind(''); l.listen(); u = socket.socket(2, 2)")
    assert list(notes([child.process])) == []
    child.run("a, b = socket.socketpair()")
    ((about, note),) = notes([child.process])
    assert about == f"pid {child.pid} fd 2, 3" and "SO_PEERCRED" in note


def test_files_of_sockets_come_into_their_places_also_if_the_agent_dies_before_the_copy_runs(
    child: Child, tmp_path: Path
) -> None:
    child.run(f"a = socket.socket(1); a.bind({str(tmp_path / 'a')!r}); a.listen()")
    child.run(f"b = socket.socket(1); os.chdir({str(tmp_path)!r}); b.bind('b'); b.listen()")
    with Moved(child) as moved:
        (copy,) = moved.restore([child], dies=True)
        child.end()
        assert len(list(tmp_path.glob(".migrator-*"))) == 1
        for _ in range(2):  # also one that settles can die, and another begins anew
            finish_moves(moved.context.root_fd, moved.moves)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
        for number, name in enumerate("ab"):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / name))
                copy.run(f"adopt({number}).accept()[0].send(b'{name}')")
                assert client.recv(1) == name.encode()


def test_empty_messages_are_messages(child: Child, move: Callable[..., Child]) -> None:
    child.run("a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)")
    child.run("[b.send(b'x' * n) for n in (1, 0, 30, 0)]")
    copy = move(child)
    assert copy.ask("[len(adopt(os.dup(0)).recv(1000)) for _ in range(4)]") == [1, 0, 30, 0]
    copy.run("c = adopt(os.dup(0)); c.setblocking(False)")
    with pytest.raises(AssertionError, match="BlockingIOError"):
        copy.run("c.recv(1)")


def test_a_socket_for_messages_that_was_never_connected(child: Child, move: Callable[..., Child]) -> None:
    child.run("a = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)")
    copy = move(child)
    assert copy.ask("adopt(0).type") == socket.SOCK_SEQPACKET
