"""The messages of the control channel: typed, bounded, and nothing else is understood.

Each is one msgpack map with its name under "type" (msgspec tagged structs). The peer is hostile until
proven otherwise: an unknown type, an unknown or missing field, a wrong type, a number or a text beyond its
bounds is a `MessageError`, and none of it is acted upon. `docs/protocol.md` lists them with their order.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated

import msgspec
from msgspec import Meta

from migrator.protocol.facts import Phase, Round, Survey
from migrator.protocol.fleet import (
    Depart,
    Departed,
    Departing,
    FleetId,
    ImageList,
    Images,
    Observe,
    Observed,
    Revive,
    Revived,
    Save,
    Saved,
    Token,
    WatchDeparture,
)
from migrator.protocol.trees import SyncTree, TreeAnswer, TreeList, TreeOps
from migrator.protocol.wire import (
    MAX_MESSAGE,
    MOST_FILES,
    MOST_PHASES,
    Count,
    Features,
    Id,
    Message,
    Name,
    Nanoseconds,
    Part,
    Path,
    Seconds,
    Text,
)
from migrator.protocol.wire import MessageError as MessageError

VERSION = 3


class HostFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one host has to say about itself before a migration.

    cpu_features:  flags of /proc/cpuinfo
    xstate_size:   bytes of the extended processor state as ptrace shows it
    abilities:     what the engine here can do and what not
    cap_bounding:  capabilities that a task may have that is restarted here; 0 where nobody has looked
    vdso:          digest of the code that the kernel maps into every process
    nr_open:       fs.nr_open, above which no process may have descriptors
    confined:      what else it would be under here for good, "" for nothing
    """

    host: Name
    kernel: Name
    machine: Name
    cpu_vendor: Name
    cpu_model: Name
    cpu_features: Features
    xstate_size: Count
    engine: Name
    abilities: Annotated[dict[Name, bool], Meta(max_length=256)] = msgspec.field(default_factory=dict)
    memory_available: Count = 0  # bytes
    pid_max: Count = 0
    boot_id: Name = ""
    cap_bounding: Count = 0
    confined: Text = ""
    vdso: Name = ""
    nr_open: Count = 0


