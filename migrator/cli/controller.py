"""controller: balances a fleet and empties hosts."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Annotated

import typer

from migrator.cli.fleet import StoreUrl
from migrator.cli.output import log_to_stderr, reported
from migrator.cli.parameters import logs_in
from migrator.fleet.daemon import ControllerSettings, run_controller
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
        asyncio.run(
            run_controller(ControllerSettings(name or f"{os.uname().nodename}:{os.getpid()}", login, store, ttl))
        )
