"""A task that a security module labels otherwise than migrator, whose copy would have the label of migrator."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.vm.lab import MEMORY_MIB, drives, kernel
from tests.vm.machine import CommandFailed, Machine

SAYS = {
    "kernel": "a security module confines it otherwise than the caller",
    "user": "is confined by a security module as Other and migrator is not",
}
IN_A_THREAD = """
import threading, time
def confine():
    with open("/proc/thread-self/attr/current", "w") as file:
        file.write("Other")
    time.sleep(1000)
threading.Thread(target=confine).start()
"""


def test_it_is_refused_by_both_engines_and_runs_on(folder: Path) -> None:
    with Machine(kernel(), drives(), folder=folder, memory_mib=MEMORY_MIB, append="lsm=landlock,smack") as guest:
        plain = guest.spawn("sleep 1000")
        process = guest.spawn("bash -c 'echo Other > /proc/self/attr/current; exec sleep 1000'")
        guest.run(f"cat > /tmp/thread.py <<'END'\n{IN_A_THREAD}\nEND")
        thread = guest.spawn(f"{sys.executable} /tmp/thread.py")
        guest.run(f"until grep -q Other /proc/{thread}/task/*/attr/current; do sleep 0.1; done")
        for engine, says in SAYS.items():
            command = f"migrator checkpoint --engine {engine} -o /tmp/image"
            guest.run(f"{command} {plain}")
            for pid in (process, thread):
                with pytest.raises(CommandFailed, match="exit status 3") as refused:
                    guest.run(f"{command} {pid}")
                assert says in " ".join(str(refused.value).split())
                assert guest.run(f"cat /proc/{pid}/stat").stdout.split()[2] in "SR"
