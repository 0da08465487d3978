"""Sockets and their addresses for people."""

from __future__ import annotations

import ipaddress

from migrator.image import records_files as f


def socket_text(socket: f.Socket) -> str:
    """A socket in one line: family, type, addresses or peer, state."""
    family = {1: "unix", 2: "inet", 10: "inet6", 16: "netlink"}.get(socket.family, f"family {socket.family}")
    kind = {1: "stream", 2: "dgram", 5: "seqpacket"}.get(socket.type, f"type {socket.type}")
    ends = [address_text(socket.local) or socket.path, address_text(socket.peer)]
    if socket.peer_objref:
        ends[1] = f"socket {socket.peer_objref}"
    states = f.SocketState._value2member_map_
    state = states[socket.state].name.lower() if socket.state in states else f"state {socket.state}"
    return " ".join([family, kind, state, " - ".join(filter(None, ends))]).strip()


def address_text(address: bytes) -> str:
    """A struct sockaddr for people: 10.0.0.1:80, [::1]:80, the path of a unix socket; "" if there is none."""
    family = int.from_bytes(address[:2], "little")
    if family == 2 and len(address) >= 8:
        return f"{ipaddress.IPv4Address(address[4:8])}:{int.from_bytes(address[2:4], 'big')}"
    if family == 10 and len(address) >= 24:
        return f"[{ipaddress.IPv6Address(address[8:24])}]:{int.from_bytes(address[2:4], 'big')}"
    if family == 1:
        path = address[2:]
        shown = b"@" + path[1:] if path[:1] == b"\0" else path.split(b"\0")[0]
        return shown.decode("utf-8", "surrogateescape")
    return address.hex()
