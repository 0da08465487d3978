"""Connections taken out of one network namespace and put into another, their peer left alone.

src 10.98.0.1 ──┐
                ├── bridge in the peer's namespace, 10.98.0.2
dst 10.98.0.1 ──┘        (one of the two is up at a time; both have the same MAC address)
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from fakestub import Child
from moving import Bytes, Moved, Surroundings, child, hidden, move  # noqa: F401

from migrator.engine.user.descriptors import DescriptorDump, Transients, packet, survey
from migrator.engine.user.descriptors.tcp import state_of
from migrator.errors import CheckpointFailed
from migrator.image.objhash import ObjHash
from migrator.image.records_files import SocketTcp
from migrator.linux.namespaces import CLONE_NEWNET, entered, setns
from migrator.linux.repair import revive

pytestmark = pytest.mark.root

TAG = f"dsc{os.getpid() % 10000}"
V4, V6 = "10.98.0.1", "fd98::1"


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@dataclass
class Net:
    src: str = f"{TAG}s"
    dst: str = f"{TAG}d"
    peer: str = f"{TAG}p"
    shut: list[str] = field(default_factory=list)

    def path(self, name: str) -> str:
        return f"/run/netns/{name}"

    def switch(self) -> None:
        """From here on the address is at the destination, and whatever was shut is open."""
        ip("-n", self.peer, "link", "set", "toa", "down")
        self.mend()
        ip("-n", self.peer, "link", "set", "tob", "up")

    def cut(self) -> None:
        """What either side sends is lost on its way."""
        for name in (self.src, self.peer):
            self._drop(name, "input")

    def close(self) -> None:
        """What the program sends does not even leave its host."""
        for name in (self.src, self.dst):
            self._drop(name, "output")

    def mend(self) -> None:
        for name in self.shut:
            ip("netns", "exec", name, "nft", "delete table inet shut")
        self.shut.clear()

    def _drop(self, name: str, hook: str) -> None:
        chain = f"add chain inet shut everything {{ type filter hook {hook} priority 0; policy drop; }}"
        ip("netns", "exec", name, "nft", f"add table inet shut; {chain}")
        self.shut.append(name)

    def outside(self, family: int = socket.AF_INET) -> socket.socket:
        with entered(self.path(self.peer)):
            made = socket.socket(family)
        made.settimeout(5)
        return made

    def child(self) -> Child:
        def enter() -> None:
            fd = os.open(self.path(self.src), os.O_RDONLY)
            setns(fd, CLONE_NEWNET)
            os.close(fd)

        return Child(before=enter)

    def context(self) -> Surroundings:
        context = Surroundings()
        context.netns = self.path(self.dst)
        return context


@pytest.fixture
def net() -> Iterator[Net]:
    made = Net()
    try:
        for name in (made.src, made.dst, made.peer):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", made.peer, "link", "add", "lan0", "type", "bridge")
        for name, port in ((made.src, "toa"), (made.dst, "tob")):
            ip("-n", made.peer, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", made.peer, "link", "set", port, "master", "lan0")
            ip("-n", name, "link", "set", "eth0", "address", "02:00:00:00:98:01")
            ip("-n", name, "addr", "add", f"{V4}/24", "dev", "eth0")
            ip("-n", name, "addr", "add", f"{V6}/64", "dev", "eth0", "nodad")
            ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", made.peer, "addr", "add", "10.98.0.2/24", "dev", "lan0")
        ip("-n", made.peer, "addr", "add", "fd98::2/64", "dev", "lan0", "nodad")
        ip("-n", made.peer, "link", "set", "lan0", "up")
        ip("-n", made.peer, "link", "set", "toa", "up")
        yield made
    finally:
        for name in (made.src, made.dst, made.peer):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def delivered(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The packets that the restart itself has made."""
    packets: list[bytes] = []
    deliver = packet.Injector.deliver

    def noted(self: packet.Injector, raw: bytes, to: bytes) -> None:
        packets.append(raw)
        deliver(self, raw, to)

    monkeypatch.setattr(packet.Injector, "deliver", noted)
    return packets


