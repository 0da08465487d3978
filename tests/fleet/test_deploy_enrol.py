"""Enrolling a fleet: who may come to whom afterwards, tried with real agents and real keys."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import asyncssh
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.errors import TransportError, UsageError
from migrator.fleet.enrol import (
    EnrolFailed,
    Member,
    Target,
    check_public_line,
    controller_key,
    enrol,
    merge,
    over_ssh,
)
from transport import keys
from transport.daemon import serve
from transport.link import Link
from transport.ssh import connect

ROOT = Path(__file__).resolve().parents[2]
KEYGEN = f"""#!/bin/sh
exec {sys.executable} -c 'import sys; sys.path.insert(0, "{ROOT}")
from migrator.cli import main
sys.argv[0] = "migrator"; main()' "$@"
"""


class Hosts:
    """Hosts as far as enrolling sees them: each with a home and an /etc/migrator of its own, run here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.down: set[str] = set()
        (folder / "bin").mkdir()
        (folder / "bin/migrator").write_text(KEYGEN)
        (folder / "bin/uname").write_text("#!/bin/sh\necho $FAKE_NAME\n")
        for program in ("migrator", "uname"):
            (folder / "bin" / program).chmod(0o755)

    def etc(self, host: str) -> Path:
        return self.folder / host / "etc"

    def home(self, host: str) -> Path:
        return self.folder / host / "root"

    async def run(self, target: Target, script: str, stdin: bytes) -> bytes:
        if target.host in self.down:
            raise TransportError(f"{target.host}: Connection refused")
        self.home(target.host).mkdir(parents=True, exist_ok=True)
        environment = {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "HOME": str(self.home(target.host)),
            "MIGRATOR_ETC": str(self.etc(target.host)),
            "FAKE_NAME": f"node-{target.host.replace('.', '-')}",
        }
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", script, env=environment, stdin=-1, stdout=-1, stderr=-1
        )
        output, errors = await process.communicate(stdin)
        if process.returncode:
            raise TransportError(f"{target.host}: {errors.decode()}")
        return output

    @contextlib.asynccontextmanager
    async def agent(self, host: str) -> AsyncIterator[tuple[int, list[frozenset[str]]]]:
        """An agent's SSH server on the address of the host, with its files; the port, and who came with what."""
        came: list[frozenset[str]] = []

        async def handler(link: Link, peer: str, rights: frozenset[str]) -> None:
            came.append(rights)
            await link.send(b"welcome")
            with contextlib.suppress(TransportError):
                await link.receive()

        async with await serve(
            host, 0, host_keys=[self.etc(host) / "host_key"], authorized_keys=self.etc(host) / "authorized_keys",
            handler=handler,
        ) as server:  # fmt: skip
            yield server.port, came

    async def visit(self, source: str, host: str, port: int, identity: Path | None = None) -> None:
        """From one host to another, as its `migrate` would: root's key, root's pinned hosts."""
        known = self.home(source) / ".config/migrator/known_hosts"
        text = known.read_text().replace(":7022", f":{port}")  # the port that the test could have
        (self.folder / "known").write_text(text)
        link = await connect(
            f"root@{host}:{port}",
            identity=identity or self.home(source) / ".ssh/id_ed25519",
            known_hosts=self.folder / "known",
            config=False,
        )
        assert await link.receive() == b"welcome"
        await link.close()


@pytest.fixture
def hosts(tmp_path: Path) -> Hosts:
    return Hosts(tmp_path)


A, B, C = (Target(f"127.0.0.{number}") for number in (1, 2, 3))
GOOD = keys.public_line(asyncssh.generate_private_key("ssh-ed25519"))
HERE = ("127.0.0.0/8",)


@pytest.mark.parametrize("with_ca", [False, True])
async def test_hosts_that_were_enrolled_let_each_other_in_and_know_each_other(hosts: Hosts, with_ca: bool) -> None:
    ca = asyncssh.generate_private_key("ssh-ed25519") if with_ca else None
    done = await enrol([A, B, C], sources=HERE, ca=ca, run=hosts.run)
    assert [member.name for member in done.members] == ["node-127-0-0-1", "node-127-0-0-2", "node-127-0-0-3"]
    async with hosts.agent(B.host) as (port, came):
        await hosts.visit(A.host, B.host, port)
        await hosts.visit(C.host, B.host, port)
        assert came == [frozenset({"receive"})] * 2
        with pytest.raises(TransportError):  # a host has no business with itself
            await hosts.visit(B.host, B.host, port)


async def test_with_an_authority_a_host_that_joins_is_known_already(hosts: Hosts) -> None:
    ca = asyncssh.generate_private_key("ssh-ed25519")
    await enrol([A, B], sources=HERE, ca=ca, run=hosts.run)
    known = hosts.home(A.host) / ".config/migrator/known_hosts"
    before = known.read_text()
    await enrol([A, B, C], sources=HERE, ca=ca, run=hosts.run)
    assert known.read_text() != before, "its key is there as well"
    known.write_text(before)  # as it was ahead of C
    async with hosts.agent(C.host) as (port, _):
        await hosts.visit(A.host, C.host, port)


