"""The workloads themselves: each runs undisturbed and ends well, and each check can fail."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from migrator.testing.workloads import SOURCES, Workload, WorkloadFailed, build, build_all, descendants, names

CASES: dict[str, tuple[object, ...]] = {
    "counter": (2,),
    "memory": (8, 20),
    "threads": (6,),
    "tree": (10, "churn"),
    "signals": (),
    "fds": (),
    "fp": (),
    "creds": (),
    "many": ("connections", 20),
    "terminals": (),
    "selfcheckpoint": ("true",),
    "heap.py": (8,),
    "arena": (7,),
    "openings": (7,),
    "selves": (7,),
    "pipeline.sh": (),
    "shell.py": (),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_every_workload_compiles_without_a_warning_and_only_once() -> None:
    programs = build_all()
    assert {name for name in CASES if "." not in name} < set(programs) == set(names())
    assert programs == build_all()


@pytest.mark.root
@pytest.mark.parametrize("name", CASES)
def test_an_undisturbed_workload_keeps_its_state_and_ends_well(name: str, tmp_path: Path) -> None:
    with Workload(name, tmp_path, *CASES[name]) as workload:
        workload.check_alive_and_progressing(ticks=1)
        assert workload.finish()[0].startswith("ready pid=")


@pytest.mark.root
@pytest.mark.parametrize("name", CASES)
def test_stopping_and_continuing_a_workload_is_not_taken_for_damage(name: str, tmp_path: Path) -> None:
    with Workload(name, tmp_path, *CASES[name]) as workload:
        os.kill(workload.pid, signal.SIGSTOP)
        os.kill(workload.pid, signal.SIGCONT)
        workload.check_alive_and_progressing(ticks=1)
        workload.finish()


def test_a_damaged_page_is_found(tmp_path: Path) -> None:
    with Workload("memory", tmp_path, 1, 0, "plain") as memory:
        maps = Path(f"/proc/{memory.pid}/maps").read_text().splitlines()
        spans = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in maps]
        low, high = next(span for span in spans if span[1] - span[0] >= 1 << 20 and span[0] > 1 << 46)
        with Path(f"/proc/{memory.pid}/mem").open("r+b", buffering=0) as mem:
            for page in range(low, high, 4096):
                mem.seek(page + 1234)
                try:
                    mem.write(b"\xff")
                except OSError:
                    continue
        with pytest.raises(WorkloadFailed, match="page"):
            memory.wait_for(lambda lines: "ok" in lines)


def test_a_page_of_the_arena_that_is_another_is_found(tmp_path: Path) -> None:
    with Workload("arena", tmp_path) as arena:
        with open(tmp_path / "arena.out.private", "r+b") as file:  # it is mapped: not to be cut
            file.write(b"\1" * (64 << 12))
        with pytest.raises(WorkloadFailed, match="holds"):
            arena.wait_for(lambda lines: "ok" in lines)


def test_an_offset_that_is_another_is_found(tmp_path: Path) -> None:
    with Workload("openings", tmp_path) as openings:
        openings.check_alive_and_progressing(ticks=1)
        for file in range(6):
            os.truncate(tmp_path / f"openings.out.{file}", 99999)
        with pytest.raises(WorkloadFailed, match="bytes, not"):
            openings.wait_for(lambda lines: "ok" in lines)


def test_a_damaged_count_is_found(tmp_path: Path) -> None:
    """A workload that cannot fail proves nothing: one changed file offset must be noticed."""
    with Workload("fds", tmp_path, "append") as fds:
        fds.check_alive_and_progressing(ticks=1)
        with (tmp_path / "fds.out.append").open("ab") as file:
            file.write(b"stray")
        with pytest.raises(WorkloadFailed, match="size"):
            fds.wait_for(lambda lines: "ok" in lines)


def test_nothing_is_left_after_the_block(tmp_path: Path) -> None:
    with Workload("tree", tmp_path, 12) as tree:
        pids = [int(pid) for pid in subprocess.check_output(["pgrep", "-f", str(tree.out)]).split()]
        assert len(pids) >= 12
    left = [pid for pid in pids if Path(f"/proc/{pid}").exists() and tree.alive(pid)]
    assert not left


def test_processes_of_any_name_on_this_machine_are_no_hindrance(tmp_path: Path) -> None:
    Path(tmp_path / "odd.sh").write_text("printf 'half \\303' > /proc/$$/comm; echo ready; read line; :")
    with subprocess.Popen(
        ["sh", str(tmp_path / "odd.sh")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as odd:
        assert odd.stdout is not None and odd.stdout.readline() == "ready\n"
        assert b"half \xc3" in Path(f"/proc/{odd.pid}/stat").read_bytes()
        assert odd.pid in descendants(os.getpid())
        odd.communicate("")


def test_a_client_sees_every_reply_and_measures_the_gap(tmp_path: Path) -> None:
    port = free_port()
    with (
        Workload("tcpserver", tmp_path, "127.0.0.1", port) as server,
        Workload("tcpclient", tmp_path, "127.0.0.1", port, 0, 500, 1000) as client,
    ):
        client.check_alive_and_progressing()
        os.kill(server.pid, signal.SIGSTOP)
        subprocess.run(["sleep", "0.1"], check=True)
        os.kill(server.pid, signal.SIGCONT)
        client.check_alive_and_progressing()
        client.finish()
        report = json.loads(client.stdout.read_text())
        assert report["errors"] == 0
        assert report["longest_gap_ms"] >= 90
        assert report["gaps"]
        samples = (tmp_path / "tcpclient.out.samples").read_text().splitlines()
        assert len(samples) == report["requests"]
        server.finish()


def test_a_workload_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with Workload("counter", tmp_path) as counter:
        os.kill(counter.pid, signal.SIGKILL)
        with pytest.raises(WorkloadFailed, match="gone"):
            counter.check_alive_and_progressing()


def test_an_unknown_workload_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        build("nonesuch")


def test_every_program_has_a_case_here() -> None:
    both_ends = {"tcpserver", "tcpclient"}
    elsewhere = {
        "locker.py",
        "pools.py",
        "ledger.py",
        "uploads.py",
    }  # in tests/migration: they go on until they are ended
    scripts = {path.name for path in (*SOURCES.glob("*.py"), *SOURCES.glob("*.sh"))}
    assert set(CASES) | both_ends | elsewhere == set(names()) | scripts


def test_a_pipeline_counts_every_line_once(tmp_path: Path) -> None:
    with Workload("pipeline.sh", tmp_path) as pipeline:
        pipeline.check_alive_and_progressing(ticks=20)
        counts = [int(line.split()[1]) for line in pipeline.finish() if line.startswith("tick")]
        assert counts == list(range(1, len(counts) + 1))


def test_a_command_that_fails_to_save_is_reported(tmp_path: Path) -> None:
    with (
        Workload("selfcheckpoint", tmp_path, "exit 3") as program,
        pytest.raises(WorkloadFailed, match="with 3"),
    ):
        program.check_alive_and_progressing(ticks=30)
