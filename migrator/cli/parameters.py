"""Types of parameters, and the options that several commands share."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

_PORT = re.compile(r"[0-9]{1,5}")
_DURATION = re.compile(r"([0-9]*\.?[0-9]+)\s*(us|ms|s|m|h|)")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}
_SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*([kKMGT]?)(i?)B?(/s)?")


def seconds(text: str | float) -> float:
    """Of "250ms", "2s", "10m", "1h" or a plain number of seconds. A number, as of a default, stays itself."""
    if not isinstance(text, str):
        return text
    found = _DURATION.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no duration: such as 20ms, 1.5s, 10m")
    return float(found[1]) * _SECONDS[found[2]]


def size(text: str | float) -> float:
    """Bytes of "50MB", "1GiB", "800k" or a plain number; "/s" may follow."""
    if not isinstance(text, str):
        return text
    found = _SIZE.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no number of bytes: such as 50MB or 1GiB")
    power = " kMGT".index(found[2].replace("K", "k") or " ")
    return float(found[1]) * float(1024 if found[3] else 1000) ** power


@dataclass(frozen=True)
class Address:
    host: str
    port: int


def address(text: str | Address) -> Address:
    """Of "ADDRESS:PORT" or "[ADDRESS]:PORT"."""
    if not isinstance(text, str):
        return text
    host, colon, port = text.rpartition(":")
    if not colon or not _PORT.fullmatch(port) or int(port) > 65535:
        raise typer.BadParameter(f"{text!r} is no ADDRESS:PORT")
    return Address(host.strip("[]"), int(port))


def _workloads(incomplete: str) -> list[str]:
    """For the completion of a shell: the containers of this host."""
    from migrator.api import containers

    return [name for name in containers.names() if name.startswith(incomplete)]


Target = Annotated[
    str,
    typer.Argument(
        metavar="PID|NAME", help="Root of a process tree, or a container's name.", autocompletion=_workloads
    ),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A container of this host.", autocompletion=_workloads)]
EngineName = Annotated[
    str, typer.Option("--engine", metavar="NAME", help="user or kernel; the first that carries it, if not told.")
]
Peer = Annotated[str, typer.Argument(metavar="[USER@]HOST[:PORT]", help="The other host: any sshd, or an agent.")]
AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON on standard output.")]
CopyFiles = Annotated[bool, typer.Option("--copy-files", help="Carry along files that differ or lack there.")]
CopyPath = Annotated[
    list[str] | None,
    typer.Option(metavar="PATH", help="Carry along this file, or all below this directory; may be repeated."),
]

_Identity = Annotated[
    Path | None,
    typer.Option("-i", "--identity", metavar="FILE", envvar="MIGRATOR_IDENTITY", help="Private key to log in with."),
]
_KnownHosts = Annotated[
    Path | None,
    typer.Option(
        "--known-hosts",
        metavar="FILE",
        envvar="MIGRATOR_KNOWN_HOSTS",
        help="File of host keys; those of ssh by default.",
    ),
]
_AcceptNew = Annotated[bool, typer.Option("--accept-new-host-key", help="Pin the key of a host never seen before.")]
_RemoteCommand = Annotated[
    str | None,
    typer.Option("--remote-command", metavar="CMD", help="What starts migrator there, over a plain sshd."),
]
_FILES = (("identity", _Identity, None), ("known_hosts", _KnownHosts, None))
_MORE = (("accept_new_host_key", _AcceptNew, False), ("command", _RemoteCommand, None))


def logs_in(*, unattended: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For a command that takes `login: Login`: it gets the options that make one. `unattended`: only those that
    need nobody to look at a host key."""
    options = _FILES if unattended else _FILES + _MORE

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def with_login(**given: Any) -> None:
            from migrator.host import Login

            login = {name: given.pop(name) for name, _, _ in options}
            return command(**given, login=Login(**{name: value for name, value in login.items() if value}))

        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "login"]
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, kind, default in options
        ]
        named = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        with_login.__name__, with_login.__doc__ = command.__name__, command.__doc__
        with_login.__signature__ = inspect.Signature([*named, *more])  # type: ignore[attr-defined]
        with_login.__annotations__ = {p.name: p.annotation for p in [*named, *more]}
        return with_login

    return decorate
