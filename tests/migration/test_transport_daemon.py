"""Two asyncssh ends over loopback: who gets in, who does not, and what is said about it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from migrator.errors import TransportError
from transport.authorized_keys import RIGHTS
from transport.daemon import ConnectionSlots, Daemon, serve
from transport.frame import MIN_WINDOW, Channel, encode_frame, encode_preface
from transport.inbox import INBOX
from transport.keys import ensure_key, fingerprint, pin, public_line
from transport.link import Link
from transport.slots import Slots
from transport.ssh import connect


@dataclass
class Host:
    """A daemon whose handler echoes, and the files on both sides."""

    directory: Path
    daemon: Daemon
    slots: ConnectionSlots
    seen: list[tuple[str, frozenset[str]]] = field(default_factory=list)
    proved: list[str] = field(default_factory=list)

    @property
    def authorized_keys(self) -> Path:
        return self.directory / "authorized_keys"

    @property
    def known_hosts(self) -> Path:
        return self.directory / "known_hosts"

    @property
    def target(self) -> str:
        return f"somebody@127.0.0.1:{self.daemon.port}"

    async def connect(self, **options: Any) -> Link:
        settings: dict[str, Any] = {
            "identity": self.directory / "id",
            "known_hosts": self.known_hosts,
            "config": False,
            **options,
        }
        return await connect(settings.pop("target", self.target), **settings)


async def echo(link: Link) -> None:
    """Send back every message; at `stream`, receive a stream and send it back."""
    while True:
        message = await link.receive()
        if message == b"stream":
            read_end, write_end = os.pipe()
            await asyncio.gather(link.pump_out(write_end), link.pump_in(read_end))
        elif message == b"fail":
            raise RuntimeError("on request")
        else:
            await link.send(message)


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    seen: list[tuple[str, frozenset[str]]] = []
    proved: list[str] = []

    async def handler(link: Link, peer: str, rights: frozenset[str]) -> None:
        seen.append((peer, rights))
        proved.append(link.key)
        await echo(link)

    ensure_key(tmp_path / "id")
    slots: ConnectionSlots = Slots()
    async with await serve(
        "127.0.0.1",
        0,
        host_keys=[tmp_path / "host_key"],
        authorized_keys=tmp_path / "authorized_keys",
        handler=handler,
        slots=slots,
    ) as daemon:
        it = Host(tmp_path, daemon, slots, seen, proved)
        shutil.copy(tmp_path / "id.pub", it.authorized_keys)
        pin(it.known_hosts, "127.0.0.1", daemon.port, ensure_key(tmp_path / "host_key"))
        yield it


async def test_a_known_host_and_an_authorized_key_make_a_link(host: Host) -> None:
    async with await host.connect() as link:
        await link.send(b"hello")
        assert await link.receive(10) == b"hello"
        assert 0 < link.rtt < 5
    assert host.seen == [("somebody@127.0.0.1", RIGHTS)]


async def test_a_stream_goes_there_and_back_unchanged(host: Host) -> None:
    sent = os.urandom(6 << 20) + bytes(4 << 20)
    async with await host.connect() as link:
        await link.send(b"stream")
        source, feed = os.pipe()
        drain, sink = os.pipe()
        writing = asyncio.to_thread(_write_all, feed, sent)
        reading = asyncio.to_thread(_read_all, drain)
        *_, received = await asyncio.gather(link.pump_in(source), link.pump_out(sink), writing, reading)
        assert received == sent
        await link.send(b"still there")
        assert await link.receive(10) == b"still there"
        assert link.stream_throughput > 0


async def test_an_unknown_host_key_is_refused_with_all_one_needs_to_decide(host: Host) -> None:
    host.known_hosts.unlink()
    with pytest.raises(TransportError) as caught:
        await host.connect()
    message, hint = caught.value.message, caught.value.hint
    assert f"[127.0.0.1]:{host.daemon.port}" in message
    assert fingerprint(ensure_key(host.directory / "host_key")) in message
    assert str(host.known_hosts) in message
    assert "--accept-new-host-key" in hint
    assert f"ssh-keyscan -p {host.daemon.port} 127.0.0.1 >> {host.known_hosts}" in hint
    assert not host.known_hosts.exists()


async def test_an_accepted_host_key_is_pinned_and_known_from_then_on(host: Host) -> None:
    host.known_hosts.unlink()
    await (await host.connect(accept_new_host_key=True)).close()
    await (await host.connect()).close()
    assert len(host.known_hosts.read_text().splitlines()) == 1


@pytest.mark.parametrize("accept", [False, True])
async def test_a_changed_host_key_is_refused_whatever_is_accepted(host: Host, accept: bool) -> None:
    host.known_hosts.unlink()
    old = asyncssh.generate_private_key("ssh-ed25519")
    pin(host.known_hosts, "127.0.0.1", host.daemon.port, old)
    before = host.known_hosts.read_text()
    with pytest.raises(TransportError, match="HAS CHANGED") as caught:
        await host.connect(accept_new_host_key=accept)
    assert fingerprint(old) in caught.value.message
    assert "ssh-keygen -R" in caught.value.hint
    assert host.known_hosts.read_text() == before


async def test_a_host_that_has_only_another_type_of_key_counts_as_changed(host: Host) -> None:
    host.known_hosts.unlink()
    pin(
        host.known_hosts,
        "127.0.0.1",
        host.daemon.port,
        asyncssh.generate_private_key("ecdsa-sha2-nistp256"),
    )
    with pytest.raises(TransportError, match="HAS CHANGED"):
        await host.connect()


async def test_a_revoked_host_key_is_refused(host: Host) -> None:
    key = public_line(ensure_key(host.directory / "host_key"))
    with host.known_hosts.open("a") as file:
        file.write(f"@revoked * {key}\n")
    with pytest.raises(TransportError, match="revoked"):
        await host.connect(accept_new_host_key=True)


async def test_a_key_that_is_not_authorized_is_refused_with_an_explanation(host: Host) -> None:
    ensure_key(host.directory / "stranger")
    with pytest.raises(TransportError, match=r"does not accept the key .*stranger") as caught:
        await host.connect(identity=host.directory / "stranger")
    assert "authorized_keys" in caught.value.hint
    assert host.seen == []


async def test_taking_a_key_out_takes_effect_at_once(host: Host) -> None:
    await (await host.connect()).close()
    host.authorized_keys.write_text("# empty\n")
    with pytest.raises(TransportError, match="does not accept"):
        await host.connect()


async def test_the_handler_learns_the_rights_of_the_key(host: Host) -> None:
    line = host.authorized_keys.read_text()
    host.authorized_keys.write_text(f'migrator-rights="observe" {line}')
    await (await host.connect()).close()
    assert host.seen == [("somebody@127.0.0.1", frozenset({"observe"}))]


async def test_the_handler_learns_which_key_was_proved(host: Host) -> None:
    other = ensure_key(host.directory / "other")
    with host.authorized_keys.open("a") as file:
        file.write(public_line(other) + "\n")
    for name in ("id", "other"):
        async with await host.connect(identity=host.directory / name) as link:
            await link.send(b"hello")
            await link.receive(10)
    assert host.proved == [fingerprint(ensure_key(host.directory / "id")), fingerprint(other)]


async def test_a_right_that_does_not_exist_lets_nobody_in(host: Host) -> None:
    line = host.authorized_keys.read_text()
    host.authorized_keys.write_text(f'migrator-rights="recieve" {line}')
    with pytest.raises(TransportError, match="does not accept"):
        await host.connect()


async def test_nothing_but_a_link_is_to_be_had(host: Host) -> None:
    async with _logged_in(host) as connection:
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.create_process("id")
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.open_connection("127.0.0.1", host.daemon.port)
        with pytest.raises(asyncssh.ChannelListenError):
            await connection.forward_remote_port("", 0, "127.0.0.1", 1)
    async with _logged_in(host) as connection:
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.create_process()  # a shell
    assert host.seen == []


async def test_a_login_without_a_link_is_ended(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transport.daemon.LOGIN_SECONDS", 0.05)
    async with _logged_in(host) as connection:
        await asyncio.wait_for(connection.wait_closed(), 10)


async def test_a_session_without_a_command_is_ended(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transport.daemon.LOGIN_SECONDS", 0.05)
    async with _logged_in(host) as connection:
        # What asyncssh's client does to open a session, without the command that follows.
        channel = asyncssh.channel.SSHClientChannel(
            connection, asyncio.get_running_loop(), "strict", "utf-8", "strict", 1 << 20, 1 << 15
        )
        opening = asyncio.create_task(channel._open(b"session"))
        await asyncio.wait_for(connection.wait_closed(), 10)
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
    assert host.seen == []


async def test_more_links_than_one_key_may_have_are_refused_with_the_reason(host: Host) -> None:
    host.slots.peer_share = 1
    async with await host.connect() as link:
        with pytest.raises(TransportError, match=r"has no place left: 1 links are open there.*, and 1 of one key"):
            await host.connect()
        ensure_key(host.directory / "second")
        with host.authorized_keys.open("a") as file:
            file.write((host.directory / "second.pub").read_text())
        await (await host.connect(identity=host.directory / "second")).close()
        await link.send(b"undisturbed")
        assert await link.receive(10) == b"undisturbed"
    await (await host.connect()).close()


class _Deaf(asyncssh.SSHClientSession[bytes]):
    """A client that takes what comes and says what it is told to."""


async def test_messages_that_nobody_receives_stay_with_their_sender(host: Host) -> None:
    links: list[Link] = []

    async def never_receive(link: Link, peer: str, rights: frozenset[str]) -> None:
        links.append(link)
        await link.wait_closed()

    host.daemon._sessions.handler = never_receive
    async with _logged_in(host) as connection:
        channel, _ = await connection.create_session(_Deaf, "migrator agent --stdio", encoding=None)
        channel.write(encode_preface(MIN_WINDOW))
        message = encode_frame(Channel.CONTROL, bytes(1000))
        sent = 0
        for _ in range(100):
            for _ in range(200):  # small pieces: each is a packet of its own
                channel.write(message)
            sent += 200 * len(message)
            await asyncio.sleep(0.01)
        while not links or links[0].counters.wire_received < INBOX // 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        received = links[0].counters.wire_received
        assert received <= INBOX + (512 << 10) < sent
        (server,) = host.slots.connections()
        (theirs,) = server._channels.values()
        assert theirs._recv_buf == []
        for _ in range(100):
            await links[0].receive(20)
        while links[0].counters.wire_received < sent:
            await links[0].receive(20)


async def test_a_command_that_is_no_agent_is_refused_by_name(host: Host) -> None:
    with pytest.raises(TransportError, match="refuses to run 'rm -rf /'"):
        await host.connect(command="rm -rf /")


async def test_a_handler_that_fails_ends_its_link_and_no_other(host: Host) -> None:
    async with await host.connect() as healthy:
        async with await host.connect() as link:
            await link.send(b"fail")
            with pytest.raises(TransportError, match="closed the connection"):
                await link.receive(10)
        await healthy.send(b"alive")
        assert await healthy.receive(10) == b"alive"


async def test_closing_the_daemon_ends_its_links(host: Host) -> None:
    async with await host.connect() as link:
        await host.daemon.close()
        with pytest.raises(TransportError):
            await link.receive(10)


async def test_a_port_where_nothing_listens_is_explained(host: Host) -> None:
    port = host.daemon.port
    await host.daemon.close()
    with pytest.raises(TransportError, match=f"nothing listens at \\[127.0.0.1\\]:{port}") as caught:
        await host.connect(target=f"127.0.0.1:{port}")
    assert "sshd" in caught.value.hint


async def test_a_name_that_does_not_exist_is_explained(host: Host) -> None:
    with pytest.raises(TransportError, match=r"no-such-host\.invalid"):
        await host.connect(target="no-such-host.invalid")


async def test_a_server_that_never_answers_is_given_up(host: Host) -> None:
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    with pytest.raises(TransportError, match="does not answer"):
        await host.connect(target=f"127.0.0.1:{port}", timeout=0.3)
    silent.close()


async def test_a_server_that_is_no_ssh_server_is_an_error(host: Host) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 2000)
        writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(TransportError):
        await host.connect(target=f"127.0.0.1:{port}", timeout=5)
    server.close()


async def test_a_connection_cut_in_the_middle_of_a_stream_ends_both_sides(host: Host) -> None:
    cut = asyncio.Event()
    proxy = await _proxy(host.daemon.port, cut)
    port = proxy.sockets[0].getsockname()[1]
    pin(host.known_hosts, "127.0.0.1", port, ensure_key(host.directory / "host_key"))
    async with await host.connect(target=f"127.0.0.1:{port}") as link:
        await link.send(b"stream")
        source, feed = os.pipe()
        os.write(feed, b"beginning")
        sending = asyncio.create_task(link.pump_in(source))
        cut.set()
        with pytest.raises(TransportError):
            await sending
        with pytest.raises(BrokenPipeError):
            os.write(feed, b"more")
        os.close(feed)
    proxy.close()


def _logged_in(host: Host) -> Any:
    return asyncssh.connect(
        "127.0.0.1",
        host.daemon.port,
        username="root",
        client_keys=[str(host.directory / "id")],
        known_hosts=str(host.known_hosts),
        config=None,
        agent_path=None,
    )


async def _proxy(port: int, cut: asyncio.Event) -> asyncio.Server:
    """Forward connections to `port` until `cut`, then reset both sides."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", port)
        tasks = [
            asyncio.create_task(forward(reader, onward_writer)),
            asyncio.create_task(forward(onward_reader, writer)),
        ]
        await cut.wait()
        for one in (writer, onward_writer):
            one.transport.abort()
        await asyncio.gather(*tasks)

    return await asyncio.start_server(accept, "127.0.0.1", 0)


def _write_all(fd: int, data: bytes) -> None:
    with os.fdopen(fd, "wb") as file:
        file.write(data)


def _read_all(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        return file.read()
