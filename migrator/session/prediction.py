"""How long a workload will stand still: what is there, times what each costs between these two hosts.

    predicted = base + costs x (processes, threads, mappings, descriptors by kind) + files + residual / throughput
                + round trips

The costs begin as those that were measured with the user engine on two cores. Each migration between two hosts
corrects those that it says something about: of a workload of 300 processes the cost of a process, of one with 1000
sockets that of a socket, of a small one the base. They are kept in a small file beside the journals, by destination;
a destination that is new begins with what was learnt of all. Where the file is missing or broken, the measured costs
stand alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from migrator.engine.base import Survey, Work

_NAME = "costs.json"
_MOST = 200  # destinations that are remembered
_ANY = ""  # stands for all destinations together
_RATE = 0.3  # part of an error that is learnt from one migration
_FIRST_RATE = 0.6  # the same of the first one: until then it is another machine's costs
_RANGE = 20.0  # times by which a cost can differ from what was measured
_SURPRISE = 3.0  # times the prediction beyond which one migration says no more: the machine was busy

# Seconds, freeze and restore together; `make bench` shows them.
MEASURED = {
    "base": 0.008,
    "processes": 0.0005,
    "threads": 0.00012,
    "mappings": 0.000002,
    "files": 0.0000145,
    "pipes": 0.00002,
    "sockets": 0.00012,
    "others": 0.00008,
}

# A freeze that takes longer than the limit by more than this part of it, or this many seconds, is an overrun.
TOLERANCE, LEAST_TOLERANCE = 0.25, 0.02

_Cost = Annotated[float, Meta(ge=0.0, le=100.0)]


class Costs(msgspec.Struct, frozen=True):
    """Seconds that each thing adds to a stop; see `MEASURED`.

    throughput: bytes/s of stream, before compression, that flowed without a cap; 0.0 if that was never seen
    error:      running average of |actual - predicted| in seconds
    moves:      migrations that this was learnt from"""

    each: dict[str, _Cost] = msgspec.field(default_factory=lambda: dict(MEASURED))
    throughput: Annotated[float, Meta(ge=0.0)] = 0.0
    error: Annotated[float, Meta(ge=0.0)] = 0.0
    moves: Annotated[int, Meta(ge=0)] = 0

    def seconds(self, work: Work) -> float:
        """To stop, save, restore and resume `work`, without memory, changed files and round trips."""
        return sum(self._parts(work).values())

    def looking(self, work: Work) -> float:
        """Seconds of that to look through the mappings for what was written; a round does it too."""
        return self._parts(work)["mappings"]

    def corrected(self, work: Work, seconds: float, throughput: float = 0.0) -> Costs:
        """After a migration of `work` that took `seconds` for the same; `throughput` was seen, 0.0 for none.

        An error is shared out as the squares of the parts: what was much of it is what it tells of."""
        parts = self._parts(work)
        expected = sum(parts.values())
        amount = min(max(seconds, 0.0), _SURPRISE * expected) - expected
        rate = max(_RATE, _FIRST_RATE / (self.moves + 1))
        squares = sum(part * part for part in parts.values())
        each = {**MEASURED, **self.each}
        for name, part in parts.items():
            if part > 0.0:
                factor = 1 + rate * amount * part / squares
                each[name] = min(max(each[name] * factor, MEASURED[name] / _RANGE), MEASURED[name] * _RANGE)
        weight = max(_RATE, 1 / (self.moves + 1))
        flow = self.throughput + (weight * (throughput - self.throughput) if throughput else 0.0)
        error = self.error + weight * (abs(seconds - expected) - self.error)
        return Costs(each, flow, error, self.moves + 1)

    def _parts(self, work: Work) -> dict[str, float]:
        amounts = {"base": 1, **dataclasses.asdict(work)}
        return {name: self.each.get(name, cost) * amounts[name] for name, cost in MEASURED.items()}


def latest(max_downtime: float) -> float:
    """Seconds from the freeze by which the copy must run for `max_downtime` to count as kept."""
    return max_downtime + max(TOLERANCE * max_downtime, LEAST_TOLERANCE)


def work_of(survey: Survey | None) -> Work:
    """What a survey has counted, or what follows from it where its engine does not count."""
    if survey is None:
        return Work(processes=1, threads=1)
    return survey.work or Work(processes=len(survey.pids), threads=survey.threads, sockets=survey.tcp_connections)


def load(directory: Path, destination: str) -> Costs:
    """What is known of migrations to `destination`."""
    known = _read(directory)
    return known.get(destination) or known.get(_ANY) or Costs()


def learn(directory: Path, destination: str, work: Work, seconds: float, throughput: float = 0.0) -> Costs:
    """Take a migration into account; see `Costs.corrected`. Where it cannot be kept, that is no error."""
    known = _read(directory)
    of_all = known.get(_ANY) or Costs()
    for name in (_ANY, destination):
        before = known.pop(name, of_all)
        known[name] = before.corrected(work, seconds, throughput)  # the last one is the one used last
    for name in list(known)[: max(0, len(known) - _MOST)]:
        del known[name]
    _write(directory, known)
    return known[destination]


def doubt(directory: Path, destination: str) -> None:
    """A migration was given up because of what it was predicted to take. What nobody tries nobody corrects: costs
    above the measured ones come a little nearer to them."""
    known = _read(directory)
    for name in {_ANY, destination} & known.keys():
        before = known[name]
        each = {**MEASURED, **before.each}
        nearer = {cost: each[cost] - _RATE * max(0.0, each[cost] - MEASURED[cost]) for cost in MEASURED}
        known[name] = msgspec.structs.replace(before, each=nearer)
    _write(directory, known)


def _read(directory: Path) -> dict[str, Costs]:
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode((directory / _NAME).read_bytes(), type=dict[str, Costs])
    return {}


def _write(directory: Path, known: dict[str, Costs]) -> None:
    with contextlib.suppress(OSError):
        fresh = directory / f".{_NAME}.{os.getpid()}"
        fresh.write_bytes(msgspec.json.encode(known))
        os.replace(fresh, directory / _NAME)
