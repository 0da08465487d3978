"""etcd's JSON gateway over HTTP: one call, several endpoints, typed answers (https://etcd.io/docs, api_grpc_gateway).

An endpoint that does not answer is left for the next. What a call means, and whether it may be repeated, is
for the caller: `migrator.fleet.etcd`.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qsl, urlsplit

import httpx
import msgspec

from migrator.errors import UsageError
from migrator.fleet.store import NotHeld, StoreCorrupt, StoreUnavailable, now

A = TypeVar("A", bound="Answer")

WITHIN = 10.0  # seconds for a call, over all endpoints
_ATTEMPT = 2.0  # seconds for one endpoint
_PAUSE = 0.1  # seconds before all of them are asked again
SILENCE = 20.0  # seconds without an event, after which a watch asks another endpoint

# Bytes of one answer, or of one result of a watch: etcd sends messages of up to 4 MiB, in base64 here.
MAX_ANSWER = 16 << 20

# google.rpc.Code, as the gateway gives it.
INVALID, NOT_FOUND, EXHAUSTED, OUT_OF_RANGE = 3, 5, 8, 11
_PERHAPS_LATER = (4, 10, 14)  # deadline exceeded, aborted, unavailable
_DENIED = (7, 16)


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Base of answers; fields that etcd adds are none of our business."""


class Header(Answer, frozen=True, kw_only=True):
    revision: int = 0
    cluster_id: str = ""


class KeyValue(Answer, frozen=True, kw_only=True):
    key: bytes
    value: bytes = b""
    mod_revision: int = 0


class RangeAnswer(Answer, frozen=True, kw_only=True):
    header: Header = Header()
    kvs: list[KeyValue] = []
    more: bool = False


class Response(Answer, frozen=True, kw_only=True):
    response_range: RangeAnswer | None = None


class TransactionAnswer(Answer, frozen=True, kw_only=True):
    header: Header = Header()
    succeeded: bool = False
    responses: list[Response] = []


class LeaseAnswer(Answer, frozen=True, kw_only=True):
    header: Header = Header()
    id: int = msgspec.field(name="ID", default=0)
    ttl: int = msgspec.field(name="TTL", default=0)


class KeepAliveAnswer(Answer, frozen=True, kw_only=True):
    result: LeaseAnswer = LeaseAnswer()

    @property
    def header(self) -> Header:
        return self.result.header


class Event(Answer, frozen=True, kw_only=True):
    type: str = "PUT"
    kv: KeyValue


class WatchResult(Answer, frozen=True, kw_only=True):
    header: Header = Header()
    events: list[Event] = []
    canceled: bool = False
    compact_revision: int = 0
    cancel_reason: str = ""


class WatchAnswer(Answer, frozen=True, kw_only=True):
    result: WatchResult = WatchResult()
    error: msgspec.Raw | None = None


class Failure(Answer, frozen=True, kw_only=True):
    code: int
    message: str = ""


