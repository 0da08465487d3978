"""The page of a controller: what it knows, live; and, with a token, three things that one may ask of it.

    async with serve_page(controller, "127.0.0.1:9742", token=""): ...

Without a token nothing can be changed. With one, whoever sends it as `Authorization: Bearer` may drain and uncordon
hosts and apply plans, as the commands do; a browser never sends it by itself, so no other page can. The page is three
files and no build; it loads nothing from elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from migrator.errors import MigratorError, UsageError
from migrator.fleet import records as r
from migrator.fleet.controller import Controller
from migrator.fleet.plans import approve
from migrator.fleet.snapshot import snapshot
from policies import drain

T = TypeVar("T")
log = logging.getLogger("migrator.page")
# What is no HTTP is answered with 400, and no failure of ours that needs a traceback.
log.addFilter(lambda record: not isinstance((record.exc_info or (None, None))[1], HttpProcessingError))
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_MOST = 4096  # bytes of a request
_CONNECTIONS = 64  # at a time; a new one puts an end to the oldest
_FRESH = 0.5  # seconds for which an answer holds, for however many that look


class HostRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    host: r.Name


class PlanRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    plan: r.Id


class Page:
    """Answers the requests of browsers."""

    def __init__(self, controller: Controller, token: str = "") -> None:
        self._controller = controller
        self._token = token
        self._last = (float("-inf"), b"")
        self._files = {
            path: (resources.files("migrator.fleet").joinpath("page", name).read_bytes(), kind)
            for path, (name, kind) in _FILES.items()
        }

    def application(self) -> web.Application:
        made = web.Application(client_max_size=_MOST, middlewares=[_guarded])
        for path in self._files:
            made.router.add_get(path, self._file)
        made.router.add_get("/api/state", self._state)
        made.router.add_post("/api/drain", self._drain)
        made.router.add_post("/api/uncordon", self._uncordon)
        made.router.add_post("/api/apply", self._apply)
        return made

    async def _file(self, request: web.Request) -> web.Response:
        body, kind = self._files[request.path]
        return web.Response(body=body, content_type=kind, charset="utf-8")

    async def _state(self, request: web.Request) -> web.Response:
        at, body = self._last
        if time.monotonic() - at > _FRESH:
            body = msgspec.json.encode(await snapshot(self._controller, may_act=bool(self._token)))
            self._last = (time.monotonic(), body)
        return web.Response(body=body, content_type="application/json")

    async def _drain(self, request: web.Request) -> web.Response:
        name = (await self._asked(request, HostRequest)).host
        stored = await self._controller.state.cordons.get(name)
        running = stored.record.drain if stored is not None else None
        if running is not None and running.record.state is drain.State.RUNNING:
            return _done()
        record = drain.begin(self._controller.observer.seen.cluster, name)
        made = r.Cordon(
            host=name, mode=r.HostMode.DRAINING, since=time.time(), by="the page", drain=r.Drain(record=record)
        )
        await self._controller.state.cordons.put(name, made, expected=stored.revision if stored is not None else 0)
        return _done()

    async def _uncordon(self, request: web.Request) -> web.Response:
        name = (await self._asked(request, HostRequest)).host
        stored = await self._controller.state.cordons.get(name)
        if stored is None:
            raise UsageError(f"{name} is not cordoned")
        await self._controller.state.cordons.delete(name, expected=stored.revision)
        return _done()

    async def _apply(self, request: web.Request) -> web.Response:
        await approve(self._controller.state, (await self._asked(request, PlanRequest)).plan, by="the page")
        return _done()

    async def _asked(self, request: web.Request, kind: type[T]) -> T:
        """What is asked, by somebody who may. Raises HTTPForbidden, UsageError."""
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        good = hmac.compare_digest(given.encode(errors="surrogateescape"), self._token.encode())
        if not self._token or scheme != "Bearer" or not good:
            raise web.HTTPForbidden(reason="the token is missing or wrong")
        try:
            return msgspec.json.decode(await request.read(), type=kind)
        except msgspec.MsgspecError as error:
            raise UsageError(f"that is no request: {error}") from None


def _done() -> web.Response:
    return web.json_response({})


@web.middleware
async def _guarded(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Errors are answers, and every answer says what a browser may do with it."""
    answer: web.StreamResponse
    try:
        answer = await handler(request)
    except MigratorError as error:
        text = f"{error.message} ({error.hint})" if error.hint else error.message
        answer = web.json_response({"error": text}, status=400 if isinstance(error, UsageError) else 503)
    except web.HTTPException as error:
        answer = web.json_response({"error": error.reason}, status=error.status)
    answer.headers.update(_HEADERS)
    return answer


@contextlib.asynccontextmanager
async def serve_page(controller: Controller, address: str, *, token: str = "") -> AsyncIterator[str]:
    """On ADDRESS:PORT for the block; gives the URL. Raises UsageError."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{address!r} is no ADDRESS:PORT", hint="such as 127.0.0.1:9742")
    runner = web.AppRunner(Page(controller, token).application(), access_log=None, logger=log)
    await runner.setup()
    try:
        try:
            assert runner.server is not None
            listening = await asyncio.get_running_loop().create_server(
                _Bounded(runner.server), host.strip("[]") or None, int(port), reuse_address=True
            )
        except OSError as error:
            raise UsageError(f"cannot serve the page at {address}: {error.strerror}") from error
        try:
            at = listening.sockets[0].getsockname()
            yield f"http://{at[0]}:{at[1]}/"
        finally:
            listening.close()
    finally:
        await runner.cleanup()


class _Bounded:
    """Makes the protocol of each connection, and ends the oldest ones where there are too many: aiohttp waits for
    ever for a request that never comes."""

    def __init__(self, make: Callable[[], asyncio.Protocol]) -> None:
        self._make = make
        self._open: list[Any] = []

    def __call__(self) -> asyncio.Protocol:
        made = self._make()
        # Those that have ended have no transport any more; the last one has none yet.
        self._open = [one for one in self._open if one.transport is not None]
        for oldest in self._open[: max(len(self._open) - _CONNECTIONS + 1, 0)]:
            oldest.transport.abort()
        self._open.append(made)
        return made
