"""Options of sockets: read against those of a new socket, and set again where they differ."""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial

from migrator.errors import CheckpointFailed
from migrator.image.records_files import SocketOption
from migrator.linux.sockets import Answers, Ask

SOL_SOCKET, SOL_IP, SOL_TCP, SOL_UDP, SOL_IPV6, SOL_NETLINK = 1, 0, 6, 17, 41, 270
NETLINK_ADD_MEMBERSHIP = 1
SO_REUSEPORT = 15
SO_REUSEADDR, SO_SNDBUF, SO_RCVBUF, SO_LINGER, SO_PASSCRED, SO_PEERCRED = 2, 7, 8, 13, 16, 17
SO_RCVTIMEO, SO_SNDTIMEO, SO_BINDTODEVICE, SO_GET_FILTER, SO_ACCEPTCONN = 20, 21, 25, 26, 30
SO_SNDBUFFORCE, SO_RCVBUFFORCE, SO_PEEK_OFF, SO_BINDTOIFINDEX, SO_BUF_LOCK = 32, 33, 42, 62, 72
IP_FREEBIND, IP_TRANSPARENT, IPV6_V6ONLY, IPV6_TRANSPARENT, IPV6_FREEBIND = 15, 19, 26, 75, 78
TCP_CONGESTION, TCP_ULP, _TCP_AO_INFO = 13, 31, 40
_SO_TIMESTAMPING, _SO_MAX_PACING_RATE, _SO_INCOMING_CPU, _SO_TXTIME, _SO_TIMESTAMPING_NEW = 37, 47, 49, 61, 65
_IP_OPTIONS, _IP_UNICAST_IF = 4, 50
_IPV6_MULTICAST_IF, _IPV6_EXTENSIONS, _IPV6_UNICAST_IF = 17, (54, 55, 57, 59), 76
_SOF_TIMESTAMPING_OPT_ID, _LOOPBACK = 1 << 7, 1
_SO_ATTACH_REUSEPORT_CBPF, _SO_DETACH_REUSEPORT_BPF, _BPF_RET = 51, 68, 0x06

PRIORITY, _TOS = (SOL_SOCKET, 12), (SOL_IP, 1)

_AT_ONCE = 256  # sockets that are asked for all their options in one go
_LINGER, _TIMEVAL = struct.Struct("<ii"), struct.Struct("<qq")
_UCRED, _IDS, _IDS_AS_VALUE, _NOBODY = struct.Struct("<iII"), struct.Struct("<II"), struct.Struct("<q"), 0xFFFFFFFF
_WORD = struct.Struct("<q")
_STRUCTS = {SO_LINGER: _LINGER, SO_RCVTIMEO: _TIMEVAL, SO_SNDTIMEO: _TIMEVAL} | dict.fromkeys(
    (_SO_TIMESTAMPING, _SO_MAX_PACING_RATE, _SO_TXTIME, _SO_TIMESTAMPING_NEW), _WORD
)

Default = tuple[int, int, int, bool]  # level, name, value of a new socket's, whether it is a struct

