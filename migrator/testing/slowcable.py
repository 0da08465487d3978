"""A cable on which every frame takes its time, for kernels without sch_netem(8).

    python -m migrator.testing.slowcable NEAR FAR 0.025

passes frames between two devices of its network namespace, each `seconds` after it came; says "ready" first.
"""

from __future__ import annotations

import select
import sys
import time
from collections import deque

from migrator.container.packet_socket import PacketSocket, give_all

_EVERYTHING = [(0x06, 0, 0, 0xFFFFFFFF)]  # BPF_RET


def carry(near: str, far: str, seconds: float) -> None:
    """Until the process ends."""
    ends = PacketSocket(near, promiscuous=True), PacketSocket(far, promiscuous=True)
    poll = select.poll()
    for end in ends:
        end.admit(_EVERYTHING)
        poll.register(end.fileno(), select.POLLIN)
    print("ready", flush=True)
    under_way: deque[tuple[float, PacketSocket, list[bytes]]] = deque()
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) * 1000 if under_way else None
        poll.poll(wait)
        now = time.monotonic()
        for end, other in (ends, ends[::-1]):
            if frames := end.take():
                under_way.append((now + seconds, other, frames))
        while under_way and under_way[0][0] <= time.monotonic():
            _, end, frames = under_way.popleft()
            give_all(end, frames)


if __name__ == "__main__":
    carry(sys.argv[1], sys.argv[2], float(sys.argv[3]))
