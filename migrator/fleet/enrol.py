"""Making hosts a fleet: who may come in, and who the others are, on every host at once.

    report = await enrol([Target.parse("root@10.0.0.1"), Target.parse("root@10.0.0.2")], controller=key_line)

Each host makes its own two keys (`migrator keygen`: its agent's host key and root's own); private keys never leave
it. What travels are their public lines, over an ordinary ssh that can log in already. Every host gets the others in its
`authorized_keys`, with rights and the addresses that they may come from, and in root's pinned known hosts. A controller
gets the rights to look and to send away.

In both files we own the lines between our two marks, and touch no other. So enrolling again, with more or fewer
hosts, is how members are added and taken out.

With a fleet CA, each host key gets a certificate, and a single line makes all of them known: a host that joins later
changes nothing on the others but who may come in. Keys of logins have no certificates: rights, and the taking away of
them, belong to one key each.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import shlex
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from migrator.errors import MigratorError, TransportError, UsageError
from transport import keys
from transport.library import asyncssh

T = TypeVar("T")

AGENT_PORT = 7022
HOST_RIGHTS = ("receive",)
CONTROLLER_RIGHTS = ("observe", "send")

_TARGET = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9._-]*)@)?(?P<host>[A-Za-z0-9][A-Za-z0-9.:_-]*|\[[0-9A-Fa-f:.]+\])"
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_AT_ONCE = 20  # hosts
_WITHIN = 60.0  # seconds for one command on one host
_MAX_ANSWER = 4 << 20  # bytes
_MARKS = "# migrator fleet: {} (do not edit between these lines)"


class EnrolFailed(MigratorError):
    """Some hosts could not be reached or changed. `done` have been; enrolling again brings the rest."""

    exit_code = 7

    def __init__(self, message: str, *, done: Sequence[str] = (), hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.done = tuple(done)


@dataclass(frozen=True, slots=True)
class Target:
    """A host to enrol: how ssh reaches it, and how the others reach its agent."""

    host: str
    user: str = "root"
    agent_port: int = AGENT_PORT

    @classmethod
    def parse(cls, text: str, agent_port: int = AGENT_PORT) -> Target:
        """`[USER@]HOST`; ssh's own configuration has its port and the rest. Raises UsageError."""
        match = _TARGET.fullmatch(text)
        if match is None:
            raise UsageError(f"{text[:80]!r} is no host", hint="such as root@10.0.0.1")
        return cls(match["host"].strip("[]"), match["user"] or "root", agent_port)

    @property
    def login(self) -> str:
        return f"{self.user}@{self.host}"


