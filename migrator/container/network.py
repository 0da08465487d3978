"""A container's network: a veth pair between its `eth0` and a port of a bridge.

The host's end is named after the container; the container's end has the same MAC address on every host,
so that neighbours keep their entries when it moves. In state `disabled` of
the bridge port no frame passes either way, in state `forwarding` all do (`migrator.container.switchover`).
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from migrator.container import announcement, extras, rtnetlink
from migrator.container.bridge_port import BR_STATE_DISABLED, BridgePort
from migrator.container.packet_socket import PacketSocket
from migrator.container.rtnetlink import (
    RT_SCOPE_LINK,
    RT_SCOPE_UNIVERSE,
    RTPROT_STATIC,
    netlink_error,
    open_route,
)
from migrator.container.spec import DEFAULT_BRIDGE, NEIGHBOURS, ContainerSpec, Neighbour, Route
from migrator.errors import MigratorError, UsageError
from migrator.linux.namespaces import entered, run_in

if TYPE_CHECKING:
    from pyroute2 import IPRoute

IFA_F_NODAD, IFA_F_PERMANENT = 0x02, 0x80  # linux/if_addr.h
NUD_STALE, NUD_KNOWN = 0x04, 0x02 | 0x04 | 0x08 | 0x10 | 0x80  # linux/neighbour.h


class NetworkError(MigratorError):
    """A link, address or route could not be set up."""


@dataclass(frozen=True, slots=True)
class NetworkState:
    """What a network namespace has now, as a specification writes it."""

    mac: str
    mtu: int
    addresses: tuple[str, ...]
    loopback: tuple[str, ...]
    routes: tuple[Route, ...]
    neighbours: tuple[Neighbour, ...]
    other_links: tuple[str, ...]
    extras: tuple[str, ...]  # what is not carried


def ensure_bridge(ip: IPRoute, name: str) -> int:
    """The index of a bridge, up. The default one is made if it does not exist; any other must exist."""
    found = ip.link_lookup(ifname=name)
    if not found:
        if name != DEFAULT_BRIDGE:
            raise UsageError(
                f"no bridge {name!r} on this host",
                hint=f"ip link add {name} type bridge, and make the uplink one of its ports",
            )
        # No spanning tree and no delay: a port forwards as soon as it is told to.
        with _tolerating(errno.EEXIST):
            ip.link("add", ifname=name, kind="bridge", br_forward_delay=0, br_stp_state=0)
        found = ip.link_lookup(ifname=name)
    link = ip.get_links(found[0])[0]
    if _kind(link) != "bridge":
        raise UsageError(f"{name!r} is not a bridge", hint="--bridge names the bridge to attach to")
    if link["state"] != "up":
        ip.link("set", index=found[0], state="up")
    return int(found[0])


def set_up(spec: ContainerSpec, init_pid: int) -> int:
    """Build the container's network around `init_pid`, its port `disabled`. Returns the index of the
    host's end, 0 for a container without a bridge. What fails leaves no link behind."""
    rtnetlink.load()
    if not spec.bridge:
        run_in(init_pid, {"net"}, lambda: _set_up_inside(spec))
        return 0
    with open_route() as ip:
        bridge = ensure_bridge(ip, spec.bridge)
        mtu = spec.mtu or int(ip.get_links(bridge)[0].get("mtu"))
        peer = {"ifname": "eth0", "net_ns_pid": init_pid, "address": spec.effective_mac, "mtu": mtu}
        remove(spec.veth)
        # A bridge takes the least address of its ports (br_stp_recalculate_bridge_id()), unless it was given
        # one. Ours is greater than nearly any other, or the host's own address would change with every container
        # that comes and goes, and its peers would not find it for a while; for the rest it is given its own.
        address = f"fe:{spec.effective_mac[3:]}"
        host = str(ip.get_links(bridge)[0].get("address"))
        if address < host:
            ip.link("set", index=bridge, address=host)
        ip.link("add", ifname=spec.veth, kind="veth", address=address, mtu=mtu, peer=peer)
        try:
            index = int(ip.link_lookup(ifname=spec.veth)[0])
            ip.link("set", index=index, master=bridge)
            _quiet(spec.veth)
            ip.link("set", index=index, state="up")
            # Until the port is shut nothing may leave: the first frame from this MAC address would make
            # switches send here what is for the source. So eth0 comes up without IPv6, which is what
            # speaks by itself.
            run_in(init_pid, {"net"}, _bring_up_silently)
            settle(ip, index)
            set_port(ip, index, BR_STATE_DISABLED)
            run_in(init_pid, {"net"}, lambda: _set_up_inside(spec))
        except BaseException:
            remove(spec.veth)
            raise
        return index


