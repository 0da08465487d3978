"""What the restarting program is confined by passes to the copy and cannot be taken off: so it is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cli import counter, leftovers, migrator

from migrator.linux import confinement, procfs
from migrator.linux.confinement import NAMES, UNUSED

pytestmark = pytest.mark.root

FEWER = ["setpriv", "--bounding-set=-sys_module,-sys_rawio", "--inh-caps=-sys_module,-sys_rawio"]
CREDENTIALS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")
NO_REBOOT = """
import ctypes, os, struct, sys
code = (0x20, 0, 0, 0), (0x15, 0, 1, 169), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)  # reboot: EPERM
program = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *one) for one in code))
filter_ = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(code), ctypes.addressof(program)))
assert ctypes.CDLL(None).prctl(22, 2, ctypes.c_void_p(ctypes.addressof(filter_)), 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""


def credentials(pid: int) -> dict[str, str]:
    status = procfs.status(pid)
    return {key: status[key] for key in CREDENTIALS}


def restart(image: Path, *within: str, code: int) -> str:
    command = [*within, sys.executable, "-m", "migrator", "restart", "--detach", "-i", str(image)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    return " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("within", "reason"),
    [
        (FEWER, "bounding set has cap_sys_module, cap_sys_rawio, which nothing can have"),
        (["setpriv", "--no-new-privs"], "it would be under no_new_privs"),
        ([sys.executable, "-c", NO_REBOOT], "it would be under a filter of system calls"),
    ],
)
def test_a_copy_that_could_do_less_than_its_original_is_refused(tmp_path: Path, within: list[str], reason: str) -> None:
    image = tmp_path / "image"
    with counter(tmp_path) as program:
        migrator("checkpoint", program.pid, "--kill", "-o", image)
        program.await_end()
        assert reason in restart(image, *within, code=5)
        assert program.is_gone()
        restart(image, code=0)  # nothing was left of the first attempt
        program.check_alive_and_progressing()
        program.finish()
    assert leftovers(tmp_path) == []


def test_what_has_as_few_capabilities_restarts_where_there_are_no_more(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with counter(tmp_path, within=FEWER) as program:
        before = credentials(program.pid)
        migrator("checkpoint", program.pid, "--kill", "-o", image)
        program.await_end()
        restart(image, *FEWER, code=0)
        assert credentials(program.pid) == before
        program.check_alive_and_progressing()
        program.finish()


def test_what_an_agent_gives_up_its_copies_have_all_the_same(tmp_path: Path) -> None:
    image = tmp_path / "image"
    give_up = "import sys; from migrator.linux import confinement; confinement.give_up(); "
    give_up += "from migrator.cli import main; main()"
    with counter(tmp_path) as program:
        before = credentials(program.pid)
        migrator("checkpoint", program.pid, "--kill", "-o", image)
        program.await_end()
        command = [sys.executable, "-c", give_up, "restart", "--detach", "-i", str(image)]
        subprocess.run(command, stdin=subprocess.DEVNULL, check=True, timeout=60)
        assert credentials(program.pid) == before
        program.check_alive_and_progressing()
        program.finish()


def test_a_thread_that_gives_up_capabilities_has_the_others_left() -> None:
    code = "from migrator.linux import confinement; confinement.give_up(); print(open('/proc/self/status').read())"
    before = confinement.own_status()
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    after = dict(line.split(":\t", 1) for line in output.splitlines() if ":\t" in line)
    gone = {f"cap_{name}" for name in UNUSED}
    for key in ("CapPrm", "CapEff"):
        had, has = (set(confinement.names(int(status[key], 16))) for status in (before, after))
        assert has == had - gone
    assert after["CapBnd"] == before["CapBnd"]


def test_names_are_those_of_the_kernel() -> None:
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    assert len(NAMES) == last + 1
    header = Path("/usr/include/linux/capability.h").read_text()
    for number, name in enumerate(NAMES):
        assert any(line.split()[:3] == ["#define", f"CAP_{name.upper()}", str(number)] for line in header.splitlines())
