"""The bridge port of a container: one prepared netlink message each to shut it and to open it.

Shutting it is on the path of the downtime, so nothing is looked up or built then: an RTM_SETLINK message
of family AF_BRIDGE with IFLA_BRPORT_STATE (linux/if_link.h, br_setlink() in net/bridge/br_netlink.c) is
sent on an open socket, and acknowledged once the port has changed.
"""

from __future__ import annotations

import os
import socket
import struct

BR_STATE_DISABLED, BR_STATE_FORWARDING = 0, 3  # linux/if_bridge.h

_RTM_SETLINK = 19
_NLM_F_REQUEST, _NLM_F_ACK = 1, 4
_NLMSG_ERROR = 2
_IFLA_PROTINFO, _NLA_F_NESTED, _IFLA_BRPORT_STATE = 12, 0x8000, 1


def message(index: int, state: int) -> bytes:
    """The request to put port `index` into `state`. Sequence number 0: the socket waits for each answer."""
    attribute = struct.pack("=HHBxxx", 5, _IFLA_BRPORT_STATE, state)
    nest = struct.pack("=HH", 4 + len(attribute), _IFLA_PROTINFO | _NLA_F_NESTED) + attribute
    ifinfo = struct.pack("=BxHiII", socket.AF_BRIDGE, 0, index, 0, 0)
    length = 16 + len(ifinfo) + len(nest)
    return struct.pack("=IHHII", length, _RTM_SETLINK, _NLM_F_REQUEST | _NLM_F_ACK, 0, 0) + ifinfo + nest


class BridgePort:
    """The port of link `index`, in the network namespace of the thread that makes this object."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._shut = message(index, BR_STATE_DISABLED)
        self._open = message(index, BR_STATE_FORWARDING)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))

    def shut(self) -> None:
        """No frame passes from here on, either way. About 20 µs. Raises OSError."""
        self._do(self._shut, "shut")

    def open(self) -> None:
        """All frames pass. Raises OSError; ENETDOWN while a link is not up yet."""
        self._do(self._open, "open")

    def _do(self, request: bytes, what: str) -> None:
        self._socket.send(request)
        answer = self._socket.recv(4096)
        _, kind, _, _, _, error = struct.unpack_from("=IHHIIi", answer)
        if kind != _NLMSG_ERROR or error:
            raise OSError(-error, f"{what} bridge port: {os.strerror(-error)}", f"link {self.index}")

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> BridgePort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