def connected(net: Net, server: Child, family: int = socket.AF_INET) -> socket.socket:
    """A connection from outside, accepted by the child: fd 0 listens, fd 1 is the connection."""
    here = V4 if family == socket.AF_INET else V6
    server.run(f"l = socket.socket({int(family)}); l.setsockopt(1, 2, 1); l.bind(({here!r}, 5000)); l.listen(7)")
    client = net.outside(family)
    client.connect((here, 5000))
    server.run("c, _ = l.accept()")
    return client


def receive(sock: socket.socket, count: int) -> bytes:
    out = b""
    while len(out) < count:
        part = sock.recv(count - len(out))
        if not part:
            break
        out += part
    return out


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_connection_moves_with_unread_and_unacknowledged_bytes(net: Net, family: int) -> None:
    with net.child() as server:
        client = connected(net, server, family)
        client.sendall(b"unread" * 10000)
        client.sendall(b".")
        time.sleep(0.05)
        net.cut()
        server.run("c.setblocking(False); c.send(b'never sent' * 3); sent = c.send(os.urandom(300000))")
        client.settimeout(0.01)
        client.send(b"lost on its way")
        client.settimeout(10)
        with Moved(server, context=net.context()) as moved:
            (state,) = moved.saved.of(SocketTcp)
            assert len(state.received) == 60001 and state.unsent > 0 and len(state.sent) > state.unsent
            (copy,) = moved.restore([server])
            net.switch()
            moved.dump.release()
            server.end()
            copy.run("l, c = adopt(0), adopt(1); c.settimeout(10)")
            assert copy.ask("receive(c, 60016)") == b"unread" * 10000 + b"." + b"lost on its way"
            assert receive(client, 30) == b"never sent" * 3
            assert receive(client, len(state.sent) - 30) == state.sent[30:]
            client.sendall(b"ping")
            assert copy.ask("c.recv(4)") == b"ping"
            copy.run("c.sendall(b'pong')")
            assert receive(client, 4) == b"pong"
            copy.run("c.close()")
            assert client.recv(1) == b""


def test_a_listener_accepts_at_its_new_place(net: Net) -> None:
    with net.child() as server:
        connected(net, server).close()
        net.cut()
        with Moved(server, context=net.context()) as moved:
            net.switch()
            (copy,) = moved.restore([server])
            with net.outside() as second:
                second.connect((V4, 5000))
                assert copy.ask("adopt(0).accept()[0].send(b'hello')") == 5
                assert second.recv(9) == b"hello"


def test_giving_up_leaves_the_connection_as_it_was(net: Net) -> None:
    with net.child() as server:
        client = connected(net, server)
        client.sendall(b"before")
        time.sleep(0.05)
        with Moved(server):
            pass
        assert server.pid
        server.go_on()
        client.sendall(b" and after")
        server.run("c.settimeout(5)")
        assert server.ask("c.recv(16, socket.MSG_WAITALL)") == b"before and after"
        server.run("c.send(b'answer')")
        assert receive(client, 6) == b"answer"
        assert server.ask("[s.getsockopt(1, 2) for s in (l, c)]") == [1, 1]


def test_a_saved_connection_is_alive_at_once_whoever_dies(net: Net) -> None:
    with net.child() as server:
        client = connected(net, server)
        server.run("c.setsockopt(1, 2, 0)")
        with Moved(server):
            server.go_on()
            client.sendall(b"ping")
            assert server.ask("c.recv(4), c.send(b'pong')") == (b"ping", 4)
            assert server.ask("l.getsockopt(1, 2), c.getsockopt(1, 2)") == (1, 0)
            assert receive(client, 4) == b"pong"


def test_a_released_connection_ends_without_a_word(net: Net) -> None:
    with net.child() as server:
        client = connected(net, server)
        with Moved(server) as moved:
            moved.dump.release()
            server.end()
        time.sleep(0.05)
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(1)