async def test_the_certificate_of_one_host_is_not_believed_of_another(hosts: Hosts) -> None:
    ca = asyncssh.generate_private_key("ssh-ed25519")
    await enrol([A, B, C], sources=HERE, ca=ca, run=hosts.run)
    for name in ("host_key", "host_key-cert.pub"):
        (hosts.etc(C.host) / name).write_bytes((hosts.etc(B.host) / name).read_bytes())
    async with hosts.agent(C.host) as (port, came):
        with pytest.raises(TransportError):
            await hosts.visit(A.host, C.host, port)
        assert came == []


async def test_the_certificate_of_another_authority_is_not_believed(hosts: Hosts) -> None:
    await enrol([A, B], sources=HERE, ca=asyncssh.generate_private_key("ssh-ed25519"), run=hosts.run)
    async with hosts.agent(B.host) as (port, _):
        await enrol([A, B], sources=HERE, ca=asyncssh.generate_private_key("ssh-ed25519"), run=hosts.run)
        with pytest.raises(TransportError, match="HAS CHANGED"):
            await hosts.visit(A.host, B.host, port)


async def test_a_controller_may_look_and_send_away_and_nothing_else(hosts: Hosts, tmp_path: Path) -> None:
    line = controller_key(tmp_path / "controller")
    done = await enrol([A, B], controllers=[line], sources=HERE, run=hosts.run)
    async with hosts.agent(A.host) as (port, came):
        hosts.home("ctl").joinpath(".config/migrator").mkdir(parents=True)
        (hosts.home("ctl") / ".config/migrator/known_hosts").write_text(done.known_hosts)
        await hosts.visit("ctl", A.host, port, tmp_path / "controller")
        assert came == [frozenset({"observe", "send"})]


async def test_a_member_that_comes_from_elsewhere_is_turned_away(hosts: Hosts) -> None:
    await enrol([A, B], sources=("10.99.0.0/16",), run=hosts.run)
    async with hosts.agent(B.host) as (port, came):
        with pytest.raises(TransportError):
            await hosts.visit(A.host, B.host, port)
        assert came == []


async def test_the_addresses_of_members_are_those_of_their_names(hosts: Hosts) -> None:
    await enrol([A, B], run=hosts.run)
    assert 'from="127.0.0.2"' in (hosts.etc(A.host) / "authorized_keys").read_text()


async def test_enrolling_again_changes_only_what_is_ours_and_takes_out_who_is_gone(hosts: Hosts) -> None:
    await enrol([A, B, C], sources=HERE, run=hosts.run)
    file = hosts.etc(A.host) / "authorized_keys"
    own = keys.public_line(asyncssh.generate_private_key("ssh-ed25519"))
    file.write_text(f"# by hand\n{own}\n\n{file.read_text()}{own} after\n")
    first = file.read_text()
    await enrol([A, B, C], sources=HERE, run=hosts.run)
    await enrol([A, B, C], sources=HERE, run=hosts.run)
    again = file.read_text()
    assert sorted(again.split("\n")) == sorted(first.split("\n"))
    gone = (hosts.home(C.host) / ".ssh/id_ed25519.pub").read_text().split()[1]
    assert gone in again
    await enrol([A, B], sources=HERE, run=hosts.run)
    left = file.read_text()
    assert gone not in left
    assert left.startswith(f"# by hand\n{own}\n") and f"{own} after" in left
    assert file.stat().st_mode & 0o777 == 0o600


async def test_private_keys_stay_where_they_are_and_are_kept(hosts: Hosts) -> None:
    travelled: list[bytes] = []

    async def seen(target: Target, script: str, stdin: bytes) -> bytes:
        output = await hosts.run(target, script, stdin)
        travelled.extend((stdin, output, script.encode()))
        return output

    await enrol([A, B], sources=HERE, run=seen)
    key = (hosts.etc(A.host) / "host_key").read_bytes()
    await enrol([A, B], sources=HERE, run=seen)
    assert (hosts.etc(A.host) / "host_key").read_bytes() == key
    assert not any(b"PRIVATE" in text for text in travelled)


async def test_a_host_that_is_down_is_named_and_nothing_is_changed_anywhere(hosts: Hosts) -> None:
    hosts.down.add(B.host)
    with pytest.raises(EnrolFailed, match=r"127\.0\.0\.2: Connection refused") as caught:
        await enrol([A, B, C], sources=HERE, run=hosts.run)
    assert caught.value.done == (A.host, C.host)
    assert not (hosts.etc(A.host) / "authorized_keys").exists()
    hosts.down.clear()
    await enrol([A, B, C], sources=HERE, run=hosts.run)


