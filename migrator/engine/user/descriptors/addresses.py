"""struct sockaddr, as bytes and as Python has it."""

from __future__ import annotations

import socket
import struct
from typing import Any

from migrator.errors import ImageError

_MAPPED = bytes(10) + b"\xff\xff"
_IN, _IN6 = struct.Struct("<HH4s8x"), struct.Struct("<HHI16sI")


def pack(family: int, address: Any) -> bytes:
    """The raw address of what getsockname() or getpeername() of a socket object gave; b"" for no name."""
    if family == socket.AF_INET:
        return _IN.pack(family, socket.htons(address[1]), socket.inet_aton(address[0]))
    if family == socket.AF_INET6:
        host, port, flow, scope = address
        raw = socket.inet_pton(family, host.partition("%")[0])
        return _IN6.pack(family, socket.htons(port), socket.htonl(flow), raw, scope)
    name = address if isinstance(address, bytes) else address.encode("utf-8", "surrogateescape")
    return struct.pack("<H", family) + name if name else b""


def plain(raw: bytes) -> bytes:
    """The same address, of IPv4 where it is one of IPv4 as IPv6 has it: so the other end of its connection names it."""
    if raw[:1] == bytes([socket.AF_INET6]) and raw[8:20] == _MAPPED:
        return _IN.pack(socket.AF_INET, int.from_bytes(raw[2:4], "little"), raw[20:24])
    return raw


def unpack(raw: bytes) -> Any:
    """The address as socket objects take it. Raises ImageError for what is none."""
    try:
        (family,) = struct.unpack_from("<H", raw)
        if family == socket.AF_INET:
            _, port, host = _IN.unpack(raw)
            return socket.inet_ntoa(host), socket.ntohs(port)
        if family == socket.AF_INET6:
            _, port, flow, host, scope = _IN6.unpack(raw)
            return socket.inet_ntop(family, host), socket.ntohs(port), socket.ntohl(flow), scope
    except struct.error as error:
        raise ImageError(f"an address of {len(raw)} bytes") from error
    if family == socket.AF_UNIX and 2 < len(raw) <= 110:
        return raw[2:]
    raise ImageError(f"an address of family {family} and {len(raw)} bytes")


def show(raw: bytes) -> str:
    """For people: 10.0.0.1:80, [::1]:80, /run/socket, @abstract."""
    if not raw:
        return "no address"
    address = unpack(raw)
    if isinstance(address, bytes):
        return address.replace(b"\0", b"@", 1).decode("utf-8", "replace")
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"{host}:{address[1]}"


def is_any(raw: bytes) -> bool:
    """Whether an internet address says nothing: no port."""
    return not raw or raw[2:4] == b"\0\0"
