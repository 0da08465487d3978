"""The verifying Redis client: right against a real server, and merciless against a lying one."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.testing.redisclient import RedisError, VerifyingClient, fill, verify_fill
from migrator.testing.servers import Server, nginx_server, redis_server
from migrator.testing.workloads import Workload


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def redis(tmp_path: Path, port: int) -> Iterator[Server]:
    with redis_server(tmp_path / "redis", port) as server:
        yield server


def test_an_undisturbed_server_gives_a_flawless_report(redis: Server, port: int) -> None:
    client = VerifyingClient("127.0.0.1", port, rate=0, pipeline=7, keys=50).start()
    while client.report.replies < 2000:
        time.sleep(0.01)
    report = client.stop()
    assert report.flawless, report
    assert report.replies == report.requests
    assert report.verified_keys == 100
    assert len(client.samples) * 7 == report.requests


def test_a_pause_of_the_server_is_measured_as_a_gap(redis: Server, port: int) -> None:
    client = VerifyingClient("127.0.0.1", port, rate=500).start()
    while client.report.replies < 100:
        time.sleep(0.01)
    since = time.monotonic_ns()
    os.kill(redis.pid, signal.SIGSTOP)
    time.sleep(0.15)
    os.kill(redis.pid, signal.SIGCONT)
    time.sleep(0.1)
    report = client.stop()
    assert report.flawless
    assert report.longest_gap_ms >= 140
    assert any(gap.ms >= 140 and gap.at_ns >= since - 10**7 for gap in report.gaps)
    assert client.longest_gap_ms(since) >= 140


def test_a_write_by_somebody_else_is_a_wrong_reply(redis: Server, port: int) -> None:
    client = VerifyingClient("127.0.0.1", port, rate=0, keys=1).start()
    other = VerifyingClient("127.0.0.1", port, rate=0, keys=1).start()
    while not (client.broken and other.broken):
        time.sleep(0.01)
    assert not client.stop().flawless
    assert other.stop().wrong_replies


def test_a_server_that_dies_owes_its_replies(redis: Server, port: int) -> None:
    client = VerifyingClient("127.0.0.1", port, rate=0).start()
    while client.report.replies < 10:
        time.sleep(0.01)
    os.kill(redis.pid, signal.SIGKILL)
    while not client.broken:
        time.sleep(0.01)
    report = client.stop()
    assert not report.flawless
    assert report.reconnects == 0


def test_what_is_not_resp_breaks_the_client() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def lie() -> None:
            peer, _ = listener.accept()
            peer.recv(65536)
            peer.sendall(b":1\r\n")
            peer.recv(65536)
            peer.sendall(b"HTTP/1.1 400 Bad Request\r\n")
            peer.close()

        threading.Thread(target=lie).start()
        client = VerifyingClient("127.0.0.1", listener.getsockname()[1]).start()
        while not client.broken:
            time.sleep(0.01)
        assert "not RESP" in client.stop().error


def test_what_was_filled_can_be_read_back_and_a_change_is_found(redis: Server, port: int) -> None:
    count = fill("127.0.0.1", port, 4)
    verify_fill("127.0.0.1", port, count)
    from migrator.testing.redisclient import Connection

    connection = Connection("127.0.0.1", port)
    connection.command("SET", f"fill:{count - 1}", "other")
    connection.close()
    with pytest.raises(RedisError, match="not what was written"):
        verify_fill("127.0.0.1", port, count)


def test_the_client_runs_as_a_workload_of_its_own(redis: Server, port: int, tmp_path: Path) -> None:
    with Workload("migrator.testing.redisclient", tmp_path, "127.0.0.1", port, "--rate", 200) as client:
        client.check_alive_and_progressing()
        client.finish()
        report = json.loads(client.stdout.read_text())
        assert report["flawless"]
        assert report["verified_keys"] > 0


@pytest.mark.root
def test_nginx_serves_from_its_own_directory(tmp_path: Path, port: int) -> None:
    import urllib.request

    with nginx_server(tmp_path / "nginx", port):
        (tmp_path / "nginx" / "www" / "file").write_text("content")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/file") as answer:
            assert answer.read() == b"content"
