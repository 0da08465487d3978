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

from migrator.engine.base import FileFact, Phase, Round, Survey
from migrator.errors import TransportError

VERSION = 2
MAX_MESSAGE = 1 << 20  # bytes, as the transport allows
FILE_CHUNK = 512 << 10  # bytes of a file in one message

Id = Annotated[str, Meta(min_length=8, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Name = Annotated[str, Meta(max_length=256)]
Text = Annotated[str, Meta(max_length=4096)]
Path = Annotated[str, Meta(min_length=1, max_length=4096)]
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e15)]
LISTED = 2048  # entries of a list in one message
FileName = Annotated[bytes, Meta(max_length=255)]
FilePath = Annotated[bytes, Meta(max_length=4095)]
Mode = Annotated[int, Meta(ge=0, le=0o177777)]
Owner = Annotated[int, Meta(ge=0, le=(1 << 32) - 2)]
Stamp = Annotated[int, Meta(ge=-(1 << 62), le=(1 << 62))]  # ns since 1970
Nanoseconds = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class MessageError(TransportError):
    """The peer said something that is not in the protocol."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="type"):
    """Base of all messages."""


class HostFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one host has to say about itself before a migration.

    cpu_features:  flags of /proc/cpuinfo
    xstate_size:   bytes of the extended processor state as ptrace shows it
    capabilities:  what the engine here can do, and what it lacks with the reason
    """

    host: Name
    kernel: Name
    machine: Name
    cpu_vendor: Name
    cpu_model: Name
    cpu_features: frozenset[str]
    xstate_size: Count
    engine: Name
    abilities: dict[str, bool] = {}
    memory_available: Count = 0  # bytes
    pid_max: Count = 0
    boot_id: Name = ""


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

    versions: list[Annotated[int, Meta(ge=1, le=1000)]]
    software: Name = ""
    host: Name = ""