# Numbers of linux/socket.h, in.h, in6.h, tcp.h and udp.h, where a program sets them and reads them back: all that there
# are, but for what is told otherwise. tests/engines/test_socket_options.py sets whatever can be set.
_GENERIC = (
    *(1, 2, 5, 6, 9, 10, 11, 12, 13, 15, 18, 20, 21, 29, 35, 36, 37),  # DEBUG, REUSEADDR .. MARK, TIMESTAMPING
    *(16, 34, 76),  # PASSCRED, PASSSEC, PASSPIDFD: Linux 6.12 takes them of any socket
    *(40, 41, 43, 44, 45, 46, 47, 49),  # RXQ_OVFL, WIFI_STATUS .. BUSY_POLL, MAX_PACING_RATE, INCOMING_CPU
    *(60, 61, 63, 64, 65, 69, 73, 74, 75, 82),  # ZEROCOPY, TXTIME .. RESERVE_MEM .. RCVMARK, RCVPRIORITY
)
_UNIX = (42, 83, 84)  # PEEK_OFF, PASSRIGHTS, INQ
_DATAGRAM = (42,)  # PEEK_OFF
_IP = (
    *(1, 2, 4, 6, 7, 8, 10, 11, 12, 13, 15, 18, 19, 20, 21),  # TOS, TTL, OPTIONS, RECVOPTS .. TRANSPARENT .. MINTTL
    *(23, 24, 25, 26, 34, 49, 50, 51),  # CHECKSUM .. MULTICAST_LOOP, MULTICAST_ALL, UNICAST_IF, LOCAL_PORT_RANGE
)
_IP_DATAGRAM = (32, 33)  # MULTICAST_IF, MULTICAST_TTL
_IPV6 = (
    *(2, 3, 4, 5, 8, 11, 16, 19, 23, 25, 26, 29, 30, 31, 33),  # 2292PKTINFO .. FLOWINFO .. V6ONLY .. FLOWINFO_SEND
    *(49, 51, 53, 54, 55, 56, 57, 58, 59, 60, 62, 66, 67),  # RECVPKTINFO .. DONTFRAG, RECVTCLASS, TCLASS
    *(70, 72, 73, 74, 75, 76, 77, 78),  # AUTOFLOWLABEL, ADDR_PREFERENCES .. UNICAST_IF, RECVFRAGSIZE, FREEBIND
)
_IPV6_DATAGRAM = (17, 18)  # MULTICAST_IF, MULTICAST_HOPS
_TCP = (1, 3, 4, 5, 6, 7, 8, 16, 18, 25, 34, 36, 37, 44, 45, 46)  # NODELAY, CORK, KEEP* .. TX_DELAY, DELACK_MAX_US
_TCP_UNCONNECTED = (2, 9, 10, 23, 27, 30)  # MAXSEG, DEFER_ACCEPT, WINDOW_CLAMP, FASTOPEN*, SAVE_SYN
# Not of a connection: what only a new socket takes, and what the kernel writes with each packet.
_ONLY_NEW = {*((SOL_TCP, name) for name in _TCP_UNCONNECTED), (SOL_SOCKET, _SO_INCOMING_CPU)}
_UDP = (1, 100, 101, 102, 103, 104)  # CORK, ENCAP, NO_CHECK6_*, SEGMENT, GRO
_NETLINK = (
    3,
    4,
    5,
    8,
    10,
    11,
    12,
)  # PKTINFO, BROADCAST_ERROR, NO_ENOBUFS, LISTEN_ALL_NSID, CAP_ACK, EXT_ACK, STRICT_CHK

_ALLOWED = {
    (level, name)
    for level, names in (
        (SOL_SOCKET, _GENERIC + _UNIX + _DATAGRAM),
        (SOL_IP, _IP + _IP_DATAGRAM),
        (SOL_IPV6, _IPV6 + _IPV6_DATAGRAM),
        (SOL_TCP, _TCP + _TCP_UNCONNECTED),
        (SOL_UDP, _UDP),
        (SOL_NETLINK, (NETLINK_ADD_MEMBERSHIP, *_NETLINK)),
    )
    for name in names
}


def _candidates(family: int, kind: int) -> Iterable[tuple[int, int]]:
    datagram = kind == socket.SOCK_DGRAM
    names: list[tuple[int, tuple[int, ...]]] = [(SOL_SOCKET, _GENERIC)]
    if family == socket.AF_UNIX:
        names.append((SOL_SOCKET, _UNIX))
    elif family == socket.AF_NETLINK:
        names += [(SOL_SOCKET, _UNIX), (SOL_NETLINK, _NETLINK)]
    else:
        names.append((SOL_IP, _IP))
        if family == socket.AF_INET6:
            names.append((SOL_IPV6, _IPV6))
        if datagram:
            names += [(SOL_SOCKET, _DATAGRAM), (SOL_IP, _IP_DATAGRAM), (SOL_UDP, _UDP)]
            if family == socket.AF_INET6:
                names.append((SOL_IPV6, _IPV6_DATAGRAM))
        else:
            names += [(SOL_TCP, _TCP), (SOL_TCP, _TCP_UNCONNECTED)]
    for level, group in names:
        for name in group:
            yield level, name


def get(sock: socket.SocketType, level: int, name: int) -> int:
    """One option as a number: linger as onoff | seconds << 32, timeouts in µs."""
    if level == SOL_SOCKET and name in _STRUCTS:
        return number(name, sock.getsockopt(level, name, _STRUCTS[name].size))
    return sock.getsockopt(level, name)


def size_of(name: int) -> int:
    """Bytes of an option of SOL_SOCKET that is a struct."""
    return _STRUCTS[name].size


def number(name: int, raw: bytes) -> int:
    """Such an option as a number."""
    form = _STRUCTS[name]
    if form is _WORD:
        return int(form.unpack(raw)[0])
    high, low = form.unpack(raw)
    return int(high | low << 32) if form is _LINGER else int(high * 10**6 + low)


