"""Downtime by workload, measured side by side in one run.

Every workload is moved live from host a to host b and back, several times, and beside it the same workload
is stopped, copied over the same transport and restarted (`migrate --cold`). The downtime is what a user
of the workload saw: the longest gap that the program itself, or its client, measured with its own clock.

    live     the longest gap of the whole migration
    freeze   the gap in which the freeze lies; where it is shorter, the longest one had another cause, as a
             processor that had to be shared with the copying
    said     what the report said: the downtime, that predicted, and the first packet where there is a network
    alone    the longest gap in 3 s in which nobody migrates it
    floor    round trip + last dirty bytes / measured throughput: what no method can beat on this link
    ratio    downtime stopped-and-copied / downtime live
    total/bytes   total time / (bytes sent / throughput), where the bytes are more than 64 MiB

Below it, for what has more than 512 MiB: how long OpenSSH alone takes for as many bytes in the same run, and the
processor time of both ends, ours and OpenSSH's, for each GiB.

Numbers of one machine with both hosts, both agents, the workload and its client on the same processors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from migrator.testing.hosts import Host
from migrator.testing.picture import longest_wait, read_samples
from migrator.testing.redisclient import fill
from migrator.testing.servers import redis_command
from migrator.testing.stage import AGENT_PORT, MIGRATOR, Stage, require_root
from migrator.testing.workloads import Workload, build

ADDRESS, PORT = "10.77.0.50", 6379
ALONE_SECONDS = 3.0
BULK = 512 << 20  # bytes from which a move is compared with OpenSSH
SSH_PORT = 2222
TARGETS_MS = {"small process": 5.0, "1 GiB, 50 MB/s": 10.0, "Redis 1 GiB, load": 20.0}


@dataclass
class Move:
    """One migration: seconds and bytes; `gap` is the longest that the workload's user saw, `freeze` that of the
    freeze."""

    gap: float
    freeze: float
    result: dict[str, Any]
    source_cpu: float
    source_rss: int
    agent_cpu: float
    agent_rss: int

    @property
    def floor(self) -> float:
        rounds = self.result["rounds"]
        last = self.result["stream_bytes"] - sum(r["bytes"] for r in rounds)
        throughput = self.result["throughput"]
        return float(self.result["rtt"] + (max(last, 0) / throughput if throughput else 0.0))


@dataclass
class Row:
    name: str
    alone: float = 0.0
    live: list[Move] = field(default_factory=list)
    cold: list[Move] = field(default_factory=list)


Waits = list[tuple[int, int]]  # (from, to) in ns of CLOCK_MONOTONIC, each a time in which nothing was done


def longest(waits: Waits, start: int, end: int) -> float:
    """Seconds of the longest of those that touch `start`..`end`; 2 ms if none was as long as that."""
    return max((b - a for a, b in waits if b > start and a < end), default=2_000_000) / 1e9


def move(stage: Stage, source: Host, destination: Host, waits: Callable[[], Waits], *options: str) -> Move:
    """Migrate container `w` and measure everything about it; `waits` gives those seen by its user so far."""
    agent = stage.agent_pid(destination)
    before = _cpu_of(agent)
    argv = [*MIGRATOR, "migrate", "w", f"root@{destination.address}:{AGENT_PORT}", "--json", *options]
    started = time.monotonic_ns()
    child = source.popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    out, err = child.stdout.read(), child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"migrate failed: {err.decode()}\n{stage.agent_log(destination)}")
    ended = time.monotonic_ns()
    time.sleep(2.2)
    result, seen = json.loads(out), waits()
    timeline = result["timeline"]
    return Move(
        gap=longest(seen, started, ended),
        freeze=longest(seen, timeline["frozen_at"], timeline["resumed_at"]),
        result=result,
        source_cpu=usage.ru_utime + usage.ru_stime,
        source_rss=usage.ru_maxrss * 1024,
        agent_cpu=_cpu_of(agent) - before,
        agent_rss=_peak_rss(agent),
    )


def _cpu_of(pid: int, *, children: bool = False) -> float:
    """Seconds of a process, or of its children that it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    first = 13 if children else 11
    return (int(fields[first]) + int(fields[first + 1])) / os.sysconf("SC_CLK_TCK")


def _peak_rss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def self_timed(stage: Stage, name: str, command: list[str], out: Path, repeat: int, warm: float) -> Row:
    """A workload that measures its own gaps: lines `gap FROM TO` in `out`, of those above 2 ms."""
    row = Row(name)

    def waits() -> Waits:
        lines = (line.split() for line in out.read_text().splitlines() if line.startswith("gap"))
        return [(int(start), int(end)) for _, start, end in lines]

    stage.a.run([*MIGRATOR, "run", "-d", "--name", "w", "--bridge", "", "--", *command])
    time.sleep(warm)
    row.alone = alone(waits)
    here, there = stage.a, stage.b
    for options, moves in ((("--cold",), row.cold), ((), row.live)):
        for _ in range(repeat):
            moves.append(move(stage, here, there, waits, *options))
            here, there = there, here
    here.run([*MIGRATOR, "stop", "w"])
    return row


