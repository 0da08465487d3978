"""What a person reads who asks for what cannot be: a sentence, what to do, and an exit code of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from cli import MIGRATOR, migrator
from typer.testing import CliRunner

from migrator.cli import containers
from migrator.cli.app import make
from migrator.testing.hosts import TwoHosts

pytestmark = pytest.mark.root

app = make()
GOLDEN = Path(__file__).parents[1] / "golden" / "rev1.img"


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIGRATOR_STATE_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("MIGRATOR_JOURNAL_DIR", str(tmp_path / "journal"))
    monkeypatch.setenv("MIGRATOR_LOG_DIR", str(tmp_path / "log"))


CASES = [
    (["checkpoint", "99999999"], 2, "there is no process 99999999"),
    (["checkpoint", "nosuch"], 2, "there is no container 'nosuch'"),
    (["checkpoint", "0"], 2, "there is no process 0"),
    (["checkpoint", "2"], 2, "no memory of its own"),
    (["checkpoint", "{self}", "--kill", "--leave-running"], 2, "exclude one another"),
    (["checkpoint", "{self}", "-o", "{tmp}/no/image"], 2, "No such file or directory"),
    (["checkpoint", "{self}", "-o", "{tmp}"], 2, "Is a directory"),
    (["checkpoint", "{self}", "-o", "{tmp}/image"], 2, "start it as a child"),
    (["restart", "-i", "{tmp}/nothing"], 2, "No such file or directory"),
    (["restart", "-i", "{tmp}"], 2, "is a directory"),
    (["restart", "-i", "/dev/null"], 6, "without a trailer"),
    (["restart", "-i", "/etc/passwd"], 6, "unknown"),
    (["image", "info", "{tmp}/nothing"], 2, "No such file or directory"),
    (["image", "info", "{tmp}"], 2, "is a directory"),
    (["image", "info", "/etc/passwd"], 6, "BROKEN"),
    (["stop", "nosuch"], 2, "no container 'nosuch'"),
    (["thaw", "nosuch"], 2, "no container and no process 'nosuch'"),
    (["run", "--name", "a/b", "--", "true"], 2, "bad name"),
    (["run", "--name", "cliname", "--ip", "1.2.3", "--", "true"], 2, "ADDRESS/LENGTH, such as"),
    (
        ["run", "--name", "cliname", "--bridge", "", "--ip", "10.0.0.5/24", "--", "true"],
        2,
        "10.0.0.5/24 would be on no",
    ),
    (["run", "--name", "cliname", "-e", "NO SUCH", "--", "true"], 2, "no environment variable 'NO SUCH'"),
    (
        ["run", "--name", "cliname", "--bridge", "", "-w", "/no/such", "--", "true"],
        127,
        "working directory /no/such: No",
    ),
    (["run", "--name", "cliname", "--gateway", "there", "--", "true"], 2, "bad gateway"),
    (["run", "--name", "cliname", "--tmpfs", "some/where", "--", "true"], 2, "an absolute path"),
    (["run", "--name", "cliname", "--root", "/nosuch", "--", "true"], 2, "/nosuch is no directory"),
    (["run", "--name", "cliname", "--bridge", "", "--", "/no/such"], 127, "No such file or directory"),
    (["settle", "m-nosuchone"], 2, "is not open on this host"),
    (["settle", "--here"], 2, "which migration?"),
    (["settle", "m-nosuchone", "--here"], 2, "m-nosuchone"),
    (["settle", "--here", "--away", "m-nosuchone"], 2, "exclude one another"),
    (["check", "{self}", "root@127.0.0.1:1"], 7, "127.0.0.1"),
    (["migrate", "99999999", "nowhere"], 2, "there is no process 99999999"),
    (["migrate", "{self}", "h", "--max-downtime", "soon"], 2, "is no duration"),
    (["migrate", "{self}", "h", "--bandwidth", "much"], 2, "is no number of bytes"),
    (["agent", "--listen", "here"], 2, "is no ADDRESS:PORT"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), CASES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_an_error_is_a_sentence_and_an_exit_code(arguments: list[str], code: int, text: str, tmp_path: Path) -> None:
    given = [word.format(self=os.getpid(), tmp=tmp_path) for word in arguments]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == code, done.output
    assert text in done.output
    assert "Traceback" not in done.output
    assert not list(tmp_path.glob("*.img")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "command", ["run", "ps", "stop", "thaw", "checkpoint", "restart", "migrate", "check", "settle"]
)
def test_every_command_explains_itself(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0
    assert "Usage:" in done.output


def test_an_image_is_not_written_to_a_terminal() -> None:
    ours, theirs = os.openpty()
    done = subprocess.run(
        [*MIGRATOR, "checkpoint", str(os.getpid())], stdout=theirs, stderr=subprocess.PIPE, timeout=60, check=False
    )
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 2
    assert b"not for a terminal" in done.stderr
    assert b"-o FILE" in done.stderr


def test_what_only_root_may_do_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted", "/proc/1/ns/pid")

    monkeypatch.setattr("migrator.api.image.find_workload", forbidden)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    done = CliRunner().invoke(app, ["checkpoint", "1"])
    assert done.exit_code == 1
    assert "Operation not permitted: /proc/1/ns/pid" in done.output
    assert "run migrator as root" in done.output


def test_an_image_of_another_writer_is_shown_and_says_why_it_is_refused() -> None:
    shown = CliRunner().invoke(app, ["image", "info", str(GOLDEN)])
    assert shown.exit_code == 0
    assert "whole:" in shown.output
    told = json.loads(CliRunner().invoke(app, ["image", "info", "--json", str(GOLDEN)]).output)
    assert told["whole"] is True
    refused = CliRunner().invoke(app, ["restart", "-i", str(GOLDEN)])
    assert refused.exit_code != 0
    assert "error:" in refused.output


def test_what_cannot_be_carried_is_refused_by_name_before_anything_is_stopped(tmp_path: Path) -> None:
    read, write = os.pipe()
    with subprocess.Popen(["sleep", "60"], stdin=read, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        try:
            done = migrator("checkpoint", child.pid, "-o", tmp_path / "image", code=3)
            assert f"pid {child.pid} (sleep) fd 0: pipe:" in done.stderr
            assert "outside of the tree" in done.stderr
            assert child.poll() is None
        finally:
            child.kill()
            os.close(read)
            os.close(write)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("detached", [True, False])
def test_run_says_how_a_command_ended_at_once_and_what_it_wrote(
    detached: bool, two_hosts: TwoHosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "AT_ONCE", 60.0)
    log = tmp_path / "log" / "brief.log"
    log.parent.mkdir()
    log.write_text("of an earlier one\n")
    command = ["run", "--name", "brief", "--bridge", "br0", *(["-d"] if detached else []), "--", "sh", "-c"]
    with two_hosts.a.inside():
        monkeypatch.setenv("MIGRATOR_LOG_DIR", str(log.parent))
        failed = CliRunner().invoke(app, [*command, "echo no such table >&2; exit 3"])
        silent = CliRunner().invoke(app, [*command, "true"])
    assert (failed.exit_code, failed.stdout) == (3, "")
    assert failed.stderr == f"brief: the command has ended with exit status 3; its output, in {log}:\n  no such table\n"
    assert (silent.exit_code, silent.stdout) == (0, "")
    assert silent.stderr == f"brief: the command has ended with exit status 0, and there is no output in {log}\n"
