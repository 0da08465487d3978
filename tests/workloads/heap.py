# SPDX-License-Identifier: Apache-2.0
"""heap.py OUTFILE [MIB]: a Python program with a large, changing heap, threads and subprocesses.

It knows what every object it holds must be, because each is made from its number; objects are
replaced all the time and compared with fresh ones. Threads pass numbers through queues, long-lived
subprocesses answer through pipes, short-lived ones come and go. Lines as in workload.h.
"""

from __future__ import annotations

import hashlib
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time

ECHO = """
import hashlib, sys
for line in sys.stdin:
    print(hashlib.sha256(line.strip().encode()).hexdigest(), flush=True)
"""


def make(number: int) -> object:
    """An object of about a kilobyte, always the same for the same number."""
    chance = random.Random(number)
    return {
        "number": number,
        "bytes": chance.randbytes(400),
        "floats": [chance.random() for _ in range(5)],
        "text": f"object {number} " * chance.randrange(1, 20),
        "nested": ({"key": number * 3}, frozenset((number, -number)), [None, True, 1 << number % 200]),
    }


class Square(threading.Thread):
    """Takes numbers from one queue, puts their squares into the next."""

    def __init__(self, source: queue.Queue[int], sink: queue.Queue[int]) -> None:
        super().__init__(daemon=True)
        self.source, self.sink = source, sink
        self.local = threading.local()
        self.start()

    def run(self) -> None:
        self.local.count = 0
        while True:
            number = self.source.get()
            self.local.count += 1
            self.sink.put(number * number)


class Answerer:
    """A subprocess that answers a question with its digest, for as long as the program lives."""

    def __init__(self, out: str) -> None:
        command = [sys.executable, "-u", "-c", ECHO, out]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def check(self, question: str) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(question + "\n")
        answer = self.process.stdout.readline().strip()
        wanted = hashlib.sha256(question.encode()).hexdigest()
        assert answer == wanted, f"{question!r} was answered with {answer!r}, not {wanted!r}"


def main() -> None:
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    path = sys.argv[1]
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def line(text: str) -> None:
        os.write(out, text.encode() + b"\n")

    try:
        count = int(sys.argv[2] if len(sys.argv) > 2 else 16) * 512
        heap = {slot: make(slot) for slot in range(count)}
        numbers = {slot: slot for slot in range(count)}
        first: queue.Queue[int] = queue.Queue()
        second: queue.Queue[int] = queue.Queue()
        last: queue.Queue[int] = queue.Queue()
        threads = [Square(first, second), Square(second, last)]
        answerers = [Answerer(path) for _ in range(2)]
        line(f"ready pid={os.getpid()}")
        turn = ticks = 0
        said = 0.0
        while not stopping.is_set():
            turn += 1
            for _ in range(20):
                slot = random.randrange(count)
                assert heap[slot] == make(numbers[slot]), f"object {numbers[slot]} in slot {slot} changed"
                numbers[slot] = turn * count + slot
                heap[slot] = make(numbers[slot])
            first.put(turn)
            assert last.get(timeout=60) == turn**4
            answerers[turn % 2].check(f"question {turn}")
            if turn % 50 == 0:
                done = subprocess.run(["sed", "s/a/b/"], input="banana", capture_output=True, text=True)
                assert done.stdout == "bbnana" and done.returncode == 0, f"sed: {done}"
            assert all(thread.is_alive() for thread in threads)
            if time.monotonic() - said > 0.1:
                said = time.monotonic()
                ticks += 1
                line(f"tick {ticks} turn {turn}")
            time.sleep(0.002)
        for slot in range(count):
            assert heap[slot] == make(numbers[slot]), f"object {numbers[slot]} in slot {slot} changed"
        for answerer in answerers:
            assert answerer.process.stdin
            answerer.process.stdin.close()
            assert answerer.process.wait() == 0
    except BaseException as error:
        line(f"FAIL pid={os.getpid()} {type(error).__name__}: {error}")
        raise
    line("ok")


if __name__ == "__main__":
    main()
