"""Real servers for tests and demonstrations, configured for one directory and nothing else.

with redis_server(tmp_path, 6399) as redis:
    move(redis.pid)
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Server:
    """A server that was started here. `pid` is the root of its tree."""

    pid: int
    command: tuple[str, ...]
    log: Path


def redis_command(directory: Path, port: int, *options: str) -> list[str]:
    """A Redis that keeps everything in memory and nothing on disk."""
    return [
        "redis-server",
        *("--port", str(port), "--bind", "0.0.0.0", "--protected-mode", "no"),
        *("--save", "", "--appendonly", "no", "--dir", str(directory), "--daemonize", "no"),
        *options,
    ]


def nginx_command(directory: Path, port: int, *, workers: int = 3) -> list[str]:
    """An nginx with `workers` worker processes, serving DIRECTORY/www, all its files below DIRECTORY."""
    (directory / "www").mkdir(parents=True, exist_ok=True)
    (directory / "tmp").mkdir(exist_ok=True)
    temporary = "".join(
        f"    {kind}_temp_path {directory}/tmp;\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = directory / "nginx.conf"
    config.write_text(
        f"daemon off;\nworker_processes {workers};\nuser root;\n"
        f"pid {directory}/nginx.pid;\nerror_log {directory}/error.log;\n"
        "events { worker_connections 256; }\n"
        "http {\n"
        f"    access_log {directory}/access.log;\n"
        f"{temporary}"
        "    keepalive_timeout 600s;\n    keepalive_requests 1000000;\n"
        f"    server {{ listen {port}; root {directory}/www; }}\n"
        "}\n"
    )
    os.chmod(directory, 0o755)
    return ["nginx", "-c", str(config), "-p", str(directory)]


@contextlib.contextmanager
def server(
    command: Sequence[str],
    directory: Path,
    port: int,
    *,
    host: str = "127.0.0.1",
    netns: str = "",
    seconds: float = 20.0,
) -> Iterator[Server]:
    """Starts `command` in a session of its own, waits until `host`:`port` answers, kills it at the end.

    Where `netns` is given, host and port are seen from inside it. Raises `RuntimeError` with the
    end of its log where it does not come up.
    """
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "server.log"
    enter = ["ip", "netns", "exec", netns] if netns else []
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*enter, *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=directory,
        )
    try:
        deadline = time.monotonic() + seconds
        while not _answers(host, port, enter):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} does not come up: {log.read_text(errors='replace')[-500:]}")
            time.sleep(0.05)
        yield Server(process.pid, tuple(command), log)
    finally:
        # The group has the same number wherever on this machine it was restored.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def redis_server(
    directory: Path, port: int, *options: str, netns: str = ""
) -> contextlib.AbstractContextManager[Server]:
    return server(redis_command(directory, port, *options), directory, port, netns=netns)


def nginx_server(
    directory: Path, port: int, *, workers: int = 3, netns: str = ""
) -> contextlib.AbstractContextManager[Server]:
    return server(nginx_command(directory, port, workers=workers), directory, port, netns=netns)


def _answers(host: str, port: int, enter: Sequence[str]) -> bool:
    if enter:
        probe = [*enter, "bash", "-c", f"exec 3<>/dev/tcp/{host}/{port}"]
        return subprocess.run(probe, check=False, capture_output=True).returncode == 0
    with socket.socket() as probe_socket:
        return probe_socket.connect_ex((host, port)) == 0
