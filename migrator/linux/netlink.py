"""Dumps of what the kernel has, asked for by netlink(7): sockets, tables, policies, and more."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

_NLM_F_REQUEST, _NLM_F_DUMP = 1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_ERROR = struct.Struct("=i")


def dump(protocol: int, kind: int, request: bytes) -> Iterator[bytes]:
    """The payloads of what answers a request of a `kind` (nlmsg_type), of the network namespace of this thread.

    Raises OSError; one of the kernel's answer names the protocol."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as channel:
        header = _HEADER.pack(_HEADER.size + len(request), kind, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0)
        channel.send(header + request)
        while True:
            for what, payload in _messages(channel.recv(1 << 17)):
                if what == _NLMSG_DONE:
                    return
                if what == _NLMSG_ERROR:
                    code = -_ERROR.unpack_from(payload)[0]
                    raise OSError(code, f"netlink protocol {protocol}: {os.strerror(code)}")
                yield payload


def attributes(payload: bytes, position: int) -> Iterator[tuple[int, bytes]]:
    """The types and values of the attributes from `position` on."""
    while position + _ATTRIBUTE.size <= len(payload):
        length, kind = _ATTRIBUTE.unpack_from(payload, position)
        yield kind, payload[position + _ATTRIBUTE.size : position + length]
        position += max(_ATTRIBUTE.size, _aligned(length))


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, position)
        yield kind, data[position + _HEADER.size : position + length]
        position += _aligned(length)


def _aligned(length: int) -> int:
    return (length + 3) & ~3
