"""Connections within one host of which a program has closed one end: the other is carried with all that had come."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from fakestub import Child
from moving import Bytes, Moved, Surroundings, hidden  # noqa: F401

from migrator.engine.user.descriptors import DescriptorDump, survey
from migrator.errors import CheckpointFailed
from migrator.image.objhash import ObjHash
from migrator.linux import inet_diag
from migrator.linux.namespaces import CLONE_NEWNET, entered, setns

pytestmark = pytest.mark.root

ADDRESSES = {"AF_INET": "127.0.0.1", "AF_INET6": "::1"}
_serial = itertools.count()


@dataclass
class Hosts:
    """The network namespaces of a source and a destination, each with a loopback device."""

    src: str
    dst: str

    def child(self) -> Child:
        def enter() -> None:
            fd = os.open(f"/run/netns/{self.src}", os.O_RDONLY)
            setns(fd, CLONE_NEWNET)
            os.close(fd)

        return Child(before=enter)

    def context(self) -> Surroundings:
        context = Surroundings()
        context.netns = f"/run/netns/{self.dst}"
        return context


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts(*(f"end{os.getpid() % 10000}{which}{next(_serial)}" for which in "sd"))
    try:
        for name in (made.src, made.dst):
            subprocess.run(["ip", "netns", "add", name], check=True)
            subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield made
    finally:
        for name in (made.src, made.dst):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def connect(child: Child, family: str = "AF_INET") -> None:
    """Fd 0 listens, fd 1 and fd 2 are the ends of a connection."""
    host = ADDRESSES[family]
    child.run(f"l = socket.socket(socket.{family}); l.bind(({host!r}, 0)); l.listen()")
    child.run(f"c = socket.socket(socket.{family}); c.connect(l.getsockname()); s, _ = l.accept()")


def refusal(child: Child) -> str:
    """Why it cannot be saved; it runs on."""
    child.stop()
    dump = DescriptorDump([child.process], ObjHash(), Bytes())
    with pytest.raises(CheckpointFailed) as refused:
        dump.dump()
    child.go_on()
    return str(refused.value)


@pytest.mark.parametrize("said", [b"", b"last words" * 1000], ids=["in silence", "after words"])
@pytest.mark.parametrize("family", ADDRESSES)
def test_the_other_end_was_closed(hosts: Hosts, family: str, said: bytes) -> None:
    with hosts.child() as child:
        connect(child, family)
        child.run(f"s.settimeout(5); c.sendall({said!r}); c.close(); p = select.poll(); p.register(s, 0x2001)")
        assert child.ask("p.poll(5000)")
        assert survey([child.process], own_netns=False) == []
        with Moved(child, context=hosts.context()) as moved:
            (copy,) = moved.restore([child])
            copy.run("s = adopt(2); s.settimeout(5); p = select.poll(); p.register(s, 0x2001)")
            copy.run("time.sleep(0.3)")  # longer than what acknowledges the end may be delayed
            assert copy.ask("[events for _, events in p.poll(0)]") == [0x2001]
            assert copy.ask("s.recv(20000), s.recv(9)") == (said, b"")
            copy.run("s.send(b'to nobody'); time.sleep(0.1)")
            assert copy.ask("s.connect_ex(s.getsockname())")  # it has got a reset, as it would have


def test_more_connections_than_are_made_at_once(hosts: Hosts) -> None:
    """Of half of them one end is closed, of the others half of it; the ends are far apart."""
    with hosts.child() as child:
        child.run("l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen(200); cs = []; ss = []")
        child.run("for _ in range(150): cs.append(socket.create_connection(l.getsockname()))")
        child.run("for _ in range(150): ss.append(l.accept()[0])")
        child.run("for at, c in enumerate(cs): c.send(b'%d' % at); at % 2 and c.shutdown(1)")
        child.run("for c in cs[::2]: c.close()")
        with Moved(child, context=hosts.context()) as moved:
            (copy,) = moved.restore([child])
            copy.run("ss = [adopt(fd) for fd in range(151, 301)]; time.sleep(0.3)")
            copy.run("for s in ss: s.settimeout(5)")
            assert copy.ask("[(s.recv(9), s.recv(9)) for s in ss]") == [(b"%d" % at, b"") for at in range(150)]


def test_what_has_not_all_come_is_not_left_behind(hosts: Hosts) -> None:
    with hosts.child() as child:
        connect(child)
        child.run("c.setblocking(False); sent = 0; s.settimeout(5)")
        child.run("while sent < 1 << 23:\n try: sent += c.send(bytes(1 << 16))\n except BlockingIOError: break")
        child.run("c.close()")
        assert "fd 2: a connection within this host: its other end was closed, and what" in refusal(child)
        child.run("got = 0\nwhile data := s.recv(1 << 20): got += len(data)")
        assert child.ask("got == sent > 1 << 16")


def test_the_other_end_is_in_another_process(hosts: Hosts) -> None:
    with hosts.child() as child, hosts.child() as other:
        child.run("l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen()")
        other.run(f"c = socket.create_connection({child.ask('l.getsockname()')!r})")
        child.run("s, _ = l.accept(); s.settimeout(5)")
        assert "fd 1: a connection within this host: its other end is open in a process outside" in refusal(child)
        other.run("c.shutdown(1)")
        assert child.ask("s.recv(9)") == b""
        assert "is open in a process outside" in refusal(child)
        (sentence,) = survey([child.process], own_netns=False)
        assert "would stay behind" in sentence
        child.run("s.send(b'still there')")
        assert other.ask("c.recv(99)") == b"still there"


def test_the_other_end_waits_for_data_to_be_accepted(hosts: Hosts) -> None:
    """TCP_DEFER_ACCEPT: for its client it is connected, and nobody has the other end yet."""
    with hosts.child() as child:
        child.run("l = socket.socket(); l.setsockopt(6, 9, 5); l.bind(('127.0.0.1', 0)); l.listen()")
        child.run("c = socket.create_connection(l.getsockname())")
        assert "fd 1: a connection within this host: its other end waits to be accepted" in refusal(child)
        child.run("c.send(b'hello'); s, _ = l.accept()")
        assert child.ask("s.recv(9)") == b"hello"


def test_the_other_end_has_gone_without_a_word(hosts: Hosts) -> None:
    with hosts.child() as child:
        connect(child)
        drop = "add table ip shut; add chain ip shut everything { type filter hook output priority 0; policy drop; }"
        subprocess.run(["ip", "netns", "exec", hosts.src, "nft", drop], check=True)
        child.run("c.setsockopt(1, 13, struct.pack('ii', 1, 0)); c.close()")  # a reset, which is lost
        assert "fd 2: a connection within this host: its other end is nowhere" in refusal(child)


def test_a_connection_of_a_plain_tree_that_has_come_since_it_was_surveyed(hosts: Hosts) -> None:
    with hosts.child() as child:
        for words in ("addr add 10.98.7.1/24 dev lo", "addr add 10.98.7.2/24 dev lo"):
            subprocess.run(["ip", "-n", hosts.src, *words.split()], check=True)
        with entered(f"/run/netns/{hosts.src}"), socket.create_server(("10.98.7.2", 0)) as listener:
            name = listener.getsockname()
            child.run(f"c = socket.create_connection({name!r}, source_address=('10.98.7.1', 0))")
            child.stop()
            dump = DescriptorDump([child.process], ObjHash(), Bytes(), own_netns=False)
            with pytest.raises(CheckpointFailed, match=r"fd 0: a connection that would stay behind"):
                dump.dump()
            child.go_on()


def test_nothing_is_left_of_the_closed_end(hosts: Hosts) -> None:
    with hosts.child() as child:
        connect(child)
        child.run("c.close()")
        with Moved(child, context=hosts.context()) as moved:
            moved.restore([child])
            with entered(f"/run/netns/{hosts.dst}"):
                (there,) = inet_diag.tcp_sockets_here(range(1, inet_diag.LISTEN))
            assert there.state == inet_diag.CLOSE_WAIT