class Reason(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a workload cannot be moved there (or what to know if it is): object, problem, remedy."""

    object: Text
    problem: Text
    remedy: Text = ""
    blocking: bool = True

    def __str__(self) -> str:
        return f"{self.object}: {self.problem}" + (f" ({self.remedy})" if self.remedy else "")


class Hello(Message, tag="hello", frozen=True):
    """First message of both sides on every link. The greatest common version is spoken."""

    versions: Annotated[list[Annotated[int, Meta(ge=1, le=1000)]], Meta(min_length=1, max_length=32)]
    software: Name = ""
    host: Name = ""


class Propose(Message, tag="propose", frozen=True):
    """source: may this workload come to you? `dry_run`: nothing will follow.

    fleet, token: of the controller that wants it; 0 where a person does
    verify: look at the copy before it runs, and discard it if it is not what was saved
    """

    migration: Id
    source: HostFacts
    survey: Survey
    container: Name = ""
    container_spec: Annotated[str, Meta(max_length=1 << 16)] = ""
    copy_files: bool = False
    dry_run: bool = False
    trees: Annotated[list[SyncTree], Meta(max_length=64)] = msgspec.field(default_factory=list)
    fleet: FleetId = ""
    token: Token = 0
    verify: bool = False


class Verdict(Message, tag="verdict", frozen=True):
    """destination: what stands in the way, if anything, and which files it wants (with `copy_files`)."""

    destination: HostFacts
    reasons: Annotated[list[Reason], Meta(max_length=MOST_FILES)] = msgspec.field(default_factory=list)
    wanted: Annotated[list[Path], Meta(max_length=MOST_FILES)] = msgspec.field(default_factory=list)


class Begin(Message, tag="begin", frozen=True):
    """source: files and the stream follow. `trees`: those of the files that were wanted, numbered after the proposed
    ones."""

    migration: Id
    trees: Annotated[list[SyncTree], Meta(max_length=MOST_FILES)] = msgspec.field(default_factory=list)


class FilesSync(Message, tag="files-sync", frozen=True):
    """source: say when all files sent so far are in place. The destination sends it back."""

    number: Count


class Standing(Message, tag="standing", frozen=True):
    """destination: the stubs stand, and all that came up to the end of pre-copy round `round` is in place."""

    migration: Id
    round: Count


class Ready(Message, tag="ready", frozen=True):
    """destination: the copy is built and stopped, and nothing is left that could be refused."""

    migration: Id
    built_at: Nanoseconds  # CLOCK_MONOTONIC of the destination


class OrphanedConnection(Part, frozen=True):
    """A TCP connection of a container; addresses as text."""

    local: Annotated[str, Meta(max_length=45)]
    local_port: Annotated[int, Meta(ge=0, le=65535)]
    peer: Annotated[str, Meta(max_length=45)]
    peer_port: Annotated[int, Meta(ge=0, le=65535)]

    def __post_init__(self) -> None:
        ipaddress.ip_address(self.local)
        ipaddress.ip_address(self.peer)


class Orphans(Message, tag="orphans", frozen=True):
    """source: before `commit`: these connections were closed by their program and stay with me until they have
    ended; their frames go through this link, both ways."""

    migration: Id
    connections: Annotated[list[OrphanedConnection], Meta(max_length=4096)]


class Commit(Message, tag="commit", frozen=True):
    """source: run it. From here on the destination decides."""

    migration: Id


class Running(Message, tag="running", frozen=True):
    """destination: decided, the copy runs; or `waits` until the source copy has given up its locks, and is said again
    once it runs."""

    migration: Id
    resumed_at: Nanoseconds = 0  # CLOCK_MONOTONIC of the destination; 0 if that is not known
    waits: bool = False


class Discarded(Message, tag="discarded", frozen=True):
    """destination: decided, the copy will never run."""

    migration: Id
    reason: Text = ""


class Abort(Message, tag="abort", frozen=True):
    """source: it is over; COMMIT was not and will not be sent."""

    migration: Id
    reason: Text = ""


class Ask(Message, tag="ask", frozen=True):
    """source: RUNNING or DISCARDED? Whoever is asked decides, if that is not yet done."""

    migration: Id


class Done(Message, tag="done", frozen=True):
    """source: RUNNING was heard, the source copy is gone. Nobody will ask again.

    downtime in seconds and bytes of stream and wire are for the records of the destination.
    """

    migration: Id
    downtime: Seconds = 0.0
    stream_bytes: Count = 0
    wire_bytes: Count = 0
    compression_ratio: Seconds = 1.0


class DestinationReport(Message, tag="report", frozen=True):
    """destination: its phases, once it runs, and when its programs sent their first packet (CLOCK_MONOTONIC of the
    destination; 0 if they sent none in the time that was looked at)."""

    migration: Id
    phases: Annotated[list[Phase], Meta(max_length=MOST_PHASES)]
    pid: Count = 0
    first_packet: Nanoseconds = 0


class Progress(Message, tag="progress", frozen=True):
    """source: how a round of pre-copy went, for those who watch on the destination."""

    round: Round
    predicted_downtime: Seconds
    throughput: Seconds  # bytes/s
    verdict: Name
    reason: Text


class Clock(Message, tag="clock", frozen=True):
    """source: what time is it there? The destination sends it back with `answered`."""

    asked: Nanoseconds
    answered: Nanoseconds = 0  # CLOCK_MONOTONIC of the destination


class Failure(Message, tag="failure", frozen=True):
    """Either: I cannot go on with this link, and why."""

    reason: Text
    hint: Text = ""


AnyMessage = (
    Hello
    | Propose
    | Verdict
    | Begin
    | FilesSync
    | TreeList
    | TreeAnswer
    | TreeOps
    | Standing
    | Ready
    | Orphans
    | Commit
    | Running
    | Discarded
    | Abort
    | Ask
    | Done
    | DestinationReport
    | Progress
    | Clock
    | Failure
    | Observe
    | Observed
    | Depart
    | WatchDeparture
    | Departing
    | Departed
    | Save
    | Saved
    | Images
    | ImageList
    | Revive
    | Revived
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    """Raises MessageError for one that no peer would take."""
    data = _encoder.encode(message)
    if len(data) > MAX_MESSAGE:
        kind = type(message).__name__
        raise MessageError(f"a {kind} message of {len(data)} bytes is too long", hint="fewer files, maybe")
    return data


def decode(data: bytes) -> AnyMessage:
    """Raises MessageError, with what is wrong with it."""
    if len(data) > MAX_MESSAGE:
        raise MessageError(f"a message of {len(data)} bytes")
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MessageError(f"not a message of this protocol: {error}") from error


def common_version(theirs: list[int]) -> int:
    """The version to speak. Raises MessageError where there is none."""
    if VERSION in theirs:
        return VERSION
    raise MessageError(
        f"the peer speaks versions {theirs[:8]} of the protocol, we speak {VERSION}",
        hint="install the same release of migrator on both hosts",
    )


def text(value: object) -> str:
    """`str(value)`, cut to what a message may carry."""
    return str(value)[:4000]
