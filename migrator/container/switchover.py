"""Moving a container's network from one host to another without losing a frame.

While a container is frozen its kernel sockets would go on answering: an acknowledgement sent after the
sockets were saved would promise data that the copy does not have. So its port is shut. But what a client
sends in that time must not be lost either, or the client waits 200 ms before it sends it again. So what the
bridge would have passed to the port is captured, shipped, and delivered to the copy:

    1. source        hold()      new connections wait: their first segments are captured, all else passes
    2. source        lock()      all is captured, then the port shuts
    3. source        captured()  what has come so far; again and again until the source is released
    4. source        orphans()   connections that stay behind, to be served through the link
    5. destination   divert()    what comes for those does not reach the copy
    6. destination   unlock()    the port opens; nobody sends there yet
    7. destination   inject()    into eth0 of the copy, whose sockets stand: their answers get out
    8. destination   announce()  switches and neighbours send to the new place from now on
    9. source        release()

A connection that waits to be accepted cannot be saved, so between 1 and 2 the program gets the time to accept what
has begun. Until 6 the source may `unlock()` instead: what was captured is delivered there, and nothing has
happened.

When the announcement comes by, the source stops capturing: from that frame on, the network delivers to the
new place by itself.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections import Counter
from collections.abc import Iterable
from typing import Protocol

from migrator.container import announcement, connection_filter, network
from migrator.container.bridge_port import BridgePort
from migrator.container.connection_filter import Connection
from migrator.container.first_packet import FirstPacket, Flow
from migrator.container.orphans import Orphans, Relay
from migrator.container.packet_socket import MAX_FRAME, VNET_HDR, PacketSocket, concerning, give_all
from migrator.container.state import Container
from migrator.errors import ImageError
from migrator.linux.bpf import TCX_EGRESS, tcx
from migrator.linux.cgroup import Cgroup
from migrator.linux.namespaces import entered
from migrator.linux.repair import revive

_RECEIVER, _SENDER = slice(VNET_HDR, VNET_HDR + 6), slice(VNET_HDR + 6, VNET_HDR + 12)

CAPTURE_LIMIT = 64 << 20  # bytes; beyond it the clients' own retransmissions have to do


class OrphanedConnection(Protocol):
    """What a `Connection` is made of, as the source has said it."""

    @property
    def local(self) -> str: ...
    @property
    def local_port(self) -> int: ...
    @property
    def peer(self) -> str: ...
    @property
    def peer_port(self) -> int: ...


class NetworkLock:
    """The source's side. All methods belong to one thread, the one that calls `prepare()`."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.moved = False  # the announcement of the new place has been seen
        self._mac = announcement.mac_bytes(container.spec.effective_mac)
        self._filter = concerning(self._mac)
        self._stack = contextlib.ExitStack()
        self._bridge_port: BridgePort | None = None
        self._bridge: PacketSocket | None = None
        self._port: PacketSocket | None = None
        self._locked = self._holding = False
        self._orphans: Orphans | None = None
        self._fence: contextlib.ExitStack | None = None
        self._early: list[bytes] = []
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._passed: Counter[bytes] = Counter()

    def prepare(self) -> None:
        """Open everything, while the container still runs. Nothing is captured yet. Raises OSError.

        A container without a network needs nothing, and all methods do nothing.
        """
        if not self.container.ifindex or self._bridge_port is not None:
            return
        with contextlib.ExitStack() as stack:
            bridge_port = stack.enter_context(BridgePort(self.container.ifindex))
            # The bridge itself sees what it would pass on, whether or not the port takes it.
            bridge = PacketSocket(self.container.spec.bridge, promiscuous=True)
            stack.callback(bridge.close)
            port = PacketSocket(self.container.spec.veth)
            stack.callback(port.close)
            orphans = Orphans(self.container)
            stack.callback(orphans.close)
            self._beginnings = stack.enter_context(connection_filter.taking_beginnings(self._mac))
            self._no_beginnings = stack.enter_context(connection_filter.dropping_beginnings())
            self._stack = stack.pop_all()
        self._bridge_port, self._bridge, self._port, self._orphans = bridge_port, bridge, port, orphans

    def hold(self) -> None:
        """Capture what begins a connection from here on, and let nothing of that reach the container; all else
        passes. Connections that have begun go on."""
        if self._bridge_port is None:
            self.prepare()
        if self._port is None or self._bridge is None or self._holding:
            return
        self._port.admit(self._beginnings)
        self._bridge.admit(self._beginnings)
        self._fence = contextlib.ExitStack()
        self._fence.enter_context(tcx(self._no_beginnings, self.container.ifindex, TCX_EGRESS))
        self._holding = True

    def handshakes(self) -> int:
        """Connections from outside that have begun and are not established yet."""
        return self._orphans.handshakes() if self._orphans is not None else 0

    def lock(self) -> None:
        """Capture from here on and shut the port: four system calls. The container is cut off afterwards."""
        if self._bridge_port is None:
            self.prepare()
        if self._bridge_port is None or self._bridge is None or self._port is None:
            return
        # Capturing must begin before the port shuts. What passed the port in between is seen by the
        # socket there, and taken off again in captured(): every frame counts once.
        self._port.admit(self._filter)
        self._bridge.admit(self._filter)
        self._bridge_port.shut()
        # The container's own frames of that time are no sign that it speaks elsewhere.
        self._early = self._fresh()
        self._locked = True

    def orphans(self) -> list[Connection]:
        """Connections that no program holds any more and that are not at their end, once the port is shut."""
        return self._orphans.find() if self._orphans is not None else []

    def orphans_left_out(self) -> int:
        """How many there were beyond what can be served."""
        return self._orphans.left_out if self._orphans is not None else 0

    def orphans_living(self) -> int:
        """How many of them have not ended."""
        return self._orphans.living() if self._orphans is not None else 0

    def outgoing(self) -> list[bytes]:
        """Frames that orphaned connections have sent: for `NetworkArrival.emit()`."""
        return self._orphans.outgoing() if self._orphans is not None else []

    def deliver(self, frames: Iterable[bytes]) -> None:
        """Frames for orphaned connections, of `NetworkArrival.diverted()`."""
        if self._orphans is not None:
            self._orphans.deliver(_checked(frames, self._mac))

    def set_aside(self) -> None:
        """The container has gone, its network stays for what is left of it, under a name that a container which
        comes back does not need."""
        if self._orphans is not None:
            network.rename(self.container.ifindex, f"mo{self.container.ifindex}")

    def captured(self) -> list[bytes]:
        """The frames that came for the container since the last call, in order. Opaque: for `inject()`."""
        fresh = self._early + self._fresh()
        self._early = []
        self._kept += fresh
        return fresh

    def unlock(self) -> None:
        """The abort: deliver here what was captured, and open the port. As if nothing had been asked."""
        if self._bridge_port is None or self._port is None or not (self._locked or self._holding):
            return
        # Open first: what the container answers at once to what is delivered must get out.
        if self._locked:
            self._bridge_port.open()
        self._let_begin()
        self.captured()
        give_all(self._port, self._kept)
        self._locked = False
        self.close()

    def _let_begin(self) -> None:
        if self._fence is not None:
            self._fence.close()
            self._fence = None
        self._holding = False

    def release(self) -> None:
        """The container runs elsewhere: stop capturing. The port stays shut and goes with the container."""
        self.close()

    def close(self) -> None:
        """Close what is open. The port stays as it is."""
        self._let_begin()
        self._stack.close()
        self._bridge_port = self._bridge = self._port = self._orphans = None
        self._kept = []
        self._early = []

    def __enter__(self) -> NetworkLock:
        self.prepare()
        return self

    def __exit__(self, *_: object) -> None:
        """Left without `release()` the container gets its network back."""
        try:
            self.unlock()
        finally:
            self.close()

    def _fresh(self) -> list[bytes]:
        if self._bridge is None or self._port is None:
            return []
        seen = self._bridge.take()
        self._passed.update(frame[VNET_HDR:] for frame in self._port.take())
        fresh = []
        for frame in seen:
            plain = frame[VNET_HDR:]
            if plain[:6] != self._mac:
                # Multicast from the container's own address, while its port is shut: it speaks elsewhere.
                self.moved = self.moved or self._locked
            elif self._passed[plain] > 0:
                self._passed[plain] -= 1
            elif not self.moved and self._kept_bytes + len(frame) <= CAPTURE_LIMIT:
                self._kept_bytes += len(frame)
                fresh.append(frame)
        return fresh


