"""Who holds a connection of a daemon, and who has to leave when there are too many.

Connections before the login and links after it are counted apart, so that whoever cannot log in
never takes a place from whoever can. Before the login nobody is turned away: where there is no
place left, one leaves of the address that holds the most, the silent ones first, then the oldest.
So a crowd of one address displaces itself only, and a peer that speaks at once passes even a
crowd of many addresses. Without I/O.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Guest(Generic[T]):
    connection: T
    site: str
    has_spoken: Callable[[], bool]


class Slots(Generic[T]):
    """The connections of one daemon.

    logins: before the login, at a time
    share:  of these, of one address (IPv6: of one /64)
    links:  after it, at a time
    peer_share: of these, of one key
    """

    def __init__(self, *, logins: int = 64, share: int = 16, links: int = 64, peer_share: int = 32) -> None:
        self.logins = logins
        self.share = share
        self.links = links
        self.peer_share = peer_share
        self._guests: list[_Guest[T]] = []  # the oldest first
        self._peers: dict[T, str] = {}

    @property
    def before_login(self) -> int:
        return len(self._guests)

    @property
    def after_login(self) -> int:
        return len(self._peers)

    def connections(self) -> list[T]:
        return [guest.connection for guest in self._guests] + list(self._peers)

    def arrived(self, connection: T, address: str, has_spoken: Callable[[], bool]) -> T | None:
        """A new connection, which may stay; the one that has to leave for it, if one has to.

        `has_spoken` says later whether the other side has sent anything that makes sense.
        """
        site = _site(address)
        self._guests.append(_Guest(connection, site, has_spoken))
        held = Counter(guest.site for guest in self._guests)
        if held[site] > self.share:
            crowded = {site}
        elif len(self._guests) > self.logins:
            most = max(held.values())
            crowded = {at for at, number in held.items() if number == most}
        else:
            return None
        crowd = [guest for guest in self._guests[:-1] if guest.site in crowded] or self._guests
        leaves = next((guest for guest in crowd if not guest.has_spoken()), crowd[0])
        self._guests.remove(leaves)
        return leaves.connection

    def logged_in(self, connection: T, peer: str) -> bool:
        """It belongs to `peer` from now on; whether there is a place for it. Without one it stays where it was."""
        mine = sum(holder == peer for holder in self._peers.values())
        if len(self._peers) >= self.links or mine >= self.peer_share:
            return False
        self._drop_guest(connection)
        self._peers[connection] = peer
        return True

    def left(self, connection: T) -> None:
        """It is gone; nothing if it is not known."""
        self._drop_guest(connection)
        self._peers.pop(connection, None)

    def _drop_guest(self, connection: T) -> None:
        self._guests = [guest for guest in self._guests if guest.connection is not connection]


def _site(address: str) -> str:
    """What one party easily has many addresses of counts as one."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False))
