"""agent, settle, keygen: what makes a host one that workloads can come to."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated

import typer

import migrator
from migrator.agent import AgentSettings, run_daemon, run_stdio
from migrator.cli import interrupts
from migrator.cli.output import err, log_to_stderr, out, reported
from migrator.cli.parameters import Address, EngineName, address, logs_in, size
from migrator.errors import Fate, UsageError
from migrator.fleet.host_report import Capacity
from migrator.fleet.storage import DEFAULT_STORAGE
from migrator.host import Login
from transport import keys

_BUSY_SECONDS = 15.0  # an agent that cannot reach the other host gives up before that
_FOLDER = Path("/etc/migrator")
_EVERYWHERE = Address("0.0.0.0", 7022)


@logs_in(unattended=True)
def agent(
    login: Login,
    stdio: Annotated[bool, typer.Option("--stdio", help="Serve one link on standard input and output.")] = False,
    listen: Annotated[
        Address,
        typer.Option(parser=address, metavar="ADDRESS:PORT", show_default="0.0.0.0:7022", help="Of the SSH server."),
    ] = _EVERYWHERE,
    host_key: Annotated[Path, typer.Option(metavar="FILE", help="Private host key; made if missing.")] = (
        _FOLDER / "host_key"
    ),
    authorized_keys: Annotated[Path, typer.Option(metavar="FILE", help="Who may come in.")] = (
        _FOLDER / "authorized_keys"
    ),
    metrics: Annotated[str, typer.Option(metavar="ADDRESS:PORT", help='For Prometheus; "" for none.')] = "",
    bridge: Annotated[str, typer.Option(help="The bridge of this host for containers that arrive.")] = "",
    capacity: Annotated[
        str,
        typer.Option(
            metavar="CPUS,SIZE",
            show_default="all of the host",
            help="What is for workloads, as 4,16GiB: then only what they use is its load.",
        ),
    ] = "",
    storage: Annotated[Path, typer.Option(metavar="DIR", help="Where checkpoints go that a controller wants.")] = (
        DEFAULT_STORAGE
    ),
    engine: EngineName = "",
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log every step.")] = False,
) -> None:
    """Serve other hosts. Settles first what an agent that died has left."""
    log_to_stderr(logging.DEBUG if verbose else logging.INFO, "%(asctime)s %(name)s %(message)s")
    with reported():
        if stdio:
            asyncio.run(run_stdio(bridge, engine))
            return
        settings = AgentSettings(
            listen.host,
            listen.port,
            host_key,
            authorized_keys,
            metrics,
            bridge,
            login,
            _capacity(capacity) if capacity else None,
            storage,
            engine,
        )
        asyncio.run(run_daemon(settings))


def _capacity(text: str) -> Capacity:
    cpus, comma, memory = text.partition(",")
    try:
        return Capacity.parse(float(cpus), size(memory if comma else ""))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no CPUS,SIZE: such as 4,16GiB") from None


@logs_in(unattended=True)
def settle(
    login: Login,
    migration: Annotated[str, typer.Argument(help="One that awaits a decision; all, if not given.")] = "",
    here: Annotated[bool, typer.Option("--here", help="Let it run here: it does not and will not run there.")] = False,
    away: Annotated[bool, typer.Option("--away", help="Kill it here: it runs there.")] = False,
) -> None:
    """Finish or undo migrations whose agent died, or decide one whose other side cannot be reached."""
    with reported():
        if here and away:
            raise UsageError("--here and --away exclude one another")
        if here or away:
            if not migration:
                raise UsageError("which migration?", hint="`migrator settle` lists those that are open")
            fate = interrupts.run(lambda _: migrator.decide(migration, here=here))
            out.say("migration {}: {}", migration, fate.value)
            return
        found = interrupts.run(lambda _: migrator.settle(login=login, wait=_BUSY_SECONDS))
        for busy in found.busy:
            out.say("migration {} is under way, or being settled by the agent: see its log", busy)
        if migration and migration not in [*found.busy, *(one.migration for one in found.settled)]:
            raise UsageError(
                f"migration {migration!r} is not open on this host", hint="`migrator settle` lists those that are"
            )
        for one in found.settled:
            out.say("migration {}, as its {}: {}", one.migration, one.role.value, one.detail)
        if not found.settled and not found.busy:
            out.say("nothing is open")
        if any(one.fate is Fate.FROZEN for one in found.settled):
            raise typer.Exit(9)


def keygen(
    path: Annotated[Path, typer.Argument(help="Where the private key goes; made if missing.")] = _FOLDER / "host_key",
) -> None:
    """Make a key, and print its public line and fingerprint."""
    with reported():
        key = keys.ensure_key(path)
        out.say("{}", keys.public_line(key))
        err.say("{}", keys.fingerprint(key))
