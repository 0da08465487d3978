"""The controller as a service: it says when it is ready, is watched, and ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from dataclasses import dataclass

from migrator.errors import UsageError
from migrator.fleet.controller import LEAD_TTL, Controller
from migrator.fleet.controller_metrics import ControllerMetrics
from migrator.fleet.membership import opened
from migrator.fleet.recoveries import Fencing
from migrator.host import Login
from migrator.runtime.service import notify, watchdog

log = logging.getLogger("migrator.controller")


@dataclass(frozen=True)
class ControllerSettings:
    """name:        of this controller, for the others
    store:       a URL, "" for the default
    ttl:         seconds after its death until another may lead
    metrics:     ADDRESS:PORT for Prometheus, "" for nowhere; `web`: the same for the page
    web_token:   who shows it may act on the page; "" for nobody
    prometheus:  the URL of one that knows the hosts' load, "" for what agents say
    fencing:     how lost hosts are turned off, so that what ran there may be restarted; None for not at all
    """

    name: str
    login: Login
    store: str = ""
    ttl: float = LEAD_TTL
    metrics: str = ""
    web: str = ""
    web_token: str = ""
    prometheus: str = ""
    fencing: Fencing | None = None


async def run_controller(settings: ControllerSettings) -> None:
    """Until SIGTERM or SIGINT. What is under way then goes on, and the next leader follows it.

    Raises StoreCorrupt, or StoreUnavailable at the beginning.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(watchdog())
        fleet = await stack.enter_async_context(opened(settings.store, settings.login, prometheus=settings.prometheus))
        metrics = ControllerMetrics()
        if settings.metrics:
            metrics.serve(settings.metrics)
        controller = Controller(
            fleet,
            name=settings.name,
            ttl=settings.ttl,
            fencing=settings.fencing,
            on_round=metrics.observe,
            finished=metrics.finished,
            deposed=metrics.follows,
        )
        if settings.web:
            try:
                from migrator.fleet.web import serve_page
            except ImportError as error:
                raise UsageError(f"{error.name} is not installed", hint="pip install 'migrator[web]'") from None
            url = await stack.enter_async_context(serve_page(controller, settings.web, token=settings.web_token))
            log.info("the page is %s, %s", url, "to act on with the token" if settings.web_token else "to look at")
        running = asyncio.create_task(controller.run())
        stopping = asyncio.create_task(stop.wait())
        notify("READY=1")
        try:
            await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
            notify("STOPPING=1")
            if running.done():
                running.result()
        finally:
            stopping.cancel()
            running.cancel()
            await asyncio.gather(running, stopping, return_exceptions=True)
