"""Common programs that share memory and files in every way that there is, moved there and back under load."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.testing.servers import nginx_command
from migrator.testing.stage import MIGRATOR, Stage

pytestmark = pytest.mark.root

WORKLOADS = Path(__file__).parents[1] / "workloads"


@pytest.fixture
def name(stage: Stage) -> Iterator[str]:
    yield "prog"
    for host in (stage.a, stage.b):
        host.run([*MIGRATOR, "stop", "prog"], check=False)


def ticks(out: Path) -> int:
    text = out.read_text(errors="replace") if out.exists() else ""
    assert "FAIL" not in text and "Traceback" not in text, text[-2000:]
    return len(re.findall(r"^tick", text, re.MULTILINE))


def await_ticks(out: Path, more: int = 3) -> None:
    before, deadline = ticks(out), time.monotonic() + 30
    while ticks(out) < before + more:
        assert time.monotonic() < deadline, out.read_text()[-2000:] if out.exists() else "no output"
        time.sleep(0.02)


def there_and_back(stage: Stage, name: str, out: Path, *options: str, times: int = 4) -> None:
    here, there = stage.a, stage.b
    for _ in range(times):
        await_ticks(out)
        assert stage.migrate(name, here, there, *options)["outcome"] == "migrated"
        await_ticks(out)
        here, there = there, here


def test_a_python_program_with_pools_and_queues(stage: Stage, name: str) -> None:
    out = stage.folder / "pools.out"
    argv = [sys.executable, str(WORKLOADS / "pools.py"), str(out)]
    stage.a.run([*MIGRATOR, "run", "-d", "--name", name, "--bridge", "", "--", *argv])
    there_and_back(stage, name, out, "--verify")


def test_sqlite_in_wal_mode_on_a_directory_that_both_hosts_share(stage: Stage, name: str, tmp_path: Path) -> None:
    out = stage.folder / "ledger.out"
    argv = [sys.executable, str(WORKLOADS / "ledger.py"), str(out), str(tmp_path / "ledger.db")]
    stage.a.run([*MIGRATOR, "run", "-d", "--name", name, "--bridge", "", "--", *argv])
    there_and_back(stage, name, out)


def test_a_daemon_whose_package_was_replaced(stage: Stage, name: str) -> None:
    """Its program and its libraries are deleted files, and others are in their places."""
    installed = stage.folder / "installed"
    installed.mkdir()
    argv = nginx_command(stage.folder / "site", 8080, workers=2)
    (stage.folder / "site" / "www" / "index.html").write_text("<p>here</p>" * 5000)
    program = shutil.which(argv[0]) or "/usr/sbin/nginx"
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for path in [program, *re.findall(r"=> (/\S+)", listed)]:
        if "/libc.so" not in path:
            shutil.copy(path, installed / os.path.basename(path))
    command = [
        *(*MIGRATOR, "run", "-d", "--name", name, "--bridge", "br0", "--ip", "10.77.0.71/24"),
        *("-e", f"LD_LIBRARY_PATH={installed}", "--", str(installed / "nginx"), *argv[1:]),
    ]
    pid = int(stage.a.run(command).stdout)
    ask = ["curl", "-s", "--max-time", "10", "--retry", "20", "--retry-connrefused", "http://10.77.0.71:8080/"]
    assert stage.client.run(ask).stdout == "<p>here</p>" * 5000
    for path in list(installed.iterdir()):
        path.with_suffix(".new").write_bytes(b"the next version")
        path.with_suffix(".new").rename(path)
    assert Path(f"/proc/{pid}/maps").read_text().count("(deleted)") > 10
    here, there = stage.a, stage.b
    for _ in range(4):
        assert stage.migrate(name, here, there)["outcome"] == "migrated"
        assert stage.client.run(ask).stdout == "<p>here</p>" * 5000
        here, there = there, here
    assert {path.read_bytes() for path in installed.iterdir()} == {b"the next version"}


def test_gunicorn_while_files_are_uploaded(stage: Stage, name: str, tmp_path: Path) -> None:
    """Workers that were forked, files without a name that are being written, requests that take longer than a move."""
    tmp_path.chmod(0o777)
    server = [sys.executable, "-m", "gunicorn", "--chdir", str(WORKLOADS), "-w", "3", "-k", "gthread", "--threads", "4"]
    server += ["--preload", "-b", "0.0.0.0:8000", "--worker-tmp-dir", str(tmp_path), "uploads:application"]
    command = [*MIGRATOR, "run", "-d", "--name", name, "--bridge", "br0", "--ip", "10.77.0.73/24"]
    stage.a.run([*command, "-e", f"UPLOADS={tmp_path}", "--", *server])
    ask = [
        "curl",
        "-sf",
        "--max-time",
        "10",
        "--retry",
        "30",
        "--retry-connrefused",
        "-d",
        "x",
        "http://10.77.0.73:8000/",
    ]
    assert stage.client.run(ask).stdout.endswith(" 0")
    client = stage.client.popen(
        [sys.executable, str(WORKLOADS / "uploads.py"), "10.77.0.73", "8000"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    here, there = stage.a, stage.b
    for _ in range(4):
        time.sleep(0.5)
        assert stage.migrate(name, here, there)["outcome"] == "migrated"
        here, there = there, here
    told = json.loads(client.communicate("", timeout=60)[0])
    assert not told["failures"]
    assert told["uploads"] >= 16


POSTGRES = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A PostgreSQL cluster with its default configuration, in a directory that both hosts share."""
    tools = Path(sorted(glob.glob("/usr/lib/postgresql/*/bin"))[-1])
    data = Path("/var/tmp") / f"migrator-pg-{os.getpid()}"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    shutil.chown(data, "postgres", "postgres")
    subprocess.run(
        [*POSTGRES, str(tools / "initdb"), "-D", str(data), "-A", "trust", "-N", "-U", "postgres"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    with open(data / "pg_hba.conf", "a") as file:
        file.write("host all all 10.77.0.0/24 trust\n")
    return data


def _loads(parallel: dict[str, str]) -> list[tuple[tuple[str, ...], dict[str, str] | None]]:
    """Lasting connections, one for each transaction, and parallel queries: at rates that leave time to move."""
    return [
        (("-c", "4", "-R", "60"), None),
        (("-C", "-c", "1", "-R", "5"), None),
        (("-S", "-c", "1", "-R", "5"), parallel),
    ]


@pytest.mark.timeout(400)
def test_postgresql_under_pgbench(stage: Stage, name: str, cluster: Path) -> None:
    tools = sorted(glob.glob("/usr/lib/postgresql/*/bin"))[-1]
    server = [*POSTGRES, f"{tools}/postgres", "-D", str(cluster), "-c", "listen_addresses=*"]
    server += ["-c", f"unix_socket_directories={cluster}"]
    client = ["-h", "10.77.0.72", "-U", "postgres"]
    command = [*MIGRATOR, "run", "-d", "--name", name, "--bridge", "br0", "--ip", "10.77.0.72/24", "--", *server]
    try:
        stage.a.run(command)
        deadline = time.monotonic() + 30
        while stage.client.run([f"{tools}/pg_isready", *client], check=False).returncode:
            assert time.monotonic() < deadline, "PostgreSQL does not come up"
            time.sleep(0.2)
        stage.client.run([f"{tools}/pgbench", "-q", "-i", "-s", "1", *client, "postgres"])
        parallel = {**stage.client.env, "PGOPTIONS": "-c force_parallel_mode=on"}
        loads = [
            stage.client.popen(
                [f"{tools}/pgbench", "-n", "-T", "600", *options, *client, "postgres"],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for options, environment in _loads(parallel)
        ]  # fmt: skip
        time.sleep(2)
        here, there = stage.a, stage.b
        for _ in range(4):
            assert stage.migrate(name, here, there)["outcome"] == "migrated"
            time.sleep(1)
            here, there = there, here
        for load in loads:
            assert load.poll() is None, load.communicate()[0]
            load.terminate()
            assert "ERROR" not in (text := load.communicate()[0]) and "aborted" not in text, text
        sums = "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history)"
        sums += ", (select sum(bbalance) from pgbench_branches) = (select sum(tbalance) from pgbench_tellers)"
        sums += ", (select sum(bbalance) from pgbench_branches) = (select sum(delta) from pgbench_history)"
        sums += ", (select count(*) > 300 from pgbench_history)"
        told = stage.client.run([f"{tools}/psql", *client, "-At", "-c", sums, "postgres"]).stdout
        assert told.strip() == "t|t|t|t"
        checked = stage.client.run([f"{tools}/pg_amcheck", *client, "--install-missing", "postgres"], check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    finally:
        for host in (stage.a, stage.b):
            host.run([*MIGRATOR, "stop", name], check=False)
        shutil.rmtree(cluster, ignore_errors=True)