def put(sock: socket.SocketType, option: SocketOption) -> None:
    """Set one option. Raises OSError naming it; ValueError for one that no source saves."""
    level, name, value = option.level, option.name, option.value
    if (level, name) not in _ALLOWED:
        raise ValueError(f"unknown socket option {name} of level {level}")
    try:
        if level == SOL_SOCKET and name in _STRUCTS:
            form = _STRUCTS[name]
            pair = (value & 0xFFFFFFFF, value >> 32) if form is _LINGER else divmod(value, 10**6)
            sock.setsockopt(level, name, form.pack(value) if form is _WORD else form.pack(*pair))
        else:
            sock.setsockopt(level, name, struct.pack("<i", value))
    except (OSError, struct.error) as error:
        number = error.errno if isinstance(error, OSError) else 0
        raise OSError(number or 22, f"socket option {name} of level {level}: {error}") from error


def prefer(sock: socket.SocketType, index: int | None) -> None:
    """Of the sockets that share an address by SO_REUSEPORT, have the one that was bound as number `index` get what
    comes; None: as the kernel distributes it by itself."""
    if index is None:
        sock.setsockopt(SOL_SOCKET, _SO_DETACH_REUSEPORT_BPF, 0)
        return
    program = ctypes.create_string_buffer(struct.pack("=HBBI", _BPF_RET, 0, 0, index), 8)
    sock.setsockopt(SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, struct.pack("@HP", 1, ctypes.addressof(program)))


def peer_user(sock: socket.SocketType) -> list[SocketOption]:
    """Who SO_PEERCRED of a unix socket names, as an option; none if nobody, or root."""
    _, uid, gid = _UCRED.unpack(sock.getsockopt(SOL_SOCKET, SO_PEERCRED, _UCRED.size))
    if uid == _NOBODY or not (uid or gid):
        return []
    return [SocketOption(SOL_SOCKET, SO_PEERCRED, *_IDS_AS_VALUE.unpack(_IDS.pack(uid, gid)))]


def has_peer(sock: socket.SocketType) -> bool:
    """Whether SO_PEERCRED of a unix socket names anybody."""
    return bool(_UCRED.unpack(sock.getsockopt(SOL_SOCKET, SO_PEERCRED, _UCRED.size))[1] != _NOBODY)


def split_peer_user(options: Iterable[SocketOption]) -> tuple[tuple[int, int], list[SocketOption]]:
    """((uid, gid) that peer_user() found, the options that can be set)."""
    ids, rest = (0, 0), []
    for option in options:
        if (option.level, option.name) == (SOL_SOCKET, SO_PEERCRED):
            ids = _IDS.unpack(_IDS_AS_VALUE.pack(option.value))
        else:
            rest.append(option)
    return ids, rest


def uncarried(option: SocketOption) -> str:
    """Why an option that differs from a new socket's cannot be carried, as the end of a sentence; "" if it can."""
    level, name, value = option.level, option.name, option.value
    if (level, name) == (SOL_IP, _IP_OPTIONS) or (level == SOL_IPV6 and name in _IPV6_EXTENSIONS):
        return "a socket with options of IP of its own (IP_OPTIONS, IPV6_HOPOPTS and others) cannot be carried"
    if (level, name) in ((SOL_IP, _IP_UNICAST_IF), (SOL_IPV6, _IPV6_UNICAST_IF), (SOL_IPV6, _IPV6_MULTICAST_IF)):
        index = value if name == _IPV6_MULTICAST_IF else socket.ntohl(value & 0xFFFFFFFF)
        if index != _LOOPBACK:
            return f"a socket that sends through the interface of number {index}, which may be another one over there"
    if level == SOL_SOCKET and name in (_SO_TIMESTAMPING, _SO_TIMESTAMPING_NEW) and value & _SOF_TIMESTAMPING_OPT_ID:
        return "a socket that numbers its time stamps (SOF_TIMESTAMPING_OPT_ID) cannot be carried"
    return ""


def check(options: Iterable[SocketOption], about: object) -> None:
    """Raises CheckpointFailed for one that cannot be carried."""
    for option in options:
        if reason := uncarried(option):
            raise CheckpointFailed(f"{about}: {reason}", hint="the workload runs on")


def with_priority_last(options: list[SocketOption], priority: Callable[[], int]) -> list[SocketOption]:
    """Setting IP_TOS sets the priority too: that comes last then, and always."""
    if all((option.level, option.name) != _TOS for option in options):
        return options
    rest = [option for option in options if (option.level, option.name) != PRIORITY]
    return [*rest, SocketOption(*PRIORITY, priority())]


