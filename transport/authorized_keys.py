"""The agent's authorized_keys file: which key may do what, from where, and until when.

The format is that of sshd(8), one key a line. These options count, their names in any case:

    migrator-rights="receive,observe"   what the key may do; without it, everything
    from="10.0.0.0/8,!10.0.0.1"         addresses and patterns of addresses that it may come from
    expiry-time="20271231[235959][Z]"   the last moment at which it may log in
    restrict                            nothing but what migrator-rights gives

no-pty and its like forbid what an agent never does, and change nothing. A line that has any other
option, or anything else that is not understood, is void: a restriction that we cannot keep must
not become a permission. `@revoked` before a key refuses it wherever else the file has it.
"""

from __future__ import annotations

import fnmatch
import ipaddress
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from migrator.errors import TransportError
from transport.library import asyncssh
from transport.strict_modes import read_strictly

log = logging.getLogger("migrator.transport")

RIGHTS = frozenset({"receive", "send", "observe"})
"""receive: bring workloads here; send: have workloads sent away from here; observe: look only."""
MAX_BYTES = 1 << 20  # of the file

_NEVER_GIVEN = frozenset({"no-agent-forwarding", "no-port-forwarding", "no-pty", "no-user-rc", "no-x11-forwarding"})
# Possessive: a backslash before the last quote keeps the text open, as in sshd.
_OPTION = re.compile(r'([A-Za-z0-9-]+)(?:="((?:\\"|[^"])*+)")?')
_REVOKED = "@revoked"
_EXPIRY = re.compile(r"([0-9]{8}|[0-9]{12}|[0-9]{14})(Z?)")
_FORMATS = {8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}
_NETWORK = re.compile(r"[0-9A-Fa-f.:]+(/[0-9]{1,3})?")
_WILDCARD = re.compile(r"\*|[0-9.*?]*\.[0-9.*?]*|[0-9A-Fa-f:*?]*:[0-9A-Fa-f:*?]*")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Void(ValueError):
    """Why a line does not count."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line that is understood. `expires` is in seconds since the epoch."""

    key: asyncssh.SSHKey
    rights: frozenset[str] = RIGHTS
    sources: Sequence[tuple[bool, Callable[[Address], bool]]] | None = None  # whether it is negated, whom it means
    expires: float | None = None

    def admits(self, address: Address | None, now: float) -> bool:
        if self.expires is not None and now > self.expires:
            return False
        if self.sources is None:
            return True
        if address is None or any(negated and means(address) for negated, means in self.sources):
            return False
        return any(not negated and means(address) for negated, means in self.sources)


@dataclass(frozen=True, slots=True)
class AuthorizedKeys:
    """What a file says. `void` has the lines that do not count, by number from 1, and why."""

    entries: Sequence[Entry]
    revoked: Sequence[asyncssh.SSHKey]
    void: Mapping[int, str]

    def rights(self, key: asyncssh.SSHKey, addr: str, now: float) -> frozenset[str]:
        """What `key` may do at the time `now` when it comes from the address `addr`; nothing, if it may not come."""
        if key in self.revoked:
            return frozenset()
        address = _address(addr)
        for entry in self.entries:
            if entry.key == key and entry.admits(address, now):
                return entry.rights
        return frozenset()


