"""Which TCP segments a container's port lets pass, and which of them are taken aside.

Two small programs for the kernel (`migrator.linux.bpf`). One stops segments that begin a connection; the other
knows a set of connections, and stops, or lets a packet socket take, what belongs to them.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass

from migrator.linux.bpf import (
    KEEP_ALL,
    KEEP_NONE,
    SCHED_CLS,
    SOCKET_FILTER,
    TCX_DROP,
    TCX_NEXT,
    Assembly,
    KeySet,
    Program,
)

MOST = 4096  # connections in one set
KEY = struct.Struct("=9I")

_ETHERNET = 14
_IPV4, _IPV6, _TCP = 0x0800, 0x86DD, 6
_SYN, _RST, _ACK = 0x02, 0x04, 0x10
_FLAGS = 13  # offset in a TCP header
_KEY_AT = -40


@dataclass(frozen=True, slots=True)
class Connection:
    """A TCP connection as its container sees it. Addresses as text, IPv4 or IPv6; the keys raise ValueError for
    text that is no address."""

    local: str
    local_port: int
    peer: str
    peer_port: int

    @property
    def inbound(self) -> bytes:
        """The key of segments that come from the peer."""
        return _key(self.peer, self.peer_port, self.local, self.local_port)

    @property
    def outbound(self) -> bytes:
        """The key of segments that go to the peer."""
        return _key(self.local, self.local_port, self.peer, self.peer_port)


def _words(address: str) -> tuple[int, ...]:
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv4Address):
        return int(parsed), 0, 0, 0
    return struct.unpack("!4I", parsed.packed)


def _key(source: str, source_port: int, target: str, target_port: int) -> bytes:
    return KEY.pack(*_words(source), *_words(target), source_port << 16 | target_port)


def dropping_beginnings() -> Program:
    """Drops segments with SYN and without ACK; for an egress of a device. All else passes."""
    return Program(_beginning(b"", TCX_DROP, TCX_NEXT), SCHED_CLS)


def taking_beginnings(mac: bytes) -> Program:
    """Lets a packet socket take segments to `mac` with SYN and without ACK, and nothing else."""
    return Program(_beginning(mac, KEEP_ALL, KEEP_NONE), SOCKET_FILTER)


def missing() -> str:
    """Why this kernel cannot run these programs; "" if it can, as a try has shown."""
    try:
        with dropping_beginnings(), connection_set() as connections, taking(connections):
            return ""
    except OSError as error:
        return f"bpf(2) does not work here ({error.strerror}): CONFIG_BPF_SYSCALL and CAP_BPF are needed"


def dropping(connections: KeySet) -> Program:
    """Drops segments of `connections`; for an egress of a device. All else passes."""
    return Program(_belonging(connections, TCX_DROP, TCX_NEXT), SCHED_CLS)


def taking(connections: KeySet) -> Program:
    """Lets a packet socket take segments of `connections`, and nothing else."""
    return Program(_belonging(connections, KEEP_ALL, KEEP_NONE), SOCKET_FILTER)


def connection_set() -> KeySet:
    """Keys are `Connection.inbound` or `.outbound`."""
    return KeySet(KEY.size, MOST)


def _beginning(mac: bytes, yes: int, no: int) -> bytes:
    a = Assembly()
    a.copy(6, 1)
    if mac:
        high, middle, low = struct.unpack("!HHH", mac)
        for at, part in ((0, high), (2, middle), (4, low)):
            a.load(2, at)
            a.jump_unless_equal(0, part, "other")
    _find_tcp(a, remember=False)
    a.load_from(1, 7, _FLAGS)
    a.mask(0, _SYN | _RST | _ACK)
    a.jump_unless_equal(0, _SYN, "other")
    a.end(yes)
    a.label("other")
    a.end(no)
    return a.code()


def _belonging(connections: KeySet, yes: int, no: int) -> bytes:
    a = Assembly()
    a.copy(6, 1)
    _find_tcp(a, remember=True)
    a.load_from(4, 7, 0)
    a.store_word(_KEY_AT + 32, 0)
    a.look_up(connections, _KEY_AT)
    a.jump_if_equal(0, 0, "other")
    a.end(yes)
    a.label("other")
    a.end(no)
    return a.code()


def _find_tcp(a: Assembly, *, remember: bool) -> None:
    """Register 7 becomes the offset of the TCP header; what has none goes to "other". `remember`: the addresses
    are put where a key is built."""
    if remember:
        a.set(0, 0)
        for word in range(8):
            a.store_word(_KEY_AT + 4 * word, 0)
    a.load(2, 12)
    a.jump_if_equal(0, _IPV4, "ipv4")
    a.jump_unless_equal(0, _IPV6, "other")
    a.load(1, _ETHERNET + 6)
    a.jump_unless_equal(0, _TCP, "other")
    if remember:
        for word in range(8):
            a.load(4, _ETHERNET + 8 + 4 * word)
            a.store_word(_KEY_AT + 4 * word, 0)
    a.set(7, _ETHERNET + 40)
    a.jump("tcp")
    a.label("ipv4")
    a.load(1, _ETHERNET + 9)
    a.jump_unless_equal(0, _TCP, "other")
    a.load(2, _ETHERNET + 6)
    a.jump_if_any(0, 0x1FFF, "other")  # a later fragment has no TCP header
    if remember:
        a.load(4, _ETHERNET + 12)
        a.store_word(_KEY_AT, 0)
        a.load(4, _ETHERNET + 16)
        a.store_word(_KEY_AT + 16, 0)
    a.load(1, _ETHERNET)
    a.mask(0, 0x0F)
    a.shift_left(0, 2)
    a.copy(7, 0)
    a.add(7, _ETHERNET)
    a.label("tcp")