def test_nothing_is_lost_with_an_agent_that_dies_before_the_copy_runs(net: Net) -> None:
    with net.child() as server:
        client = connected(net, server)
        client.sendall(b"unread")
        time.sleep(0.05)
        net.cut()
        server.run("c.setblocking(False); c.send(b'first'); sent = c.send(os.urandom(400000))")
        with Moved(server, context=net.context()) as moved:
            (state,) = moved.saved.of(SocketTcp)
            assert state.unsent > 0
            (copy,) = moved.restore([server], dies=True)
            net.switch()
            assert revive([copy.pid]) == 1
            assert receive(client, len(state.sent)) == state.sent
            copy.run("l, c = adopt(0), adopt(1); c.settimeout(10)")
            assert copy.ask("c.recv(6), c.getsockopt(1, 2)") == (b"unread", 1)
            client.sendall(b"ping")
            assert copy.ask("c.recv(4)") == b"ping"
            assert revive([copy.pid]) == 0


def test_the_end_that_was_said_is_not_lost_either(net: Net) -> None:
    with net.child() as server:
        client = connected(net, server)
        net.cut()
        server.run("c.send(b'bye'); c.shutdown(1)")
        with Moved(server, context=net.context()) as moved:
            (copy,) = moved.restore([server], dies=True)
            net.switch()
            revive([copy.pid])
            assert receive(client, 99) == b"bye"
            client.sendall(b"heard")
            copy.run("c = adopt(1); c.settimeout(5)")
            assert copy.ask("c.recv(99)") == b"heard"


def test_a_copy_that_is_thrown_away_says_nothing(net: Net) -> None:
    with net.child() as server:
        client = connected(net, server)
        net.cut()
        server.run("c.setblocking(False); c.send(b'first'); sent = c.send(os.urandom(400000))")
        with Moved(server, context=net.context()) as moved:
            (copy,) = moved.restore([server], dies=True)
            net.switch()
            copy.end()
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.recv(1)


def test_options_of_a_connection_are_kept(net: Net) -> None:
    options = [(1, 9), (1, 13), (1, 2), (6, 1), (6, 4), (6, 5), (6, 6), (6, 18), (0, 1), (1, 12)]
    with net.child() as server:
        client = connected(net, server)
        for (level, name), value in zip(options, (1, 0, 1, 1, 100, 20, 3, 9000, 16, 4), strict=True):
            if name != 13:
                server.run(f"c.setsockopt({level}, {name}, {value})")
        server.run("c.setsockopt(1, 13, struct.pack('ii', 1, 5)); c.setsockopt(6, 13, b'reno')")
        read = f"[c.getsockopt(l, n, 8) for l, n in {options!r}], c.getsockopt(6, 13, 4), c.getsockopt(1, 72)"
        before = server.ask(read)
        net.cut()
        with Moved(server, context=net.context()) as moved:
            (copy,) = moved.restore([server])
            net.switch()
            copy.run("c = adopt(1)")
            assert copy.ask(read) == before
            assert copy.ask("c.getsockname(), c.getpeername()") == ((V4, 5000), client.getsockname())
            assert copy.ask("c.getsockopt(0, 19)") == 0


def test_the_peers_end_was_closed_already(net: Net) -> None:
    with net.child() as server:
        client = connected(net, server)
        client.sendall(b"last words")
        client.shutdown(socket.SHUT_WR)
        time.sleep(0.05)
        net.cut()
        with Moved(server, context=net.context()) as moved:
            (copy,) = moved.restore([server])
            net.switch()
            copy.run("c = adopt(1)")
            assert copy.ask("c.recv(99), c.recv(99)") == (b"last words", b"")
            copy.run("c.sendall(b'reply'); c.close()")
            assert receive(client, 99) == b"reply"


def test_our_end_was_closed_and_acknowledged_already(net: Net) -> None:
    with net.child() as server:
        client = connected(net, server)
        server.run("c.send(b'done'); c.shutdown(1)")
        assert receive(client, 99) == b"done"
        time.sleep(0.05)
        net.cut()
        with Moved(server, context=net.context()) as moved:
            (copy,) = moved.restore([server])
            net.switch()
            copy.run("c = adopt(1); c.settimeout(5)")
            client.sendall(b"still talking")
            assert copy.ask("c.recv(99)") == b"still talking"
            client.close()
            assert copy.ask("c.recv(99)") == b""


def test_our_end_was_closed_and_the_peer_does_not_know_yet(net: Net) -> None:
    with net.child() as server:
        client = connected(net, server)
        net.cut()
        server.run("c.send(b'bye'); c.shutdown(1)")
        with Moved(server, context=net.context()) as moved:
            (copy,) = moved.restore([server])
            net.switch()
            assert receive(client, 99) == b"bye"
            client.sendall(b"heard")
            copy.run("c = adopt(1); c.settimeout(5)")
            assert copy.ask("c.recv(99)") == b"heard"