def parse(text: str) -> AuthorizedKeys:
    """Read the text of a file.

    Raises `TransportError` for a `@revoked` line that is not understood: to go on without it might
    be to let in a key that it revokes. All other such lines are void.
    """
    entries: list[Entry] = []
    revoked: list[asyncssh.SSHKey] = []
    void: dict[int, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip(" \t\r")
        if not line or line.startswith("#"):
            continue
        marked = line.lower().startswith(_REVOKED)
        try:
            if marked:
                revoked.append(_key(line[len(_REVOKED) :].strip(" \t")))
            else:
                entries.append(_entry(line))
        except Void as error:
            if marked:
                raise TransportError(f"line {number} revokes a key, but which? {error}") from None
            void[number] = str(error)
    return AuthorizedKeys(entries, revoked, void)


class KeyFile:
    """A file that is read anew for every login, so that a change takes effect at once.

    What is wrong with it is logged when it is first seen, not at every login.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._content: bytes | None = None
        self._parsed = AuthorizedKeys((), (), {})
        self._complaint = ""

    def rights(self, key: asyncssh.SSHKey, addr: str) -> frozenset[str]:
        """What `key` may do that comes from the address `addr`. A file that cannot be used lets nobody in."""
        try:
            self._read()
        except (OSError, TransportError) as error:
            self._content, self._parsed = None, AuthorizedKeys((), (), {})
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.error("nobody can log in: %s: %s", self._path, error)
        return self._parsed.rights(key, addr, time.time())

    def _read(self) -> None:
        content = read_strictly(self._path, MAX_BYTES)
        if content == self._content:
            return
        self._parsed = parse(content.decode("utf-8", "replace"))
        self._content = content
        self._complaint = ""
        for number, reason in self._parsed.void.items():
            log.warning("%s:%d: this line lets nobody in: %s", self._path, number, reason)


def _entry(line: str) -> Entry:
    try:
        return Entry(_key(line))
    except Void:
        options, rest = _options(line)
        return _restricted(_key(rest), options)


def _key(text: str) -> asyncssh.SSHKey:
    """`ssh-ed25519 AAAA… comment`"""
    words = re.split(r"[ \t]+", text, maxsplit=2)
    try:
        key = asyncssh.import_public_key(" ".join(words[:2]))
    except (asyncssh.KeyImportError, ValueError) as error:
        raise Void(f"there is no public key where one is due: {error}") from None
    if key.get_algorithm() != words[0]:
        raise Void(f"the key is of the type {key.get_algorithm()}, not {words[0][:40]!r}")
    return key


def _options(line: str) -> tuple[dict[str, str | None], str]:
    """The options by their names in small letters, and the rest of the line."""
    found: dict[str, str | None] = {}
    at = 0
    while option := _OPTION.match(line, at):
        name = option[1].lower()
        if name in found:
            raise Void(f"the option {name} is there twice")
        found[name] = option[2].replace('\\"', '"') if option[2] is not None else None
        at = option.end()
        if line[at : at + 1] in (" ", "\t"):
            return found, line[at:].lstrip(" \t")
        if line[at : at + 1] != ",":
            break
        at += 1
    raise Void(f"neither a key nor options: {line[at : at + 40]!r}")


def _restricted(key: asyncssh.SSHKey, options: Mapping[str, str | None]) -> Entry:
    rights, sources, expires = RIGHTS, None, None
    for name, value in options.items():
        if name in ("migrator-rights", "from", "expiry-time"):
            if value is None:
                raise Void(f"the option {name} has no value in double quotes")
            if name == "migrator-rights":
                rights = _rights(value)
            elif name == "from":
                sources = [_source(item) for item in value.split(",")]
            else:
                expires = _expiry(value)
        elif name not in _NEVER_GIVEN and name != "restrict":
            raise Void(f"the option {name[:40]} cannot be honoured here")
        elif value is not None:
            raise Void(f"the option {name} takes no value")
    if "restrict" in options and "migrator-rights" not in options:
        raise Void('restrict leaves it no right; give some with migrator-rights="…"')
    return Entry(key, rights, sources, expires)


def _rights(value: str) -> frozenset[str]:
    words = frozenset(word.strip(" ") for word in value.split(","))
    if not words <= RIGHTS:
        raise Void(f"no such right: {min(words - RIGHTS)[:40]!r}; there are {', '.join(sorted(RIGHTS))}")
    return words


def _source(item: str) -> tuple[bool, Callable[[Address], bool]]:
    """One element of from=: an address, a network, or an address with * and ?; `!` negates it.

    Names of hosts are not understood: we do not ask the name service who somebody is.
    """
    negated = item.startswith("!")
    text = item[negated:]
    if "*" in text or "?" in text:
        if not _WILDCARD.fullmatch(text):
            raise Void(f"{item[:60]!r} in from= is no pattern of addresses")
        return negated, lambda address: fnmatch.fnmatchcase(str(address), text.lower())
    try:
        if not _NETWORK.fullmatch(text):
            raise ValueError
        network = ipaddress.ip_network(text)
    except ValueError:
        raise Void(f"{item[:60]!r} in from= is neither an address nor a network") from None
    return negated, lambda address: address in network


def _expiry(value: str) -> float:
    """Seconds since the epoch. Local time, unless it ends with Z."""
    match = _EXPIRY.fullmatch(value)
    try:
        if match is None:
            raise ValueError
        when = datetime.strptime(match[1], _FORMATS[len(match[1])])
        return (when.replace(tzinfo=UTC) if match[2] else when).timestamp()
    except (ValueError, OverflowError, OSError):
        raise Void(
            f"{value[:40]!r} is no time as YYYYMMDD, YYYYMMDDHHMM or YYYYMMDDHHMMSS, with or without Z"
        ) from None


def _address(addr: str) -> Address | None:
    """None for what is no address; it matches no `from`."""
    try:
        address = ipaddress.ip_address(addr.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
