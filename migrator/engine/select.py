"""Which engine does the work, and why.

Engines are tried in the order of preference; one works on a host where its every ability was found. One that refuses
what others carry (`carries_less`) is taken for workloads of which it refuses nothing (`select_for`), for what it has
saved itself (`select_like`), by its name, and where no other works. Probing takes some milliseconds, and what it found
holds as long as this program.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from migrator.engine.base import Capability, Engine, SourceOptions
from migrator.errors import MigratorError, Refused, UsageError

Candidates = Mapping[str, Callable[[], Engine]]


def _user() -> Engine:
    from migrator.engine.user.engine import UserEngine

    return UserEngine()


def _kernel() -> Engine:
    from migrator.engine.kernel.engine import KernelEngine

    return KernelEngine()


CANDIDATES: dict[str, Callable[[], Engine]] = {"kernel": _kernel, "user": _user}  # best first

_probed: dict[Callable[[], Engine], tuple[Engine, list[Capability]]] = {}


@dataclass(frozen=True)
class Choice:
    """The engine, why it is this one, and what was found of those that were looked at, by name."""

    engine: Engine
    reason: str
    probes: Mapping[str, list[Capability]]

    @property
    def abilities(self) -> list[Capability]:
        return self.probes[self.engine.name]


class _Search:
    """The candidates that work here, one after the other, and what speaks against those before."""

    def __init__(self, wanted: str, candidates: Candidates | None) -> None:
        self._candidates = CANDIDATES if candidates is None else candidates
        self._wanted = wanted
        if wanted and wanted not in self._candidates:
            raise UsageError(f"there is no engine {wanted!r}", hint=f"there are: {', '.join(self._candidates)}")
        self._probes: dict[str, list[Capability]] = {}
        self._passed_over: list[str] = []

    def working(self) -> Iterator[Engine]:
        for name, make in self._candidates.items():
            if self._wanted and name != self._wanted:
                continue
            engine, self._probes[name] = _probe(make)
            missing = [one for one in self._probes[name] if not one.available]
            if missing:
                self.pass_over(engine, ", ".join(f"no {one.name} ({one.detail})" for one in missing))
            else:
                yield engine

    def pass_over(self, engine: Engine, reason: str) -> None:
        self._passed_over.append(f"engine {engine.name}: {reason}")

    def take(self, engine: Engine, why: str = "") -> Choice:
        if self._wanted:
            why = "it was asked for"
        elif not why and not self._passed_over and len(self._candidates) > 1:
            why = "the first choice, and all that it needs is here"
        return Choice(engine, why or "; ".join(self._passed_over) or "nothing better is known", self._probes)

    def take_any(self, last_resort: Engine | None) -> Choice:
        """Where all were passed over. Raises Refused, with what each lacks, if none works."""
        if last_resort is None:
            raise Refused(self._passed_over, hint="`migrator check` on another host shows what that one can do")
        return self.take(last_resort)


def select(wanted: str = "", candidates: Candidates | None = None) -> Choice:
    """The engine that carries whatever can be carried on this host, or the one of that name.

    Raises UsageError for a name that there is not, Refused where none can work here, with what each lacks."""
    search, last_resort = _Search(wanted, candidates), None
    for engine in search.working():
        if wanted or not engine.carries_less:
            return search.take(engine)
        search.pass_over(engine, f"all that it needs is here, but it carries less than others (--engine {engine.name})")
        last_resort = last_resort or engine
    return search.take_any(last_resort)


def select_for(
    pid: int, options: SourceOptions, wanted: str = "", candidates: Candidates | None = None, *, general: bool = False
) -> Choice:
    """The first engine that refuses nothing of the workload below `pid`, which its survey finds out, and notes in
    `options`. With `general`, or a name, as select(). The workload runs before and after, and may have stood for a
    moment.

    Raises UsageError for a name that there is not, Refused where none can work here, with what each lacks."""
    if wanted or general:
        return select(wanted, candidates)
    search, last_resort = _Search("", candidates), None
    for engine in search.working():
        if not engine.carries_less:
            return search.take(engine)
        refused = _refused(engine, pid, options)
        if not refused:
            options.surveyed = True
            return search.take(engine, "the first choice, and it refuses nothing of this workload")
        search.pass_over(engine, refused)
        last_resort = last_resort or engine
    return search.take_any(last_resort)


def select_like(saved_by: str, wanted: str = "", candidates: Candidates | None = None) -> Choice:
    """The engine to restart what the engine `saved_by` has saved: the same, if it works here, as it knows what it has
    written; else as select(). Any name may be told, as it comes from an image or from a peer."""
    if not wanted:
        search = _Search("", candidates)
        for engine in search.working():
            if engine.name == saved_by:
                return search.take(engine, "it has saved this")
    return select(wanted, candidates)


def _refused(engine: Engine, pid: int, options: SourceOptions) -> str:
    """What an engine refuses of a workload: the first of its reasons; "" for nothing."""
    sink = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        with engine.source(pid, sink, options) as source:
            source.survey()
    except Refused as error:
        more = f", and {len(error.reasons) - 1} more" if len(error.reasons) > 1 else ""
        return f"{error.reasons[0]}{more}"
    except (MigratorError, OSError) as error:  # whoever does the work says more
        return error.message if isinstance(error, MigratorError) else str(error)
    finally:
        os.close(sink)
    return ""


def _probe(make: Callable[[], Engine]) -> tuple[Engine, list[Capability]]:
    if make not in _probed:
        engine = make()
        _probed[make] = engine, engine.probe()
    return _probed[make]