def test_what_was_lost_on_its_way_is_sent_again_at_once(net: Net, delivered: list[bytes]) -> None:
    with net.child() as server:
        client = connected(net, server)
        net.cut()
        server.run("c.send(b'lost')")
        with Moved(server, context=net.context()) as moved:
            net.switch()
            moved.restore([server])
            client.settimeout(10)
            assert receive(client, 4) == b"lost"
            # ahead of the kernel's own first retransmission, a second after the restart
            assert any(raw.endswith(b"lost") for raw in delivered)


@pytest.mark.parametrize("shut", [Net.cut, Net.close])
def test_what_the_copy_says_into_a_shut_network_is_said_again_when_it_opens(
    net: Net, shut: Callable[[Net], None], delivered: list[bytes]
) -> None:
    with net.child() as server:
        client = connected(net, server)
        shut(net)
        server.run("c.setblocking(False); c.send(b'first'); sent = c.send(os.urandom(400000)); c.shutdown(1)")
        with Moved(server, context=net.context()) as moved:
            (state,) = moved.saved.of(SocketTcp)
            assert (state.unsent == len(state.sent)) is (shut is Net.close)
            (copy,) = moved.restore([server], built=net.switch)
            copy.run("import fcntl; c = adopt(1)")
            if shut is Net.cut:
                assert delivered
            else:  # at once, not when a timer of the kernel's ends
                waiting = copy.ask("int.from_bytes(fcntl.ioctl(c, 0x894B, bytes(4)), 'little')")
                assert waiting < state.unsent and not delivered
            client.settimeout(10)
            assert receive(client, len(state.sent)) == state.sent
            assert client.recv(1) == b""


def test_connections_that_have_ended_still_say_how(net: Net) -> None:
    with net.child() as server:
        client = connected(net, server)
        client.sendall(b"abrupt")
        time.sleep(0.02)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        second = net.outside()
        second.connect((V4, 5000))
        server.run("d, _ = l.accept(); d.shutdown(1)")
        second.close()
        time.sleep(0.05)
        net.cut()
        with Moved(server, context=net.context()) as moved:
            (copy,) = moved.restore([server])
            net.switch()
            copy.run("c, d = adopt(1), adopt(2)")
            assert copy.ask("d.recv(9)") == b""
            with pytest.raises(AssertionError, match="ConnectionResetError"):
                copy.run("c.recv(9); c.recv(9)")


def test_urgent_data_that_waits_is_refused_and_stays_what_it_is(net: Net) -> None:
    with net.child() as server:
        client = connected(net, server)
        client.sendall(b"before")
        client.send(b"!", socket.MSG_OOB)
        server.run("import select; assert select.select([], [], [c], 20)[2]")
        net.cut()
        with pytest.raises(CheckpointFailed, match="urgent data"), Moved(server, context=net.context()):
            pass
        server.go_on()
        assert server.ask("c.recv(9), c.recv(1, socket.MSG_OOB)") == (b"before", b"!")


def test_udp_sockets_keep_their_addresses_and_datagrams(net: Net) -> None:
    with net.child() as server:
        server.run(
            f"u = socket.socket(2, 2); u.bind(('0.0.0.0', 6000)); v = socket.socket(2, 2); v.bind(({V4!r}, 6001))"
        )
        server.run("v.connect(('10.98.0.2', 7000))")
        with entered(net.path(net.peer)):
            client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        client.bind(("10.98.0.2", 7000))
        client.settimeout(5)
        for data in (b"one", b"", b"three"):
            client.sendto(data, (V4, 6000))
        client.sendto(b"for the other", (V4, 6001))
        time.sleep(0.05)
        net.cut()
        with Moved(server, context=net.context()) as moved:
            net.switch()
            (copy,) = moved.restore([server])
            copy.run("u, v = adopt(0), adopt(1); u.settimeout(5); v.settimeout(5)")
            sender = ("10.98.0.2", 7000)
            assert copy.ask("[u.recvfrom(9) for _ in range(3)]") == [
                (b"one", sender),
                (b"", sender),
                (b"three", sender),
            ]
            assert copy.ask("v.recv(99)") == b"for the other"
            copy.run("v.send(b'answer')")
            assert client.recvfrom(99) == (b"answer", (V4, 6001))


