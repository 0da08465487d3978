"""shell.py OUTFILE: an interactive bash in a terminal of its own, which has to know what it was told before.

Like workload.h: appends "ready pid=N", "tick N", "FAIL ..." and "ok" lines to OUTFILE; SIGTERM asks it to stop.
"""

import fcntl
import os
import pty
import re
import signal
import struct
import sys

out = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
stopping = False


def line(text: str) -> None:
    os.write(out, f"{text}\n".encode())


def stop(*_: object) -> None:
    global stopping
    stopping = True


def fail(text: str) -> None:
    line(f"FAIL pid={os.getpid()} {text}")
    os._exit(1)


signal.signal(signal.SIGTERM, stop)
child, master = pty.fork()
if not child:
    os.environ["TERM"], os.environ["PS1"] = "dumb", "$ "
    os.execv("/bin/bash", ["bash", "--norc", "--noprofile", "-i"])

seen = b""


def wait_for(pattern: bytes) -> bytes:
    """What the shell shows, up to what the pattern matches; that."""
    global seen
    while not (match := re.search(pattern, seen)):
        try:
            seen += os.read(master, 4096)
        except OSError as error:
            fail(f"{error} after {seen!r}")
    seen = seen[match.end() :]
    return match[0]


TIOCGPTN = 0x80045430
index = struct.unpack("i", fcntl.ioctl(master, TIOCGPTN, bytes(4)))[0]
os.write(master, b"count=0\n")
line(f"ready pid={os.getpid()}")
number = 0
while not stopping:
    number += 1
    # A job of its own is in the foreground for a moment. The line that is echoed does not match.
    os.write(master, b'count=$((count + 1)); sleep 0.05; echo "<$count:$(tty)>"\n')
    answer = wait_for(rb"<\d+:[^>\n]*>").decode()
    if answer != f"<{number}:/dev/pts/{index}>":
        fail(f"{answer} in period {number}, in terminal {index}")
    line(f"tick {number}")
os.write(master, b"exit\n")
os.waitpid(child, 0)
line("ok")
