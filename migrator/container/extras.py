"""What a network namespace has besides one link, its addresses and plain routes. Nothing of it is carried."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migrator.container.rtnetlink import netlink_error

if TYPE_CHECKING:
    from pyroute2 import IPRoute

_NETLINK_ROUTE, _NETLINK_XFRM, _NETLINK_NETFILTER = 0, 6, 12
_NFT_MSG_GETTABLE = 10 << 8 | 1  # linux/netfilter/nfnetlink.h, nf_tables.h
_XFRM_MSG_GETSA, _XFRM_MSG_GETPOLICY, _RTM_GETNEXTHOP = 0x12, 0x15, 106
_NLM_F_REQUEST, _NLM_F_DUMP, _NLMSG_ERROR, _NLMSG_DONE = 1, 0x300, 2, 3
_HEADER = struct.Struct("=IHHII")
_ABSENT = (errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOENT)  # a kernel without it

_USUAL_RULES = {(2, 0, 255), (2, 32766, 254), (2, 32767, 253), (10, 0, 255), (10, 32766, 254)}
_OF_A_RULE = {"FRA_TABLE", "FRA_PRIORITY", "FRA_SUPPRESS_PREFIXLEN", "FRA_PROTOCOL"}
_OF_A_ROUTE = {"RTA_TABLE", "RTA_DST", "RTA_OIF", "RTA_GATEWAY", "RTA_PRIORITY", "RTA_PREFSRC"} | {
    "RTA_PREF", "RTA_CACHEINFO", "RTA_METRICS",
}  # fmt: skip
_MADE_BY_ITSELF = (1, 2, 9)  # RTPROT_REDIRECT, RTPROT_KERNEL, RTPROT_RA
_RTN_UNICAST, _RTNH_F_ONLINK, _NUD_PERMANENT, _IPVS_HEADING = 1, 4, 0x80, 3
_IFAPROT_OF_KERNEL = (1, 2, 3)  # of the loopback, announced by a router, made of the link's own address


def extras_here(ip: IPRoute, names: dict[int, str]) -> Iterator[str]:
    """Of the namespace of this process: what there is, to be followed by "is not carried". `names`: of links."""
    if _answers(_NETLINK_NETFILTER, _NFT_MSG_GETTABLE, bytes(4)):
        yield "a table of nftables"
    for tool in ("ip", "ip6", "arp"):
        if tables := _lines(f"{tool}_tables_names"):
            yield f"the table {tables[0]} of {tool}tables"
    if _answers(_NETLINK_XFRM, _XFRM_MSG_GETSA, b"") or _answers(_NETLINK_XFRM, _XFRM_MSG_GETPOLICY, b""):
        yield "an IPsec state or policy (ip xfrm)"
    if len(_lines("ip_vs")) > _IPVS_HEADING:
        yield "a virtual service (IPVS)"
    if _answers(_NETLINK_ROUTE, _RTM_GETNEXTHOP, bytes(8)):
        yield "a next hop of its own (ip nexthop)"
    for family in (socket.AF_INET, socket.AF_INET6):
        for rule in _told(partial(ip.get_rules, family=family)):
            priority = int(rule.get("FRA_PRIORITY") or 0)
            table = int(rule.get("FRA_TABLE") or rule["table"])
            if (int(family), priority, table) not in _USUAL_RULES or _attributes(rule) - _OF_A_RULE:
                yield f"the routing rule {priority} (ip rule)"
    for qdisc in _told(ip.get_qdiscs):
        kind = qdisc.get("TCA_KIND")
        if names.get(qdisc["index"]) in ("lo", "eth0") and kind not in ("noqueue", "noop"):
            yield f"the queueing discipline {kind} of {names[qdisc['index']]} (tc)"
    for neighbour in ip.get_neighbours():
        if neighbour["state"] & _NUD_PERMANENT and names.get(neighbour["ifindex"]) == "eth0":
            yield f"the permanent neighbour {neighbour.get('NDA_DST')}"
    for link in ip.get_links():
        if names[link["index"]] in ("lo", "eth0") and link.get_nested("IFLA_XDP", "IFLA_XDP_ATTACHED"):
            yield f"the XDP program of {names[link['index']]}"


def _told(ask: Callable[[], Iterable[Any]]) -> list[Any]:
    """What the kernel answers; nothing where it has no such thing."""
    try:
        return list(ask())
    except netlink_error() as error:
        if error.code not in _ABSENT:
            raise
        return []


def is_plain(route: Any, names: dict[int, str]) -> bool:
    """Whether a specification can say all that a route is."""
    return bool(
        route["table"] == 254
        and (route.get("RTA_TABLE") or 254) == 254
        and route["type"] == _RTN_UNICAST
        and not route["tos"]
        and not route["flags"] & _RTNH_F_ONLINK
        and names.get(route.get("RTA_OIF")) == "eth0"
        and not _attributes(route) - _OF_A_ROUTE
        and not (route.get("RTA_METRICS") or {}).get("attrs")
    )


def is_somebodys(route: Any) -> bool:
    """Whether somebody set a route, rather than the kernel or a router in the network."""
    return route["proto"] not in _MADE_BY_ITSELF


def odd_address(address: Any) -> bool:
    """Whether it is more than an address with a prefix: one with a peer, or of a narrower scope than it would have."""
    own, other = address.get("IFA_LOCAL"), address.get("IFA_ADDRESS")
    if own is not None and other is not None and own != other:
        return True
    narrow = address["scope"] == 253  # RT_SCOPE_LINK
    if address["family"] == socket.AF_INET:
        return bool(narrow)
    return bool(narrow and (address.get("IFA_PROTO") or 0) not in _IFAPROT_OF_KERNEL)


def _attributes(message: Any) -> set[str]:
    return {name for name, _ in message["attrs"]}


def _lines(name: str) -> list[str]:
    path = Path(f"/proc/thread-self/net/{name}")
    return path.read_text().splitlines() if path.exists() else []


def _answers(protocol: int, kind: int, payload: bytes) -> int:
    """How many messages a dump of the kernel has; none where it has no such thing."""
    count = 0
    try:
        channel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    except OSError:
        return 0
    with channel:
        length = _HEADER.size + len(payload)
        channel.send(_HEADER.pack(length, kind, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0) + payload)
        while True:
            data = channel.recv(1 << 16)
            at = 0
            while at + _HEADER.size <= len(data):
                length, what, _, _, _ = _HEADER.unpack_from(data, at)
                if what == _NLMSG_DONE:
                    return count
                if what == _NLMSG_ERROR:
                    error = -struct.unpack_from("=i", data, at + _HEADER.size)[0]
                    if error in _ABSENT:
                        return 0
                    raise OSError(error, f"netlink: {os.strerror(error)}")
                count += 1
                at += (length + 3) & ~3