def set_port(ip: IPRoute, index: int, state: int) -> None:
    """Set the state of a bridge port and see that it stays: a late carrier event would enable it again."""
    with BridgePort(index) as port:
        for _ in range(50):
            if state == BR_STATE_DISABLED:
                port.shut()
            else:
                port.open()
            if port_state(ip, index) == state:
                return
            time.sleep(0.002)
    raise NetworkError(
        f"bridge port {index} does not take state {state}",
        hint="is a spanning tree protocol running on the bridge? It must be off",
    )


def port_state(ip: IPRoute, index: int) -> int:
    """The state of a bridge port (linux/if_bridge.h, BR_STATE_*)."""
    for link in ip.get_links(index):
        data = link.get_nested("IFLA_LINKINFO", "IFLA_INFO_SLAVE_DATA")
        if data is not None:
            return int(data.get("IFLA_BRPORT_STATE"))
    raise NetworkError(f"link {index} is not a bridge port")


def announce(spec: ContainerSpec, init_pid: int) -> None:
    """Tell switches and neighbours, once, that the addresses are those of this container: one that had them before
    may be remembered for minutes. The port must be open. Nobody waits for it, so what fails is left out."""
    with contextlib.suppress(OSError), entered(f"/proc/{init_pid}/ns/net"), PacketSocket("eth0") as inside:
        for frame in announcement.announcement(spec.effective_mac, spec.addresses):
            inside.give_plain(frame)


def settle(ip: IPRoute, index: int, *, timeout: float = 5.0) -> None:
    """Wait until the kernel has taken note of the carrier of both ends. Only after that does the port
    state belong to whoever sets it (br_port_carrier_check() in net/bridge/br_if.c)."""
    end = time.monotonic() + timeout
    while ip.get_links(index)[0].get("operstate") != "UP":
        if time.monotonic() > end:
            raise NetworkError(f"link {index} does not come up")
        time.sleep(0.001)


def remove(veth: str) -> None:
    """Remove a veth pair by its host's end, if it exists."""
    with open_route() as ip, _tolerating(errno.ENODEV):
        for index in ip.link_lookup(ifname=veth):
            ip.link("del", index=index)


def rename(index: int, name: str) -> None:
    """Give link `index` another name. Nothing where the kernel does not rename what is up (before 6.2)."""
    with open_route() as ip, contextlib.suppress(netlink_error()):
        ip.link("set", index=index, ifname=name)


def read(init_pid: int) -> NetworkState:
    """What the network namespace of a process has now. Nothing is stopped or changed."""
    rtnetlink.load()
    return run_in(init_pid, {"net"}, _read_inside)


def _quiet(device: str) -> None:
    """The host's end is a mere bridge port: no IPv6 address of its own, no router solicitations."""
    _sysctl(f"net/ipv6/conf/{device}/disable_ipv6", "1")


def _sysctl(key: str, value: str) -> None:
    # A kernel without IPv6 has none of these, and needs none.
    with contextlib.suppress(FileNotFoundError), open(f"/proc/sys/{key}", "w") as file:
        file.write(value)


def _host_default() -> str:
    """Whether new devices here are without IPv6: "1" or "0"."""
    try:
        with open("/proc/sys/net/ipv6/conf/default/disable_ipv6") as file:
            return file.read().strip()
    except FileNotFoundError:
        return "1"


def _bring_up_silently() -> None:
    _sysctl("net/ipv6/conf/eth0/disable_ipv6", "1")
    with open_route() as ip:
        ip.link("set", index=ip.link_lookup(ifname="eth0")[0], state="up")


def _set_up_inside(spec: ContainerSpec) -> None:
    """Runs in the container's network namespace, with the host's file systems."""
    with open_route() as ip:
        lo = int(ip.link_lookup(ifname="lo")[0])
        ip.link("set", index=lo, state="up")
        for address in spec.loopback:
            _add_address(ip, lo, address)
        if not spec.bridge:
            return
        eth = int(ip.link_lookup(ifname="eth0")[0])
        # Addresses work at once: the whole address moves here, and asking the neighbours whether it is
        # free would hear the source's copy and wait a second for it.
        for device in ("all", "eth0"):
            _sysctl(f"net/ipv6/conf/{device}/accept_dad", "0")
        wanted = any(ipaddress.ip_interface(a).version == 6 for a in spec.addresses)
        _sysctl("net/ipv6/conf/eth0/disable_ipv6", "0" if wanted else _host_default())
        for address in spec.addresses:
            _add_address(ip, eth, address)
        for route in spec.routes:
            _add_route(ip, eth, route)
        for neighbour in spec.neighbours:
            # Stale: used at once, and verified by the kernel when it is.
            ip.neigh("replace", ifindex=eth, dst=neighbour.address, lladdr=neighbour.mac, state=NUD_STALE)


