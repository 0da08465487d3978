"""How fast plans are made, how far the heuristic is from the exact answer, and what a day looks like under each rule.

    make bench-fleet                     all three
    make bench-fleet ARGS="--only day --hosts 1000 --workloads 10000"

Seconds are of this process (CPU), and of the clock in brackets: on a machine that does something else too, only the
first say anything. Everything but the seconds is the same in each run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from policies import balance, compare, drain, exact, placement
from policies.day import Invented, Shape
from policies.drain import Cordon
from policies.model import Cluster, HostState
from policies.picture import svg
from policies.plan import Pace
from policies.simulate import Run, World, simulate

Result = TypeVar("Result")

SIZES = ((100, 1_000), (1_000, 10_000), (10_000, 100_000))
# Hosts, workloads, hosts being drained, share of memory in use.
INSTANCES = (
    (6, 60, 1, 0.5),
    (10, 100, 1, 0.5),
    (20, 200, 1, 0.5),
    (20, 200, 2, 0.6),
    (10, 100, 1, 0.75),
    (8, 60, 1, 0.8),
)
ROOT = Path(__file__).resolve().parents[1]


class _Look:
    """A rule that moves nothing and keeps what it is shown."""

    name = "look"

    def __init__(self) -> None:
        self.seen: list[Cluster] = []

    def plan(self, cluster: Cluster) -> tuple[()]:
        self.seen.append(cluster)
        return ()


def snapshot(shape: Shape) -> Cluster:
    """An invented day's cluster at its beginning."""
    look = _Look()
    simulate(Invented(msgspec.structs.replace(shape, hours=shape.interval / 3600)), look)
    return look.seen[0]


def draining(cluster: Cluster, count: int) -> Cluster:
    hosts = tuple(
        msgspec.structs.replace(host, state=HostState.DRAINING) if number < count else host
        for number, host in enumerate(cluster.hosts)
    )
    return msgspec.structs.replace(cluster, hosts=hosts)


def timed(call: Callable[[], Result]) -> tuple[Result, str]:
    cpu, wall = time.process_time(), time.perf_counter()
    result = call()
    return result, f"{time.process_time() - cpu:7.2f} ({time.perf_counter() - wall:.2f})"


def planning() -> None:
    print("Planning: seconds of CPU (of the clock)")
    print(
        f"{'hosts':>7} {'workloads':>9}  {'8 moves':>16}  {'all that pay, in 10 waves':>32}  {'a step of a drain':>16}"
    )
    for hosts, workloads in SIZES:
        now = snapshot(Shape(hosts=hosts, workloads=workloads))
        (few, _), of_few = timed(lambda now=now: balance.balance(now, settings=balance.Settings(hold=1)))  # type: ignore[misc]
        many_settings = balance.Settings(hold=1, pace=Pace(total=max(8, hosts // 50), waves=10))
        (many, _), of_many = timed(lambda now=now, s=many_settings: balance.balance(now, settings=s))  # type: ignore[misc]
        record = drain.begin(now, "h0")
        ready = draining(now, 1)
        step, of_step = timed(lambda now=ready, record=record: drain.step(now, record))  # type: ignore[misc]
        assert not any(isinstance(action, Cordon) for action in step.actions)
        print(
            f"{hosts:7} {workloads:9}  {of_few:>16}  {of_many:>16} {len(many.moves):5} moves  {of_step:>16}"
            f"   imbalance {many.imbalance:.3f}, {few.predicted:.3f}, {many.predicted:.3f}",
            flush=True,
        )


def distance(seconds: float) -> None:
    print(f"\nPlacement: the heuristic and the exact solver (HiGHS, at most {seconds:.0f} s) on the same drain")
    print(
        f"{'hosts':>6} {'memory':>6} {'to place':>8} {'placed':>13} {'burden: heuristic':>18} {'exact':>9} "
        f"{'bound':>9} {'above exact':>11} {'above bound':>11} {'proved':>6}   {'heuristic':>14} {'exact':>16}"
    )
    for hosts, workloads, count, memory in INSTANCES:
        now = draining(snapshot(Shape(hosts=hosts, workloads=workloads, memory=memory)), count)
        gone = {host.name for host in now.hosts[:count]}
        names = [workload.name for workload in now.workloads if workload.host in gone and not workload.pinned]
        quick, of_quick = timed(lambda now=now, names=names: placement.place(now, names))  # type: ignore[misc]
        proof, of_exact = timed(lambda now=now, names=names: exact.place(now, names, seconds=seconds))  # type: ignore[misc]
        best = proof.placement
        placed = f"{len(quick.targets)} and {len(best.targets)}"
        same = len(quick.targets) == len(best.targets)
        print(
            f"{hosts:6} {memory:6.0%} {len(names):8} {placed:>13} {quick.burden:18.5f} {best.burden:9.5f} "
            f"{proof.bound:9.5f} {_above(quick.burden, best.burden) if same else '':>11} "
            f"{_above(quick.burden, proof.bound) if same else '':>11} "
            f"{'yes' if proof.proved else 'no':>6}   {of_quick:>14} {of_exact:>16}",
            flush=True,
        )


def _above(burden: float, least: float) -> str:
    return f"{burden / least - 1:.2%}" if least > 0 else ""


def day(shape: Shape, world: World, picture: Path) -> None:
    print(f"\nA day: {shape.hosts} hosts, {shape.workloads} workloads, seed {shape.seed}")
    started = time.perf_counter()

    def told(run: Run) -> None:
        print(f"  {time.perf_counter() - started:6.0f} s  {run.rule}: {run.mean:.4f}, {run.moves} moves", flush=True)

    found = compare.invented(shape, world, done=told)
    print(compare.table(found))
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_text(svg(found))
    better = "less" if found.better() else "NOT less"
    print(f"{better} imbalance than each of the others with no more bytes sent; the picture is {picture}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("planning", "distance", "day"))
    parser.add_argument("--seconds", type=float, default=30.0, help="for each exact placement")
    parser.add_argument("--hosts", type=int, default=50)
    parser.add_argument("--workloads", type=int, default=500)
    parser.add_argument("--interval", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vanishing", type=float, default=0.0, help="share of the hosts that vanish in a day")
    parser.add_argument("--picture", type=Path, default=ROOT / "build" / "bench-fleet.svg")
    given = parser.parse_args()
    if given.only in (None, "planning"):
        planning()
    if given.only in (None, "distance"):
        distance(given.seconds)
    if given.only in (None, "day"):
        shape = Shape(hosts=given.hosts, workloads=given.workloads, interval=given.interval, seed=given.seed)
        day(shape, World(seed=given.seed, vanishing=given.vanishing), given.picture)


if __name__ == "__main__":
    main()
