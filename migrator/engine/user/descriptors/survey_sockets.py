"""What of a running tree's sockets cannot be carried."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from migrator.engine.user.descriptors import addresses, diag, multicast, netlink, other_ends, sockopts, tcp
from migrator.engine.user.descriptors.classify import Obstacle, Root
from migrator.engine.user.descriptors.found import Found, open_elsewhere
from migrator.engine.user.descriptors.sockets import judge, member_of, outside_of_root, same_name, taken_name
from migrator.linux import descriptors, inet_diag
from migrator.linux.namespaces import entered

_HINT = "run it under `migrator run`, so that its address moves with it"


def survey_sockets(
    found: Sequence[Found], pid: int, root: Root, congestion: set[str], *, own_netns: bool
) -> Iterator[str]:
    """One sentence per obstacle. Each socket is fetched for a moment; the program sees nothing of it.

    pid: a process of the tree, for its network namespace. congestion: is given the controls of all of TCP."""
    once = {item.link: item for item in found}
    unix: dict[int, Found] = {}
    connections: dict[other_ends.Ends, _Connection] = {}
    datagrams: dict[socket.AddressFamily | int, Found] = {}
    groups = _groups(pid)
    names: dict[bytes, Found] = {}
    nameless: set[int] = set()
    defaults = sockopts.Defaults()
    signed = _signed(pid)
    for item in once.values():
        try:
            sock = descriptors.fetch_socket(item.process.pidfd, item.number)
        except OSError:
            continue  # it was closed meanwhile
        with sock:
            try:
                judge(sock)
            except Obstacle as obstacle:
                yield f"{item}: {obstacle}"
                continue
            if os.fstat(sock.fileno()).st_ino in signed:
                yield f"{item}: a TCP connection with keys (TCP_MD5SIG) cannot be carried: nobody can read them"
            for option in defaults.changed([sock])[0]:
                if reason := sockopts.uncarried(option):
                    yield f"{item}: {reason}"
            if sock.family == socket.AF_NETLINK:
                if not own_netns:
                    yield f"{item}: {netlink.OF_THE_HOST}"
                continue
            if sock.family == socket.AF_UNIX:
                unix[os.fstat(sock.fileno()).st_ino] = item
                if reason := outside_of_root(sock, root):
                    yield f"{item}: {reason}"
                if sock.type == socket.SOCK_DGRAM and not sock.getsockname():
                    nameless.add(os.fstat(sock.fileno()).st_ino)
                if (name := taken_name(sock)) and names.setdefault(name, item) is not item:
                    yield f"{item}: {same_name(name, names[name])}"
                continue
            if sock.proto == socket.IPPROTO_TCP:
                raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 64)
                congestion.add(raw.split(b"\0")[0].decode(errors="replace"))
            if sock.proto == socket.IPPROTO_UDP:
                if group := multicast.membership(sock, groups):
                    yield f"{item}: {member_of(group)}"
                datagrams.setdefault(sock.family, item)
            elif not own_netns and sock.proto == socket.IPPROTO_TCP:
                _note_connection(sock, item, connections)
    yield from _strangers(connections, pid)
    if unix:
        yield from _partners(unix, nameless, pid)
    if datagrams:
        yield from _tells_shutdowns(datagrams, pid)


def _signed(pid: int) -> set[int]:
    """The inodes of all sockets of TCP with keys, that listen or are connected: of others the kernel does not tell."""
    states = (inet_diag.LISTEN, inet_diag.ESTABLISHED, inet_diag.CLOSE_WAIT, inet_diag.SYN_SENT)
    try:
        with entered(f"/proc/{pid}/ns/net"):
            return {sock.inode for sock in inet_diag.tcp_sockets_here(states, keys=True) if sock.signed}
    except OSError:
        return set()  # it ended, or a kernel without inet_diag, which says so elsewhere


def _groups(pid: int) -> list[multicast.Group]:
    try:
        return multicast.joined(pid)
    except OSError:
        return []  # it ended


def _tells_shutdowns(datagrams: Mapping[socket.AddressFamily | int, Found], pid: int) -> Iterator[str]:
    for family, item in datagrams.items():
        try:
            with entered(f"/proc/{pid}/ns/net"):
                diag.shutdowns_of_udp(family)
        except FileNotFoundError:
            if os.path.exists(f"/proc/{pid}"):
                yield f"{item}: this kernel does not tell what of UDP sockets was shut down (CONFIG_INET_UDP_DIAG)"
        except OSError as error:
            yield f"{item}: what of UDP sockets was shut down cannot be found out: {error}"


class _Connection(NamedTuple):
    item: Found
    local: bytes
    peer: bytes
    state: int  # of TCP


def _note_connection(sock: socket.socket, item: Found, connections: dict[other_ends.Ends, _Connection]) -> None:
    try:
        if (state := tcp.state_of(sock)) in tcp.CONNECTED:
            local, peer = (addresses.pack(sock.family, name) for name in (sock.getsockname(), sock.getpeername()))
            connections[other_ends.ends_of(local, peer)] = _Connection(item, local, peer, state)
    except OSError:
        return  # it ended meanwhile


def _strangers(connections: Mapping[other_ends.Ends, _Connection], pid: int) -> Iterator[str]:
    """Those whose other end is not in the tree, if that is not just what a program has closed."""
    ends = list(connections)
    strangers = [ends[at] for at in other_ends.strangers(ends)]
    here = [one for one in strangers if other_ends.on_one_host(one)]
    try:
        obstacles = other_ends.obstacles([(one, connections[one].state) for one in here], pid)
    except OSError:
        obstacles = ["not known"] * len(here)
    closed = {one for one, why in zip(here, obstacles, strict=True) if not why}
    for one in strangers:
        if one not in closed:
            item, local, peer, _ = connections[one]
            yield (
                f"{item}: the connection {addresses.show(local)} to {addresses.show(peer)} would stay behind"
                f" with the address of this host; {_HINT}"
            )


def _partners(unix: Mapping[int, Found], nameless: Collection[int], pid: int) -> Iterator[str]:
    """Connections of unix sockets that lead out of the tree, or to where nobody could connect again."""
    try:
        with entered(f"/proc/{pid}/ns/net"):
            known = diag.unix_sockets_here()
    except FileNotFoundError:
        return  # it ended
    except OSError as error:
        yield f"pid {pid}: the partners of unix sockets cannot be found out: {error}"
        return
    strangers = {}
    for inode, item in unix.items():
        entry = known.get(inode)
        if entry is not None and entry.peer in nameless and known[entry.peer].peer != inode:
            yield f"{item}: a datagram socket connected one way to one without a name cannot be carried"
        if entry is None or entry.peer in (-1, 0) or entry.peer in unix:
            continue
        strangers[f"socket:[{entry.peer}]"] = item
    if strangers:
        holders = {link: pid for pid, link in open_elsewhere(()) if link in strangers}
        for link, item in strangers.items():
            who = f"pid {holders[link]}" if link in holders else "somebody"
            yield (
                f"{item}: a unix socket whose other end is held by {who}, outside of the tree; save that"
                " process along, or have it disconnected first"
            )
