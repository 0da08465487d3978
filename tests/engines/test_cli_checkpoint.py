"""`migrator checkpoint` and `migrator restart` on one host: files, pipes, and what goes wrong on the way."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli import MIGRATOR, Orphan, await_file, counter, end, leftovers, migrator, started, state, sweep

from migrator.linux.cgroup import directory_of

pytestmark = pytest.mark.root


def counts(lines: list[str]) -> list[int]:
    return [int(line.split()[1]) for line in lines if line.startswith("tick ")]


def test_a_counter_saved_to_a_file_counts_on_where_it_stood(tmp_path: Path) -> None:
    image, pidfile = tmp_path / "image", tmp_path / "pid"
    with counter(tmp_path) as program:
        migrator("checkpoint", program.pid, "--kill", "-o", image)
        program.await_end()
        done = migrator("restart", "--verify", "--detach", "--pidfile", pidfile, "-i", image)
        assert done.stdout == pidfile.read_text() == f"{program.pid}\n"
        program.check_alive_and_progressing()
        lines = program.finish()
    assert counts(lines) == list(range(1, len(counts(lines)) + 1)), "no step is lost or made twice"
    assert image.stat().st_mode & 0o077 == 0, "an image has the secrets of a process in it"
    assert leftovers(tmp_path) == []


def test_one_that_is_killed_leaves_the_program_running_and_a_journal_to_settle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIGRATOR_JOURNAL_DIR", str(tmp_path / "journal"))
    with counter(tmp_path) as program:
        home = directory_of(program.pid)
        with started("checkpoint", program.pid, "--kill", stdout=subprocess.PIPE) as save:  # which nobody reads
            deadline = time.monotonic() + 20
            while directory_of(program.pid) == home:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert [path.suffix for path in (tmp_path / "journal").iterdir()] == [".journal"]
            save.kill()
        program.check_alive_and_progressing()
        assert "running on the source" in migrator("settle").stdout
        assert directory_of(program.pid) == home
        program.finish()


def test_one_that_ends_leaves_no_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIGRATOR_JOURNAL_DIR", str(tmp_path / "journal"))
    with counter(tmp_path) as program:
        migrator("checkpoint", program.pid, "-o", tmp_path / "image")
        migrator("checkpoint", program.pid, "-o", tmp_path / "missing" / "image", code=2)
        migrator("checkpoint", program.pid, "--kill", "-o", tmp_path / "image")
    assert list((tmp_path / "journal").iterdir()) == []


def test_a_pipe_from_checkpoint_to_restart_moves_a_program_onto_its_own_pid(tmp_path: Path) -> None:
    with counter(tmp_path) as program:
        save = started("checkpoint", program.pid, "--kill", stdout=subprocess.PIPE)
        load = started("restart", "--detach", stdin=save.stdout, stdout=subprocess.PIPE, text=True)
        assert save.stdout is not None
        save.stdout.close()
        said, _ = load.communicate(timeout=60)
        assert (save.wait(), load.returncode, said) == (0, 0, f"{program.pid}\n")
        program.check_alive_and_progressing()
        lines = program.finish()
    assert counts(lines) == list(range(1, len(counts(lines)) + 1))


def test_a_stream_that_was_cut_short_never_restarts_and_leaves_nothing_behind(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with counter(tmp_path) as program:
        migrator("checkpoint", program.pid, "--kill", "-o", image)
        program.await_end()
        ticks = program.ticks()
        whole = image.read_bytes()
        for length in (0, 3000, len(whole) // 2, len(whole) - 1):
            done = migrator("restart", input=whole[:length].decode("latin1"), code=6, stdin=None, encoding="latin1")
            assert "without a trailer" in done.stderr
            assert program.is_gone()
        assert not list(Path("/sys/fs/cgroup").glob(f"**/migrator/restart-{program.pid}-*"))
        assert program.ticks() == ticks


def test_left_running_it_counts_on_and_left_stopped_it_does_not_until_sigcont(tmp_path: Path) -> None:
    with counter(tmp_path) as program:
        migrator("checkpoint", program.pid, "-o", tmp_path / "one")
        program.check_alive_and_progressing()
        with open(tmp_path / "two", "wb") as image:
            migrator("checkpoint", program.pid, "--leave-stopped", stdout=image, capture_output=False)
        assert state(program.pid) == "T"
        ticks = program.ticks()
        time.sleep(0.1)
        assert program.ticks() == ticks
        os.kill(program.pid, signal.SIGCONT)
        program.check_alive_and_progressing()
        lines = program.finish()
    assert counts(lines) == list(range(1, len(counts(lines)) + 1))


def test_frozen_tasks_wait_for_thaw(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with counter(tmp_path) as program:
        migrator("checkpoint", program.pid, "--kill", "-o", image)
        program.await_end()
        ticks = program.ticks()
        done = migrator("restart", "--frozen", "-i", image)
        assert done.stdout == f"{program.pid}\n"
        assert "migrator thaw" in done.stderr
        time.sleep(0.1)
        assert program.ticks() == ticks
        migrator("thaw", program.pid)
        program.check_alive_and_progressing()
        program.finish()


def test_restart_in_the_foreground_passes_signals_on_and_ends_as_the_program_does(tmp_path: Path) -> None:
    image, pidfile = tmp_path / "image", tmp_path / "pid"
    with counter(tmp_path) as program:
        migrator("checkpoint", program.pid, "--kill", "-o", image)
        program.await_end()
        waiting = started("restart", "-i", image, "--pidfile", pidfile, stdin=subprocess.DEVNULL)
        try:
            program.await_copy()
            program.check_alive_and_progressing()
            waiting.terminate()
            assert waiting.wait(20) == 0
        finally:
            end(waiting)
        assert program.lines()[-1] == "ok", "SIGTERM was for the program"
        program.await_end()
        waiting = started("restart", "-i", image, stdin=subprocess.DEVNULL)
        try:
            program.await_copy()
            program.check_alive_and_progressing()
            os.kill(program.pid, signal.SIGKILL)
            assert waiting.wait(20) == 128 + 9
        finally:
            end(waiting)
        assert not list(Path("/sys/fs/cgroup").glob(f"**/migrator/restart-{program.pid}-*"))


def test_an_interrupted_restart_leaves_nothing(tmp_path: Path) -> None:
    image = tmp_path / "image"
    before = set(Path("/sys/fs/cgroup").glob("**/migrator/restart-*"))  # of whoever was killed, with any pid
    with counter(tmp_path) as program:
        migrator("checkpoint", program.pid, "--kill", "-o", image)
        program.await_end()
        read, write = os.pipe()
        building = started("restart", stdin=read, stderr=subprocess.PIPE)
        os.close(read)
        try:
            whole = image.read_bytes()
            os.write(write, whole[: len(whole) - 8])
            deadline = time.monotonic() + 30
            while program.is_gone():  # until the copy stands, and lacks only its trailer
                assert time.monotonic() < deadline
                time.sleep(0.01)
            building.terminate()
            assert building.wait(20) == 128 + 15
        finally:
            end(building)
            os.close(write)
        program.await_end()
        assert set(Path("/sys/fs/cgroup").glob(f"**/migrator/restart-{program.pid}-*")) <= before


def test_a_reader_that_goes_away_costs_the_program_nothing(tmp_path: Path) -> None:
    with counter(tmp_path) as program:
        read, write = os.pipe()
        os.close(read)
        done = migrator("checkpoint", program.pid, "--kill", stdout=write, stderr=subprocess.PIPE,
                        capture_output=False, code=4)  # fmt: skip
        os.close(write)
        assert "gone away" in done.stderr
        assert "running on the source" in done.stderr
        program.check_alive_and_progressing()
        program.finish()


def test_a_full_disk_costs_the_program_nothing_and_the_older_image_stays(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_text("the older one")

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))

    with counter(tmp_path) as program:
        done = migrator("checkpoint", program.pid, "--kill", "-o", image, code=4, preexec_fn=little_room,
                        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})  # fmt: skip
        assert "File too large" in done.stderr
        program.check_alive_and_progressing()
        program.finish()
    assert image.read_text() == "the older one"
    assert leftovers(tmp_path) == []


def test_what_is_no_regular_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with counter(tmp_path) as program:
        info = started("image", "info", "-p", "-", stdin=os.open(fifo, os.O_RDONLY | os.O_NONBLOCK),
                       stdout=subprocess.PIPE, text=True)  # fmt: skip
        info.terminate()
        info.communicate()
        reader = subprocess.Popen(["cat", str(fifo)], stdout=subprocess.PIPE)
        migrator("checkpoint", program.pid, "-o", fifo)
        image, _ = reader.communicate(timeout=20)
        assert fifo.is_fifo()
        program.check_alive_and_progressing()
    shown = subprocess.run([*MIGRATOR, "image", "info", "-"], input=image, capture_output=True, timeout=60, check=True)
    assert b"whole:" in shown.stdout


def test_a_file_that_takes_no_pid_means_that_nothing_is_restarted(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with counter(tmp_path) as program:
        migrator("checkpoint", program.pid, "--kill", "-o", image)
        program.await_end()
        done = migrator("restart", "-d", "-i", image, "--pidfile", tmp_path / "no" / "pid", code=2)
        assert "nothing was restarted" in done.stderr
        assert program.is_gone()


def test_the_pid_that_a_copy_needs_is_named_if_somebody_has_it(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with counter(tmp_path) as program:
        migrator("checkpoint", program.pid, "-o", image)
        done = migrator("restart", "-i", image, code=5)
        assert f"pid {program.pid} is taken" in done.stderr
        assert "do:" in done.stderr
        program.check_alive_and_progressing()


@pytest.mark.parametrize("shape", ["{save}", "{save}; exit $?", "sh -c '{save}; exit $?'; exit $?"])
def test_a_program_that_has_itself_saved_goes_on_here_and_in_the_copy(tmp_path: Path, shape: str) -> None:
    image = tmp_path / "image"
    save = f"{' '.join(MIGRATOR)} checkpoint $SELF_PID -o {image}"
    with Orphan("selfcheckpoint", tmp_path, shape.format(save=save)) as program:
        program.wait_for(lambda lines: "checkpoint 0" in lines, seconds=40)
        program.check_alive_and_progressing()
        before = len(program.finish())
        program.await_end()
        migrator("restart", "--detach", "-i", image)
        program.check_alive_and_progressing()
        lines = program.finish()[before:]
        sweep(program.pid)
    assert [line for line in lines if not line.startswith("tick")] == [
        *["checkpoint 0", "ok"],
    ]
    assert counts(lines)[0] == 21, "the copy counts on from where it was saved"


def test_a_program_may_save_and_end_itself(tmp_path: Path) -> None:
    image, log = tmp_path / "image", tmp_path / "log"
    save = f"exec {' '.join(MIGRATOR)} checkpoint $SELF_PID --kill > {image} 2> {log}"
    with Orphan("selfcheckpoint", tmp_path, save) as program:
        program.await_end()
        assert program.ticks() == 20
        migrator("restart", "--detach", "-i", image)
        program.check_alive_and_progressing()
        lines = program.finish()
        sweep(program.pid)
    assert log.read_text() == ""
    assert counts(lines) == list(range(1, len(counts(lines)) + 1))


def test_a_copy_that_waits_for_its_end_reports_its_exit_status(tmp_path: Path) -> None:
    image, go, end = tmp_path / "image", tmp_path / "go", tmp_path / "end"
    code = (
        f"import os, time\nopen({str(go)!r}, 'w').write(str(os.getpid()))\n"
        f"while not os.path.exists({str(end)!r}): time.sleep(0.02)\nraise SystemExit(7)"
    )
    subprocess.run(
        ["setsid", "--fork", os.path.realpath(sys.executable), "-c", code],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    pid = int(await_file(go))
    migrator("checkpoint", pid, "--kill", "-o", image)
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    end.touch()
    migrator("restart", "-i", image, code=7)