def packets(server: Child) -> int:
    """Packets that the network of a server has handed up so far (Ip: InDelivers)."""
    names, values = (line.split() for line in server.ask("open('/proc/net/snmp').read()").split("\n")[:2])
    return int(values[names.index("InDelivers")])


@pytest.mark.parametrize("address", ["0.0.0.0", V4])
def test_datagrams_stay_with_the_one_of_several_sockets_of_one_address_that_got_them(net: Net, address: str) -> None:
    with net.child() as server:
        server.run("import select; us = [socket.socket(2, 2) for _ in range(4)]")
        server.run(f"for u in us: u.setsockopt(1, 15, 1); u.bind(({address!r}, 6000))")
        before, deadline = packets(server), time.monotonic() + 20
        with entered(net.path(net.peer)):
            for number in range(40):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                    client.sendto(b"%d" % number, (V4, 6000))
        while packets(server) < before + 40:  # the first wait for the answer to an ARP request
            assert time.monotonic() < deadline
            time.sleep(0.01)
        told = "[[u.recv(9, {}) for _ in range(40) if select.select([u], [], [], 0)[0]] for u in {}]"
        net.cut()
        with Moved(server, context=net.context()) as moved:
            net.switch()
            (copy,) = moved.restore([server])
            copy.run("import select; copies = [adopt(n) for n in range(4)]")
            got = copy.ask(told.format(0, "copies"))
        server.go_on()
        assert got == server.ask(told.format(0, "us"))
        assert len([one for one in got if one]) > 1 and sum(map(len, got)) == 40


# Asks for all links (RTM_GETLINK, NLM_F_DUMP), and how many messages of which kind come.
ASK_LINKS = """
def links(sock):
    sock.send(struct.pack('<IHHIIBxHiII', 32, 18, 0x301, 7, 0, 0, 0, 0, 0, 0))
    kinds = []
    while 3 not in kinds:
        data = sock.recv(1 << 16)
        while data:
            length, kind = struct.unpack_from('<IH', data)
            kinds.append(kind)
            data = data[length + 3 & ~3:]
    return kinds.count(16)
"""


def test_netlink_sockets_ask_and_hear_as_before(net: Net) -> None:
    with net.child() as server:
        server.run("import struct" + ASK_LINKS + "n = socket.socket(16, 3, 0); n.bind((0, 0x10)); n.settimeout(5)")
        server.run("n.setsockopt(270, 1, 33); n.setsockopt(270, 11, 1)")  # a group beyond 32; extended answers
        assert server.ask("links(n)") >= 2
        name, groups = server.ask("n.getsockname()"), server.ask("n.getsockopt(270, 9, 8)")
        (sentence,) = survey([server.process], own_netns=False)
        assert "a netlink socket of this host's network" in sentence and "migrator run" in sentence
        assert list(survey([server.process], own_netns=True)) == []
        with Moved(server, context=net.context()) as moved:
            (copy,) = moved.restore([server])
            copy.run("import struct" + ASK_LINKS + "n = adopt(0); n.settimeout(5)")
            assert (copy.ask("n.getsockname()"), copy.ask("n.getsockopt(270, 9, 8)")) == (name, groups)
            assert copy.ask("n.getsockopt(270, 11)") == 1
            assert copy.ask("links(n)") >= 2
            ip("-n", net.dst, "addr", "add", "10.98.7.7/32", "dev", "lo")
            assert copy.ask("struct.unpack_from('<IH', n.recv(999))[1]") == 20  # RTM_NEWADDR


def test_a_socket_to_the_audit_of_this_host_is_refused(net: Net) -> None:
    with net.child() as server:
        server.run("n = socket.socket(16, 3, 9)")
        (sentence,) = survey([server.process], own_netns=False)
        assert "a netlink socket" in sentence and "migrator run" in sentence
        server.stop()
        with pytest.raises(CheckpointFailed, match="fd 0: a netlink socket of this host's audit"):
            DescriptorDump([server.process], ObjHash(), Bytes()).dump()