class GatewayError(Exception):
    """etcd understood and said no; `code` is a google.rpc.Code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Gateway:
    """The endpoints of one cluster."""

    def __init__(self, endpoints: list[str], verify: ssl.SSLContext | bool = True) -> None:
        self.endpoints = endpoints
        self.names = ", ".join(endpoints)
        self._at = 0
        self._cluster = ""
        # What is not compressed cannot unfold in memory.
        plain = {"Accept-Encoding": "identity"}
        self._client = httpx.AsyncClient(verify=verify, trust_env=False, timeout=_ATTEMPT, headers=plain)

    async def call(
        self, path: str, request: dict[str, object], kind: type[A], *, on_doubt: Callable[[], None] = lambda: None
    ) -> A:
        """One call. It is repeated until an endpoint answers; `on_doubt` is called whenever one may have done it
        without an answer.

        Raises StoreUnavailable after `WITHIN` seconds, StoreCorrupt, GatewayError.
        """
        deadline = now() + WITHIN
        tried = 0
        while True:
            endpoint = self.endpoints[self._at]
            try:
                async with (
                    asyncio.timeout(max(deadline - now(), _ATTEMPT)),
                    self._client.stream("POST", f"{endpoint}/v3/{path}", content=json.dumps(request)) as answer,
                ):
                    body = await _read(answer, endpoint)
                return self._understood(answer.status_code, body, kind, endpoint)
            except httpx.ConnectError as error:
                problem = f"{endpoint}: {error}"
            except (httpx.HTTPError, TimeoutError, _Again) as error:
                on_doubt()
                problem = f"{endpoint}: {str(error) or type(error).__name__}"
            self._next(endpoint)
            tried += 1
            if now() > deadline:
                raise StoreUnavailable(
                    f"etcd does not answer: {problem}",
                    hint=f"are most of {self.names} up, and do they reach each other?",
                )
            if tried % len(self.endpoints) == 0:
                await asyncio.sleep(_PAUSE)

    async def stream(self, request: dict[str, object]) -> AsyncIterator[WatchResult]:
        """The results of one watch, until its endpoint fails, falls silent or loses its leader."""
        endpoint = self.endpoints[self._at]
        headers = {"Grpc-Metadata-hasleader": "true"}
        limits = httpx.Timeout(_ATTEMPT, read=SILENCE)
        try:
            async with self._client.stream(
                "POST", f"{endpoint}/v3/watch", content=json.dumps(request), headers=headers, timeout=limits
            ) as answer:
                if answer.status_code != 200:
                    self._understood(answer.status_code, await _read(answer, endpoint), WatchAnswer, endpoint)
                async for line in _lines(answer, endpoint):
                    found = self._understood(200, line, WatchAnswer, endpoint)
                    self._check_cluster(found.result.header, endpoint)
                    if found.error is not None:
                        break
                    yield found.result
        except (httpx.HTTPError, _Again):
            pass
        self._next(endpoint)

    async def close(self) -> None:
        await self._client.aclose()

    def _understood(self, status: int, content: bytes, kind: type[A], endpoint: str) -> A:
        try:
            if status == 200:
                answer = msgspec.json.decode(content, type=kind, strict=False)
                if header := getattr(answer, "header", None):
                    self._check_cluster(header, endpoint)
                return answer
            failure = msgspec.json.decode(content, type=Failure)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            if status >= 500:
                raise _Again(f"HTTP {status}") from None
            raise StoreUnavailable(
                f"{endpoint} does not answer as etcd does: HTTP {status}, {error}", hint="etcd 3.4 or later is needed"
            ) from None
        message = failure.message
        if "corrupt" in message:
            raise StoreCorrupt(f"etcd says: {message}", hint="etcdctl alarm list; restore the member from a snapshot")
        if failure.code in _PERHAPS_LATER:
            raise _Again(message)
        if failure.code in _DENIED:
            raise StoreUnavailable(f"{endpoint} refuses us: {message}", hint="check the certificate and its rights")
        if "space exceeded" in message:
            raise StoreUnavailable(f"etcd is full: {message}", hint="etcdctl compact, defrag, and alarm disarm")
        if "lease not found" in message:
            raise NotHeld("the lease has ended")
        raise GatewayError(failure.code, message)

    def _check_cluster(self, header: Header, endpoint: str) -> None:
        """Members of two clusters, or one that was made anew, would give two leaders."""
        if header.cluster_id and self._cluster and header.cluster_id != self._cluster:
            raise StoreCorrupt(
                f"{endpoint} belongs to another etcd cluster than we began with",
                hint=f"check that {self.names} are members of one cluster, then start again",
            )
        self._cluster = self._cluster or header.cluster_id

    def _next(self, endpoint: str) -> None:
        """Leave an endpoint, unless somebody else has left it already."""
        if self.endpoints[self._at] == endpoint:
            self._at = (self._at + 1) % len(self.endpoints)


class _Again(Exception):
    """This endpoint cannot say now; it may have done what was asked."""


async def _read(answer: httpx.Response, endpoint: str) -> bytes:
    body = bytearray()
    async for part in answer.aiter_raw():
        body += part
        _bounded(body, endpoint)
    return bytes(body)


async def _lines(answer: httpx.Response, endpoint: str) -> AsyncIterator[bytes]:
    rest = bytearray()
    async for part in answer.aiter_raw():
        *lines, last = part.split(b"\n")
        for line in lines:
            rest += line
            if rest.strip():
                yield bytes(rest)
            rest.clear()
        rest += last
        _bounded(rest, endpoint)


def _bounded(body: bytearray, endpoint: str) -> None:
    if len(body) > MAX_ANSWER:
        raise StoreUnavailable(
            f"{endpoint} does not answer as etcd does: more than {MAX_ANSWER >> 20} MiB at once",
            hint="etcd 3.4 or later is needed",
        )


def parse_url(rest: str) -> tuple[list[str], ssl.SSLContext | bool, str]:
    """What follows `etcd:` in a store's URL: endpoints, TLS and the prefix of our keys. Raises UsageError."""
    listed, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    prefix = options.pop("prefix", "migrator")
    files = {name: options.pop(name, "") for name in ("ca", "cert", "key")}
    if options:
        raise UsageError(f"unknown option {next(iter(options))!r} for etcd", hint="known are prefix, ca, cert and key")
    endpoints = [endpoint.rstrip("/") for endpoint in listed.split(",")]
    for endpoint in endpoints:
        _check_endpoint(endpoint)
    if not any(files.values()):
        return endpoints, True, prefix
    try:
        context = ssl.create_default_context(cafile=files["ca"] or None)
        if files["cert"]:
            context.load_cert_chain(files["cert"], files["key"] or None)
    except (OSError, ssl.SSLError) as error:
        missing = [path for path in files.values() if path and not Path(path).is_file()]
        raise UsageError(f"cannot use {', '.join(missing) or 'the certificate for etcd'}: {error}") from None
    return endpoints, context, prefix


def _check_endpoint(endpoint: str) -> None:
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.path and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise UsageError(f"{endpoint[:80]!r} is no endpoint of etcd", hint="such as http://10.0.0.1:2379")
