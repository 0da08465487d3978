"""The load of hosts from a real Prometheus with a real node exporter, and from ones that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from migrator.errors import UsageError
from migrator.fleet import prometheus
from migrator.fleet.prometheus import QUERIES, PrometheusSignals
from migrator.fleet.signals import HostSignals, SignalsError
from migrator.testing.servers import server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def exporter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = free_port()
    command = ["prometheus-node-exporter", f"--web.listen-address=127.0.0.1:{port}"]
    with server(command, tmp_path_factory.mktemp("exporter"), port):
        yield port


@pytest.fixture(scope="module")
def real(exporter: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus that scrapes the exporter, and another host that is not there."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\nscrape_configs:\n"
        f"- {{job_name: node, static_configs: [{{targets: ['127.0.0.1:{exporter}', '127.0.0.1:1']}}]}}\n"
    )
    command = [
        "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with server(command, folder, port, seconds=60):
        yield f"http://127.0.0.1:{port}"


async def test_a_real_prometheus_tells_the_load_of_a_real_host(real: str, exporter: int) -> None:
    signals = PrometheusSignals(real, {f"127.0.0.1:{exporter}": "a", "127.0.0.1:1": "b"}, window="15s")
    async with asyncio.timeout(60):
        while (load := (seen := await signals.read()).loads.get("a")) is None or load.io_pressure is None:
            await asyncio.sleep(0.5)  # a rate takes two samples, of each series
    await signals.close()
    own = HostSignals().memory()
    assert 0 <= load.cpu <= (os.cpu_count() or 1) * 1.05
    assert 0.3 * own.used < load.memory < own.total
    assert load.cpu_pressure is not None and load.io_pressure is not None
    assert seen.missing == {"b": "Prometheus has nothing of it"}


async def test_a_host_whose_samples_are_old_is_missing(real: str, exporter: int) -> None:
    signals = PrometheusSignals(real, {f"127.0.0.1:{exporter}": "a"}, window="15s", max_age=-1.0)
    async with asyncio.timeout(60):
        while "old" not in (seen := await signals.read()).missing.get("a", ""):
            await asyncio.sleep(0.5)
    await signals.close()
    assert seen.loads == {}


async def test_a_query_that_prometheus_refuses_is_said_in_its_words(real: str) -> None:
    signals = PrometheusSignals(real, {})
    with pytest.raises(SignalsError, match="parse error"):
        await signals.query("sum by (")
    with pytest.raises(SignalsError, match="scalar"):
        await signals.query("1")
    await signals.close()


Answer = Callable[[str], object]


def misbehaving(answer: Answer, hosts: dict[str, str] | None = None) -> PrometheusSignals:
    """A Prometheus that gives to each query what `answer` makes of it: samples, bytes or a whole response."""

    async def respond(request: httpx.Request) -> httpx.Response:
        query = httpx.QueryParams(request.content.decode())["query"]
        found = answer(query)
        if isinstance(found, httpx.Response):
            return found
        body = {"status": "success", "data": {"resultType": "vector", "result": found}}
        return httpx.Response(200, content=found if isinstance(found, bytes) else json.dumps(body).encode())

    return PrometheusSignals("http://p:9090", hosts or {"a": "a"}, transport=httpx.MockTransport(respond))


def series(value: str, instance: str = "a:9100") -> dict[str, object]:
    return {"metric": {"instance": instance}, "value": [1.0, value]}


def test_every_query_is_about_one_instance_and_bounded_in_time() -> None:
    for name, query in QUERIES.items():
        assert "by (instance)" in query, name
        assert "[" not in query.replace("[%w]", ""), name


async def test_values_are_put_together_by_host() -> None:
    seen = await misbehaving(lambda query: [series("0.5"), series("9", "stranger:9100")]).read()
    assert seen.missing == {}
    assert seen.loads["a"].cpu == 0.5 and seen.loads["a"].io_pressure == 0.5


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf", "-1", "", "many", "1e999"])
async def test_a_number_that_is_none_makes_a_host_missing_and_not_idle(value: str) -> None:
    seen = await misbehaving(lambda query: [series(value if "cpu_seconds" in query else "0.5")]).read()
    assert seen.loads == {}
    assert "no cpu" in seen.missing["a"]


async def test_a_share_of_time_above_one_is_not_believed() -> None:
    seen = await misbehaving(lambda query: [series("7" if "pressure_io" in query else "0.5")]).read()
    assert "io pressure is 7.00" in seen.missing["a"]
    seen = await misbehaving(lambda query: [series("1.01" if "pressure_io" in query else "0.5")]).read()
    assert seen.loads["a"].io_pressure == 1.0


async def test_a_host_without_pressure_has_none() -> None:
    seen = await misbehaving(lambda query: [] if "pressure" in query else [series("0.5")]).read()
    assert seen.loads["a"].cpu_pressure is None


async def test_two_instances_that_are_one_host_are_an_error() -> None:
    with pytest.raises(SignalsError, match=r"both a:9100 and a:9101"):
        await misbehaving(lambda query: [series("1"), series("2", "a:9101")]).read()


async def test_an_address_of_ipv6_is_found_without_its_port() -> None:
    seen = await misbehaving(lambda query: [series("0.5", "[2001:db8::1]:9100")], {"2001:db8::1": "v6"}).read()
    assert set(seen.loads) == {"v6"}


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<html>login</html>",
        b"\xff\xff",
        b"[]",
        b"{}",
        b'{"status":"error","errorType":"timeout","error":"query timed out"}',
        b'{"status":"success"}',
        b'{"status":"success","data":{"resultType":"vector","result":{"a":1}}}',
        b'{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"value":[1]}]}}',
        b'{"status":"success","data":{"resultType":"matrix","result":[]}}',
        httpx.Response(401, content=b"Unauthorized"),
        httpx.Response(302, headers={"Location": "http://elsewhere/"}, content=b""),
    ],
)
async def test_an_answer_that_is_none_is_an_error_of_signals(answer: object) -> None:
    with pytest.raises(SignalsError):
        await misbehaving(lambda query: answer).read()


async def test_an_answer_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "MAX_ANSWER", 1 << 20)
    with pytest.raises(SignalsError, match="more than 1 MiB"):
        await misbehaving(lambda query: b" " * (3 << 20)).read()


async def test_a_prometheus_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "_WITHIN", 0.5)
    connected = asyncio.Event()
    over = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while not over.is_set():
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.05)
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        signals = PrometheusSignals(f"http://127.0.0.1:{port}", {"a": "a"})
        with pytest.raises(SignalsError, match="does not answer within"):
            await signals.read()
        assert connected.is_set()
        over.set()
        await signals.close()


async def test_nobody_there_is_said(tmp_path: Path) -> None:
    signals = PrometheusSignals("http://127.0.0.1:1", {"a": "a"})
    with pytest.raises(SignalsError, match=r"127\.0\.0\.1:1"):
        await signals.read()
    await signals.close()


@pytest.mark.parametrize("url", ["", "prometheus:9090", "file:///etc/passwd", "http://a b"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        PrometheusSignals(url, {})


@pytest.mark.parametrize("window", ["", "0m", "5", "5m]) or vector(1", "1y"])
def test_a_window_that_is_none_is_refused(window: str) -> None:
    with pytest.raises(UsageError):
        PrometheusSignals("http://a", {}, window=window)