class SyncTree(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is carried along as a whole: all below the directory `path`, as the workload sees it; or of that
    directory only the file `only`. Its inode number and the time of its last change (ns) tell whether both hosts
    look at the same directory."""

    path: Annotated[str, Meta(max_length=4096, pattern=r"^/")]
    only: FileName = b""
    inode: Count = 0  # its lower 63 bits
    changed_ns: Stamp = 0


class Propose(Message, tag="propose", frozen=True):
    """source: may this workload come to you? `dry_run`: nothing will follow."""

    migration: Id
    source: HostFacts
    survey: Survey
    container: Name = ""
    container_spec: Annotated[str, Meta(max_length=1 << 16)] = ""
    copy_files: bool = False
    dry_run: bool = False
    trees: Annotated[list[SyncTree], Meta(max_length=64)] = []


class Verdict(Message, tag="verdict", frozen=True):
    """destination: what stands in the way, if anything, and which files it wants (with `copy_files`)."""

    destination: HostFacts
    reasons: list[Reason] = []
    wanted: list[Path] = []


class Begin(Message, tag="begin", frozen=True):
    """source: the stream begins."""

    migration: Id


class FileBegin(Message, tag="file-begin", frozen=True):
    """source: a file that the destination wanted. `in_place`: it was sent before, and only changes follow."""

    file: FileFact
    uid: Count = 0
    gid: Count = 0
    in_place: bool = False


class FileData(Message, tag="file-data", frozen=True):
    offset: Count
    data: Annotated[bytes, Meta(max_length=FILE_CHUNK)]


class FileEnd(Message, tag="file-end", frozen=True):
    """source: the file is complete; `digest` is the sha256 of it, "" after changes in place."""

    size: Count
    digest: Annotated[str, Meta(max_length=64)] = ""


class FilesSync(Message, tag="files-sync", frozen=True):
    """source: say when all files sent so far are in place. The destination sends it back."""

    number: Count


class Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One file of a tree, as lstat(2) shows it.

    path:    from the top of the tree, without a slash at its beginning; of a listing only its last component
    target:  of a symbolic link
    link:    the path of another name of the same file, which was named before
    mount:   a mount point: to be there as a directory, and not to be looked into
    """

    path: FilePath
    mode: Mode
    size: Count = 0
    mtime_ns: Stamp = 0
    uid: Owner = 0
    gid: Owner = 0
    target: Annotated[bytes, Meta(max_length=4096)] = b""
    link: FilePath = b""
    mount: bool = False
    xattrs: dict[Name, Annotated[bytes, Meta(max_length=1 << 16)]] = {}


class TreeList(Message, tag="tree-list", frozen=True):
    """source: what it has in one directory of tree `tree`, by name: all after `after`, up to the last entry,
    or if `last` to the end. Comes after the verdict and before `begin`, as often as needed."""

    number: Count
    tree: Count
    directory: FilePath
    after: FileName
    last: bool
    entries: Annotated[list[Entry], Meta(max_length=LISTED)]


class TreeAnswer(Message, tag="tree-answer", frozen=True):
    """destination: which of these entries are not the same here, by their index, and what is here only. `last`:
    nothing more about this list."""

    number: Count
    differing: Annotated[list[Count], Meta(max_length=LISTED)] = []
    surplus: Annotated[list[FileName], Meta(max_length=LISTED)] = []
    last: bool = True


class Put(msgspec.Struct, frozen=True, array_like=True, tag="put"):
    """Make it, in place of whatever has its name: a directory, a link, a FIFO, or a file with this content."""

    entry: Entry
    data: Annotated[bytes, Meta(max_length=FILE_CHUNK)] = b""


class Open(msgspec.Struct, frozen=True, array_like=True, tag="open"):
    """A regular file follows, to be put in place when it is closed; with `in_place` only what has changed, into
    the file that is there."""

    entry: Entry
    in_place: bool = False


class Write(msgspec.Struct, frozen=True, array_like=True, tag="write"):
    offset: Count
    data: Annotated[bytes, Meta(max_length=FILE_CHUNK)]


class Close(msgspec.Struct, frozen=True, array_like=True, tag="close"):
    """The file that was opened is complete."""


class Touch(msgspec.Struct, frozen=True, array_like=True, tag="touch"):
    """Owner, mode, time and attributes of what is there."""

    entry: Entry


class Join(msgspec.Struct, frozen=True, array_like=True, tag="join"):
    """`path` becomes another name of the file `to`."""

    path: FilePath
    to: FilePath


class Remove(msgspec.Struct, frozen=True, array_like=True, tag="remove"):
    """`path`, with all below it, is gone; `aside`: it never was on the source, and is to be kept elsewhere."""

    path: FilePath
    aside: bool = False


class Stash(msgspec.Struct, frozen=True, array_like=True, tag="stash"):
    """`path` will be somewhere else: keep it under `number`."""

    path: FilePath
    number: Count


class Unstash(msgspec.Struct, frozen=True, array_like=True, tag="unstash"):
    """What was kept under `number` is now `path`, in place of whatever has its name."""

    number: Count
    path: FilePath


class Drop(msgspec.Struct, frozen=True, array_like=True, tag="drop"):
    """What was kept under `number` is gone."""

    number: Count


TreeOp = Put | Open | Write | Close | Touch | Join | Remove | Stash | Unstash | Drop


class TreeOps(Message, tag="tree-ops", frozen=True):
    """source: what to do in tree `tree`, in this order."""

    tree: Count
    ops: Annotated[list[TreeOp], Meta(max_length=LISTED)]


class Standing(Message, tag="standing", frozen=True):
    """destination: the shells stand, and all that came up to the end of pre-copy round `round` is in place."""

    migration: Id
    round: Count


class Ready(Message, tag="ready", frozen=True):
    """destination: the copy is built and stopped, and nothing is left that could be refused."""

    migration: Id
    built_at: Nanoseconds  # CLOCK_MONOTONIC of the destination


class OrphanedConnection(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
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
    """destination: its phases, once it runs."""

    migration: Id
    phases: list[Phase]
    pid: Count = 0


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


class Query(Message, tag="query", frozen=True):
    """A question outside any migration, as `migrator ps` asks; `what` names it."""

    what: Name
    argument: Annotated[str, Meta(max_length=1 << 16)] = ""


class Result(Message, tag="result", frozen=True):
    """The answer to a query: JSON."""

    json: str


AnyMessage = (
    Hello
    | Propose
    | Verdict
    | Begin
    | FileBegin
    | FileData
    | FileEnd
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
    | Query
    | Result
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
