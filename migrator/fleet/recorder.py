"""Recording what a fleet's workloads want, for `migrator simulate` to replay."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from migrator.errors import UsageError
from migrator.fleet.observer import Observer
from policies.day import Recording, Sample


async def record(
    observer: Observer, *, every: float, seconds: float, told: Callable[[int], None] = lambda _: None
) -> Recording:
    """Look at the fleet every so many seconds. The workloads are those of the first look, wherever they go; one that
    has ended wants nothing. `told` hears the number of samples. Cancelled, it returns what there is so far; nothing is
    moved by it.

    Raises UsageError for a fleet without hosts that answer, or without workloads.
    """
    if not 0.5 <= every <= seconds:
        raise UsageError(f"{seconds:g} s, looking every {every:g} s, are no recording")
    began, at = time.monotonic(), time.time()
    first = (await observer.look(rate=0.3)).cluster
    heard = {host.name for host in first.hosts if host.name in observer.observations}
    hosts = tuple(host for host in first.hosts if host.name in heard)
    workloads = tuple(one for one in first.workloads if one.host in heard)
    if not hosts or not workloads:
        raise UsageError("nothing runs on any host that answers", hint="see `migrator hosts` and `migrator ps --all`")
    samples: list[Sample] = []
    while True:
        now = {one.name: one.used for one in observer.seen.cluster.workloads}
        used = [now.get(one.name) for one in workloads]
        samples.append(
            Sample(
                cpu=tuple(amount.cpu if amount is not None else 0.0 for amount in used),
                memory=tuple(amount.memory if amount is not None else 0.0 for amount in used),
            )
        )
        told(len(samples))
        if len(samples) * every >= seconds:
            break
        try:
            await asyncio.sleep(max(began + len(samples) * every - time.monotonic(), 0.0))
            await observer.look()
        except asyncio.CancelledError:
            break
    return Recording(began_at=at, interval=every, hosts=hosts, workloads=workloads, recorded=tuple(samples))