def _add_address(ip: IPRoute, index: int, address: str) -> None:
    given = ipaddress.ip_interface(address)
    wanted: dict[str, Any] = {"index": index, "address": str(given.ip), "prefixlen": given.network.prefixlen}
    if given.version == 6:
        wanted["flags"] = IFA_F_NODAD
    try:
        with _tolerating(errno.EEXIST):
            ip.addr("add", **wanted)
    except netlink_error() as error:
        raise NetworkError(f"address {address}: {error}") from None


def _add_route(ip: IPRoute, index: int, route: Route) -> None:
    hint = route.gateway or route.source or (route.destination if route.destination != "default" else "")
    version = ipaddress.ip_interface(hint).version if hint else 4
    wanted: dict[str, Any] = {
        "dst": {4: "0.0.0.0/0", 6: "::/0"}[version] if route.destination == "default" else route.destination,
        "family": {4: 2, 6: 10}[version],
        "oif": index,
        "proto": RTPROT_STATIC,
        "scope": RT_SCOPE_UNIVERSE if route.gateway or version == 6 else RT_SCOPE_LINK,
    }
    if route.gateway:
        wanted["gateway"] = route.gateway
    if route.metric:
        wanted["priority"] = route.metric
    if route.source:
        wanted["prefsrc"] = route.source
    try:
        with _tolerating(errno.EEXIST):
            ip.route("add", **wanted)
    except netlink_error() as error:
        raise NetworkError(
            f"route {route.destination} via {route.gateway or 'eth0'}: {error}",
            hint="the gateway must be reachable through one of the container's addresses",
        ) from None


def _read_inside() -> NetworkState:
    with open_route() as ip:
        links = {int(link["index"]): link for link in ip.get_links()}
        names = {index: link.get("ifname") for index, link in links.items()}
        eth = next((link for link in links.values() if link.get("ifname") == "eth0"), None)
        addresses: dict[str, list[str]] = {"eth0": [], "lo": []}
        neighbours = list(ip.get_neighbours(ifindex=int(eth["index"]))) if eth else []
        more = list(extras.extras_here(ip, links, neighbours))
        for a in ip.get_addr():
            name = names.get(a["index"], "")
            text = f"{a.get('local') or a.get('address')}/{a['prefixlen']}"
            # Link-local addresses come from the MAC by themselves, 127.0.0.1 and ::1 with the loopback.
            automatic = a["scope"] == RT_SCOPE_LINK or text in ("127.0.0.1/8", "::1/128")
            if name in addresses and extras.odd_address(a):
                more.append(f"the address {text} of {name}, with a peer or scope of its own,")
            elif name in addresses and not automatic:
                addresses[name].append(text)
        routes = []
        for r in [*ip.get_routes(family=socket.AF_INET), *ip.get_routes(family=socket.AF_INET6)]:
            # What the kernel made goes with the addresses; only what somebody set is to be carried.
            if not extras.is_somebodys(r):
                continue
            dst = r.get("dst")
            destination = f"{dst}/{r['dst_len']}" if dst else "default"
            if not extras.is_plain(r, names):
                more.append(f"the route to {destination}")
            else:
                routes.append(
                    Route(
                        destination,
                        r.get("gateway") or "",
                        # The kernel gives IPv6 routes metric 1024 unless told otherwise.
                        0 if r["family"] == 10 and r.get("priority") == 1024 else int(r.get("priority") or 0),
                        r.get("prefsrc") or "",
                    )
                )
        # On-link routes first: gateways are reached through them.
        routes.sort(key=lambda route: bool(route.gateway))
        return NetworkState(
            extras=tuple(dict.fromkeys(more)),
            mac=eth.get("address") if eth else "",
            mtu=int(eth.get("mtu")) if eth else 0,
            addresses=tuple(addresses["eth0"]),
            loopback=tuple(addresses["lo"]),
            routes=tuple(routes),
            neighbours=_neighbours(neighbours),
            other_links=tuple(
                sorted(n for i, n in names.items() if n not in ("lo", "eth0") and _kind(links[i]) != "fallback")
            ),
        )


def _neighbours(found: Sequence[Any]) -> tuple[Neighbour, ...]:
    return tuple(
        Neighbour(n.get("dst"), n.get("lladdr"))
        for n in found
        if n["state"] & NUD_KNOWN and n.get("dst") and n.get("lladdr")
    )[:NEIGHBOURS]


def _kind(link: Any) -> str:
    # Some kernels put devices such as tunl0 and ifb0 into every namespace; they are down and carry nothing.
    info = link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND")
    if link["state"] != "up" and link.get("ifname") in _FALLBACK_DEVICES:
        return "fallback"
    return str(info or "")


_FALLBACK_DEVICES = frozenset(
    ("tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ifb0", "ifb1")
)


@contextlib.contextmanager
def _tolerating(*codes: int) -> Any:
    try:
        yield
    except netlink_error() as error:
        if error.code not in codes:
            raise