def test_what_the_kernel_told_a_netlink_socket_waits_for_its_program(net: Net) -> None:
    with net.child() as server:
        server.run("n = socket.socket(16, 3, 0); n.bind((0, 0x10))")
        with Transients([server.process]) as transients:
            assert transients.settle(0.01)
            ip("-n", net.src, "addr", "add", "10.98.7.7/32", "dev", "lo")
            assert not transients.settle(0.01)
            assert "netlink" in transients.waiting() and "fd 0" in transients.waiting()
            server.run("n.recv(9999)")
            assert transients.settle(5)


def test_both_ends_in_the_tree_over_loopback(net: Net) -> None:
    with net.child() as server:
        server.run("l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen(); c = socket.socket()")
        server.run("c.connect(l.getsockname()); s, _ = l.accept(); c.send(b'there'); s.send(b'back' * 5000)")
        time.sleep(0.02)
        with Moved(server, context=net.context()) as moved:
            (copy,) = moved.restore([server])
            copy.run("l, c, s = adopt(0), adopt(1), adopt(2)")
            assert copy.ask("s.recv(9), c.recv(20000, socket.MSG_WAITALL)") == (b"there", b"back" * 5000)
            copy.run("c.send(b'more')")
            assert copy.ask("s.recv(9)") == b"more"
            copy.run("s.close()")
            assert copy.ask("c.recv(9)") == b""


def test_a_connection_that_waits_to_be_accepted_is_not_lost(net: Net) -> None:
    with net.child() as server:
        client = connected(net, server)
        second = net.outside()
        second.connect((V4, 5000))
        second.sendall(b"me too")
        server.stop()
        dump = DescriptorDump([server.process], ObjHash(), Bytes())
        with pytest.raises(CheckpointFailed, match=r"1 connections to 10\.98\.0\.1:5000 wait"):
            dump.dump()
        server.go_on()
        assert server.ask("l.accept()[0].recv(9)") == b"me too"
        client.close()


def test_listeners_tell_whether_connections_wait(net: Net) -> None:
    with net.child() as server:
        client = connected(net, server)
        with Transients([server.process]) as listeners:
            assert listeners.waiting() == "" and listeners.settle(0)
            second = net.outside()
            second.connect((V4, 5000))
            assert "waits to be accepted" in listeners.waiting() and not listeners.settle(0.001)
            server.run("l.accept()")
            assert listeners.settle(0)
        client.close()


def test_a_connection_cannot_leave_an_address_that_stays(net: Net) -> None:
    with net.child() as server:
        client = connected(net, server)
        (sentence,) = survey([server.process], own_netns=False)
        assert sentence.startswith(f"pid {server.pid} (") and "fd 1" in sentence and "10.98.0.1:5000" in sentence
        assert "migrator run" in sentence
        assert survey([server.process], own_netns=True) == []
        assert state_of(client) == 1


def test_a_connection_that_is_being_made_is_made_anew(net: Net) -> None:
    with net.outside() as listener:
        listener.bind(("10.98.0.2", 8000))
        listener.listen()
        with net.child() as program:
            net.cut()
            program.run("c = socket.socket(); c.setblocking(False); c.connect_ex(('10.98.0.2', 8000))")
            with Moved(program, context=net.context()) as moved:
                net.switch()
                (copy,) = moved.restore([program])
                accepted, _ = listener.accept()
                accepted.sendall(b"at last")
                copy.run("c = adopt(0); c.setblocking(True)")
                assert copy.ask("c.recv(9)") == b"at last"


def test_a_connection_is_made_also_if_the_agent_dies_before_the_copy_runs(net: Net) -> None:
    with net.outside() as listener:
        listener.bind(("10.98.0.2", 8000))
        listener.listen()
        with net.child() as program:
            net.cut()
            program.run("c = socket.socket(); c.setblocking(False); c.connect_ex(('10.98.0.2', 8000))")
            with Moved(program, context=net.context()) as moved:
                (copy,) = moved.restore([program], dies=True)
                net.switch()
                accepted, _ = listener.accept()
                accepted.sendall(b"at last")
                copy.run("c = adopt(0); c.settimeout(5)")
                assert copy.ask("c.recv(9)") == b"at last"