@dataclass(frozen=True, slots=True)
class Member:
    """A host as the others need to know it. `addresses` are those that it comes from."""

    target: Target
    name: str
    host_key: str
    user_key: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What came of it: every member, and the block of known hosts that this machine needs to reach them."""

    members: tuple[Member, ...]
    known_hosts: str
    certificates: dict[str, str] = field(default_factory=dict)


# Runs a shell script on a host, with that standard input; gives its output. Raises TransportError.
Run = Callable[[Target, str, bytes], Awaitable[bytes]]


async def enrol(
    targets: Sequence[Target],
    *,
    others: Sequence[Target] = (),
    controllers: Sequence[str] = (),
    sources: Sequence[str] = (),
    ca: asyncssh.SSHKey | None = None,
    run: Run | None = None,
) -> Enrolled:
    """Make the hosts one fleet, with `others` that are of it already.

    controllers: public lines of the controllers' keys
    sources:     addresses or networks that members may come from; those that their names stand for, if not given
    ca:          the fleet's authority, for certificates of host keys; pinned keys without it

    Raises UsageError before anything is changed, EnrolFailed with the hosts that are done.
    """
    if len({target.host for target in targets}) != len(targets) or not targets:
        raise UsageError("name each host once")
    for line in controllers:
        check_public_line(line)
    for source in sources:
        _check_source(source)
    run = run or over_ssh
    everybody = [*targets, *(other for other in others if other.host not in {target.host for target in targets})]
    found = await _each(everybody, lambda target: _meet(target, run, tuple(sources)))
    # One that is of the fleet may have been named otherwise now.
    named = {found[target.host].name for target in targets}
    everybody = [one for one in everybody if one in targets or found[one.host].name not in named]
    members = tuple(found[target.host] for target in everybody)
    check_members(members)
    certificates = {m.target.host: certify(ca, m) for m in members} if ca is not None else {}
    known = known_hosts_lines(members, ca)

    async def bring(target: Target) -> None:
        lines = authorized_keys_lines(target.host, members, controllers)
        await _replace_lines(target, run, '"$etc"/authorized_keys', lines)
        await _replace_lines(target, run, '"$config"/known_hosts', known)
        if certificate := certificates.get(target.host):
            await run(target, _SETUP + 'cat > "$etc/host_key-cert.pub"', certificate.encode() + b"\n")

    await _each(everybody, bring)
    return Enrolled(members, "\n".join(known) + "\n", certificates)


def authorized_keys_lines(host: str, members: Sequence[Member], controllers: Sequence[str]) -> list[str]:
    """Who may come to `host`: the others, to bring workloads, and the controllers, to look and to send away."""
    lines = []
    for member in members:
        if member.target.host != host:
            came_from = f',from="{",".join(member.addresses)}"' if member.addresses else ""
            lines.append(f'migrator-rights="{",".join(HOST_RIGHTS)}"{came_from} {member.user_key}')
    lines += [f'migrator-rights="{",".join(CONTROLLER_RIGHTS)}" {check_public_line(line)}' for line in controllers]
    return lines


def known_hosts_lines(members: Sequence[Member], ca: asyncssh.SSHKey | None) -> list[str]:
    """Who the hosts are: one line for each; and one of the authority for all on its ports, now and later, as its
    certificates name the host. An agent that has not been started since it got one has only its key."""
    lines = []
    if ca is not None:
        ports = sorted({member.target.agent_port for member in members})
        patterns = ",".join(keys.host_pattern("*", port) for port in ports)
        lines.append(f"@cert-authority {patterns} {' '.join(keys.public_line(ca).split()[:2])}")
    return lines + [
        f"{keys.host_pattern(member.target.host, member.target.agent_port)} {' '.join(member.host_key.split()[:2])}"
        for member in members
    ]


def merge(existing: str, lines: Sequence[str]) -> str:
    """A file with our lines replaced by `lines`, and all others as they were, in their order.

    Raises UsageError if our marks are there but do not match: somebody has edited them.
    """
    begin, end = _MARKS.format("begin"), _MARKS.format("end")
    kept, ours, seen = [], False, 0
    for line in existing.split("\n"):
        if line == begin and not ours and not seen:
            ours, seen = True, 1
        elif line == end and ours:
            ours = False
        elif line in (begin, end):
            raise UsageError("the marks of the fleet are out of order", hint="remove them and what is between them")
        elif not ours:
            kept.append(line)
    if ours:
        raise UsageError("the mark of the fleet's end is missing", hint="remove the fleet's lines by hand")
    head = "\n".join(kept).rstrip("\n")
    return "\n".join(([head] if head else []) + [begin, *lines, end]) + "\n"


def certify(ca: asyncssh.SSHKey, member: Member) -> str:
    """A certificate for a member's host key, for the name by which the others reach it."""
    certificate = ca.generate_host_certificate(
        asyncssh.import_public_key(member.host_key), f"migrator host {member.name}", principals=[member.target.host]
    )
    return str(certificate.export_certificate().decode().strip())


def check_members(members: Sequence[Member]) -> None:
    """Raises UsageError for two hosts that are one, or that were copied from one disk with its keys."""
    for what in ("name", "host_key", "user_key"):
        seen: dict[str, str] = {}
        for member in members:
            value = getattr(member, what)
            value = " ".join(value.split()[:2]) if what != "name" else value
            if value in seen:
                label = what.replace("_", " ")
                raise UsageError(
                    f"{seen[value]} and {member.target.host} have the same {label}",
                    hint="are they one host, or one the copy of the other? give the copy keys and a name of its own",
                )
            seen[value] = member.target.host


def check_public_line(line: str) -> str:
    """The line itself, with nothing before its key. Raises UsageError."""
    words = line.split()
    try:
        asyncssh.import_public_key(" ".join(words[:2]))
    except (asyncssh.KeyImportError, ValueError):
        raise UsageError(f"{line[:60]!r} is no public key") from None
    if any(not word.isprintable() for word in words) or "\n" in line.strip():
        raise UsageError("a public key is one line")
    return " ".join(words)


