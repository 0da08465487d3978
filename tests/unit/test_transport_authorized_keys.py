"""authorized_keys fails closed: what is not understood lets nobody in, and is logged with its line."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import asyncssh
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.errors import TransportError
from transport.authorized_keys import RIGHTS, KeyFile, parse
from transport.keys import public_line
from transport.strict_modes import read_strictly

# Always the same two: names of tests are made of them, and all workers must find the same tests.
KEY, OTHER = (
    asyncssh.import_public_key(f"ssh-ed25519 {blob}")
    for blob in (
        "AAAAC3NzaC1lZDI1NTE5AAAAILhVxqutb+G1bvCrZOfokbYsuBc1FALMHtGyYVMKdI25",
        "AAAAC3NzaC1lZDI1NTE5AAAAIGfg7/OL0rxOBDcAdXRavdTDnV8b9kwgZ4N8UjwZ08Sd",
    )
)
LINE = public_line(KEY)
BLOB = LINE.split()[1]
NOW = datetime(2027, 6, 15, 12, 0, 0, tzinfo=UTC).timestamp()
HERE = "192.0.2.1"


def rights(text: str, addr: str = HERE, key: asyncssh.SSHKey = KEY) -> frozenset[str]:
    return parse(text).rights(key, addr, NOW)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", RIGHTS),
        ('migrator-rights="receive" ', {"receive"}),
        ('Migrator-Rights="receive" ', {"receive"}),
        ('MIGRATOR-RIGHTS="observe,send" ', {"observe", "send"}),
        ('migrator-rights="receive, send" ', {"receive", "send"}),
        ('from="192.0.2.1" ', RIGHTS),
        ('From="192.0.2.0/24" ', RIGHTS),
        ('from="198.51.100.0/24,192.0.2.*" ', RIGHTS),
        ('from="192.0.2.?" ', RIGHTS),
        ('from="*,!192.0.2.2" ', RIGHTS),
        ('expiry-time="20270616" ', RIGHTS),
        ('Expiry-Time="202706151201Z" ', RIGHTS),
        ('expiry-time="20270615120000Z" ', RIGHTS),
        ('restrict,migrator-rights="send" ', {"send"}),
        ('no-pty,no-X11-forwarding,migrator-rights="observe" ', {"observe"}),
        ('migrator-rights="receive",from="192.0.2.0/24",expiry-time="20280101"\t', {"receive"}),
    ],
)
def test_an_option_gives_what_it_says(options: str, expected: set[str]) -> None:
    assert parse(options + LINE).void == {}
    assert rights(options + LINE) == expected
    assert rights(options + LINE, key=OTHER) == frozenset()


@pytest.mark.parametrize(
    "options",
    [
        'from="192.0.2.2"',
        'From="198.51.100.0/24"',
        'FROM="2001:db8::/32"',
        'from="!192.0.2.1"',
        'from="*,!192.0.2.1"',
        'from="192.0.2.0/24,!192.0.2.0/28"',
        'expiry-time="20270614"',
        'Expiry-Time="20270615115959Z"',
        'expiry-time="19700101"',
    ],
)
def test_who_comes_from_elsewhere_or_too_late_has_no_rights(options: str) -> None:
    assert parse(f"{options} {LINE}").void == {}
    assert rights(f"{options} {LINE}") == frozenset()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("restrict", "no right"),
        ("Restrict", "no right"),
        ('command="migrator agent --stdio"', "command cannot be honoured"),
        ('Command="true",migrator-rights="receive"', "command cannot be honoured"),
        ("cert-authority", "cert-authority cannot be honoured"),
        ('principals="root"', "principals cannot be honoured"),
        ('environment="A=1"', "environment cannot be honoured"),
        ('permitopen="*:1"', "permitopen cannot be honoured"),
        ("verify-required", "verify-required cannot be honoured"),
        ("pty", "pty cannot be honoured"),
        ('fron="192.0.2.1"', "fron cannot be honoured"),
        ('migrator-right="observe"', "migrator-right cannot be honoured"),
        ("restric", "restric cannot be honoured"),
        ('migrator-rights="recieve"', "no such right: 'recieve'"),
        ('migrator-rights="observe,recieve"', "no such right"),
        ('migrator-rights="Receive"', "no such right"),
        ('migrator-rights="receive,"', "no such right: ''"),
        ('migrator-rights=""', "no such right: ''"),
        ("migrator-rights", "no value"),
        ("migrator-rights=observe", "neither a key nor options"),
        ("from=192.0.2.2", "neither a key nor options"),
        ("from", "no value"),
        ('from=""', "neither an address nor a network"),
        ('from="192.0.2.1,"', "neither an address nor a network"),
        ('from="192.0.2.1/24"', "neither an address nor a network"),  # bits beside the network
        ('from="192.0.2.0/33"', "neither an address nor a network"),
        ('from="192.0.2.0/255.255.255.0"', "neither an address nor a network"),
        ('from="host.example"', "neither an address nor a network"),
        ('from="*,!host.example"', "neither an address nor a network"),
        ('from="!*.example.com"', "no pattern of addresses"),
        ('from="*,!*.de"', "no pattern of addresses"),
        ('from="192.0.2.0/24, 10.0.0.1"', "neither an address nor a network"),
        ("expiry-time", "no value"),
        ('expiry-time=""', "is no time"),
        ('expiry-time="2027"', "is no time"),
        ('expiry-time="20271301"', "is no time"),
        ('expiry-time="20270230"', "is no time"),
        ('expiry-time="2027-12-31"', "is no time"),
        ('expiry-time="20280101+0100"', "is no time"),
        ('expiry-time="00000000"', "is no time"),
        ('from="192.0.2.1",from="*"', "from is there twice"),
        ('migrator-rights="observe",Migrator-Rights="send"', "migrator-rights is there twice"),
        ('no-pty="yes"', "takes no value"),
        ('restrict="no",migrator-rights="send"', "takes no value"),
        ('migrator-rights="receive', "neither a key nor options"),
        ('migrator-rights="receive\\"', "neither a key nor options"),
        ('migrator-rights="receive"from="*"', "neither a key nor options"),
        ('migrator-rights="receive",', "neither a key nor options"),
        ('migrator-rights="receive" no-pty', "no public key"),
        ("@cert-authority *", "neither a key nor options"),
        ("@Revoke", "neither a key nor options"),
        ("-", "- cannot be honoured"),
    ],
)
def test_what_is_not_understood_voids_its_line_and_no_other(options: str, reason: str) -> None:
    text = f"# comment\n{options} {LINE}\n{public_line(OTHER)}\n"
    assert reason in parse(text).void[2]
    assert rights(text) == frozenset()
    assert rights(text, key=OTHER) == RIGHTS


@pytest.mark.parametrize(
    "line",
    [
        "ssh-ed25519",
        f"ssh-rsa {BLOB}",
        f"ssh-ed25519 {BLOB[:-8]}",
        f"ssh-ed25519 {BLOB[:20]}\N{LATIN SMALL LETTER E WITH ACUTE}{BLOB[20:]}",
        BLOB,
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "\x00",
    ],
)
def test_a_line_without_a_key_is_void(line: str) -> None:
    assert list(parse(line).void) == [1]
    assert rights(line) == frozenset()


@pytest.mark.parametrize("marker", ["@revoked ", "@REVOKED\t", "  @revoked  ", "@revoked"])
@pytest.mark.parametrize("order", ["first", "last"])
def test_a_revoked_key_is_refused_wherever_else_it_is_listed(marker: str, order: str) -> None:
    lines = [f"{marker}{LINE}", LINE, public_line(OTHER)]
    text = "\n".join(lines if order == "first" else lines[::-1])
    assert rights(text) == frozenset()
    assert rights(text, key=OTHER) == RIGHTS


@pytest.mark.parametrize("line", ["@revoked", "@revoked ssh-ed25519 AAAA", f"@revoked * {LINE}"])
def test_a_revocation_that_is_not_understood_lets_nobody_in(line: str) -> None:
    with pytest.raises(TransportError, match="line 2 revokes a key, but which"):
        parse(f"{public_line(OTHER)}\n{line}")


def test_the_first_line_that_admits_the_key_counts() -> None:
    text = f'from="198.51.100.1" {LINE}\nmigrator-rights="observe" {LINE}\n{LINE}\n'
    assert rights(text) == {"observe"}
    assert rights(text, "198.51.100.1") == RIGHTS


@pytest.mark.parametrize("comment", ["a\x0bb", "a\x85b", "a\u2028b", "\xff"])
def test_only_a_newline_ends_a_line(comment: str) -> None:
    separator = comment[1:2] or comment
    assert rights(f"{public_line(OTHER)} {separator}{LINE}") == frozenset()
    assert rights(f"{LINE} {comment}\r\n") == RIGHTS


@pytest.mark.parametrize(
    ("source", "addr"),
    [
        ("192.0.2.1", "::ffff:192.0.2.1"),
        ("fe80::/10", "fe80::1%eth0"),
        ("2001:DB8::1", "2001:db8:0:0::1"),
        ("2001:DB8:*", "2001:db8::1"),
    ],
)
def test_an_address_counts_not_how_it_is_written(source: str, addr: str) -> None:
    assert rights(f'from="{source}" {LINE}', addr) == RIGHTS
    assert rights(f'from="*,!{source}" {LINE}', addr) == frozenset()


@pytest.mark.parametrize("addr", ["", "host.example", "192.0.2"])
def test_from_matches_nothing_that_is_no_address(addr: str) -> None:
    assert rights(f'from="*" {LINE}', addr) == frozenset()


def test_expiry_without_z_is_local_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "UTC-5")  # five hours ahead
    time.tzset()
    try:
        assert rights(f'expiry-time="202706151701" {LINE}') == RIGHTS
        assert rights(f'expiry-time="202706151659" {LINE}') == frozenset()
    finally:
        monkeypatch.undo()
        time.tzset()


RESTRICTED = f'migrator-rights="observe",from="198.51.100.7",expiry-time="20270101Z" {LINE}'


@given(st.integers(0, RESTRICTED.index("ssh-ed25519") - 1), st.characters(exclude_characters="\n"))
def test_no_single_wrong_character_gives_a_right_that_was_not_given(at: int, char: str) -> None:
    changed = RESTRICTED[:at] + char + RESTRICTED[at + 1 :]
    assert rights(changed) <= {"observe"}
    if not changed.startswith("#") and 'expiry-time="20270101Z"' in changed:
        assert rights(changed) == frozenset()


@given(st.sampled_from(["migrator-rights", "from", "expiry-time", "restrict", "command"]), st.data())
def test_names_of_options_have_no_case(name: str, data: st.DataObject) -> None:
    value = {"migrator-rights": "observe", "from": HERE, "expiry-time": "20280101", "command": "x"}.get(name)
    spelt = "".join(data.draw(st.sampled_from([char.lower(), char.upper()])) for char in name)
    option = name if value is None else f'{name}="{value}"'
    assert rights(f"{option.replace(name, spelt)} {LINE}") == rights(f"{option} {LINE}")


@given(st.text(max_size=300), st.text(max_size=40))
def test_any_text_is_read_and_gives_a_stranger_nothing(before: str, after: str) -> None:
    text = f"{before} {LINE} {after}"
    try:
        found = parse(text)
    except TransportError as error:
        assert "revokes a key" in error.message
        return
    assert found.rights(OTHER, HERE, NOW) == frozenset()
    assert all(number >= 1 and reason for number, reason in found.void.items())


@given(st.binary(max_size=200))
def test_any_bytes_in_place_of_the_options_never_raise_a_right(junk: bytes) -> None:
    text = (junk + b' migrator-rights="observe" ' + LINE.encode()).decode("utf-8", "replace")
    last = text.split("\n")[-1].strip(" \t\r")
    try:
        assert rights(text) <= ({"observe"} if last.startswith("migrator-rights") else frozenset())
    except TransportError as error:
        assert "revokes a key" in error.message


# The file itself


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "etc"
    path.mkdir(mode=0o755)
    (path / "authorized_keys").write_text(LINE + "\n")
    (path / "authorized_keys").chmod(0o644)
    yield path


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("authorized_keys", 0o664),
        ("authorized_keys", 0o646),
        ("authorized_keys", 0o622),
        (".", 0o775),
        (".", 0o757),
        (".", 0o1777),  # sticky is good enough for directories above only
        ("..", 0o777),
        ("..", 0o770),
    ],
)
def test_a_file_that_others_may_write_lets_nobody_in(
    folder: Path, name: str, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    file = KeyFile(folder / "authorized_keys")
    assert file.rights(KEY, HERE) == RIGHTS
    at = (folder / name).resolve()
    at.chmod(mode)
    try:
        with caplog.at_level(logging.ERROR, "migrator.transport"):
            assert file.rights(KEY, HERE) == frozenset()
    finally:
        at.chmod(0o755)
    assert f"{at} can be written by others" in caplog.text
    assert file.rights(KEY, HERE) == RIGHTS


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o444, 0o400])
def test_a_file_that_only_its_owner_writes_counts(folder: Path, mode: int) -> None:
    (folder / "authorized_keys").chmod(mode)
    assert KeyFile(folder / "authorized_keys").rights(KEY, HERE) == RIGHTS


def test_a_sticky_directory_above_is_no_harm(folder: Path) -> None:
    folder.parent.chmod(0o1777)
    assert KeyFile(folder / "authorized_keys").rights(KEY, HERE) == RIGHTS


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
@pytest.mark.parametrize("name", ["authorized_keys", ".", ".."])
def test_a_file_of_somebody_else_lets_nobody_in(folder: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    at = (folder / name).resolve()
    os.chown(at, 65534, -1)
    with caplog.at_level(logging.ERROR, "migrator.transport"):
        assert KeyFile(folder / "authorized_keys").rights(KEY, HERE) == frozenset()
    assert f"{at} belongs to the user 65534" in caplog.text
    os.chown(at, 0, -1)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_a_symbolic_link_counts_only_if_nobody_else_could_have_placed_it(folder: Path) -> None:
    public = folder.parent / "public"
    public.mkdir()
    public.chmod(0o1777)
    (public / "ours").symlink_to(folder)
    (public / "planted").symlink_to(folder)
    (folder / "there").symlink_to("../etc/authorized_keys")
    os.lchown(public / "planted", 65534, 65534)
    assert KeyFile(public / "ours" / "there").rights(KEY, HERE) == RIGHTS
    assert KeyFile(public / "planted" / "there").rights(KEY, HERE) == frozenset()
    (folder / "indirect").symlink_to(public / "planted" / "authorized_keys")
    assert KeyFile(folder / "indirect").rights(KEY, HERE) == frozenset()
    (folder / "loop").symlink_to("loop")
    with pytest.raises(TransportError, match="symbolic links"):
        read_strictly(folder / "loop", 100)


def test_what_is_no_regular_file_lets_nobody_in_and_holds_nobody_up(folder: Path) -> None:
    os.mkfifo(folder / "fifo", 0o600)
    for name in ("fifo", ".", "none", "authorized_keys/deeper"):
        assert KeyFile(folder / name).rights(KEY, HERE) == frozenset()


def test_a_file_without_end_lets_nobody_in(folder: Path) -> None:
    with (folder / "authorized_keys").open("a") as file:
        file.write("# long\n" * (1 << 18))
    assert KeyFile(folder / "authorized_keys").rights(KEY, HERE) == frozenset()


def test_what_is_wrong_is_logged_with_file_and_line_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "authorized_keys"
    file = KeyFile(path)
    path.write_text(f'# first\nFron="10.0.0.1" {LINE}\n')
    with caplog.at_level(logging.WARNING, "migrator.transport"):
        for _ in range(3):
            assert file.rights(KEY, HERE) == frozenset()
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}:2: this line lets nobody in: the option fron cannot be honoured here"
    ]
    caplog.clear()
    path.unlink()
    with caplog.at_level(logging.WARNING, "migrator.transport"):
        for _ in range(3):
            assert file.rights(KEY, HERE) == frozenset()
    assert len(caplog.records) == 1
    assert "nobody can log in" in caplog.text


def test_a_change_takes_effect_at_once(folder: Path) -> None:
    path = folder / "authorized_keys"
    file = KeyFile(path)
    for expected in ("observe", "receive", "observe"):  # as fast as one can write, and partly of one length
        path.write_text(f'migrator-rights="{expected}" {LINE}\n')
        assert file.rights(KEY, HERE) == {expected}
