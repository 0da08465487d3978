"""controller: balances a fleet and empties hosts."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from migrator.cli.fleet import PrometheusUrl, StoreUrl
from migrator.cli.output import log_to_stderr, reported
from migrator.cli.parameters import logs_in
from migrator.errors import UsageError
from migrator.fleet.daemon import ControllerSettings, run_controller
from migrator.host import Login


@logs_in(unattended=True)
def controller(
    login: Login,
    name: Annotated[str, typer.Option(help="Who leads, for the others; this host's name and the pid, if not.")] = "",
    ttl: Annotated[
        float, typer.Option(min=2.0, max=300.0, help="Seconds after its death until another may lead.")
    ] = 10.0,
    metrics: Annotated[str, typer.Option(metavar="ADDRESS:PORT", help='For Prometheus; "" for none.')] = "",
    web: Annotated[str, typer.Option(metavar="ADDRESS:PORT", help='Where the page is; "" for nowhere.')] = "",
    web_token: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Holds the token with which one may act on the page.")
    ] = None,
    prometheus: PrometheusUrl = "",
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log every step.")] = False,
    store: StoreUrl = "",
) -> None:
    """Observe the fleet, plan, move, and check what came of it. Of several on one store, one leads.

    It does what `migrator balance --mode` says, and the drains and plans that others have asked for.
    """
    log_to_stderr(logging.DEBUG if verbose else logging.INFO, "%(asctime)s %(name)s %(message)s")
    with reported():
        settings = ControllerSettings(
            name=name or f"{os.uname().nodename}:{os.getpid()}",
            login=login,
            store=store,
            ttl=ttl,
            metrics=metrics,
            web=web,
            prometheus=prometheus,
            web_token=_token(web_token) if web_token is not None else "",
        )
        asyncio.run(run_controller(settings))


def _token(path: Path) -> str:
    """Raises UsageError for a file that others may read, or a token that could be guessed."""
    token = path.read_text().strip()
    if path.stat().st_mode & 0o077:
        raise UsageError(f"others may read {path}", hint=f"chmod 600 {path}")
    if len(token) < 16 or not token.isascii() or not token.isprintable():
        raise UsageError(f"the token in {path} is too short, or no text", hint=f"openssl rand -hex 16 > {path}")
    return token
