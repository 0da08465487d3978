"""What engines find out, as it crosses between hosts: bounded, and converted here and nowhere else.

An engine's own values (`migrator.engine.base`) are never decoded from the network. Each type here has `of()`, for
what is sent, and `value()`, for what has come.
"""

from __future__ import annotations

from typing import Annotated, Self

import msgspec
from msgspec import Meta

from migrator.engine import base
from migrator.protocol.wire import (
    MOST_FILES,
    MOST_NOTES,
    MOST_PIDS,
    Count,
    Features,
    Mode,
    Name,
    Nanoseconds,
    Part,
    Path,
    Pid,
    Rate,
    Stamp,
    Text,
)

_BuildId = Annotated[str, Meta(max_length=128, pattern=r"^[0-9a-f]*\Z")]
_Digest = Annotated[str, Meta(max_length=64, pattern=r"^[0-9a-f]*\Z")]


class FileFact(Part, frozen=True):
    """See `migrator.engine.base.FileFact`."""

    path: Path
    size: Count
    mode: Mode
    mtime_ns: Stamp
    build_id: _BuildId
    writable: bool
    digest: _Digest = ""

    @classmethod
    def of(cls, fact: base.FileFact) -> Self:
        return cls(fact.path, fact.size, fact.mode, fact.mtime_ns, fact.build_id, fact.writable, fact.digest)

    def value(self) -> base.FileFact:
        return base.FileFact(self.path, self.size, self.mode, self.mtime_ns, self.build_id, self.writable, self.digest)


class Survey(Part, frozen=True):
    """See `migrator.engine.base.Survey`."""

    pids: Annotated[list[Pid], Meta(max_length=MOST_PIDS)]
    threads: Annotated[int, Meta(ge=0, le=1 << 22)]
    rss_bytes: Count
    files: Annotated[list[FileFact], Meta(max_length=MOST_FILES)]
    cpu_features: Features
    xstate_size: Annotated[int, Meta(ge=0, le=1 << 20)]
    tracker: Name
    tcp_connections: Count
    wanted_pids: Annotated[list[Pid], Meta(max_length=MOST_PIDS)]
    notes: Annotated[list[tuple[Text, Text]], Meta(max_length=MOST_NOTES)] = msgspec.field(default_factory=list)
    cap_bounding: Count = 0
    most_files: Count = 0
    congestion: Features = frozenset()

    @classmethod
    def of(cls, survey: base.Survey) -> Self:
        return cls(
            survey.pids,
            survey.threads,
            survey.rss_bytes,
            [FileFact.of(fact) for fact in survey.files],
            survey.cpu_features,
            survey.xstate_size,
            survey.tracker,
            survey.tcp_connections,
            survey.wanted_pids,
            [(about[:4000], note[:4000]) for about, note in survey.notes[:MOST_NOTES]],
            survey.cap_bounding,
            survey.most_files,
            survey.congestion,
        )

    def value(self) -> base.Survey:
        return base.Survey(
            self.pids,
            self.threads,
            self.rss_bytes,
            [fact.value() for fact in self.files],
            self.cpu_features,
            self.xstate_size,
            self.tracker,
            self.tcp_connections,
            self.wanted_pids,
            self.notes,
            self.cap_bounding,
            self.most_files,
            self.congestion,
        )


class Round(Part, frozen=True):
    """See `migrator.engine.base.Round`."""

    number: Annotated[int, Meta(ge=1, le=1 << 31)]
    pages: Count
    zero_pages: Count
    bytes: Count
    start: Nanoseconds
    end: Nanoseconds
    dirty_rate: Rate
    remaining: Annotated[int, Meta(ge=-1, le=(1 << 63) - 1)] = -1

    def __post_init__(self) -> None:
        _check_order(self.start, self.end)

    @classmethod
    def of(cls, made: base.Round) -> Self:
        return cls(
            made.number,
            made.pages,
            made.zero_pages,
            made.bytes,
            made.start,
            made.end,
            min(max(made.dirty_rate, 0.0), 1e18),
            made.remaining,
        )

    def value(self) -> base.Round:
        return base.Round(
            self.number,
            self.pages,
            self.zero_pages,
            self.bytes,
            self.start,
            self.end,
            self.dirty_rate,
            self.remaining,
        )


class Phase(Part, frozen=True):
    """See `migrator.engine.base.Phase`; of the host that says it."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    start: Nanoseconds
    end: Nanoseconds
    bytes: Count = 0
    pages: Count = 0

    def __post_init__(self) -> None:
        _check_order(self.start, self.end)

    @classmethod
    def of(cls, phase: base.Phase) -> Self:
        return cls(phase.name, phase.start, phase.end, phase.bytes, phase.pages)

    def value(self) -> base.Phase:
        return base.Phase(self.name, self.start, self.end, self.bytes, self.pages)


def _check_order(start: int, end: int) -> None:
    if end < start:
        raise ValueError("it ends before it starts")
