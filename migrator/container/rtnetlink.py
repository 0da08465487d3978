"""pyroute2, loaded when it is first used: it takes a tenth of a second, and only networks of containers need it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyroute2 import IPRoute

RTPROT_STATIC, RT_TABLE_MAIN, RTN_UNICAST = 4, 254, 1  # linux/rtnetlink.h
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253


def load() -> None:
    """Load it now, for the children that this process will fork as well."""
    importlib.import_module("pyroute2")


def open_route() -> IPRoute:
    """A connection to the kernel's links, addresses and routes; close it, or leave its block."""
    from pyroute2 import IPRoute

    return IPRoute()


def netlink_error() -> type[Any]:
    """What its calls raise."""
    from pyroute2.netlink.exceptions import NetlinkError

    raised: type[Any] = NetlinkError
    return raised
