"""What a container is: everything that a host needs to build the same sandbox again.

A specification travels in the image as JSON, so it is read as hostile: `from_json` checks every field
before anything is done with it.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from migrator.container import sysctls
from migrator.errors import UsageError

DEFAULT_BRIDGE = "migrator0"
NEIGHBOURS = 1024
IFNAMSIZ = 15  # characters, without the NUL
DEFAULT_ENV = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "container": "migrator",
}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_HOSTNAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,62}[A-Za-z0-9_])?")
_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")
_DEVICE = re.compile(r"[^\s/:]{1,15}")
_OPTIONS = re.compile(r"[a-z_]+(=[A-Za-z0-9%:]+)?(,[a-z_]+(=[A-Za-z0-9%:]+)?)*")


@dataclass(frozen=True, slots=True)
class Route:
    """`destination` is "default" or a prefix; `gateway` "" means on the link. The device is always eth0."""

    destination: str
    gateway: str = ""
    metric: int = 0
    source: str = ""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A peer on the link whose hardware address is known, so that the copy need not ask for it first."""

    address: str
    mac: str


@dataclass(frozen=True, slots=True)
class Tmpfs:
    """A tmpfs of the container's own. `options` as in mount(8), such as "size=64m,mode=1777"."""

    path: str
    options: str = "mode=1777"


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """The container `name`, as asked for or as it is now (`migrator.container.describe`).

    argv:      the command, run as process 1
    env:       the whole environment beyond DEFAULT_ENV
    cwd:       its working directory
    hostname:  "" for the container's name
    root:      a directory to use as root, the same path on every host; "" for the host's own
    bridge:    the bridge that its network is attached to; "" for no network but loopback
    mac:       of eth0; "" for the one derived from the name
    addresses: ADDRESS/LENGTH on eth0, IPv4 and IPv6
    loopback:  more addresses on lo, beside 127.0.0.1 and ::1
    neighbours: what eth0 knows about its link, at most NEIGHBOURS entries
    mtu:       of eth0, bytes; 0 for the bridge's
    sysctls:   of its own namespaces, by name below /proc/sys, where not as in new ones
    log:       the regular file that gets stdout and stderr, a path inside the container
    """

    name: str
    argv: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    cwd: str = "/"
    hostname: str = ""
    root: str = ""
    bridge: str = DEFAULT_BRIDGE
    mac: str = ""
    addresses: tuple[str, ...] = ()
    loopback: tuple[str, ...] = ()
    routes: tuple[Route, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    mtu: int = 0
    tmpfs: tuple[Tmpfs, ...] = ()
    log: str = ""
    sysctls: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def effective_hostname(self) -> str:
        return self.hostname or self.name

    @property
    def effective_mac(self) -> str:
        return self.mac or mac_of(self.name)

    @property
    def effective_log(self) -> str:
        return self.log or f"{os.environ.get('MIGRATOR_LOG_DIR', '/var/log/migrator')}/{self.name}.log"

    @property
    def veth(self) -> str:
        return veth_of(self.name)

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ContainerSpec:
        """Raises UsageError for anything that `to_json` would not have written. Unknown fields are refused:
        a newer writer's container is not rebuilt by halves."""
        try:
            value = json.loads(text)
        except ValueError as error:
            raise UsageError(f"container specification is not JSON: {error}") from None
        return cls.from_dict(value)

    @classmethod
    def from_dict(cls, value: Any) -> ContainerSpec:
        given = _fields_of(cls, value, "container specification")
        try:
            given["routes"] = tuple(Route(**_fields_of(Route, r, "route")) for r in _list(given, "routes"))
            given["neighbours"] = tuple(
                Neighbour(**_fields_of(Neighbour, n, "neighbour")) for n in _list(given, "neighbours")
            )
            given["tmpfs"] = tuple(Tmpfs(**_fields_of(Tmpfs, t, "tmpfs")) for t in _list(given, "tmpfs"))
            for key in ("argv", "addresses", "loopback"):
                given[key] = tuple(_list(given, key))
            return cls(**given)
        except TypeError as error:  # a field that has no default is missing
            raise UsageError(f"container specification: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def mac_of(name: str) -> str:
    """A locally administered unicast address that is the same for a name on every host."""
    digest = hashlib.sha256(b"migrator mac " + name.encode()).digest()
    return ":".join(f"{octet:02x}" for octet in (0x02, *digest[:5]))


def veth_of(name: str) -> str:
    """The name of the host's end of a container's veth pair, at most 15 characters."""
    plain = f"ve-{name}"
    if len(plain) <= IFNAMSIZ:
        return plain
    return f"ve-{name[:5]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def spec_for(
    name: str,
    argv: list[str],
    *,
    bridge: str | None = None,
    ip: list[str] | None = None,
    gateway: str = "",
    hostname: str = "",
    root: str = "",
    env: list[str] | None = None,
    tmpfs: list[str] | None = None,
    cwd: str = "/",
) -> ContainerSpec:
    """The specification that the options of `migrator run` mean. `env` has KEY=VALUE, `tmpfs` has
    PATH[:OPTIONS]. Raises UsageError."""
    pairs = {}
    for item in env or []:
        key, equals, value = item.partition("=")
        if not equals:
            if key not in os.environ:
                raise UsageError(f"there is no environment variable {key!r} to pass on", hint="KEY=VALUE gives it one")
            value = os.environ[key]
        pairs[key] = value
    mounts = []
    for item in tmpfs or []:
        path, _, options = item.partition(":")
        mounts.append(Tmpfs(path, options or "mode=1777"))
    if not argv:
        raise UsageError("no command to run", hint="migrator run --name NAME -- COMMAND ARGUMENTS…")
    if root and not os.path.isdir(root):
        raise UsageError(f"{root} is no directory", hint="--root names the directory that is to be its root")
    if bridge == "" and (ip or gateway):
        raise UsageError(
            f"{ip[0] if ip else gateway} would be on no network",
            hint="--ip and --gateway take a bridge; with --bridge '' there is only the loopback device",
        )
    return ContainerSpec(
        name=name,
        argv=tuple(argv),
        env=pairs,
        cwd=cwd,
        hostname=hostname,
        root=os.path.realpath(root) if root else "",
        bridge=DEFAULT_BRIDGE if bridge is None else bridge,
        addresses=tuple(ip or ()),
        routes=(Route("default", gateway),) if gateway else (),
        tmpfs=tuple(mounts),
    )


def _fields_of(kind: type, value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{what}: an object is expected")
    known = {f.name for f in fields(kind)}
    if unknown := set(value) - known:
        raise UsageError(
            f"{what}: unknown field {sorted(map(str, unknown))[0]!r}",
            hint="it was written by a newer migrator",
        )
    return dict(value)


def _list(given: dict[str, Any], key: str) -> list[Any]:
    value = given.get(key, [])
    if not isinstance(value, list | tuple):
        raise UsageError(f"container specification: {key}: a list is expected")
    return list(value)


_WANTED = {
    "name": "letters, digits, _, . and -, beginning with a letter or digit, at most 63",
    "hostname": "letters, digits, _, . and -, at most 64",
    "address": "ADDRESS/LENGTH, such as 10.0.0.50/24 or fd00::50/64",
    "gateway": "an address, such as 10.0.0.1",
    "path": "an absolute path, without ..",
    "options": "as in mount(8), such as size=64m,mode=1777",
}


def _need(condition: bool, what: str, value: object) -> None:
    if not condition:
        raise UsageError(f"container specification: bad {what}: {value!r}", hint=_WANTED.get(what, ""))


def _check(spec: ContainerSpec) -> None:
    _need(isinstance(spec.env, dict), "environment", spec.env)
    texts = [spec.name, spec.cwd, spec.hostname, spec.root, spec.bridge, spec.mac, spec.log]
    texts += [*spec.argv, *spec.addresses, *spec.loopback, *spec.env.keys(), *spec.env.values()]
    texts += [t for r in spec.routes for t in (r.destination, r.gateway, r.source)]
    texts += [t for m in spec.tmpfs for t in (m.path, m.options)]
    texts += [t for n in spec.neighbours for t in (n.address, n.mac)]
    for text in texts:
        _need(isinstance(text, str) and "\0" not in text, "text", text)
    _need(_NAME.fullmatch(spec.name) is not None, "name", spec.name)
    _need(not spec.hostname or _HOSTNAME.fullmatch(spec.hostname) is not None, "hostname", spec.hostname)
    _need(not spec.mac or _MAC.fullmatch(spec.mac) is not None, "MAC address", spec.mac)
    _need(not spec.mac or not int(spec.mac[:2], 16) & 1, "MAC address (not unicast)", spec.mac)
    _need(not spec.bridge or _DEVICE.fullmatch(spec.bridge) is not None, "bridge", spec.bridge)
    _need(isinstance(spec.mtu, int) and (spec.mtu == 0 or 68 <= spec.mtu <= 65535), "mtu", spec.mtu)
    for path in (spec.cwd, *(m.path for m in spec.tmpfs)):
        _need(_is_absolute(path), "path", path)
    for path in (spec.root, spec.log):
        _need(not path or _is_absolute(path), "path", path)
    for key in spec.env:
        _need(bool(key) and "=" not in key, "environment variable", key)
    _need(isinstance(spec.sysctls, dict) and len(spec.sysctls) <= sysctls.MOST, "sysctls", spec.sysctls)
    for name, value in spec.sysctls.items():
        _need(isinstance(name, str) and sysctls.carried(name), "sysctl", name)
        _need(isinstance(value, str) and len(value) <= sysctls.LONGEST and value.isascii(), "value of a sysctl", name)
        _need("\0" not in value and "\n" not in value, "value of a sysctl", name)
    for mount in spec.tmpfs:
        _need(not mount.options or _OPTIONS.fullmatch(mount.options) is not None, "options", mount.options)
    for address in (*spec.addresses, *spec.loopback):
        _need(_parses(ipaddress.ip_interface, address) and "/" in address, "address", address)
    for route in spec.routes:
        good = route.destination == "default" or _parses(ipaddress.ip_network, route.destination)
        _need(good, "route", route.destination)
        _need(not route.gateway or _parses(ipaddress.ip_address, route.gateway), "gateway", route.gateway)
        _need(not route.source or _parses(ipaddress.ip_address, route.source), "source", route.source)
        _need(isinstance(route.metric, int) and 0 <= route.metric < 2**32, "metric", route.metric)
    _need(len(spec.neighbours) <= NEIGHBOURS, "number of neighbours", len(spec.neighbours))
    for neighbour in spec.neighbours:
        _need(_parses(ipaddress.ip_address, neighbour.address), "neighbour", neighbour.address)
        _need(_MAC.fullmatch(neighbour.mac) is not None, "neighbour's MAC address", neighbour.mac)


def _is_absolute(path: str) -> bool:
    return path.startswith("/") and ".." not in path.split("/")


def _parses(parse: Any, text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True