class NetworkArrival:
    """The destination's side, for a container whose sandbox stands with its port shut."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self._stack = contextlib.ExitStack()
        self._bridge_port: BridgePort | None = None
        self._port: PacketSocket | None = None
        self._inside: PacketSocket | None = None
        self._announcement: list[bytes] = []
        self._relay: Relay | None = None
        self._first: FirstPacket | None = None
        self._passing: set[Flow] = set()

    def prepare(self) -> None:
        """Open everything, before the source freezes. Raises OSError."""
        if not self.container.ifindex or self._bridge_port is not None:
            return
        spec = self.container.spec
        self._announcement = announcement.announcement(spec.effective_mac, spec.addresses)
        with contextlib.ExitStack() as stack:
            bridge_port = stack.enter_context(BridgePort(self.container.ifindex))
            port = PacketSocket(spec.veth)
            stack.callback(port.close)
            # Sent from inside, so that our own bridge learns the address on the container's port.
            with entered(f"/proc/{self.container.init_pid}/ns/net"):
                inside = PacketSocket("eth0")
                stack.callback(inside.close)
                first = FirstPacket("eth0")
            stack.callback(first.close)
            relay = Relay(self.container)
            stack.callback(relay.close)
            self._stack = stack.pop_all()
        self._bridge_port, self._port, self._inside, self._relay = bridge_port, port, inside, relay
        self._first = first

    def divert(self, connections: Iterable[OrphanedConnection]) -> None:
        """What comes for these is for the source, and does not reach the copy. The port should be shut.

        They are from the peer and checked: ImageError for what `NetworkLock.orphans()` cannot have returned."""
        if self._relay is None:
            self.prepare()
        if self._relay is not None:
            try:
                stay = [Connection(c.local, c.local_port, c.peer, c.peer_port) for c in connections]
                self._relay.divert(stay)
                self._passing = {Flow(c.local_port, ipaddress.ip_address(c.peer).packed, c.peer_port) for c in stay}
            except (ValueError, OSError) as error:
                raise ImageError(f"connections that stay behind: {error}") from error

    def diverted(self) -> list[bytes]:
        """Frames that have come for them since the last call."""
        return self._relay.diverted() if self._relay is not None else []

    def emit(self, frames: Iterable[bytes]) -> None:
        """Send frames of orphaned connections as if the copy had sent them. They are from the peer and checked."""
        if self._inside is not None:
            mac = announcement.mac_bytes(self.container.spec.effective_mac)
            give_all(self._inside, _checked(frames, mac, _SENDER))

    def is_outgoing(self, frame: bytes) -> bool:
        """Whether a frame of the source is one to `emit()`, not to `inject()`."""
        return frame[_SENDER] == announcement.mac_bytes(self.container.spec.effective_mac)

    def inject(self, frames: Iterable[bytes]) -> None:
        """Deliver captured frames to eth0 as if they had just come. The copy's sockets must stand.

        The port should be open, or what the copy answers at once is lost.

        Frames are from the peer and checked: ImageError for what `captured()` cannot have returned.
        """
        if self._bridge_port is None:
            self.prepare()
        if self._port is not None:
            give_all(self._port, _checked(frames, announcement.mac_bytes(self.container.spec.effective_mac)))

    def unlock(self) -> None:
        """Open the port."""
        if self._bridge_port is None:
            self.prepare()
        if self._first is not None:
            self._first.begin()
        if self._bridge_port is not None:
            self._bridge_port.open()

    def heard(self, after: int) -> int:
        """When the copy's programs sent their first packet, of those since the last call and not before `after`; 0
        if they sent none. Both in ns of CLOCK_MONOTONIC, as the container's own network has them."""
        return self._first.look(after, self._passing) if self._first is not None else 0

    @property
    def asked(self) -> bool:
        """Whether something has come since `unlock()` that the copy may answer, as far as `heard()` has looked."""
        return self._first is not None and self._first.asked

    def announce(self) -> None:
        """Tell switches and neighbours the new place, once. To be repeated (after 50, 200, 1000 ms), as
        such frames get lost. The port must be open."""
        if self._inside is None:
            self.prepare()
        if self._inside is not None:
            for frame in self._announcement:
                self._inside.give_plain(frame)

    def close(self) -> None:
        self._stack.close()
        self._bridge_port = self._port = self._inside = self._relay = self._first = None

    def __enter__(self) -> NetworkArrival:
        self.prepare()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def reopen(container: Container) -> None:
    """Give a container that is about to run here its network back: for an agent that finds it shut after a
    crash. Frames that came meanwhile are lost; its connections ask for them."""
    if container.ifindex:
        with BridgePort(container.ifindex) as port:
            port.open()
        network.announce(container.spec, container.init_pid)
    with contextlib.suppress(FileNotFoundError):
        revive(Cgroup.at(container.cgroup).pids())


def _checked(frames: Iterable[bytes], mac: bytes, whose: slice = _RECEIVER) -> list[bytes]:
    good = []
    for frame in frames:
        if not VNET_HDR + 14 <= len(frame) <= MAX_FRAME or frame[whose] != mac:
            raise ImageError("a captured frame is not for this container")
        good.append(frame)
    return good
