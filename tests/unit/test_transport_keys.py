"""Keys, known hosts and targets: the files of OpenSSH."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import asyncssh
import pytest

from migrator.errors import TransportError
from transport.keys import ensure_key, fingerprint, known_keys, load_key, pin, public_line
from transport.ssh import Target, parse_target


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("host", Target(None, "host", None)),
        ("root@host", Target("root", "host", None)),
        ("root@host:2222", Target("root", "host", 2222)),
        ("a@b@host", Target("a@b", "host", None)),
        ("[::1]:2222", Target(None, "::1", 2222)),
        ("root@[fe80::1]", Target("root", "fe80::1", None)),
        ("fe80::1", Target(None, "fe80::1", None)),
    ],
)
def test_a_target_is_read_as_ssh_reads_it(text: str, target: Target) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    "text",
    [
        "",
        "root@",
        "host:",
        "host:0x",
        "host:0",
        "host:70000",
        "host:²",
        "[::1",
        "-oProxy",
        "root@h;id",
        "root@$(id)",
        "`id`",
        "-l@h",
        "root@a b",
        "a\nb",
        "x" * 300 + "|",
    ],
)
def test_what_is_no_target_is_refused(text: str) -> None:
    if text == "host:":
        assert parse_target(text) == Target(None, "host", None)
        return
    with pytest.raises(TransportError, match="is not user@host:port"):
        parse_target(text)


def test_a_new_key_is_private_and_is_the_same_next_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "id_ed25519"
    key = ensure_key(path, "me")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (tmp_path / "new" / "id_ed25519.pub").read_text().split() == public_line(key).split()
    assert public_line(key).endswith(" me")
    assert fingerprint(ensure_key(path)) == fingerprint(key)
    assert fingerprint(key).startswith("SHA256:")
    assert sorted(os.listdir(path.parent)) == ["id_ed25519", "id_ed25519.pub"]


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    ensure_key(tmp_path / "id")
    (tmp_path / "id").chmod(0o644)
    with pytest.raises(TransportError, match="read by others") as caught:
        ensure_key(tmp_path / "id")
    assert "chmod 600" in caught.value.hint


def test_what_is_wrong_with_a_key_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="No such file"):
        load_key(tmp_path / "none")
    (tmp_path / "text").write_text("no key")
    with pytest.raises(TransportError, match="not a private key"):
        load_key(tmp_path / "text")
    key = asyncssh.generate_private_key("ecdsa-sha2-nistp256")
    (tmp_path / "locked").write_bytes(key.export_private_key("pkcs8-pem", passphrase="secret"))
    with pytest.raises(TransportError, match="passphrase") as caught:
        load_key(tmp_path / "locked")
    assert "ssh-add" in caught.value.hint


@pytest.mark.parametrize("port", [None, 2222])
def test_a_pinned_key_is_found_again_for_its_host_and_port_only(tmp_path: Path, port: int | None) -> None:
    file = tmp_path / "deep" / "known_hosts"
    key = asyncssh.generate_private_key("ssh-ed25519")
    pin(file, "one", port, key)
    pin(file, "two", None, asyncssh.generate_private_key("ssh-ed25519"))
    found = known_keys([tmp_path / "none", file], "one", "192.0.2.1", port)
    assert [fingerprint(key) for key in found.trusted] == [fingerprint(key)]
    assert not known_keys([file], "three", "192.0.2.3", port).trusted


def test_pinning_keeps_a_last_line_without_its_newline(tmp_path: Path) -> None:
    file = tmp_path / "known_hosts"
    file.write_text("# no newline")
    pin(file, "host", None, asyncssh.generate_private_key("ssh-ed25519"))
    assert known_keys([file], "host", "", None).trusted


def test_a_known_hosts_file_that_cannot_be_understood_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "known_hosts"
    file.write_bytes(b"\xff\xfe nonsense")
    with pytest.raises(TransportError, match="known_hosts"):
        known_keys([file], "host", "", None)
