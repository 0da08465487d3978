"""init: making hosts a fleet, by one command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from migrator.cli import interrupts
from migrator.cli.fleet import StoreUrl, labels_of
from migrator.cli.output import err, out, reported
from migrator.errors import MigratorError
from migrator.fleet import enrol, membership
from migrator.host import Login
from migrator.text import size
from transport import keys

_KEY = Path("~/.config/migrator/controller_key")


def init(
    hosts: Annotated[list[str], typer.Argument(metavar="[USER@]HOST", help="As ssh reaches it, without a password.")],
    key: Annotated[Path, typer.Option(metavar="FILE", help="The controller's key; made if missing.")] = _KEY,
    ca: Annotated[
        Path | None,
        typer.Option("--ca", metavar="FILE", help="A fleet CA, made if missing: host keys get certificates."),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the agents.")] = enrol.AGENT_PORT,
    source: Annotated[
        list[str] | None, typer.Option(metavar="NETWORK", help="Where members may come from; their addresses, if not.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Of all of them; repeatable.")] = None,
    store: StoreUrl = "",
) -> None:
    """Make hosts a fleet: keys and rights on each, who the others are, and their names in the fleet's state.

    Over an ordinary ssh that can log in already, also to the hosts that are of the fleet. Done again, it adds what is
    new and changes nothing else.
    """
    with reported():
        targets = [enrol.Target.parse(host, port) for host in hosts]
        labels = labels_of(label or [])
        path = key.expanduser()

        async def work() -> None:
            line = enrol.controller_key(path)
            authority = keys.ensure_key(ca.expanduser(), "migrator fleet CA") if ca is not None else None
            known = keys.default_known_hosts()[0]
            async with membership.opened(store, Login()) as fleet:
                hosts = {name: one.record for name, one in (await fleet.state.hosts.all()).items()}
            others = {name: enrol.Target(one.address, agent_port=one.port) for name, one in hosts.items()}
            try:
                done = await enrol.enrol(
                    targets, others=list(others.values()), controllers=[line], sources=source or (), ca=authority
                )
            except enrol.EnrolFailed as error:
                if gone := [name for name, one in others.items() if f"{one.host}:" in error.message]:
                    error.hint = f"{error.hint} If {', '.join(gone)} is gone: migrator leave {gone[0]}"
                raise
            _merge(known, done.known_hosts)
            for member in done.members:
                out.say("[green]{}[/] has its keys, and knows the others", member.name)
            login = Login(identity=path, known_hosts=known)
            async with membership.opened(store, login) as fleet:
                for target in targets:
                    await _join(fleet, f"{target.host}:{port}", labels)
            out.say("use it with: [bold]export MIGRATOR_IDENTITY={}[/]", path)

        interrupts.run(lambda _: work())


async def _join(fleet: membership.Fleet, address: str, labels: dict[str, str]) -> None:
    try:
        host = await membership.join(fleet, address, labels=labels)
    except MigratorError as error:
        err.say("[yellow]note:[/] the agent at {} does not answer yet: {}", address, error.message)
        err.say("  [dim]do:[/] start it there (systemctl enable --now migrator-agent), then: migrator join {}", address)
        return
    out.say("[green]{}[/] is of the fleet: {} cores, {}", host.name, host.cpus, size(host.memory_bytes))


def _merge(path: Path, block: str) -> None:
    """Put the fleet's hosts into our known hosts; the file is the old one or the new one at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_text() if path.exists() else ""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(enrol.merge(old, block.splitlines()))
    os.replace(new, path)
