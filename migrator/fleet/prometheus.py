"""How loaded the hosts are, from a Prometheus that scrapes their node exporters.

    signals = PrometheusSignals("http://prometheus:9090", {"10.0.0.1": "a", "b.example.net:9100": "b"})
    seen = await signals.read()
    seen.loads["a"], seen.missing["b"]

Only Prometheus's clock counts: it says itself how old its newest samples are, and a host whose samples are older
than `max_age` is missing. A host is there with all that is needed, or missing with the reason; nothing is guessed.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from migrator.errors import UsageError
from migrator.fleet.records import Load
from migrator.fleet.signals import SignalsError

MAX_ANSWER = 64 << 20  # bytes
_WITHIN = 10.0  # seconds, for all queries together
_SLACK = 1.05  # a rate over a share of time may come out a little above 1
_VIRTUAL = "lo|veth.*|br-.*|docker.*|virbr.*|cni.*|flannel.*|cali.*|tap.*"

# %w is the window. Each gives one value per instance.
QUERIES: dict[str, str] = {
    "cpu": 'sum by (instance) (rate(node_cpu_seconds_total{mode!~"idle|iowait"}[%w]))',
    "memory": "max by (instance) (node_memory_MemTotal_bytes - node_memory_MemAvailable_bytes)",
    "network": (
        f'sum by (instance) (rate(node_network_receive_bytes_total{{device!~"{_VIRTUAL}"}}[%w]))'
        f' + sum by (instance) (rate(node_network_transmit_bytes_total{{device!~"{_VIRTUAL}"}}[%w]))'
    ),
    "cpu_pressure": "max by (instance) (rate(node_pressure_cpu_waiting_seconds_total[%w]))",
    "memory_pressure": "max by (instance) (rate(node_pressure_memory_waiting_seconds_total[%w]))",
    "io_pressure": "max by (instance) (rate(node_pressure_io_waiting_seconds_total[%w]))",
    "age": "max by (instance) (time() - timestamp(node_memory_MemTotal_bytes))",
}
_NEEDED = ("cpu", "memory", "age")
_SHARES = ("cpu_pressure", "memory_pressure", "io_pressure")


class Sample(msgspec.Struct, frozen=True):
    """One series of an instant vector; Prometheus writes numbers as text, since JSON knows no NaN."""

    metric: dict[str, str]
    value: tuple[float, str]


class Vector(msgspec.Struct, frozen=True, rename={"kind": "resultType"}):
    kind: str
    result: Any = None


class QueryAnswer(msgspec.Struct, frozen=True, rename={"kind": "errorType"}):
    status: str
    data: Vector | None = None
    kind: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """The loads of the hosts that could be told, and why the others could not."""

    loads: dict[str, Load]
    missing: dict[str, str]


class PrometheusSignals:
    """`hosts` names the host of each instance, by the whole of the label or by its part before the port."""

    def __init__(
        self,
        url: str,
        hosts: Mapping[str, str],
        *,
        window: str = "2m",
        max_age: float = 90.0,
        token: str = "",
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Raises UsageError for a URL or window that makes no sense. `token` is a bearer token."""
        if not re.fullmatch(r"https?://[^\s?#]+", url):
            raise UsageError(f"{url[:80]!r} is no Prometheus", hint="such as http://prometheus:9090")
        if not re.fullmatch(r"[1-9][0-9]{0,5}[smhd]", window):
            raise UsageError(f"bad window {window[:20]!r}", hint="such as 2m")
        self._url = url.rstrip("/")
        self._hosts = dict(hosts)
        self._window = window
        self._max_age = max_age
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=_WITHIN,
            trust_env=False,
            transport=transport,
        )

    async def read(self) -> Seen:
        """Ask for everything at once. Raises SignalsError if Prometheus does not answer, or not as it should."""
        try:
            async with asyncio.timeout(_WITHIN):
                answers = await asyncio.gather(*(self.query(query) for query in QUERIES.values()))
        except TimeoutError:
            raise SignalsError(f"{self._url} does not answer within {_WITHIN:g} s") from None
        values = {name: self._by_host(answer) for name, answer in zip(QUERIES, answers, strict=True)}
        loads: dict[str, Load] = {}
        missing: dict[str, str] = {}
        for host in sorted(set(self._hosts.values())):
            found = {name: value for name, of in values.items() if (value := of.get(host)) is not None}
            if reason := self._unusable(found):
                missing[host] = reason
            else:
                loads[host] = _load(found)
        return Seen(loads, missing)

    async def query(self, query: str) -> list[Sample]:
        """An instant query that gives a vector. Raises SignalsError."""
        text = query.replace("%w", self._window)
        body = bytearray()
        try:
            async with self._client.stream("POST", f"{self._url}/api/v1/query", data={"query": text}) as answer:
                async for part in answer.aiter_bytes():
                    body += part
                    if len(body) > MAX_ANSWER:
                        raise SignalsError(f"{self._url} answers with more than {MAX_ANSWER >> 20} MiB to {text}")
        except httpx.HTTPError as error:
            raise SignalsError(f"cannot ask {self._url}: {str(error) or type(error).__name__}") from None
        try:
            found = msgspec.json.decode(body, type=QueryAnswer)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise SignalsError(
                f"{self._url} does not answer as Prometheus does (HTTP {answer.status_code}): {error}"
            ) from None
        if found.status != "success" or found.data is None:
            raise SignalsError(f"{self._url} says {found.kind or found.status}: {found.error[:500]}")
        if found.data.kind != "vector":
            raise SignalsError(f"{text} gives a {found.data.kind[:40]}, not a vector")
        return self._samples(found.data, text)

    def _samples(self, data: Vector, text: str) -> list[Sample]:
        try:
            return msgspec.convert(data.result, type=list[Sample])
        except msgspec.ValidationError as error:
            raise SignalsError(f"cannot understand what {self._url} answers to {text}: {error}") from None

    async def close(self) -> None:
        await self._client.aclose()

    def _by_host(self, samples: list[Sample]) -> dict[str, float]:
        """Numbers by host. Instances of other machines are none of ours; numbers that are none are left out."""
        found: dict[str, float] = {}
        named: dict[str, str] = {}
        for sample in samples:
            instance = sample.metric.get("instance", "")
            host = self._hosts.get(instance) or self._hosts.get(instance.rpartition(":")[0].strip("[]"))
            if host is None:
                continue
            if host in named:
                raise SignalsError(
                    f"both {named[host]} and {instance} are said to be {host}", hint="name the instance with its port"
                )
            named[host] = instance
            try:
                value = float(sample.value[1])
            except ValueError:
                continue
            if math.isfinite(value) and value >= 0:
                found[host] = value
        return found

    def _unusable(self, found: dict[str, float]) -> str:
        """Why a host's values do not do, "" if they do."""
        if not found:
            return "Prometheus has nothing of it"
        lacking = [name for name in _NEEDED if name not in found]
        if lacking:
            return f"Prometheus has no {', '.join(lacking)} of it"
        if found["age"] > self._max_age:
            return f"its newest sample is {found['age']:.0f} s old"
        for name in _SHARES:
            if found.get(name, 0.0) > _SLACK:
                return f"its {name.replace('_', ' ')} is {found[name]:.2f}, which no share of time can be"
        return ""


def _load(found: dict[str, float]) -> Load:
    shares = {name: min(found[name], 1.0) if name in found else None for name in _SHARES}
    return Load(cpu=found["cpu"], memory=int(found["memory"]), network=found.get("network", 0.0), **shares)
