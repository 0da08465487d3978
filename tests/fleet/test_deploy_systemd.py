"""The units: as systemd reads them, as it judges their confinement, and with the program behind them."""

from __future__ import annotations

import asyncio
import configparser
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from migrator.runtime import service

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted((ROOT / "deploy/systemd").glob("*.service"))
# Whatever is restored by the agent inherits these (systemd.exec(5)).
INHERITED = (
    "NoNewPrivileges", "CapabilityBoundingSet", "SystemCallFilter", "SystemCallArchitectures",
    "RestrictAddressFamilies", "RestrictNamespaces", "RestrictRealtime",
    "RestrictSUIDSGID", "LockPersonality", "MemoryDenyWriteExecute",
    "ProtectSystem", "ProtectHome", "ProtectProc", "ProcSubset", "ProtectClock", "ProtectHostname", "ProtectKernelLogs",
    "ProtectKernelModules", "ProtectKernelTunables", "ProtectControlGroups", "PrivateTmp", "PrivateDevices",
    "PrivateNetwork", "PrivateUsers", "PrivateIPC", "PrivateMounts", "ReadOnlyPaths", "ReadWritePaths",
    "InaccessiblePaths", "BindPaths", "RootDirectory", "User", "DynamicUser", "SecureBits", "AppArmorProfile",
)  # fmt: skip


class Unit(configparser.RawConfigParser):
    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, interpolation=None)
        self.optionxform = str  # type: ignore[assignment,method-assign]
        self.read(path)


def test_there_is_a_unit_for_each_daemon() -> None:
    assert [unit.name for unit in UNITS] == ["migrator-agent.service", "migrator-controller.service"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_finds_nothing_wrong(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/usr/bin/migrator ", "/bin/true "))
    verdict = subprocess.run(["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True)
    ours = [line for line in verdict.stderr.splitlines() if unit.name in line]
    assert verdict.returncode == 0 and not ours, verdict.stderr


def test_the_controller_is_confined_by_the_judgement_of_systemd() -> None:
    (unit,) = (unit for unit in UNITS if "controller" in unit.name)
    found = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=15", "--no-pager", str(unit)],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout


def test_the_agent_is_confined_by_nothing_that_a_copy_would_inherit() -> None:
    (unit,) = (unit for unit in UNITS if "agent" in unit.name)
    assert not set(Unit(unit)["Service"]).intersection(INHERITED)
    assert Unit(unit)["Service"]["KillMode"] == "process"


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_daemon_says_when_it_is_ready_and_is_watched(unit: Path) -> None:
    settings = Unit(unit)["Service"]
    assert settings["Type"] == "notify"
    assert int(settings["WatchdogSec"]) > 0
    assert settings["Restart"] == "always"


class Manager:
    """A service manager as far as a service sees it: a socket that takes its messages."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(60)
        self.path = path

    def until(self, message: str) -> list[str]:
        seen: list[str] = []
        while message not in seen:
            seen.append(self.socket.recv(4096).decode())
        return seen


def test_the_agent_of_the_unit_starts_is_alive_and_ends_as_the_manager_sees_it(tmp_path: Path) -> None:
    command = shlex.split(Unit(UNITS[0])["Service"]["ExecStart"])
    assert command[0] == "/usr/bin/migrator"
    arguments = [
        {"0.0.0.0:7022": "127.0.0.1:0", "127.0.0.1:9740": "127.0.0.1:0"}.get(word, word) for word in command[1:]
    ]
    arguments += ["--host-key", f"{tmp_path}/key", "--authorized-keys", f"{tmp_path}/authorized"]
    manager = Manager(tmp_path / "notify")
    environment = os.environ | {
        "NOTIFY_SOCKET": str(manager.path),
        "WATCHDOG_USEC": "600000",
        "MIGRATOR_JOURNAL_DIR": f"{tmp_path}/journal",
        "MIGRATOR_STATE_DIR": f"{tmp_path}/state",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("WATCHDOG_PID", None)
    program = "import sys; from migrator.cli import main; sys.argv[0] = 'migrator'; main()"
    with subprocess.Popen([sys.executable, "-c", program, *arguments], env=environment) as agent:
        try:
            seen = manager.until("READY=1")
            for _ in range(3):
                manager.until("WATCHDOG=1")
            agent.send_signal(signal.SIGTERM)
            seen += manager.until("STOPPING=1")
            assert agent.wait(30) == 0
        finally:
            agent.kill()
    assert "READY=1" in seen


def test_an_event_loop_that_stands_still_feeds_no_watchdog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(manager.path))
    monkeypatch.setenv("WATCHDOG_USEC", "150000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)

    def waiting() -> int:
        manager.socket.setblocking(False)
        count = 0
        while True:
            try:
                manager.socket.recv(4096)
            except BlockingIOError:
                return count
            count += 1

    async def live() -> tuple[int, int]:
        async with service.watchdog():
            await asyncio.sleep(1.0)
            alive = waiting()
            time.sleep(1.0)
            return alive, waiting()

    alive, stuck = asyncio.run(live())
    assert alive >= 3
    assert stuck == 0


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "3000000"}, 1.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
        ({"WATCHDOG_USEC": "-5"}, 0.0),
    ],
)
def test_signs_of_life_are_given_only_where_they_are_wanted(
    environment: dict[str, str], wanted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert service.watchdog_interval() == wanted


def test_a_manager_that_does_not_listen_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    service.notify("READY=1")
