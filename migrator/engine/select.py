"""Which engine does the work on this host, and why.

Engines are tried in the order of preference; the first whose every ability was found there, and which does not refuse
what others carry, is chosen; one that does is taken where there is no other, or by its name. Probing takes some
milliseconds, and what it found holds as long as this program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from migrator.engine.base import Capability, Engine
from migrator.errors import Refused, UsageError


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


def select(wanted: str = "", candidates: Mapping[str, Callable[[], Engine]] | None = None) -> Choice:
    """The best engine of `candidates` for this host, or the one of that name.

    Raises UsageError for a name that there is not, Refused where none can work here, with what each lacks."""
    candidates = CANDIDATES if candidates is None else candidates
    if wanted and wanted not in candidates:
        raise UsageError(f"there is no engine {wanted!r}", hint=f"there are: {', '.join(candidates)}")
    probes: dict[str, list[Capability]] = {}
    passed_over: list[str] = []
    last_resort: Engine | None = None
    for name, make in candidates.items():
        if wanted and name != wanted:
            continue
        engine, probes[name] = _probe(make)
        missing = [one for one in probes[name] if not one.available]
        if missing:
            passed_over.append(f"engine {name}: " + ", ".join(f"no {one.name} ({one.detail})" for one in missing))
        elif not wanted and engine.carries_less:
            passed_over.append(
                f"engine {name}: all that it needs is here, but it carries less than others (--engine {name})"
            )
            last_resort = last_resort or engine
        else:
            reason = "it was asked for" if wanted else "nothing better is known"
            if passed_over:
                reason = "; ".join(passed_over)
            elif not wanted and len(candidates) > 1:
                reason = "the first choice, and all that it needs is here"
            return Choice(engine, reason, probes)
    if last_resort is not None:
        return Choice(last_resort, "; ".join(passed_over), probes)
    raise Refused(passed_over, hint="`migrator check` on another host shows what that one can do")


def _probe(make: Callable[[], Engine]) -> tuple[Engine, list[Capability]]:
    if make not in _probed:
        engine = make()
        _probed[make] = engine, engine.probe()
    return _probed[make]