class Defaults:
    """The options of new sockets, kind by kind. Made once for a dump."""

    def __init__(self) -> None:
        self._of: dict[tuple[int, int, int], list[Default]] = {}

    def changed(self, socks: Sequence[socket.SocketType], connected: Container[int] = ()) -> list[list[SocketOption]]:
        """Of each the options that differ from a new one's; `connected` are indices of those with a peer."""
        kinds: dict[tuple[tuple[int, int, int], bool], list[int]] = {}
        for at, sock in enumerate(socks):
            kinds.setdefault(((sock.family, sock.type, sock.proto), at in connected), []).append(at)
        out: list[list[SocketOption]] = [[] for _ in socks]
        for (key, has_peer), members in kinds.items():
            fresh = self.of(*key, connected=has_peer)
            for first in range(0, len(members), _AT_ONCE):
                self._compare(socks, members[first : first + _AT_ONCE], fresh, out)
        return out

    def of(self, family: int, kind: int, protocol: int, *, connected: bool) -> list[Default]:
        """Those that a socket of this kind is asked for."""
        key = family, kind, protocol
        fresh = self._of.get(key)
        if fresh is None:
            fresh = self._of[key] = self._read(*key)
        return [known for known in fresh if known[:2] not in _ONLY_NEW] if connected else fresh

    @staticmethod
    def _compare(
        socks: Sequence[socket.SocketType],
        members: Sequence[int],
        fresh: Sequence[Default],
        out: Sequence[list[SocketOption]],
    ) -> None:
        ask = Ask([socks[at].fileno() for at in members])
        asked = [ask.option(level, name, _STRUCTS[name].size if special else 4) for level, name, _, special in fresh]
        ask.make()
        for (level, name, default, special), answers in zip(fresh, asked, strict=True):
            answers.check(f"socket option {name} of level {level}")
            values = [number(name, raw) for raw in answers.all()] if special else answers.numbers()
            if values.count(default) == len(values):
                continue
            for at, value in zip(members, values, strict=True):
                if value != default:
                    out[at].append(SocketOption(level, name, value))
        for at in members:
            out[at][:] = with_priority_last(out[at], partial(socks[at].getsockopt, *PRIORITY))

    @staticmethod
    def _read(family: int, kind: int, protocol: int) -> list[Default]:
        out = []
        with socket.socket(family, kind, protocol) as fresh:
            for level, name in _candidates(family, kind):
                try:
                    value = get(fresh, level, name)
                except OSError:
                    continue  # this kernel or kind of socket has no such option
                out.append((level, name, value, level == SOL_SOCKET and name in _STRUCTS))
        return out


def text(sock: socket.SocketType, level: int, name: int) -> str:
    """An option that is a name, "" if there is none."""
    try:
        return sock.getsockopt(level, name, 64).split(b"\0")[0].decode("ascii", "replace")
    except OSError:
        return ""


def peeks_from(sock: socket.SocketType) -> int:
    """The peek offset; negative if there is none."""
    try:
        return sock.getsockopt(SOL_SOCKET, SO_PEEK_OFF)
    except OSError:
        return -1


def authenticates(sock: socket.SocketType) -> bool:
    """Whether it has keys of TCP-AO (Linux 6.7)."""
    try:
        sock.getsockopt(SOL_TCP, _TCP_AO_INFO, 32)
    except OSError:
        return False
    return True


def force_buffers(sock: socket.SocketType, sndbuf: int, rcvbuf: int) -> None:
    """Set both buffer sizes, in bytes as getsockopt gives them, above the limits of the host."""
    sock.setsockopt(SOL_SOCKET, SO_SNDBUFFORCE, min(sndbuf // 2, 1 << 30))
    sock.setsockopt(SOL_SOCKET, SO_RCVBUFFORCE, min(rcvbuf // 2, 1 << 30))


def ask_buffers(ask: Ask, sndbufs: Sequence[int], rcvbufs: Sequence[int]) -> list[tuple[Answers, str]]:
    """The same of many sockets: what is asked, and its name."""
    sizes = [[min(size // 2, 1 << 30) for size in wanted] for wanted in (sndbufs, rcvbufs)]
    return [
        (ask.put(SOL_SOCKET, SO_SNDBUFFORCE, sizes[0]), "SO_SNDBUFFORCE"),
        (ask.put(SOL_SOCKET, SO_RCVBUFFORCE, sizes[1]), "SO_RCVBUFFORCE"),
    ]


def borrow(fd: int) -> socket.SocketType:
    """A socket object on a descriptor that stays somebody else's: end it with detach().

    One of those below Python's own, whose family and type are plain numbers: they take a tenth of the time."""
    return socket.SocketType(fileno=fd)
