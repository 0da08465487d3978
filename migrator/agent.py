"""The agent: takes workloads in, over its own SSH server or over standard input and output.

Whatever an earlier agent left unfinished is settled before anybody is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from dataclasses import dataclass, field
from pathlib import Path

from migrator import host, model
from migrator.api.recovery import settle
from migrator.errors import Fate, TransportError
from migrator.fleet.fencing import fence_directory
from migrator.fleet.host_report import Capacity
from migrator.fleet.service import FleetService
from migrator.fleet.storage import DEFAULT_STORAGE
from migrator.recovery.journal import journal_directory
from migrator.runtime.service import notify, watchdog
from migrator.session.serve import serve as serve_link
from transport import daemon, wire
from transport.link import Link

log = logging.getLogger("migrator.agent")

_LINGER = 5.0  # seconds
_SETTLE_EVERY = 10.0  # seconds between attempts while something awaits its peer
_LOOK_EVERY = 60.0  # and else, for what another program of this host has left


@dataclass(frozen=True)
class AgentSettings:
    """Where it listens, who may come, and where it shows its metrics ("" for nowhere).

    capacity:  what of this host is for workloads; None for all of it
    storage:   where checkpoints go that a controller wants
    engine:    the name of the one that restarts what comes; "" for the one that has saved it, where it works here
    """

    listen_host: str
    listen_port: int
    host_key: Path
    authorized_keys: Path
    metrics: str = ""
    bridge: str = ""
    login: host.Login = field(default_factory=host.Login)
    capacity: Capacity | None = None
    storage: Path = DEFAULT_STORAGE
    engine: str = ""


async def run_daemon(settings: AgentSettings) -> None:
    """Serve until SIGTERM or SIGINT. Copies that run are not touched by its end. Raises UsageError where it could
    only restore wrongly."""
    host.check_mounts()
    host.give_up_capabilities()  # ahead of the first thread
    host.load()
    on_event = _metrics(settings.metrics) if settings.metrics else model.nobody
    journal = journal_directory()
    open_ones = await _settle(settings.login)
    here = host.destination_settings(settings.engine, bridge=settings.bridge, journal=journal)

    service = FleetService(
        here.host,
        settings.login,
        capacity=settings.capacity,
        fences=fence_directory(),
        storage=settings.storage,
        bridge=settings.bridge,
    )

    async def handler(link: Link, peer: str, rights: frozenset[str]) -> None:
        await serve_link(link, here, rights=rights, requests=service.answers, on_event=on_event)
        await _linger(link)

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGCHLD, host.reap)
    async with (
        watchdog(),
        await daemon.serve(
            settings.listen_host,
            settings.listen_port,
            host_keys=[settings.host_key],
            authorized_keys=settings.authorized_keys,
            handler=handler,
        ) as server,
    ):
        log.info("listening on %s:%d", settings.listen_host, server.port)
        notify("READY=1")
        while not stop.is_set():
            try:
                await asyncio.wait_for(stop.wait(), _SETTLE_EVERY if open_ones else _LOOK_EVERY)
            except TimeoutError:
                open_ones = await _settle(settings.login)
        notify("STOPPING=1")
        await service.departures.close()


async def run_stdio(bridge: str = "", engine: str = "") -> None:
    """Serve one link on standard input and output, as started by another host over SSH."""
    link = await wire.stdio_link()
    login = host.Login()
    await _settle(login)
    here = host.destination_settings(engine, bridge=bridge)
    service = FleetService(here.host, login, fences=fence_directory(), bridge=bridge)
    await serve_link(link, here, requests=service.answers)
    await service.departures.close()
    await link.close()


async def _linger(link: Link) -> None:
    """Leave the end to the peer: a link that we close may lose our last words on the way."""
    with contextlib.suppress(TransportError, TimeoutError):
        async with asyncio.timeout(_LINGER):
            while True:
                await link.receive()


async def _settle(login: host.Login) -> bool:
    """Settle what is open; whether something still is."""
    settled = (await settle(login=login)).settled
    for one in settled:
        log.warning("migration %s, as its %s: %s", one.migration, one.role.value, one.detail)
    return any(one.fate is Fate.FROZEN for one in settled)


def _metrics(address: str) -> model.OnEvent:
    from migrator.metrics import serve_metrics

    return serve_metrics(address)
