"""Multicast groups that a socket is a member of: which the kernel tells only for a group that it is asked about."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from migrator.linux import descriptors, procfs

_MCAST_MSFILTER = 48
_STORAGE = 128  # sizeof(struct sockaddr_storage)


class Group(NamedTuple):
    """A group that somebody on a network device has joined."""

    family: int
    ifindex: int
    address: bytes


def joined(pid: int) -> list[Group]:
    """All groups that are joined in the network namespace of a process. Raises FileNotFoundError if it has ended."""
    try:
        text = procfs.read_text(f"/proc/{pid}/net/igmp")
    except FileNotFoundError:
        os.stat(f"/proc/{pid}/net/dev")  # it is there: a kernel without CONFIG_IP_MULTICAST
        text = ""
    return [*_igmp(text), *_igmp6(pid)]


def _igmp(text: str) -> Iterator[Group]:
    index = 0
    for line in text.split("\n")[1:]:
        if line.startswith("\t"):  # in the order of the host
            yield Group(socket.AF_INET, index, int(line.split()[0], 16).to_bytes(4, "little"))
        elif line.strip():
            index = int(line.split()[0])


def _igmp6(pid: int) -> Iterator[Group]:
    try:
        text = procfs.read_text(f"/proc/{pid}/net/igmp6")
    except FileNotFoundError:  # a kernel without IPv6
        return
    for line in text.strip().split("\n"):
        if fields := line.split():
            yield Group(socket.AF_INET6, int(fields[0]), bytes.fromhex(fields[2]))


def membership(sock: socket.SocketType, groups: list[Group]) -> str:
    """A group of these that a UDP socket is a member of, in words; "" for none."""
    for group in groups:
        if group.family == sock.family and _is_member(sock, group):
            return socket.inet_ntop(group.family, group.address)
    return ""


def _is_member(sock: socket.SocketType, group: Group) -> bool:
    if group.family == socket.AF_INET:
        level, address = socket.IPPROTO_IP, struct.pack("<HH", group.family, 0) + group.address
    else:
        level, address = socket.IPPROTO_IPV6, struct.pack("<HHI", group.family, 0, 0) + group.address
    # struct group_filter, without room for sources
    wanted = struct.pack("<I4x", group.ifindex) + address.ljust(_STORAGE, b"\0") + bytes(8)
    return descriptors.has_option(sock.fileno(), level, _MCAST_MSFILTER, wanted)
