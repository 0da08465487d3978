"""Over OpenSSH's own sshd, without a daemon of ours: what works, and what is said when it does not."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from migrator.errors import TransportError
from transport.keys import ensure_key, pin
from transport.link import Link
from transport.ssh import connect

pytestmark = pytest.mark.root
ROOT = Path(__file__).resolve().parents[2]

AGENT = """
import asyncio, os, sys
from migrator.errors import TransportError
from transport.wire import stdio_link

async def main():
    link = await stdio_link()
    try:
        while True:
            message = await link.receive()
            if message == b"pid":
                await link.send(str(os.getpid()).encode())
            elif message == b"stream":
                read_end, write_end = os.pipe()
                await asyncio.gather(link.pump_out(write_end), link.pump_in(read_end))
            elif message == b"crash":
                sys.exit("out of luck")
            else:
                await link.send(message)
    except TransportError:
        pass
    finally:
        await link.close()

asyncio.run(main())
"""


@dataclass
class Sshd:
    directory: Path
    port: int

    @property
    def agent(self) -> str:
        return f"PYTHONPATH={shlex.quote(str(ROOT))} {sys.executable} {self.directory / 'agent.py'}"

    async def connect(self, command: str | None = None, **options: Any) -> Link:
        return await connect(
            f"root@127.0.0.1:{self.port}",
            identity=self.directory / "id",
            known_hosts=self.directory / "known_hosts",
            command=command or self.agent,
            config=False,
            **options,
        )


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[Sshd]:
    program = shutil.which("sshd") or "/usr/sbin/sshd"
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd wants it; the boot scripts make it
    ensure_key(tmp_path / "id")
    host_key = ensure_key(tmp_path / "host_key")
    shutil.copy(tmp_path / "id.pub", tmp_path / "authorized_keys")
    (tmp_path / "agent.py").write_text(AGENT)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (tmp_path / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host_key\nPidFile none\nUsePAM no\n"
        f"AuthorizedKeysFile {tmp_path}/authorized_keys\nStrictModes no\nPasswordAuthentication no\n"
        "PermitRootLogin prohibit-password\nKbdInteractiveAuthentication no\n"
    )
    pin(tmp_path / "known_hosts", "127.0.0.1", port, host_key)
    server = subprocess.Popen(
        [program, "-D", "-e", "-f", str(tmp_path / "sshd_config")], stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    line = server.stderr.readline()
    assert "listening" in line, line
    yield Sshd(tmp_path, port)
    server.terminate()
    server.communicate()


async def test_any_sshd_carries_messages_and_a_stream(sshd: Sshd) -> None:
    sent = os.urandom(6 << 20) + bytes(4 << 20)
    async with await sshd.connect() as link:
        await link.send(b"hello")
        assert await link.receive(10) == b"hello"
        await link.send(b"stream")
        source, feed = os.pipe()
        drain, sink = os.pipe()
        *_, received = await asyncio.gather(
            link.pump_in(source),
            link.pump_out(sink),
            asyncio.to_thread(_write_all, feed, sent),
            asyncio.to_thread(_read_all, drain),
        )
        assert received == sent


async def test_the_remote_agent_ends_with_its_link(sshd: Sshd) -> None:
    async with await sshd.connect() as link:
        await link.send(b"pid")
        pid = int(await link.receive(10))
        pidfd = os.pidfd_open(pid)
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pidfd, gone.set)
    await asyncio.wait_for(gone.wait(), 10)
    loop.remove_reader(pidfd)
    os.close(pidfd)


async def test_a_missing_command_says_what_to_install(sshd: Sshd) -> None:
    with pytest.raises(TransportError, match=r"no-such-migrator.*status 127.*not found") as caught:
        await sshd.connect("no-such-migrator agent --stdio")
    assert "install migrator on 127.0.0.1" in caught.value.hint
    assert "--remote-command" in caught.value.hint


async def test_an_agent_that_cannot_start_is_quoted(sshd: Sshd) -> None:
    with pytest.raises(TransportError, match="status 3: no room"):
        await sshd.connect("echo 'no room' >&2; exit 3")


async def test_what_an_agent_says_cannot_steer_the_terminal(sshd: Sshd) -> None:
    with pytest.raises(TransportError) as caught:
        await sshd.connect(r"printf '\033]0;evil\007\033[2J' >&2; exit 1")
    assert caught.value.message.isprintable()
    assert "evil" in caught.value.message


async def test_a_shell_that_prints_at_login_is_quoted(sshd: Sshd) -> None:
    with pytest.raises(TransportError, match=r"does not speak.*Last login: never"):
        await sshd.connect(f"echo Last login: never; {sshd.agent}")


async def test_a_command_that_says_nothing_is_given_up(sshd: Sshd) -> None:
    with pytest.raises(TransportError, match="did not introduce itself"):
        await sshd.connect("sleep 100", timeout=1.0)


async def test_an_agent_that_crashes_is_quoted_to_whoever_waits(sshd: Sshd) -> None:
    async with await sshd.connect() as link:
        await link.send(b"crash")
        with pytest.raises(TransportError, match=r"closed the connection.*out of luck"):
            await link.receive(10)


async def test_an_agent_that_is_stopped_is_taken_for_dead(sshd: Sshd) -> None:
    async with await sshd.connect(keepalive=0.1, dead_after=3.0) as link:
        await link.send(b"pid")
        pid = int(await link.receive(10))
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(TransportError, match="no sign of life"):
            await link.receive(30)
        os.kill(pid, signal.SIGKILL)


async def test_a_key_bound_to_another_command_is_an_error(sshd: Sshd) -> None:
    keys = sshd.directory / "authorized_keys"
    keys.write_text(f'command="echo nothing but this" {keys.read_text()}')
    with pytest.raises(TransportError, match="nothing but this"):
        await sshd.connect()


def _write_all(fd: int, data: bytes) -> None:
    with os.fdopen(fd, "wb") as file:
        file.write(data)


def _read_all(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        return file.read()