def alone(waits: Callable[[], Waits]) -> float:
    """The longest gap in a while in which nothing happens."""
    started = time.monotonic_ns()
    time.sleep(ALONE_SECONDS)
    return longest(waits(), started, time.monotonic_ns())


def redis(stage: Stage, mib: int, rate: float, repeat: int) -> Row:
    row = Row("Redis 1 GiB, load")
    stage.start_container("w", redis_command(stage.folder, PORT), address=ADDRESS)
    with stage.client.inside():
        fill(ADDRESS, PORT, mib)
    here, there = stage.a, stage.b
    where = (stage.folder, ADDRESS, PORT, "--rate", rate)
    with Workload("migrator.testing.redisclient", *where, netns=stage.client.namespace) as client:
        time.sleep(ALONE_SECONDS)
        client.finish()
        sent, received = longest_wait(samples_of(client))
        row.alone = (received - sent) / 1e9
    for options, moves in ((("--cold",), row.cold), ((), row.live)):
        for _ in range(repeat):
            client = Workload("migrator.testing.redisclient", *where, netns=stage.client.namespace)

            def waits(client: Workload = client) -> Waits:
                client.finish()
                return samples_of(client)

            with client:
                time.sleep(1)
                moves.append(move(stage, here, there, waits, *options))
            here, there = there, here
    here.run([*MIGRATOR, "stop", "w"])
    return row


