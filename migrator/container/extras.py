"""What a network namespace has besides one link, its addresses and plain routes. Nothing of it is carried."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migrator.container.rtnetlink import RT_SCOPE_LINK, RT_TABLE_MAIN, RTN_UNICAST, netlink_error
from migrator.linux import netlink

if TYPE_CHECKING:
    from pyroute2 import IPRoute

_NETLINK_ROUTE, _NETLINK_XFRM, _NETLINK_NETFILTER = 0, 6, 12
_NFT_MSG_GETTABLE = 10 << 8 | 1  # linux/netfilter/nfnetlink.h, nf_tables.h
_XFRM_MSG_GETSA, _XFRM_MSG_GETPOLICY, _RTM_GETNEXTHOP = 0x12, 0x15, 106
_ABSENT = (errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOENT)  # a kernel without it

_USUAL_RULES = {(2, 0, 255), (2, 32766, 254), (2, 32767, 253), (10, 0, 255), (10, 32766, 254)}
_OF_A_RULE = {"FRA_TABLE", "FRA_PRIORITY", "FRA_SUPPRESS_PREFIXLEN", "FRA_PROTOCOL"}
_OF_A_ROUTE = {"RTA_TABLE", "RTA_DST", "RTA_OIF", "RTA_GATEWAY", "RTA_PRIORITY", "RTA_PREFSRC"} | {
    "RTA_PREF", "RTA_CACHEINFO", "RTA_METRICS",
}  # fmt: skip
_MADE_BY_ITSELF = (1, 2, 9)  # RTPROT_REDIRECT, RTPROT_KERNEL, RTPROT_RA
_RTNH_F_ONLINK, _NUD_PERMANENT, _IPVS_HEADING = 4, 0x80, 3
_IFAPROT_OF_KERNEL = (1, 2, 3)  # of the loopback, announced by a router, made of the link's own address


def extras_here(ip: IPRoute, links: Mapping[int, Any], neighbours: Iterable[Any]) -> Iterator[str]:
    """Of the namespace of this process: what there is, to be followed by "is not carried". `links`: by index;
    `neighbours`: those of eth0."""
    ours = {index: name for index, link in links.items() if (name := link.get("ifname")) in ("lo", "eth0")}
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
        if qdisc["index"] in ours and kind not in ("noqueue", "noop"):
            yield f"the queueing discipline {kind} of {ours[qdisc['index']]} (tc)"
    for neighbour in neighbours:
        if neighbour["state"] & _NUD_PERMANENT:
            yield f"the permanent neighbour {neighbour.get('NDA_DST')}"
    for index, name in ours.items():
        if links[index].get_nested("IFLA_XDP", "IFLA_XDP_ATTACHED"):
            yield f"the XDP program of {name}"


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
        route["table"] == RT_TABLE_MAIN
        and (route.get("RTA_TABLE") or RT_TABLE_MAIN) == RT_TABLE_MAIN
        and route["type"] == RTN_UNICAST
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
    narrow = address["scope"] == RT_SCOPE_LINK
    if address["family"] == socket.AF_INET:
        return bool(narrow)
    return bool(narrow and (address.get("IFA_PROTO") or 0) not in _IFAPROT_OF_KERNEL)


def _attributes(message: Any) -> set[str]:
    return {name for name, _ in message["attrs"]}


def _lines(name: str) -> list[str]:
    path = Path(f"/proc/thread-self/net/{name}")
    return path.read_text().splitlines() if path.exists() else []


def _answers(protocol: int, kind: int, request: bytes) -> bool:
    """Whether the kernel has any of a kind; not where it has no such thing."""
    try:
        return any(True for _ in netlink.dump(protocol, kind, request))
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        return False
