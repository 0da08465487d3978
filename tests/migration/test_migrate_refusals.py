"""What a person is told when a migration cannot be: what, why, what to do, and that the workload runs on."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.container import list_containers, stop
from migrator.testing.hosts import Host
from migrator.testing.stage import AGENT_PORT, MIGRATOR, Stage
from migrator.testing.workloads import build
from transport.keys import ensure_key, host_pattern, pin, public_line

pytestmark = pytest.mark.root

ROOT = Path(__file__).resolve().parents[2]


class Ticking:
    """A container on host a that counts."""

    def __init__(self, stage: Stage) -> None:
        self.out = stage.folder / "ticking.out"
        argv = ["run", "-d", "--name", "ticking", "--bridge", "br0", "--", str(build("counter")), str(self.out), "5"]
        self.pid = int(stage.a.run([*MIGRATOR, *argv]).stdout)
        self.check_runs_on()

    def check_runs_on(self) -> None:
        """The same task, counting on."""
        assert os.path.exists(f"/proc/{self.pid}")
        size, deadline = self._size(), time.monotonic() + 10
        while self._size() == size:
            assert time.monotonic() < deadline, "it stands still"
            time.sleep(0.02)

    def _size(self) -> int:
        return self.out.stat().st_size if self.out.exists() else 0


@pytest.fixture(scope="module")
def ticking(stage: Stage) -> Iterator[Ticking]:
    yield Ticking(stage)
    with stage.a.inside():
        stop("ticking", timeout=1)


def refused(stage: Stage, what: str | int, *options: str, peer: str = "", env: dict[str, str] | None = None) -> str:
    """What `migrator migrate` says on its way to an exit code, which it begins with."""
    peer = peer or f"root@{stage.b.address}:{AGENT_PORT}"
    done = stage.a.run([*MIGRATOR, "migrate", str(what), peer, *options], check=False, env=env)
    assert done.returncode, done.stderr
    assert "the workload is running on the source, as if nothing had been asked" in done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return f"{done.returncode}: {done.stderr}"


# ---------------------------------------------------------------------- getting there


def test_a_host_key_never_seen_is_refused_with_its_fingerprint(stage: Stage, ticking: Ticking, tmp_path: Path) -> None:
    (tmp_path / "none").touch()
    text = refused(stage, "ticking", env={"MIGRATOR_KNOWN_HOSTS": str(tmp_path / "none")})
    assert re.match(r"7: error: .*host key.*SHA256:\S+", text), text
    assert "--accept-new-host-key" in text
    ticking.check_runs_on()


def test_a_host_key_that_has_changed_is_refused_whatever_is_accepted(
    stage: Stage, ticking: Ticking, tmp_path: Path
) -> None:
    other = ensure_key(tmp_path / "other")
    known = tmp_path / "known"
    known.write_text(f"{host_pattern(stage.b.address, AGENT_PORT)} {public_line(other)}\n")
    before = known.read_text()
    text = refused(stage, "ticking", "--accept-new-host-key", env={"MIGRATOR_KNOWN_HOSTS": str(known)})
    assert re.match(r"7: error: .*CHANGED", text), text
    assert known.read_text() == before
    ticking.check_runs_on()


def test_a_key_that_is_not_authorised_is_refused(stage: Stage, ticking: Ticking, tmp_path: Path) -> None:
    ensure_key(tmp_path / "stranger")
    text = refused(stage, "ticking", env={"MIGRATOR_IDENTITY": str(tmp_path / "stranger")})
    assert re.match(r"7: error: ", text), text
    assert "authorized_keys" in text
    ticking.check_runs_on()


def test_a_key_without_the_right_to_receive_is_refused(stage: Stage, ticking: Ticking) -> None:
    keys = stage.b.folder / "authorized_keys"
    before = keys.read_text()
    keys.write_text(f'migrator-rights="observe" {before}')
    try:
        text = refused(stage, "ticking")
    finally:
        keys.write_text(before)
    assert re.match(r"[78]: error: .*no right to bring workloads", text), text
    assert "migrator-rights" in text
    ticking.check_runs_on()


@pytest.mark.parametrize("peer", ["root@no-such-host.invalid", f"root@10.77.0.2:{AGENT_PORT + 1}"])
def test_a_host_that_is_not_there_is_named(stage: Stage, ticking: Ticking, peer: str) -> None:
    text = refused(stage, "ticking", peer=peer)
    assert re.match(r"7: error: .*(no-such-host.invalid|10\.77\.0\.2)", text), text
    assert "do: " in text
    ticking.check_runs_on()


# ---------------------------------------------------------------------- what stands there


def test_a_container_of_that_name_that_lives_there_is_not_replaced(stage: Stage, ticking: Ticking) -> None:
    argv = ["run", "-d", "--name", "ticking", "--bridge", "", "--", "sleep", "1000"]
    there = int(stage.b.run([*MIGRATOR, *argv]).stdout)
    try:
        text = refused(stage, "ticking")
    finally:
        with stage.b.inside():
            stop("ticking", timeout=1)
    assert text.startswith("3: "), text
    assert f"one of that name lives here already (pid {there})" in text
    ticking.check_runs_on()


def test_a_bridge_that_is_not_there_is_named(stage: Stage) -> None:
    stage.a.run(["ip", "link", "add", "br-other", "type", "bridge"])
    argv = ["run", "-d", "--name", "bridged", "--bridge", "br-other", "--", "sleep", "1000"]
    pid = int(stage.a.run([*MIGRATOR, *argv]).stdout)
    try:
        text = refused(stage, "bridged")
        assert os.path.exists(f"/proc/{pid}")
    finally:
        with stage.a.inside():
            stop("bridged", timeout=1)
        stage.a.run(["ip", "link", "del", "br-other"])
    assert text.startswith("3: "), text
    assert "there is no bridge br-other" in text
    assert "--bridge" in text


def test_a_budget_that_cannot_be_met_is_given_up_in_time(stage: Stage, ticking: Ticking) -> None:
    started = time.monotonic()
    text = refused(stage, "ticking", "--max-downtime", "1us", "--timeout", "3s")
    assert text.startswith("8: "), text
    assert "--timeout" in text
    assert time.monotonic() - started < 30
    ticking.check_runs_on()
    await_nothing_left(stage.b)


def await_nothing_left(host: Host) -> None:
    deadline = time.monotonic() + 10
    while True:
        with host.inside():
            left = list_containers()
        if not left:
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


# ---------------------------------------------------------------------- what it holds

OBSTACLES = {
    "fanotify": ("libc.fanotify_init(0, 0)", r"fd 3.*fanotify"),
    "io_uring": ("libc.syscall(425, 4, ctypes.create_string_buffer(120))", r"fd 3.*io_uring"),
    "a terminal": ("os.openpty()", r"fd [34].*(pty|terminal|/dev/pt)"),
    "a connection": (
        "l = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(l.getsockname())",
        r"fd \d.*(TCP|connection)",
    ),
}


@pytest.mark.parametrize("what", OBSTACLES)
def test_what_cannot_be_carried_is_named_with_its_pid_and_descriptor(stage: Stage, what: str, tmp_path: Path) -> None:
    act, expected = OBSTACLES[what]
    with holding(stage.a, act, tmp_path) as child:
        text = refused(stage, child.pid)
        assert child.poll() is None
        assert not stopped(child.pid)
    assert text.startswith("3: "), text
    assert re.search(rf"pid {child.pid}\b.*{expected}", text), text


@contextlib.contextmanager
def holding(host: Host, act: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds something and waits."""
    code = f"""
        import ctypes, os, socket, sys, time
        libc = ctypes.CDLL(None)
        held = {act.split(";")[0] if "=" not in act else "None"}
        {act if "=" in act else ""}
        open({str(folder / "ready")!r}, "w").close()
        time.sleep(1000)
    """
    child = host.popen(
        [os.path.realpath(sys.executable), "-c", textwrap.dedent(code)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 10
    while not (folder / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield child
    child.kill()
    child.wait()


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "tT"


def test_nothing_was_left_behind_by_any_of_these(stage: Stage, ticking: Ticking) -> None:
    await_nothing_left(stage.b)
    ticking.check_runs_on()


# ---------------------------------------------------------------------- over a plain sshd, without a daemon

SSHD_PORT = 2222
OVER_SSHD = f"root@10.77.0.2:{SSHD_PORT}"


@pytest.fixture(scope="module")
def sshd(stage: Stage) -> Iterator[str]:
    """OpenSSH's own server on host b; the command that starts migrator there."""
    folder = stage.b.folder
    (folder / "sshd_config").write_text(
        f"Port {SSHD_PORT}\nListenAddress {stage.b.address}\nHostKey {folder}/host_key\nPidFile none\nUsePAM no\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nPasswordAuthentication no\n"
        "PermitRootLogin prohibit-password\nKbdInteractiveAuthentication no\n"
    )
    pin(stage.folder / "known_hosts", stage.b.address, SSHD_PORT, ensure_key(folder / "host_key"))
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd wants it; the boot scripts make it
    program = shutil.which("sshd") or "/usr/sbin/sshd"
    server = stage.b.popen([program, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    line = server.stderr.readline()
    assert "listening" in line, line
    # sshd gives its sessions none of our environment: the host's own directories go with the command.
    settings = " ".join(f"{key}={shlex.quote(value)}" for key, value in stage.b.env.items())
    yield f"cd {ROOT} && {settings} {shlex.join(MIGRATOR)} agent --stdio"
    server.terminate()
    server.wait()


def test_a_remote_command_that_is_not_there_says_what_to_install(stage: Stage, sshd: str, ticking: Ticking) -> None:
    text = refused(stage, "ticking", "--remote-command", "no-such-migrator agent --stdio", peer=OVER_SSHD)
    assert re.match(r"7: error: .*no-such-migrator.*not found", text), text
    assert "--remote-command" in text
    ticking.check_runs_on()


def test_over_a_plain_sshd_the_copy_lives_on_when_the_session_has_ended(stage: Stage, sshd: str) -> None:
    out = stage.folder / "away.out"
    argv = ["run", "-d", "--name", "away", "--bridge", "", "--", str(build("counter")), str(out), "5"]
    stage.a.run([*MIGRATOR, *argv])
    done = stage.a.run([*MIGRATOR, "migrate", "away", OVER_SSHD, "--remote-command", sshd, "--json"], check=False)
    assert done.returncode == 0, done.stderr
    with stage.a.inside():
        assert "away" not in [container.name for container in list_containers()]
    with stage.b.inside():
        (copy,) = list_containers()
    for _ in range(2):
        size = out.stat().st_size
        time.sleep(0.5)
        assert out.stat().st_size > size, "it ended with the session"
    parent = int(Path(f"/proc/{copy.init_pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert Path(f"/proc/{parent}/comm").read_text().strip() != "sshd"
    numbers = [int(n) for n in re.findall(r"^tick (\d+) .*\n", out.read_text(), re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    with stage.b.inside():
        stop("away", timeout=5)
    assert out.read_text().endswith("ok\n")
