"""An etcd cluster of Debian's `etcd-server` on this machine, for tests. Members can be killed and started again.

with EtcdCluster(tmp_path, members=3) as cluster:
    store = await open_store(cluster.url)
    cluster.kill(cluster.leader())
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

_UP_WITHIN = 30.0  # seconds
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class EtcdCluster:
    """`members` of them on free ports of 127.0.0.1, all their data below `directory`. All up on entry."""

    def __init__(self, directory: Path, *, members: int = 1) -> None:
        self._directory = directory
        ports = _free_ports(2 * members)
        self.endpoints = [f"http://127.0.0.1:{port}" for port in ports[:members]]
        self._peers = [f"http://127.0.0.1:{port}" for port in ports[members:]]
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * members

    @property
    def url(self) -> str:
        """For `open_store`."""
        return "etcd:" + ",".join(self.endpoints)

    def __enter__(self) -> EtcdCluster:
        try:
            for member in range(len(self.endpoints)):
                self.start(member)
            self.wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def start(self, member: int) -> None:
        """Start a member, with what it has on disk. Does not wait for it."""
        log = (self._directory / f"m{member}.log").open("ab")
        with log:
            self._processes[member] = subprocess.Popen(
                [
                    "etcd",
                    *("--name", f"m{member}", "--data-dir", str(self._directory / f"m{member}")),
                    *("--listen-client-urls", self.endpoints[member]),
                    *("--advertise-client-urls", self.endpoints[member]),
                    *("--listen-peer-urls", self._peers[member]),
                    *("--initial-advertise-peer-urls", self._peers[member]),
                    *("--initial-cluster", ",".join(f"m{n}={peer}" for n, peer in enumerate(self._peers))),
                    *("--initial-cluster-token", self._directory.name),
                    *("--heartbeat-interval", "50", "--election-timeout", "500", "--unsafe-no-fsync"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self, member: int) -> None:
        """End a member as a power failure would."""
        process = self._processes[member]
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
            self._processes[member] = None

    def stop(self, member: int) -> None:
        """Leave a member deaf and mute, its connections open."""
        process = self._processes[member]
        assert process is not None
        process.send_signal(signal.SIGSTOP)

    def repair(self) -> None:
        """Start what was killed, wake what was stopped, and wait for all of them."""
        for member, process in enumerate(self._processes):
            if process is None:
                self.start(member)
            else:
                process.send_signal(signal.SIGCONT)
        self.wait()

    def leader(self) -> int:
        """The number of the member that leads now."""
        deadline = time.monotonic() + _UP_WITHIN
        while time.monotonic() < deadline:
            for member, endpoint in enumerate(self.endpoints):
                with contextlib.suppress(OSError):
                    status = ask(endpoint, "maintenance/status")
                    if status.get("leader", "0") == status["header"]["member_id"]:
                        return member
            time.sleep(0.05)
        raise RuntimeError(f"no leader within {_UP_WITHIN:g} s; see {self._directory}")

    def wait(self) -> None:
        """Until every member that runs answers and knows a leader."""
        deadline = time.monotonic() + _UP_WITHIN
        for endpoint, process in zip(self.endpoints, self._processes, strict=True):
            while process is not None:
                with contextlib.suppress(OSError):
                    if ask(endpoint, "maintenance/status").get("leader", "0") != "0":
                        break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"etcd does not come up; see {self._directory}")
                time.sleep(0.05)

    def compact(self, revision: int) -> None:
        ask(self.endpoints[0], "kv/compaction", {"revision": revision, "physical": True})

    def _stop(self) -> None:
        for member in range(len(self.endpoints)):
            self.kill(member)


def ask(endpoint: str, path: str, request: dict[str, object] | None = None) -> dict[str, Any]:
    """One call of the JSON gateway. Raises OSError."""
    asked = urllib.request.Request(f"{endpoint}/v3/{path}", data=json.dumps(request or {}).encode())
    with _OPENER.open(asked, timeout=2) as answer:
        return dict(json.load(answer))


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
