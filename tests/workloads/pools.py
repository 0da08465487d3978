"""Worker processes with queues, locks, a barrier and named shared memory: `pools.py OUT`. Says "tick" as it goes on."""

from __future__ import annotations

import multiprocessing
import multiprocessing.shared_memory
import os
import sys
from typing import Any

ROUND = 20


def work(tasks: Any, results: Any, lock: Any, total: Any, barrier: Any, name: str) -> None:
    shm = multiprocessing.shared_memory.SharedMemory(name)
    for n in iter(tasks.get, None):
        with lock:
            total.value += n
            shm.buf[0] = (shm.buf[0] + 1) % 256
        if n < 3:
            barrier.wait(20)
        results.put((os.getpid(), n * n))


def main() -> None:
    out = open(sys.argv[1], "a", buffering=1)  # noqa: SIM115
    context = multiprocessing.get_context("fork")
    tasks, results, lock, barrier = context.Queue(), context.Queue(), context.Lock(), context.Barrier(3)
    total = context.Value("q", 0)
    shm = multiprocessing.shared_memory.SharedMemory(create=True, size=100_000)
    workers = [context.Process(target=work, args=(tasks, results, lock, total, barrier, shm.name)) for _ in range(3)]
    for worker in workers:
        worker.start()
    print("ready", file=out)
    answers = 0
    while True:
        for n in range(ROUND):
            tasks.put(n)
        got = sorted(results.get(timeout=20)[1] for _ in range(ROUND))
        answers += ROUND
        if got != [n * n for n in range(ROUND)] or total.value != answers * (ROUND - 1) // 2:
            print("FAIL", got, total.value, answers, file=out)
        if shm.buf[0] != answers % 256 or not all(worker.is_alive() for worker in workers):
            print("FAIL", shm.buf[0], workers, file=out)
        print("tick", answers, file=out)


if __name__ == "__main__":
    main()