async def test_two_hosts_with_one_key_are_refused_before_anything_is_changed(hosts: Hosts) -> None:
    await enrol([A, C], sources=HERE, run=hosts.run)
    before = (hosts.etc(A.host) / "authorized_keys").read_text()
    hosts.etc(B.host).mkdir(parents=True)
    for name in ("host_key", "host_key.pub"):
        (hosts.etc(B.host) / name).write_bytes((hosts.etc(A.host) / name).read_bytes())
        (hosts.etc(B.host) / name).chmod(0o600)
    with pytest.raises(UsageError, match="same host key"):
        await enrol([A, B], sources=HERE, run=hosts.run)
    assert (hosts.etc(A.host) / "authorized_keys").read_text() == before


async def test_marks_that_somebody_has_edited_are_not_guessed_at(hosts: Hosts) -> None:
    await enrol([A, B], sources=HERE, run=hosts.run)
    file = hosts.etc(A.host) / "authorized_keys"
    file.write_text("\n".join(line for line in file.read_text().split("\n") if "fleet: end" not in line))
    before = file.read_text()
    with pytest.raises(EnrolFailed, match="authorized_keys on "):
        await enrol([A, B], sources=HERE, run=hosts.run)
    assert file.read_text() == before


@pytest.mark.parametrize("answer", [b"", b"name\nkey\nkey\n", b"a b\n\n\n", b"\xff\n" * 3, b"../x\nssh-ed25519 A\nx\n"])
async def test_a_host_that_answers_something_else_is_no_member(answer: bytes) -> None:
    async def run(target: Target, script: str, stdin: bytes) -> bytes:
        return answer

    with pytest.raises(EnrolFailed, match=r"127\.0\.0\.1"):
        await enrol([A], sources=HERE, run=run)


async def test_no_ssh_there_is_said_with_what_to_try() -> None:
    with pytest.raises(TransportError) as caught:
        await over_ssh(replace(A, host="127.0.0.9", user="nobody"), "true", b"")
    assert "migrator ps" in caught.value.hint


@given(
    before=st.lists(st.sampled_from(["", "a", "# b", "ssh-ed25519 AAAA x"]), max_size=6),
    lines=st.lists(st.sampled_from(["l1", "l2", "l3"]), max_size=4),
    more=st.lists(st.sampled_from(["m1", "m2"]), max_size=3),
)
def test_merging_replaces_our_lines_and_keeps_all_others(before: list[str], lines: list[str], more: list[str]) -> None:
    text = "\n".join(before)
    once = merge(text, lines)
    assert merge(once, lines) == once
    assert merge(once, more) == merge(text, more)
    assert [line for line in once.split("\n") if line in before and line] == [line for line in before if line]


@pytest.mark.parametrize("text", ["", "-oProxyCommand=x", "root@", "a b", "root@-x", "a;b", "a\nb", "$(x)", "root@@a"])
def test_what_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Target.parse(text)


def test_hosts_are_read_as_ssh_writes_them() -> None:
    assert Target.parse("10.0.0.1") == Target("10.0.0.1", "root")
    assert Target.parse("admin@a.example") == Target("a.example", "admin")
    assert Target.parse("[2001:db8::1]").host == "2001:db8::1"


@pytest.mark.parametrize(
    "line", ["", "ssh-ed25519", 'command="x" ssh-ed25519 AAAA', "ssh-rsa AAAA", "x" * 100, f"{GOOD}\n{GOOD}"]
)
def test_what_is_no_public_key_gets_no_rights(line: str) -> None:
    with pytest.raises(UsageError):
        check_public_line(line)


@pytest.mark.parametrize("source", ["", "anywhere", "10.0.0.0/33", "10.0.0.1/8", '"'])
async def test_a_source_that_is_none_is_refused(source: str, hosts: Hosts) -> None:
    with pytest.raises(UsageError):
        await enrol([A], sources=[source], run=hosts.run)


def test_a_certificate_that_is_not_of_the_key_is_refused(tmp_path: Path) -> None:
    ca, other = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    keys.ensure_key(tmp_path / "host_key")
    certificate = ca.generate_host_certificate(other, "x", principals=["a"]).export_certificate()
    (tmp_path / "host_key-cert.pub").write_bytes(certificate)
    with pytest.raises(TransportError, match="another key"):
        keys.host_key(tmp_path / "host_key")
    (tmp_path / "host_key-cert.pub").write_text("nonsense")
    with pytest.raises(TransportError, match="cannot read the certificate"):
        keys.host_key(tmp_path / "host_key")


def test_a_member_is_what_others_need_and_no_more() -> None:
    assert set(Member.__slots__) == {"target", "name", "host_key", "user_key", "addresses"}
