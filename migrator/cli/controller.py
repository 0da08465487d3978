"""controller: balances a fleet and empties hosts."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from typing import Annotated

import typer

from migrator.cli.fleet import StoreUrl
from migrator.cli.output import log_to_stderr, reported
from migrator.cli.parameters import logs_in
from migrator.host import Login


@logs_in(unattended=True)
def controller(
    login: Login,
    name: Annotated[str, typer.Option(help="Who leads, for the others; this host's name and the pid, if not.")] = "",
    ttl: Annotated[
        float, typer.Option(min=2.0, max=300.0, help="Seconds after its death until another may lead.")
    ] = 10.0,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log every step.")] = False,
    store: StoreUrl = "",
) -> None:
    """Observe the fleet, plan, move, and check what came of it. Of several on one store, one leads.

    It does what `migrator balance --mode` says, and the drains and plans that others have asked for.
    """
    log_to_stderr(logging.DEBUG if verbose else logging.INFO, "%(asctime)s %(name)s %(message)s")
    with reported():
        asyncio.run(_run(login, name or f"{os.uname().nodename}:{os.getpid()}", ttl, store))


async def _run(login: Login, name: str, ttl: float, store: str) -> None:
    from migrator.fleet.controller import Controller
    from migrator.fleet.membership import opened
    from migrator.runtime.service import notify, watchdog

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with watchdog(), opened(store, login) as fleet:
        running = asyncio.create_task(Controller(fleet, name=name, ttl=ttl).run())
        stopping = asyncio.create_task(stop.wait())
        notify("READY=1")
        await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
        notify("STOPPING=1")
        stopping.cancel()
        if running.done():
            running.result()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
