"""Has files locked in every way, and looks all the time whether it still has: locker.py OUT DIRECTORY

flock(2), a lock of the process and one of the description, each exclusive on a file of its own and shared on another.
Appends "tick" lines to OUT, and "FAIL" with the reason where a lock is gone.
"""

import fcntl
import os
import struct
import sys
import threading
import time

OFD_SETLK = 37


def span(kind: int, start: int, length: int) -> bytes:
    return struct.pack("<hhxxxxqqixxxx", kind, os.SEEK_SET, start, length, 0)


def held(fd: int) -> list[tuple[str, ...]]:
    with open(f"/proc/self/fdinfo/{fd}") as file:
        lines = [line.split() for line in file if line.startswith("lock:")]
    return sorted((w[2], w[4], w[7], w[8]) for w in lines)


def main() -> None:
    out, directory = sys.argv[1:3]
    ticks = open(out, "a", buffering=1)  # noqa: SIM115
    fds = {name: os.open(f"{directory}/{name}", os.O_RDWR | os.O_CREAT) for name in ("flock", "posix", "ofd", "shared")}
    fcntl.flock(fds["flock"], fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.lockf(fds["posix"], fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.fcntl(fds["ofd"], OFD_SETLK, span(fcntl.F_WRLCK, 100, 50))
    fcntl.flock(fds["shared"], fcntl.LOCK_SH | fcntl.LOCK_NB)
    fcntl.lockf(fds["shared"], fcntl.LOCK_SH | fcntl.LOCK_NB, 10, 5)
    want = {name: held(fd) for name, fd in fds.items()}
    assert all(want.values()), want

    def look() -> None:
        while True:
            for name, fd in fds.items():
                if held(fd) != want[name]:
                    print(f"FAIL {name}: {held(fd)}, not {want[name]}", file=ticks)
            time.sleep(0.001)

    threading.Thread(target=look, daemon=True).start()
    number = 0
    while True:
        number += 1
        os.pwrite(fds["flock"], b"%d" % number, 0)
        print(f"tick {number}", file=ticks)
        time.sleep(0.005)


main()