async def over_ssh(target: Target, script: str, stdin: bytes) -> bytes:
    """Run a script by the ssh of this machine, with its configuration, known hosts and agent; never asks anything."""
    command = [
        "ssh",
        "-T",
        "-o",
        "BatchMode=yes",
        "-o",
        "ConnectTimeout=10",
        target.login,
        f"exec sh -c {shlex.quote(script)}",
    ]
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
    except FileNotFoundError:
        raise TransportError("there is no ssh here", hint="install openssh-client") from None
    try:
        async with asyncio.timeout(_WITHIN):
            output, errors = await process.communicate(stdin)
    except TimeoutError:
        raise TransportError(f"{target.host} does not answer within {_WITHIN:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        said = errors.decode(errors="replace").strip().splitlines()
        raise TransportError(
            f"{target.host}: {said[-1][:500] if said else f'exit status {process.returncode}'}",
            hint=f"does `ssh {target.login} migrator ps` work without a password?",
        )
    return output[:_MAX_ANSWER]


_SETUP = """set -eu; umask 077
etc=${MIGRATOR_ETC:-/etc/migrator}; config=${XDG_CONFIG_HOME:-$HOME/.config}/migrator
mkdir -p "$etc" "$config"
"""
_MEET = (
    _SETUP
    + """uname -n
migrator keygen "$etc/host_key" 2>/dev/null
migrator keygen "$HOME/.ssh/id_ed25519" 2>/dev/null
"""
)


_READ = "test ! -e %s || cat %s"
_WRITE = """new=%s.$$; trap 'rm -f "$new"' EXIT
cat > "$new"; sync "$new"; mv -f "$new" %s
"""


async def _replace_lines(target: Target, run: Run, file: str, lines: Sequence[str]) -> None:
    """Merge our lines into a file of a host; it is the old one or the new one at any time (rename(2))."""
    try:
        merged = merge((await run(target, _SETUP + _READ % (file, file), b"")).decode(), lines)
    except (UsageError, UnicodeDecodeError) as error:
        raise TransportError(f"{file} on {target.host} cannot be changed: {error}") from None
    await run(target, _SETUP + _WRITE % (file, file), merged.encode())


async def _meet(target: Target, run: Run, sources: tuple[str, ...]) -> Member:
    output = (await run(target, _MEET, b"")).decode(errors="replace").splitlines()
    if len(output) != 3 or not _NAME.fullmatch(output[0]):
        raise TransportError(
            f"{target.host} does not answer as a host with migrator does", hint="is it installed there?"
        )
    name, host_key, user_key = output
    try:
        lines = check_public_line(host_key), check_public_line(user_key)
    except UsageError as error:
        raise TransportError(f"{target.host} gave no keys: {error.message}") from None
    return Member(target, name, *lines, sources or await _addresses(target.host))


async def _addresses(host: str) -> tuple[str, ...]:
    """The addresses of a host, since an agent asks no name service who somebody is. Raises TransportError."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None)
    except OSError as error:
        raise TransportError(f"cannot find the address of {host}: {error.strerror}") from None
    return tuple(sorted({str(info[4][0]).partition("%")[0] for info in found}))


def _check_source(source: str) -> None:
    try:
        ipaddress.ip_network(source)
    except ValueError as error:
        raise UsageError(f"{source[:60]!r} is neither an address nor a network: {error}") from None


async def _each(targets: Sequence[Target], act: Callable[[Target], Awaitable[T]]) -> dict[str, T]:
    """Act on all hosts, some at once. All are tried; raises EnrolFailed if one has failed."""
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(target: Target) -> T | TransportError:
        async with slots:
            try:
                return await act(target)
            except TransportError as error:
                return error

    results = await asyncio.gather(*(one(target) for target in targets))
    done: dict[str, T] = {}
    failed: list[TransportError] = []
    for target, result in zip(targets, results, strict=True):
        if isinstance(result, TransportError):
            failed.append(result)
        else:
            done[target.host] = result
    if failed:
        raise EnrolFailed("; ".join(error.message for error in failed), done=tuple(done), hint=failed[0].hint)
    return done


def controller_key(path: Path) -> str:
    """The public line of the controller's key, made if it is missing."""
    return keys.public_line(keys.ensure_key(path, "migrator controller"))
