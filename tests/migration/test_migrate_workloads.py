"""Real programs that know nothing of migration, moved there and back several times by the command line.

Each verifies its own state all the time and ends with an error at the first thing that is not as it was;
so going on, and a clean end, is the comparison with an undisturbed run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from migrator.testing.servers import nginx_command
from migrator.testing.stage import MigrateFailed, Stage
from migrator.testing.workloads import Workload, build

pytestmark = pytest.mark.root

WORKLOADS = Path(__file__).parents[1] / "workloads"


def command(name: str, out: Path, *arguments: str) -> list[str]:
    if name.endswith(".py"):
        return [sys.executable, str(WORKLOADS / name), str(out), *arguments]
    if name.endswith(".sh"):
        return ["bash", str(WORKLOADS / name), str(out), *arguments]
    return [str(build(name)), str(out), *arguments]


def ticks(out: Path) -> int:
    text = out.read_text(errors="replace")
    assert "FAIL" not in text, text[-2000:]
    return len(re.findall(r"^tick", text, re.MULTILINE))


def wait_for_ticks(out: Path, count: int, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not out.exists() or ticks(out) < count:
        assert time.monotonic() < deadline, f"only {ticks(out) if out.exists() else 'no file'} of {count}"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("counter", ()),
        ("memory", ("24", "20", "all")),
        ("threads", ("12",)),
        ("tree", ("8", "churn")),
        ("signals", ()),
        ("fds", ()),
        ("fp", ()),
        ("creds", ()),
        ("heap.py", ("16",)),
        ("pipeline.sh", ()),
    ],
)
def test_a_workload_moves_there_and_back_and_stays_right(stage: Stage, name: str, arguments: tuple[str, ...]) -> None:
    out = stage.folder / f"{name}.out"
    stage.a.run(["migrator", "run", "-d", "--name", "w", "--bridge", "", "--", *command(name, out, *arguments)])
    wait_for_ticks(out, 2)
    here, there = stage.a, stage.b
    for _ in range(3):
        try:
            assert stage.migrate("w", here, there)["outcome"] == "migrated"
        except MigrateFailed:
            ticks(out)  # what it has found wrong, if it has ended by that
            raise
        wait_for_ticks(out, ticks(out) + 2)  # of the copy
        here, there = there, here
    (row,) = json.loads(here.run(["migrator", "ps", "--json"]).stdout)
    assert row["state"] == "running"
    here.run(["migrator", "stop", "w"])
    assert ticks(out) > 0


def test_a_pre_forking_server_moves_with_its_connections_open(stage: Stage) -> None:
    argv = nginx_command(stage.folder, 8080, workers=3)
    (stage.folder / "www" / "index.html").write_text("<p>here</p>" * 5000)
    stage.start_container("web", argv, address="10.77.0.60")
    code = """
import socket, sys, time
def ask(s):
    s.sendall(b"GET / HTTP/1.1\\r\\nHost: web\\r\\nConnection: keep-alive\\r\\n\\r\\n")
    data = b""
    while b"\\r\\n\\r\\n" not in data:
        part = s.recv(65536)
        if not part: raise SystemExit("connection closed by the server")
        data += part
    head, _, body = data.partition(b"\\r\\n\\r\\n")
    length = int([l for l in head.split(b"\\r\\n") if l.lower().startswith(b"content-length")][0].split(b":")[1])
    while len(body) < length: body += s.recv(65536)
    assert head.startswith(b"HTTP/1.1 200"), head
deadline = time.monotonic() + 15
while True:
    try:
        open_ones = [socket.create_connection(("10.77.0.60", 8080), timeout=10) for _ in range(6)]
        break
    except OSError:
        if time.monotonic() > deadline: raise
        time.sleep(0.1)
for s in open_ones: ask(s)
print("ready", flush=True)
for line in sys.stdin:
    for s in open_ones: ask(s)
    fresh = socket.create_connection(("10.77.0.60", 8080), timeout=10); ask(fresh); fresh.close()
    print("ok", flush=True)
"""
    client = stage.client.popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert client.stdin is not None and client.stdout is not None
    assert client.stdout.readline() == "ready\n"
    here, there = stage.a, stage.b
    for _ in range(3):
        stage.migrate("web", here, there)
        client.stdin.write("again\n")
        client.stdin.flush()
        assert client.stdout.readline() == "ok\n"
        here, there = there, here
    client.stdin.close()
    assert client.wait(10) == 0
    here.run(["migrator", "stop", "web"])


def test_an_echo_server_keeps_its_connection_and_its_bytes(stage: Stage) -> None:
    out = stage.folder / "server"
    stage.start_container("echo", [str(build("tcpserver")), str(out), "10.77.0.61", "7000", "8"], address="10.77.0.61")
    client = Workload("tcpclient", stage.folder, "10.77.0.61", "7000", "0", "500", "512", netns=stage.client.namespace)
    with client:
        here, there = stage.a, stage.b
        for _ in range(3):
            stage.migrate("echo", here, there)
            client.check_alive_and_progressing()
            here, there = there, here
        client.finish()
    here.run(["migrator", "stop", "echo"])
    report = json.loads(client.stdout.read_text().splitlines()[-1])
    assert report["errors"] == 0
    assert report["requests"] > 100


def open_files(pid: int) -> list[str]:
    """What a process has open; journals, which it holds until the source is done, and connections left out."""
    found = [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
    return sorted(path for path in found if not path.startswith("socket:") and not path.endswith(".journal"))


def test_an_agent_collects_what_it_restarted_and_what_went_on(stage: Stage) -> None:
    out = stage.folder / "reaped.out"
    stage.a.run(["migrator", "run", "-d", "--name", "reaped", "--bridge", "", "--", *command("counter", out)])
    wait_for_ticks(out, 1)
    before = [open_files(stage.agent_pid(host)) for host in (stage.a, stage.b)]
    for _ in range(3):
        stage.migrate("reaped", stage.a, stage.b)
        stage.migrate("reaped", stage.b, stage.a)
    after = [open_files(stage.agent_pid(host)) for host in (stage.a, stage.b)]
    assert after == before, "an agent has left files open"
    stage.a.run(["migrator", "stop", "reaped"])
    for host in (stage.a, stage.b):
        agent = stage.agent_pid(host)
        deadline = time.monotonic() + 5
        while (children := Path(f"/proc/{agent}/task/{agent}/children").read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not children, f"agent of {host.label} has left {children} uncollected"