@contextlib.contextmanager
def sshd(stage: Stage) -> Iterator[Callable[[int], tuple[float, float]]]:
    """OpenSSH between the two hosts: what it gives takes a number of bytes from a to b, and tells (seconds of time,
    of processors at both ends)."""
    folder = stage.folder / "ssh"
    folder.mkdir(mode=0o700)
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    (folder / "authorized_keys").write_text((folder / "user.pub").read_text())
    (folder / "config").write_text(
        f"Port {SSH_PORT}\nListenAddress {stage.b.address}\nHostKey {folder}/host\nPidFile none\nStrictModes no\n"
        f"PermitRootLogin yes\nAuthorizedKeysFile {folder}/authorized_keys\nUsePAM no\n"
    )
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd wants it
    server = stage.b.popen(["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "config")], stderr=subprocess.DEVNULL)
    options = ("StrictHostKeyChecking=no", f"UserKnownHostsFile={folder}/known", "BatchMode=yes", "LogLevel=ERROR")
    argv = ["ssh", "-F", "none", "-i", str(folder / "user"), "-p", str(SSH_PORT), "-c", "aes128-gcm@openssh.com"]
    argv += [word for option in options for word in ("-o", option)] + [f"root@{stage.b.address}", "cat > /dev/null"]

    def copy(count: int) -> tuple[float, float]:
        before, started = _cpu_of(server.pid, children=True), time.monotonic()
        zeros = subprocess.Popen(["head", "-c", str(count), "/dev/zero"], stdout=subprocess.PIPE)
        client = stage.a.popen(argv, stdin=zeros.stdout)
        _, status, usage = os.wait4(client.pid, 0)
        client.returncode = os.waitstatus_to_exitcode(status)
        elapsed = time.monotonic() - started
        assert zeros.stdout is not None
        zeros.stdout.close()
        zeros.wait()
        if client.returncode:
            raise SystemExit("ssh failed")
        time.sleep(0.5)  # its session ends
        return elapsed, usage.ru_utime + usage.ru_stime + _cpu_of(server.pid, children=True) - before

    try:
        time.sleep(0.5)
        copy(1)
        yield copy
    finally:
        server.terminate()
        server.wait()


def show_bulk(console: Console, rows: list[Row], copy: Callable[[int], tuple[float, float]]) -> None:
    for row in rows:
        sent = statistics.median(m.result["stream_bytes"] for m in row.live)
        if sent < BULK:
            continue
        total = statistics.median(m.result["total"] for m in row.live)
        cpu = statistics.median(m.source_cpu + m.agent_cpu for m in row.live)
        alone_s, alone_cpu = (
            statistics.median(values) for values in zip(*(copy(int(sent)) for _ in row.live), strict=True)
        )
        gib = sent / 2**30
        console.print(
            f"[bold]{row.name}[/]: {gib:.2f} GiB in {total:.2f} s, OpenSSH alone {alone_s:.2f} s"
            f" ({total / alone_s:.2f}x); processor time {cpu / gib:.1f} s per GiB, OpenSSH {alone_cpu / gib:.1f}"
        )


def samples_of(client: Workload) -> Waits:
    """The exchanges of a client that has ended, none of them lost or wrong."""
    report = json.loads(client.stdout.read_text().splitlines()[-1])
    if report["lost_replies"] or report["wrong_replies"] or report["reconnects"]:
        raise SystemExit(f"the client noticed: {report}")
    return read_samples(client.out.with_name(client.out.name + ".samples"))


def show(console: Console, rows: list[Row]) -> None:
    table = Table(title="user-visible downtime, medians", header_style="dim", title_justify="left")
    for title in (
        "workload", "live", "freeze", "said", "target", "alone", "stop+copy", "ratio", "floor", "total", "total/bytes",
        "sent", "source cpu", "agent cpu", "source rss", "agent rss",
    ):  # fmt: skip
        table.add_column(title, justify="left" if title == "workload" else "right")
    for row in rows:
        live, cold = _median(row.live, "gap"), _median(row.cold, "gap")
        sent = statistics.median(m.result["stream_bytes"] for m in row.live)
        rate = statistics.median(m.result["throughput"] for m in row.live)
        total = statistics.median(m.result["total"] for m in row.live)
        target = TARGETS_MS.get(row.name)
        table.add_row(
            row.name,
            f"{live * 1e3:.1f} ms",
            f"{_median(row.live, 'freeze') * 1e3:.1f} ms",
            " / ".join(f"{_said(row.live, name):.1f}" for name in ("downtime", "predicted_downtime", "first_packet")),
            f"{target:.0f} ms" if target else "",
            f"{row.alone * 1e3:.1f} ms",
            f"{cold * 1e3:.0f} ms",
            f"{cold / live:.0f}x",
            f"{_median(row.live, 'floor') * 1e3:.1f} ms",
            f"{total:.2f} s",
            f"{total / (sent / rate):.2f}" if rate and sent > 64 << 20 else "",
            f"{sent / 2**20:.0f} MiB",
            f"{_median(row.live, 'source_cpu'):.2f} s",
            f"{_median(row.live, 'agent_cpu'):.2f} s",
            f"{max(m.source_rss for m in row.live) / 2**20:.0f} MiB",
            f"{max(m.agent_rss for m in row.live) / 2**20:.0f} MiB",
        )
    console.print(table)
    for row in rows:
        best = sorted(row.live, key=lambda m: m.gap)[len(row.live) // 2]
        parts = _parts(best.result)
        text = "  ".join(f"{name} {ms:.1f}" for name, ms in parts)
        console.print(f"[bold]{row.name}[/]: {best.result['downtime'] * 1e3:.1f} ms stopped = {text}")


def _parts(result: dict[str, Any]) -> list[tuple[str, float]]:
    import msgspec

    from migrator.model import MigrationResult

    timeline = msgspec.convert(result, MigrationResult).timeline
    assert timeline is not None
    return [(p.name, p.seconds * 1e3) for p in timeline.downtime_parts() if p.seconds >= 0.00005]


def _said(moves: list[Move], name: str) -> float:
    """Median in ms of what the reports said."""
    return statistics.median(move.result[name] for move in moves) * 1e3


def _median(moves: list[Move], name: str) -> float:
    return float(statistics.median(getattr(m, name) for m in moves))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default="", help="part of a workload's name")
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    options = parser.parse_args()
    require_root()
    # as it is installed: where no byte code may be kept, each command compiles all it needs, for 0.3 s
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    rows: list[Row] = []
    memory, threads, tree = str(build("memory")), str(build("threads")), str(build("tree"))
    with Stage(tag="bench") as stage:

        def self_timed_row(name: str, command: Callable[[Path], list[str]], warm: float = 2.0) -> None:
            if options.only in name:
                out = stage.folder / f"{len(rows)}.out"
                rows.append(self_timed(stage, name, command(out), out, options.repeat, warm))
                console.print(f"[dim]{name} done[/]")

        self_timed_row("small process", lambda out: [memory, str(out), "1", "0", "plain"])
        self_timed_row("1 GiB, 50 MB/s", lambda out: [memory, str(out), "1024", "50", "plain"], 6.0)
        self_timed_row("50 threads", lambda out: ["sh", "-c", f"{threads} {out}.t 50 & exec {memory} {out} 1 0 plain"])
        self_timed_row("100 processes", lambda out: ["sh", "-c", f"{tree} {out}.t 100 & exec {memory} {out} 1 0 plain"])
        if options.only in "Redis 1 GiB, load":
            rows.append(redis(stage, 1024, 1000.0, options.repeat))
        show(console, rows)
        if any(m.result["stream_bytes"] >= BULK for row in rows for m in row.live):
            with sshd(stage) as copy:
                show_bulk(console, rows, copy)
    if options.json:
        data = {
            r.name: {"alone": r.alone, "live": [vars(m) for m in r.live], "cold": [vars(m) for m in r.cold]}
            for r in rows
        }
        options.json.write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
