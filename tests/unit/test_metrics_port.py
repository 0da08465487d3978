"""The metrics port answers Prometheus, whoever else is there."""

from __future__ import annotations

import contextlib
import socket
import time
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Gauge

from migrator import metrics_port
from migrator.metrics_port import MetricsServer, listen


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetricsServer]:
    monkeypatch.setattr(metrics_port, "SECONDS", 1.0)
    registry = CollectorRegistry()
    Gauge("something", "Known.", registry=registry).set(7)
    server = listen("127.0.0.1", 0, registry)
    yield server
    server.shutdown()
    server.server_close()


def connect(server: MetricsServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server_port), timeout=20)


def scrape(server: MetricsServer) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=20) as answer:
        return str(answer.read().decode())


def test_a_crowd_of_silent_connections_does_not_keep_prometheus_out(server: MetricsServer) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(server)) for _ in range(3 * metrics_port.CONNECTIONS)]
        assert "something 7.0" in scrape(server)
        assert len(server.open_connections) <= metrics_port.CONNECTIONS
        assert silent[0].recv(1) == b""


def test_a_connection_that_speaks_slowly_is_ended(server: MetricsServer) -> None:
    with connect(server) as slow:
        end = time.monotonic() + 20
        with pytest.raises(OSError):
            while time.monotonic() < end:  # each byte would begin a time-out anew that counts from the last one
                slow.sendall(b"G")
                time.sleep(0.05)
    while server.open_connections and time.monotonic() < end:
        time.sleep(0.05)
    assert not server.open_connections


@pytest.mark.parametrize(
    "request_",
    [
        b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET /" + b"a" * (70 << 10) + b" HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"GET /metrics?name[]=%00%ff&name[]=something HTTP/1.1\r\nAccept: \xff\xfe\r\nHost: \x00\r\n\r\n",
    ],
)
def test_a_hostile_request_costs_its_connection_only(
    server: MetricsServer, request_: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with connect(server) as peer:
        with contextlib.suppress(OSError):
            peer.sendall(request_)
            peer.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while peer.recv(1 << 16):
                pass
    assert "something 7.0" in scrape(server)
    assert capfd.readouterr().err == ""
