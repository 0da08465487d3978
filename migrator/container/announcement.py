"""Frames that tell a network where an address is now: gratuitous ARP, unsolicited NA, RARP. Pure.

Switches learn from the source address of any frame that a port brings; neighbours update their caches from
gratuitous ARP (RFC 826, RFC 5227) and unsolicited neighbour advertisements with the override flag
(RFC 4861, 7.2.6).
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable

BROADCAST = b"\xff" * 6
ALL_NODES_MAC = bytes.fromhex("333300000001")
ALL_NODES = ipaddress.IPv6Address("ff02::1").packed
ETH_P_IPV6, ETH_P_ARP, ETH_P_RARP = 0x86DD, 0x0806, 0x8035

_ARP_REQUEST, _ARP_REPLY, _RARP_REQUEST = 1, 2, 3
_ICMPV6, _NEIGHBOUR_ADVERTISEMENT, _OVERRIDE, _TARGET_LINK_LAYER = 58, 136, 0x20000000, 2


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def gratuitous_arp(mac: bytes, address: ipaddress.IPv4Address) -> list[bytes]:
    """A request and a reply: some neighbours update their cache only from the one, some from the other."""

    def arp(operation: int, target: bytes) -> bytes:
        head = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation)
        return _frame(BROADCAST, mac, ETH_P_ARP, head + mac + address.packed + target + address.packed)

    return [arp(_ARP_REQUEST, bytes(6)), arp(_ARP_REPLY, mac)]


def unsolicited_na(mac: bytes, address: ipaddress.IPv6Address) -> bytes:
    """Neighbour advertisement to all nodes, override set, with the link-layer address."""
    option = struct.pack("!BB", _TARGET_LINK_LAYER, 1) + mac
    body = struct.pack("!BBHI", _NEIGHBOUR_ADVERTISEMENT, 0, 0, _OVERRIDE) + address.packed + option
    pseudo = address.packed + ALL_NODES + struct.pack("!II", len(body), _ICMPV6)
    body = body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:]
    header = struct.pack("!IHBB", 6 << 28, len(body), _ICMPV6, 255) + address.packed + ALL_NODES
    return _frame(ALL_NODES_MAC, mac, ETH_P_IPV6, header + body)


def rarp(mac: bytes) -> bytes:
    """Tells switches only; for a container without addresses of its own."""
    head = struct.pack("!HHBBH", 1, 0x0800, 6, 4, _RARP_REQUEST)
    return _frame(BROADCAST, mac, ETH_P_RARP, head + mac + bytes(4) + mac + bytes(4))


def link_local(mac: bytes) -> ipaddress.IPv6Address:
    """The address that the kernel makes from a MAC address (RFC 4291, appendix A)."""
    eui = bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]
    return ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + eui)


def announcement(mac: str, addresses: Iterable[str]) -> list[bytes]:
    """The frames to send, from the container's own MAC address, for ADDRESS/LENGTH of any family."""
    octets = mac_bytes(mac)
    frames: list[bytes] = []
    six = False
    for text in addresses:
        address = ipaddress.ip_interface(text).ip
        if isinstance(address, ipaddress.IPv4Address):
            frames += gratuitous_arp(octets, address)
        else:
            six = True
            frames.append(unsolicited_na(octets, address))
    if six:
        frames.append(unsolicited_na(octets, link_local(octets)))
    return frames or [rarp(octets)]


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _frame(to: bytes, source: bytes, kind: int, payload: bytes) -> bytes:
    return (to + source + struct.pack("!H", kind) + payload).ljust(60, b"\0")
