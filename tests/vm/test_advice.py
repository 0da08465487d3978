"""The advisory call, by the tools: what is left out of an image, and what stands for it in a restart."""

from __future__ import annotations

import pytest

from tests.vm.machine import CommandFailed, Machine
from tests.vm.test_calls import kill, save

# Writes to what cannot be carried, the log of the kernel, and watches a folder.
PROGRAM = """
import ctypes, os, time
libc = ctypes.CDLL(None)
watch = libc.inotify_init()
os.dup2(watch, 10)
os.close(watch)
number = 0
while True:
    number += 1
    os.write(1, b"step %d\\n" % number)
    if os.path.exists("/tmp/ask"):
        try:
            os.fstat(10)
            answer = "open"
        except OSError as error:
            answer = os.strerror(error.errno)
        with open("/tmp/answer", "w") as file:
            file.write(answer)
        os.unlink("/tmp/ask")
    time.sleep(0.05)
"""


def ask(guest: Machine) -> str:
    """What the program says of its descriptor 10."""
    guest.run("touch /tmp/ask; until [ -s /tmp/answer ]; do sleep 0.1; done")
    return guest.run("cat /tmp/answer; rm /tmp/answer").stdout


def test_what_is_left_out_comes_from_whoever_restarts(guest: Machine) -> None:
    guest.put("/tmp/program.py", PROGRAM.encode())
    pid = guest.spawn("$PYTHON /tmp/program.py > /dev/kmsg")
    assert ask(guest) == "open"
    with pytest.raises(CommandFailed, match=rf"task {pid}, descriptor 1: "):
        save(guest, pid)
    guest.run(f"ckpt -x 1 -x 10 {pid} > /tmp/image")
    # The marks are gone again.
    with pytest.raises(CommandFailed, match=rf"task {pid}, descriptor 1: "):
        save(guest, pid, "/tmp/again")
    kill(guest, pid)
    guest.run(f"mktree -d -p {pid}:1 < /tmp/image 1> /tmp/log")
    guest.run("until [ $(grep -c step /tmp/log) -ge 5 ]; do sleep 0.1; done")
    assert ask(guest) == "Bad file descriptor"
    lines = guest.run("grep step /tmp/log").stdout.splitlines()
    numbers = [int(line.split()[1]) for line in lines]
    assert numbers[0] > 1
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    guest.run(f"kill -KILL {pid}; rm /tmp/log")


def test_a_preset_for_nobody_is_an_error_by_name(guest: Machine) -> None:
    pid = guest.spawn("sleep 1000")
    save(guest, pid)
    kill(guest, pid)
    with pytest.raises(CommandFailed, match="descriptor 1 was preset for process 4000000, which is not in the image"):
        guest.run("mktree -d -p 4000000:1 < /tmp/image")
    assert guest.run(f"[ -e /proc/{pid} ]", status=None).status
